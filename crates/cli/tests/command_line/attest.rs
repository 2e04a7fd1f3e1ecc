//! `palanquin attest`, as a host and a provider use it, with TPMs by `swtpm`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use palanquin_lab::tpm::Swtpm;
use palanquin_trust::enrolment::Enrolled;

use crate::agent::{Told, run};

const HOST: &str = "spiffe://example.org/host/beta";

/// A host with a TPM that its manufacturer has certified, and a provider's desk.
struct Desk {
    /// Ended before the directory goes in which its process is named: fields are dropped in order.
    tpm: Swtpm,
    dir: tempfile::TempDir,
}

impl Desk {
    fn new(certified: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("tpm");
        if certified {
            Swtpm::manufacture(&state, &dir.path().join("maker")).unwrap();
        }
        let tpm = Swtpm::start(state).unwrap();
        Self { dir, tpm }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn request(&self, more: &[&str]) -> Told {
        let (key, out, tpm) = (self.path("key"), self.path("request"), self.tpm.tcti());
        let words = [
            "attest", "request", "--host", HOST, "--tpm", &tpm, "--key", &key, "--out", &out,
        ];
        run(&[&words[..], &["--registers", "0,7"], more].concat())
    }

    fn challenge(&self, whose: &[&str]) -> Told {
        for name in ["question", "pending"] {
            let _ = fs::remove_file(self.path(name));
        }
        let (request, out) = (self.path("request"), self.path("question"));
        let pending = self.path("pending");
        let words = [
            "attest",
            "challenge",
            &request,
            "--out",
            &out,
            "--pending",
            &pending,
        ];
        run(&[&words[..], whose].concat())
    }

    fn answer(&self, tpm: &Swtpm, key: &str) -> Told {
        let _ = fs::remove_file(self.path("answer"));
        let (question, request, tpm) = (self.path("question"), self.path("request"), tpm.tcti());
        let (key, out, log) = (self.path(key), self.path("answer"), self.path("no-log"));
        let words = [
            "attest",
            "answer",
            &question,
            "--request",
            &request,
            "--tpm",
            &tpm,
        ];
        run(&[
            &words[..],
            &["--key", &key, "--event-log", &log, "--out", &out],
        ]
        .concat())
    }

    fn accept(&self, more: &[&str]) -> Told {
        let (pending, answer) = (self.path("pending"), self.path("answer"));
        let out = self.path("beta.toml");
        let words = ["attest", "accept", &pending, &answer, "--out", &out];
        run(&[&words[..], more].concat())
    }
}

fn good(told: Told) -> Told {
    assert_eq!(told.status, Some(0), "{told:?}");
    told
}

#[test]
fn a_host_whose_tpm_is_certified_is_enrolled_without_a_tpm_at_the_provider() {
    let desk = Desk::new(true);
    desk.tpm.extend(7, [0xab; 32]).unwrap();
    let issuer = desk.path("maker/issuercert.pem");
    let root = desk.path("maker/swtpm-localca-rootca-cert.pem");
    let told = good(desk.request(&["--certificates", &issuer]));
    assert!(told.stdout.contains("The TPM has certificate"), "{told:?}");
    assert_eq!(
        fs::metadata(desk.path("key")).unwrap().permissions().mode() & 0o777,
        0o600
    );
    // By the root, through the certificate between, and by the issuer itself.
    good(desk.challenge(&["--host", HOST, "--ca", &root]));
    good(desk.challenge(&["--host", HOST, "--ca", &issuer]));
    good(desk.answer(&desk.tpm, "key"));
    let told = good(desk.accept(&[]));
    assert!(told.stdout.contains("register  7  Secure Boot"), "{told:?}");
    let enrolled = fs::read_to_string(desk.path("beta.toml")).unwrap();
    let enrolled = Enrolled::from_toml(&enrolled).unwrap();
    assert_eq!(
        (enrolled.host.to_string().as_str(), enrolled.register.len()),
        (HOST, 2)
    );
    // The same key again, where it is there already.
    fs::remove_file(desk.path("request")).unwrap();
    let key = fs::read(desk.path("key")).unwrap();
    good(desk.request(&[]));
    assert_eq!(fs::read(desk.path("key")).unwrap(), key);
    // Without the certificate between nobody is believed.
    let told = desk.challenge(&["--host", HOST, "--ca", &root]);
    assert_eq!(told.status, Some(3), "{told:?}");
    assert!(told.stderr.contains("nobody who is believed"), "{told:?}");
}

#[test]
fn a_tpm_without_a_certificate_is_told_by_its_fingerprint() {
    let desk = Desk::new(false);
    let told = good(desk.request(&["--json", "--endorsement", "ecc"]));
    let told: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    let fingerprint = told["endorsement_key"].as_str().unwrap();
    assert_eq!(told["has_certificate"], false);
    let other = format!("sha256:{}", "0".repeat(64));
    let told = desk.challenge(&["--host", HOST, "--fingerprint", &other]);
    assert_eq!(told.status, Some(3), "{told:?}");
    let evil = "spiffe://example.org/host/evil";
    let told = desk.challenge(&["--host", evil, "--fingerprint", fingerprint]);
    assert_eq!(told.status, Some(3), "{told:?}");
    // Whose it is has to be said somehow.
    assert_eq!(desk.challenge(&["--host", HOST]).status, Some(2));
    good(desk.challenge(&["--host", HOST, "--fingerprint", fingerprint]));
    good(desk.answer(&desk.tpm, "key"));
    good(desk.accept(&[]));
}

#[test]
fn another_tpm_can_not_answer_and_an_old_answer_is_none() {
    let (desk, other) = (Desk::new(false), Desk::new(false));
    let told = good(desk.request(&["--json"]));
    good(other.request(&[]));
    let told: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    let whose = [
        "--host",
        HOST,
        "--fingerprint",
        told["endorsement_key"].as_str().unwrap(),
    ];
    good(desk.challenge(&whose));
    fs::copy(other.path("key"), desk.path("other-key")).unwrap();
    let told = desk.answer(&other.tpm, "other-key");
    assert_eq!(told.status, Some(3), "{told:?}");
    assert!(told.stderr.contains("tpm-foreign"), "{told:?}");
    good(desk.answer(&desk.tpm, "key"));
    let answer = fs::read(desk.path("answer")).unwrap();
    // Asked again, the answer to the first question is none.
    good(desk.challenge(&whose));
    fs::write(desk.path("answer"), answer).unwrap();
    let told = desk.accept(&[]);
    assert_eq!(told.status, Some(3), "{told:?}");
    assert!(fs::metadata(desk.path("beta.toml")).is_err());
}

#[test]
fn registers_that_are_not_as_wanted_are_named_with_what_to_do() {
    let desk = Desk::new(false);
    let told = good(desk.request(&["--json"]));
    let told: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    let whose = [
        "--host",
        HOST,
        "--fingerprint",
        told["endorsement_key"].as_str().unwrap(),
    ];
    good(desk.challenge(&whose));
    good(desk.answer(&desk.tpm, "key"));
    let (zero, one) = ("0".repeat(64), "1".repeat(64));
    let wanted = desk.path("wanted.toml");
    let write = |seven: &str| {
        let text = format!(
            "[[register]]\nnumber = 0\nallowed = [\"sha256:{zero}\"]\n[[register]]\nnumber = 7\nallowed = [\"sha256:{seven}\"]\n"
        );
        fs::write(&wanted, text).unwrap();
    };
    write(&one);
    let told = desk.accept(&["--registers", &wanted]);
    assert_eq!(told.status, Some(3), "{told:?}");
    assert!(told.stderr.contains("register 7 (Secure Boot"), "{told:?}");
    assert!(told.stderr.contains("remedy: "), "{told:?}");
    write(&zero);
    good(desk.accept(&["--registers", &wanted]));
}

#[test]
fn a_key_is_sealed_only_where_nobody_else_can_read_it() {
    let desk = Desk::new(false);
    let (file, out, tpm) = (desk.path("secret"), desk.path("sealed"), desk.tpm.tcti());
    fs::write(&file, "-----BEGIN PRIVATE KEY-----\n").unwrap();
    let seal = |file: &str, out: &str| run(&["attest", "seal", file, "--tpm", &tpm, "--out", out]);
    let mode = |mode| fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    let told = seal(&file, &out);
    assert!(
        told.status == Some(2) && told.stderr.contains("chmod 600"),
        "{told:?}"
    );
    mode(0o600);
    good(seal(&file, &out));
    let sealed = fs::read_to_string(&out).unwrap();
    assert!(sealed.starts_with("{\"palanquin-sealed\":1,") && !sealed.contains("PRIVATE"));
    let told = seal(&out, &desk.path("twice"));
    assert!(
        told.status == Some(2) && told.stderr.contains("sealed already"),
        "{told:?}"
    );
    let told = run(&[
        "attest",
        "seal",
        &file,
        "--tpm",
        "device:/none",
        "--out",
        &desk.path("x"),
    ]);
    assert!(told.stderr.contains("tpm-unreachable"), "{told:?}");
}
