//! What the kernel says of a message that has come, see cmsg(3): when, and how many hops it had left.
//!
//! It is read from bytes, without pointers: a message of the kernel is as little trusted as any other.

/// Bytes that are enough for all that is asked for.
pub(crate) const CONTROL_BYTES: usize = 256;
/// Length, level and kind.
const HEADER_BYTES: usize = size_of::<usize>() + 8;

/// What was said; nothing of what was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Control {
    /// When the message came, by the kernel's clock of the time of day, in microseconds since 1970.
    pub(crate) received_us: Option<u64>,
    /// Hops that it had left.
    pub(crate) hops: Option<u8>,
}

/// Reads control messages. What is not understood is passed over; what is cut ends the reading.
pub(crate) fn read(mut bytes: &[u8]) -> Control {
    let mut control = Control::default();
    while let Some((header, _)) = bytes.split_at_checked(HEADER_BYTES) {
        let (length, rest) = header.split_at(size_of::<usize>());
        let length = usize::from_ne_bytes(length.try_into().unwrap_or_default());
        let (level, kind) = (number(&rest[..4]), number(&rest[4..]));
        let Some(data) = bytes.get(HEADER_BYTES..length) else {
            break;
        };
        match (level, kind) {
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => control.received_us = time_us(data),
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                control.hops = data.get(..4).and_then(|hops| number(hops).try_into().ok());
            }
            _ => {}
        }
        // Each begins where a word could.
        let next = length.next_multiple_of(size_of::<usize>());
        bytes = bytes.get(next..).unwrap_or_default();
    }
    control
}

fn number(bytes: &[u8]) -> i32 {
    i32::from_ne_bytes(bytes.try_into().unwrap_or_default())
}

/// A `struct timespec` of a system with 64 bits.
fn time_us(data: &[u8]) -> Option<u64> {
    let (seconds, rest) = data.split_first_chunk::<8>()?;
    let nanoseconds = rest.first_chunk::<8>()?;
    let seconds = u64::try_from(i64::from_ne_bytes(*seconds)).ok()?;
    let nanoseconds = u64::try_from(i64::from_ne_bytes(*nanoseconds)).ok()?;
    if nanoseconds >= 1_000_000_000 {
        return None;
    }
    seconds
        .checked_mul(1_000_000)?
        .checked_add(nanoseconds / 1000)
}

/// As the kernel writes it, for tests and as seeds.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn written(level: i32, kind: i32, data: &[u8]) -> Vec<u8> {
    let mut bytes = (HEADER_BYTES + data.len()).to_ne_bytes().to_vec();
    bytes.extend(level.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(size_of::<usize>()), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn time(seconds: i64, nanoseconds: i64) -> Vec<u8> {
        let data = [seconds.to_ne_bytes(), nanoseconds.to_ne_bytes()].concat();
        written(libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS, &data)
    }

    #[test]
    fn time_and_hops_are_read_and_others_passed_over() {
        let hops = written(libc::IPPROTO_IP, libc::IP_TTL, &61_i32.to_ne_bytes());
        let other = written(libc::SOL_SOCKET, 99, b"xyz");
        let all = [other, hops, time(1_700_000_000, 5_999)].concat();
        let control = read(&all);
        assert_eq!(control.hops, Some(61));
        assert_eq!(control.received_us, Some(1_700_000_000_000_005));
        let six = written(
            libc::IPPROTO_IPV6,
            libc::IPV6_HOPLIMIT,
            &255_i32.to_ne_bytes(),
        );
        assert_eq!(read(&six).hops, Some(255));
    }

    #[test]
    fn times_and_hops_that_cannot_be_are_not_there() {
        for odd in [time(-1, 0), time(1, 1_000_000_000), time(i64::MAX, 1)] {
            assert_eq!(read(&odd), Control::default());
        }
        let hops = written(libc::IPPROTO_IP, libc::IP_TTL, &256_i32.to_ne_bytes());
        assert_eq!(read(&hops), Control::default());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
        }

        #[test]
        fn any_length_in_a_message_is_survived(length in any::<usize>(), cut in 0..40_usize) {
            let mut bytes = time(1, 1);
            bytes[..size_of::<usize>()].copy_from_slice(&length.to_ne_bytes());
            bytes.truncate(cut);
            let _ = read(&bytes);
        }
    }
}
