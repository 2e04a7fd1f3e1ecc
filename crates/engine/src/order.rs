//! The order: who moves which VM where, once.

use minicbor::{Decode, Encode};

use crate::ids::{Epoch, MigrationId, VmId};
use crate::message::{Refused, WireBlocker};

/// Longest name of a VM or host, in bytes.
pub const NAME_MAX: usize = 64;

/// Permission to move one VM from one host to another, once. It travels inside the mutually authenticated
/// channel, so its source is the host whose certificate the channel shows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Order {
    /// The migration; an identity that was seen before is refused.
    #[n(0)]
    pub migration: MigrationId,
    /// The VM.
    #[n(1)]
    pub vm: VmId,
    /// Its name, unique on a host.
    #[n(2)]
    pub vm_name: String,
    /// Epoch under which the source owns the VM.
    #[n(3)]
    pub epoch: Epoch,
    /// Name of the source host.
    #[n(4)]
    pub source: String,
    /// Name of the destination host.
    #[n(5)]
    pub destination: String,
    /// Seconds since 1970 after which the order is void.
    #[n(6)]
    pub expires_unix_s: u64,
    /// Whether the VM runs after the move; false for one that was paused before.
    #[n(7)]
    pub run: bool,
}

/// What the destination knows when it judges an order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// This host's name.
    pub host: String,
    /// Name in the certificate of the other end.
    pub peer: String,
    /// Seconds since 1970.
    pub unix_s: u64,
    /// Whether a migration of this identity was seen before.
    pub migration_seen: bool,
    /// Newest epoch of this VM that this host has ever known.
    pub epoch_known: Option<Epoch>,
    /// Whether a VM of this name or identity is here now.
    pub vm_present: bool,
    /// Whether as many migrations arrive already as this host allows.
    pub full: bool,
    /// What the gates of this host (identity, attestation, authorisation) have against the order and its credentials: all
    /// of it, each with a code that names the gate.
    pub refusals: Vec<WireBlocker>,
}

/// Why an order is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// The order was made for another destination.
    #[error("the order is for host {0:?}")]
    OtherDestination(String),
    /// The order names another source than the channel.
    #[error("the order names source {0:?}, the channel was opened by another host")]
    OtherSource(String),
    /// Too old.
    #[error("the order has expired; if it is new, the hosts' clocks disagree")]
    Expired,
    /// Replayed.
    #[error("a migration of this identity was seen before")]
    Replayed,
    /// This host knows a newer owner of the VM.
    #[error("the order has epoch {order}, this host knows epoch {known} of the VM")]
    StaleEpoch {
        /// In the order.
        order: Epoch,
        /// In this host's ledger.
        known: Epoch,
    },
    /// Name taken.
    #[error("a VM of this name or identity is on this host")]
    Present,
    /// Too many at once.
    #[error("as many migrations arrive already as this host allows")]
    Full,
    /// A name that no host or VM may have.
    #[error("a name in the order is empty, too long or has characters that names may not have")]
    Name,
}

impl OrderError {
    /// Stable code for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::OtherDestination(_) => "order-other-destination",
            Self::OtherSource(_) => "order-other-source",
            Self::Expired => "order-expired",
            Self::Replayed => "order-replayed",
            Self::StaleEpoch { .. } => "order-stale-epoch",
            Self::Present => "vm-present",
            Self::Full => "host-full",
            Self::Name => "order-name",
        }
    }

    /// Whether a gate (identity, authorisation) refused, rather than the host being unable.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::Present | Self::Full)
    }

    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Expired => "Compare the clocks of both hosts, then try again.",
            Self::StaleEpoch { .. } => {
                "The VM has moved on since: find its newest owner and remove the old copy."
            }
            Self::Present => "Stop or rename the VM on the destination.",
            Self::Full => "Wait until other migrations to that host have ended.",
            Self::Replayed => "Start a new migration.",
            Self::OtherDestination(_) | Self::OtherSource(_) | Self::Name => {
                "Check the names of both hosts and in their certificates."
            }
        }
    }
}

impl From<OrderError> for WireBlocker {
    fn from(error: OrderError) -> Self {
        Self {
            code: error.code().to_owned(),
            message: error.to_string(),
            remedy: error.remedy().to_owned(),
        }
    }
}

