//! What is wrong with objects, as far as it shows when they are put together.

use podway_model::{Rejection, Service};

/// Something that an operator should know about an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Finding {
    /// Kind of the object: `Service`, `EndpointSlice` or `Pod`.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The field at fault.
    pub field: String,
    /// What is wrong, what is done about it, and what would be right.
    pub cause: String,
}

impl Finding {
    pub(crate) fn service(service: &Service, field: &str, cause: String) -> Self {
        Self {
            kind: "Service".to_owned(),
            namespace: service.namespace.clone(),
            name: service.name.clone(),
            field: field.to_owned(),
            cause,
        }
    }

    pub(crate) fn slice(namespace: &str, name: &str, field: &str, cause: String) -> Self {
        Self {
            kind: "EndpointSlice".to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            field: field.to_owned(),
            cause,
        }
    }
}

impl From<&Rejection> for Finding {
    fn from(rejection: &Rejection) -> Self {
        Self {
            kind: rejection.kind.clone(),
            namespace: rejection.namespace.clone(),
            name: rejection.name.clone(),
            field: rejection.field.clone(),
            cause: rejection.cause.clone(),
        }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, namespace, name, field, cause } = self;
        write!(f, "{kind} {namespace}/{name}: {field}: {cause}")
    }
}
