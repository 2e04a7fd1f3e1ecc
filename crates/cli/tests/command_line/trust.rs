//! `palanquin policy` and `palanquin passport`, as a provider and an owner use them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::agent::{Told, run};

const OWNER: &str = "spiffe://example.org/owner/acme";

/// A directory of its own, with a copy of the policies that are shipped.
struct Desk {
    dir: tempfile::TempDir,
}

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/policy")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, to).unwrap();
        }
    }
}

impl Desk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(&shipped(), &dir.path().join("policy"));
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// Replaces a text in a file, where it must be.
    fn change(&self, name: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.path(name)).unwrap();
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        fs::write(self.path(name), changed).unwrap();
    }

    fn policy(&self, words: &[&str]) -> Told {
        let dir = self.path("policy");
        run(&[&["policy", words[0], &dir][..], &words[1..]].concat())
    }

    fn keygen(&self, name: &str) {
        let owner = format!("spiffe://example.org/owner/{name}");
        let told = run(&["passport", "keygen", &owner, "--out", &self.path("keys")]);
        assert_eq!(told.status, Some(0), "{told:?}");
    }

    fn sign(&self, spec: &str, out: &str, more: &[&str]) -> Told {
        let (spec, key, out) = (self.path(spec), self.path("keys/acme.key"), self.path(out));
        let words = ["passport", "sign", &spec, "--key", &key, "--out", &out];
        run(&[&words[..], more].concat())
    }

    fn verify(&self, file: &str, key: &str, more: &[&str]) -> Told {
        let (file, key) = (self.path(file), self.path(key));
        let words = ["passport", "verify", &file, "--owner", OWNER, "--key", &key];
        run(&[&words[..], more].concat())
    }
}

#[test]
fn the_policies_that_are_shipped_pass_their_tests_and_each_decides_in_one() {
    let dir = shipped();
    let told = run(&["policy", "check", dir.to_str().unwrap()]);
    assert_eq!(told.status, Some(0), "{told:?}");
    let told = run(&["--json", "policy", "test", dir.to_str().unwrap()]);
    assert_eq!(told.status, Some(0), "{told:?}");
    let report: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(report["failed"], 0);
    assert_eq!(report["untested"], Value::Array(vec![]));
    assert!(report["tests"].as_array().unwrap().len() > 20);
}

#[test]
fn a_rule_that_is_left_out_is_noticed_by_the_tests() {
    for file in [
        "two-person.cedar",
        "legal-hold.cedar",
        "hosts.cedar",
        "maintenance.cedar",
        "operators.cedar",
    ] {
        let desk = Desk::new();
        fs::remove_file(desk.path(&format!("policy/{file}"))).unwrap();
        let told = desk.policy(&["test"]);
        assert_eq!(told.status, Some(2), "{file}: {told:?}");
        assert!(
            told.stdout.contains("FAILED") && told.stderr.contains("failed"),
            "{told:?}"
        );
    }
}

#[test]
fn everything_that_is_wrong_with_policies_is_told_at_once() {
    let desk = Desk::new();
    desk.change(
        "policy/hosts.cedar",
        "context.target.quarantined",
        "context.target.quarantine",
    );
    desk.change(
        "policy/two-person.cedar",
        "context.approvals >= 1",
        "context.approvals >= \"1\"",
    );
    desk.change(
        "policy/directory.toml",
        "region = \"fr\"",
        "regoin = \"fr\"",
    );
    let told = desk.policy(&["check"]);
    assert_eq!(told.status, Some(2), "{told:?}");
    for expected in [
        "hosts.cedar: ",
        "two-person.cedar: ",
        "directory.toml: ",
        "regoin",
        "hint: ",
    ] {
        assert!(
            told.stderr.contains(expected),
            "{expected}: {}",
            told.stderr
        );
    }
    // What can't be used is not used by the other commands either.
    assert_eq!(desk.policy(&["test"]).status, Some(2));
}

#[test]
fn a_refusal_is_explained_down_to_the_condition() {
    let desk = Desk::new();
    let told = desk.policy(&["explain", "a secret VM needs a second person"]);
    assert_eq!(told.status, Some(0), "{told:?}");
    for expected in [
        "Refused: spiffe://example.org/operator/alice may not migrateOut",
        "remedy: Let a security officer sign",
        "two-persons-for-secret-vms (two-person.cedar) forbids it",
        "when   resource.sensitivity >= 3  -> true",
        "unless context.approvals >= 1  -> false",
    ] {
        assert!(
            told.stdout.contains(expected),
            "{expected}: {}",
            told.stdout
        );
    }
    let told = desk.policy(&["explain", "no such"]);
    assert_eq!(told.status, Some(2));
    assert!(
        told.stderr.contains("there is no case \"no such\""),
        "{told:?}"
    );
}

