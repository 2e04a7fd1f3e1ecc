//! Evidence from one host's TPM to another host's verifier. The TPMs are `swtpm`, each started by its test.
#![forbid(unsafe_code)]
#![cfg(feature = "tpm")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;

use palanquin_agent::attest::remedy::{Quarantine, obstacles};
use palanquin_agent::attest::sealed::unseal;
use palanquin_agent::attest::{AttestError, Attester, KEY_FILE, Verifier, measured};
use palanquin_api::attestation::{Attestation, Demand};
use palanquin_host::tpm::sealed::{SealError, seal};
use palanquin_host::tpm::{EndorsementKind, KeyBlob, Tpm, TpmError, credential};
use palanquin_lab::tpm::Swtpm;
use palanquin_trust::enrolment::{Answer, Enrolled, Hex, Pending, Request};
use palanquin_trust::evidence::{Challenge, Measured, Role};
use palanquin_trust::{Identity, Sha256};
use uuid::Uuid;

/// A host with a TPM.
struct Host {
    name: Identity,
    /// Ended before the directory goes in which its process is named: fields are dropped in order.
    tpm: Swtpm,
    dir: tempfile::TempDir,
}

const PCRS: u32 = 1 | 1 << 7;

fn name(host: &str) -> Identity {
    format!("spiffe://example.org/host/{host}").parse().unwrap()
}

impl Host {
    fn new(host: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tpm = Swtpm::start(dir.path().join("tpm")).unwrap();
        let key = Tpm::open(&tpm.tcti())
            .unwrap()
            .make_attestation_key()
            .unwrap();
        fs::write(dir.path().join(KEY_FILE), key.to_bytes()).unwrap();
        Self {
            name: name(host),
            dir,
            tpm,
        }
    }

    fn event_log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn key(&self) -> KeyBlob {
        KeyBlob::from_bytes(&fs::read(self.dir.path().join(KEY_FILE)).unwrap()).unwrap()
    }

    /// Measures things into registers, as firmware does that keeps a log.
    fn measure(&self, events: &[(u8, u32, u8)]) {
        let path = self.event_log();
        let mut log = fs::read(&path).unwrap_or_else(|_| {
            let banks = b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02\x01\0\0\0\x0b\0\x20\0\0";
            let len = [banks.len() as u8, 0, 0, 0];
            [&b"\0\0\0\0\x03\0\0\0"[..], &[0; 20], &len, banks].concat()
        });
        for (register, kind, digest) in events {
            self.tpm.extend(*register, [*digest; 32]).unwrap();
            log.extend([*register, 0, 0, 0]);
            log.extend(kind.to_le_bytes());
            log.extend(b"\x01\0\0\0\x0b\0");
            log.extend([*digest; 32]);
            log.extend([0; 4]);
        }
        fs::write(path, log).unwrap();
    }

    fn config(&self) -> Attestation {
        Attestation {
            tpm: Some(self.tpm.tcti()),
            registers: vec![0, 7],
            event_log: self.event_log(),
            ..Attestation::default()
        }
    }

    /// As the agent opens it when it starts.
    fn attester(&self) -> Attester {
        Attester::open(&self.config(), self.dir.path()).unwrap()
    }

    fn evidence(&self, challenge: &Challenge) -> Vec<u8> {
        self.attester().evidence(challenge, state()).unwrap()
    }

    /// Enrols it, by question and answer.
    fn enrol(&self) -> Enrolled {
        let tpm = Tpm::open(&self.tpm.tcti()).unwrap();
        let key = self.key();
        let endorsement = tpm.endorsement(EndorsementKind::EccP256).unwrap();
        let request = Request {
            host: self.name.clone(),
            registers: vec![0, 7],
            attestation_key: Hex(key.public.clone()),
            endorsement_key: Hex(endorsement.public),
            certificates: Vec::new(),
        };
        let (attestation, endorsement) = request.keys().unwrap();
        let secret = [7; 32];
        let made = credential::make(endorsement.spki_der(), &attestation.name, &secret).unwrap();
        let opened = tpm.activate(
            &key,
            EndorsementKind::EccP256,
            &made.credential,
            &made.secret,
        );
        let opened: [u8; 32] = opened.unwrap().try_into().unwrap();
        let quoted = tpm.quote(&key, PCRS, &request.binding(&opened).0).unwrap();
        let values = quoted.registers.into_values().map(Sha256).collect();
        let log = palanquin_agent::attest::log(&self.event_log(), PCRS);
        let answer = Answer::new(quoted.attest, quoted.signature, values, log.as_ref());
        let pending = Pending {
            secret: Hex(secret.to_vec()),
            request,
        };
        pending.accept(&answer, None, 1000).unwrap()
    }
}

