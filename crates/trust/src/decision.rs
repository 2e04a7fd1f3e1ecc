//! What was decided, and why.

use std::fmt;

use palanquin_api::control::Strategy;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::digest::Sha256;
use crate::identity::Identity;

/// What may be decided on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// The source gives a VM away.
    MigrateOut,
    /// The destination takes it.
    MigrateIn,
    /// A host takes over a VM that runs on it already.
    Adopt,
    /// A migration ends before its commit; the VM stays where it is.
    Abort,
    /// What is left of a VM is removed from a host.
    Erase,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::MigrateOut,
        Self::MigrateIn,
        Self::Adopt,
        Self::Abort,
        Self::Erase,
    ];

    /// Its name in policies.
    pub fn name(self) -> &'static str {
        match self {
            Self::MigrateOut => "migrateOut",
            Self::MigrateIn => "migrateIn",
            Self::Adopt => "adopt",
            Self::Abort => "abort",
            Self::Erase => "erase",
        }
    }

    /// Whether the VM runs on the target afterwards.
    pub fn brings(self) -> bool {
        matches!(self, Self::MigrateOut | Self::MigrateIn | Self::Adopt)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What refused. Identity, attestation and authorisation are different things; the owner and the provider are different
/// people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gate {
    /// Who somebody is: keys, names, signatures, roles of a channel.
    Identity,
    /// What a host runs.
    Attestation,
    /// The provider's policies.
    Policy,
    /// The owner's passport.
    Passport,
    /// How much may be done at once, and in an hour.
    Quota,
}

impl Gate {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Attestation => "attestation",
            Self::Policy => "policy",
            Self::Passport => "passport",
            Self::Quota => "quota",
        }
    }
}

/// One reason for a refusal; all that there are are told at once.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Reason {
    /// What refused.
    pub gate: Gate,
    /// Stable code.
    pub code: &'static str,
    /// What is wrong, one lowercase sentence.
    pub message: String,
    /// What to do about it, one sentence.
    pub remedy: String,
    /// The provider's policy that refused, where it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
}

impl Reason {
    /// Of no policy.
    pub fn new(gate: Gate, code: &'static str, message: impl Into<String>, remedy: &str) -> Self {
        Self {
            gate,
            code,
            message: message.into(),
            remedy: remedy.to_owned(),
            policy: None,
        }
    }
}

/// What was decided: for the journal, the owner and whoever asked. It permits nothing by itself, see [`Permit`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// Whether nothing refuses.
    pub permitted: bool,
    /// What was asked for.
    pub action: Action,
    /// By whom.
    pub operator: Identity,
    /// The VM.
    pub vm: Uuid,
    /// The provider's policies that permit it; empty where none does.
    pub permitted_by: Vec<String>,
    /// Everything that refuses.
    pub reasons: Vec<Reason>,
    /// Digest of the provider's policies, directory and schema.
    pub policy_sha256: Sha256,
    /// Digest of the owner's passport; absent where there was none, or none that was signed.
    pub passport_sha256: Option<Sha256>,
    /// When it was decided, seconds since 1970.
    pub decided_unix_s: u64,
}

/// Proof that something was permitted: made only by [`crate::Policies::decide`], from verified documents.
#[derive(Debug)]
#[must_use = "a permit is for doing what it permits"]
pub struct Permit {
    pub(crate) decision: Decision,
    pub(crate) source: Identity,
    pub(crate) target: Identity,
    pub(crate) strategy: Strategy,
    pub(crate) post_copy: bool,
    pub(crate) expires_unix_s: u64,
}

/// Something that a permit was not given for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PermitError {
    /// Other action, VM, hosts or strategy.
    #[error("{0} was permitted with another value")]
    Other(&'static str),
    /// What it rests on does not hold any more.
    #[error("the permit rested on something that has expired")]
    Expired,
}

impl Permit {
    /// What was decided.
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// When the first of the things it rests on expires, seconds since 1970.
    pub fn expires_unix_s(&self) -> u64 {
        self.expires_unix_s
    }

    /// Whether this is permission for exactly that, now.
    ///
    /// # Errors
    ///
    /// What differs.
    pub fn covers(&self, what: &Wish<'_>, now_unix_s: u64) -> Result<(), PermitError> {
        let same = [
            ("action", self.decision.action == what.action),
            ("vm", self.decision.vm == what.vm),
            ("source", self.source == *what.source),
            ("target", self.target == *what.target),
            ("strategy", self.strategy == what.strategy),
            ("post-copy", self.post_copy || !what.post_copy),
        ];
        match same.into_iter().find(|(_, same)| !same) {
            Some((field, _)) => Err(PermitError::Other(field)),
            None if now_unix_s > self.expires_unix_s => Err(PermitError::Expired),
            None => Ok(()),
        }
    }
}

/// What is to be done to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish<'a> {
    /// What.
    pub action: Action,
    /// To which VM.
    pub vm: Uuid,
    /// Where it is.
    pub source: &'a Identity,
    /// Where it will be; the same as `source` where it does not move.
    pub target: &'a Identity,
    /// How its pages are moved.
    pub strategy: Strategy,
    /// Whether it may run on the target before all of its pages are there.
    pub post_copy: bool,
}

/// It was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied(pub Decision);

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of VM {} is refused", self.0.action, self.0.vm)?;
        for reason in &self.0.reasons {
            write!(
                f,
                "; {} ({}): {}",
                reason.gate.name(),
                reason.code,
                reason.message
            )?;
        }
        Ok(())
    }
}

impl std::error::Error for Denied {}
