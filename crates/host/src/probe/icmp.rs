//! ICMP as far as probes need it: echo (RFC 792, RFC 4443) and timestamp (RFC 792).

/// Longest question, in bytes.
pub(crate) const QUESTION_BYTES_MAX: usize = 20;
/// Milliseconds of a day: what a timestamp counts.
pub(crate) const DAY_MS: u32 = 86_400_000;

const ECHO_REPLY: u8 = 0;
const ECHO: u8 = 8;
const TIMESTAMP: u8 = 13;
const TIMESTAMP_REPLY: u8 = 14;
const ECHO_6: u8 = 128;
const ECHO_REPLY_6: u8 = 129;

/// A question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// An echo, which brings back its cookie.
    Echo {
        /// The kernel sets it for sockets without rights.
        id: u16,
        /// Sequence number.
        sequence: u16,
        /// Anything.
        cookie: u64,
    },
    /// A timestamp. IPv6 has none.
    Timestamp {
        /// Identifier.
        id: u16,
        /// Sequence number.
        sequence: u16,
        /// What should be our time, and may be anything: it comes back.
        cookie: u32,
    },
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// To an echo.
    Echo {
        /// Identifier.
        id: u16,
        /// Sequence number.
        sequence: u16,
        /// What the question had.
        cookie: u64,
    },
    /// To a timestamp.
    Timestamp {
        /// Identifier.
        id: u16,
        /// Sequence number.
        sequence: u16,
        /// What the question had.
        cookie: u32,
        /// When the question came, in milliseconds since midnight UT; with the highest bit set it is another count.
        receive: u32,
        /// When the answer was sent.
        transmit: u32,
    },
}

/// Why a message is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IcmpError {
    /// Cut.
    #[error("a message of {0} bytes is too short")]
    Length(usize),
    /// Not an IPv4 header.
    #[error("it has no IPv4 header")]
    Header,
    /// A wrong sum.
    #[error("its checksum is wrong")]
    Checksum,
    /// Another kind of message.
    #[error("type {0}, code {1} answers no question of ours")]
    Kind(u8, u8),
}

/// What a raw socket of IPv4 gives begins with the packet's header; what follows it.
///
/// # Errors
/// If there is none.
pub(crate) fn behind_header(packet: &[u8]) -> Result<&[u8], IcmpError> {
    let first = *packet.first().ok_or(IcmpError::Length(0))?;
    let length = usize::from(first & 0xf) * 4;
    if first >> 4 != 4 || length < 20 {
        return Err(IcmpError::Header);
    }
    packet.get(length..).ok_or(IcmpError::Length(packet.len()))
}

