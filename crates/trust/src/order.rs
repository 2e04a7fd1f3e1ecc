//! The order as a signed document: one host may move one VM to one other, once.
//!
//! `palanquin-engine` has an order too, which says the same inside a channel whose certificates name both hosts. This one
//! holds outside of that channel as well: evidence is bound to its digest, and the destination keeps it.

use minicbor::{Decode, Encode};
use palanquin_api::config::is_name;
use palanquin_api::control::Strategy;
use uuid::Uuid;

use crate::decision::{Action, Wish};
use crate::digest::Sha256;
use crate::identity::{Identity, Kind};
use crate::signed::{Document, FieldError, Verified, Window, WindowError};

/// Longest time an order may hold, in seconds: an hour.
pub const ORDER_MAX_S: u64 = 3600;

/// Permission to move one VM from one host to another, once.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Order {
    /// The migration; an identity that was seen before is refused.
    #[cbor(n(0), with = "crate::cbor::uuid")]
    pub migration: Uuid,
    /// The VM.
    #[cbor(n(1), with = "crate::cbor::uuid")]
    pub vm: Uuid,
    /// Its name, unique on a host.
    #[n(2)]
    pub vm_name: String,
    /// Epoch under which the source owns the VM.
    #[n(3)]
    pub epoch: u64,
    /// Where it is; signs.
    #[n(4)]
    pub source: Identity,
    /// Where it goes.
    #[n(5)]
    pub destination: Identity,
    /// Who asked for it.
    #[n(6)]
    pub operator: Identity,
    /// When it was made, seconds since 1970.
    #[n(7)]
    pub issued_unix_s: u64,
    /// When it is void, seconds since 1970; at most [`ORDER_MAX_S`] later.
    #[n(8)]
    pub expires_unix_s: u64,
    /// How the pages are moved.
    #[cbor(n(9), with = "crate::cbor::strategy")]
    pub strategy: Strategy,
    /// Whether the VM may run on the destination before all of its pages are there.
    #[n(10)]
    pub post_copy: bool,
    /// Whether the VM runs after the move; false for one that was paused before.
    #[n(11)]
    pub run: bool,
    /// Digest of the policies by which the source decided.
    #[n(12)]
    pub policy_sha256: Sha256,
    /// Digest of the owner's passport by which the source decided.
    #[n(13)]
    pub passport_sha256: Sha256,
}

impl Document for Order {
    const CONTENT_TYPE: &'static str = "application/vnd.palanquin.order+cbor";
    const WORD: &'static str = "order";
    const SIGNER: Kind = Kind::Host;

    fn signer(&self) -> &Identity {
        &self.source
    }

    fn window(&self) -> Window {
        Window {
            not_before_unix_s: self.issued_unix_s,
            expires_unix_s: self.expires_unix_s,
        }
    }

    fn check(&self) -> Result<(), FieldError> {
        if !is_name(&self.vm_name) {
            return Err(FieldError::new("vm-name", "no name for a VM"));
        }
        // The commit and what may follow it need epochs of their own.
        if self.epoch >= u64::MAX - 2 {
            return Err(FieldError::new("epoch", "no epochs are left after it"));
        }
        let kinds = [
            ("source", &self.source, Kind::Host),
            ("destination", &self.destination, Kind::Host),
            ("operator", &self.operator, Kind::Operator),
        ];
        for (field, identity, kind) in kinds {
            if identity.kind() != kind {
                let what = format!("{identity} is no {}", kind.word());
                return Err(FieldError::new(field, what));
            }
        }
        if self.source == self.destination {
            return Err(FieldError::new("destination", "the source itself"));
        }
        match self.expires_unix_s.checked_sub(self.issued_unix_s) {
            Some(0..=ORDER_MAX_S) => Ok(()),
            _ => Err(FieldError::new(
                "expires",
                "not within an hour after it was made",
            )),
        }
    }
}

