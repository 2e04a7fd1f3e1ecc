//! The log of what firmware and boot loader have measured, replayed against a quote.
//!
//! Form: TCG PC Client Platform Firmware Profile, section 10 ("crypto agile"): a first event in the old form that lists
//! the banks, then `TCG_PCR_EVENT2`. Integers are little endian. The log is not signed: it is believed as far as replaying
//! it gives the registers that a TPM quoted. What that proves are the digests; the data beside them may be anything and is
//! left out.

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};

use super::quote::{PCRS, Quote};
use crate::digest::Sha256;

/// Longest log in bytes.
pub const LOG_MAX: usize = 1 << 20;
/// Most events of a log.
pub const EVENTS_MAX: usize = 10_000;
/// Most banks of a log.
const BANKS_MAX: usize = 16;
/// `TPM_ALG_SHA256`.
const SHA256: u16 = 0x000b;
/// `EV_NO_ACTION`: not measured.
const NO_ACTION: u32 = 3;
const SIGNATURE: &[u8] = b"Spec ID Event03\0";
/// Says with which locality the TPM was started; register 0 begins with that.
const STARTUP: &[u8] = b"StartupLocality\0";

/// A rule that a log breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventLogError {
    /// More than [`LOG_MAX`] bytes or [`EVENTS_MAX`] events.
    #[error("the log is longer than {LOG_MAX} bytes or {EVENTS_MAX} events")]
    TooLong,
    /// Ends within an event.
    #[error("the log ends within event {0}")]
    Short(usize),
    /// Does not begin as such a log.
    #[error("the log does not begin with a list of its banks that has SHA-256")]
    Header,
    /// A register that there is not, another order of banks, or a locality that can't be.
    #[error("event {0} has a register, a bank or a locality that it may not have")]
    Value(usize),
    /// Something was left out, added or altered, or it is another host's.
    #[error("replaying the log does not give the registers that the TPM quoted")]
    Mismatch,
}

/// Something that was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Event {
    /// Register that it was measured into.
    #[n(0)]
    pub register: u8,
    /// Kind of event, as the profile numbers them.
    #[n(1)]
    pub kind: u32,
    /// What was measured, as a digest.
    #[n(2)]
    pub digest: Sha256,
}

/// What a log says, before it has been compared with registers: anybody may have written it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Log {
    /// With which the TPM was started: register 0 begins with it.
    #[n(0)]
    locality: u8,
    /// In order.
    #[n(1)]
    events: Vec<Event>,
}

/// A log that gives the registers that were quoted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedLog {
    registers: [Sha256; PCRS as usize],
    quoted: u32,
    events: Vec<Event>,
}

struct Reader<'a> {
    left: &'a [u8],
    event: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], EventLogError> {
        let short = EventLogError::Short(self.event);
        let (head, tail) = self.left.split_at_checked(len).ok_or(short)?;
        self.left = tail;
        Ok(head)
    }

    fn u16(&mut self) -> Result<u16, EventLogError> {
        let bytes = self.take(2)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Result<u32, EventLogError> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// Four bytes of length, and so many bytes.
    fn sized(&mut self) -> Result<&'a [u8], EventLogError> {
        let len = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        self.take(len)
    }

    /// The banks: number of the algorithm, and length of its digests.
    fn header(&mut self) -> Result<Vec<(u16, usize)>, EventLogError> {
        let (register, kind) = (self.u32()?, self.u32()?);
        self.take(20)?;
        let mut header = Reader {
            left: self.sized()?,
            event: 0,
        };
        if (register, kind) != (0, NO_ACTION) || header.take(16)? != SIGNATURE {
            return Err(EventLogError::Header);
        }
        // Class of the platform, version, errata, size of a pointer.
        header.take(8)?;
        let count = usize::try_from(header.u32()?).unwrap_or(usize::MAX);
        if !(1..=BANKS_MAX).contains(&count) {
            return Err(EventLogError::Header);
        }
        let mut banks = Vec::with_capacity(count);
        for _ in 0..count {
            let (bank, len) = (header.u16()?, usize::from(header.u16()?));
            if len > 64 || (bank == SHA256 && len != 32) {
                return Err(EventLogError::Header);
            }
            banks.push((bank, len));
        }
        match banks.iter().filter(|(bank, _)| *bank == SHA256).count() {
            1 => Ok(banks),
            _ => Err(EventLogError::Header),
        }
    }

    /// Register, kind, digest of SHA-256 and data of the next event.
    fn event(&mut self, banks: &[(u16, usize)]) -> Result<(Event, &'a [u8]), EventLogError> {
        let odd = EventLogError::Value(self.event);
        let (register, kind) = (self.u32()?, self.u32()?);
        let register = u8::try_from(register)
            .ok()
            .filter(|register| *register < PCRS);
        let register = register.ok_or(odd)?;
        let mut digest = None;
        if usize::try_from(self.u32()?) != Ok(banks.len()) {
            return Err(odd);
        }
        for (bank, len) in banks {
            if self.u16()? != *bank {
                return Err(odd);
            }
            let bytes = self.take(*len)?;
            if *bank == SHA256 {
                digest = bytes.try_into().ok().map(Sha256);
            }
        }
        let digest = digest.ok_or(odd)?;
        let event = Event {
            register,
            kind,
            digest,
        };
        Ok((event, self.sized()?))
    }
}

