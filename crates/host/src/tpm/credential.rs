//! `TPM2_MakeCredential` without a TPM: who enrols hosts needs none.
//!
//! TPM 2.0 Library, part 1: Architecture, sections 11.4.10 (KDFa, KDFe), 24 (credentials), B.10.4 (RSA) and C.6.4 (ECC).

use aws_lc_rs::agreement::{ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, agree_ephemeral};
use aws_lc_rs::cipher::{AES_128, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::digest::{self, SHA256};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::hmac;
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rand::{self, SystemRandom};
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};

/// Longest secret in bytes: the digest of the endorsement key's name algorithm, SHA-256.
pub const SECRET_MAX: usize = 32;

/// Beginning of a DER `SubjectPublicKeyInfo` with an uncompressed point on P-256 (RFC 5480, section 2).
const SPKI_P256: &[u8] = b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00";

/// Why there is no credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredentialError {
    /// More than [`SECRET_MAX`] bytes.
    #[error("the secret has {0} bytes, at most {SECRET_MAX} are allowed")]
    Secret(usize),
    /// Neither RSA nor P-256, or no point of the curve.
    #[error("the endorsement key is not one of RSA or of ECC on P-256")]
    Key,
    /// The library refuses.
    #[error("the cryptographic library has failed")]
    Library,
}

impl From<Unspecified> for CredentialError {
    fn from(_: Unspecified) -> Self {
        Self::Library
    }
}

/// A secret that only one TPM can open, and only if it has the key of that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential {
    /// `TPMS_ID_OBJECT`.
    pub credential: Vec<u8>,
    /// `TPMU_ENCRYPTED_SECRET`.
    pub secret: Vec<u8>,
}

/// Encrypts a secret for the TPM with this endorsement key (DER of a `SubjectPublicKeyInfo`, RSA or P-256, whose template is
/// a default one: SHA-256, AES-128 in CFB), to be opened if it also has the key of this name.
///
/// # Errors
///
/// Another kind of key, or too long a secret.
pub fn make(
    endorsement_spki: &[u8],
    name: &[u8],
    secret: &[u8],
) -> Result<Credential, CredentialError> {
    if secret.len() > SECRET_MAX {
        return Err(CredentialError::Secret(secret.len()));
    }
    let (seed, encrypted) = match endorsement_spki.strip_prefix(SPKI_P256) {
        Some(point) => seed_for_point(point)?,
        None => seed_for_rsa(endorsement_spki)?,
    };
    let cipher_key = kdfa(&seed, b"STORAGE\0", name, 16);
    let integrity_key = kdfa(&seed, b"INTEGRITY\0", &[], 32);
    let mut identity = sized(secret);
    let key = EncryptingKey::cfb128(UnboundCipherKey::new(&AES_128, &cipher_key)?)?;
    let zero = EncryptionContext::Iv128(FixedLength::from([0; 16]));
    key.less_safe_encrypt(&mut identity, zero)?;
    let key = hmac::Key::new(hmac::HMAC_SHA256, &integrity_key);
    let mut context = hmac::Context::with_key(&key);
    context.update(&identity);
    context.update(name);
    let integrity = sized(context.sign().as_ref());
    Ok(Credential {
        credential: [integrity, identity].concat(),
        secret: encrypted,
    })
}

/// A `TPM2B`.
fn sized(bytes: &[u8]) -> Vec<u8> {
    // Lengths here are bounded by those of keys and digests.
    let len = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    [&len.to_be_bytes()[..], bytes].concat()
}

/// KDFa with SHA-256 for at most 32 bytes: one step of it. The label ends in a zero.
fn kdfa(key: &[u8], label: &[u8], party: &[u8], bytes: u8) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let mut context = hmac::Context::with_key(&key);
    let bits = u32::from(bytes) * 8;
    for part in [&1_u32.to_be_bytes()[..], label, party, &bits.to_be_bytes()] {
        context.update(part);
    }
    context.sign().as_ref()[..usize::from(bytes)].to_vec()
}

/// A random seed, encrypted by OAEP.
fn seed_for_rsa(spki: &[u8]) -> Result<(Vec<u8>, Vec<u8>), CredentialError> {
    let key = PublicEncryptingKey::from_der(spki).map_err(|_| CredentialError::Key)?;
    let key = OaepPublicEncryptingKey::new(key)?;
    let mut seed = vec![0; 32];
    rand::fill(&mut seed)?;
    let mut encrypted = vec![0; key.ciphertext_size()];
    let label = Some(&b"IDENTITY\0"[..]);
    key.encrypt(&OAEP_SHA256_MGF1SHA256, &seed, &mut encrypted, label)?;
    Ok((seed, encrypted))
}

/// A seed agreed upon with a key that is used once, and that key's point.
fn seed_for_point(point: &[u8]) -> Result<(Vec<u8>, Vec<u8>), CredentialError> {
    let ours = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new())?;
    let our_point = ours.compute_public_key()?;
    let (our_x, our_y) = coordinates(our_point.as_ref())?;
    let (their_x, _) = coordinates(point)?;
    let theirs = UnparsedPublicKey::new(&ECDH_P256, point);
    let seed = agree_ephemeral(ours, theirs, CredentialError::Key, |shared| {
        // KDFe: one step gives 32 bytes.
        let mut context = digest::Context::new(&SHA256);
        for part in [
            &1_u32.to_be_bytes()[..],
            shared,
            b"IDENTITY\0",
            our_x,
            their_x,
        ] {
            context.update(part);
        }
        Ok(context.finish().as_ref().to_vec())
    })?;
    Ok((seed, [sized(our_x), sized(our_y)].concat()))
}

/// Of an uncompressed point.
fn coordinates(point: &[u8]) -> Result<(&[u8], &[u8]), CredentialError> {
    match point.split_first() {
        Some((4, both)) if both.len() == 64 => Ok(both.split_at(32)),
        _ => Err(CredentialError::Key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_endorsement_key_gets_no_credential() {
        let name = [0; 34];
        for odd in [
            &b""[..],
            b"\x30\x00",
            &[SPKI_P256, &[4; 65]].concat(),
            &[SPKI_P256, &[4; 3]].concat(),
        ] {
            assert_eq!(make(odd, &name, &[1; 32]), Err(CredentialError::Key));
        }
        assert_eq!(make(b"", &name, &[1; 33]), Err(CredentialError::Secret(33)));
    }
}
