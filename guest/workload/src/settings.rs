//! The kernel's command line.

use std::fmt;

/// Longest sentence; the kernel's whole command line has at most 2048 bytes.
const CANARY_MAX: usize = 1024;

/// What the command line asks for. Keys of others are passed over, a misspelt one of ours is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// `palanquin.dirty_mib_s=`: how fast the buffer is rewritten, in MiB/s, 0 to 65536.
    /// Default 0: not at all; then the buffer is verified as the fill is.
    pub(crate) dirty_mib_s: u64,
    /// `palanquin.buffer_mib=`: size of the buffer in MiB, 1 to 1048576. Default 16.
    pub(crate) buffer_mib: u64,
    /// `palanquin.fill_mib=`: random data that stay as they are, in MiB, 0 to 1048576. Default 0.
    pub(crate) fill_mib: u64,
    /// `palanquin.audit_mib_s=`: how fast what isn't rewritten is verified, in MiB/s, 0 (never) to
    /// 65536. Default 16.
    pub(crate) audit_mib_s: u64,
    /// `palanquin.seed=`: where all content follows from. Default 1.
    pub(crate) seed: u64,
    /// `palanquin.canary=`: a sentence of up to 1024 bytes with `%20` for a blank, or
    /// `base64:` and its encoding (RFC 4648). Default none.
    pub(crate) canary: Option<String>,
    /// `palanquin.open=`: a text file of up to 64 KiB that is opened as an editor opens it: it is read, stays open, and
    /// its text is kept in memory in both encodings that programs use. Default none.
    pub(crate) open: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            dirty_mib_s: 0,
            buffer_mib: 16,
            fill_mib: 0,
            audit_mib_s: 16,
            seed: 1,
            canary: None,
            open: None,
        }
    }
}

/// Why a command line is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SettingsError {
    /// No such key.
    UnknownKey(String),
    /// Not a number, or not one in these bounds.
    Number { key: String, min: u64, max: u64 },
    /// Bad escape, bad base64, not UTF-8, empty or too long.
    Canary(&'static str),
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey(key) => write!(f, "unknown key {key}"),
            Self::Number { key, min, max } => write!(f, "{key} must be from {min} to {max}"),
            Self::Canary(why) => write!(f, "palanquin.canary {why}"),
        }
    }
}

impl Settings {
    /// Reads the keys that start with `palanquin.`; the last of several equal ones counts.
    pub(crate) fn parse(command_line: &str) -> Result<Self, SettingsError> {
        let mut settings = Self::default();
        for word in command_line.split_ascii_whitespace() {
            let Some((key, value)) = word
                .strip_prefix("palanquin.")
                .map(|rest| rest.split_once('=').unwrap_or((rest, "")))
            else {
                continue;
            };
            match key {
                "dirty_mib_s" => settings.dirty_mib_s = number(key, value, 0, 1 << 16)?,
                "buffer_mib" => settings.buffer_mib = number(key, value, 1, 1 << 20)?,
                "fill_mib" => settings.fill_mib = number(key, value, 0, 1 << 20)?,
                "audit_mib_s" => settings.audit_mib_s = number(key, value, 0, 1 << 16)?,
                "seed" => settings.seed = number(key, value, 0, u64::MAX)?,
                "canary" => settings.canary = Some(canary(value)?),
                "open" => settings.open = Some(value.to_owned()),
                // Read by /init, before this program starts.
                "ip" | "gateway" | "files" => {}
                other => return Err(SettingsError::UnknownKey(format!("palanquin.{other}"))),
            }
        }
        Ok(settings)
    }
}

fn number(key: &str, value: &str, min: u64, max: u64) -> Result<u64, SettingsError> {
    value
        .parse()
        .ok()
        .filter(|n| (min..=max).contains(n))
        .ok_or_else(|| SettingsError::Number {
            key: format!("palanquin.{key}"),
            min,
            max,
        })
}

