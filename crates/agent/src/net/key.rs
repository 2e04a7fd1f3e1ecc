//! The host's key stays in the agent; the network process asks it for a signature in each handshake.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::sign::{Signer, SigningKey};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};

use super::port::Port;
use super::protocol::{FromNetwork, Sign, Wire};

/// Longest wait for a signature.
const DEADLINE: Duration = Duration::from_secs(5);
/// Signatures that may be asked for at once, and in each second: as many as a processor manages handshakes, because every
/// stranger who begins one costs a signature, and must not use up those of hosts that mean well.
const RATE: f64 = 4000.0;
/// Schemes of TLS 1.3 that the library knows, best first.
const SCHEMES: [SignatureScheme; 7] = [
    SignatureScheme::ED25519,
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ECDSA_NISTP521_SHA512,
    SignatureScheme::RSA_PSS_SHA512,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PSS_SHA256,
];

/// Schemes that a key can be used with.
pub fn schemes_of(key: &dyn SigningKey) -> Vec<u16> {
    let usable = SCHEMES
        .into_iter()
        .filter(|scheme| key.choose_scheme(&[*scheme]).is_some());
    usable.map(u16::from).collect()
}

/// Whether this is what a side of a TLS 1.3 handshake signs, and nothing else (RFC 8446, section 4.4.3).
fn is_certificate_verify(message: &[u8]) -> bool {
    let signed = message.strip_prefix(&[0x20; 64]);
    let hash = signed.and_then(|rest| {
        [
            &b"TLS 1.3, client CertificateVerify\0"[..],
            b"TLS 1.3, server CertificateVerify\0",
        ]
        .into_iter()
        .find_map(|context| rest.strip_prefix(context))
    });
    hash.is_some_and(|hash| matches!(hash.len(), 32 | 48))
}

/// Signs for the network process, and only what belongs into a handshake.
#[derive(Debug)]
pub struct Notary {
    key: Arc<dyn SigningKey>,
    rate: f64,
    left: f64,
    refilled: Instant,
}

impl Notary {
    /// With the host's key.
    pub fn new(key: Arc<dyn SigningKey>) -> Self {
        Self {
            key,
            rate: RATE,
            left: RATE,
            refilled: Instant::now(),
        }
    }

    /// A signature; none for what is no handshake, for another scheme, or if too many were asked for.
    pub fn sign(&mut self, scheme: u16, message: &[u8]) -> Option<Vec<u8>> {
        let now = Instant::now();
        let refill = now.duration_since(self.refilled).as_secs_f64() * self.rate;
        self.left = (self.left + refill).min(self.rate);
        self.refilled = now;
        if !is_certificate_verify(message) || self.left < 1.0 {
            return None;
        }
        self.left -= 1.0;
        let signer = self.key.choose_scheme(&[SignatureScheme::from(scheme)])?;
        signer.sign(message).ok()
    }
}

/// Signatures that were asked for.
#[derive(Debug)]
pub(super) struct Signatures {
    link: Arc<Port>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, Sender<Option<Vec<u8>>>>>,
}

impl Signatures {
    pub(super) fn new(link: Arc<Port>) -> Self {
        Self {
            link,
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }

    /// An answer.
    pub(super) fn answered(&self, id: u64, signature: Option<Vec<u8>>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = waiting.remove(&id) {
            let _ = sender.send(signature);
        }
    }

    fn ask(&self, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, Error> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = channel();
        let lock = || self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        lock().insert(id, sender);
        let question = FromNetwork::Sign(Sign {
            id,
            scheme: scheme.into(),
            message: message.to_vec().into(),
        });
        let sent = self.link.send(&question.encoded(), &[]);
        let answer = sent.ok().and_then(|()| answer.recv_timeout(DEADLINE).ok());
        lock().remove(&id);
        answer
            .flatten()
            .ok_or_else(|| Error::General("the agent gave no signature".to_owned()))
    }
}

/// The host's key, which lies elsewhere.
#[derive(Debug)]
pub(super) struct RemoteKey {
    schemes: Vec<SignatureScheme>,
    signatures: Arc<Signatures>,
}

impl RemoteKey {
    pub(super) fn new(schemes: &[u16], signatures: &Arc<Signatures>) -> Self {
        Self {
            schemes: schemes.iter().copied().map(Into::into).collect(),
            signatures: Arc::clone(signatures),
        }
    }
}

impl SigningKey for RemoteKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = self.schemes.iter().find(|ours| offered.contains(ours))?;
        Some(Box::new(RemoteSigner {
            scheme: *scheme,
            signatures: Arc::clone(&self.signatures),
        }))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        match self.schemes.first() {
            Some(SignatureScheme::ED25519) => SignatureAlgorithm::ED25519,
            Some(
                SignatureScheme::RSA_PSS_SHA256
                | SignatureScheme::RSA_PSS_SHA384
                | SignatureScheme::RSA_PSS_SHA512,
            ) => SignatureAlgorithm::RSA,
            _ => SignatureAlgorithm::ECDSA,
        }
    }
}

#[derive(Debug)]
struct RemoteSigner {
    scheme: SignatureScheme,
    signatures: Arc<Signatures>,
}

impl Signer for RemoteSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        self.signatures.ask(self.scheme, message)
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::PrivateKeyDer;

    use super::*;

    fn notary() -> Notary {
        let key = rcgen::KeyPair::generate().unwrap();
        let der = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Notary::new(rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).unwrap())
    }

    fn handshake(context: &[u8], hash: usize) -> Vec<u8> {
        [&[0x20; 64][..], context, &vec![7; hash]].concat()
    }

    #[test]
    fn only_handshakes_are_signed() {
        let mut notary = notary();
        let scheme = schemes_of(notary.key.as_ref())[0];
        let server = b"TLS 1.3, server CertificateVerify\0";
        assert!(notary.sign(scheme, &handshake(server, 32)).is_some());
        let client = b"TLS 1.3, client CertificateVerify\0";
        assert!(notary.sign(scheme, &handshake(client, 48)).is_some());
        for other in [
            handshake(server, 33),
            handshake(b"palanquin order v1\0", 32),
            vec![0x20; 200],
            Vec::new(),
        ] {
            assert_eq!(notary.sign(scheme, &other), None);
        }
        let rsa = SignatureScheme::RSA_PSS_SHA256.into();
        assert_eq!(notary.sign(rsa, &handshake(server, 32)), None);
    }

    #[test]
    fn signatures_are_given_at_a_bounded_rate() {
        let mut notary = notary();
        let scheme = schemes_of(notary.key.as_ref())[0];
        let message = handshake(b"TLS 1.3, server CertificateVerify\0", 32);
        (notary.rate, notary.left) = (100.0, 100.0);
        let began = Instant::now();
        let given = (0..2000)
            .filter(|_| notary.sign(scheme, &message).is_some())
            .count();
        let most = 100.0 * (1.0 + began.elapsed().as_secs_f64()) + 1.0;
        assert!(given as f64 <= most && given < 2000, "{given}");
        assert!(given >= 100);
    }
}
