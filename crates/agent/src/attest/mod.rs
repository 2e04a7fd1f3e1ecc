//! What this host shows of itself, and what it believes of others.
//!
//! [`Attester`] has this host's TPM sign the answer to a question, [`Verifier`] judges the answers of others by what was
//! enrolled of them. Neither decides anything: claims that were verified go to the policies, findings to the operator.

pub mod enrolled;
pub mod remedy;
pub mod sealed;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use palanquin_api::attestation::{Attestation, Demand};
use palanquin_host::tpm::{KeyBlob, Tpm, TpmError};
use palanquin_trust::evidence::registers::Finding;
use palanquin_trust::evidence::{
    Challenge, Container, EVIDENCE_MAX, EventLogError, EvidenceError, Expectation, LOG_MAX, Log,
    Measured,
};
use palanquin_trust::{Evidence, Identity, Sha256, VerifiedClaims};

use self::enrolled::{EnrolledError, EnrolledHosts};

/// Name of the key's file in the state directory.
pub const KEY_FILE: &str = "attestation-key";
/// Longest file with a key, in bytes.
const KEY_MAX: u64 = 4096;

/// Why there is no evidence, or none that is believed.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// This host's TPM.
    #[error("this host's TPM has failed")]
    Tpm(#[from] TpmError),
    /// A file of the configuration.
    #[error("{path}: {problem}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Nothing was shown.
    #[error("host {0} has shown no evidence")]
    Missing(Identity),
    /// Nobody has enrolled it.
    #[error("host {0} is not enrolled here")]
    Unknown(Identity),
    /// Something else than evidence for this question by this host.
    #[error("the evidence of host {host} is not believed")]
    Evidence {
        /// Who.
        host: Identity,
        /// The rule that it breaks.
        #[source]
        source: EvidenceError,
    },
    /// Its registers do not hold what they must.
    #[error("the measured state of host {host} is not what it must be: {}", list(.findings))]
    State {
        /// Who.
        host: Identity,
        /// Each register that differs.
        findings: Vec<Finding>,
    },
    /// What was enrolled.
    #[error(transparent)]
    Enrolled(#[from] EnrolledError),
}

impl AttestError {
    /// Stable code for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Tpm(error) => error.code(),
            Self::File { .. } => "attestation-file",
            Self::Missing(_) => "evidence-missing",
            Self::Unknown(_) => "host-not-enrolled",
            Self::Evidence { source, .. } => source.code(),
            Self::State { .. } => "host-state",
            Self::Enrolled(_) => "enrolment-file",
        }
    }

    /// What is to be remedied, one by one; for what is no matter of registers a single entry.
    pub fn findings(&self) -> &[Finding] {
        match self {
            Self::State { findings, .. } => findings,
            _ => &[],
        }
    }

    /// What the operator of the host that was asked can do.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Tpm(_) => {
                "Look whether `trust.attestation.tpm` names the host's TPM, and whether it answers."
            }
            Self::File { .. } | Self::Enrolled(_) => {
                "Put the file in order, and have it read again: SIGHUP for enrolments, else a new start of the agent."
            }
            Self::Missing(_) => "Set `trust.attestation.tpm` on that host, after enrolling it.",
            Self::Unknown(_) => "Enrol the host: `palanquin attest request` on it begins that.",
            Self::Evidence { .. } => {
                "If the host's TPM was replaced or reset, enrol it again; else somebody lies."
            }
            Self::State { .. } => "Remedy each register that is named, or enrol the host again.",
        }
    }
}

fn list(findings: &[Finding]) -> String {
    let words: Vec<String> = findings.iter().map(ToString::to_string).collect();
    words.join("; ")
}

/// What was measured of a hypervisor, in the form of evidence.
pub fn measured(
    hypervisor: Option<&palanquin_host::measure::Measurement>,
    container: Option<palanquin_host::measure::Empty>,
    policy_version: u64,
    policy_sha256: Sha256,
) -> Measured {
    Measured {
        hypervisor: hypervisor.map(|measured| Sha256(measured.binary)),
        command_line: hypervisor.map(|measured| Sha256(measured.command_line)),
        policy_version,
        policy_sha256,
        code: hypervisor.map(|measured| Sha256(measured.code)),
        container: container.map(|empty| Container {
            empty_bytes: empty.bytes,
            is_sealed: empty.is_sealed,
        }),
    }
}

