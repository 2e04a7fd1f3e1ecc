//! How a host's TPM becomes known to others: what is asked, answered and kept. No I/O, and no TPM on the asking side.
//!
//! ```text
//! host                         provider
//! Request (keys, name) ──────▶ whose TPM is this? (certificate or fingerprint of the endorsement key)
//!                     ◀────── Challenge: a secret that only the TPM with both keys can open
//! Answer ────────────────────▶ Pending::accept ─▶ Enrolled, for the configuration of other hosts
//! ```
//!
//! The answer is a quote whose qualifying data is made of the secret: it shows at once that the attestation key lives in
//! the TPM of that endorsement key, and what the host's registers hold.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cbor;
use crate::digest::Sha256;
use crate::evidence::public::{AttestationKey, EndorsementKey, PublicError};
use crate::evidence::registers::{Finding, PolicyError, RegisterPolicy};
use crate::evidence::{Event, Log, PCRS, Quote, QuoteError};
use crate::identity::{Identity, Kind};
use crate::keys::{Algorithm, KeyError, PublicKey};

/// Longest of these texts in bytes.
pub const TEXT_MAX: usize = 256 * 1024;
/// Most certificates between an endorsement key and its manufacturer, and the longest of them in bytes.
pub const CERTIFICATES_MAX: usize = 8;
const CERTIFICATE_MAX: usize = 8 * 1024;
/// Longest structure of a TPM in these texts, in bytes.
const STRUCTURE_MAX: usize = 2048;
/// Longest log, in bytes of CBOR.
const LOG_MAX: usize = 64 * 1024;
/// So that this digest is never mistaken for another.
const LABEL: &[u8] = b"palanquin enrolment 1\0";

/// Bytes as lowercase hexadecimal digits.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hex(pub Vec<u8>);

