//! A rig whose hosts judge: each by its own policies, with one owner and some operators.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use palanquin_api::control::GateDecision;
use uuid::Uuid;

use crate::control;
use crate::host::Host;
use crate::rig::{Rig, RigSpec, palanquin};
use crate::tpm::Swtpm;

/// Trust domain of a rig's authority.
pub const DOMAIN: &str = "palanquin.internal";

/// Policies that let the owner's operators do everything.
pub const PERMISSIVE: &str = r#"
@id("operators-move")
permit (
  principal in Role::"migrator",
  action in [Action::"migrateOut", Action::"migrateIn", Action::"adopt", Action::"abort", Action::"erase"],
  resource
)
when { principal.tenants.contains(resource.tenant) };
"#;

/// A rig whose hosts judge.
#[derive(Debug)]
pub struct JudgingRig {
    /// The rig.
    pub rig: Rig,
    owner: PathBuf,
    approver: PathBuf,
    /// Of each host, where they attest.
    pub tpms: Vec<Swtpm>,
    /// A program that hosts run which are refused for their state, and its arguments.
    pub hook: Option<Vec<String>>,
}

/// An identity in the rig's trust domain.
pub fn identity(kind: &str, name: &str) -> String {
    format!("spiffe://{DOMAIN}/{kind}/{name}")
}

impl JudgingRig {
    /// Two hosts with [`PERMISSIVE`] policies; whoever is root is operator alice, of the owner acme. Operator mallory
    /// works for another owner, and bob is a security officer.
    ///
    /// # Errors
    ///
    /// If a part is missing.
    pub fn new() -> Result<Self> {
        let rig = Rig::without_agents(&RigSpec::default())?;
        let keys = rig.dir().join("keys");
        let acme = identity("owner", "acme");
        let shown = keys.display().to_string();
        palanquin(&["passport", "keygen", &acme, "--out", &shown])?.expect_status(0)?;
        let approver = rig.issue("ca", "operator", "bob")?;
        let mut judging = Self {
            rig,
            owner: keys,
            approver,
            tpms: Vec::new(),
            hook: None,
        };
        for index in 0..judging.rig.hosts.len() {
            fs::create_dir(judging.policies(index))?;
            fs::write(judging.policies(index).join("directory.toml"), DIRECTORY)?;
            judging.set_policies(index, PERMISSIVE)?;
            judging.set_operator(index, "alice")?;
            judging.rig.hosts[index].start_agent()?;
        }
        Ok(judging)
    }

    /// The same where each host has a TPM and has enrolled the others, and itself where asked to; registers 0 and 7 are
    /// quoted.
    ///
    /// # Errors
    ///
    /// If a part is missing.
    pub fn attesting(know_themselves: bool) -> Result<Self> {
        let mut judging = Self::new()?;
        for index in 0..judging.rig.hosts.len() {
            let host = &judging.rig.hosts[index];
            let tpm = Swtpm::start_in(&host.namespace, host.dir().join("tpm"))?;
            judging.tpms.push(tpm);
            judging.enrol(index, know_themselves)?;
        }
        for index in 0..judging.rig.hosts.len() {
            judging.set_operator(index, "alice")?;
            let host = &mut judging.rig.hosts[index];
            host.stop_agent()?;
            host.start_agent()?;
        }
        Ok(judging)
    }

    /// Directory of the enrolments that a host knows.
    pub fn enrolled(&self, index: usize) -> PathBuf {
        self.rig.dir().join(format!("enrolled-{index}"))
    }

