//! Our tables in the kernel: transactions, and reading back.

use std::{collections::HashMap, io};

use nix::libc;
use podway_services::table::{Family, ServiceId};

use super::{
    abi::{
        BATCH_BEGIN, BATCH_END, BATCH_GENID, CHAIN_HOOK, CHAIN_NAME, CHAIN_POLICY, CHAIN_TABLE, CHAIN_TYPE,
        DATA_VALUE, DATA_VERDICT, DEL_CHAIN, DEL_ELEMENT, DEL_RULE, DEL_SET, DEL_TABLE, ELEMENT_DATA,
        ELEMENT_FLAGS, ELEMENT_INTERVAL_END, ELEMENT_KEY, ELEMENT_KEY_END, ELEMENTS_LIST, ELEMENTS_SET,
        ELEMENTS_TABLE, GEN_ID, GET_CHAIN, GET_ELEMENT, GET_GEN, GET_RULE, GET_SET, GET_TABLE, HOOK_NUM,
        HOOK_PRIORITY, LIST_ELEMENT, NEW_CHAIN, NEW_ELEMENT, NEW_RULE, NEW_SET, NEW_TABLE, RESOURCE,
        RULE_CHAIN, RULE_EXPRESSIONS, RULE_TABLE, RULE_USERDATA, SET_DATA_LEN, SET_DATA_TYPE, SET_DESC,
        SET_DESC_CONCAT, SET_DESC_SIZE, SET_FIELD_LEN, SET_FLAGS, SET_ID, SET_KEY_LEN, SET_KEY_TYPE,
        SET_NAME, SET_TABLE, TABLE_NAME, TABLE_USERDATA, VERDICT_CHAIN, VERDICT_GOTO,
    },
    expr::put_verdict,
    layout::{COMMENT, Chain, Set, SetDefinition, TABLE},
};
use crate::netlink::{
    Failure, Messages, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NfSocket, attrs, find,
    find_number, find_text, put_attr, put_nested, put_number, put_text,
};

/// Elements of one message: a list is one attribute, and its length has 16 bits.
const LIST_BYTES: usize = 32 << 10;

/// What an element of a map says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    None,
    Bytes(Vec<u8>),
    Chain(String),
}

/// Which element.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ElementKey {
    pub(super) family: Family,
    pub(super) set: Set,
    pub(super) key: Vec<u8>,
    /// The last of a range in a concatenation; empty for the element that ends a range in a plain set.
    pub(super) end: Option<Vec<u8>>,
}

/// One step of a transaction.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// An empty table in place of what there was.
    ReplaceTable(Family),
    RemoveTable(Family),
    Set(Family, SetDefinition),
    Chain(Family, Chain),
    /// Other rules in a chain that is there.
    Rules(Family, Chain),
    /// A chain without rules.
    RemoveChain(Family, String),
    RemoveSet(Family, String),
    Add(ElementKey, Value),
    Remove(ElementKey),
}

/// Steps with the service that each is for.
pub(super) type Ops = Vec<(Option<ServiceId>, Op)>;

/// What the kernel said to a transaction that it did not take.
#[derive(Debug)]
pub(super) enum Rejected {
    /// Single steps, with the service and what was to be written.
    Steps(Vec<(Option<ServiceId>, String, Failure)>),
    /// The rules changed since they were read.
    Changed,
}

pub(super) struct Kernel {
    socket: NfSocket,
}

