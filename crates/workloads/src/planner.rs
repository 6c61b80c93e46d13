//! Collects what the controllers decide in one reconcile, with the few rules that hold for all of them.

use std::collections::HashSet;
use std::rc::Rc;

use jiff::Timestamp;
use serde_json::Value;

use crate::config::Config;
use crate::op::{Deletion, Event, EventType, Op};
use crate::placement::NodeInfo;
use crate::read::Malformed;
use crate::world::{Kind, Object, World, invalid, involved};

/// The result of one [`crate::reconcile`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// To be applied in order. Empty when the cluster is as it should be.
    pub ops: Vec<Op>,
    /// When time alone will make a difference (`minReadySeconds`, a progress deadline, an event's end): reconcile
    /// again then, even if nothing has changed.
    pub recheck_at: Option<Timestamp>,
}

impl IntoIterator for Plan {
    type Item = Op;
    type IntoIter = std::vec::IntoIter<Op>;

    fn into_iter(self) -> Self::IntoIter {
        self.ops.into_iter()
    }
}

/// A plan in the making.
pub(crate) struct Planner<'w, 'a> {
    pub(crate) world: &'w World<'a>,
    pub(crate) config: &'w Config,
    /// The nodes that pods can be placed on.
    pub(crate) nodes: Rc<Vec<NodeInfo<'a>>>,
    plan: Plan,
    pub(crate) said: HashSet<Event>,
    /// Names given to objects created in this plan.
    taken: HashSet<(&'static str, String, String)>,
    /// Pods that were adopted, released or deleted in this plan, by index: nobody else may touch them.
    pub(crate) touched: HashSet<usize>,
}

impl<'w, 'a> Planner<'w, 'a> {
    pub(crate) fn new(world: &'w World<'a>, config: &'w Config) -> Self {
        let mut planner = Self {
            world,
            config,
            nodes: Rc::default(),
            plan: Plan::default(),
            said: HashSet::new(),
            taken: HashSet::new(),
            touched: HashSet::new(),
        };
        let mut nodes = Vec::with_capacity(world.nodes.len());
        for node in &world.nodes {
            match NodeInfo::parse(node) {
                Ok(info) => nodes.push(info),
                Err(error) => planner.malformed(node, &error),
            }
        }
        planner.nodes = Rc::new(nodes);
        planner
    }

    pub(crate) fn create(&mut self, object: Value) {
        self.plan.ops.push(Op::Create(object));
    }

    pub(crate) fn update(&mut self, object: Value) {
        self.plan.ops.push(Op::Update(object));
    }

    /// Write `status` unless the object has it already.
    pub(crate) fn status(&mut self, object: &Object<'_>, status: Value) {
        if object.value.get("status").unwrap_or(&Value::Null) == &status {
            return;
        }
        let mut value = object.value.clone();
        if let Some(map) = value.as_object_mut() {
            map.insert("status".into(), status);
        }
        self.plan.ops.push(Op::UpdateStatus(value));
    }

    pub(crate) fn delete(&mut self, kind: Kind, object: &Object<'_>) {
        self.push_delete(kind.api_version(), kind.name(), object);
    }

    /// Delete a pod, by index; once a plan, and not when it is going already.
    pub(crate) fn delete_pod(&mut self, index: usize) {
        let object = self.world.pods[index].object;
        if !object.deleting && self.touched.insert(index) {
            self.push_delete("v1", "Pod", &object);
        }
    }

    fn push_delete(&mut self, api_version: &'static str, kind: &'static str, object: &Object<'_>) {
        self.plan.ops.push(Op::Delete(Deletion {
            api_version,
            kind,
            namespace: object.namespace.to_owned(),
            name: object.name.to_owned(),
            uid: object.uid.to_owned(),
            grace: None,
        }));
    }

    /// The first of `base`'s generated names that neither the snapshot nor this plan has.
    pub(crate) fn free_name(
        &mut self,
        kind: &'static str,
        namespace: &str,
        base: &str,
        exists: impl Fn(&str) -> bool,
    ) -> String {
        for attempt in 0.. {
            let name = crate::names::generated(self.config.seed, namespace, base, attempt);
            if !exists(&name) && self.taken.insert((kind, namespace.to_owned(), name.clone())) {
                return name;
            }
        }
        unreachable!("there are more names than objects")
    }

    pub(crate) fn normal(
        &mut self,
        object: &Object<'_>,
        component: &'static str,
        reason: &'static str,
        message: String,
    ) {
        self.event(object.value, EventType::Normal, component, reason, message);
    }

    pub(crate) fn warning(
        &mut self,
        object: &Object<'_>,
        component: &'static str,
        reason: &'static str,
        message: String,
    ) {
        self.event(object.value, EventType::Warning, component, reason, message);
    }

    /// Report an object that cannot be used, unless that has been said.
    pub(crate) fn malformed(&mut self, object: &Object<'_>, error: &Malformed) {
        self.say(invalid(object.value, error));
    }

    fn event(
        &mut self,
        value: &Value,
        type_: EventType,
        component: &'static str,
        reason: &'static str,
        message: String,
    ) {
        self.say(Event { involved: involved(value), type_, reason, message, component });
    }

    pub(crate) fn say(&mut self, event: Event) {
        let known = self.world.has_event(&event);
        if self.said.insert(event.clone()) && !known {
            self.plan.ops.push(Op::Event(event));
        }
    }

    pub(crate) fn recheck_at(&mut self, time: Timestamp) {
        if time > self.world.now {
            self.plan.recheck_at = Some(self.plan.recheck_at.map_or(time, |earlier| earlier.min(time)));
        }
    }

    pub(crate) fn finish(self) -> Plan {
        self.plan
    }
}
