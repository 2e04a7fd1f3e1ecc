//! Keys that sign documents, and whose they are.

use std::fmt;

use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_FIXED, ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey,
    VerificationAlgorithm,
};
use coset::iana;

use crate::digest::Sha256;
use crate::identity::Identity;

/// Most keys of a ring.
pub const KEYS_MAX: usize = 4096;

/// How a key signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Ed25519 (RFC 8032); in COSE `Ed25519`, -19 (RFC 9864).
    Ed25519,
    /// ECDSA on P-256 with SHA-256; in COSE `ES256`, -7 (RFC 9053, section 2.1). Hosts' and operators' certificates have
    /// such keys.
    EcdsaP256,
}

impl Algorithm {
    /// Its number in COSE.
    pub(crate) fn cose(self) -> iana::Algorithm {
        match self {
            Self::Ed25519 => iana::Algorithm::Ed25519,
            Self::EcdsaP256 => iana::Algorithm::ES256,
        }
    }

    fn verifier(self) -> &'static dyn VerificationAlgorithm {
        match self {
            Self::Ed25519 => &ED25519,
            Self::EcdsaP256 => &ECDSA_P256_SHA256_FIXED,
        }
    }
}

/// Beginning of a DER `SubjectPublicKeyInfo` with an Ed25519 key (RFC 8410, section 4): 32 bytes follow.
const SPKI_ED25519: &[u8] = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";
/// The same with an uncompressed point on P-256 (RFC 5480, section 2): 65 bytes follow.
const SPKI_P256: &[u8] = b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00";

/// Half of what verifies a signature; the other half is in the algorithm.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicKey {
    algorithm: Algorithm,
    raw: Vec<u8>,
}

/// Bytes that are no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not one of the two kinds.
    #[error("not a public key of Ed25519 or of ECDSA on P-256, uncompressed")]
    Public,
    /// Not PKCS #8, or of another kind.
    #[error("not a private key of Ed25519 in PKCS #8")]
    Private,
    /// As many as fit.
    #[error("more than {KEYS_MAX} keys")]
    TooMany,
    /// The same key belongs to somebody else.
    #[error("one key, two owners: {0} and {1}")]
    Shared(Identity, Identity),
}

impl PublicKey {
    /// From the DER of a `SubjectPublicKeyInfo` (RFC 5280, section 4.1.2.7), as between the lines of a PEM file with the
    /// label `PUBLIC KEY`.
    ///
    /// # Errors
    ///
    /// Another kind of key, or another form of the same.
    pub fn from_spki_der(der: &[u8]) -> Result<Self, KeyError> {
        let (algorithm, raw) = if let Some(raw) = der.strip_prefix(SPKI_ED25519) {
            (Algorithm::Ed25519, raw)
        } else if let Some(raw) = der.strip_prefix(SPKI_P256) {
            (Algorithm::EcdsaP256, raw)
        } else {
            return Err(KeyError::Public);
        };
        Self::from_raw(algorithm, raw)
    }

    /// From 32 bytes of Ed25519, or an uncompressed point of 65 bytes on P-256.
    ///
    /// # Errors
    ///
    /// Another length or form, or no point of the curve.
    pub fn from_raw(algorithm: Algorithm, raw: &[u8]) -> Result<Self, KeyError> {
        let fits = match algorithm {
            Algorithm::Ed25519 => raw.len() == 32,
            Algorithm::EcdsaP256 => {
                raw.len() == 65
                    && raw[0] == 4
                    && signature::ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, raw).is_ok()
            }
        };
        if fits {
            let raw = raw.to_vec();
            Ok(Self { algorithm, raw })
        } else {
            Err(KeyError::Public)
        }
    }

    /// DER of its `SubjectPublicKeyInfo` (RFC 5280, section 4.1.2.7).
    pub fn to_spki_der(&self) -> Vec<u8> {
        let head = match self.algorithm {
            Algorithm::Ed25519 => SPKI_ED25519,
            Algorithm::EcdsaP256 => SPKI_P256,
        };
        [head, &self.raw].concat()
    }

    /// How it signs.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Its name in envelopes: the thumbprint of the COSE key (RFC 9679, section 3).
    pub fn id(&self) -> Sha256 {
        // Deterministic: labels 1 (kty), -1 (crv), -2 (x), -3 (y) in this order, all in one byte.
        let bytes = match self.algorithm {
            Algorithm::Ed25519 => [&b"\xa3\x01\x01\x20\x06\x21\x58\x20"[..], &self.raw].concat(),
            Algorithm::EcdsaP256 => {
                let (x, y) = self.raw[1..].split_at(32);
                let (head, between) = (&b"\xa4\x01\x02\x20\x01\x21\x58\x20"[..], b"\x22\x58\x20");
                [head, x, between, y].concat()
            }
        };
        Sha256::of(&bytes)
    }

    /// Whether this is a signature of the message by this key. ECDSA signatures are `r` and `s`, 32 bytes each.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(self.algorithm.verifier(), &self.raw)
            .verify(message, signature)
            .is_ok()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.algorithm, self.id())
    }
}