/// What another host knows of these.
fn verifier(hosts: &[&Enrolled]) -> Verifier {
    let dir = tempfile::tempdir().unwrap();
    for (at, host) in hosts.iter().enumerate() {
        fs::write(
            dir.path().join(format!("{at}.toml")),
            host.to_toml().unwrap(),
        )
        .unwrap();
    }
    let config = Attestation {
        enrolled: Some(dir.path().to_owned()),
        demand: Demand::Always,
        ..Attestation::default()
    };
    Verifier::open(&config).unwrap()
}

fn challenge(host: &Identity) -> Challenge {
    Challenge {
        nonce: [1; 32],
        exporter: [2; 32],
        host: host.clone(),
        role: Role::Target,
        vm: Uuid::from_bytes([2; 16]),
        migration: Uuid::from_bytes([1; 16]),
        order_sha256: Sha256([5; 32]),
    }
}

fn state() -> Measured {
    measured(None, None, 5, Sha256([6; 32]))
}

#[test]
fn an_enrolled_host_is_believed_for_its_own_question_and_for_no_other() {
    let beta = Host::new("beta");
    let verifier = verifier(&[&beta.enrol()]);
    assert!(verifier.knows(&beta.name) && !verifier.knows(&name("gamma")));
    let question = challenge(&beta.name);
    let evidence = beta.evidence(&question);
    let claims = verifier.verify(&question, &evidence, 2000).unwrap();
    assert_eq!(
        (claims.measured(), claims.expires_unix_s()),
        (&state(), 2600)
    );
    assert_eq!(
        verifier.resets(),
        [(beta.name.clone(), claims.quote().reset_count)]
    );
    // An old answer, one over another connection, and one in another role.
    let others = [
        Challenge {
            nonce: [9; 32],
            ..question.clone()
        },
        Challenge {
            exporter: [9; 32],
            ..question.clone()
        },
        Challenge {
            role: Role::Source,
            ..question.clone()
        },
    ];
    for other in others {
        let error = verifier.verify(&other, &evidence, 2000).unwrap_err();
        assert_eq!(error.code(), "evidence-binding", "{error}");
    }
}

#[test]
fn an_honest_hosts_quote_that_another_host_relays_is_refused() {
    let (honest, evil) = (Host::new("honest"), Host::new("evil"));
    let verifier = verifier(&[&honest.enrol(), &evil.enrol()]);
    // The verifier asks the evil host, which has an enrolled TPM too, but not the right state to show.
    let asked = challenge(&evil.name);
    // It lets the honest one answer: with the question as it is, the key is another's.
    let relayed = honest.evidence(&asked);
    let error = verifier.verify(&asked, &relayed, 0).unwrap_err();
    assert_eq!(error.code(), "evidence-quote", "{error}");
    // With the honest host's own name in it, the answer is to another question. The agent puts its own name and the
    // exporter of its own connection into what is signed.
    let relayed = honest.evidence(&challenge(&honest.name));
    let error = verifier.verify(&asked, &relayed, 0).unwrap_err();
    assert_eq!(error.code(), "evidence-quote", "{error}");
    let own = Challenge {
        exporter: [3; 32],
        ..challenge(&honest.name)
    };
    let error = verifier
        .verify(&challenge(&honest.name), &honest.evidence(&own), 0)
        .unwrap_err();
    assert_eq!(error.code(), "evidence-binding", "{error}");
}

#[test]
fn a_key_that_was_not_enrolled_is_refused_even_from_the_same_tpm() {
    let beta = Host::new("beta");
    let verifier = verifier(&[&beta.enrol()]);
    let tpm = Tpm::open(&beta.tpm.tcti()).unwrap();
    let other = tpm.make_attestation_key().unwrap();
    drop(tpm);
    fs::write(beta.dir.path().join(KEY_FILE), other.to_bytes()).unwrap();
    let question = challenge(&beta.name);
    let error = verifier
        .verify(&question, &beta.evidence(&question), 0)
        .unwrap_err();
    assert_eq!(error.code(), "evidence-quote", "{error}");
    // A key of another TPM is not even loaded; the agent starts all the same.
    let gamma = Host::new("gamma");
    fs::write(beta.dir.path().join(KEY_FILE), gamma.key().to_bytes()).unwrap();
    let error = beta.attester().evidence(&question, state()).unwrap_err();
    assert_eq!(error.code(), "tpm-foreign", "{error}");
}