impl Log {
    /// Reads a log.
    ///
    /// # Errors
    ///
    /// It is none, or too long.
    pub fn read(bytes: &[u8]) -> Result<Self, EventLogError> {
        if bytes.len() > LOG_MAX {
            return Err(EventLogError::TooLong);
        }
        let mut reader = Reader {
            left: bytes,
            event: 0,
        };
        let banks = reader.header()?;
        let mut log = Self {
            locality: 0,
            events: Vec::new(),
        };
        while !reader.left.is_empty() {
            reader.event += 1;
            if reader.event > EVENTS_MAX {
                return Err(EventLogError::TooLong);
            }
            let (event, data) = reader.event(&banks)?;
            if event.kind != NO_ACTION {
                log.events.push(event);
            } else if let Some(locality) = data.strip_prefix(STARTUP) {
                // Only before anything is measured.
                match (locality, event.register, log.events.is_empty()) {
                    ([locality], 0, true) if is_locality(*locality) => log.locality = *locality,
                    _ => return Err(EventLogError::Value(reader.event)),
                }
            }
        }
        Ok(log)
    }

    /// Without what was measured into other registers than these (bit n is register n).
    #[must_use]
    pub fn of_registers(mut self, pcrs: u32) -> Self {
        let is_wanted = |register: u8| register < PCRS && pcrs >> register & 1 == 1;
        self.events.retain(|event| is_wanted(event.register));
        if !is_wanted(0) {
            self.locality = 0;
        }
        self
    }

    /// How much was measured.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Registers as these events leave them.
    ///
    /// # Errors
    ///
    /// A register or locality that there is not.
    fn replay(&self) -> Result<[Sha256; PCRS as usize], EventLogError> {
        if !is_locality(self.locality) || self.events.len() > EVENTS_MAX {
            return Err(EventLogError::Value(0));
        }
        let mut registers = initial();
        registers[0].0[31] = self.locality;
        for (at, event) in self.events.iter().enumerate() {
            let register = registers.get_mut(usize::from(event.register));
            let register = register.ok_or(EventLogError::Value(at + 1))?;
            *register = Sha256::of_parts(&[&register.0, &event.digest.0]);
        }
        Ok(registers)
    }

    /// The events of each of these registers for which they give the value that a TPM quoted. Where they do not, what the
    /// log says of that register is worth nothing: operating systems measure more than firmware notes.
    ///
    /// # Errors
    ///
    /// A register or locality that there is not.
    pub fn explain(
        &self,
        quoted: &BTreeMap<u8, Sha256>,
    ) -> Result<BTreeMap<u8, Vec<Event>>, EventLogError> {
        let registers = self.replay()?;
        let explained = quoted
            .iter()
            .filter(|(register, value)| registers.get(usize::from(**register)) == Some(value));
        let events = |register: u8| {
            let all = self.events.iter().copied();
            all.filter(|event| event.register == register).collect()
        };
        Ok(explained
            .map(|(register, _)| (*register, events(*register)))
            .collect())
    }
}