/// Signing failed: the key is not there (a TPM, a smart card) or the library refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the key did not sign")]
pub struct SigningFailed;

/// Something that signs: a key in memory here, or one that never leaves its device.
pub trait Sign {
    /// The key that verifies what this signs.
    fn public_key(&self) -> PublicKey;

    /// Signs a message; an ECDSA signature is `r` and `s`, 32 bytes each.
    ///
    /// # Errors
    ///
    /// The key is not there.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SigningFailed>;
}

/// A private key of Ed25519 in memory, erased from it when dropped. Its signatures draw no randomness.
pub struct Ed25519Signer(Ed25519KeyPair);

impl Ed25519Signer {
    /// From PKCS #8 (RFC 8410, section 7), version 1 or 2.
    ///
    /// # Errors
    ///
    /// Not such a key.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        let pair = if der.len() <= 256 {
            Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).ok()
        } else {
            None
        };
        pair.map(Self).ok_or(KeyError::Private)
    }

    /// From the 32 random bytes that are its secret.
    ///
    /// # Errors
    ///
    /// The library refuses.
    pub fn from_seed(seed: &[u8; 32]) -> Result<Self, KeyError> {
        Ed25519KeyPair::from_seed_unchecked(seed)
            .map(Self)
            .map_err(|_| KeyError::Private)
    }
}

impl Sign for Ed25519Signer {
    fn public_key(&self) -> PublicKey {
        PublicKey {
            algorithm: Algorithm::Ed25519,
            raw: self.0.public_key().as_ref().to_vec(),
        }
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SigningFailed> {
        let signature = self.0.try_sign(message).map_err(|_| SigningFailed)?;
        Ok(signature.as_ref().to_vec())
    }
}

impl fmt::Debug for Ed25519Signer {
    /// The secret must not end in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ed25519Signer")
            .field(&self.public_key())
            .finish()
    }
}

/// Whose keys are believed. Somebody may have several, so that they can be replaced.
#[derive(Clone, Debug, Default)]
pub struct Keyring(Vec<(Sha256, Identity, PublicKey)>);

impl Keyring {
    /// Believes that this key is that identity's.
    ///
    /// # Errors
    ///
    /// Somebody else has this key, or there are [`KEYS_MAX`] already.
    pub fn insert(&mut self, identity: Identity, key: PublicKey) -> Result<(), KeyError> {
        let id = key.id();
        match self.0.iter().find(|(known, ..)| *known == id) {
            Some((_, other, _)) if *other == identity => return Ok(()),
            Some((_, other, _)) => return Err(KeyError::Shared(other.clone(), identity)),
            None => {}
        }
        if self.0.len() >= KEYS_MAX {
            return Err(KeyError::TooMany);
        }
        self.0.push((id, identity, key));
        Ok(())
    }

    /// Whose key this is, and the key.
    pub fn get(&self, id: &Sha256) -> Option<(&Identity, &PublicKey)> {
        let (_, identity, key) = self.0.iter().find(|(known, ..)| known == id)?;
        Some((identity, key))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};

    use super::*;

    /// A key of Ed25519 that is the same always.
    pub(crate) fn signer(seed: u8) -> Ed25519Signer {
        Ed25519Signer::from_seed(&[seed; 32]).unwrap()
    }

    /// A key like those of hosts' certificates.
    pub(crate) struct P256(EcdsaKeyPair);

