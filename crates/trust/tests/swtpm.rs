//! Evidence of a TPM that is not ours: quotes of `swtpm`, made with `tpm2-tools`.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use palanquin_trust::evidence::{
    Challenge, EventLogError, EvidenceError, Expectation, Measured, QuoteError, Role, VerifiedLog,
};
use palanquin_trust::{Evidence, PublicKey, Sha256, VerifiedClaims};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use uuid::Uuid;

/// A TPM of its own on the loopback, with an attestation key; ended when dropped.
struct Tpm {
    dir: tempfile::TempDir,
    port: u16,
}

impl Tpm {
    fn new() -> Self {
        let mut tpm = Self {
            dir: tempfile::tempdir().unwrap(),
            port: 0,
        };
        tpm.start();
        let attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign";
        let key = ["-G", "ecc256:ecdsa-sha256:null", "-a", attributes];
        tpm.run(
            "createprimary",
            &[&["-C", "e", "-c", "ak.ctx"], &key[..]].concat(),
        );
        tpm.run("flushcontext", &["-t"]);
        tpm.run("evictcontrol", &["-C", "o", "-c", "ak.ctx", "0x81010001"]);
        tpm.run(
            "readpublic",
            &["-c", "0x81010001", "-f", "der", "-o", "ak.der"],
        );
        tpm
    }

    /// Starts the host, as it were. `swtpm` puts itself into the background once its sockets are there.
    fn start(&mut self) {
        for _ in 0..10 {
            let free = || TcpListener::bind("127.0.0.1:0").unwrap();
            let (server, control) = (free(), free());
            let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
            self.port = port(&server);
            // The library wants the control port to be the next.
            let control = if port(&control) == self.port + 1 {
                control
            } else {
                match TcpListener::bind(("127.0.0.1", self.port + 1)) {
                    Ok(control) => control,
                    Err(_) => continue,
                }
            };
            drop((server, control));
            let dir = self.dir.path().display();
            let socket = |port| format!("type=tcp,port={port},bindaddr=127.0.0.1");
            let started = Command::new("swtpm")
                .args(["socket", "--tpm2", "--daemon", "--flags", "startup-clear"])
                .args(["--tpmstate", &format!("dir={dir}")])
                .args(["--pid", &format!("file={dir}/pid")])
                .args([
                    "--server",
                    &socket(self.port),
                    "--ctrl",
                    &socket(self.port + 1),
                ])
                .output()
                .expect("swtpm, which `cargo xtask test` installs");
            if started.status.success() {
                return;
            }
        }
        panic!("swtpm does not start");
    }

    /// Ends it, and waits until it has ended: another one is to find its state.
    fn stop(&self) {
        let pid = fs::read_to_string(self.path("pid")).unwrap_or_default();
        let Some(pid) = pid.trim().parse().ok().and_then(Pid::from_raw) else {
            return;
        };
        // It is no child of ours, so that it can't be waited for; a descriptor of it can.
        if let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) {
            let _ = kill_process(pid, Signal::TERM);
            let deadline = Timespec {
                tv_sec: 10,
                tv_nsec: 0,
            };
            let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&deadline));
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `tpm2_TOOL`.
    fn run(&self, tool: &str, words: &[&str]) {
        let output = Command::new(format!("tpm2_{tool}"))
            .args(words)
            .arg("-Q")
            .current_dir(self.dir.path())
            .env(
                "TPM2TOOLS_TCTI",
                format!("swtpm:host=127.0.0.1,port={}", self.port),
            )
            .output()
            .expect("tpm2-tools, which `cargo xtask test` installs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tpm2_{tool} {words:?}: {said}");
    }

    fn key(&self) -> PublicKey {
        PublicKey::from_spki_der(&fs::read(self.path("ak.der")).unwrap()).unwrap()
    }

    /// `TPMS_ATTEST` and `TPMT_SIGNATURE` over these registers.
    fn quote(&self, registers: &str, qualifying: &Sha256) -> (Vec<u8>, Vec<u8>) {
        let text = qualifying.to_string();
        let words = ["-c", "0x81010001", "-l", registers, "-g", "sha256"];
        let out = ["-q", &text[7..], "-m", "quote", "-s", "signature"];
        self.run("quote", &[&words[..], &out].concat());
        let read = |name| fs::read(self.path(name)).unwrap();
        (read("quote"), read("signature"))
    }

    fn answer(&self, challenge: &Challenge) -> Evidence {
        let (quote, signature) = self.quote("sha256:0,1,7", &challenge.binding(&measured()));
        Evidence::new(measured(), quote, signature)
    }

    fn verify(&self, evidence: Evidence, pcrs: u32) -> Result<VerifiedClaims, EvidenceError> {
        let expected = Expectation {
            key: &self.key(),
            pcrs,
            reset_count_min: 0,
            lifetime_s: 60,
        };
        evidence.verify(challenge(), &expected, 1000)
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        self.stop();
    }
}

