//! The TPM of this machine: keys, quotes, registers, sealed secrets.
//!
//! A TPM may be slow, may hang, and may go away. All of it is done on a thread of its own, and whoever asks waits for so
//! long and no longer.

pub mod credential;
pub mod sealed;
#[cfg(feature = "tpm")]
mod worker;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

#[cfg(feature = "tpm")]
use self::worker::{Open, Worker};

/// Longest wait for a quote, registers or a secret.
pub const QUICK: Duration = Duration::from_secs(5);
/// Longest wait for a key to be made: some TPMs need tens of seconds for one of RSA.
pub const SLOW: Duration = Duration::from_secs(90);
/// Largest secret that can be sealed, in bytes (`MAX_SYM_DATA`).
pub const SECRET_MAX: usize = 128;
/// Largest part of a [`KeyBlob`] or [`Sealed`], in bytes.
pub const BLOB_MAX: usize = 1024;

/// Why a TPM did not do something.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// Built without the feature `tpm`.
    #[error("this program was built without support for TPMs")]
    NotBuilt,
    /// Another form than `device:PATH` or `swtpm:host=HOST,port=PORT`.
    #[error("{0:?} names no TPM: `device:/dev/tpmrm0` does, and `swtpm:host=127.0.0.1,port=2321`")]
    Name(String),
    /// It can't be reached.
    #[error("no TPM answers at {name}: {problem}")]
    Unreachable {
        /// Where.
        name: String,
        /// The library's words.
        problem: String,
    },
    /// No answer in time.
    #[error("the TPM has not answered within {} s ({action})", .deadline.as_secs())]
    Timeout {
        /// What was asked.
        action: &'static str,
        /// Longest wait.
        deadline: Duration,
    },
    /// It refused, or the connection broke.
    #[error("{action}: {problem}")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// The library's words.
        problem: String,
    },
    /// No thread could be started, or it has ended.
    #[error("there is no thread to talk to the TPM")]
    Thread,
    /// Something is measured all the time.
    #[error("the registers change faster than they can be quoted")]
    Restless,
    /// Another TPM's, altered, or not such a thing.
    #[error("the key or secret was not made by this TPM, or was altered: {0}")]
    Foreign(String),
    /// What was measured is not what it was when the secret was sealed.
    #[error("the measured state is another than when the secret was sealed: registers {} changed", list(.0))]
    Changed(Vec<u8>),
    /// Too long, or none.
    #[error("{0} has a length that it may not have")]
    Length(&'static str),
    /// Registers of other numbers than 0 to 23, or none.
    #[error("{0:#x} names no registers (as bits)")]
    Registers(u32),
}

impl TpmError {
    /// Stable code for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotBuilt | Self::Name(_) => "tpm-missing",
            Self::Unreachable { .. } => "tpm-unreachable",
            Self::Timeout { .. } => "tpm-timeout",
            Self::Refused { .. } | Self::Thread | Self::Restless => "tpm-failed",
            Self::Foreign(_) => "tpm-foreign",
            Self::Changed(_) => "tpm-state-changed",
            Self::Length(_) | Self::Registers(_) => "tpm-usage",
        }
    }
}

fn list(registers: &[u8]) -> String {
    let words: Vec<String> = registers.iter().map(ToString::to_string).collect();
    words.join(", ")
}

/// Kind of endorsement key, by the default templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndorsementKind {
    /// RSA with 2048 bits.
    Rsa2048,
    /// ECC on P-256.
    EccP256,
}

/// An endorsement key.
#[derive(Clone, Debug)]
pub struct Endorsement {
    /// Its public area (`TPMT_PUBLIC`).
    pub public: Vec<u8>,
    /// Its certificate as the manufacturer has put it into the TPM; DER, perhaps with bytes behind it.
    pub certificate: Option<Vec<u8>>,
}

/// A key that only the TPM that made it can use; it is no secret.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyBlob {
    /// The TPM's part, encrypted by it.
    pub private: Vec<u8>,
    /// Its public area (`TPMT_PUBLIC`).
    pub public: Vec<u8>,
}

impl fmt::Debug for KeyBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyBlob({} bytes)", self.private.len())
    }
}

