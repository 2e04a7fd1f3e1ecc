//! Evidence of what a host runs, and what remains of it once it has been verified.
//!
//! A host first shows who it is, by its certificate in the channel. Then it is asked for evidence, bound to this channel,
//! to fresh bytes of the verifier and to what it is asked for: another host's genuine evidence, or an old one of its own,
//! proves nothing here (`CVE-2026-33697`).

mod event_log;
pub mod public;
mod quote;
pub mod registers;

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};
use uuid::Uuid;

pub use event_log::{EVENTS_MAX, Event, EventLogError, LOG_MAX, Log, VerifiedLog};
#[cfg(test)]
pub(crate) use quote::tests as quote_tests;
pub use quote::{PCRS, Quote, QuoteError};

use crate::cbor::{self, CborError};
use crate::digest::Sha256;
use crate::identity::Identity;
use crate::keys::PublicKey;

/// Longest evidence in bytes.
pub const EVIDENCE_MAX: usize = 16 * 1024;
/// So that this digest is never mistaken for another.
const LABEL: &[u8] = b"palanquin evidence 1\0";

/// Part that a host plays in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Role {
    /// Gives the VM away.
    #[n(0)]
    Source,
    /// Takes it.
    #[n(1)]
    Target,
}

/// What evidence is asked for and bound to.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Challenge {
    /// Random bytes that the verifier made for this question.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub nonce: [u8; 32],
    /// Keying material exported from the TLS connection (RFC 8446, section 7.5), which no other connection has.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub exporter: [u8; 32],
    /// Who is asked, by the certificate in that connection.
    #[n(2)]
    pub host: Identity,
    /// As what.
    #[n(3)]
    pub role: Role,
    /// The VM.
    #[cbor(n(4), with = "crate::cbor::uuid")]
    pub vm: Uuid,
    /// The migration.
    #[cbor(n(5), with = "crate::cbor::uuid")]
    pub migration: Uuid,
    /// Digest of the order's envelope.
    #[n(6)]
    pub order_sha256: Sha256,
}

/// What the agent says that it has measured. It is worth as much as the agent, whose measurement is in the registers.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Measured {
    /// The hypervisor's binary.
    #[n(0)]
    pub hypervisor: Option<Sha256>,
    /// The hypervisor's command line.
    #[n(1)]
    pub command_line: Option<Sha256>,
    /// Version of the policies by which the host decides.
    #[n(2)]
    pub policy_version: u64,
    /// Digest of these policies.
    #[n(3)]
    pub policy_sha256: Sha256,
    /// Digest over the hypervisor's binary and every library whose code it runs, as they lie on the disk.
    #[n(4)]
    pub code: Option<Sha256>,
    /// The process that is to take the VM, where there is one.
    #[n(5)]
    pub container: Option<Container>,
}

/// What a target has found out of the process that is to take a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Container {
    /// Guest RAM that held no data when the VM was prepared, in bytes: all of it.
    #[n(0)]
    pub empty_bytes: u64,
    /// Whether nobody can change the size of that RAM any more (memfd seals against growing and shrinking).
    #[n(1)]
    pub is_sealed: bool,
}

/// What a host answers. Nothing of it is used before [`Evidence::verify`].
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Evidence {
    #[n(0)]
    measured: Measured,
    #[cbor(n(1), with = "minicbor::bytes")]
    attest: Vec<u8>,
    #[cbor(n(2), with = "minicbor::bytes")]
    signature: Vec<u8>,
    /// Values of the quoted registers, lowest first: the quote has only a digest over them.
    #[n(3)]
    registers: Option<Vec<Sha256>>,
    /// What was measured into them.
    #[n(4)]
    log: Option<Log>,
}

impl std::fmt::Debug for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.attest.len() + self.signature.len();
        write!(f, "Evidence({bytes} bytes, not verified)")
    }
}

/// What the verifier expects of a host.
#[derive(Clone, Debug)]
pub struct Expectation<'a> {
    /// The key that lives in this host's TPM, as it was enrolled.
    pub key: &'a PublicKey,
    /// Registers that must be among those quoted: bit n is register n.
    pub pcrs: u32,
    /// Resets that the TPM had counted when it was last seen; it never counts back.
    pub reset_count_min: u32,
    /// How long the claims are believed, in seconds.
    pub lifetime_s: u64,
}

