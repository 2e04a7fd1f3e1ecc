//! What hosts show each other, and what this one makes of it.
//!
//! Asked for after the mutual TLS handshake and bound to it (`docs/attestation.md`). What cannot be shown is left out: who
//! wants to see it refuses.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use palanquin_api::attestation::{Attestation, Demand, RemediationHook};
use palanquin_engine::ids::Challenge32;
use palanquin_engine::{MigrationId, Order, VmId};
use palanquin_host::measure::{Empty, Meter};
use palanquin_host::vm::{Handle, Obstacle};
use palanquin_trust::decision::{Gate, Reason};
use palanquin_trust::evidence::{Challenge, Measured, Role};
use palanquin_trust::{Identity, Sha256, VerifiedClaims};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::{GateError, Gatekeeper};
use crate::agent::Agent;
use crate::attest::remedy::{Quarantine, Quarantined, run_hook};
use crate::attest::{AttestError, Attester, Verifier, measured};
use crate::chain::chain;
use crate::channel::Channel;

/// What a host is asked: on which connection, about which migration.
#[derive(Clone, Debug)]
pub struct Question {
    nonce: Challenge32,
    exporter: [u8; 32],
    vm: Uuid,
    migration: Uuid,
    order_sha256: Sha256,
}

impl Question {
    /// About a migration, on its connection.
    pub fn new(nonce: Challenge32, channel: &Channel, order: &Order, order_sha256: Sha256) -> Self {
        Self::on(
            nonce,
            *channel.exporter(),
            order.migration,
            order.vm,
            order_sha256,
        )
    }

    pub(super) fn on(
        nonce: Challenge32,
        exporter: [u8; 32],
        migration: MigrationId,
        vm: VmId,
        order_sha256: Sha256,
    ) -> Self {
        Self {
            nonce,
            exporter,
            vm: Uuid::from_bytes(vm.0),
            migration: Uuid::from_bytes(migration.0),
            order_sha256,
        }
    }

    fn to(&self, host: &Identity, role: Role) -> Challenge {
        Challenge {
            nonce: self.nonce.0,
            exporter: self.exporter,
            host: host.clone(),
            role,
            vm: self.vm,
            migration: self.migration,
            order_sha256: self.order_sha256,
        }
    }
}

/// This host's TPM, what is known of those of others, and what a hypervisor is measured with.
pub(super) struct Showing {
    attester: Attester,
    /// What the enrolments were read by; absent where nothing is shown and nobody looked at.
    config: Option<Attestation>,
    /// Never changed, only replaced.
    verifier: Mutex<Option<Arc<Verifier>>>,
    quarantine: Quarantine,
    hook: Option<RemediationHook>,
    remedied: Mutex<Option<Instant>>,
    /// Held while what is kept of checks is written.
    keeping: Mutex<()>,
    /// Held while this host shows something to itself for somebody who only wants to know.
    trying: Mutex<()>,
    meter: Arc<Meter>,
}

impl Showing {
    pub(super) fn open(
        config: Option<&Attestation>,
        state_dir: &std::path::Path,
        meter: Arc<Meter>,
    ) -> Result<Self, GateError> {
        let (attester, verifier) = match config {
            Some(config) => {
                let verifier = Verifier::open(config).or_else(|error| {
                    // What runs here has to be recovered all the same.
                    let problem = chain(&error);
                    error!(problem, "enrolments are not usable: no host is known");
                    Verifier::open(&Attestation {
                        enrolled: None,
                        demand: Demand::Always,
                        ..config.clone()
                    })
                });
                (Attester::open(config, state_dir)?, Some(verifier?))
            }
            None => (Attester::none(), None),
        };
        Ok(Self {
            attester,
            config: config.cloned(),
            verifier: Mutex::new(verifier.map(Arc::new)),
            quarantine: Quarantine::default(),
            hook: config.and_then(|config| config.remediation_hook.clone()),
            remedied: Mutex::default(),
            keeping: Mutex::default(),
            trying: Mutex::default(),
            meter,
        })
    }

    /// Hosts that failed a check.
    pub(super) fn quarantine(&self) -> &Quarantine {
        &self.quarantine
    }