    impl P256 {
        pub(crate) fn new() -> Self {
            Self(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
        }
    }

    impl Sign for P256 {
        fn public_key(&self) -> PublicKey {
            PublicKey::from_raw(Algorithm::EcdsaP256, self.0.public_key().as_ref()).unwrap()
        }

        fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SigningFailed> {
            let signature = self.0.sign(&SystemRandom::new(), message);
            Ok(signature.map_err(|_| SigningFailed)?.as_ref().to_vec())
        }
    }

    #[test]
    fn a_key_verifies_its_own_signatures_only() {
        let keys: [&dyn Sign; 4] = [&signer(1), &signer(2), &P256::new(), &P256::new()];
        for (at, key) in keys.iter().enumerate() {
            let signature = key.sign(b"message").unwrap();
            for (other, verifier) in keys.iter().enumerate() {
                let holds = verifier.public_key().verifies(b"message", &signature);
                assert_eq!(holds, at == other);
            }
            assert!(!key.public_key().verifies(b"massage", &signature));
            assert!(!key.public_key().verifies(b"message", &signature[1..]));
            assert!(!key.public_key().verifies(b"message", &[]));
        }
    }

    #[test]
    fn a_thumbprint_is_that_of_rfc_9679() {
        // Section 6: the example's key and thumbprint.
        let raw = hex(
            "0465eda5a12577c2bae829437fe338701a10aaa375e1bb5b5de108de439c08551d\
             1e52ed75701163f7f9e40ddf9f341b3dc9ba860af7e0ca7ca7e9eecd0084d19c",
        );
        let key = PublicKey::from_raw(Algorithm::EcdsaP256, &raw).unwrap();
        assert_eq!(
            key.id().to_string(),
            "sha256:496bd8afadf307e5b08c64b0421bf9dc01528a344a43bda88fadd1669da253ec"
        );
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits = text.as_bytes().chunks_exact(2);
        digits
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    #[test]
    fn only_the_two_kinds_of_public_keys_are_read() {
        let raw = signer(1).public_key().raw;
        let der = [SPKI_ED25519, &raw].concat();
        assert_eq!(PublicKey::from_spki_der(&der), Ok(signer(1).public_key()));
        assert_eq!(signer(1).public_key().to_spki_der(), der);
        let point = P256::new().public_key();
        let p256 = [SPKI_P256, &point.raw].concat();
        assert_eq!(PublicKey::from_spki_der(&p256), Ok(point));
        let mut off_the_curve = p256.clone();
        off_the_curve[90] ^= 1;
        for odd in [
            &b""[..],
            &der[1..],
            &der[..43],
            &[&der[..], b"\0"].concat(),
            &off_the_curve,
        ] {
            assert_eq!(PublicKey::from_spki_der(odd), Err(KeyError::Public));
        }
    }

    #[test]
    fn a_key_belongs_to_one_identity_which_may_have_several() {
        let [acme, other] = ["acme", "other"].map(|name| {
            let uri = format!("spiffe://example.org/owner/{name}");
            uri.parse::<Identity>().unwrap()
        });
        let mut ring = Keyring::default();
        for seed in [1, 2, 1] {
            ring.insert(acme.clone(), signer(seed).public_key())
                .unwrap();
        }
        assert_eq!(
            ring.insert(other.clone(), signer(1).public_key()),
            Err(KeyError::Shared(acme.clone(), other))
        );
        let (owner, key) = ring.get(&signer(2).public_key().id()).unwrap();
        assert_eq!((owner, key), (&acme, &signer(2).public_key()));
        assert!(ring.get(&signer(3).public_key().id()).is_none());
    }

    #[test]
    fn a_private_key_is_read_and_never_shown() {
        let pkcs8 = Ed25519KeyPair::generate().unwrap().to_pkcs8().unwrap();
        let key = Ed25519Signer::from_pkcs8(pkcs8.as_ref()).unwrap();
        assert!(format!("{key:?}").starts_with("Ed25519Signer(Ed25519 sha256:"));
        assert!(Ed25519Signer::from_pkcs8(&pkcs8.as_ref()[1..]).is_err());
        assert!(Ed25519Signer::from_pkcs8(&[0x30; 300]).is_err());
    }
}