/// What is known of a host, for a while. Only [`Evidence::verify`] makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedClaims {
    challenge: Challenge,
    measured: Measured,
    quote: Quote,
    registers: BTreeMap<u8, Sha256>,
    events: BTreeMap<u8, Vec<Event>>,
    verified_unix_s: u64,
    expires_unix_s: u64,
}

/// The rule that evidence breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    /// More than [`EVIDENCE_MAX`].
    #[error("evidence of {0} bytes, at most {EVIDENCE_MAX} are allowed")]
    TooLong(usize),
    /// Not in the form of evidence.
    #[error("not evidence: {0}")]
    Malformed(String),
    /// The quote is none, or not by this TPM.
    #[error("the quote is not by the TPM of this host: {0}")]
    Quote(#[from] QuoteError),
    /// Another nonce, channel, host, role, VM, migration, order, or other measurements.
    #[error(
        "the quote was made for another question, over another channel, by another host, or with other measurements"
    )]
    Binding,
    /// Registers that matter were left out.
    #[error("registers {0:#x} (as bits) had to be quoted and were not")]
    Registers(u32),
    /// Other values than those over which the TPM made its digest.
    #[error("the values of the registers are not those that the TPM quoted")]
    Values,
    /// Something that can't be a log.
    #[error("the log of what was measured cannot be one: {0}")]
    Log(EventLogError),
    /// Another TPM's state, or one that was put back.
    #[error("the TPM has counted {quoted} resets, and it was at {known} before")]
    Rollback {
        /// In the quote.
        quoted: u32,
        /// Seen earlier.
        known: u32,
    },
}

impl EvidenceError {
    /// Stable code for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLong(_) | Self::Malformed(_) => "evidence-malformed",
            Self::Quote(_) => "evidence-quote",
            Self::Binding => "evidence-binding",
            Self::Registers(_) => "evidence-registers",
            Self::Values => "evidence-values",
            Self::Log(_) => "evidence-log",
            Self::Rollback { .. } => "evidence-rollback",
        }
    }
}

impl Challenge {
    /// What the TPM has to sign (`qualifyingData`) for this question and these measurements.
    pub fn binding(&self, measured: &Measured) -> Sha256 {
        // Both are maps of a known number of entries, so that one ends where the other begins.
        Sha256::of_parts(&[LABEL, &cbor::to_vec(self), &cbor::to_vec(measured)])
    }
}

impl Evidence {
    /// From what was measured, and what the TPM made: `TPMS_ATTEST` and `TPMT_SIGNATURE`.
    pub fn new(measured: Measured, attest: Vec<u8>, signature: Vec<u8>) -> Self {
        Self {
            measured,
            attest,
            signature,
            registers: None,
            log: None,
        }
    }

    /// With the values of the quoted registers, lowest first, so that it can be said which one differs.
    #[must_use]
    pub fn with_registers(mut self, values: Vec<Sha256>) -> Self {
        self.registers = Some(values);
        self
    }

    /// With what was measured into them, where that fits into [`EVIDENCE_MAX`], so that it can be said what differs.
    #[must_use]
    pub fn with_log(mut self, log: Log) -> Self {
        self.log = Some(log);
        if self.to_bytes().len() > EVIDENCE_MAX {
            self.log = None;
        }
        self
    }

