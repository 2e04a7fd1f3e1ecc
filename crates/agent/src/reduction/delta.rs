//! What differs between two versions of a page; the format is described in [`palanquin_engine::frame`].

use super::PAGE;

/// Equal bytes that end a run of differing ones: fewer cost more as a run of their own than they save.
const GAP: usize = 8;

/// A delta that cannot be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// A count of more than two bytes.
    #[error("a count in a delta is too long")]
    Count,
    /// A run that goes beyond the page.
    #[error("a run in a delta goes beyond its page")]
    Overrun,
    /// A run of differing bytes without any.
    #[error("a run in a delta is empty")]
    EmptyRun,
    /// The payload ends within a page.
    #[error("a delta ends too early")]
    Short,
    /// Bytes behind the last page.
    #[error("bytes follow the last delta")]
    Trailing,
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    // At most 4096, which is two groups of seven bits.
    if count < 0x80 {
        out.push(count as u8);
    } else {
        out.extend([count as u8 | 0x80, (count >> 7) as u8]);
    }
}

fn take_count(bytes: &mut &[u8]) -> Result<usize, DeltaError> {
    let (&low, rest) = bytes.split_first().ok_or(DeltaError::Short)?;
    if low < 0x80 {
        *bytes = rest;
        return Ok(usize::from(low));
    }
    let (&high, rest) = rest.split_first().ok_or(DeltaError::Short)?;
    if high >= 0x80 {
        return Err(DeltaError::Count);
    }
    *bytes = rest;
    Ok(usize::from(low & 0x7f) | usize::from(high) << 7)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    // Only called where eight bytes are left.
    bytes[at..]
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// First place from `at` on where the pages differ, or their end.
fn next_difference(old: &[u8], new: &[u8], mut at: usize) -> usize {
    const WIDE: usize = 64;
    while at + WIDE <= PAGE && old[at..at + WIDE] == new[at..at + WIDE] {
        at += WIDE;
    }
    while at + 8 <= PAGE {
        let differs = word(old, at) ^ word(new, at);
        if differs != 0 {
            return at + (differs.trailing_zeros() / 8) as usize;
        }
        at += 8;
    }
    while at < PAGE && old[at] == new[at] {
        at += 1;
    }
    at
}

/// End of the run of differing bytes that begins at `at`: behind it are [`GAP`] equal bytes, or the page's end.
fn end_of_difference(old: &[u8], new: &[u8], mut at: usize) -> usize {
    while at + GAP <= PAGE {
        let differs = word(old, at) ^ word(new, at);
        if differs == 0 {
            return at;
        }
        at += 8 - (differs.leading_zeros() / 8) as usize;
    }
    let rest = at..PAGE;
    let last = rest.clone().rev().find(|&at| old[at] != new[at]);
    last.map_or(rest.start, |last| last + 1)
}

/// Appends what turns `old` into `new`, both whole pages; false and nothing if that takes more than `limit` bytes.
pub fn encode(old: &[u8], new: &[u8], limit: usize, out: &mut Vec<u8>) -> bool {
    if old.len() != PAGE || new.len() != PAGE {
        return false;
    }
    let began = out.len();
    let mut at = 0;
    while at < PAGE {
        let start = next_difference(old, new, at);
        put_count(out, start - at);
        if start == PAGE {
            break;
        }
        at = end_of_difference(old, new, start);
        if out.len() - began + 2 + at - start > limit {
            out.truncate(began);
            return false;
        }
        put_count(out, at - start);
        out.extend_from_slice(&new[start..at]);
    }
    true
}

/// Takes one page's delta off the payload and applies it to `page`, which holds the version before.
///
/// # Errors
///
/// A rule of the format is broken; `page` is then of no use any more.
pub fn apply(payload: &mut &[u8], page: &mut [u8]) -> Result<(), DeltaError> {
    let mut at = 0;
    while at < page.len() {
        at += take_count(payload)?;
        if at == page.len() {
            break;
        }
        let count = take_count(payload)?;
        if count == 0 {
            return Err(DeltaError::EmptyRun);
        }
        let run = page.get_mut(at..at + count).ok_or(DeltaError::Overrun)?;
        let (bytes, rest) = payload.split_at_checked(count).ok_or(DeltaError::Short)?;
        run.copy_from_slice(bytes);
        *payload = rest;
        at += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn applied(payload: &[u8], old: &[u8]) -> Result<Vec<u8>, DeltaError> {
        let (mut rest, mut page) = (payload, old.to_vec());
        apply(&mut rest, &mut page)?;
        if rest.is_empty() {
            Ok(page)
        } else {
            Err(DeltaError::Trailing)
        }
    }

    #[test]
    fn a_page_that_stays_as_it_is_takes_two_bytes() {
        let mut out = Vec::new();
        assert!(encode(&[7; PAGE], &[7; PAGE], 100, &mut out));
        assert_eq!(out, [0x80, 0x20]);
        assert_eq!(applied(&out, &[7; PAGE]), Ok(vec![7; PAGE]));
    }

    #[test]
    fn a_counter_takes_few_bytes_wherever_it_is() {
        for at in [0, 1, 7, 63, 64, 4088, 4095] {
            let (old, mut new) = ([7; PAGE], [7; PAGE]);
            new[at] = 8;
            let mut out = Vec::new();
            assert!(encode(&old, &new, 100, &mut out));
            assert!(out.len() <= 6, "{at}: {out:?}");
            assert_eq!(applied(&out, &old), Ok(new.to_vec()));
        }
    }

    #[test]
    fn another_page_leaves_nothing_behind() {
        let mut out = vec![1];
        assert!(!encode(&[7; PAGE], &[8; PAGE], 2048, &mut out));
        assert_eq!(out, [1]);
    }

    #[test]
    fn every_broken_rule_is_named() {
        let old = [7; PAGE];
        for (payload, error) in [
            (&[0x80, 0x80, 1][..], DeltaError::Count),
            (&[0xff, 0x7f, 1, 1], DeltaError::Overrun),
            (&[0xff, 0x1f, 2, 1, 1], DeltaError::Overrun),
            (&[0, 0], DeltaError::EmptyRun),
            (&[0, 2, 1], DeltaError::Short),
            (&[0x80], DeltaError::Short),
            (&[], DeltaError::Short),
            (&[0x80, 0x20, 0], DeltaError::Trailing),
        ] {
            assert_eq!(applied(payload, &old), Err(error), "{payload:?}");
        }
    }

    proptest! {
        #[test]
        fn any_change_within_the_limit_is_undone_by_applying(
            changes in prop::collection::vec((0..PAGE, 1usize..80, any::<u8>()), 0..40),
            limit in 16usize..PAGE,
        ) {
            let old: Vec<u8> = (0..PAGE).map(|at| (at * 7 / 3) as u8).collect();
            let mut new = old.clone();
            for (at, len, value) in changes {
                let end = (at + len).min(PAGE);
                new[at..end].fill(value);
            }
            let mut out = Vec::new();
            if encode(&old, &new, limit, &mut out) {
                prop_assert!(out.len() <= limit + 2);
                prop_assert_eq!(applied(&out, &old), Ok(new));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = applied(&payload, &[7; PAGE]);
        }
    }
}
