//! Names in certificates: `spiffe://<trust-domain>/host/<name>` and `/operator/<name>`.
//!
//! One URI per certificate: X.509-SVID, section 2.

use palanquin_trust::identity::IdentityError as FormError;
use palanquin_trust::keys::KeyError;
use palanquin_trust::{Identity, PublicKey};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Why a certificate gives no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not a certificate.
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    /// None or several.
    #[error("the certificate has {0} URI names, expected exactly one")]
    UriCount(usize),
    /// Another form.
    #[error(transparent)]
    Form(#[from] FormError),
}

/// Reads the name from a certificate that has been verified already.
///
/// # Errors
///
/// One of [`IdentityError`]'s rules is broken.
pub fn of_certificate(der: &[u8]) -> Result<Identity, IdentityError> {
    let (_, certificate) = X509Certificate::from_der(der)
        .map_err(|error| IdentityError::Certificate(error.to_string()))?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| IdentityError::Certificate(error.to_string()))?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [uri] => Ok(uri.parse()?),
        _ => Err(IdentityError::UriCount(uris.len())),
    }
}

/// The key in a certificate, where it is of a kind that signs documents.
///
/// # Errors
///
/// It is of another kind, or this is no certificate.
pub fn key_of_certificate(der: &[u8]) -> Result<PublicKey, KeyError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| KeyError::Public)?;
    PublicKey::from_spki_der(certificate.public_key().raw)
}

#[cfg(test)]
mod tests {
    use palanquin_trust::Sign as _;
    use rcgen::{CertificateParams, KeyPair, SanType};
    use rustls::pki_types::PrivateKeyDer;

    use super::*;
    use crate::gate::HostSigner;

    fn certificate(uris: &[&str], key: &KeyPair) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["a".to_owned()]).unwrap();
        let uris = uris.iter().map(|uri| (*uri).to_owned().try_into().unwrap());
        params.subject_alt_names.extend(uris.map(SanType::URI));
        params.self_signed(key).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificate_names_exactly_one_host_or_operator() {
        let key = KeyPair::generate().unwrap();
        let uri = "spiffe://example.org/host/a";
        let identity = of_certificate(&certificate(&[uri], &key)).unwrap();
        assert_eq!(identity.to_string(), uri);
        let odd = |uris: &[&str]| of_certificate(&certificate(uris, &key)).unwrap_err();
        assert_eq!(odd(&[]), IdentityError::UriCount(0));
        assert_eq!(odd(&[uri, uri]), IdentityError::UriCount(2));
        for uri in ["https://example.org/host/a", "spiffe://example.org/vm/a"] {
            assert!(matches!(odd(&[uri]), IdentityError::Form(_)), "{uri}");
        }
        assert!(of_certificate(b"").is_err());
    }

    #[test]
    fn the_key_in_a_hosts_certificate_verifies_what_the_host_signs() {
        let key = KeyPair::generate().unwrap();
        let public = key_of_certificate(&certificate(&["spiffe://example.org/host/a"], &key));
        let public = public.unwrap();
        let der = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let signing = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).unwrap();
        let signer = HostSigner::new(signing, public.clone());
        for round in 0..50_u8 {
            // Numbers of a signature with leading zeros, and without, are both among these.
            let signature = signer.sign(&[round]).unwrap();
            assert_eq!(signature.len(), 64);
            assert!(public.verifies(&[round], &signature));
            assert!(!public.verifies(&[round + 1], &signature));
        }
    }
}
