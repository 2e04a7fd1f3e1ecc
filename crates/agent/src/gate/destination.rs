//! The destination: may this VM come?

use palanquin_api::control::{Phase, Side};
use palanquin_engine::ids::Challenge32;
use palanquin_engine::message::Offer;
use palanquin_engine::strategy::PostCopyUse;
use palanquin_engine::{MigrationId, Order, VmId};
use palanquin_trust::decision::{Action, Gate, Reason};
use palanquin_trust::evidence::Role;
use palanquin_trust::order::{Ledger, Redeemed};
use palanquin_trust::{
    Identity, Keyring, Order as SignedOrder, PublicKey, Sha256, Signed, VerifiedClaims,
};
use tracing::info;
use uuid::Uuid;

use super::credentials::Credentials;
use super::evidence::Question;
use super::journal::Subject;
use super::passports::{follows, verify, verify_approval};
use super::source::{never_cleared, unjournaled};
use super::{Ask, Books, Clearance, Proven, Refusal};
use crate::agent::Agent;
use crate::chain::chain;
use std::sync::Arc;

/// A VM may come: what that rests on.
#[derive(Debug)]
pub struct InClearance {
    clearance: Clearance,
    order_sha256: Sha256,
    /// What the source has proven.
    claims: Option<VerifiedClaims>,
    /// What this host would prove to itself.
    own_claims: Option<VerifiedClaims>,
}

impl InClearance {
    /// Who ordered it.
    pub fn operator(&self) -> &Identity {
        &self.clearance.operator
    }

    /// Digest of the signed order, to which evidence is bound.
    pub fn order_sha256(&self) -> Sha256 {
        self.order_sha256
    }
}

/// Who brings an offer, as the certificate of the connection says.
#[derive(Clone, Copy, Debug)]
pub struct Bringer<'a> {
    /// Who it is.
    pub identity: &'a Identity,
    /// The key with which it signs.
    pub key: Option<&'a PublicKey>,
    /// What the evidence in its credentials has to be bound to: our challenge, and keying material of the connection.
    pub asked: (Challenge32, &'a [u8; 32]),
}

const TRY_ANEW: &str =
    "Start a new migration; if it is refused again, both hosts need the same version of the agent.";

fn bad_order(code: &'static str, message: impl Into<String>) -> Reason {
    Reason::new(Gate::Identity, code, message, TRY_ANEW)
}

/// Whether the signed order says what the engine's says.
fn agree(offer: &Offer, signed: &SignedOrder) -> Result<(), Reason> {
    let order = &offer.order;
    let same = [
        (
            "migration",
            order.migration.0 == *signed.migration.as_bytes(),
        ),
        ("VM", order.vm.0 == *signed.vm.as_bytes()),
        ("name of the VM", order.vm_name == signed.vm_name),
        ("epoch", order.epoch.0 == signed.epoch),
        ("source", order.source == signed.source.name()),
        (
            "destination",
            order.destination == signed.destination.name(),
        ),
        ("expiry", order.expires_unix_s == signed.expires_unix_s),
        ("run", order.run == signed.run),
        (
            "post-copy",
            signed.post_copy || offer.post_copy == PostCopyUse::No,
        ),
    ];
    match same.into_iter().find(|(_, same)| !same) {
        None => Ok(()),
        Some((what, _)) => Err(bad_order(
            "order-contradicts",
            format!("the signed order has another {what} than the offer"),
        )),
    }
}

impl Agent {
    /// Judges an offer of that host; absent where nothing is judged. Journaled, unless it is only tried.
    ///
    /// # Errors
    ///
    /// Everything that refuses.
    pub fn clear_in(
        self: &Arc<Self>,
        offer: &Offer,
        bringer: Bringer<'_>,
        tried: bool,
    ) -> Result<Option<InClearance>, Vec<Reason>> {
        let mut operator = bringer.identity.to_string();
        let judged = self.judge_in(offer, bringer, &mut operator, tried);
        let refused = match judged {
            Ok(None) => return Ok(None),
            Ok(Some(cleared)) => {
                if tried || self.note_clearance(&cleared.clearance, Some(offer.order.migration)) {
                    return Ok(Some(cleared));
                }
                return Err(vec![unjournaled()]);
            }
            Err(refused) => refused,
        };
        if !tried {
            let subject = Subject {
                action: Action::MigrateIn,
                operator: &operator,
                vm: Some(Uuid::from_bytes(offer.order.vm.0)),
                migration: Some(offer.order.migration),
            };
            self.note_refused_arrival(bringer.identity, &subject, &refused);
        }
        Err(refused.reasons)
    }

