//! Documents with a signature: before it is checked, and after.

use std::fmt;
use std::marker::PhantomData;

use coset::{CoseSign1, CoseSign1Builder, HeaderBuilder, TaggedCborSerializable};
use minicbor::{Decode, Encode};

use crate::cbor::{self, CborError};
use crate::digest::Sha256;
use crate::identity::{Identity, Kind};
use crate::keys::{Algorithm, Keyring, PublicKey, Sign, SigningFailed};

/// Longest envelope in bytes.
pub const ENVELOPE_MAX: usize = 64 * 1024;
/// Clocks of hosts may differ by so much, in seconds: a document counts as begun so long before its time.
pub const CLOCK_SKEW_S: u64 = 60;

/// When a document holds, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Not before.
    pub not_before_unix_s: u64,
    /// Not after.
    pub expires_unix_s: u64,
}

/// When a document does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// Before its time, by more than [`CLOCK_SKEW_S`].
    #[error(
        "it holds only from {from} seconds after 1970 on, and now it is {now}; if it is new, clocks disagree"
    )]
    Early {
        /// Beginning.
        from: u64,
        /// Time of the judge.
        now: u64,
    },
    /// After its time.
    #[error("it expired {0} seconds ago")]
    Expired(u64),
}

impl Window {
    /// Whether a document of this window holds now.
    ///
    /// # Errors
    ///
    /// Too early or too late.
    pub fn check(&self, now_unix_s: u64) -> Result<(), WindowError> {
        if self.not_before_unix_s > now_unix_s.saturating_add(CLOCK_SKEW_S) {
            let from = self.not_before_unix_s;
            let now = now_unix_s;
            return Err(WindowError::Early { from, now });
        }
        match now_unix_s.checked_sub(self.expires_unix_s) {
            None | Some(0) => Ok(()),
            Some(ago) => Err(WindowError::Expired(ago)),
        }
    }
}

/// A rule that the contents of a document break, whoever signed it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// Path of the field, for example `allow.hosts`.
    pub field: &'static str,
    /// What is wrong with it.
    pub message: String,
}

impl FieldError {
    /// A rule of that field is broken.
    pub(crate) fn new(field: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { field, message }
    }
}

/// Something that is signed.
pub trait Document: Encode<()> + for<'b> Decode<'b, ()> {
    /// What it is, in the signed header: one kind of document can't be taken for another.
    const CONTENT_TYPE: &'static str;
    /// The word for it in errors.
    const WORD: &'static str;
    /// Who signs such documents.
    const SIGNER: Kind;

    /// Who must have signed this one.
    fn signer(&self) -> &Identity;

    /// When it holds.
    fn window(&self) -> Window;

    /// Whether all fields are within their bounds.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    fn check(&self) -> Result<(), FieldError>;
}

/// Bytes that are no envelope of such a document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// More than [`ENVELOPE_MAX`].
    #[error("{0} bytes, at most {ENVELOPE_MAX} are allowed")]
    TooLong(usize),
    /// No `COSE_Sign1`.
    #[error("not a signed document (COSE_Sign1): {0}")]
    Malformed(String),
    /// Another algorithm, or none.
    #[error("the signature's algorithm is neither Ed25519 nor ES256")]
    Algorithm,
    /// A key that can't be one of ours.
    #[error("the header names no key by its SHA-256 thumbprint")]
    KeyId,
    /// Another content type, further headers, another encoding of the same, or something behind it.
    #[error("it is another kind of document than a {0}, or not in the one form it may have")]
    Form(&'static str),
}

/// Why a document is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Nobody of this key is known.
    #[error("it was signed by key {0}, which is not known here")]
    UnknownKey(Sha256),
    /// The header says another algorithm than the key has.
    #[error("the header names another algorithm than the key has")]
    Algorithm,
    /// Altered, or signed by another key than it says.
    #[error("the signature does not hold: it was altered, or signed by another key than it says")]
    Signature,
    /// Signed well, but no such document.
    #[error("the contents are no {word}: {message}")]
    Contents {
        /// What it should be.
        word: &'static str,
        /// Why it is none.
        message: String,
    },
    /// A field out of bounds.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// Signed by somebody else than it says, or by somebody who may not sign such documents.
    #[error("it speaks for {says}, but the key belongs to {signed}")]
    Signer {
        /// In the document.
        says: Identity,
        /// Of the key.
        signed: Identity,
    },
    /// Signed by whom it says, who may not.
    #[error("{0} is no {kind} and may not sign this", kind = .1.word())]
    Kind(Identity, Kind),
    /// Too early or too late.
    #[error(transparent)]
    Window(#[from] WindowError),
}

