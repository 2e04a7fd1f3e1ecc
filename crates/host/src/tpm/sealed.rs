//! Files that can be read only while the TPM's registers hold what they did: encrypted with a key that the TPM keeps.

use std::collections::BTreeMap;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use serde::{Deserialize, Serialize};

use super::{BLOB_MAX, KeyBlob, Sealed, Tpm, TpmError};

/// Longest sealed file, and longest contents, in bytes.
pub const FILE_MAX: usize = 256 * 1024;
/// Longest contents in bytes.
pub const CONTENTS_MAX: usize = 64 * 1024;
/// How such a file begins.
const BEGINNING: &[u8] = b"{\"palanquin-sealed\":1,";
/// So that no other file that this key encrypted is taken for this one.
const LABEL: &[u8] = b"palanquin sealed file 1\0";

/// Why a file was not sealed or unsealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// Too long, or empty.
    #[error("{0} bytes cannot be sealed: 1 to {CONTENTS_MAX} can")]
    Contents(usize),
    /// Not such a file.
    #[error("it is not a sealed file: {0}")]
    Form(String),
    /// Altered since it was sealed.
    #[error("the sealed file was altered")]
    Altered,
    /// The library refuses.
    #[error("the cryptographic library has failed")]
    Library,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Form {
    palanquin_sealed: u8,
    tpm: String,
    registers: BTreeMap<u8, String>,
    private: String,
    public: String,
    nonce: String,
    contents: String,
}

/// A sealed file that has been read.
#[derive(Clone, Debug)]
pub struct SealedFile {
    tpm: String,
    key: Sealed,
    nonce: [u8; NONCE_LEN],
    contents: Vec<u8>,
}

/// What was in it.
pub struct Unsealed {
    /// The contents.
    pub contents: Vec<u8>,
    /// Digest of the policies that were in force.
    pub policies: Option<[u8; 32]>,
}

impl std::fmt::Debug for Unsealed {
    /// The secret must not end in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Unsealed({} bytes)", self.contents.len())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|c| c.is_ascii_hexdigit()) {
        return None;
    }
    let pairs = (0..text.len()).step_by(2).map(|at| text.get(at..at + 2));
    pairs
        .map(|pair| u8::from_str_radix(pair?, 16).ok())
        .collect()
}

/// Whether a file begins as a sealed one.
pub fn is_sealed(bytes: &[u8]) -> bool {
    bytes.starts_with(BEGINNING)
}

/// Seals contents, and a digest of policies with them, to what these registers hold now. The file says which TPM it was.
///
/// # Errors
///
/// The TPM fails, or the contents are too long.
pub fn seal(
    tpm: &Tpm,
    name: &str,
    pcrs: u32,
    contents: &[u8],
    policies: Option<[u8; 32]>,
) -> Result<String, SealError> {
    if !(1..=CONTENTS_MAX).contains(&contents.len()) {
        return Err(SealError::Contents(contents.len()));
    }
    let mut key = [0; 32];
    aws_lc_rs::rand::fill(&mut key).map_err(|_| SealError::Library)?;
    let sealed = tpm.seal(pcrs, &key)?;
    let mut text = match policies {
        Some(digest) => [&[1][..], &digest].concat(),
        None => vec![0],
    };
    text.extend(contents);
    let key = RandomizedNonceKey::new(&AES_256_GCM, &key).map_err(|_| SealError::Library)?;
    let nonce = key
        .seal_in_place_append_tag(Aad::from(LABEL), &mut text)
        .map_err(|_| SealError::Library)?;
    let registers = sealed.registers.iter();
    let form = Form {
        palanquin_sealed: 1,
        tpm: name.to_owned(),
        registers: registers
            .map(|(register, value)| (*register, hex(value)))
            .collect(),
        private: hex(&sealed.blob.private),
        public: hex(&sealed.blob.public),
        nonce: hex(nonce.as_ref()),
        contents: hex(&text),
    };
    serde_json::to_string(&form)
        .map(|text| text + "\n")
        .map_err(|error| SealError::Form(error.to_string()))
}