/// What the destination knows when an order is redeemed.
#[derive(Clone, Debug)]
pub struct Ledger<'a> {
    /// This host.
    pub host: &'a Identity,
    /// The other end of the channel, by its certificate.
    pub peer: &'a Identity,
    /// Seconds since 1970.
    pub now_unix_s: u64,
    /// Whether a migration of this identity was seen before.
    pub migration_seen: bool,
    /// Newest epoch of this VM that this host has ever known.
    pub epoch_known: Option<u64>,
    /// Digest of the passport that came with the VM.
    pub passport_sha256: Sha256,
}

/// Why an order is refused. The codes are those of the engine where the rule is the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// The order was made for another destination.
    #[error("the order is for {0}")]
    OtherDestination(Identity),
    /// The order was made by another host than the one that brings it.
    #[error("the order is by {0}, and another host brings it")]
    OtherSource(Identity),
    /// Too old, or not yet.
    #[error("the order does not hold now: {0}")]
    Window(#[from] WindowError),
    /// Replayed.
    #[error("a migration of this identity was seen before")]
    Replayed,
    /// This host knows a newer owner of the VM.
    #[error("the order has epoch {order}, this host knows epoch {known} of the VM")]
    StaleEpoch {
        /// In the order.
        order: u64,
        /// In this host's ledger.
        known: u64,
    },
    /// The source decided by another passport than the one it brings.
    #[error("the source decided by passport {0}, and brings another")]
    OtherPassport(Sha256),
}

impl OrderError {
    /// Stable code for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::OtherDestination(_) => "order-other-destination",
            Self::OtherSource(_) => "order-other-source",
            Self::Window(_) => "order-expired",
            Self::Replayed => "order-replayed",
            Self::StaleEpoch { .. } => "order-stale-epoch",
            Self::OtherPassport(_) => "order-other-passport",
        }
    }
}

/// An order that was redeemed. Whoever has it makes durable that its migration was seen, before anything else is done.
#[derive(Debug)]
#[must_use = "an order is redeemed once: note its migration"]
pub struct Redeemed(Verified<Order>);

impl Redeemed {
    /// The order.
    pub fn order(&self) -> &Order {
        &self.0
    }

    /// Digest of its envelope, to which evidence is bound.
    pub fn sha256(&self) -> Sha256 {
        self.0.sha256()
    }

    /// The envelope, to be kept.
    pub fn as_signed_bytes(&self) -> &[u8] {
        self.0.as_signed_bytes()
    }

    /// What is to be decided on at the destination.
    pub fn to_wish(&self) -> Wish<'_> {
        Wish {
            action: Action::MigrateIn,
            vm: self.0.vm,
            source: &self.0.source,
            target: &self.0.destination,
            strategy: self.0.strategy,
            post_copy: self.0.post_copy,
        }
    }
}