impl VerifyError {
    /// Stable code for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownKey(_) => "key-unknown",
            Self::Algorithm => "key-algorithm",
            Self::Signature => "signature-invalid",
            Self::Contents { .. } => "contents-malformed",
            Self::Field(_) => "contents-out-of-bounds",
            Self::Signer { .. } | Self::Kind(..) => "signer-wrong",
            Self::Window(WindowError::Early { .. }) => "not-yet-valid",
            Self::Window(WindowError::Expired(_)) => "expired",
        }
    }
}

/// A document as it arrived: its envelope is well-formed, its signature was not checked and its contents can't be used.
pub struct Signed<T> {
    bytes: Vec<u8>,
    key: Sha256,
    kind: PhantomData<fn() -> T>,
}

/// A document that was signed by whom it says. Only [`Signed::verify`] makes one.
#[derive(Clone)]
pub struct Verified<T> {
    document: T,
    sha256: Sha256,
    signed: Vec<u8>,
}

/// The contents of a document whose signature was not checked: to be shown to a person, and nothing else.
pub struct Unverified<T>(T);

impl<T: Document> Signed<T> {
    /// Takes bytes as an envelope.
    ///
    /// # Errors
    ///
    /// They are none, or too many.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let envelope = open(bytes)?;
        let algorithm = algorithm_of(&envelope)?;
        let kid = &envelope.protected.header.key_id;
        let key = <[u8; 32]>::try_from(&kid[..]).map_err(|_| EnvelopeError::KeyId)?;
        let payload = envelope.payload.unwrap_or_default();
        // One form only, so that a digest of the bytes names the contents and nothing is hidden in headers.
        let form = EnvelopeError::Form(T::WORD);
        match seal::<T>(algorithm, &Sha256(key), payload, envelope.signature) {
            Some(same) if same == bytes => Ok(Self {
                bytes: same,
                key: Sha256(key),
                kind: PhantomData,
            }),
            _ => Err(form),
        }
    }

    /// Signs a document.
    ///
    /// # Errors
    ///
    /// A field is out of bounds, or the key does not sign.
    pub fn sign(document: &T, signer: &dyn Sign) -> Result<Self, SignError> {
        document.check()?;
        let key = signer.public_key();
        let unsigned = body::<T>(key.algorithm(), &key.id(), cbor::to_vec(document));
        let envelope = unsigned
            .try_create_signature(&[], |message| signer.sign(message))?
            .build();
        let bytes = envelope
            .to_tagged_vec()
            .map_err(|error| SignError::Encoding(error.to_string()))?;
        Ok(Self::from_bytes(&bytes)?)
    }

    /// The envelope, as it is stored and sent.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The key that the envelope says it was signed with.
    pub fn key_id(&self) -> Sha256 {
        self.key
    }

    /// Digest of the envelope.
    pub fn sha256(&self) -> Sha256 {
        Sha256::of(&self.bytes)
    }

    /// Checks signature, signer, bounds and time.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn verify(&self, keys: &Keyring, now_unix_s: u64) -> Result<Verified<T>, VerifyError> {
        let verified = self.verify_lapsed(keys)?;
        verified.window().check(now_unix_s)?;
        Ok(verified)
    }

    /// The same for a document whose time may be over: it still says whose a VM is. Whoever judges it checks the time where
    /// that matters, as [`crate::Policies::decide`] does.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn verify_lapsed(&self, keys: &Keyring) -> Result<Verified<T>, VerifyError> {
        let (identity, key) = keys
            .get(&self.key)
            .ok_or(VerifyError::UnknownKey(self.key))?;
        let document: T = self.contents(key)?;
        document.check()?;
        let says = document.signer();
        if says != identity {
            return Err(VerifyError::Signer {
                says: says.clone(),
                signed: identity.clone(),
            });
        }
        if identity.kind() != T::SIGNER {
            return Err(VerifyError::Kind(identity.clone(), T::SIGNER));
        }
        Ok(Verified {
            document,
            sha256: self.sha256(),
            signed: self.bytes.clone(),
        })
    }

    fn contents(&self, key: &PublicKey) -> Result<T, VerifyError> {
        let envelope = open(&self.bytes).map_err(|error| contents::<T>(&error))?;
        if algorithm_of(&envelope) != Ok(key.algorithm()) {
            return Err(VerifyError::Algorithm);
        }
        envelope.verify_signature(&[], |signature, message| {
            if key.verifies(message, signature) {
                Ok(())
            } else {
                Err(VerifyError::Signature)
            }
        })?;
        let payload = envelope.payload.unwrap_or_default();
        cbor::from_slice(&payload).map_err(|error: CborError| contents::<T>(&error))
    }

    /// The contents, to be shown to a person.
    ///
    /// # Errors
    ///
    /// They are no such document, or a field is out of bounds.
    pub fn peek(&self) -> Result<Unverified<T>, VerifyError> {
        let envelope = open(&self.bytes).map_err(|error| contents::<T>(&error))?;
        let payload = envelope.payload.unwrap_or_default();
        let document: T = cbor::from_slice(&payload).map_err(|error| contents::<T>(&error))?;
        document.check()?;
        Ok(Unverified(document))
    }
}