    /// As it is sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        cbor::to_vec(self)
    }

    /// Takes bytes as evidence.
    ///
    /// # Errors
    ///
    /// They are none, or too many.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, EvidenceError> {
        if bytes.len() > EVIDENCE_MAX {
            return Err(EvidenceError::TooLong(bytes.len()));
        }
        cbor::from_slice(bytes)
            .map_err(|error: CborError| EvidenceError::Malformed(error.to_string()))
    }

    /// Checks that the TPM of this host answered this question.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn verify(
        self,
        challenge: Challenge,
        expected: &Expectation<'_>,
        now_unix_s: u64,
    ) -> Result<VerifiedClaims, EvidenceError> {
        let quote = Quote::verify(&self.attest, &self.signature, expected.key)?;
        if quote.extra != challenge.binding(&self.measured).0 {
            return Err(EvidenceError::Binding);
        }
        match expected.pcrs & !quote.pcrs {
            0 => {}
            missing => return Err(EvidenceError::Registers(missing)),
        }
        if quote.reset_count < expected.reset_count_min {
            return Err(EvidenceError::Rollback {
                quoted: quote.reset_count,
                known: expected.reset_count_min,
            });
        }
        let registers = match self.registers {
            Some(values) => quote.registers(&values).ok_or(EvidenceError::Values)?,
            None => BTreeMap::new(),
        };
        let events = match self.log {
            Some(log) => log.explain(&registers).map_err(EvidenceError::Log)?,
            None => BTreeMap::new(),
        };
        Ok(VerifiedClaims {
            challenge,
            measured: self.measured,
            quote,
            registers,
            events,
            verified_unix_s: now_unix_s,
            expires_unix_s: now_unix_s.saturating_add(expected.lifetime_s),
        })
    }
}

impl VerifiedClaims {
    /// The question that was answered.
    pub fn challenge(&self) -> &Challenge {
        &self.challenge
    }

    /// What the agent has measured.
    pub fn measured(&self) -> &Measured {
        &self.measured
    }

    /// What the TPM said.
    pub fn quote(&self) -> &Quote {
        &self.quote
    }

    /// Values of the quoted registers, as far as the host has told them: nothing or all.
    pub fn registers(&self) -> &BTreeMap<u8, Sha256> {
        &self.registers
    }

    /// What was measured into the registers whose value the host's log explains.
    pub fn events(&self) -> &BTreeMap<u8, Vec<Event>> {
        &self.events
    }

    /// When it was verified, seconds since 1970.
    pub fn verified_unix_s(&self) -> u64 {
        self.verified_unix_s
    }

