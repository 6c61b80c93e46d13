//! Versions of the CNI specification.

use std::fmt;

use crate::error::{CniError, code};

/// A version of the specification that this plugin speaks. They are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// 0.3.1: ADD and DEL.
    V0_3_1,
    /// 0.4.0: CHECK.
    V0_4_0,
    /// 1.0.0: no `version` in the result's `ips` any more.
    V1_0_0,
    /// 1.1.0: GC, STATUS; MTU of interfaces and routes in the result.
    V1_1_0,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    /// The newest.
    pub const LATEST: Self = Self::V1_1_0;

    /// Reads the value of `cniVersion`.
    ///
    /// # Errors
    /// Code 1 for a version that is not one of [`Self::ALL`].
    pub fn parse(text: &str) -> Result<Self, CniError> {
        Self::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            CniError::new(code::INCOMPATIBLE_VERSION, format!("cniVersion {text:?} is not supported"))
                .details(format!("supported versions: {all}"))
        })
    }

    /// As it is written in `cniVersion`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