impl KeyBlob {
    /// As one piece, for a file: each part with its length in front, two bytes, big endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let sized = |bytes: &[u8]| {
            let len = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
            [&len.to_be_bytes()[..], bytes].concat()
        };
        [sized(&self.private), sized(&self.public)].concat()
    }

    /// From such a piece.
    ///
    /// # Errors
    ///
    /// It is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TpmError> {
        let part = |bytes: &mut &[u8]| {
            let (len, rest) = bytes.split_first_chunk::<2>()?;
            let len = usize::from(u16::from_be_bytes(*len));
            let (part, rest) = rest.split_at_checked(len).filter(|_| len <= BLOB_MAX)?;
            *bytes = rest;
            Some(part.to_vec())
        };
        let mut left = bytes;
        match (part(&mut left), part(&mut left)) {
            (Some(private), Some(public)) if left.is_empty() => Ok(Self { private, public }),
            _ => Err(TpmError::Length("the file with the TPM's key")),
        }
    }
}

/// What a TPM says of its registers, signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// `TPMS_ATTEST`.
    pub attest: Vec<u8>,
    /// `TPMT_SIGNATURE`.
    pub signature: Vec<u8>,
    /// Values of the registers over which the quote was made.
    pub registers: BTreeMap<u8, [u8; 32]>,
}

/// A secret that the TPM gives out only while its registers hold what they did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The secret, encrypted by the TPM.
    pub blob: KeyBlob,
    /// What the registers held. The TPM goes by its own digest; this says which one has changed.
    pub registers: BTreeMap<u8, [u8; 32]>,
}

/// A TPM.
pub struct Tpm {
    name: String,
    #[cfg(feature = "tpm")]
    queue: worker::Queue,
}

impl fmt::Debug for Tpm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tpm({})", self.name)
    }
}

#[cfg(not(feature = "tpm"))]
#[expect(
    clippy::unused_self,
    reason = "the same interface as where there is a TPM"
)]
impl Tpm {
    /// Always fails: there is no support for TPMs in this program.
    pub fn open(name: &str) -> Result<Self, TpmError> {
        let _ = name;
        Err(TpmError::NotBuilt)
    }

    /// See the feature `tpm`.
    pub fn later(name: &str) -> Result<Self, TpmError> {
        Self::open(name)
    }

    /// See the feature `tpm`.
    pub fn endorsement(&self, _: EndorsementKind) -> Result<Endorsement, TpmError> {
        Err(TpmError::NotBuilt)
    }

    /// See the feature `tpm`.
    pub fn make_attestation_key(&self) -> Result<KeyBlob, TpmError> {
        Err(TpmError::NotBuilt)
    }

    /// See the feature `tpm`.
    pub fn warm(&self, _: &KeyBlob) -> Result<(), TpmError> {
        Err(TpmError::NotBuilt)
    }

    /// See the feature `tpm`.
    pub fn quote(&self, _: &KeyBlob, _: u32, _: &[u8]) -> Result<Quoted, TpmError> {
        Err(TpmError::NotBuilt)
    }

    /// See the feature `tpm`.
    pub fn registers(&self, _: u32) -> Result<BTreeMap<u8, [u8; 32]>, TpmError> {
        Err(TpmError::NotBuilt)
    }

    /// See the feature `tpm`.
    pub fn activate(
        &self,
        _: &KeyBlob,
        _: EndorsementKind,
        _: &[u8],
        _: &[u8],
    ) -> Result<Vec<u8>, TpmError> {
        Err(TpmError::NotBuilt)
    }

    /// See the feature `tpm`.
    pub fn seal(&self, _: u32, _: &[u8]) -> Result<Sealed, TpmError> {
        Err(TpmError::NotBuilt)
    }

    /// See the feature `tpm`.
    pub fn unseal(&self, _: &Sealed) -> Result<Vec<u8>, TpmError> {
        Err(TpmError::NotBuilt)
    }
}

#[cfg(feature = "tpm")]
impl Tpm {
    /// The TPM of that name: `device:/dev/tpmrm0` or `swtpm:host=HOST,port=PORT`. Looks whether it answers.
    pub fn open(name: &str) -> Result<Self, TpmError> {
        let tpm = Self::later(name)?;
        tpm.ask("opening the TPM", QUICK, |_| Ok(()))?;
        Ok(tpm)
    }

    /// The same, but opened only when it is first asked for something.
    ///
    /// # Errors
    ///
    /// The name is not that of a TPM.
    pub fn later(name: &str) -> Result<Self, TpmError> {
        Ok(Self {
            name: name.to_owned(),
            queue: worker::Queue::start(Worker::new(name)?)?,
        })
    }

    /// Name by which it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn ask<T: Send + 'static>(
        &self,
        action: &'static str,
        deadline: Duration,
        work: impl Fn(&mut Open) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, TpmError> {
        self.queue.ask(action, deadline, work)
    }