#[test]
fn what_was_measured_after_enrolment_is_named_by_register_and_component_until_it_is_remedied() {
    let beta = Host::new("beta");
    beta.measure(&[(0, 8, 0xa0), (7, 0x8000_0001, 0xa7), (7, 4, 0xb7)]);
    let verifier = verifier(&[&beta.enrol()]);
    let question = challenge(&beta.name);
    let claims = verifier
        .verify(&question, &beta.evidence(&question), 0)
        .unwrap();
    assert_eq!(claims.events()[&7].len(), 2);
    let quarantine = Quarantine::default();
    assert!(!quarantine.checked(&beta.name, Ok(()), 0));
    beta.measure(&[(7, 0x8000_00e0, 0xee)]);
    let error = verifier
        .verify(&question, &beta.evidence(&question), 0)
        .unwrap_err();
    assert_eq!((error.code(), error.findings().len()), ("host-state", 1));
    let found = obstacles(&error);
    let new = "measurement 3, the authority that let a program start";
    assert!(found[0].message.contains(new), "{}", found[0].message);
    assert!(found[0].message.starts_with("register 7 (Secure Boot"));
    assert!(quarantine.checked(&beta.name, Err(&error), 0));
    // Started again without it: the register is as it was, and the reset is counted.
    fs::remove_file(beta.event_log()).unwrap();
    beta.tpm.restart().unwrap();
    beta.measure(&[(0, 8, 0xa0), (7, 0x8000_0001, 0xa7), (7, 4, 0xb7)]);
    let again = verifier
        .verify(&question, &beta.evidence(&question), 0)
        .unwrap();
    assert_eq!(again.quote().reset_count, claims.quote().reset_count + 1);
    assert!(quarantine.checked(&beta.name, Ok(()), 0) && quarantine.all().is_empty());
    // Whoever has a quote from before the reset can't use it any more.
    let old = verifier.resets();
    assert_eq!(old[0].1, again.quote().reset_count);
}

#[test]
fn a_log_that_does_not_explain_the_registers_explains_nothing() {
    let beta = Host::new("beta");
    beta.measure(&[(0, 8, 0xa0), (7, 4, 0xb7)]);
    let enrolled = beta.enrol();
    // The kernel has measured something that is in no log of firmware.
    beta.tpm.extend(7, [1; 32]).unwrap();
    let verifier = verifier(&[&enrolled]);
    let question = challenge(&beta.name);
    let error = verifier
        .verify(&question, &beta.evidence(&question), 0)
        .unwrap_err();
    let AttestError::State { findings, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((findings[0].register, &findings[0].component), (7, &None));
}

#[test]
fn registers_that_the_verifier_wants_must_be_quoted() {
    let beta = Host::new("beta");
    let verifier = verifier(&[&beta.enrol()]);
    let config = Attestation {
        registers: vec![0],
        ..beta.config()
    };
    let attester = Attester::open(&config, beta.dir.path()).unwrap();
    let question = challenge(&beta.name);
    let evidence = attester.evidence(&question, state()).unwrap();
    let error = verifier.verify(&question, &evidence, 0).unwrap_err();
    assert_eq!(error.code(), "evidence-registers", "{error}");
}

#[test]
fn a_tpm_that_goes_away_is_an_error_and_no_wait_without_end() {
    let beta = Host::new("beta");
    let attester = beta.attester();
    let question = challenge(&beta.name);
    attester.evidence(&question, state()).unwrap();
    beta.tpm.off().unwrap();
    let error = attester.evidence(&question, state()).unwrap_err();
    assert_eq!(error.code(), "tpm-unreachable", "{error}");
    beta.tpm.on().unwrap();
    attester.evidence(&question, state()).unwrap();
}

#[test]
fn a_sealed_file_opens_only_on_its_host_in_its_state() {
    let (beta, gamma) = (Host::new("beta"), Host::new("gamma"));
    let tpm = Tpm::open(&beta.tpm.tcti()).unwrap();
    let sealed = seal(&tpm, &beta.tpm.tcti(), PCRS, b"-----BEGIN", Some([6; 32])).unwrap();
    drop(tpm);
    let opened = unseal(sealed.as_bytes()).unwrap();
    assert_eq!(opened.contents, b"-----BEGIN");
    assert_eq!(opened.policies, Some([6; 32]));
    assert!(!sealed.contains("BEGIN"));
    // Somebody else's TPM is named.
    let moved = sealed.replace(&beta.tpm.tcti(), &gamma.tpm.tcti());
    let error = unseal(moved.as_bytes()).unwrap_err();
    assert!(
        matches!(error, SealError::Tpm(TpmError::Foreign(_))),
        "{error}"
    );
    let at = sealed.rfind("\"}").unwrap();
    let digit = if sealed[..at].ends_with('0') {
        "1"
    } else {
        "0"
    };
    let altered = [&sealed[..at - 1], digit, &sealed[at..]].concat();
    let error = unseal(altered.as_bytes()).unwrap_err();
    assert!(matches!(error, SealError::Altered), "{error}");
    beta.tpm.extend(7, [1; 32]).unwrap();
    let error = unseal(sealed.as_bytes()).unwrap_err();
    let says = "the measured state is another than when the secret was sealed: registers 7 changed";
    assert_eq!(error.to_string(), says);
}