    /// What hypervisors are measured with.
    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// What is known of other hosts now.
    fn verifier(&self) -> Option<Arc<Verifier>> {
        super::lock(&self.verifier).clone()
    }

    /// Whether evidence of this host is looked at, and can be believed.
    fn looks_at(&self, host: &Identity) -> bool {
        self.verifier().is_some_and(|verifier| verifier.knows(host))
    }

    /// Reads the enrolments again. Those of before stay where the new ones are not usable; what the TPMs have counted stays
    /// known. How many hosts are enrolled; absent where nobody is looked at.
    pub(super) fn reload(&self) -> Result<Option<usize>, AttestError> {
        let Some(config) = &self.config else {
            return Ok(None);
        };
        let new = Verifier::open(config)?;
        let mut verifier = super::lock(&self.verifier);
        if let Some(before) = &*verifier {
            new.remember_resets(&before.resets());
        }
        let count = new.resets().len();
        *verifier = Some(Arc::new(new));
        Ok(Some(count))
    }
}

/// Shortest time between two runs of the hook. One that takes longer than that is not waited for: its deadline is an hour.
const REMEDY_PAUSE: Duration = Duration::from_secs(600);
/// Codes of refusals that are about the state of the host that was asked.
const STATE_CODES: [&str; 2] = ["register-not-allowed", "register-not-told"];

/// This host is not what it has to be, by its own word.
fn own_state(code: &'static str, message: String, remedy: &str) -> Reason {
    Reason::new(Gate::Attestation, code, message, remedy)
}

/// What a refusal by evidence says.
fn reasons(error: &AttestError) -> Vec<Reason> {
    let reason =
        |code, message: String, remedy: &str| Reason::new(Gate::Attestation, code, message, remedy);
    match error.findings() {
        [] => vec![reason(error.code(), chain(error), error.remedy())],
        findings => findings
            .iter()
            .map(|finding| reason(finding.code, finding.to_string(), &finding.remedy))
            .collect(),
    }
}

impl Gatekeeper {
    pub(super) fn showing(&self) -> Option<&Showing> {
        self.judged.as_ref().map(|judged| &judged.showing)
    }

    /// Whether a decision on this target has to wait for what it shows.
    pub(super) fn awaits_evidence(&self, target: &Identity) -> bool {
        self.showing()
            .is_some_and(|showing| showing.looks_at(target))
    }

    /// Hosts whose last check failed.
    pub fn quarantined(&self) -> Vec<Quarantined> {
        self.showing()
            .map(|showing| showing.quarantine.all())
            .unwrap_or_default()
    }

    fn measured(&self, hypervisor: Option<&Handle>, empty: Option<Empty>) -> Option<Measured> {
        let (showing, books) = (self.showing()?, self.books()?);
        let hypervisor = match hypervisor.map(|handle| showing.meter.vm(handle)) {
            None => None,
            Some(Ok(found)) => Some(found),
            // Code that was altered is not to be shown as code that is not known.
            Some(Err(error)) => {
                let problem = chain(&error);
                warn!(
                    problem,
                    "the hypervisor cannot be measured: no evidence is shown"
                );
                return None;
            }
        };
        let policies = &books.policies;
        let version = policies.directory().version;
        Some(measured(
            hypervisor.as_ref(),
            empty,
            version,
            policies.sha256(),
        ))
    }

    /// What this host says about itself, its hypervisor of the VM, and a container that was empty; nothing where it has no
    /// TPM, or that fails. Takes as long as the TPM.
    pub fn evidence(
        &self,
        role: Role,
        question: &Question,
        hypervisor: Option<&Handle>,
        empty: Option<Empty>,
    ) -> Vec<u8> {
        let Some(showing) = self.showing().filter(|showing| showing.attester.has_tpm()) else {
            return Vec::new();
        };
        let Some(measured) = self.measured(hypervisor, empty) else {
            return Vec::new();
        };
        let challenge = question.to(&self.host, role);
        match showing.attester.evidence(&challenge, measured) {
            Ok(evidence) => evidence,
            Err(error) => {
                let problem = chain(&error);
                warn!(problem, "this host shows no evidence");
                Vec::new()
            }
        }
    }

