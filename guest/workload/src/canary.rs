//! A sentence that lies in memory in many copies, for an eavesdropper to find on the wire.

use std::hint::black_box;

/// Bytes filled with copies of each encoding; many pages, so that a capture can't miss them all.
const BYTES: usize = 128 << 10;

/// The copies.
pub(crate) struct Canary {
    ascii: Vec<u8>,
    utf16: Vec<u8>,
    copies: Vec<u8>,
}

impl Canary {
    /// Writes the copies: as it is (ASCII or UTF-8), and as UTF-16LE as Windows programs keep text.
    pub(crate) fn new(sentence: &str) -> Self {
        let ascii = sentence.as_bytes().to_vec();
        let utf16: Vec<u8> = sentence.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let mut copies = Vec::with_capacity(2 * BYTES + ascii.len() + utf16.len() + 4);
        for pattern in [&ascii, &utf16] {
            let end = copies.len() + BYTES;
            while copies.len() < end {
                copies.extend_from_slice(pattern);
                copies.extend_from_slice(&[0, 0]);
            }
        }
        Self {
            ascii,
            utf16,
            copies,
        }
    }

    /// Whether all copies are still what they were; keeps the compiler from dropping them.
    pub(crate) fn verify(&self) -> bool {
        let mut rest = black_box(self.copies.as_slice());
        for pattern in [&self.ascii, &self.utf16] {
            let mut seen = 0;
            while seen < BYTES {
                let Some(after) = rest
                    .strip_prefix(pattern.as_slice())
                    .and_then(|rest| rest.strip_prefix(&[0, 0]))
                else {
                    return false;
                };
                seen += rest.len() - after.len();
                rest = after;
            }
        }
        rest.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_encodings_are_there_many_times() {
        let canary = Canary::new("The heron");
        let count = |needle: &[u8]| {
            canary
                .copies
                .windows(needle.len())
                .filter(|w| *w == needle)
                .count()
        };
        assert!(count(b"The heron") > 1000);
        assert!(count(b"T\0h\0e\0 \0h\0e\0r\0o\0n\0") > 1000);
    }

    #[test]
    fn a_changed_copy_is_noticed() {
        let mut canary = Canary::new("x");
        assert!(canary.verify());
        canary.copies[BYTES + 7] ^= 0x20;
        assert!(!canary.verify());
    }
}