/// Localities by `TPM2_Startup` or an H-CRTM.
fn is_locality(locality: u8) -> bool {
    matches!(locality, 0 | 3 | 4)
}

impl VerifiedLog {
    /// Replays a log.
    ///
    /// # Errors
    ///
    /// It is none, or gives other registers than those quoted.
    pub fn verify(bytes: &[u8], quote: &Quote) -> Result<Self, EventLogError> {
        let log = Log::read(bytes)?;
        let registers = log.replay()?;
        let quoted = (0..PCRS).filter(|register| quote.pcrs >> register & 1 == 1);
        let values: Vec<&[u8]> = quoted
            .map(|register| &registers[usize::from(register)].0[..])
            .collect();
        if Sha256::of_parts(&values) != quote.pcr_digest {
            return Err(EventLogError::Mismatch);
        }
        Ok(Self {
            registers,
            quoted: quote.pcrs,
            events: log.of_registers(quote.pcrs).events,
        })
    }

    /// Value of a register; nothing if it was not quoted, because then nothing is known of it.
    pub fn register(&self, register: u8) -> Option<Sha256> {
        let is_quoted = register < PCRS && self.quoted >> register & 1 == 1;
        is_quoted.then(|| self.registers[usize::from(register)])
    }

    /// What was measured into the quoted registers, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }
}

