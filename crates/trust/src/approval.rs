//! A second person's word: an operator agrees to what another asks for.

use std::fmt;

use minicbor::{Decode, Encode};
use serde::Serialize;
use uuid::Uuid;

use crate::decision::{Action, Wish};
use crate::identity::{Identity, Kind};
use crate::passport::date;
use crate::signed::{Document, FieldError, Window};

/// Longest time an approval may hold, in seconds: a week.
pub const APPROVAL_MAX_S: u64 = 7 * 24 * 3600;

/// An operator agrees that something is done to a VM, once or several times until it expires.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "kebab-case")]
#[cbor(map)]
pub struct Approval {
    /// Who agrees; signs.
    #[n(0)]
    pub operator: Identity,
    /// To what, by its name in policies.
    #[n(1)]
    pub action: String,
    /// Done to which VM.
    #[cbor(n(2), with = "crate::cbor::uuid")]
    pub vm: Uuid,
    /// Where the VM is.
    #[n(3)]
    pub source: Identity,
    /// Where it will be.
    #[n(4)]
    pub target: Identity,
    /// From when on, seconds since 1970.
    #[n(5)]
    pub not_before_unix_s: u64,
    /// Until when, seconds since 1970.
    #[n(6)]
    pub expires_unix_s: u64,
}

impl Approval {
    /// Whether this agrees to that.
    pub fn is_for(&self, wish: &Wish<'_>) -> bool {
        // To give and to take are two sides of one move, and it leaves nothing behind at its source.
        let moves = [Action::MigrateOut.name(), Action::MigrateIn.name()];
        let of_a_move = match wish.action {
            Action::MigrateOut | Action::MigrateIn => true,
            Action::Erase => wish.source != wish.target,
            Action::Adopt | Action::Abort => false,
        };
        let same_action =
            self.action == wish.action.name() || (of_a_move && moves.contains(&&*self.action));
        same_action
            && self.vm == wish.vm
            && self.source == *wish.source
            && self.target == *wish.target
    }
}

impl Document for Approval {
    const CONTENT_TYPE: &'static str = "application/vnd.palanquin.approval+cbor";
    const WORD: &'static str = "approval";
    const SIGNER: Kind = Kind::Operator;

    fn signer(&self) -> &Identity {
        &self.operator
    }

    fn window(&self) -> Window {
        Window {
            not_before_unix_s: self.not_before_unix_s,
            expires_unix_s: self.expires_unix_s,
        }
    }

    fn check(&self) -> Result<(), FieldError> {
        if !Action::ALL
            .iter()
            .any(|action| action.name() == self.action)
        {
            return Err(FieldError::new("action", "no such action"));
        }
        for (field, host) in [("source", &self.source), ("target", &self.target)] {
            if host.kind() != Kind::Host {
                return Err(FieldError::new(field, format!("{host} is no host")));
            }
        }
        match self.expires_unix_s.checked_sub(self.not_before_unix_s) {
            Some(0..=APPROVAL_MAX_S) => Ok(()),
            _ => Err(FieldError::new(
                "expires",
                "not within a week after it begins",
            )),
        }
    }
}

impl fmt::Display for Approval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "operator     {}", self.operator)?;
        writeln!(f, "agrees to    {}", self.action)?;
        writeln!(f, "VM           {}", self.vm)?;
        writeln!(f, "from         {}", self.source)?;
        writeln!(f, "to           {}", self.target)?;
        let (from, to) = (date(self.not_before_unix_s), date(self.expires_unix_s));
        writeln!(f, "holds        {from} to {to}")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use palanquin_api::control::Strategy;

    use super::*;

    pub(crate) fn approval() -> Approval {
        Approval {
            operator: "spiffe://example.org/operator/bob".parse().unwrap(),
            action: "migrateOut".to_owned(),
            vm: Uuid::from_bytes([2; 16]),
            source: "spiffe://example.org/host/alpha".parse().unwrap(),
            target: "spiffe://example.org/host/beta".parse().unwrap(),
            not_before_unix_s: 1_800_000_000,
            expires_unix_s: 1_800_003_600,
        }
    }

    #[test]
    fn an_approval_is_for_one_vm_and_one_way_on_both_sides() {
        let good = approval();
        let wish = Wish {
            action: Action::MigrateIn,
            vm: good.vm,
            source: &good.source,
            target: &good.target,
            strategy: Strategy::Auto,
            post_copy: false,
        };
        assert!(good.is_for(&wish));
        // What the move leaves behind goes with it.
        let erase = Wish {
            action: Action::Erase,
            ..wish
        };
        assert!(good.is_for(&erase));
        let others = [
            Wish {
                target: &good.source,
                ..erase
            },
            Wish {
                action: Action::Abort,
                ..wish
            },
            Wish {
                vm: Uuid::nil(),
                ..wish
            },
            Wish {
                source: &good.target,
                ..wish
            },
            Wish {
                target: &good.source,
                ..wish
            },
        ];
        for other in others {
            assert!(!good.is_for(&other), "{other:?}");
        }
    }

    #[test]
    fn an_approval_for_longer_than_a_week_or_of_nothing_known_is_none() {
        assert_eq!(approval().check(), Ok(()));
        let odd = [
            Approval {
                expires_unix_s: u64::MAX,
                ..approval()
            },
            Approval {
                expires_unix_s: 0,
                ..approval()
            },
            Approval {
                action: "fly".to_owned(),
                ..approval()
            },
            Approval {
                source: approval().operator,
                ..approval()
            },
        ];
        for odd in odd {
            assert!(odd.check().is_err(), "{odd:?}");
        }
    }
}