impl Kernel {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { socket: NfSocket::open()? })
    }

    /// Writes all of it or nothing, and nothing at all when a generation is given that is no longer the present one.
    pub(super) fn commit(&mut self, ops: &Ops, generation: Option<u32>) -> io::Result<Result<(), Rejected>> {
        let mut messages = Messages::default();
        let mut owners: Vec<(Option<ServiceId>, usize)> = Vec::new();
        messages.begin(BATCH_BEGIN, NLM_F_REQUEST, 0, 0, RESOURCE);
        if let Some(generation) = generation {
            messages.number(BATCH_GENID, generation);
        }
        let mut at = 0;
        while let Some((owner, op)) = ops.get(at) {
            let mut next = |m: &mut Messages, kind: u16, flags: u16, family: Family| {
                owners.push((*owner, at));
                let sequence = u32::try_from(owners.len()).unwrap_or(u32::MAX);
                m.begin(kind, NLM_F_REQUEST | flags, sequence, family_number(family), 0);
            };
            let mut taken = 1;
            match op {
                Op::ReplaceTable(family) => {
                    next(&mut messages, NEW_TABLE, NLM_F_CREATE, *family);
                    messages.text(TABLE_NAME, TABLE);
                    next(&mut messages, DEL_TABLE, 0, *family);
                    messages.text(TABLE_NAME, TABLE);
                    next(&mut messages, NEW_TABLE, NLM_F_CREATE, *family);
                    messages.text(TABLE_NAME, TABLE);
                    messages.attr(TABLE_USERDATA, &comment(COMMENT));
                }
                Op::RemoveTable(family) => {
                    next(&mut messages, DEL_TABLE, 0, *family);
                    messages.text(TABLE_NAME, TABLE);
                }
                Op::Set(family, definition) => {
                    next(&mut messages, NEW_SET, NLM_F_CREATE, *family);
                    put_set(&mut messages, definition, u32::try_from(at).unwrap_or(u32::MAX));
                }
                Op::Chain(family, chain) => {
                    next(&mut messages, NEW_CHAIN, NLM_F_CREATE, *family);
                    messages.text(CHAIN_TABLE, TABLE);
                    messages.text(CHAIN_NAME, &chain.name);
                    if let Some(hook) = chain.hook {
                        messages.nested(CHAIN_HOOK, |h| {
                            put_number(h, HOOK_NUM, hook.number);
                            put_attr(h, HOOK_PRIORITY, &hook.priority.to_be_bytes());
                        });
                        messages.number(CHAIN_POLICY, 1);
                        messages.text(CHAIN_TYPE, hook.kind);
                    }
                    for rule in &chain.rules {
                        next(&mut messages, NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, *family);
                        put_rule(&mut messages, &chain.name, rule);
                    }
                }
                Op::Rules(family, chain) => {
                    next(&mut messages, DEL_RULE, 0, *family);
                    messages.text(RULE_TABLE, TABLE);
                    messages.text(RULE_CHAIN, &chain.name);
                    for rule in &chain.rules {
                        next(&mut messages, NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, *family);
                        put_rule(&mut messages, &chain.name, rule);
                    }
                }
                Op::RemoveSet(family, name) => {
                    next(&mut messages, DEL_SET, 0, *family);
                    messages.text(SET_TABLE, TABLE);
                    messages.text(SET_NAME, name);
                }
                Op::RemoveChain(family, name) => {
                    next(&mut messages, DEL_CHAIN, 0, *family);
                    messages.text(CHAIN_TABLE, TABLE);
                    messages.text(CHAIN_NAME, name);
                }
                Op::Add(key, _) | Op::Remove(key) => {
                    let adds = matches!(op, Op::Add(..));
                    let (kind, flags) = if adds { (NEW_ELEMENT, NLM_F_CREATE) } else { (DEL_ELEMENT, 0) };
                    next(&mut messages, kind, flags, key.family);
                    messages.text(ELEMENTS_TABLE, TABLE);
                    messages.text(ELEMENTS_SET, key.set.name());
                    // What follows of the same kind for the same service goes along.
                    taken = 0;
                    messages.nested(ELEMENTS_LIST, |list| {
                        let start = list.len();
                        for (other, op) in &ops[at..] {
                            let (one, value) = match op {
                                Op::Add(one, value) if adds => (one, Some(value)),
                                Op::Remove(one) if !adds => (one, None),
                                _ => break,
                            };
                            let same = other == owner && one.family == key.family && one.set == key.set;
                            if !same || list.len() - start > LIST_BYTES {
                                break;
                            }
                            put_element(list, one, value);
                            taken += 1;
                        }
                    });
                }
            }
            at += taken;
        }
        messages.begin(BATCH_END, NLM_F_REQUEST, 0, 0, RESOURCE);
        let failures = self.socket.send(&messages.bytes)?;
        if failures.is_empty() {
            return Ok(Ok(()));
        }
        if failures.iter().any(|f| f.sequence == 0 && f.errno == nix::errno::Errno::ERESTART) {
            return Ok(Err(Rejected::Changed));
        }
        let steps = failures.into_iter().map(|failure| {
            let index = (failure.sequence as usize).checked_sub(1);
            match index.and_then(|i| owners.get(i)) {
                Some((owner, op)) => (*owner, describe(&ops[*op].1), failure),
                None => (None, "the transaction".to_owned(), failure),
            }
        });
        Ok(Err(Rejected::Steps(steps.collect())))
    }

    /// The number that every change of any rules in this network namespace raises.
    pub(super) fn generation(&mut self) -> io::Result<u32> {
        let mut generation = None;
        self.socket.dump(GET_GEN, 0, 0, &[], |_, body| generation = find_number(body, GEN_ID))?;
        generation.ok_or_else(|| io::Error::other("the kernel does not tell the generation of its rules"))
    }

    /// Whether there is a table of ours.
    pub(super) fn has_table(&mut self, family: Family) -> io::Result<bool> {
        let mut request = Vec::new();
        put_text(&mut request, TABLE_NAME, TABLE);
        Ok(self.socket.dump(GET_TABLE, 0, family_number(family), &request, |_, _| {})?.is_some())
    }

    /// Everything of ours; `None` for a family without our table.
    pub(super) fn read(&mut self, family: Family) -> io::Result<Option<Found>> {
        let number = family_number(family);
        let mut found = Found::default();
        let mut request = Vec::new();
        put_text(&mut request, TABLE_NAME, TABLE);
        let table = self.socket.dump(GET_TABLE, 0, number, &request, |_, body| {
            found.comment = find(body, TABLE_USERDATA).and_then(comment_of).unwrap_or_default();
        })?;
        if table.is_none() {
            return Ok(None);
        }
        self.socket.dump(GET_CHAIN, NLM_F_DUMP, number, &[], |_, body| {
            if find_text(body, CHAIN_TABLE).as_deref() == Some(TABLE)
                && let Some(name) = find_text(body, CHAIN_NAME)
            {
                let hook = find(body, CHAIN_HOOK).map(|h| {
                    let priority = find(h, HOOK_PRIORITY).and_then(|b| b.first_chunk());
                    (
                        find_text(body, CHAIN_TYPE).unwrap_or_default(),
                        find_number(h, HOOK_NUM).unwrap_or(u32::MAX),
                        priority.map_or(0, |b| i32::from_be_bytes(*b)),
                    )
                });
                found.chains.insert(name, (hook, Vec::new()));
            }
        })?;
        let mut request = Vec::new();
        put_text(&mut request, RULE_TABLE, TABLE);
        self.socket.dump(GET_RULE, NLM_F_DUMP, number, &request, |_, body| {
            if find_text(body, RULE_TABLE).as_deref() == Some(TABLE)
                && let Some(chain) = find_text(body, RULE_CHAIN)
                && let Some((_, rules)) = found.chains.get_mut(&chain)
            {
                rules.push(find(body, RULE_USERDATA).and_then(comment_of).unwrap_or_default());
            }
        })?;
        let mut request = Vec::new();
        put_text(&mut request, SET_TABLE, TABLE);
        self.socket.dump(GET_SET, NLM_F_DUMP, number, &request, |_, body| {
            if find_text(body, SET_TABLE).as_deref() == Some(TABLE)
                && let Some(name) = find_text(body, SET_NAME)
            {
                let kind = |k| find_number(body, k).unwrap_or(0);
                let shape = [SET_FLAGS, SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE].map(kind);
                found.sets.insert(name, shape);
            }
        })?;
        for set in Set::ALL {
            if found.sets.contains_key(set.name()) {
                self.read_set(family, set, &mut found.elements)?;
            }
        }
        Ok(Some(found))
    }

    fn read_set(
        &mut self,
        family: Family,
        set: Set,
        into: &mut HashMap<ElementKey, Value>,
    ) -> io::Result<()> {
        let mut request = Vec::new();
        put_text(&mut request, ELEMENTS_TABLE, TABLE);
        put_text(&mut request, ELEMENTS_SET, set.name());
        self.socket.dump(GET_ELEMENT, NLM_F_DUMP, family_number(family), &request, |_, body| {
            for (_, element) in attrs(find(body, ELEMENTS_LIST).unwrap_or_default()) {
                let value = |kind| find(element, kind).and_then(|d| find(d, DATA_VALUE)).map(<[u8]>::to_vec);
                let Some(key) = value(ELEMENT_KEY) else { continue };
                let flags = find_number(element, ELEMENT_FLAGS).unwrap_or(0);
                let end =
                    value(ELEMENT_KEY_END).or_else(|| (flags & ELEMENT_INTERVAL_END != 0).then(Vec::new));
                let data = match find(element, ELEMENT_DATA) {
                    None => Value::None,
                    Some(data) => match find(data, DATA_VERDICT) {
                        Some(verdict) => Value::Chain(find_text(verdict, VERDICT_CHAIN).unwrap_or_default()),
                        None => Value::Bytes(find(data, DATA_VALUE).unwrap_or_default().to_vec()),
                    },
                };
                into.insert(ElementKey { family, set, key, end }, data);
            }
        })?;
        Ok(())
    }
}