impl fmt::Debug for Hex {
    /// Secrets are among them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl From<Hex> for String {
    fn from(hex: Hex) -> Self {
        hex.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for Hex {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        let odd = "not an even number of lowercase hexadecimal digits";
        if !text.len().is_multiple_of(2)
            || !text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
        {
            return Err(odd);
        }
        let pairs = (0..text.len()).step_by(2).map(|at| &text[at..at + 2]);
        let bytes: Result<Vec<u8>, _> = pairs.map(|pair| u8::from_str_radix(pair, 16)).collect();
        bytes.map(Self).map_err(|_| odd)
    }
}

/// Why something of an enrolment is not believed.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// More than [`TEXT_MAX`].
    #[error("{0} bytes, at most {TEXT_MAX} are allowed")]
    TooLong(usize),
    /// Not TOML, an unknown key, or a value of another kind; says where.
    #[error("{0}")]
    Syntax(#[from] toml::de::Error),
    /// It can't be written.
    #[error("it cannot be written: {0}")]
    Writing(#[from] toml::ser::Error),
    /// Only hosts have TPMs here.
    #[error("{0} is no host")]
    NotAHost(Identity),
    /// A field beyond its bounds.
    #[error("{0}")]
    Field(&'static str),
    /// One of the two keys.
    #[error("the {0} key is not usable: {1}")]
    Public(&'static str, #[source] Box<PublicError>),
    /// The key of an enrolled host.
    #[error("the attestation key is not usable")]
    Key(#[from] KeyError),
    /// The quote of an answer.
    #[error("the answer is not by the TPM that was asked: {0}")]
    Quote(#[from] QuoteError),
    /// The TPM has not opened the secret, or not for this request.
    #[error("the answer does not show that the TPM of the endorsement key has the attestation key")]
    Binding,
    /// Registers that were asked for and not quoted, or values that are not those quoted.
    #[error("the answer has other registers than were quoted, or lacks some that the policy names")]
    Registers,
    /// What registers may hold.
    #[error("what registers may hold is not usable: {0}")]
    Policy(#[from] PolicyError),
    /// They hold something else.
    #[error("the host's registers do not hold what they must")]
    Findings(Vec<Finding>),
}

fn parse<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, EnrolError> {
    if text.len() > TEXT_MAX {
        return Err(EnrolError::TooLong(text.len()));
    }
    Ok(toml::from_str(text)?)
}

fn check_host(host: &Identity) -> Result<(), EnrolError> {
    if host.kind() == Kind::Host {
        Ok(())
    } else {
        Err(EnrolError::NotAHost(host.clone()))
    }
}

/// A host asks to be known by its TPM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Request {
    /// Who it says that it is.
    pub host: Identity,
    /// Registers that it will quote.
    pub registers: Vec<u8>,
    /// Public area of the key that signs quotes.
    pub attestation_key: Hex,
    /// Public area of the key by which the TPM is told from others.
    pub endorsement_key: Hex,
    /// Certificate of that key, if the TPM has one, and those up to its manufacturer; DER.
    #[serde(default)]
    pub certificates: Vec<Hex>,
}

impl Request {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn from_toml(text: &str) -> Result<Self, EnrolError> {
        let request: Self = parse(text)?;
        request.keys()?;
        Ok(request)
    }

    /// As text.
    ///
    /// # Errors
    ///
    /// None for a request whose registers are numbers of registers.
    pub fn to_toml(&self) -> Result<String, EnrolError> {
        Ok(toml::to_string_pretty(self)?)
    }

    /// Registers as bits.
    pub fn pcrs(&self) -> u32 {
        let valid = self.registers.iter().filter(|register| **register < PCRS);
        valid.fold(0, |pcrs, register| pcrs | 1 << register)
    }

    /// The two keys, if everything is within its bounds.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn keys(&self) -> Result<(AttestationKey, EndorsementKey), EnrolError> {
        check_host(&self.host)?;
        if self.registers.is_empty() || self.pcrs().count_ones() as usize != self.registers.len() {
            return Err(EnrolError::Field(
                "`registers` must be 1 to 24 different numbers from 0 to 23",
            ));
        }
        if self.certificates.len() > CERTIFICATES_MAX
            || self
                .certificates
                .iter()
                .any(|der| der.0.len() > CERTIFICATE_MAX)
        {
            return Err(EnrolError::Field(
                "`certificates` has too many, or too long ones",
            ));
        }
        let attestation = AttestationKey::read(&self.attestation_key.0)
            .map_err(|error| EnrolError::Public("attestation", Box::new(error)))?;
        let endorsement = EndorsementKey::read(&self.endorsement_key.0)
            .map_err(|error| EnrolError::Public("endorsement", Box::new(error)))?;
        Ok((attestation, endorsement))
    }

    /// What the TPM has to sign (`qualifyingData`) once it has opened the secret.
    pub fn binding(&self, secret: &[u8; 32]) -> Sha256 {
        let host = Sha256::of(self.host.to_string().as_bytes());
        let attestation = Sha256::of(&self.attestation_key.0);
        let endorsement = Sha256::of(&self.endorsement_key.0);
        // All of known lengths.
        Sha256::of_parts(&[LABEL, secret, &host.0, &attestation.0, &endorsement.0])
    }
}

/// What the provider sends: only the TPM that has both keys can open it (`TPM2_ActivateCredential`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Question {
    /// Who is asked.
    pub host: Identity,
    /// `TPMS_ID_OBJECT`.
    pub credential: Hex,
    /// The seed, encrypted for the endorsement key (`TPMU_ENCRYPTED_SECRET`).
    pub secret: Hex,
}

impl Question {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn from_toml(text: &str) -> Result<Self, EnrolError> {
        let question: Self = parse(text)?;
        check_host(&question.host)?;
        if question.credential.0.len() > STRUCTURE_MAX || question.secret.0.len() > STRUCTURE_MAX {
            return Err(EnrolError::Field("`credential` or `secret` is too long"));
        }
        Ok(question)
    }

    /// As text.
    ///
    /// # Errors
    ///
    /// None.
    pub fn to_toml(&self) -> Result<String, EnrolError> {
        Ok(toml::to_string_pretty(self)?)
    }
}

/// What the host answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Answer {
    /// `TPMS_ATTEST`.
    pub attest: Hex,
    /// `TPMT_SIGNATURE`.
    pub signature: Hex,
    /// Values of the quoted registers, lowest first.
    pub registers: Vec<Sha256>,
    /// What was measured into them, in CBOR, where the host has a log.
    pub log: Option<Hex>,
}

impl Answer {
    /// From what the TPM made.
    pub fn new(
        attest: Vec<u8>,
        signature: Vec<u8>,
        registers: Vec<Sha256>,
        log: Option<&Log>,
    ) -> Self {
        let log = log.map(cbor::to_vec).filter(|bytes| bytes.len() <= LOG_MAX);
        Self {
            attest: Hex(attest),
            signature: Hex(signature),
            registers,
            log: log.map(Hex),
        }
    }

    /// Reads one.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn from_toml(text: &str) -> Result<Self, EnrolError> {
        let answer: Self = parse(text)?;
        if answer.attest.0.len() > STRUCTURE_MAX
            || answer.signature.0.len() > STRUCTURE_MAX
            || answer.log.as_ref().is_some_and(|log| log.0.len() > LOG_MAX)
            || answer.registers.len() > usize::from(PCRS)
        {
            return Err(EnrolError::Field("a field of the answer is too long"));
        }
        Ok(answer)
    }

    /// As text.
    ///
    /// # Errors
    ///
    /// None.
    pub fn to_toml(&self) -> Result<String, EnrolError> {
        Ok(toml::to_string_pretty(self)?)
    }
}

/// What the provider keeps until the answer comes. It holds the secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Pending {
    /// 32 random bytes that were sent, encrypted.
    pub secret: Hex,
    /// The request.
    pub request: Request,
}

/// Registers and the values that they may have, as an operator writes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Register {
    /// Number.
    pub number: u8,
    /// Values of which it must have one.
    pub allowed: Vec<Sha256>,
    /// What was measured into it at enrolment, where a log explains its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Vec<Measurement>>,
}