    /// Until when it is believed, seconds since 1970.
    pub fn expires_unix_s(&self) -> u64 {
        self.expires_unix_s
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Sign;
    use crate::keys::tests::P256;

    pub(crate) fn challenge() -> Challenge {
        Challenge {
            nonce: [1; 32],
            exporter: [2; 32],
            host: "spiffe://example.org/host/beta".parse().unwrap(),
            role: Role::Target,
            vm: Uuid::from_bytes([2; 16]),
            migration: Uuid::from_bytes([1; 16]),
            order_sha256: Sha256([5; 32]),
        }
    }

    pub(crate) fn measured() -> Measured {
        Measured {
            hypervisor: Some(Sha256([8; 32])),
            command_line: None,
            policy_version: 5,
            policy_sha256: Sha256([6; 32]),
            code: None,
            container: None,
        }
    }

    /// Evidence as this TPM would give it.
    pub(crate) fn answer(challenge: &Challenge, measured: Measured, tpm: &P256) -> Evidence {
        let binding = challenge.binding(&measured);
        let attest = quote::tests::attest(&binding.0, 0xff, &Sha256([7; 32]));
        let signature = quote::tests::signature(&attest, tpm);
        Evidence::new(measured, attest, signature)
    }

    /// Claims of the target that were verified at that time.
    pub(crate) fn claims(challenge: Challenge, now_unix_s: u64) -> VerifiedClaims {
        let tpm = P256::new();
        let expected = Expectation {
            key: &tpm.public_key(),
            pcrs: 0xff,
            reset_count_min: 5,
            lifetime_s: 600,
        };
        let evidence = answer(&challenge, measured(), &tpm);
        evidence.verify(challenge, &expected, now_unix_s).unwrap()
    }

    #[test]
    fn evidence_survives_the_wire_and_is_believed_for_a_while() {
        let tpm = P256::new();
        let evidence = answer(&challenge(), measured(), &tpm);
        let bytes = evidence.to_bytes();
        assert_eq!(Evidence::from_bytes(&bytes), Ok(evidence));
        let claims = claims(challenge(), 1000);
        assert_eq!(
            (claims.verified_unix_s(), claims.expires_unix_s()),
            (1000, 1600)
        );
        assert_eq!(claims.measured(), &measured());
        for len in 0..bytes.len() {
            assert!(Evidence::from_bytes(&bytes[..len]).is_err());
        }
        let long = Evidence::from_bytes(&[0; EVIDENCE_MAX + 1]);
        assert_eq!(long, Err(EvidenceError::TooLong(EVIDENCE_MAX + 1)));
    }

    #[test]
    fn values_of_registers_are_believed_where_the_tpm_quoted_them() {
        let tpm = P256::new();
        let values: Vec<Sha256> = (0..8).map(|n| Sha256([n; 32])).collect();
        let parts: Vec<&[u8]> = values.iter().map(|value| &value.0[..]).collect();
        let verify = |values: Vec<Sha256>| {
            let binding = challenge().binding(&measured());
            let attest = quote::tests::attest(&binding.0, 0xff, &Sha256::of_parts(&parts));
            let signature = quote::tests::signature(&attest, &tpm);
            let evidence = Evidence::new(measured(), attest, signature).with_registers(values);
            let evidence = Evidence::from_bytes(&evidence.to_bytes()).unwrap();
            let expected = Expectation {
                key: &tpm.public_key(),
                pcrs: 0xff,
                reset_count_min: 0,
                lifetime_s: 1,
            };
            evidence.verify(challenge(), &expected, 0)
        };
        let claims = verify(values.clone()).unwrap();
        assert_eq!(claims.registers().len(), 8);
        assert_eq!(claims.registers()[&7], Sha256([7; 32]));
        let mut lying = values.clone();
        lying.swap(0, 1);
        assert_eq!(verify(lying), Err(EvidenceError::Values));
        assert_eq!(verify(values[1..].to_vec()), Err(EvidenceError::Values));
        let more = [&values[..], &values[..1]].concat();
        assert_eq!(verify(more), Err(EvidenceError::Values));
        assert_eq!(verify(Vec::new()), Err(EvidenceError::Values));
    }

    #[test]
    fn evidence_for_another_question_is_refused_whatever_differs() {
        let (tpm, good) = (P256::new(), challenge());
        let expected = Expectation {
            key: &tpm.public_key(),
            pcrs: 0xff,
            reset_count_min: 0,
            lifetime_s: 600,
        };
        let others = [
            Challenge {
                nonce: [9; 32],
                ..good.clone()
            },
            Challenge {
                exporter: [9; 32],
                ..good.clone()
            },
            Challenge {
                host: "spiffe://example.org/host/c".parse().unwrap(),
                ..good.clone()
            },
            Challenge {
                role: Role::Source,
                ..good.clone()
            },
            Challenge {
                vm: Uuid::nil(),
                ..good.clone()
            },
            Challenge {
                migration: Uuid::nil(),
                ..good.clone()
            },
            Challenge {
                order_sha256: Sha256([9; 32]),
                ..good.clone()
            },
        ];
        for other in others {
            let evidence = answer(&other, measured(), &tpm);
            let refused = evidence.verify(good.clone(), &expected, 0);
            assert_eq!(refused, Err(EvidenceError::Binding), "{other:?}");
        }
        let mut lying = answer(&good, measured(), &tpm);
        lying.measured.hypervisor = Some(Sha256([0; 32]));
        assert_eq!(
            lying.verify(good.clone(), &expected, 0),
            Err(EvidenceError::Binding)
        );
        // An honest host's TPM, relayed by another.
        let relayed = answer(&good, measured(), &P256::new()).verify(good, &expected, 0);
        assert_eq!(relayed.unwrap_err().code(), "evidence-quote");
    }

    #[test]
    fn registers_that_matter_must_be_quoted_and_resets_never_go_back() {
        let tpm = P256::new();
        let verify = |pcrs, reset_count_min| {
            let key = &tpm.public_key();
            let expected = Expectation {
                key,
                pcrs,
                reset_count_min,
                lifetime_s: 1,
            };
            let evidence = answer(&challenge(), measured(), &tpm);
            evidence.verify(challenge(), &expected, 0).map(drop)
        };
        assert_eq!(verify(0x3, 5), Ok(()));
        assert_eq!(verify(0x103, 5), Err(EvidenceError::Registers(0x100)));
        let rollback = EvidenceError::Rollback {
            quoted: 5,
            known: 6,
        };
        assert_eq!(verify(0x3, 6), Err(rollback));
    }
}