/// Registers as a reset leaves them: those of a late launch (17 to 22) are all ones.
fn initial() -> [Sha256; PCRS as usize] {
    let mut registers = [Sha256([0; 32]); PCRS as usize];
    registers[17..=22].fill(Sha256([0xff; 32]));
    registers
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BANKS: &[u8] = b"\x02\0\0\0\x04\0\x14\0\x0b\0\x20\0";

    fn header(banks: &[u8]) -> Vec<u8> {
        let event = [SIGNATURE, b"\0\0\0\0\0\x02\0\x02", banks, b"\0"].concat();
        let len = u32::try_from(event.len()).unwrap().to_le_bytes();
        [&[0, 0, 0, 0, 3, 0, 0, 0][..], &[0; 20], &len, &event].concat()
    }

    fn event(register: u32, kind: u32, digest: u8, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).unwrap().to_le_bytes();
        let digests = [&b"\x02\0\0\0\x04\0"[..], &[1; 20], b"\x0b\0", &[digest; 32]].concat();
        [
            &register.to_le_bytes()[..],
            &kind.to_le_bytes(),
            &digests,
            &len,
            data,
        ]
        .concat()
    }

    fn log() -> Vec<u8> {
        [
            header(BANKS),
            event(0, NO_ACTION, 0, b"StartupLocality\0\x03"),
            event(0, 8, 0xa0, b"version"),
            event(7, 0x8000_0001, 0xa7, b"SecureBoot"),
            event(7, 4, 0xb7, &[0; 4]),
            event(9, 5, 0xa9, b""),
        ]
        .concat()
    }

    fn extended(start: [u8; 32], digests: &[u8]) -> Sha256 {
        digests.iter().fold(Sha256(start), |value, digest| {
            Sha256::of_parts(&[&value.0, &[*digest; 32]])
        })
    }

    /// Of registers 0 and 7.
    fn quote(zero: Sha256, seven: Sha256) -> Quote {
        Quote {
            extra: Vec::new(),
            clock_ms: 0,
            reset_count: 0,
            restart_count: 0,
            is_clock_safe: true,
            firmware: 0,
            pcrs: 1 | 1 << 7,
            pcr_digest: Sha256::of_parts(&[&zero.0, &seven.0]),
        }
    }

    fn good() -> Quote {
        let mut locality = [0; 32];
        locality[31] = 3;
        quote(
            extended(locality, &[0xa0]),
            extended([0; 32], &[0xa7, 0xb7]),
        )
    }

    #[test]
    fn a_log_that_gives_the_quoted_registers_is_believed_as_far_as_they_go() {
        let verified = VerifiedLog::verify(&log(), &good()).unwrap();
        assert_eq!(verified.register(7), Some(extended([0; 32], &[0xa7, 0xb7])));
        // Register 9 was not quoted: what the log says of it is worth nothing.
        assert_eq!((verified.register(9), verified.register(200)), (None, None));
        let registers: Vec<_> = verified
            .events()
            .iter()
            .map(|event| event.register)
            .collect();
        assert_eq!(registers, [0, 7, 7]);
    }

    #[test]
    fn events_left_out_added_swapped_or_altered_do_not_give_the_registers() {
        let (begin, seven) = (header(BANKS), event(7, 0x8000_0001, 0xa7, b"SecureBoot"));
        let locality = event(0, NO_ACTION, 0, b"StartupLocality\0\x03");
        let (zero, separator) = (event(0, 8, 0xa0, b""), event(7, 4, 0xb7, &[0; 4]));
        let logs: [&[&[u8]]; 5] = [
            &[&begin, &locality, &zero, &seven],
            &[&begin, &locality, &zero, &seven, &separator, &separator],
            &[&begin, &locality, &zero, &separator, &seven],
            &[&begin, &zero, &seven, &separator],
            &[&begin],
        ];
        for log in logs {
            let verified = VerifiedLog::verify(&log.concat(), &good());
            assert_eq!(verified, Err(EventLogError::Mismatch));
        }
        let whole = [&begin[..], &locality, &zero, &seven, &separator].concat();
        assert!(VerifiedLog::verify(&whole, &good()).is_ok());
    }

    #[test]
    fn what_is_no_log_has_its_reason() {
        let verify = |log: &[u8]| VerifiedLog::verify(log, &good()).unwrap_err();
        assert_eq!(verify(&vec![0; LOG_MAX + 1]), EventLogError::TooLong);
        let many = [header(BANKS), event(9, 5, 0, b"").repeat(EVENTS_MAX + 1)].concat();
        assert!(many.len() <= LOG_MAX && verify(&many) == EventLogError::TooLong);
        let banks: [&[u8]; 5] = [
            b"\0\0\0\0",
            b"\xff\xff\xff\xff",
            b"\x01\0\0\0\x04\0\x14\0",
            b"\x01\0\0\0\x0b\0\x1f\0",
            b"\x02\0\0\0\x0b\0\x20\0\x0b\0\x20\0",
        ];
        for banks in banks {
            assert_eq!(verify(&header(banks)), EventLogError::Header, "{banks:?}");
        }
        assert_eq!(verify(b""), EventLogError::Short(0));
        let with = |event: Vec<u8>| verify(&[header(BANKS), event].concat());
        assert_eq!(with(event(24, 1, 0, b"")), EventLogError::Value(1));
        assert_eq!(with(event(u32::MAX, 1, 0, b"")), EventLogError::Value(1));
        let late = [
            event(0, 8, 0xa0, b""),
            event(0, NO_ACTION, 0, b"StartupLocality\0\x03"),
        ];
        assert_eq!(with(late.concat()), EventLogError::Value(2));
        assert_eq!(
            with(event(0, NO_ACTION, 0, b"StartupLocality\0\x02")),
            EventLogError::Value(1)
        );
        let mut huge = event(1, 1, 0, b"");
        let at = huge.len() - 4;
        huge[at..].fill(0xff);
        assert_eq!(with(huge), EventLogError::Short(1));
        let mut count = event(1, 1, 0, b"");
        count[8] = 3;
        assert_eq!(with(count), EventLogError::Value(1));
    }

    proptest! {
        #[test]
        fn no_cut_of_a_log_is_believed(len in any::<prop::sample::Index>()) {
            // Without the last event, which is of a register that was not quoted.
            let whole = log().len() - event(9, 5, 0xa9, b"").len();
            let cut = &log()[..len.index(whole)];
            prop_assert!(VerifiedLog::verify(cut, &good()).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = VerifiedLog::verify(&bytes, &good());
            let _ = VerifiedLog::verify(&[header(BANKS), bytes].concat(), &good());
        }
    }
}
