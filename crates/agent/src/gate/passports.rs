//! Passports of this host's VMs, and approvals.

use palanquin_api::control::{ErrorKind, GateDecision, PassportInfo, VmInfo};
use palanquin_engine::VmId;
use palanquin_trust::decision::{Gate, Reason};
use palanquin_trust::passport::LastPassport;
use palanquin_trust::signed::VerifyError;
use palanquin_trust::{Approval, Passport, Signed, Verified};
use uuid::Uuid;

use super::{Books, Caller, refusal};
use crate::agent::Agent;
use crate::chain::chain;
use crate::operations::{Answer, error, internal};

const ASK_OWNER: &str =
    "Get the passport of this VM from its owner, and give it: `palanquin vm passport`.";

fn distrusted(error: &VerifyError) -> Reason {
    let remedy = match error {
        VerifyError::UnknownKey(_) => {
            "Name the owner's public key under `[trust.owners]` on this host, or get a passport signed with a known one."
        }
        _ => ASK_OWNER,
    };
    let message = format!("the passport is not believed: {error}");
    Reason::new(Gate::Passport, error.code(), message, remedy)
}

/// A passport of this VM as its owner signed it; whether its time is over is judged elsewhere.
pub(super) fn verify(books: &Books, bytes: &[u8], vm: Uuid) -> Result<Verified<Passport>, Reason> {
    let passport = verify_any(books, bytes)?;
    if passport.vm == vm {
        Ok(passport)
    } else {
        let message = format!("the passport is of VM {}", passport.vm);
        Err(Reason::new(
            Gate::Passport,
            "passport-other-vm",
            message,
            ASK_OWNER,
        ))
    }
}

/// A passport as the owner of its VM signed it.
pub(super) fn verify_any(books: &Books, bytes: &[u8]) -> Result<Verified<Passport>, Reason> {
    let signed = Signed::<Passport>::from_bytes(bytes).map_err(|error| {
        let message = format!("what is given is no passport: {error}");
        Reason::new(Gate::Passport, "passport-malformed", message, ASK_OWNER)
    })?;
    signed
        .verify_lapsed(&books.keys)
        .map_err(|error| distrusted(&error))
}

/// An approval as its operator signed it; whether its time is over is judged elsewhere.
pub(super) fn verify_approval(books: &Books, bytes: &[u8]) -> Result<Verified<Approval>, Reason> {
    let odd = |code, error: &dyn std::error::Error| {
        Reason::new(
            Gate::Identity,
            code,
            format!("an approval is not believed: {error}"),
            "Name the operator's key under `[trust.approvers]`, or get the approval again: `palanquin approval sign`.",
        )
    };
    let signed = Signed::<Approval>::from_bytes(bytes);
    let signed = signed.map_err(|error| odd("approval-malformed", &error))?;
    let verified = signed.verify_lapsed(&books.keys);
    verified.map_err(|error| odd(error.code(), &error))
}

/// A passport of which this may not be the successor.
pub(super) fn follows(
    passport: &Verified<Passport>,
    last: Option<&LastPassport>,
) -> Result<(), Reason> {
    let Some(last) = last else { return Ok(()) };
    passport.follows(last).map_err(|error| {
        let remedy = "Give the newest passport of this VM.";
        Reason::new(
            Gate::Passport,
            "passport-not-newest",
            error.to_string(),
            remedy,
        )
    })
}

impl Agent {
    /// The newest passport of a VM that this host has seen.
    pub(crate) fn last_passport(&self, vm: Uuid) -> Result<Option<LastPassport>, Reason> {
        let stored = self.store.passport(VmId(*vm.as_bytes()));
        let stored = stored.map_err(|error| unreadable(&error))?;
        Ok(stored.map(|stored| stored.last))
    }

    /// The passport of a VM, verified by keys that are believed now.
    pub(super) fn passport_of(
        &self,
        books: &Books,
        vm: Uuid,
    ) -> Result<(Verified<Passport>, LastPassport), Reason> {
        let stored = self.store.passport(VmId(*vm.as_bytes()));
        let stored = stored.map_err(|error| unreadable(&error))?;
        let stored = stored.ok_or_else(|| {
            let message = "the VM has no passport of its owner";
            Reason::new(Gate::Passport, "passport-missing", message, ASK_OWNER)
        })?;
        Ok((verify(books, &stored.envelope, vm)?, stored.last))
    }

    /// What people may see of a VM's passport.
    pub(crate) fn passport_info(&self, vm: VmId) -> Option<PassportInfo> {
        let stored = self.store.passport(vm).ok().flatten()?;
        Some(PassportInfo {
            owner: stored.last.owner.to_string(),
            version: stored.last.version,
            sha256: stored.last.sha256.to_string(),
            expires_unix_s: stored.expires_unix_s,
        })
    }

    /// The last decisions, oldest first.
    ///
    /// # Errors
    ///
    /// The state file cannot be read.
    pub fn decisions(&self) -> Answer<Vec<GateDecision>> {
        let decisions = self.store.decisions();
        decisions.map_err(|problem| internal("the decisions can't be told", &problem))
    }

    /// Takes a passport of a VM of this host.
    ///
    /// # Errors
    ///
    /// There is no such VM, nothing is judged here, or the passport is not believed or not the newest.
    pub fn give_passport(&self, name: &str, bytes: &[u8], caller: Caller) -> Answer<VmInfo> {
        let entry = self.named(name)?;
        let books = self.gate.books().ok_or_else(judges_nothing)?;
        // The owner's signature is what counts; but who is nobody here changes nothing.
        let operator = self.gate.operator(caller);
        operator.map_err(|reason| refusal("giving a passport", &[reason]))?;
        let vm = Uuid::from_bytes(entry.stored.id.0);
        let taken = verify(&books, bytes, vm).and_then(|passport| self.take_passport(&passport));
        taken.map_err(|reason| refusal(&format!("the passport for VM {name:?}"), &[reason]))?;
        Ok(self.vm_info(&entry))
    }

    /// Keeps a passport that is the newest of its VM.
    pub(super) fn take_passport(&self, passport: &Verified<Passport>) -> Result<(), Reason> {
        follows(passport, self.last_passport(passport.vm)?.as_ref())?;
        match self.store.put_passport(passport) {
            Ok(true) => Ok(()),
            // Another was given in this moment.
            Ok(false) => follows(passport, self.last_passport(passport.vm)?.as_ref()),
            Err(error) => Err(unreadable(&error)),
        }
    }
}

/// Nothing can be said of a passport where nobody's key is believed.
pub(super) fn judges_nothing() -> palanquin_api::control::ApiError {
    error(
        ErrorKind::Usage,
        "this host judges nothing, and believes nobody's signature",
        Some("configure `[trust]`; docs/policy.md says how"),
    )
}

fn unreadable(error: &crate::store::StoreError) -> Reason {
    Reason::new(
        Gate::Passport,
        "passport-unreadable",
        format!(
            "the state file does not tell the newest passport: {}",
            chain(error)
        ),
        "Look at the agent's log.",
    )
}

/// A decision that is not on the disk permits nothing.
pub(super) fn not_journaled() -> palanquin_api::control::ApiError {
    internal(
        "the decision cannot be journaled",
        &std::io::Error::other("see the agent's log"),
    )
}