    /// Makes a host known by its TPM and what that has measured until now.
    fn enrol(&self, index: usize, knows_itself: bool) -> Result<()> {
        let host = &self.rig.hosts[index];
        let name = identity("host", host.name());
        let file = |end: &str| host.dir().join(end).display().to_string();
        let [request, question, pending, answer] =
            ["request", "question", "pending", "answer"].map(file);
        for path in [&request, &question, &pending, &answer] {
            let _ = fs::remove_file(path);
        }
        let (key, tpm) = (file("attestation-key"), self.tpms[index].tcti());
        let tpm = ["--tpm", &tpm, "--key", &key];
        let words = ["attest", "request", "--host", &name, "--out", &request];
        let told = host
            .palanquin_inside(&[&words[..], &["--registers", "0,7"], &tpm].concat())?
            .expect_status(0)?;
        let told: serde_json::Value = serde_json::from_str(&told.stdout)?;
        let fingerprint = told["endorsement_key"].as_str().unwrap_or_default();
        let words = [
            "attest",
            "challenge",
            &request,
            "--host",
            &name,
            "--fingerprint",
            fingerprint,
            "--out",
            &question,
            "--pending",
            &pending,
        ];
        palanquin(&words)?.expect_status(0)?;
        let words = [
            "attest",
            "answer",
            &question,
            "--request",
            &request,
            "--out",
            &answer,
        ];
        host.palanquin_inside(&[&words[..], &tpm].concat())?
            .expect_status(0)?;
        let out = file("enrolment");
        palanquin(&["attest", "accept", &pending, &answer, "--out", &out])?.expect_status(0)?;
        for other in 0..self.rig.hosts.len() {
            let dir = self.enrolled(other);
            fs::create_dir_all(&dir)?;
            if other != index || knows_itself {
                fs::copy(&out, dir.join(format!("{}.toml", host.name())))?;
            }
        }
        Ok(())
    }

    fn attestation(&self, index: usize) -> String {
        let Some(tpm) = self.tpms.get(index) else {
            return String::new();
        };
        let key = self.rig.hosts[index].dir().join("attestation-key");
        let hook = self.hook.as_ref().map_or_else(String::new, |command| {
            format!("[trust.attestation.remediation-hook]\ncommand = {command:?}\n")
        });
        format!(
            "[trust.attestation]\ntpm = {:?}\nkey = {key:?}\nregisters = [0, 7]\nenrolled = {:?}\ndemand = \"always\"\n{hook}",
            tpm.tcti(),
            self.enrolled(index)
        )
    }

    fn policies(&self, index: usize) -> PathBuf {
        self.rig.dir().join(format!("policies-{index}"))
    }

    /// Writes the policies of a host. They count from its agent's next start, or [`Host::reload_agent`].
    ///
    /// # Errors
    ///
    /// If they can't be written.
    pub fn set_policies(&self, index: usize, cedar: &str) -> Result<()> {
        // A reader must not find half of them.
        let new = self.policies(index).join("new");
        fs::write(&new, cedar)?;
        fs::rename(new, self.policies(index).join("all.cedar"))?;
        Ok(())
    }

    /// Writes into a host's configuration which operator root is; it counts from its agent's next start.
    ///
    /// # Errors
    ///
    /// If it can't be written.
    pub fn set_operator(&mut self, index: usize, name: &str) -> Result<()> {
        let policies = self.policies(index);
        let (acme, bob) = (identity("owner", "acme"), identity("operator", "bob"));
        let trust = format!(
            "[trust]\npolicies = {policies:?}\n\
             [trust.owners]\n{acme:?} = [{:?}]\n\
             [trust.approvers]\n{bob:?} = [{:?}]\n\
             [trust.operators]\nroot = {:?}\n{}",
            self.owner.join("acme.pub"),
            self.approver.join("bob.pem"),
            identity("operator", name),
            self.attestation(index),
        );
        let host = &mut self.rig.hosts[index];
        host.spec.trust = Some(trust);
        host.write_config()
    }