/// Something that was measured into a register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Measurement {
    /// Kind of event.
    pub kind: u32,
    /// Its digest.
    pub digest: Sha256,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RegistersFile {
    register: Vec<Register>,
}

/// Reads which values registers may have: `[[register]]` with `number` and `allowed`.
///
/// # Errors
///
/// The first rule that is broken.
pub fn read_registers(text: &str) -> Result<RegisterPolicy, EnrolError> {
    let file: RegistersFile = parse(text)?;
    policy(&file.register)
}

fn policy(registers: &[Register]) -> Result<RegisterPolicy, EnrolError> {
    let (mut allowed, mut events) = (BTreeMap::new(), BTreeMap::new());
    for Register {
        number,
        allowed: values,
        measured,
    } in registers
    {
        if allowed.insert(*number, values.clone()).is_some() {
            return Err(EnrolError::Field("a register is there twice"));
        }
        if let Some(measured) = measured {
            let event = |measurement: &Measurement| Event {
                register: *number,
                kind: measurement.kind,
                digest: measurement.digest,
            };
            events.insert(*number, measured.iter().map(event).collect());
        }
    }
    Ok(RegisterPolicy::new(allowed, events)?)
}

impl Pending {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn from_toml(text: &str) -> Result<Self, EnrolError> {
        let pending: Self = parse(text)?;
        pending.request.keys()?;
        Ok(pending)
    }

    /// As text.
    ///
    /// # Errors
    ///
    /// None.
    pub fn to_toml(&self) -> Result<String, EnrolError> {
        Ok(toml::to_string_pretty(self)?)
    }

    /// Judges the answer. Without `wanted`, the values that the registers have now are those that they must have later.
    ///
    /// # Errors
    ///
    /// The first rule that is broken, or all registers that hold something else than wanted.
    pub fn accept(
        &self,
        answer: &Answer,
        wanted: Option<&RegisterPolicy>,
        now_unix_s: u64,
    ) -> Result<Enrolled, EnrolError> {
        let (attestation, endorsement) = self.request.keys()?;
        let secret = <&[u8; 32]>::try_from(&self.secret.0[..])
            .map_err(|_| EnrolError::Field("`secret` has not 32 bytes"))?;
        let quote = Quote::verify(&answer.attest.0, &answer.signature.0, &attestation.key)?;
        if quote.extra != self.request.binding(secret).0 {
            return Err(EnrolError::Binding);
        }
        let values = quote.registers(&answer.registers);
        let values = values.ok_or(EnrolError::Registers)?;
        let pcrs = wanted.map_or(self.request.pcrs(), RegisterPolicy::pcrs);
        if quote.pcrs & pcrs != pcrs {
            return Err(EnrolError::Registers);
        }
        // A log that is none only explains nothing.
        let log = answer.log.as_ref();
        let log = log.and_then(|bytes| cbor::from_slice::<Log>(&bytes.0).ok());
        let events = log.and_then(|log| log.explain(&values).ok());
        let events = events.unwrap_or_default();
        if let Some(wanted) = wanted {
            let findings = wanted.judge(&values, &events);
            if !findings.is_empty() {
                return Err(EnrolError::Findings(findings));
            }
        }
        let register = |number: &u8| Register {
            number: *number,
            allowed: wanted
                .and_then(|wanted| wanted.allowed().get(number).cloned())
                .unwrap_or_else(|| values.get(number).copied().into_iter().collect()),
            measured: events.get(number).map(|events| {
                let measured = events.iter().map(|event| Measurement {
                    kind: event.kind,
                    digest: event.digest,
                });
                measured.collect()
            }),
        };
        let numbers: Vec<u8> = (0..PCRS).filter(|number| pcrs >> number & 1 == 1).collect();
        Ok(Enrolled {
            host: self.request.host.clone(),
            attestation_key: Hex(attestation.key.to_spki_der()),
            endorsement_key: endorsement.fingerprint(),
            reset_count: quote.reset_count,
            enrolled_unix_s: now_unix_s,
            register: numbers.iter().map(register).collect(),
        })
    }
}