impl Verified<Order> {
    /// Uses the order as the destination. It is used up.
    ///
    /// # Errors
    ///
    /// The first rule it breaks.
    pub fn redeem(self, ledger: &Ledger<'_>) -> Result<Redeemed, OrderError> {
        if self.destination != *ledger.host {
            return Err(OrderError::OtherDestination(self.destination.clone()));
        }
        if self.source != *ledger.peer {
            return Err(OrderError::OtherSource(self.source.clone()));
        }
        self.window().check(ledger.now_unix_s)?;
        if ledger.migration_seen {
            return Err(OrderError::Replayed);
        }
        if let Some(known) = ledger.epoch_known
            && known > self.epoch
        {
            let order = self.epoch;
            return Err(OrderError::StaleEpoch { order, known });
        }
        if self.passport_sha256 != ledger.passport_sha256 {
            return Err(OrderError::OtherPassport(self.passport_sha256));
        }
        Ok(Redeemed(self))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use palanquin_api::control::Strategy;
    use proptest::prelude::*;

    use super::*;
    use crate::keys::tests::P256;
    use crate::{Keyring, Sign, Signed};

    pub(crate) fn order() -> Order {
        Order {
            migration: Uuid::from_bytes([1; 16]),
            vm: Uuid::from_bytes([2; 16]),
            vm_name: "web".to_owned(),
            epoch: 4,
            source: "spiffe://example.org/host/alpha".parse().unwrap(),
            destination: "spiffe://example.org/host/beta".parse().unwrap(),
            operator: "spiffe://example.org/operator/alice".parse().unwrap(),
            issued_unix_s: 1000,
            expires_unix_s: 1300,
            strategy: Strategy::Auto,
            post_copy: false,
            run: true,
            policy_sha256: Sha256([3; 32]),
            passport_sha256: Sha256([4; 32]),
        }
    }

    fn verified() -> Verified<Order> {
        let key = P256::new();
        let mut ring = Keyring::default();
        ring.insert(order().source, key.public_key()).unwrap();
        let signed = Signed::sign(&order(), &key).unwrap();
        signed.verify(&ring, 1100).unwrap()
    }

    #[test]
    fn an_order_is_redeemed_by_whom_it_is_for_once() {
        let order = order();
        let good = Ledger {
            host: &order.destination,
            peer: &order.source,
            now_unix_s: 1100,
            migration_seen: false,
            epoch_known: Some(4),
            passport_sha256: Sha256([4; 32]),
        };
        let redeemed = verified().redeem(&good).unwrap();
        assert_eq!(redeemed.order(), &order);
        assert_eq!(redeemed.to_wish().target, &order.destination);
        assert_eq!(redeemed.sha256(), Sha256::of(redeemed.as_signed_bytes()));
        let other = "spiffe://example.org/host/mallory".parse().unwrap();
        let refused = [
            (
                Ledger {
                    host: &other,
                    ..good.clone()
                },
                "order-other-destination",
            ),
            (
                Ledger {
                    peer: &other,
                    ..good.clone()
                },
                "order-other-source",
            ),
            (
                Ledger {
                    now_unix_s: 1301,
                    ..good.clone()
                },
                "order-expired",
            ),
            (
                Ledger {
                    now_unix_s: 900,
                    ..good.clone()
                },
                "order-expired",
            ),
            (
                Ledger {
                    migration_seen: true,
                    ..good.clone()
                },
                "order-replayed",
            ),
            (
                Ledger {
                    epoch_known: Some(5),
                    ..good.clone()
                },
                "order-stale-epoch",
            ),
            (
                Ledger {
                    passport_sha256: Sha256([0; 32]),
                    ..good
                },
                "order-other-passport",
            ),
        ];
        for (ledger, code) in refused {
            assert_eq!(verified().redeem(&ledger).unwrap_err().code(), code);
        }
    }

    #[test]
    fn every_rule_for_a_field_is_checked() {
        assert_eq!(order().check(), Ok(()));
        let odd = [
            (
                "vm-name",
                Order {
                    vm_name: "../x".to_owned(),
                    ..order()
                },
            ),
            (
                "epoch",
                Order {
                    epoch: u64::MAX - 2,
                    ..order()
                },
            ),
            (
                "source",
                Order {
                    source: order().operator,
                    ..order()
                },
            ),
            (
                "operator",
                Order {
                    operator: order().source,
                    ..order()
                },
            ),
            (
                "destination",
                Order {
                    destination: order().source,
                    ..order()
                },
            ),
            (
                "expires",
                Order {
                    expires_unix_s: 1000 + ORDER_MAX_S + 1,
                    ..order()
                },
            ),
            (
                "expires",
                Order {
                    expires_unix_s: 999,
                    ..order()
                },
            ),
        ];
        for (field, odd) in odd {
            assert_eq!(odd.check().unwrap_err().field, field);
        }
    }

    proptest! {
        #[test]
        fn an_order_is_read_as_it_was_written(
            (migration, vm) in (any::<[u8; 16]>(), any::<[u8; 16]>()),
            epoch in any::<u64>(),
            (issued_unix_s, length) in (0..u64::MAX / 2, 0..=ORDER_MAX_S),
            (post_copy, run) in any::<(bool, bool)>(),
        ) {
            let order = Order {
                migration: Uuid::from_bytes(migration),
                vm: Uuid::from_bytes(vm),
                epoch,
                issued_unix_s,
                expires_unix_s: issued_unix_s + length,
                post_copy,
                run,
                ..order()
            };
            let bytes = crate::cbor::to_vec(&order);
            prop_assert_eq!(crate::cbor::from_slice::<Order>(&bytes), Ok(order));
        }
    }
}