/// The Internet checksum (RFC 1071); 0 of what has a right one in it.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([pair[0], low]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Writes a question to the buffer; what of the buffer is to be sent.
pub(crate) fn write(
    question: Question,
    is_v6: bool,
    buffer: &mut [u8; QUESTION_BYTES_MAX],
) -> &[u8] {
    buffer.fill(0);
    let (kind, id, sequence, length) = match question {
        Question::Echo {
            id,
            sequence,
            cookie,
        } => {
            buffer[8..16].copy_from_slice(&cookie.to_be_bytes());
            (if is_v6 { ECHO_6 } else { ECHO }, id, sequence, 16)
        }
        Question::Timestamp {
            id,
            sequence,
            cookie,
        } => {
            buffer[8..12].copy_from_slice(&cookie.to_be_bytes());
            (TIMESTAMP, id, sequence, 20)
        }
    };
    buffer[0] = kind;
    buffer[4..6].copy_from_slice(&id.to_be_bytes());
    buffer[6..8].copy_from_slice(&sequence.to_be_bytes());
    if !is_v6 {
        // That of ICMPv6 covers addresses as well; the kernel makes it.
        let sum = checksum(&buffer[..length]);
        buffer[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    &buffer[..length]
}

/// Reads an answer. The kernel has verified the checksum of ICMPv6.
///
/// # Errors
/// If it is none.
pub(crate) fn read(message: &[u8], is_v6: bool) -> Result<Answer, IcmpError> {
    let word = |at: usize| -> Option<u32> {
        let word = message.get(at..at + 4)?;
        Some(u32::from_be_bytes(word.try_into().ok()?))
    };
    let short = || IcmpError::Length(message.len());
    let (head, both) = (word(0).ok_or_else(short)?, word(4).ok_or_else(short)?);
    let [kind, code, ..] = head.to_be_bytes();
    let (id, sequence) = ((both >> 16) as u16, both as u16);
    if !is_v6 && checksum(message) != 0 {
        return Err(IcmpError::Checksum);
    }
    match (kind, code, is_v6) {
        (ECHO_REPLY, 0, false) | (ECHO_REPLY_6, 0, true) => {
            let (high, low) = (word(8).ok_or_else(short)?, word(12).ok_or_else(short)?);
            Ok(Answer::Echo {
                id,
                sequence,
                cookie: u64::from(high) << 32 | u64::from(low),
            })
        }
        (TIMESTAMP_REPLY, 0, false) => Ok(Answer::Timestamp {
            id,
            sequence,
            cookie: word(8).ok_or_else(short)?,
            receive: word(12).ok_or_else(short)?,
            transmit: word(16).ok_or_else(short)?,
        }),
        _ => Err(IcmpError::Kind(kind, code)),
    }
}

/// By how much the clock behind an answer is ahead of ours, in milliseconds, at most half a day; nothing if it does not
/// count milliseconds of the day.
#[must_use]
pub(crate) fn offset_ms(
    receive: u32,
    transmit: u32,
    sent_us: u64,
    received_us: u64,
) -> Option<f64> {
    if receive >= DAY_MS || transmit >= DAY_MS {
        return None;
    }
    let day_ms = f64::from(DAY_MS);
    let ahead = |theirs: u32, ours_us: u64| {
        let ours_ms = (ours_us % (u64::from(DAY_MS) * 1000)) as f64 / 1e3;
        // Their clock shows the millisecond that has begun; the middle of it is the best guess.
        let ahead = f64::from(theirs) + 0.5 - ours_ms;
        ahead - (ahead / day_ms).round() * day_ms
    };
    let (there, back) = (ahead(receive, sent_us), ahead(transmit, received_us));
    // Near half a day one may be ahead and the other behind.
    let apart = ((there - back) / day_ms).round() * day_ms;
    let middle = f64::midpoint(there, back + apart);
    Some(middle - (middle / day_ms).round() * day_ms)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What answers a question.
    fn answered(question: &[u8], receive: u32, transmit: u32) -> Vec<u8> {
        let mut answer = question.to_vec();
        if answer[0] == TIMESTAMP {
            answer[12..16].copy_from_slice(&receive.to_be_bytes());
            answer[16..20].copy_from_slice(&transmit.to_be_bytes());
        }
        answer[0] = match answer[0] {
            ECHO => ECHO_REPLY,
            ECHO_6 => ECHO_REPLY_6,
            _ => TIMESTAMP_REPLY,
        };
        answer[2..4].fill(0);
        if answer[0] != ECHO_REPLY_6 {
            let sum = checksum(&answer);
            answer[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        answer
    }

    #[test]
    fn messages_that_answer_nothing_are_refused_by_their_rule() {
        let mut buffer = [0; QUESTION_BYTES_MAX];
        let echo = Question::Echo {
            id: 1,
            sequence: 2,
            cookie: 3,
        };
        let question = write(echo, false, &mut buffer).to_vec();
        assert_eq!(read(&question, false), Err(IcmpError::Kind(8, 0)));
        let mut answer = answered(&question, 0, 0);
        assert!(read(&answer, false).is_ok());
        assert_eq!(read(&answer, true), Err(IcmpError::Kind(0, 0)));
        answer[9] ^= 1;
        assert_eq!(read(&answer, false), Err(IcmpError::Checksum));
        assert_eq!(read(&answer[..7], false), Err(IcmpError::Length(7)));
        // An echo of somebody else, without room for a cookie.
        let short = [0, 0, 0xff, 0xff, 0, 0, 0, 0];
        assert_eq!(read(&short, false), Err(IcmpError::Length(8)));
    }

    #[test]
    fn the_header_of_a_packet_is_passed_over_with_its_options() {
        let mut packet = vec![0x46; 24];
        packet.extend(b"x");
        assert_eq!(behind_header(&packet), Ok(&b"x"[..]));
        assert_eq!(behind_header(&packet[..20]), Err(IcmpError::Length(20)));
        assert_eq!(behind_header(&[0x60; 40]), Err(IcmpError::Header));
        assert_eq!(behind_header(&[0x44; 40]), Err(IcmpError::Header));
        assert_eq!(behind_header(&[]), Err(IcmpError::Length(0)));
    }

    #[test]
    fn a_clock_is_compared_over_midnight() {
        let midnight_us = 20_000 * 86_400_000_000_u64;
        let ahead = offset_ms(20, 20, midnight_us - 10_000, midnight_us - 10_000).unwrap();
        assert!((ahead - 30.5).abs() < 1e-6, "{ahead}");
        let behind = offset_ms(DAY_MS - 20, DAY_MS - 20, midnight_us, midnight_us).unwrap();
        assert!((behind + 19.5).abs() < 1e-6, "{behind}");
        assert_eq!(offset_ms(1 << 31, 0, 0, 0), None);
        assert_eq!(offset_ms(0, DAY_MS, 0, 0), None);
    }

    proptest! {
        #[test]
        fn what_is_asked_comes_back(id: u16, sequence: u16, cookie: u64, is_v6: bool) {
            let mut buffer = [0; QUESTION_BYTES_MAX];
            let echo = Question::Echo { id, sequence, cookie };
            let answer = answered(write(echo, is_v6, &mut buffer), 0, 0);
            prop_assert_eq!(read(&answer, is_v6), Ok(Answer::Echo { id, sequence, cookie }));
            let cookie = cookie as u32;
            let asked = Question::Timestamp { id, sequence, cookie };
            let answer = answered(write(asked, false, &mut buffer), 5, 6);
            let read = read(&answer, false).unwrap();
            prop_assert_eq!(read, Answer::Timestamp { id, sequence, cookie, receive: 5, transmit: 6 });
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..80), is_v6: bool) {
            let _ = read(&bytes, is_v6);
            let _ = behind_header(&bytes).and_then(|message| read(message, is_v6));
        }

        #[test]
        fn offsets_are_at_most_half_a_day(receive: u32, transmit: u32, sent_us: u64, received_us: u64) {
            if let Some(ms) = offset_ms(receive, transmit, sent_us, received_us) {
                prop_assert!(ms.abs() <= f64::from(DAY_MS) / 2.0 + 1.0, "{}", ms);
            }
        }
    }
}