/// A host whose TPM is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Enrolled {
    /// Who it is.
    pub host: Identity,
    /// The key that signs its quotes: DER of a `SubjectPublicKeyInfo`.
    pub attestation_key: Hex,
    /// Fingerprint of its endorsement key.
    pub endorsement_key: Sha256,
    /// Resets that its TPM had counted.
    pub reset_count: u32,
    /// When, seconds since 1970.
    pub enrolled_unix_s: u64,
    /// What its registers may hold.
    pub register: Vec<Register>,
}

impl Enrolled {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn from_toml(text: &str) -> Result<Self, EnrolError> {
        let enrolled: Self = parse(text)?;
        check_host(&enrolled.host)?;
        enrolled.key()?;
        enrolled.policy()?;
        Ok(enrolled)
    }

    /// As text.
    ///
    /// # Errors
    ///
    /// None.
    pub fn to_toml(&self) -> Result<String, EnrolError> {
        Ok(toml::to_string_pretty(self)?)
    }

    /// The key that signs its quotes.
    ///
    /// # Errors
    ///
    /// None, or of another kind.
    pub fn key(&self) -> Result<PublicKey, EnrolError> {
        let key = PublicKey::from_spki_der(&self.attestation_key.0)?;
        if key.algorithm() == Algorithm::EcdsaP256 {
            Ok(key)
        } else {
            Err(EnrolError::Key(KeyError::Public))
        }
    }

    /// What its registers may hold.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn policy(&self) -> Result<RegisterPolicy, EnrolError> {
        policy(&self.register)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sign;
    use crate::evidence::public::tests::{attestation, endorsement_rsa};
    use crate::evidence::quote_tests;
    use crate::keys::tests::P256;

    fn pending(tpm: &P256) -> Pending {
        let request = Request {
            host: "spiffe://example.org/host/beta".parse().unwrap(),
            registers: vec![0, 7],
            attestation_key: Hex(attestation(&tpm.public_key())),
            endorsement_key: Hex(endorsement_rsa()),
            certificates: vec![Hex(vec![0x30; 100])],
        };
        Pending {
            secret: Hex(vec![9; 32]),
            request,
        }
    }

    fn values() -> Vec<Sha256> {
        vec![Sha256([1; 32]), Sha256([2; 32])]
    }

    fn answer(pending: &Pending, secret: &[u8; 32], tpm: &P256) -> Answer {
        let digest = Sha256::of_parts(&[&values()[0].0, &values()[1].0]);
        let binding = pending.request.binding(secret);
        let attest = quote_tests::attest(&binding.0, 0x81, &digest);
        let signature = quote_tests::signature(&attest, tpm);
        Answer::new(attest, signature, values(), None)
    }

    #[test]
    fn a_host_whose_tpm_opened_the_secret_is_enrolled_with_what_its_registers_hold() {
        let tpm = P256::new();
        let pending = pending(&tpm);
        let pending = Pending::from_toml(&pending.to_toml().unwrap()).unwrap();
        let answer = answer(&pending, &[9; 32], &tpm);
        let answer = Answer::from_toml(&answer.to_toml().unwrap()).unwrap();
        let enrolled = pending.accept(&answer, None, 1000).unwrap();
        let enrolled = Enrolled::from_toml(&enrolled.to_toml().unwrap()).unwrap();
        assert_eq!(enrolled.key().unwrap(), tpm.public_key());
        assert_eq!((enrolled.reset_count, enrolled.enrolled_unix_s), (5, 1000));
        let policy = enrolled.policy().unwrap();
        assert_eq!(policy.pcrs(), 0x81);
        assert_eq!(policy.allowed()[&7], [Sha256([2; 32])]);
    }

