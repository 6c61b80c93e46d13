//! Selectors by a label that they ask for, so that not every selector has to be tried on every object.

use std::collections::{BTreeSet, HashMap};

use podway_model::{
    Labels, Selector,
    selector::{Operator, Requirement},
};

/// Numbers of selectors: by the key and the values of the first label that they want to have one of certain values.
#[derive(Debug, Default)]
pub(crate) struct Index {
    by_label: HashMap<String, HashMap<String, BTreeSet<u32>>>,
    /// Selectors that want no label to have one of certain values.
    rest: BTreeSet<u32>,
}

impl Index {
    /// Whether a selector has a label to be found by.
    pub(crate) fn has_key(selector: &Selector) -> bool {
        wanted(selector).is_some()
    }

    pub(crate) fn insert(&mut self, selector: &Selector, id: u32) {
        match wanted(selector) {
            Some((key, values)) => {
                let by_value = self.by_label.entry(key.to_owned()).or_default();
                for value in values {
                    by_value.entry(value.clone()).or_default().insert(id);
                }
            }
            None => {
                self.rest.insert(id);
            }
        }
    }

    pub(crate) fn remove(&mut self, selector: &Selector, id: u32) {
        let Some((key, values)) = wanted(selector) else {
            self.rest.remove(&id);
            return;
        };
        let Some(by_value) = self.by_label.get_mut(key) else { return };
        for value in values {
            if let Some(ids) = by_value.get_mut(value) {
                ids.remove(&id);
                if ids.is_empty() {
                    by_value.remove(value);
                }
            }
        }
        if by_value.is_empty() {
            self.by_label.remove(key);
        }
    }

    /// Those that may select what has these labels, each once; all others do not.
    pub(crate) fn candidates<'a>(&'a self, labels: &'a Labels) -> impl Iterator<Item = u32> + 'a {
        let of = |(key, value): (&String, &String)| self.by_label.get(key)?.get(value);
        // An object has one value for a key, and a selector is under one key.
        self.rest.iter().chain(labels.iter().filter_map(of).flatten()).copied()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty() && self.by_label.is_empty()
    }
}

fn wanted(selector: &Selector) -> Option<(&str, &[String])> {
    selector.requirements().iter().find_map(|Requirement { key, operator }| match operator {
        Operator::In(values) => Some((key.as_str(), values.as_slice())),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_found_by_what_they_want_and_forgotten() {
        let selector = |list: &[(&str, Operator)]| {
            let one = |(key, operator): &(&str, Operator)| Requirement {
                key: (*key).to_owned(),
                operator: operator.clone(),
            };
            Selector::new(list.iter().map(one).collect())
        };
        let values = |list: &[&str]| Operator::In(list.iter().map(|v| (*v).to_owned()).collect());
        let selectors = [
            selector(&[]),
            selector(&[("app", values(&["a", "b"]))]),
            selector(&[("app", Operator::Exists), ("tier", values(&["x"]))]),
            selector(&[("app", Operator::NotIn(vec!["a".into()]))]),
        ];
        let mut index = Index::default();
        (0..).zip(&selectors).for_each(|(id, selector)| index.insert(selector, id));
        for (labels, expected) in [
            (vec![], vec![0, 3]),
            (vec![("app", "a")], vec![0, 1, 3]),
            (vec![("app", "c"), ("tier", "x")], vec![0, 2, 3]),
            (vec![("app", "b"), ("tier", "x")], vec![0, 1, 2, 3]),
        ] {
            let labels: Labels = labels.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
            let mut found: Vec<u32> = index.candidates(&labels).collect();
            found.sort_unstable();
            assert_eq!(found, expected, "{labels:?}");
            let selects = |id: &u32| selectors[*id as usize].matches(&labels);
            assert!((0..4).filter(selects).all(|id| found.contains(&id)));
        }
        (0..).zip(&selectors).for_each(|(id, selector)| index.remove(selector, id));
        assert!(index.is_empty());
    }
}
