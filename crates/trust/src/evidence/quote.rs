//! Quotes of a TPM: `TPMS_ATTEST` and `TPMT_SIGNATURE` (TPM 2.0 Library, part 2: Structures, sections 10.12.12 and 11.3.4).
//!
//! Integers are big endian. Every length is compared with its bound and with what is there before it is used.

use std::collections::BTreeMap;

use crate::digest::Sha256;
use crate::keys::{Algorithm, PublicKey};

/// `TPM_GENERATED_VALUE`: the TPM made these bytes itself; a restricted key signs no others that begin so.
const GENERATED: u32 = 0xff54_4347;
/// `TPM_ST_ATTEST_QUOTE`.
const QUOTE: u16 = 0x8018;
/// `TPM_ALG_SHA256`.
const SHA256: u16 = 0x000b;
/// `TPM_ALG_ECDSA`.
const ECDSA: u16 = 0x0018;
/// Longest `TPM2B_NAME` and `TPM2B_DATA`: a digest of 64 bytes, and for a name its algorithm.
const NAME_MAX: usize = 66;
/// Registers of a bank (`IMPLEMENTATION_PCR`; PC Client Platform TPM Profile, section 4.6).
pub const PCRS: u8 = 24;

/// What a TPM says of its registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quote {
    /// `qualifyingData`: what the verifier gave, so that the quote can't be an old one.
    pub extra: Vec<u8>,
    /// Milliseconds that the TPM has counted; it goes back only where [`Quote::is_clock_safe`] says no.
    pub clock_ms: u64,
    /// Times the TPM was reset (the host was started).
    pub reset_count: u32,
    /// Times the host was resumed or the TPM restarted since the last reset.
    pub restart_count: u32,
    /// Whether the clock has never shown a higher value before.
    pub is_clock_safe: bool,
    /// Version of the TPM's firmware, as its vendor counts.
    pub firmware: u64,
    /// Registers of the SHA-256 bank that were quoted: bit n is register n.
    pub pcrs: u32,
    /// SHA-256 over their values, lowest first.
    pub pcr_digest: Sha256,
}

