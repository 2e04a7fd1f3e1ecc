//! `palanquin ca` and `palanquin config check`, together as an operator uses them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use palanquin_api::config::AgentConfig;
use palanquin_api::vm_spec::VmSpec;
use serde_json::Value;

use crate::agent::{Told, run};

/// An authority with certificates for hosts `alpha` and `beta`, and a configuration of `alpha`.
struct Site {
    dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let site = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        site.authority("ca");
        for host in ["alpha", "beta"] {
            site.issue("ca", "host", host);
        }
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn authority(&self, name: &str) {
        let told = run(&["ca", "init", self.path(name).to_str().unwrap()]);
        assert_eq!(told.status, Some(0), "{told:?}");
    }

    fn issue(&self, authority: &str, kind: &str, name: &str) {
        let (dir, out) = (
            self.path(authority),
            self.path(&format!("{authority}-{name}")),
        );
        let words = [
            "--dir",
            dir.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ];
        let told = run(&[&["ca", "issue", kind, name][..], &words[..]].concat());
        assert_eq!(told.status, Some(0), "{told:?}");
    }

    /// Checks a configuration with these files in it.
    fn check(&self, name: &str, ca: &str, certificate: &str, key: &str) -> Told {
        let text = format!(
            "name = {name:?}\n[tls]\nca = {:?}\ncertificate = {:?}\nkey = {:?}\n[qemu]\nbinary = \"/bin/sh\"\n",
            self.path(ca),
            self.path(certificate),
            self.path(key)
        );
        fs::write(self.config(), text).unwrap();
        run(&["config", "check", self.config().to_str().unwrap()])
    }

    fn config(&self) -> PathBuf {
        self.path("agent.toml")
    }
}

#[test]
fn what_was_issued_passes_the_check() {
    let site = Site::new();
    let told = site.check(
        "alpha",
        "ca-alpha/ca.pem",
        "ca-alpha/alpha.pem",
        "ca-alpha/alpha.key",
    );
    let config = site.config();
    assert_eq!(
        told.all(),
        format!(
            "{} is good.\n--- stderr\n--- exit status 0\n",
            config.display()
        )
    );
    let told = run(&["--json", "config", "check", config.to_str().unwrap()]);
    assert_eq!(
        serde_json::from_str::<Value>(&told.stdout).unwrap()["good"],
        true
    );
}

#[test]
fn every_mistake_with_a_certificate_is_named() {
    let site = Site::new();
    site.authority("other");
    site.issue("other", "host", "alpha");
    site.issue("ca", "operator", "alice");
    fs::set_permissions(
        site.path("other-alpha/alpha.key"),
        fs::Permissions::from_mode(0o640),
    )
    .unwrap();
    let (ca, leaf, key) = (
        "ca-alpha/ca.pem",
        "ca-alpha/alpha.pem",
        "ca-alpha/alpha.key",
    );
    for (name, ca, leaf, key, said) in [
        (
            "beta",
            ca,
            leaf,
            key,
            "`tls.certificate`: it names [\"spiffe://palanquin.internal/host/alpha\"], and `name` says \"beta\"",
        ),
        (
            "alpha",
            "other/ca.pem",
            leaf,
            key,
            "`tls.certificate`: it was not issued by the authority in `tls.ca`",
        ),
        (
            "alpha",
            leaf,
            leaf,
            key,
            "`tls.ca`: it is not an authority's",
        ),
        (
            "alpha",
            ca,
            leaf,
            "ca-beta/beta.key",
            "`tls.key`: it is not the key of `tls.certificate`",
        ),
        (
            "alpha",
            ca,
            leaf,
            "other-alpha/alpha.key",
            "is open to others than its owner (chmod 600 ",
        ),
        (
            "alice",
            ca,
            "ca-alice/alice.pem",
            "ca-alice/alice.key",
            "`tls.certificate`: it is not for both ends of a connection",
        ),
        ("alpha", ca, "none.pem", key, "No such file or directory"),
        ("alpha", ca, key, key, "`tls.certificate`"),
        ("alpha", ca, leaf, leaf, "no private key in it"),
    ] {
        let told = site.check(name, ca, leaf, key);
        assert!(
            told.status == Some(2) && told.stderr.contains(said),
            "{said}: {told:?}"
        );
    }
}

#[test]
fn mistakes_in_the_file_and_in_what_it_names_are_told_together() {
    let site = Site::new();
    fs::write(
        site.config(),
        "name = \"-\"\nstate-dir = \"here\"\n[tls]\nca = \"/no/ca\"\ncertificate = \"/no/crt\"\nkey = \"/no/key\"\n\
         [limits]\nmax-inbound = 0\n[qemu]\nbinary = \"/no/qemu\"\nallowed-paths = [\"/no/images\"]\n",
    )
    .unwrap();
    let path = site.config();
    assert_eq!(
        run(&["config", "check", path.to_str().unwrap()]).all(),
        format!(
            "--- stderr\n\
             error: {} is not usable\n\
             \x20 cause: `name`: \"-\" is no name for a host ({})\n\
             \x20 cause: `state-dir`: \"here\" is not usable (an absolute path without commas and control characters)\n\
             \x20 cause: `limits.max-inbound`: 0 is out of bounds (1 to 64)\n\
             \x20 cause: `tls.key`: /no/key: No such file or directory (os error 2)\n\
             \x20 cause: `tls.ca`: /no/ca: No such file or directory (os error 2)\n\
             \x20 cause: `tls.certificate`: /no/crt: No such file or directory (os error 2)\n\
             \x20 cause: `qemu.binary`: there is no /no/qemu (install QEMU, or name its binary)\n\
             \x20 cause: `qemu.allowed-paths[0]`: there is no /no/images (make it, or leave it out)\n\
             --- exit status 2\n",
            path.display(),
            palanquin_api::config::HOST_NAME_RULE,
        )
    );
}

#[test]
fn an_authority_is_never_made_over_another() {
    let site = Site::new();
    let ca = site.path("ca");
    let before = fs::read(ca.join("ca.key")).unwrap();
    let told = run(&["ca", "init", ca.to_str().unwrap()]);
    assert_eq!(
        told.all(),
        format!(
            "--- stderr\n\
             error: there is an authority in {} already\n\
             \x20 cause: it holds ca.key\n\
             \x20 hint: nothing is overwritten: choose another directory\n\
             --- exit status 2\n",
            ca.display()
        )
    );
    assert_eq!(fs::read(ca.join("ca.key")).unwrap(), before);
}

#[test]
fn issuing_without_an_authority_says_how_to_make_one() {
    let site = Site::new();
    let dir = site.path("nowhere");
    let told = run(&["ca", "issue", "host", "x", "--dir", dir.to_str().unwrap()]);
    assert_eq!(
        told.all(),
        format!(
            "--- stderr\n\
             error: cannot read {}/ca.pem\n\
             \x20 cause: No such file or directory (os error 2)\n\
             \x20 hint: `palanquin ca init DIR` makes an authority; --dir names it\n\
             --- exit status 2\n",
            dir.display()
        )
    );
}

#[test]
fn the_examples_are_good() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let mut count = 0;
    for entry in fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        // Policies and what is watched have tests of their own.
        if path.is_dir() || ["inside.toml", "watch.toml"].contains(&&name[..]) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let is_agent = name.starts_with("agent-");
        if is_agent {
            AgentConfig::from_toml(&text).unwrap();
        } else {
            VmSpec::from_toml(&text).unwrap();
        }
        count += 1;
    }
    assert!(count >= 3);
}
