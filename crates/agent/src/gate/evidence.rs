//! What hosts show each other, and what this one makes of it.
//!
//! Asked for after the mutual TLS handshake and bound to it (`docs/attestation.md`). What cannot be shown is left out: who
//! wants to see it refuses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use palanquin_api::attestation::{Attestation, Demand, RemediationHook};
use palanquin_engine::ids::Challenge32;
use palanquin_engine::{MigrationId, Order, VmId};
use palanquin_host::measure::{Empty, Meter};
use palanquin_host::vm::{Handle, Obstacle};
use palanquin_trust::decision::{Gate, Reason};
use palanquin_trust::evidence::{Challenge, Measured, Role};
use palanquin_trust::{Identity, Sha256, VerifiedClaims};
use tracing::{info, warn};
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
    verifier: Option<Verifier>,
    demand: Demand,
    quarantine: Quarantine,
    hook: Option<RemediationHook>,
    remedying: AtomicBool,
    meter: Arc<Meter>,
}

impl Showing {
    pub(super) fn open(
        config: Option<&Attestation>,
        state_dir: &std::path::Path,
        meter: Arc<Meter>,
    ) -> Result<Self, GateError> {
        let (attester, verifier) = match config {
            Some(config) => (
                Attester::open(config, state_dir)?,
                Some(Verifier::open(config)?),
            ),
            None => (Attester::none(), None),
        };
        Ok(Self {
            attester,
            verifier,
            demand: config.map_or(Demand::Never, |config| config.demand),
            quarantine: Quarantine::default(),
            hook: config.and_then(|config| config.remediation_hook.clone()),
            remedying: AtomicBool::new(false),
            meter,
        })
    }

    /// Whether evidence of this host is looked at, and can be believed.
    fn looks_at(&self, host: &Identity) -> bool {
        let verifier = self.verifier.as_ref();
        self.demand != Demand::Never && verifier.is_some_and(|verifier| verifier.knows(host))
    }
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
    fn showing(&self) -> Option<&Showing> {
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
        let hypervisor = hypervisor.and_then(|handle| match showing.meter.vm(handle) {
            Ok(found) => Some(found),
            Err(error) => {
                let problem = chain(&error);
                warn!(
                    problem,
                    "the hypervisor cannot be measured: evidence says nothing of it"
                );
                None
            }
        });
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
        let Some(verifier) = &showing.verifier else {
            return Ok(None);
        };
        let wanted = verifier.wants(host);
        if !wanted && !showing.looks_at(host) {
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
    /// that. It protects an honest host from taking what it must not have; others don't rely on it.
    pub(super) fn own_claims(
        &self,
        migration: MigrationId,
        vm: VmId,
        order_sha256: Sha256,
    ) -> Result<Option<VerifiedClaims>, Vec<Reason>> {
        let host = self.gate.host();
        if !self.gate.awaits_evidence(host) {
            return Ok(None);
        }
        let nonce = crate::challenge::fresh().map_err(|error| {
            let remedy = "Look at the agent's log.";
            vec![Reason::new(
                Gate::Attestation,
                "no-randomness",
                error.to_string(),
                remedy,
            )]
        })?;
        let question = Question::on(nonce, [0; 32], migration, vm, order_sha256);
        let evidence = self.gate.evidence(Role::Target, &question, None, None);
        self.claims(host, Role::Target, &question, &evidence)
    }

    /// Keeps who is in quarantine and what the TPMs of others have counted beyond a restart.
    fn keep_checks(&self) {
        let Some(showing) = self.gate.showing() else {
            return;
        };
        let resets = showing.verifier.as_ref().map(Verifier::resets);
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
                if let Some(verifier) = &showing.verifier {
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

    /// Another host has refused this one for what it has shown: a program may remedy that, if one is configured. One at a
    /// time, and it runs beside all else.
    pub(crate) fn remedy(self: &Arc<Self>, gate_code: &str, message: &str) {
        let Some(code) = gate_code.strip_prefix("attestation:") else {
            return;
        };
        let Some(showing) = self.gate.showing() else {
            return;
        };
        let Some(hook) = showing.hook.clone() else {
            return;
        };
        if showing.remedying.swap(true, Ordering::Relaxed) {
            return;
        }
        let obstacle = Obstacle {
            code: code.to_owned(),
            message: message.to_owned(),
            remedy: "Make this host what was enrolled, or enrol it again.".to_owned(),
        };
        let agent = Arc::clone(self);
        let work = move || {
            match run_hook(&hook, &[obstacle]) {
                Ok(said) => info!(said, "the hook has remedied what it could"),
                Err(error) => {
                    let problem = chain(&error);
                    warn!(problem, "the hook has remedied nothing");
                }
            }
            if let Some(showing) = agent.gate.showing() {
                showing.remedying.store(false, Ordering::Relaxed);
            }
        };
        if let Err(error) = std::thread::Builder::new()
            .name("remedy".to_owned())
            .spawn(work)
        {
            showing.remedying.store(false, Ordering::Relaxed);
            warn!(%error, "no thread for the hook");
        }
    }
}