fn canary(value: &str) -> Result<String, SettingsError> {
    let bytes = match value.strip_prefix("base64:") {
        Some(encoded) => base64(encoded).ok_or(SettingsError::Canary("is no base64"))?,
        None => percent(value).ok_or(SettingsError::Canary("has a bad % escape"))?,
    };
    match String::from_utf8(bytes) {
        Ok(text) if text.is_empty() => Err(SettingsError::Canary("is empty")),
        Ok(text) if text.len() > CANARY_MAX => Err(SettingsError::Canary("is too long")),
        Ok(text) => Ok(text),
        Err(_) => Err(SettingsError::Canary("is not UTF-8")),
    }
}

/// RFC 3986, section 2.1.
fn percent(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes().iter();
    while let Some(byte) = rest.next() {
        if *byte == b'%' {
            let high = char::from(*rest.next()?).to_digit(16)?;
            let low = char::from(*rest.next()?).to_digit(16)?;
            bytes.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            bytes.push(*byte);
        }
    }
    Some(bytes)
}

/// RFC 4648, section 4; padding may be absent.
fn base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    for group in digits.chunks(4) {
        if group.len() < 2 {
            return None;
        }
        let mut bits = 0_u32;
        for digit in group {
            let value = match digit {
                b'A'..=b'Z' => digit - b'A',
                b'a'..=b'z' => digit - b'a' + 26,
                b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        bits <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_others_are_passed_over() {
        let line = "console=ttyS0 quiet palanquin.dirty_mib_s=8 palanquin.fill_mib=64 \
                    palanquin.ip=10.77.1.10/24 palanquin.files=http://x/ palanquin.buffer_mib=32\n";
        let expected = Settings {
            dirty_mib_s: 8,
            buffer_mib: 32,
            fill_mib: 64,
            ..Settings::default()
        };
        assert_eq!(Settings::parse(line), Ok(expected));
    }

    #[test]
    fn a_file_to_open_is_named_by_its_path() {
        let settings = Settings::parse("palanquin.open=/files/letter.txt").unwrap();
        assert_eq!(settings.open.as_deref(), Some("/files/letter.txt"));
    }

    #[test]
    fn a_misspelt_key_is_refused() {
        let error = Settings::parse("palanquin.dirty_mibs=8").unwrap_err();
        assert_eq!(error.to_string(), "unknown key palanquin.dirty_mibs");
    }

    #[test]
    fn a_number_out_of_bounds_is_refused() {
        for line in [
            "palanquin.buffer_mib=0",
            "palanquin.buffer_mib",
            "palanquin.dirty_mib_s=65537",
            "palanquin.fill_mib=-1",
        ] {
            let error = Settings::parse(line).unwrap_err();
            assert!(matches!(error, SettingsError::Number { .. }), "{line}");
        }
    }

    #[test]
    fn a_sentence_comes_escaped_or_as_base64() {
        for line in [
            "palanquin.canary=The%20heron%20flies",
            "palanquin.canary=base64:VGhlIGhlcm9uIGZsaWVz",
        ] {
            let settings = Settings::parse(line).unwrap();
            assert_eq!(settings.canary.as_deref(), Some("The heron flies"));
        }
        assert_eq!(base64("TQ==").as_deref(), Some(&b"M"[..]));
        assert_eq!(base64("TWE=").as_deref(), Some(&b"Ma"[..]));
    }

    #[test]
    fn a_bad_sentence_is_refused() {
        for value in ["", "%2", "%zz", "base64:A", "base64:*", "%ff"] {
            let line = format!("palanquin.canary={value}");
            let error = Settings::parse(&line).unwrap_err();
            assert!(matches!(error, SettingsError::Canary(_)), "{value}");
        }
        let long = format!("palanquin.canary={}", "x".repeat(CANARY_MAX + 1));
        assert_eq!(
            Settings::parse(&long),
            Err(SettingsError::Canary("is too long"))
        );
    }
}
