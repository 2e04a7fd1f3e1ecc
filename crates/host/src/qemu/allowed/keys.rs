//! `a,b=c` as QEMU reads it, but only where there is one way to read it.

/// Keys and values of an option, in order, no key twice.
#[derive(Debug)]
pub(super) struct Keys(Vec<(String, String)>);

impl Keys {
    /// Splits an option's value. A first word without `=` is the value of `implied`.
    ///
    /// Of two equal keys QEMU takes the last, and `,,` is a comma that belongs to the value: both are refused here,
    /// so that what was judged is what QEMU does.
    pub(super) fn parse(text: &str, implied: Option<&str>) -> Result<Self, String> {
        if text.contains(",,") {
            return Err("a comma within a value is not accepted from another host".to_owned());
        }
        if text.starts_with('{') {
            return Err("JSON is not accepted here".to_owned());
        }
        let mut keys: Vec<(String, String)> = Vec::new();
        for (index, pair) in text.split(',').enumerate() {
            let (key, value) = match (pair.split_once('='), implied) {
                (Some(found), _) => found,
                (None, Some(implied)) if index == 0 => (implied, pair),
                (None, _) => return Err(format!("{pair:?} has no value")),
            };
            if !is_word(key) {
                return Err(format!("{key:?} is not a key"));
            }
            if keys.iter().any(|(known, _)| known == key) {
                return Err(format!("the key {key:?} is there twice"));
            }
            keys.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self(keys))
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let found = self.0.iter().find(|(known, _)| known == key);
        found.map(|(_, value)| value.as_str())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Refuses every key that is not in the list.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), String> {
        match self.iter().find(|(key, _)| !known.contains(key)) {
            Some((key, _)) => Err(format!("the key {key:?} is not accepted from another host")),
            None => Ok(()),
        }
    }

    /// Refuses keys of the list, and every value that could name a file or an address.
    pub(super) fn without(&self, forbidden: &[&str]) -> Result<(), String> {
        for (key, value) in self.iter() {
            if forbidden.contains(&key) || value.contains('/') {
                return Err(format!("the key {key:?} names something of the host"));
            }
        }
        Ok(())
    }

    /// Refuses every value with a slash but those of these keys, which are judged on their own.
    pub(super) fn no_path_but(&self, judged: &[&str]) -> Result<(), String> {
        match self
            .iter()
            .find(|(key, value)| value.contains('/') && !judged.contains(key))
        {
            Some((key, _)) => Err(format!("the key {key:?} names something of the host")),
            None => Ok(()),
        }
    }
}

/// Letters, digits, `_`, `-` and `.`; not empty.
pub(super) fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
}

/// A size as QEMU writes it: a number, with B, K, M, G or T behind it.
pub(super) fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" | "b" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_read_in_one_way_is_read() {
        let keys = Keys::parse("tap,id=n,script=no", Some("type")).unwrap();
        assert_eq!((keys.get("type"), keys.get("id")), (Some("tap"), Some("n")));
        for odd in [
            "tap,script=no,script=/x",
            "tap,type=user",
            "a,,b",
            "{\"a\":1}",
            "x,y",
            "",
            ",",
            "a b=c",
        ] {
            let read = Keys::parse(odd, Some("type"));
            assert!(
                read.is_err() || read.is_ok_and(|k| k.get("type") == Some("")),
                "{odd}"
            );
        }
    }

    #[test]
    fn sizes_are_read_with_their_unit() {
        assert_eq!(size("64M"), Some(64 << 20));
        assert_eq!(size("4096"), Some(4096));
        for odd in [
            "",
            "M",
            "-1",
            "1P",
            "99999999999T",
            "1 M",
            "0x10",
            "1.5G",
            "é",
        ] {
            assert_eq!(size(odd), None, "{odd}");
        }
    }
}