/// Whether this is a name a VM or host may have: 1 to 64 of `a-z A-Z 0-9 . _ -`, starting with a letter or
/// digit.
pub fn is_name(name: &str) -> bool {
    name.len() <= NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

impl Order {
    /// Why the destination does not take an offer under this order: the rule that the order breaks, and all that the gates
    /// have against it. What this host lacks is told only to whom no gate refuses. None: it may be taken.
    pub fn refused(&self, ledger: &Ledger) -> Option<Refused> {
        let broken = self.judge(ledger).err();
        let by_gate =
            !ledger.refusals.is_empty() || broken.as_ref().is_some_and(OrderError::is_refusal);
        let told = broken.filter(|error| !by_gate || error.is_refusal());
        let blockers: Vec<_> = told
            .map(WireBlocker::from)
            .into_iter()
            .chain(ledger.refusals.iter().cloned())
            .take(crate::message::BLOCKERS_MAX)
            .map(WireBlocker::cut)
            .collect();
        (!blockers.is_empty()).then_some(Refused { by_gate, blockers })
    }

    /// Judges the order as the destination. What its gates say is not looked at, see [`Order::refused`].
    ///
    /// # Errors
    ///
    /// The first rule it breaks.
    pub fn judge(&self, ledger: &Ledger) -> Result<(), OrderError> {
        if ![&self.vm_name, &self.source, &self.destination]
            .into_iter()
            .all(|name| is_name(name))
            || self.epoch.0 >= u64::MAX - 2
        {
            return Err(OrderError::Name);
        }
        if self.destination != ledger.host {
            return Err(OrderError::OtherDestination(self.destination.clone()));
        }
        if self.source != ledger.peer {
            return Err(OrderError::OtherSource(self.source.clone()));
        }
        if self.expires_unix_s < ledger.unix_s {
            return Err(OrderError::Expired);
        }
        if ledger.migration_seen {
            return Err(OrderError::Replayed);
        }
        match ledger.epoch_known {
            Some(known) if known > self.epoch => {
                return Err(OrderError::StaleEpoch {
                    order: self.epoch,
                    known,
                });
            }
            _ => {}
        }
        if ledger.vm_present {
            return Err(OrderError::Present);
        }
        if ledger.full {
            return Err(OrderError::Full);
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn order() -> Order {
        Order {
            migration: MigrationId([1; 16]),
            vm: VmId([2; 16]),
            vm_name: "web".to_owned(),
            epoch: Epoch(4),
            source: "a".to_owned(),
            destination: "b".to_owned(),
            expires_unix_s: 1000,
            run: true,
        }
    }

    pub(crate) fn ledger() -> Ledger {
        Ledger {
            host: "b".to_owned(),
            peer: "a".to_owned(),
            unix_s: 900,
            ..Ledger::default()
        }
    }

    #[test]
    fn an_order_is_good_for_one_destination_one_source_and_a_time() {
        assert_eq!(order().judge(&ledger()), Ok(()));
        let elsewhere = Ledger {
            host: "c".to_owned(),
            ..ledger()
        };
        assert_eq!(
            order().judge(&elsewhere),
            Err(OrderError::OtherDestination("b".to_owned()))
        );
        let relayed = Ledger {
            peer: "m".to_owned(),
            ..ledger()
        };
        assert_eq!(
            order().judge(&relayed),
            Err(OrderError::OtherSource("a".to_owned()))
        );
        let late = Ledger {
            unix_s: 1001,
            ..ledger()
        };
        assert_eq!(order().judge(&late), Err(OrderError::Expired));
    }

    #[test]
    fn a_replayed_or_stale_order_is_refused() {
        let replayed = Ledger {
            migration_seen: true,
            ..ledger()
        };
        assert_eq!(order().judge(&replayed), Err(OrderError::Replayed));
        let newer = Ledger {
            epoch_known: Some(Epoch(5)),
            ..ledger()
        };
        assert_eq!(
            order().judge(&newer),
            Err(OrderError::StaleEpoch {
                order: Epoch(4),
                known: Epoch(5)
            })
        );
        let same = Ledger {
            epoch_known: Some(Epoch(4)),
            ..ledger()
        };
        assert_eq!(order().judge(&same), Ok(()));
    }

    #[test]
    fn all_that_the_gates_refuse_is_told_and_what_the_host_lacks_is_not() {
        let blocker = |code: &str| WireBlocker {
            code: code.to_owned(),
            message: "m".to_owned(),
            remedy: "r".to_owned(),
        };
        let codes = |ledger: &Ledger| {
            order().refused(ledger).map(|refused| {
                let codes = refused.blockers.into_iter().map(|b| b.code);
                (refused.by_gate, codes.collect::<Vec<_>>())
            })
        };
        let told = |by_gate, codes: &[&str]| {
            Some((by_gate, codes.iter().map(|&c| c.to_owned()).collect()))
        };
        assert_eq!(codes(&ledger()), None);
        let mut judged = Ledger {
            full: true,
            ..ledger()
        };
        assert_eq!(codes(&judged), told(false, &["host-full"]));
        judged.refusals = vec![blocker("policy"), blocker("attestation")];
        assert_eq!(codes(&judged), told(true, &["policy", "attestation"]));
        judged.migration_seen = true;
        let all = ["order-replayed", "policy", "attestation"];
        assert_eq!(codes(&judged), told(true, &all));
        judged.refusals = vec![blocker("policy"); 100];
        let refused = order().refused(&judged).unwrap();
        assert_eq!(refused.blockers.len(), crate::message::BLOCKERS_MAX);
    }

    #[test]
    fn names_with_slashes_spaces_or_nothing_in_them_are_refused() {
        for name in ["", "../x", "a b", "-a", ".a", "a\n", &"a".repeat(65)] {
            assert!(!is_name(name), "{name:?}");
            let order = Order {
                vm_name: name.to_owned(),
                ..order()
            };
            assert_eq!(order.judge(&ledger()), Err(OrderError::Name));
        }
        assert!(is_name("web-1.example_x"));
    }
}