/// A rule that a quote breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuoteError {
    /// Ends too early.
    #[error("it ends within {0}")]
    Short(&'static str),
    /// Something follows.
    #[error("{0} bytes follow it")]
    Trailing(usize),
    /// Not made by a TPM.
    #[error("it does not begin as what a TPM makes")]
    NotGenerated,
    /// Another structure.
    #[error("it is no quote but a structure of type {0:#06x}")]
    NotQuote(u16),
    /// A length beyond its bound.
    #[error("{0} has a length that it may not have")]
    Length(&'static str),
    /// A number with a meaning that it can't have.
    #[error("{0} has a value that it may not have")]
    Value(&'static str),
    /// Other banks than SHA-256, several or none.
    #[error("other registers than those of exactly one bank, SHA-256, were quoted")]
    Bank,
    /// Not ECDSA with SHA-256.
    #[error("the signature is not ECDSA with SHA-256")]
    Scheme,
    /// By another key, or over other bytes.
    #[error("the signature does not hold")]
    Signature,
}

/// Bytes from which nothing is taken that is not there.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], QuoteError> {
        let (head, tail) = self
            .0
            .split_at_checked(len)
            .ok_or(QuoteError::Short(what))?;
        self.0 = tail;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], QuoteError> {
        let (head, tail) = self.0.split_first_chunk().ok_or(QuoteError::Short(what))?;
        self.0 = tail;
        Ok(*head)
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, QuoteError> {
        self.array(what).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, QuoteError> {
        self.array(what).map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, QuoteError> {
        self.array(what).map(u64::from_be_bytes)
    }

    /// A `TPM2B`: two bytes of length, and so many bytes.
    pub(super) fn sized(
        &mut self,
        most: usize,
        what: &'static str,
    ) -> Result<&'a [u8], QuoteError> {
        let len = usize::from(self.u16(what)?);
        if len > most {
            return Err(QuoteError::Length(what));
        }
        self.take(len, what)
    }

    pub(super) fn end(self) -> Result<(), QuoteError> {
        match self.0.len() {
            0 => Ok(()),
            more => Err(QuoteError::Trailing(more)),
        }
    }
}

impl Quote {
    /// Checks the signature of a quote, and reads it.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn verify(attest: &[u8], signature: &[u8], key: &PublicKey) -> Result<Self, QuoteError> {
        let signature = read_signature(signature)?;
        if key.algorithm() != Algorithm::EcdsaP256 {
            return Err(QuoteError::Scheme);
        }
        if !key.verifies(attest, &signature) {
            return Err(QuoteError::Signature);
        }
        Self::read(attest)
    }

    /// The quoted registers with these values, lowest first; nothing if they are not what was quoted.
    pub fn registers(&self, values: &[Sha256]) -> Option<BTreeMap<u8, Sha256>> {
        let parts: Vec<&[u8]> = values.iter().map(|value| &value.0[..]).collect();
        let quoted = (0..PCRS).filter(|register| self.pcrs >> register & 1 == 1);
        let registers: BTreeMap<u8, Sha256> = quoted.zip(values.iter().copied()).collect();
        let complete =
            registers.len() == values.len() && self.pcrs.count_ones() as usize == values.len();
        (complete && Sha256::of_parts(&parts) == self.pcr_digest).then_some(registers)
    }

    /// Reads a `TPMS_ATTEST` whose signature was checked.
    fn read(bytes: &[u8]) -> Result<Self, QuoteError> {
        let mut reader = Reader(bytes);
        if reader.u32("the magic number")? != GENERATED {
            return Err(QuoteError::NotGenerated);
        }
        match reader.u16("the type")? {
            QUOTE => {}
            other => return Err(QuoteError::NotQuote(other)),
        }
        reader.sized(NAME_MAX + 2, "the signer's name")?;
        let extra = reader.sized(NAME_MAX, "the qualifying data")?.to_vec();
        let clock_ms = reader.u64("the clock")?;
        let (reset_count, restart_count) = (reader.u32("resets")?, reader.u32("restarts")?);
        let is_clock_safe = match reader.array("the clock's safety")? {
            [0] => false,
            [1] => true,
            _ => return Err(QuoteError::Value("the clock's safety")),
        };
        let firmware = reader.u64("the firmware's version")?;
        if (reader.u32("the banks")?, reader.u16("the bank")?) != (1, SHA256) {
            return Err(QuoteError::Bank);
        }
        let [len] = reader.array("the registers")?;
        if !(1..=4).contains(&len) {
            return Err(QuoteError::Length("the registers"));
        }
        let mut bits = [0; 4];
        bits[..usize::from(len)].copy_from_slice(reader.take(len.into(), "the registers")?);
        let pcrs = u32::from_le_bytes(bits);
        if pcrs >> PCRS != 0 {
            return Err(QuoteError::Value("the registers"));
        }
        let digest = reader.sized(NAME_MAX, "the digest")?;
        let digest = <[u8; 32]>::try_from(digest).map_err(|_| QuoteError::Length("the digest"))?;
        reader.end()?;
        Ok(Self {
            extra,
            clock_ms,
            reset_count,
            restart_count,
            is_clock_safe,
            firmware,
            pcrs,
            pcr_digest: Sha256(digest),
        })
    }
}

/// `r` and `s`, 32 bytes each. A TPM may leave zeroes at their beginning out, or write them.
fn read_signature(bytes: &[u8]) -> Result<[u8; 64], QuoteError> {
    let mut reader = Reader(bytes);
    let scheme = (reader.u16("the scheme")?, reader.u16("the hash")?);
    if scheme != (ECDSA, SHA256) {
        return Err(QuoteError::Scheme);
    }
    let mut signature = [0; 64];
    for (at, what) in [(0, "r"), (32, "s")] {
        let number = reader.sized(32, what)?;
        signature[at + 32 - number.len()..at + 32].copy_from_slice(number);
    }
    reader.end()?;
    Ok(signature)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Sign;
    use crate::keys::tests::{P256, signer};

    /// What a TPM would write.
    pub(crate) fn attest(extra: &[u8], pcrs: u32, digest: &Sha256) -> Vec<u8> {
        let sized = |bytes: &[u8]| {
            let len = u16::try_from(bytes.len()).unwrap();
            [&len.to_be_bytes()[..], bytes].concat()
        };
        [
            &b"\xff\x54\x43\x47\x80\x18"[..],
            &sized(&[0, 0x0b, 1, 2, 3]),
            &sized(extra),
            &77u64.to_be_bytes(),
            &5u32.to_be_bytes(),
            &1u32.to_be_bytes(),
            &[1],
            &0x2019_1023u64.to_be_bytes(),
            b"\0\0\0\x01\0\x0b\x03",
            &pcrs.to_le_bytes()[..3],
            &sized(&digest.0),
        ]
        .concat()
    }

    /// The signature as a TPM would write it.
    pub(crate) fn signature(attest: &[u8], key: &dyn Sign) -> Vec<u8> {
        let raw = key.sign(attest).unwrap();
        let (r, s) = raw.split_at(32);
        [&b"\0\x18\0\x0b\0\x20"[..], r, b"\0\x20", s].concat()
    }

    fn sample() -> Vec<u8> {
        attest(&[6; 32], 0x00ff, &Sha256([7; 32]))
    }

    #[test]
    fn a_quote_is_read_as_the_tpm_wrote_it() {
        let key = P256::new();
        let quote = Quote::verify(&sample(), &signature(&sample(), &key), &key.public_key());
        let expected = Quote {
            extra: vec![6; 32],
            clock_ms: 77,
            reset_count: 5,
            restart_count: 1,
            is_clock_safe: true,
            firmware: 0x2019_1023,
            pcrs: 0x00ff,
            pcr_digest: Sha256([7; 32]),
        };
        assert_eq!(quote, Ok(expected));
    }

    #[test]
    fn the_signature_must_be_by_that_key_over_these_bytes() {
        let (key, other) = (P256::new(), P256::new());
        let signed = signature(&sample(), &key);
        let verify =
            |attest: &[u8], signed: &[u8], key: PublicKey| Quote::verify(attest, signed, &key);
        let mut altered = sample();
        altered[50] ^= 1;
        assert_eq!(
            verify(&altered, &signed, key.public_key()),
            Err(QuoteError::Signature)
        );
        assert_eq!(
            verify(&sample(), &signed, other.public_key()),
            Err(QuoteError::Signature)
        );
        let ed25519 = signer(1).public_key();
        assert_eq!(verify(&sample(), &signed, ed25519), Err(QuoteError::Scheme));
        let mut rsa = signed.clone();
        rsa[1] = 0x14;
        assert_eq!(
            verify(&sample(), &rsa, key.public_key()),
            Err(QuoteError::Scheme)
        );
        let long = [&signed[..], b"\0"].concat();
        assert_eq!(
            verify(&sample(), &long, key.public_key()),
            Err(QuoteError::Trailing(1))
        );
        let none = b"\0\x18\0\x0b\0\0\0\0";
        assert_eq!(
            verify(&sample(), none, key.public_key()),
            Err(QuoteError::Signature)
        );
        let huge = b"\0\x18\0\x0b\xff\xff";
        assert_eq!(
            verify(&sample(), huge, key.public_key()),
            Err(QuoteError::Length("r"))
        );
    }

    #[test]
    fn numbers_without_their_leading_zeroes_are_the_same_signature() {
        let key = P256::new();
        // One signature of 256 has such a number; 20000 tries never fail in practice.
        let short = (0..20_000u32).find_map(|n| {
            let message = attest(&n.to_be_bytes(), 1, &Sha256([0; 32]));
            let signed = signature(&message, &key);
            (signed[6] == 0).then_some((message, signed))
        });
        let (message, signed) = short.unwrap();
        let cut = [&b"\0\x18\0\x0b\0\x1f"[..], &signed[7..]].concat();
        assert!(Quote::verify(&message, &signed, &key.public_key()).is_ok());
        assert!(Quote::verify(&message, &cut, &key.public_key()).is_ok());
    }

    #[test]
    fn each_broken_rule_has_its_name() {
        let read = |at: usize, bytes: &[u8]| {
            let mut odd = sample();
            odd[at..at + bytes.len()].copy_from_slice(bytes);
            Quote::read(&odd)
        };
        assert_eq!(read(0, b"\0"), Err(QuoteError::NotGenerated));
        assert_eq!(read(4, b"\x80\x17"), Err(QuoteError::NotQuote(0x8017)));
        assert_eq!(
            read(6, b"\xff\xff"),
            Err(QuoteError::Length("the signer's name"))
        );
        assert_eq!(
            read(13, b"\xff\xff"),
            Err(QuoteError::Length("the qualifying data"))
        );
        assert_eq!(
            read(63, b"\x02"),
            Err(QuoteError::Value("the clock's safety"))
        );
        // No bank, several, and SHA-1.
        for banks in [b"\0\0\0\0\0\x0b", b"\0\0\0\x02\0\x0b", b"\0\0\0\x01\0\x04"] {
            assert_eq!(read(72, banks), Err(QuoteError::Bank));
        }
        for len in [b"\0", b"\x05"] {
            assert_eq!(read(78, len), Err(QuoteError::Length("the registers")));
        }
        assert_eq!(read(82, b"\0\x21"), Err(QuoteError::Short("the digest")));
        assert_eq!(read(82, b"\0\x1f"), Err(QuoteError::Length("the digest")));
        let long = [&sample()[..], b"\0"].concat();
        assert_eq!(Quote::read(&long), Err(QuoteError::Trailing(1)));
    }

    proptest! {
        #[test]
        fn a_cut_quote_is_none(len in 0usize..116) {
            prop_assert!(sample().len() == 116 && Quote::read(&sample()[..len]).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let quote = [&b"\xff\x54\x43\x47\x80\x18"[..], &bytes].concat();
            let _ = (Quote::read(&bytes), Quote::read(&quote), read_signature(&bytes));
        }
    }
}