    /// The key by which this TPM is told from all others. May take long.
    pub fn endorsement(&self, kind: EndorsementKind) -> Result<Endorsement, TpmError> {
        self.ask("making the endorsement key", SLOW, move |open| {
            open.endorsement(kind)
        })
    }

    /// Makes a key that signs only what this TPM says: ECDSA on P-256. May take long.
    pub fn make_attestation_key(&self) -> Result<KeyBlob, TpmError> {
        self.ask(
            "making the attestation key",
            SLOW,
            Open::make_attestation_key,
        )
    }

    /// Loads a key, so that the next quote with it takes no longer than it must.
    pub fn warm(&self, key: &KeyBlob) -> Result<(), TpmError> {
        let key = key.clone();
        self.ask("loading the attestation key", SLOW, move |open| {
            open.load(&key).map(drop)
        })
    }

    /// Quotes these registers (bit n is register n) of the SHA-256 bank, with at most 64 bytes that the verifier gave.
    pub fn quote(&self, key: &KeyBlob, pcrs: u32, qualifying: &[u8]) -> Result<Quoted, TpmError> {
        check_pcrs(pcrs)?;
        if qualifying.len() > 64 {
            return Err(TpmError::Length("the qualifying data"));
        }
        let (key, qualifying) = (key.clone(), qualifying.to_vec());
        self.ask("quoting the registers", QUICK, move |open| {
            open.quote(&key, pcrs, &qualifying)
        })
    }

    /// Values of these registers of the SHA-256 bank.
    pub fn registers(&self, pcrs: u32) -> Result<BTreeMap<u8, [u8; 32]>, TpmError> {
        check_pcrs(pcrs)?;
        self.ask("reading the registers", QUICK, move |open| {
            open.registers(pcrs)
        })
    }

    /// Opens a secret that was made for this key and the endorsement key of this TPM (`TPM2_ActivateCredential`).
    /// May take long.
    pub fn activate(
        &self,
        key: &KeyBlob,
        kind: EndorsementKind,
        credential: &[u8],
        secret: &[u8],
    ) -> Result<Vec<u8>, TpmError> {
        let key = key.clone();
        let (credential, secret) = (credential.to_vec(), secret.to_vec());
        self.ask("opening the challenge", SLOW, move |open| {
            open.activate(&key, kind, &credential, &secret)
        })
    }

    /// Seals at most [`SECRET_MAX`] bytes to what these registers hold now.
    pub fn seal(&self, pcrs: u32, secret: &[u8]) -> Result<Sealed, TpmError> {
        check_pcrs(pcrs)?;
        if !(1..=SECRET_MAX).contains(&secret.len()) {
            return Err(TpmError::Length("the secret"));
        }
        let secret = secret.to_vec();
        self.ask("sealing a secret", SLOW, move |open| {
            open.seal(pcrs, &secret)
        })
    }

    /// Gives out a secret, if the registers hold what they did.
    pub fn unseal(&self, sealed: &Sealed) -> Result<Vec<u8>, TpmError> {
        let sealed = sealed.clone();
        self.ask("unsealing a secret", SLOW, move |open| open.unseal(&sealed))
    }
}

#[cfg(feature = "tpm")]
fn check_pcrs(pcrs: u32) -> Result<(), TpmError> {
    if pcrs == 0 || pcrs >> 24 != 0 {
        return Err(TpmError::Registers(pcrs));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_from_its_file_as_it_was_written() {
        let key = KeyBlob {
            private: vec![1; 200],
            public: vec![2; 90],
        };
        let bytes = key.to_bytes();
        assert_eq!(KeyBlob::from_bytes(&bytes).unwrap(), key);
        for cut in [0, 1, 100, bytes.len() - 1] {
            assert!(KeyBlob::from_bytes(&bytes[..cut]).is_err());
        }
        assert!(KeyBlob::from_bytes(&[&bytes[..], b"\0"].concat()).is_err());
        assert!(KeyBlob::from_bytes(&[0xff; 4000]).is_err());
    }

    #[test]
    fn a_name_of_no_tpm_is_refused_and_one_that_does_not_answer_is_said() {
        let error = Tpm::open("tabrmd:bus_name=x").unwrap_err();
        assert_eq!(error.code(), "tpm-missing");
        #[cfg(feature = "tpm")]
        {
            let error = Tpm::open("device:/dev/null/none").unwrap_err();
            assert_eq!(error.code(), "tpm-unreachable", "{error}");
        }
    }
}
