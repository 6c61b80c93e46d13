//! Hashes and generated names in the API's own shapes.
//!
//! Kubernetes draws name suffixes and template hashes from an alphabet without vowels and look-alikes, so that no
//! words appear by accident. Here the suffixes come from a seed instead of a random source: a lab repeats.

use serde_json::Value;

const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LEN: usize = 5;
/// `metadata.name` of a generated name is cut so that it fits into a DNS label with its suffix.
const MAX_GENERATED_BASE: usize = 63 - SUFFIX_LEN;

/// FNV-1a, 64 bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fnv64(u64);

impl Fnv64 {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// The hash, with its bits mixed once more: FNV's upper bits hardly depend on the last bytes.
    pub(crate) fn finish(self) -> u64 {
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

/// Hash of a seed and some words, each word ended so that `ab`+`c` and `a`+`bc` differ.
pub(crate) fn hash(seed: u64, words: &[&str]) -> u64 {
    let mut hash = Fnv64::new();
    hash.write(&seed.to_le_bytes());
    for word in words {
        hash.write(word.as_bytes());
        hash.write(&[0]);
    }
    hash.finish()
}

/// Hash of a pod template in the shape of a `pod-template-hash` or `controller-revision-hash`: the decimal digits of
/// 32 bits, each digit replaced by a letter of the alphabet. Independent of the order of an object's keys.
pub(crate) fn template_hash(template: &Value) -> String {
    let mut hash = Fnv64::new();
    feed(template, &mut hash);
    let wide = hash.finish();
    let narrow = (wide >> 32) ^ (wide & 0xffff_ffff);
    narrow
        .to_string()
        .bytes()
        .map(|digit| char::from(ALPHABET[usize::from(digit) % ALPHABET.len()]))
        .collect()
}

fn feed(value: &Value, hash: &mut Fnv64) {
    match value {
        // Null and absent are the same to the API.
        Value::Null => hash.write(b"n"),
        Value::Bool(flag) => hash.write(if *flag { b"t" } else { b"f" }),
        Value::Number(number) => {
            hash.write(b"#");
            hash.write(number.to_string().as_bytes());
            hash.write(&[0]);
        }
        Value::String(text) => {
            hash.write(b"\"");
            hash.write(text.as_bytes());
            hash.write(&[0]);
        }
        Value::Array(items) => {
            hash.write(b"[");
            for item in items {
                feed(item, hash);
            }
            hash.write(b"]");
        }
        Value::Object(map) => {
            hash.write(b"{");
            let mut entries: Vec<_> = map.iter().filter(|(_, value)| !value.is_null()).collect();
            entries.sort_unstable_by_key(|(key, _)| key.as_str());
            for (key, value) in entries {
                hash.write(key.as_bytes());
                hash.write(&[0]);
                feed(value, hash);
            }
            hash.write(b"}");
        }
    }
}

/// `base` followed by five characters, like the API server's answer to `metadata.generateName`. `attempt` numbers
/// the candidates of one base: the caller takes the first that is free.
pub(crate) fn generated(seed: u64, namespace: &str, base: &str, attempt: u32) -> String {
    let mut bits = hash(seed ^ (u64::from(attempt) << 32), &[namespace, base]);
    let mut name = String::with_capacity(base.len() + SUFFIX_LEN);
    name.push_str(truncated(base, MAX_GENERATED_BASE));
    for _ in 0..SUFFIX_LEN {
        name.push(char::from(ALPHABET[(bits % 27) as usize]));
        bits /= 27;
    }
    name
}

/// The longest prefix of at most `max` bytes.
pub(crate) fn truncated(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn template_hash_ignores_key_order_and_nulls_but_not_content() {
        let a = json!({"spec": {"a": 1, "b": [1, 2]}, "x": null});
        let b = json!({"spec": {"b": [1, 2], "a": 1}});
        let c = json!({"spec": {"b": [2, 1], "a": 1}});
        assert_eq!(template_hash(&a), template_hash(&b));
        assert_ne!(template_hash(&a), template_hash(&c));
        let hash = template_hash(&a);
        assert!((5..=10).contains(&hash.len()) && hash.bytes().all(|c| b"456789bcdf".contains(&c)), "{hash}");
    }

    #[test]
    fn generated_names_repeat_and_fit_a_label() {
        let long = "x".repeat(80);
        for base in ["web-5d4f8c7b9d-", long.as_str()] {
            let name = generated(7, "default", base, 0);
            assert_eq!(name, generated(7, "default", base, 0));
            assert_ne!(name, generated(8, "default", base, 0));
            assert_ne!(name, generated(7, "default", base, 1));
            assert_ne!(name, generated(7, "other", base, 0));
            assert!(name.len() <= 63);
            assert!(name.bytes().rev().take(5).all(|c| ALPHABET.contains(&c)));
        }
    }
}