    fn judge_in(
        self: &Arc<Self>,
        offer: &Offer,
        bringer: Bringer<'_>,
        operator: &mut String,
        tried: bool,
    ) -> Result<Option<InClearance>, Refusal> {
        let source = bringer.identity.name();
        let arriving = self.arriving_from(source, offer.order.migration);
        self.gate.quotas.arrive(source, arriving, !tried)?;
        let Some(books) = self.gate.books() else {
            return Ok(None);
        };
        if offer.credentials.is_empty() {
            return Err(Reason::new(
                Gate::Identity,
                "order-missing",
                "this host judges what arrives, and no signed order came with the offer",
                "Configure `[trust]` on the source as well.",
            )
            .into());
        }
        let credentials = Credentials::from_bytes(&offer.credentials)
            .map_err(|error| bad_order("credentials", error.to_string()))?;
        let redeemed = self.redeem(&credentials, bringer)?;
        let order = redeemed.order();
        *operator = order.operator.to_string();
        agree(offer, order)?;
        let passport = verify(&books, &credentials.passport, order.vm)?;
        let last = self.last_passport(order.vm)?;
        follows(&passport, last.as_ref())?;
        let mut approvals = Vec::new();
        for bytes in &credentials.approvals {
            match verify_approval(&books, bytes) {
                Ok(approval) => approvals.push(approval),
                // The source may believe somebody whom this host does not know: that word does not count here.
                Err(reason) => info!(reason = reason.message, "an approval does not count"),
            }
        }
        let (nonce, exporter) = bringer.asked;
        let (migration, vm) = (offer.order.migration, offer.order.vm);
        let question = Question::on(nonce, *exporter, migration, vm, redeemed.sha256());
        let claims = if tried && credentials.evidence.is_empty() {
            // Nobody was asked for any yet.
            None
        } else {
            self.claims(
                bringer.identity,
                Role::Source,
                &question,
                &credentials.evidence,
            )?
        };
        let own_claims = self.own_claims(migration, vm, redeemed.sha256(), tried)?;
        let wish = redeemed.to_wish();
        let ask = Ask {
            action: wish.action,
            vm: wish.vm,
            source: wish.source.clone(),
            target: wish.target.clone(),
            strategy: wish.strategy,
            post_copy: wish.post_copy,
        };
        let proven = Proven {
            source: claims.as_ref(),
            target: own_claims.as_ref(),
        };
        let operator = order.operator.clone();
        let passport = (passport, last.as_ref());
        let clearance = Clearance::ask(
            books,
            ask,
            operator,
            passport,
            approvals,
            proven,
            self.unix_s(),
        )?;
        if !tried {
            // It is the newest that this host knows from now on, whatever becomes of the migration.
            self.take_passport(&clearance.passport)?;
        }
        Ok(Some(InClearance {
            clearance,
            order_sha256: redeemed.sha256(),
            claims,
            own_claims,
        }))
    }

    fn redeem(&self, credentials: &Credentials, bringer: Bringer<'_>) -> Result<Redeemed, Reason> {
        let odd = |code, error: &dyn std::error::Error| bad_order(code, chain(error));
        let mut ring = Keyring::default();
        let key = bringer.key.ok_or_else(|| {
            let what = "the key in the source's certificate signs no orders";
            Reason::new(
                Gate::Identity,
                "order-key",
                what,
                "Issue a certificate with `palanquin ca issue host`.",
            )
        })?;
        ring.insert(bringer.identity.clone(), key.clone())
            .map_err(|error| odd("order-key", &error))?;
        let signed = Signed::<SignedOrder>::from_bytes(&credentials.order);
        let signed = signed.map_err(|error| odd("order-malformed", &error))?;
        let now_unix_s = self.unix_s();
        let order = signed.verify(&ring, now_unix_s).map_err(|error| {
            let message = format!("the order is not believed: {error}");
            bad_order(error.code(), message)
        })?;
        let (migration, vm) = (order.migration, order.vm);
        let unreadable = |error: crate::store::StoreError| odd("journal", &error);
        let seen = self
            .store
            .migration_seen(MigrationId(*migration.as_bytes()));
        let epoch = self.store.epoch(VmId(*vm.as_bytes())).map_err(unreadable)?;
        let ledger = Ledger {
            host: self.gate.host(),
            peer: bringer.identity,
            now_unix_s,
            migration_seen: seen.map_err(unreadable)?,
            epoch_known: epoch.map(|epoch| epoch.0),
            passport_sha256: Sha256::of(&credentials.passport),
        };
        order
            .redeem(&ledger)
            .map_err(|error| bad_order(error.code(), error.to_string()))
    }

    fn arriving_from(&self, source: &str, but: MigrationId) -> usize {
        let all = self.migrations().into_iter().map(|tracked| tracked.info());
        let arriving = all.filter(|info| {
            info.side == Side::Destination
                && info.phase != Phase::Done
                && info.from == source
                && *info.id.as_bytes() != but.0
        });
        arriving.count()
    }

    /// Judges once more, before the VM is given up by its source: where other policies hold now, or what it rested on has
    /// expired. With what this host shows of itself now, where it shows something.
    ///
    /// # Errors
    ///
    /// Everything that refuses.
    pub fn judge_arrival(
        self: &Arc<Self>,
        cleared: Option<&mut InClearance>,
        order: &Order,
        shown: Option<(&Question, &[u8])>,
    ) -> Result<(), Vec<Reason>> {
        let Some(books) = self.gate.books() else {
            return Ok(());
        };
        let cleared = cleared.ok_or_else(|| vec![never_cleared()])?;
        self.renew_in(cleared, &books, order, shown)
            .map_err(|refused| {
                let operator = cleared.clearance.operator.to_string();
                let subject = Subject {
                    action: Action::MigrateIn,
                    operator: &operator,
                    vm: Some(cleared.clearance.ask.vm),
                    migration: Some(order.migration),
                };
                self.note_refusal(&subject, &refused);
                refused.reasons
            })
    }

    fn renew_in(
        self: &Arc<Self>,
        cleared: &mut InClearance,
        books: &Arc<Books>,
        order: &Order,
        shown: Option<(&Question, &[u8])>,
    ) -> Result<(), Refusal> {
        if let Some((question, evidence)) = shown {
            // What it says now counts here, too.
            cleared.own_claims = self.own(question, evidence)?;
        }
        let (clearance, now) = (&mut cleared.clearance, self.unix_s());
        let last = self.last_passport(clearance.ask.vm)?;
        if clearance.holds(books, last.as_ref(), now) {
            return Ok(());
        }
        let proven = Proven {
            source: cleared.claims.as_ref(),
            target: cleared.own_claims.as_ref(),
        };
        clearance.renew(books, last.as_ref(), proven, now)?;
        if self.note_clearance(clearance, Some(order.migration)) {
            Ok(())
        } else {
            Err(unjournaled().into())
        }
    }
}
