//! The host's key signs orders.

use std::sync::Arc;

use palanquin_trust::keys::{Algorithm, SigningFailed};
use palanquin_trust::{PublicKey, Sign};
use rustls::SignatureScheme;
use rustls::sign::SigningKey;

/// The key of the host's certificate.
#[derive(Debug)]
pub struct HostSigner {
    key: Arc<dyn SigningKey>,
    public: PublicKey,
}

impl HostSigner {
    /// With the key, and its public half from the certificate.
    pub fn new(key: Arc<dyn SigningKey>, public: PublicKey) -> Self {
        Self { key, public }
    }
}

impl Sign for HostSigner {
    fn public_key(&self) -> PublicKey {
        self.public.clone()
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SigningFailed> {
        let scheme = match self.public.algorithm() {
            Algorithm::Ed25519 => SignatureScheme::ED25519,
            Algorithm::EcdsaP256 => SignatureScheme::ECDSA_NISTP256_SHA256,
        };
        let signer = self.key.choose_scheme(&[scheme]).ok_or(SigningFailed)?;
        let signature = signer.sign(message).map_err(|_| SigningFailed)?;
        match self.public.algorithm() {
            Algorithm::Ed25519 => Ok(signature),
            Algorithm::EcdsaP256 => fixed(&signature).ok_or(SigningFailed),
        }
    }
}

/// The two numbers of an ECDSA signature in 32 bytes each, from their ASN.1 (RFC 3279, section 2.2.3).
fn fixed(der: &[u8]) -> Option<Vec<u8>> {
    let [0x30, len, numbers @ ..] = der else {
        return None;
    };
    if usize::from(*len) != numbers.len() {
        return None;
    }
    let mut rest = numbers;
    let mut both = Vec::with_capacity(64);
    for _ in 0..2 {
        let [0x02, len, after @ ..] = rest else {
            return None;
        };
        let (number, after) = after.split_at_checked(usize::from(*len))?;
        // A zero before it says that it is not negative.
        let number = number.strip_prefix(&[0]).unwrap_or(number);
        both.resize(both.len() + 32_usize.checked_sub(number.len())?, 0);
        both.extend(number);
        rest = after;
    }
    rest.is_empty().then_some(both)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_signature_are_padded_and_nothing_else_is_taken_for_one() {
        let mut expected = vec![0; 64];
        (expected[31], expected[62], expected[63]) = (5, 0x80, 1);
        let good = [0x30, 8, 2, 1, 5, 2, 3, 0, 0x80, 1];
        assert_eq!(fixed(&good), Some(expected));
        let long = [&[0x30, 40, 2, 33][..], &[1; 33], &[2, 3, 1, 1, 1]].concat();
        for odd in [&[][..], &good[..9], &[good, good].concat(), &long] {
            assert_eq!(fixed(odd), None);
        }
    }
}