    /// Makes the TPM ready, so that the first evidence takes no longer than others. That may take long, and is no reason
    /// for anybody to wait: what runs here has to be recovered also where the TPM does not answer.
    pub fn warm(&self) {
        let warmed = self.showing().map(|showing| showing.attester.warm());
        if let Some(Err(error)) = warmed {
            let problem = chain(&error);
            error!(
                problem,
                "this host's TPM does not answer: there is no evidence until it does"
            );
        }
    }

    /// Whether this host has something to show, so that making it takes time.
    pub fn shows_something(&self) -> bool {
        self.showing()
            .is_some_and(|showing| showing.attester.has_tpm())
    }
}

impl Agent {
    /// What a host has proven with this answer; nothing where it need not.
    ///
    /// # Errors
    ///
    /// It has to prove something, and did not: everything that is wrong.
    pub(super) fn claims(
        &self,
        host: &Identity,
        role: Role,
        question: &Question,
        evidence: &[u8],
    ) -> Result<Option<VerifiedClaims>, Vec<Reason>> {
        let Some(showing) = self.gate.showing() else {
            return Ok(None);
        };
        let Some(verifier) = showing.verifier() else {
            return Ok(None);
        };
        let wanted = verifier.wants(host);
        if !wanted && !verifier.knows(host) {
            return Ok(None);
        }
        let now = self.unix_s();
        let resets = verifier.resets();
        let verified = verifier.verify(&question.to(host, role), evidence, now);
        let checked = verified.as_ref().map(drop);
        let changed = showing.quarantine.checked(host, checked, now);
        if changed || verifier.resets() != resets {
            self.keep_checks();
        }
        match verified {
            Ok(claims) => Ok(Some(claims)),
            Err(error) if wanted => Err(reasons(&error)),
            Err(error) => {
                let problem = chain(&error);
                info!(%host, problem, "evidence that nobody wants is not believed");
                Ok(None)
            }
        }
    }

    /// What this host would prove to itself: for decisions about what comes here, and where the owner or a policy looks at
    /// that. It protects an honest host from taking what it must not have; others don't rely on it. What only `tried` is
    /// waits for nobody.
    pub(super) fn own_claims(
        self: &Arc<Self>,
        migration: MigrationId,
        vm: VmId,
        order_sha256: Sha256,
        tried: bool,
    ) -> Result<Option<VerifiedClaims>, Vec<Reason>> {
        let host = self.gate.host();
        let Some(showing) = self.gate.showing().filter(|showing| showing.looks_at(host)) else {
            return Ok(None);
        };
        let busy = |_| {
            let message = "somebody else asks this host for evidence just now";
            vec![own_state("evidence-busy", message.to_owned(), "Ask again.")]
        };
        let _turn = match tried {
            true => Some(showing.trying.try_lock().map_err(busy)?),
            false => None,
        };
        let nonce = crate::challenge::fresh().map_err(|error| {
            let remedy = "Look at the agent's log.";
            vec![own_state("no-randomness", error.to_string(), remedy)]
        })?;
        let question = Question::on(nonce, [0; 32], migration, vm, order_sha256);
        let evidence = self.gate.evidence(Role::Target, &question, None, None);
        self.own(&question, &evidence)
    }

    /// The same from evidence that was made for another host.
    pub(super) fn own(
        self: &Arc<Self>,
        question: &Question,
        evidence: &[u8],
    ) -> Result<Option<VerifiedClaims>, Vec<Reason>> {
        if !self.gate.awaits_evidence(self.gate.host()) {
            return Ok(None);
        }
        let claims = self.claims(self.gate.host(), Role::Target, question, evidence);
        claims.map_err(|reasons| {
            self.remedy(reasons.iter().map(|reason| Obstacle {
                code: reason.code.to_owned(),
                message: reason.message.clone(),
                remedy: reason.remedy.clone(),
            }));
            let of = |reason: Reason| own_state("target-state", reason.message, &reason.remedy);
            reasons.into_iter().map(of).collect()
        })
    }