fn contents<T: Document>(error: &dyn fmt::Display) -> VerifyError {
    VerifyError::Contents {
        word: T::WORD,
        message: error.to_string(),
    }
}

fn open(bytes: &[u8]) -> Result<CoseSign1, EnvelopeError> {
    if bytes.len() > ENVELOPE_MAX {
        return Err(EnvelopeError::TooLong(bytes.len()));
    }
    CoseSign1::from_tagged_slice(bytes).map_err(|error| EnvelopeError::Malformed(error.to_string()))
}

fn algorithm_of(envelope: &CoseSign1) -> Result<Algorithm, EnvelopeError> {
    let named = envelope.protected.header.alg.as_ref();
    [Algorithm::Ed25519, Algorithm::EcdsaP256]
        .into_iter()
        .find(|known| named == Some(&coset::Algorithm::Assigned(known.cose())))
        .ok_or(EnvelopeError::Algorithm)
}

/// An envelope with everything but the signature.
fn body<T: Document>(algorithm: Algorithm, key: &Sha256, payload: Vec<u8>) -> CoseSign1Builder {
    let protected = HeaderBuilder::new()
        .algorithm(algorithm.cose())
        .content_type(T::CONTENT_TYPE.to_owned())
        .key_id(key.0.to_vec())
        .build();
    CoseSign1Builder::new()
        .protected(protected)
        .payload(payload)
}

fn seal<T: Document>(
    algorithm: Algorithm,
    key: &Sha256,
    payload: Vec<u8>,
    signature: Vec<u8>,
) -> Option<Vec<u8>> {
    let envelope = body::<T>(algorithm, key, payload).signature(signature);
    envelope.build().to_tagged_vec().ok()
}

/// Why a document could not be signed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// A field is out of bounds.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The key did not sign.
    #[error(transparent)]
    Key(#[from] SigningFailed),
    /// The library could not write it.
    #[error("the envelope can't be written: {0}")]
    Encoding(String),
    /// Longer than may be read.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
}

impl<T> fmt::Debug for Signed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, key) = (self.bytes.len(), self.key);
        write!(f, "Signed({bytes} bytes, not verified, by {key})")
    }
}

impl<T> Clone for Signed<T> {
    fn clone(&self) -> Self {
        Self {
            bytes: self.bytes.clone(),
            key: self.key,
            kind: PhantomData,
        }
    }
}

impl<T> Verified<T> {
    /// Digest of the envelope.
    pub fn sha256(&self) -> Sha256 {
        self.sha256
    }