/// Type, hook number and priority of a chain that has a hook.
pub(super) type FoundHook = Option<(String, u32, i32)>;

/// What the kernel has of one of our tables.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) comment: String,
    /// By name: the hook, and the comments of the rules.
    pub(super) chains: HashMap<String, (FoundHook, Vec<String>)>,
    /// By name: flags, type and length of the key, type of the data.
    pub(super) sets: HashMap<String, [u32; 4]>,
    pub(super) elements: HashMap<ElementKey, Value>,
}

pub(super) const fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::NFPROTO_IPV4 as u8,
        Family::V6 => libc::NFPROTO_IPV6 as u8,
    }
}

fn put_rule(messages: &mut Messages, chain: &str, (text, expressions): &(String, Vec<u8>)) {
    messages.text(RULE_TABLE, TABLE);
    messages.text(RULE_CHAIN, chain);
    messages.nested(RULE_EXPRESSIONS, |e| e.extend_from_slice(expressions));
    messages.attr(RULE_USERDATA, &comment(text));
}

fn put_set(messages: &mut Messages, definition: &SetDefinition, id: u32) {
    messages.text(SET_TABLE, TABLE);
    messages.text(SET_NAME, &definition.name);
    messages.number(SET_FLAGS, definition.flags);
    messages.number(SET_KEY_TYPE, definition.key_type);
    messages.number(SET_KEY_LEN, definition.key_len);
    if let Some(kind) = definition.data_type {
        messages.number(SET_DATA_TYPE, kind);
        messages.number(SET_DATA_LEN, definition.data_len);
    }
    messages.number(SET_ID, id);
    if definition.limit.is_some() || !definition.field_lens.is_empty() {
        messages.nested(SET_DESC, |desc| {
            if let Some(limit) = definition.limit {
                put_number(desc, SET_DESC_SIZE, limit);
            }
            if !definition.field_lens.is_empty() {
                put_nested(desc, SET_DESC_CONCAT, |fields| {
                    for len in &definition.field_lens {
                        put_nested(fields, LIST_ELEMENT, |f| put_number(f, SET_FIELD_LEN, *len));
                    }
                });
            }
        });
    }
}