#[test]
fn a_passport_is_signed_shown_and_verified() {
    let desk = Desk::new();
    desk.keygen("acme");
    let told = desk.sign("policy/passports/vault.toml", "vault.passport", &[]);
    assert_eq!(told.status, Some(0), "{told:?}");
    let told = run(&["passport", "show", &desk.path("vault.passport")]);
    assert!(
        told.stdout.contains(OWNER) && told.stdout.contains("Nobody has checked"),
        "{told:?}"
    );
    let vm = "7a1c0000-0000-4000-8000-000000000002";
    let told = desk.verify("vault.passport", "keys/acme.pub", &["--vm", vm, "--json"]);
    assert_eq!(told.status, Some(0), "{told:?}");
    let verified: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(
        (&verified["verified"], &verified["passport"]["vm"]),
        (&true.into(), &vm.into())
    );
    // A signed passport in a case.
    let (passport, key) = (desk.path("vault.passport"), desk.path("keys/acme.pub"));
    let words = ["--passport", &passport, "--owner", OWNER, "--key", &key];
    let told = desk.policy(&[&["explain", "what is held stays"][..], &words].concat());
    assert!(told.stdout.contains("passport-other-vm"), "{told:?}");
}

#[test]
fn each_passport_that_is_refused_is_refused_for_its_reason() {
    let desk = Desk::new();
    desk.keygen("acme");
    desk.keygen("globex");
    let spec = "policy/passports/vault.toml";
    assert_eq!(desk.sign(spec, "good", &[]).status, Some(0));
    let refused = |file: &str, key: &str, more: &[&str], code: &str| {
        let told = desk.verify(file, key, more);
        assert_eq!(told.status, Some(3), "{code}: {told:?}");
        assert!(told.stderr.contains(code), "{code}: {told:?}");
    };
    refused("good", "keys/globex.pub", &[], "key-unknown");
    let other = "00000000-0000-4000-8000-000000000000";
    refused(
        "good",
        "keys/acme.pub",
        &["--vm", other],
        "it is the passport of VM",
    );
    let mut bytes = fs::read(desk.path("good")).unwrap();
    bytes[150] ^= 1;
    fs::write(desk.path("altered"), bytes).unwrap();
    refused("altered", "keys/acme.pub", &[], "signature-invalid");
    desk.change(spec, "version = 4", "version = 3");
    assert_eq!(desk.sign(spec, "older", &[]).status, Some(0));
    refused(
        "older",
        "keys/acme.pub",
        &["--known", &desk.path("good")],
        "passport-not-newest",
    );
    let date = |ago_s: u64| {
        let time = SystemTime::now() - Duration::from_secs(ago_s);
        let time = time::OffsetDateTime::from(time);
        let (year, month, day) = (time.year(), u8::from(time.month()), time.day());
        format!("{year}-{month:02}-{day:02}T00:00:00Z")
    };
    desk.change(
        spec,
        "expires = 2028-01-01T00:00:00Z",
        &format!("expires = {}", date(3 * 86400)),
    );
    desk.change(
        spec,
        "not-before = 2026-01-01T00:00:00Z",
        &format!("not-before = {}", date(9 * 86400)),
    );
    assert_eq!(desk.sign(spec, "expired", &[]).status, Some(0));
    refused("expired", "keys/acme.pub", &[], "expired");
    fs::write(desk.path("nonsense"), "nonsense").unwrap();
    let told = desk.verify("nonsense", "keys/acme.pub", &[]);
    assert_eq!(told.status, Some(2), "{told:?}");
}

#[test]
fn versions_of_a_passport_grow_and_nothing_is_overwritten() {
    let desk = Desk::new();
    desk.keygen("acme");
    let spec = "policy/passports/web.toml";
    assert_eq!(desk.sign(spec, "1", &[]).status, Some(0));
    let told = desk.sign(spec, "1", &[]);
    assert!(
        told.status == Some(2) && told.stderr.contains("nothing is overwritten"),
        "{told:?}"
    );
    let (first, second) = (desk.path("1"), desk.path("2"));
    let told = desk.sign(spec, "2", &["--replaces", &first]);
    assert_eq!(told.status, Some(2), "the same version again: {told:?}");
    desk.change(spec, "version = 1", "version = 2");
    assert_eq!(
        desk.sign(spec, "2", &["--replaces", &first]).status,
        Some(0)
    );
    assert_eq!(
        desk.verify("2", "keys/acme.pub", &["--known", &first])
            .status,
        Some(0)
    );
    assert_eq!(
        desk.verify("1", "keys/acme.pub", &["--known", &second])
            .status,
        Some(3)
    );
}

#[test]
fn a_key_that_others_can_read_does_not_sign() {
    use std::os::unix::fs::PermissionsExt;
    let desk = Desk::new();
    desk.keygen("acme");
    let key = desk.path("keys/acme.key");
    assert_eq!(
        fs::metadata(&key).unwrap().permissions().mode() & 0o777,
        0o600
    );
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    let told = desk.sign("policy/passports/web.toml", "out", &[]);
    assert!(
        told.status == Some(2) && told.stderr.contains("chmod 600"),
        "{told:?}"
    );
    assert!(!Path::new(&desk.path("out")).exists());
    let told = run(&["passport", "keygen", "spiffe://example.org/host/acme"]);
    assert!(
        told.status == Some(2) && told.stderr.contains("is no owner"),
        "{told:?}"
    );
}