/// Makes evidence.
#[derive(Debug)]
pub struct Attester(Option<Own>);

#[derive(Debug)]
struct Own {
    tpm: Tpm,
    key: KeyBlob,
    pcrs: u32,
    event_log: PathBuf,
}

fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, AttestError> {
    let failed = |problem: String| AttestError::File {
        path: path.to_owned(),
        problem,
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(bytes_max + 1).read_to_end(&mut bytes))
        .map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > bytes_max {
        return Err(failed(format!("it has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}

impl Attester {
    /// A host without a TPM: its evidence is empty.
    pub fn none() -> Self {
        Self(None)
    }

    /// With what the configuration names.
    ///
    /// # Errors
    ///
    /// The key cannot be read, or what is named is no TPM. It is not asked for anything yet.
    pub fn open(config: &Attestation, state_dir: &Path) -> Result<Self, AttestError> {
        let Some(name) = &config.tpm else {
            return Ok(Self::none());
        };
        let path = config
            .key
            .clone()
            .unwrap_or_else(|| state_dir.join(KEY_FILE));
        let key = KeyBlob::from_bytes(&read(&path, KEY_MAX)?)?;
        let tpm = Tpm::later(name)?;
        Ok(Self(Some(Own {
            tpm,
            key,
            pcrs: config.pcrs(),
            event_log: config.event_log.clone(),
        })))
    }

    /// Whether this host has something to show.
    pub fn has_tpm(&self) -> bool {
        self.0.is_some()
    }

    /// Loads the key, so that the next evidence takes no longer than it must. To be called before a VM is paused.
    ///
    /// # Errors
    ///
    /// The TPM fails.
    pub fn warm(&self) -> Result<(), AttestError> {
        match &self.0 {
            Some(own) => Ok(own.tpm.warm(&own.key)?),
            None => Ok(()),
        }
    }

    /// The answer to this question; empty where this host has no TPM.
    ///
    /// # Errors
    ///
    /// The TPM fails.
    pub fn evidence(
        &self,
        challenge: &Challenge,
        measured: Measured,
    ) -> Result<Vec<u8>, AttestError> {
        let Some(own) = &self.0 else {
            return Ok(Vec::new());
        };
        let binding = challenge.binding(&measured);
        let quoted = own.tpm.quote(&own.key, own.pcrs, &binding.0)?;
        let values = quoted.registers.into_values().map(Sha256).collect();
        let mut evidence =
            Evidence::new(measured, quoted.attest, quoted.signature).with_registers(values);
        if let Some(log) = log(&own.event_log, own.pcrs) {
            evidence = evidence.with_log(log);
        }
        Ok(evidence.to_bytes())
    }
}

/// What firmware measured into these registers. A log that is not there, or none, is left out: it only explains.
pub fn log(path: &Path, pcrs: u32) -> Option<Log> {
    let bytes = read(path, LOG_MAX as u64).ok()?;
    let log: Result<Log, EventLogError> = Log::read(&bytes);
    match log {
        Ok(log) => Some(log.of_registers(pcrs)),
        Err(error) => {
            tracing::debug!(%error, path = %path.display(), "the log of measurements is of no use");
            None
        }
    }
}

/// Judges evidence.
#[derive(Debug)]
pub struct Verifier {
    hosts: EnrolledHosts,
    demand: Demand,
    lifetime_s: u64,
}

impl Verifier {
    /// With the enrolments that the configuration names. `seen` are resets that were counted since ([`Verifier::resets`]).
    ///
    /// # Errors
    ///
    /// A file of an enrolment is not usable.
    pub fn open(config: &Attestation) -> Result<Self, AttestError> {
        let hosts = match &config.enrolled {
            Some(dir) => EnrolledHosts::read(dir)?,
            None => EnrolledHosts::default(),
        };
        Ok(Self {
            hosts,
            demand: config.demand,
            lifetime_s: config.lifetime.as_millis() / 1000,
        })
    }

    /// Whether this host is enrolled.
    pub fn knows(&self, host: &Identity) -> bool {
        self.hosts.get(host).is_some()
    }

    /// Whether this host has to show evidence, whatever policies and passports say.
    pub fn wants(&self, host: &Identity) -> bool {
        match self.demand {
            Demand::Never => false,
            Demand::Enrolled => self.knows(host),
            Demand::Always => true,
        }
    }

    /// Judges the answer to a question. Where the host's registers differ, each is named ([`AttestError::findings`]).
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn verify(
        &self,
        challenge: &Challenge,
        evidence: &[u8],
        now_unix_s: u64,
    ) -> Result<VerifiedClaims, AttestError> {
        let host = || challenge.host.clone();
        if evidence.is_empty() {
            return Err(AttestError::Missing(host()));
        }
        let enrolled = self.hosts.get(&challenge.host);
        let enrolled = enrolled.ok_or_else(|| AttestError::Unknown(host()))?;
        let expected = Expectation {
            key: &enrolled.key,
            pcrs: enrolled.policy.pcrs(),
            reset_count_min: enrolled.reset_count(),
            lifetime_s: self.lifetime_s,
        };
        let claims = Evidence::from_bytes(evidence)
            .and_then(|evidence| evidence.verify(challenge.clone(), &expected, now_unix_s))
            .map_err(|source| AttestError::Evidence {
                host: host(),
                source,
            })?;
        let findings = enrolled.policy.judge(claims.registers(), claims.events());
        if !findings.is_empty() {
            let host = host();
            return Err(AttestError::State { host, findings });
        }
        // It never counts back: whoever puts an old state of the TPM back is noticed.
        enrolled.saw_resets(claims.quote().reset_count);
        Ok(claims)
    }

    /// Resets that each host's TPM has counted, to be kept beyond a restart.
    pub fn resets(&self) -> Vec<(Identity, u32)> {
        self.hosts.resets()
    }

    /// What was kept by [`Verifier::resets`]; hosts that are not enrolled any more are left out.
    pub fn remember_resets(&self, seen: &[(Identity, u32)]) {
        for (host, count) in seen {
            if let Some(enrolled) = self.hosts.get(host) {
                enrolled.saw_resets(*count);
            }
        }
    }
}

const _: () = assert!(
    EVIDENCE_MAX <= 32 * 1024,
    "evidence fits into the protocol's message"
);

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> Identity {
        format!("spiffe://example.org/host/{name}").parse().unwrap()
    }

    #[test]
    fn a_host_without_a_tpm_shows_nothing_and_is_refused_where_something_is_wanted() {
        let challenge = Challenge {
            nonce: [1; 32],
            exporter: [2; 32],
            host: host("beta"),
            role: palanquin_trust::evidence::Role::Target,
            vm: uuid::Uuid::nil(),
            migration: uuid::Uuid::nil(),
            order_sha256: Sha256([5; 32]),
        };
        let attester = Attester::open(&Attestation::default(), Path::new("/none")).unwrap();
        assert!(!attester.has_tpm());
        attester.warm().unwrap();
        let evidence = attester.evidence(&challenge, measured(None, None, 0, Sha256([0; 32])));
        assert!(evidence.unwrap().is_empty());
        let verifier = Verifier::open(&Attestation::default()).unwrap();
        let error = verifier.verify(&challenge, &[], 0).unwrap_err();
        assert_eq!(error.code(), "evidence-missing");
        let error = verifier.verify(&challenge, b"x", 0).unwrap_err();
        assert_eq!(error.code(), "host-not-enrolled");
    }

    #[test]
    fn what_is_wanted_of_whom_is_as_configured() {
        let with = |demand| {
            let config = Attestation {
                demand,
                ..Attestation::default()
            };
            Verifier::open(&config).unwrap().wants(&host("beta"))
        };
        assert!(!with(Demand::Never) && !with(Demand::Enrolled) && with(Demand::Always));
    }
}