fn put_element(list: &mut Vec<u8>, key: &ElementKey, value: Option<&Value>) {
    put_nested(list, LIST_ELEMENT, |element| {
        match &key.end {
            Some(end) if end.is_empty() => put_number(element, ELEMENT_FLAGS, ELEMENT_INTERVAL_END),
            _ => {}
        }
        put_nested(element, ELEMENT_KEY, |d| put_attr(d, DATA_VALUE, &key.key));
        if let Some(end) = &key.end
            && !end.is_empty()
        {
            put_nested(element, ELEMENT_KEY_END, |d| put_attr(d, DATA_VALUE, end));
        }
        match value {
            Some(Value::Bytes(bytes)) => {
                put_nested(element, ELEMENT_DATA, |d| put_attr(d, DATA_VALUE, bytes));
            }
            Some(Value::Chain(chain)) => {
                put_nested(element, ELEMENT_DATA, |d| put_verdict(d, VERDICT_GOTO, Some(chain)));
            }
            Some(Value::None) | None => {}
        }
    });
}

/// A comment as the nft program stores it, so that it shows it.
fn comment(text: &str) -> Vec<u8> {
    let text: String = text.chars().filter(char::is_ascii).take(120).collect();
    let mut bytes = vec![0, u8::try_from(text.len() + 1).unwrap_or(u8::MAX)];
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(0);
    bytes
}

fn comment_of(bytes: &[u8]) -> Option<String> {
    let [0, length, rest @ ..] = bytes else { return None };
    let text = rest.get(..usize::from(*length).checked_sub(1)?)?;
    Some(String::from_utf8_lossy(text).into_owned())
}

fn describe(op: &Op) -> String {
    match op {
        Op::ReplaceTable(_) | Op::RemoveTable(_) => format!("table {TABLE}"),
        Op::Set(_, definition) => format!("set {}", definition.name),
        Op::Chain(_, chain) => format!("chain {}", chain.name),
        Op::Rules(_, chain) => format!("rules of chain {}", chain.name),
        Op::RemoveChain(_, name) => format!("removal of chain {name}"),
        Op::RemoveSet(_, name) => format!("removal of set {name}"),
        Op::Add(key, _) => format!("element of {}", key.set.name()),
        Op::Remove(key) => format!("removal of an element of {}", key.set.name()),
    }
}