impl SealedFile {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// It is none.
    pub fn read(bytes: &[u8]) -> Result<Self, SealError> {
        let odd = |what: &str| SealError::Form(what.to_owned());
        if bytes.len() > FILE_MAX {
            return Err(odd("it is too long"));
        }
        let form: Form = serde_json::from_slice(bytes).map_err(|error| odd(&error.to_string()))?;
        if form.palanquin_sealed != 1 {
            return Err(odd("another version"));
        }
        let part = |text: &str, what: &str| unhex(text).ok_or_else(|| odd(what));
        let mut registers = BTreeMap::new();
        for (register, value) in &form.registers {
            let value = part(value, "`registers`")?;
            let value = value.try_into().map_err(|_| odd("`registers`"))?;
            registers.insert(*register, value);
        }
        let blob = KeyBlob {
            private: part(&form.private, "`private`")?,
            public: part(&form.public, "`public`")?,
        };
        if blob.private.len() > BLOB_MAX || blob.public.len() > BLOB_MAX {
            return Err(odd("`private` or `public` is too long"));
        }
        let nonce = part(&form.nonce, "`nonce`")?;
        Ok(Self {
            tpm: form.tpm,
            key: Sealed { blob, registers },
            nonce: nonce.try_into().map_err(|_| odd("`nonce`"))?,
            contents: part(&form.contents, "`contents`")?,
        })
    }

    /// Name of the TPM with which it was sealed.
    pub fn tpm(&self) -> &str {
        &self.tpm
    }

    /// Its contents, if the registers hold what they did.
    ///
    /// # Errors
    ///
    /// They do not, it is another TPM's, or it was altered.
    pub fn unseal(&self, tpm: &Tpm) -> Result<Unsealed, SealError> {
        let key = tpm.unseal(&self.key)?;
        let key = RandomizedNonceKey::new(&AES_256_GCM, &key).map_err(|_| SealError::Altered)?;
        let mut text = self.contents.clone();
        let nonce = Nonce::assume_unique_for_key(self.nonce);
        let text = key
            .open_in_place(nonce, Aad::from(LABEL), &mut text)
            .map_err(|_| SealError::Altered)?;
        let (policies, contents) = match text.split_first() {
            Some((0, contents)) => (None, contents),
            Some((1, rest)) => {
                let (digest, contents) = rest.split_first_chunk().ok_or(SealError::Altered)?;
                (Some(*digest), contents)
            }
            _ => return Err(SealError::Altered),
        };
        Ok(Unsealed {
            contents: contents.to_vec(),
            policies,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_sealed_file_is_refused_with_its_reason() {
        let good = "{\"palanquin-sealed\":1,\"tpm\":\"swtpm:x\",\"registers\":{\"7\":\"REG\"},\"private\":\"aa\",\
                    \"public\":\"bb\",\"nonce\":\"000000000000000000000000\",\"contents\":\"cc\"}";
        let good = good.replace("REG", &"0".repeat(64));
        assert!(is_sealed(good.as_bytes()) && !is_sealed(b"-----BEGIN PRIVATE KEY-----"));
        assert_eq!(SealedFile::read(good.as_bytes()).unwrap().tpm(), "swtpm:x");
        for (from, to) in [
            ("\"aa\"", "\"a\""),
            ("\"bb\"", "\"\u{e9}\""),
            ("\"cc\"", "\"cg\""),
            ("\"0000", "\"00"),
            ("sealed\":1", "sealed\":2"),
            ("\"tpm\"", "\"tcti\""),
        ] {
            let odd = SealedFile::read(good.replacen(from, to, 1).as_bytes());
            assert!(matches!(odd, Err(SealError::Form(_))), "{from}");
        }
        assert!(SealedFile::read(&vec![b' '; FILE_MAX + 1]).is_err());
    }
}