    #[test]
    fn an_answer_without_the_secret_by_another_key_or_with_other_values_is_refused() {
        let (tpm, other) = (P256::new(), P256::new());
        let pending = pending(&tpm);
        let accept = |answer: &Answer| pending.accept(answer, None, 0).unwrap_err();
        let guessed = answer(&pending, &[8; 32], &tpm);
        assert!(matches!(accept(&guessed), EnrolError::Binding));
        let foreign = answer(&pending, &[9; 32], &other);
        assert!(matches!(
            accept(&foreign),
            EnrolError::Quote(QuoteError::Signature)
        ));
        let mut lying = answer(&pending, &[9; 32], &tpm);
        lying.registers.swap(0, 1);
        assert!(matches!(accept(&lying), EnrolError::Registers));
        // Made for the same TPM under another name.
        let mut renamed = pending.clone();
        renamed.request.host = "spiffe://example.org/host/evil".parse().unwrap();
        let good = answer(&pending, &[9; 32], &tpm);
        assert!(matches!(
            renamed.accept(&good, None, 0),
            Err(EnrolError::Binding)
        ));
    }

    #[test]
    fn a_policy_decides_over_what_registers_hold_at_enrolment() {
        let tpm = P256::new();
        let pending = pending(&tpm);
        let answer = answer(&pending, &[9; 32], &tpm);
        let file = |seven: u8, number: u8| {
            let (one, value) = (Sha256([1; 32]), Sha256([seven; 32]));
            let text = format!(
                "[[register]]\nnumber = 0\nallowed = [\"{one}\"]\n[[register]]\nnumber = {number}\nallowed = [\"{value}\", \"{one}\"]\n"
            );
            read_registers(&text)
        };
        let good = file(2, 7).unwrap();
        let enrolled = pending.accept(&answer, Some(&good), 0).unwrap();
        assert_eq!(enrolled.register[1].allowed.len(), 2);
        let bad = pending.accept(&answer, Some(&file(3, 7).unwrap()), 0);
        let Err(EnrolError::Findings(findings)) = bad else {
            panic!("{bad:?}");
        };
        assert_eq!(findings[0].register, 7);
        let more = pending.accept(&answer, Some(&file(2, 8).unwrap()), 0);
        assert!(matches!(more, Err(EnrolError::Registers)));
        assert!(matches!(file(2, 0), Err(EnrolError::Field(_))));
        assert!(matches!(file(2, 24), Err(EnrolError::Policy(_))));
    }

    #[test]
    fn texts_beyond_their_bounds_are_refused() {
        let tpm = P256::new();
        let good = pending(&tpm).request;
        let with = |change: &dyn Fn(&mut Request)| {
            let mut odd = good.clone();
            change(&mut odd);
            Request::from_toml(&odd.to_toml().unwrap()).unwrap_err()
        };
        assert!(Request::from_toml(&good.to_toml().unwrap()).is_ok());
        for registers in [vec![], vec![24], vec![7, 7]] {
            let error = with(&|request| request.registers.clone_from(&registers));
            assert!(matches!(error, EnrolError::Field(_)), "{registers:?}");
        }
        let operator = "spiffe://example.org/operator/bob";
        let error = with(&|request| request.host = operator.parse().unwrap());
        assert!(matches!(error, EnrolError::NotAHost(_)));
        let many = with(&|request| request.certificates = vec![Hex(Vec::new()); 9]);
        assert!(matches!(many, EnrolError::Field(_)));
        let swapped = with(&|request| request.attestation_key = request.endorsement_key.clone());
        assert!(matches!(swapped, EnrolError::Public("attestation", _)));
        let long = "#".repeat(TEXT_MAX + 1);
        assert!(matches!(
            Request::from_toml(&long),
            Err(EnrolError::TooLong(_))
        ));
        for odd in ["0", "0G", "AB", "\u{e9}\u{e9}"] {
            assert!(Hex::try_from(odd.to_owned()).is_err(), "{odd}");
        }
    }
}