    /// The envelope: it travels with the VM, so that others can verify it too.
    pub fn as_signed_bytes(&self) -> &[u8] {
        &self.signed
    }
}

impl<T> std::ops::Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.document
    }
}

impl<T: fmt::Debug> fmt::Debug for Verified<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Verified").field(&self.document).finish()
    }
}

impl<T: fmt::Display> fmt::Display for Unverified<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: serde::Serialize> serde::Serialize for Unverified<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::keys::tests::{P256, signer};
    use crate::passport::Passport;
    use crate::passport::tests::passport;

    const NOW: u64 = 1_800_000_000;

    fn ring() -> Keyring {
        let mut ring = Keyring::default();
        let owner = passport().owner;
        ring.insert(owner, signer(1).public_key()).unwrap();
        let other = "spiffe://example.org/owner/other".parse().unwrap();
        ring.insert(other, signer(2).public_key()).unwrap();
        let operator = "spiffe://example.org/operator/alice".parse().unwrap();
        ring.insert(operator, signer(3).public_key()).unwrap();
        ring
    }

    fn signed() -> Signed<Passport> {
        Signed::sign(&passport(), &signer(1)).unwrap()
    }

    /// The envelope with a header or payload of the test's, signed well.
    fn envelope(edit: impl FnOnce(&mut CoseSign1)) -> Vec<u8> {
        let key = signer(1).public_key();
        let body = body::<Passport>(key.algorithm(), &key.id(), cbor::to_vec(&passport()));
        let mut envelope = body.build();
        edit(&mut envelope);
        let signature = signer(1).sign(&envelope.tbs_data(&[])).unwrap();
        envelope.signature = signature;
        envelope.to_tagged_vec().unwrap()
    }

    #[test]
    fn what_was_signed_is_verified_by_both_kinds_of_keys() {
        let verified = signed().verify(&ring(), NOW).unwrap();
        assert_eq!(*verified, passport());
        assert_eq!(verified.sha256(), signed().sha256());
        assert_eq!(verified.as_signed_bytes(), signed().as_bytes());
        let key = P256::new();
        let mut ring = ring();
        ring.insert(passport().owner, key.public_key()).unwrap();
        let signed = Signed::sign(&passport(), &key).unwrap();
        assert_eq!(*signed.verify(&ring, NOW).unwrap(), passport());
    }

    #[test]
    fn the_test_itself_signs_well() {
        let bytes = envelope(|_| {});
        assert_eq!(bytes, signed().as_bytes());
    }

    #[test]
    fn each_way_not_to_be_believed_has_its_name() {
        let code = |signed: &Signed<Passport>, now| signed.verify(&ring(), now).unwrap_err().code();
        let by = |document: &Passport, seed| Signed::sign(document, &signer(seed)).unwrap();
        assert_eq!(code(&by(&passport(), 9), NOW), "key-unknown");
        assert_eq!(code(&by(&passport(), 2), NOW), "signer-wrong");
        let posing = Passport {
            owner: "spiffe://example.org/operator/alice".parse().unwrap(),
            ..passport()
        };
        // An operator's own name, under an operator's own key, is still no owner's.
        let key = signer(3).public_key();
        let body = body::<Passport>(key.algorithm(), &key.id(), cbor::to_vec(&posing));
        let posing = body.create_signature(&[], |message| signer(3).sign(message).unwrap());
        let posing = posing.build().to_tagged_vec().unwrap();
        let posing = Signed::<Passport>::from_bytes(&posing).unwrap();
        assert!(["signer-wrong", "contents-out-of-bounds"].contains(&code(&posing, NOW)));
        let window = passport().window();
        let skewed = window.not_before_unix_s - CLOCK_SKEW_S;
        assert_eq!(code(&signed(), skewed - 1), "not-yet-valid");
        assert!(signed().verify(&ring(), skewed).is_ok());
        assert!(signed().verify(&ring(), window.expires_unix_s).is_ok());
        assert_eq!(code(&signed(), window.expires_unix_s + 1), "expired");
        assert!(signed().verify_lapsed(&ring()).is_ok());
        let other_algorithm = envelope(|envelope| {
            envelope.protected.header.alg =
                Some(coset::Algorithm::Assigned(coset::iana::Algorithm::ES256));
        });
        let other_algorithm = Signed::<Passport>::from_bytes(&other_algorithm).unwrap();
        assert_eq!(code(&other_algorithm, NOW), "key-algorithm");
        let nothing = envelope(|envelope| envelope.payload = Some(vec![0xa0]));
        let nothing = Signed::<Passport>::from_bytes(&nothing).unwrap();
        assert_eq!(code(&nothing, NOW), "contents-malformed");
    }

    #[test]
    fn a_field_that_is_not_known_here_is_refused_and_not_skipped() {
        // The map's head says one entry more, and there it is: 23 => true.
        let mut payload = cbor::to_vec(&passport());
        assert_eq!(payload[0] & 0xe0, 0xa0);
        payload[0] += 1;
        payload.extend([23, 0xf5]);
        let bytes = envelope(|envelope| envelope.payload = Some(payload));
        let error = Signed::<Passport>::from_bytes(&bytes)
            .unwrap()
            .verify(&ring(), NOW);
        assert!(
            matches!(&error, Err(VerifyError::Contents { message, .. }) if message.contains("not known here")),
            "{error:?}"
        );
    }

    #[test]
    fn other_headers_another_type_and_other_forms_are_no_envelope() {
        let form = |bytes: &[u8]| Signed::<Passport>::from_bytes(bytes).unwrap_err();
        let content_type = envelope(|envelope| {
            envelope.protected.header.content_type =
                Some(coset::ContentType::Text("application/x".to_owned()));
        });
        assert_eq!(form(&content_type), EnvelopeError::Form("passport"));
        let hidden = envelope(|envelope| envelope.unprotected.key_id = vec![1]);
        assert_eq!(form(&hidden), EnvelopeError::Form("passport"));
        let short = envelope(|envelope| envelope.protected.header.key_id = vec![1; 31]);
        assert_eq!(form(&short), EnvelopeError::KeyId);
        let none = envelope(|envelope| envelope.protected.header.alg = None);
        assert_eq!(form(&none), EnvelopeError::Algorithm);
        let trailing = [signed().as_bytes(), b"\0"].concat();
        assert!(matches!(form(&trailing), EnvelopeError::Malformed(_)));
        let untagged = signed().as_bytes()[1..].to_vec();
        assert!(matches!(form(&untagged), EnvelopeError::Malformed(_)));
        assert_eq!(
            form(&[0; ENVELOPE_MAX + 1]),
            EnvelopeError::TooLong(ENVELOPE_MAX + 1)
        );
        assert!(matches!(form(b""), EnvelopeError::Malformed(_)));
        // A length of four bytes where one would do.
        let mut long = signed().as_bytes().to_vec();
        assert_eq!(long[0], 0xd2);
        long.splice(0..1, [0xd8, 18]);
        assert!(Signed::<Passport>::from_bytes(&long).is_err());
        // One kind of document is not taken for another.
        assert_eq!(
            Signed::<crate::Order>::from_bytes(signed().as_bytes()).unwrap_err(),
            EnvelopeError::Form("order")
        );
    }

    #[test]
    fn what_was_not_verified_can_only_be_shown() {
        let shown = signed().peek().unwrap().to_string();
        assert!(shown.contains("spiffe://example.org/owner/acme"), "{shown}");
        assert!(!format!("{:?}", signed()).contains("acme"));
    }

    proptest! {
        #[test]
        fn any_altered_byte_is_noticed(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = signed().as_bytes().to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(altered) = Signed::<Passport>::from_bytes(&bytes) {
                prop_assert!(altered.verify(&ring(), NOW).is_err());
            }
        }

        #[test]
        fn any_cut_is_noticed(len in any::<prop::sample::Index>()) {
            let bytes = signed().as_bytes().to_vec();
            prop_assert!(Signed::<Passport>::from_bytes(&bytes[..len.index(bytes.len())]).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Signed::<Passport>::from_bytes(&bytes);
            let tagged = [&[0xd2, 0x84][..], &bytes].concat();
            let _ = Signed::<crate::Order>::from_bytes(&tagged);
        }
    }
}