    /// Signs a passport of that version as the owner; gives the file. `more` are further lines of its specification.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn passport(&self, vm: Uuid, version: u64, more: &str) -> Result<String> {
        self.passport_by(&self.owner, vm, version, "2100-01-01", more)
    }

    /// The same with the owner's key in that directory, which others may not know, good until that day.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn passport_by(
        &self,
        keys: &Path,
        vm: Uuid,
        version: u64,
        until: &str,
        more: &str,
    ) -> Result<String> {
        let acme = identity("owner", "acme");
        let spec = keys.join(format!("{vm}-{version}.toml"));
        let out = keys.join(format!("{vm}-{version}.passport"));
        let text = format!(
            "vm = \"{vm}\"\nowner = {acme:?}\nversion = {version}\nnot-before = 2020-01-01T00:00:00Z\n\
             expires = {until}T00:00:00Z\nsensitivity = 1\n{more}"
        );
        fs::write(&spec, text)?;
        let key = keys.join("acme.key");
        let [spec, key, out] = [spec, key, out].map(|path| path.display().to_string());
        let words = ["passport", "sign", &spec, "--key", &key, "--out", &out];
        palanquin(&words)?.expect_status(0)?;
        Ok(out)
    }

    /// Gives the owner another key, in which no passport until now was signed. It counts from an agent's next start, or
    /// [`Host::reload_agent`].
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn replace_owner_key(&self) -> Result<()> {
        let keys = self.unknown_owner()?;
        fs::copy(keys.join("acme.pub"), self.owner.join("acme.pub"))?;
        Ok(())
    }

    /// Makes another key of the owner, which no host knows; gives its directory, for [`Self::passport_by`].
    ///
    /// # Errors
    ///
    /// If it can't be made.
    pub fn unknown_owner(&self) -> Result<PathBuf> {
        let keys = self.rig.dir().join("keys-of-nobody");
        let (acme, shown) = (identity("owner", "acme"), keys.display().to_string());
        palanquin(&["passport", "keygen", &acme, "--out", &shown])?.expect_status(0)?;
        Ok(keys)
    }

    /// Signs as bob that the VM may move from one host to the other; gives the file.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn approval(&self, vm: Uuid, from: usize, to: usize) -> Result<String> {
        self.approval_by("bob", &self.approver, vm, from, to)
    }

    /// The same as that operator, with the key in that directory.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn approval_by(
        &self,
        name: &str,
        keys: &Path,
        vm: Uuid,
        from: usize,
        to: usize,
    ) -> Result<String> {
        let host = |index: usize| identity("host", self.rig.hosts[index].name());
        let out = keys.join(format!("{vm}.approval"));
        let key = keys.join(format!("{name}.key"));
        let [key, out] = [key, out].map(|path| path.display().to_string());
        let (operator, vm) = (identity("operator", name), vm.to_string());
        let words = [
            "approval",
            "sign",
            "--operator",
            &operator,
            "--key",
            &key,
            "--vm",
            &vm,
            "--from",
            &host(from),
            "--to",
            &host(to),
            "--out",
            &out,
        ];
        palanquin(&words)?.expect_status(0)?;
        Ok(out)
    }
}

/// What the gates of a host have decided, oldest first.
///
/// # Errors
///
/// If its agent does not answer.
pub fn decisions(host: &Host) -> Result<Vec<GateDecision>> {
    control::get(&host.socket(), "/v1/decisions")
}

const DIRECTORY: &str = r#"version = 1
roles = ["migrator", "security-officer"]
[operators."spiffe://palanquin.internal/operator/alice"]
roles = ["migrator"]
tenants = ["spiffe://palanquin.internal/owner/acme"]
[operators."spiffe://palanquin.internal/operator/mallory"]
roles = ["migrator"]
tenants = ["spiffe://palanquin.internal/owner/globex"]
[operators."spiffe://palanquin.internal/operator/bob"]
roles = ["security-officer"]
[hosts."spiffe://palanquin.internal/host/a"]
[hosts."spiffe://palanquin.internal/host/b"]
[hosts."spiffe://palanquin.internal/host/c"]
"#;