    /// Keeps who is in quarantine and what the TPMs of others have counted beyond a restart.
    pub(super) fn keep_checks(&self) {
        let Some(showing) = self.gate.showing() else {
            return;
        };
        let _keeping = super::lock(&showing.keeping);
        let resets = showing.verifier().map(|verifier| verifier.resets());
        let kept = self
            .store
            .put_checks(&showing.quarantine.all(), &resets.unwrap_or_default());
        if let Err(error) = kept {
            let problem = chain(&error);
            warn!(problem, "how checks of other hosts ended is not kept");
        }
    }

    /// Remembers what [`Self::keep_checks`] has kept; once, at the start.
    pub fn remember_checks(&self) {
        let Some(showing) = self.gate.showing() else {
            return;
        };
        match self.store.checks() {
            Ok((quarantined, resets)) => {
                showing.quarantine.restore(quarantined);
                if let Some(verifier) = showing.verifier() {
                    verifier.remember_resets(&resets);
                }
            }
            Err(error) => {
                let problem = chain(&error);
                warn!(
                    problem,
                    "how checks of other hosts ended is not known any more"
                );
            }
        }
    }

    /// Checks once more whether this host is what was enrolled of it, where it is enrolled in its own directory: after
    /// something was remedied, at the start and when enrolments were read again. Whether it is in quarantine by its own word
    /// is known from then on, and not only with the next migration. Takes as long as the TPM.
    pub fn check_itself(self: &Arc<Self>) {
        let host = self.gate.host();
        if !self.gate.awaits_evidence(host) || !self.gate.shows_something() {
            return;
        }
        match self.own_claims(MigrationId([0; 16]), VmId([0; 16]), Sha256([0; 32]), false) {
            Ok(_) => info!("this host was checked: it is what was enrolled of it"),
            Err(reasons) => {
                let told: Vec<_> = reasons
                    .iter()
                    .map(|reason| reason.message.as_str())
                    .collect();
                let reasons = told.join("; ");
                warn!(
                    reasons,
                    "this host was checked: it is not what was enrolled of it"
                );
            }
        }
    }

    /// The same on a thread of its own.
    pub fn check_itself_beside(self: &Arc<Self>) {
        let agent = Arc::clone(self);
        let thread = std::thread::Builder::new().name("check".to_owned());
        if let Err(error) = thread.spawn(move || agent.check_itself()) {
            warn!(%error, "no thread to check this host");
        }
    }

    /// This host was refused for its state, by itself or by another: a program may remedy that, if one is configured. One at a
    /// time and not all the time, because others can cause it; it runs beside all else.
    pub(crate) fn remedy(self: &Arc<Self>, obstacles: impl Iterator<Item = Obstacle>) {
        let obstacles: Vec<_> = obstacles.collect();
        let Some(showing) = self.gate.showing() else {
            return;
        };
        let Some(hook) = showing.hook.clone().filter(|_| !obstacles.is_empty()) else {
            return;
        };
        let mut remedied = super::lock(&showing.remedied);
        if remedied.is_some_and(|at| at.elapsed() < REMEDY_PAUSE) {
            return;
        }
        *remedied = Some(Instant::now());
        let agent = Arc::clone(self);
        let work = move || match run_hook(&hook, &obstacles) {
            Ok(said) => {
                info!(said, "the hook has remedied what it could");
                // Counted from its end, too: what it could not remedy must not start one that takes long again at once.
                if let Some(showing) = agent.gate.showing() {
                    *super::lock(&showing.remedied) = Some(Instant::now());
                }
                agent.check_itself();
            }
            Err(error) => {
                let problem = chain(&error);
                warn!(problem, "the hook has remedied nothing");
            }
        };
        let thread = std::thread::Builder::new().name("remedy".to_owned());
        if let Err(error) = thread.spawn(work) {
            warn!(%error, "no thread for the hook");
        }
    }
}

/// What other hosts say about the state of this one, as far as it is that which they refuse.
pub(crate) fn told_state(code: &str, message: &str) -> Option<Obstacle> {
    let code = code.strip_prefix("attestation:").unwrap_or(code);
    STATE_CODES.contains(&code).then(|| Obstacle {
        code: code.to_owned(),
        message: message.to_owned(),
        remedy: "Make this host what was enrolled, or enrol it again.".to_owned(),
    })
}