fn challenge() -> Challenge {
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

fn measured() -> Measured {
    Measured {
        hypervisor: Some(Sha256([8; 32])),
        command_line: None,
        policy_version: 5,
        policy_sha256: Sha256([6; 32]),
        code: None,
        container: None,
    }
}

const REGISTERS: u32 = 1 << 0 | 1 << 1 | 1 << 7;

#[test]
fn a_true_quote_is_believed_and_says_what_the_registers_hold() {
    let tpm = Tpm::new();
    let claims = tpm.verify(tpm.answer(&challenge()), REGISTERS).unwrap();
    assert_eq!(claims.quote().pcrs, REGISTERS);
    let before = claims.quote().pcr_digest;
    assert_eq!(
        before,
        Sha256::of(&[0; 96]),
        "no firmware has measured anything"
    );
    tpm.run("pcrextend", &[&format!("7:sha256={}", "ab".repeat(32))]);
    let claims = tpm.verify(tpm.answer(&challenge()), REGISTERS).unwrap();
    let extended = Sha256::of_parts(&[&[0; 32], &[0xab; 32]]);
    let expected = Sha256::of_parts(&[&[0; 64], &extended.0]);
    assert_eq!(claims.quote().pcr_digest, expected);
    assert_ne!(before, expected);
}

#[test]
fn a_log_of_what_was_measured_is_replayed_against_the_tpm() {
    let tpm = Tpm::new();
    let mut log = b"\0\0\0\0\x03\0\0\0".to_vec();
    log.extend([0; 20]);
    let banks = b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02\x01\0\0\0\x0b\0\x20\0\0";
    log.extend([&[banks.len() as u8, 0, 0, 0][..], banks].concat());
    for (register, digest) in [(0_u8, "01"), (7, "02"), (1, "03"), (7, "04")] {
        tpm.run(
            "pcrextend",
            &[&format!("{register}:sha256={}", digest.repeat(32))],
        );
        let digest = [digest.parse::<u8>().unwrap(); 32];
        log.extend([register, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0x0b, 0]);
        log.extend(digest);
        log.extend([0; 4]);
    }
    let claims = tpm.verify(tpm.answer(&challenge()), REGISTERS).unwrap();
    let verified = VerifiedLog::verify(&log, claims.quote()).unwrap();
    assert_eq!(verified.events().len(), 4);
    // Measured once more, and not in the log.
    tpm.run("pcrextend", &[&format!("1:sha256={}", "05".repeat(32))]);
    let claims = tpm.verify(tpm.answer(&challenge()), REGISTERS).unwrap();
    let refused = VerifiedLog::verify(&log, claims.quote());
    assert_eq!(refused, Err(EventLogError::Mismatch));
}

#[test]
fn a_quote_of_another_tpm_or_for_another_question_is_refused() {
    let (honest, evil) = (Tpm::new(), Tpm::new());
    // An honest host answers the question that was put to another one.
    let relayed = evil.verify(honest.answer(&challenge()), REGISTERS);
    assert_eq!(relayed, Err(EvidenceError::Quote(QuoteError::Signature)));
    let other = Challenge {
        nonce: [9; 32],
        ..challenge()
    };
    let stale = honest.verify(honest.answer(&other), REGISTERS);
    assert_eq!(stale, Err(EvidenceError::Binding));
    let missing = honest.verify(honest.answer(&challenge()), REGISTERS | 1 << 4);
    assert_eq!(missing, Err(EvidenceError::Registers(1 << 4)));
}

#[test]
fn every_altered_byte_of_a_true_quote_is_refused() {
    let tpm = Tpm::new();
    let (quote, signature) = tpm.quote("sha256:0,1,7", &challenge().binding(&measured()));
    let judge = |quote: &[u8], signature: &[u8]| {
        let evidence = Evidence::new(measured(), quote.to_vec(), signature.to_vec());
        tpm.verify(evidence, REGISTERS)
    };
    assert!(judge(&quote, &signature).is_ok());
    for at in 0..quote.len() {
        let mut altered = quote.clone();
        altered[at] ^= 0x10;
        assert!(judge(&altered, &signature).is_err(), "byte {at}");
        assert!(judge(&quote[..at], &signature).is_err(), "cut at {at}");
    }
    for at in 0..signature.len() {
        let mut altered = signature.clone();
        altered[at] ^= 0x10;
        assert!(
            judge(&quote, &altered).is_err(),
            "byte {at} of the signature"
        );
        assert!(judge(&quote, &signature[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn other_banks_and_other_structures_that_the_tpm_signs_are_no_quotes() {
    let tpm = Tpm::new();
    let binding = challenge().binding(&measured());
    let judge = |quote: Vec<u8>, signature| {
        let evidence = Evidence::new(measured(), quote, signature);
        tpm.verify(evidence, REGISTERS)
    };
    for banks in ["sha1:0,1,7", "sha1:0+sha256:0,1,7"] {
        let (quote, signature) = tpm.quote(banks, &binding);
        let bank = Err(EvidenceError::Quote(QuoteError::Bank));
        assert_eq!(judge(quote, signature), bank, "{banks}");
    }
    let text = binding.to_string();
    let words = ["-c", "0x81010001", "-g", "sha256", "-q", &text[7..]];
    let out = ["--attestation", "time", "-o", "time.sig"];
    tpm.run("gettime", &[&words[..], &out].concat());
    let read = |name| fs::read(tpm.path(name)).unwrap();
    let time = judge(read("time"), read("time.sig"));
    assert_eq!(
        time,
        Err(EvidenceError::Quote(QuoteError::NotQuote(0x8019)))
    );
}

#[test]
fn a_host_that_was_started_again_is_noticed() {
    let mut tpm = Tpm::new();
    let resets = |tpm: &Tpm| {
        let claims = tpm.verify(tpm.answer(&challenge()), REGISTERS).unwrap();
        claims.quote().reset_count
    };
    let before = resets(&tpm);
    tpm.run("shutdown", &["-c"]);
    tpm.stop();
    tpm.start();
    assert_eq!(resets(&tpm), before + 1);
}
