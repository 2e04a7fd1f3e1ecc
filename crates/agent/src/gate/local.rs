//! What is done to a VM on this host alone: taking it over, ending its migration, removing it.

use palanquin_api::control::MigrationInfo;
use palanquin_engine::{MigrationId, VmId};
use palanquin_trust::decision::{Action, Reason};
use palanquin_trust::{Identity, Kind, Passport, Sha256, Verified};
use uuid::Uuid;

use super::journal::Subject;
use super::passports::{follows, judges_nothing, not_journaled, verify_any};
use super::{Ask, Caller, Clearance, Proven, Refusal, refusal};
use crate::agent::Agent;
use crate::operations::Answer;
use std::sync::Arc;

/// What evidence is bound to where nothing moves.
const NO_MIGRATION: MigrationId = MigrationId([0; 16]);
const NO_ORDER: Sha256 = Sha256([0; 32]);

impl Caller {
    /// As it is journaled where it is no operator.
    pub fn local_user(self) -> String {
        format!("local user {}", self.uid)
    }
}

/// How an operator's word ends a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Before the commit: the VM stays where it is.
    Abort,
    /// In doubt: it is said that the destination has lost the VM. Where that is wrong it runs twice.
    TakeBack,
    /// In doubt: it is said that the destination runs the VM. Where that is wrong it is lost.
    GiveUp,
}

impl Ending {
    fn action(self) -> Action {
        match self {
            Self::Abort | Self::TakeBack => Action::Abort,
            Self::GiveUp => Action::Erase,
        }
    }

    /// Whether nobody can lose by it: then it must not be held up for want of a document or of room in the journal.
    fn is_harmless(self) -> bool {
        self == Self::Abort
    }
}

/// A VM that is to be taken over, with its passport.
#[derive(Debug, Default)]
pub struct Adoption(Option<Verified<Passport>>);

impl Adoption {
    /// The VM that the passport is for.
    pub fn vm(&self) -> Option<Uuid> {
        self.0.as_ref().map(|passport| passport.vm)
    }
}

impl Agent {
    /// Whoever asks, as an operator; absent where nothing is judged.
    pub(crate) fn operator_of(
        &self,
        caller: Caller,
        action: Action,
        vm: Option<Uuid>,
        what: &str,
    ) -> Answer<Option<Identity>> {
        self.gate.operator(caller).map_err(|reason| {
            let subject = Subject {
                action,
                operator: &caller.local_user(),
                vm,
                migration: None,
            };
            self.refused_here(&subject, &reason.into(), what)
        })
    }

    pub(crate) fn refused_here(
        &self,
        subject: &Subject<'_>,
        refused: &Refusal,
        what: &str,
    ) -> palanquin_api::control::ApiError {
        self.note_refusal(subject, refused);
        refusal(what, &refused.reasons)
    }

    /// Judges whether a VM may be taken over, with the passport that comes with it. It is not kept yet, see
    /// [`Agent::adopted`].
    ///
    /// # Errors
    ///
    /// A gate refuses, or there is a passport and nothing is judged.
    pub fn clear_adoption(
        self: &Arc<Self>,
        caller: Caller,
        name: &str,
        passport: Option<&[u8]>,
    ) -> Answer<Adoption> {
        let Some(books) = self.gate.books() else {
            return match passport {
                Some(_) => Err(judges_nothing()),
                None => Ok(Adoption(None)),
            };
        };
        let what = format!("taking over VM {name:?}");
        let operator = self.operator_of(caller, Action::Adopt, None, &what)?;
        let operator = operator.ok_or_else(judges_nothing)?;
        let shown = operator.to_string();
        let subject = |vm| Subject {
            action: Action::Adopt,
            operator: &shown,
            vm,
            migration: None,
        };
        let given = match passport {
            Some(bytes) => verify_any(&books, bytes),
            None => Err(Reason::new(
                palanquin_trust::Gate::Passport,
                "passport-missing",
                "no passport of the VM's owner is given",
                "Give the VM's passport with --passport.",
            )),
        };
        let given =
            given.map_err(|reason| self.refused_here(&subject(None), &reason.into(), &what))?;
        let vm = given.vm;
        let judged = self
            .last_passport(vm)
            .map_err(Refusal::from)
            .and_then(|last| {
                follows(&given, last.as_ref())?;
                let own = self.own_claims(NO_MIGRATION, VmId(*vm.as_bytes()), NO_ORDER, false)?;
                Clearance::ask(
                    books,
                    Ask::here(Action::Adopt, vm, self.gate.host()),
                    operator.clone(),
                    (given, last.as_ref()),
                    Vec::new(),
                    Proven {
                        target: own.as_ref(),
                        ..Proven::default()
                    },
                    self.unix_s(),
                )
            });
        let cleared =
            judged.map_err(|refused| self.refused_here(&subject(Some(vm)), &refused, &what))?;
        if !self.note_clearance(&cleared, None) {
            return Err(not_journaled());
        }
        Ok(Adoption(Some(cleared.passport)))
    }

    /// The VM is taken over: its passport is kept.
    ///
    /// # Errors
    ///
    /// It cannot be written, or a newer one was given in this moment.
    pub fn adopted(&self, adoption: &Adoption) -> Answer<()> {
        match &adoption.0 {
            Some(passport) => self
                .take_passport(passport)
                .map_err(|reason| refusal("the passport", &[reason])),
            None => Ok(()),
        }
    }

    /// Judges whether something that moves nothing may be done to a VM. What is harmless needs an operator, and is excused
    /// where the VM's passport is not to be had.
    fn clear_here(
        &self,
        caller: Caller,
        ask: impl FnOnce() -> Ask,
        migration: Option<MigrationId>,
        what: &str,
        is_harmless: bool,
    ) -> Answer<()> {
        let Some(books) = self.gate.books() else {
            return Ok(());
        };
        let ask = ask();
        let (action, vm) = (ask.action, ask.vm);
        let operator = self.operator_of(caller, action, Some(vm), what)?;
        let operator = operator.ok_or_else(judges_nothing)?;
        let shown = operator.to_string();
        let subject = Subject {
            action,
            operator: &shown,
            vm: Some(vm),
            migration,
        };
        let passport = self.passport_of(&books, vm);
        if let (true, Err(reason)) = (is_harmless, &passport) {
            self.note_excused(&subject, reason);
            return Ok(());
        }
        let judged = passport
            .map_err(Refusal::from)
            .and_then(|(passport, last)| {
                Clearance::ask(
                    books,
                    ask,
                    operator,
                    (passport, Some(&last)),
                    Vec::new(),
                    Proven::default(),
                    self.unix_s(),
                )
            });
        let cleared = judged.map_err(|refused| self.refused_here(&subject, &refused, what))?;
        if self.note_clearance(&cleared, migration) || is_harmless {
            Ok(())
        } else {
            Err(not_journaled())
        }
    }

    /// Judges whether a VM may be ended and removed from this host.
    ///
    /// # Errors
    ///
    /// A gate refuses.
    pub fn clear_erasure(&self, caller: Caller, vm: Uuid, name: &str) -> Answer<()> {
        let ask = || Ask::here(Action::Erase, vm, self.gate.host());
        self.clear_here(caller, ask, None, &format!("ending VM {name:?}"), false)
    }

    /// Judges whether a migration may be ended by an operator's word.
    ///
    /// # Errors
    ///
    /// A gate refuses.
    pub fn clear_ending(&self, caller: Caller, info: &MigrationInfo, how: Ending) -> Answer<()> {
        let host = |name: &str| {
            let domain = self.gate.host().trust_domain();
            Identity::new(domain, Kind::Host, name).unwrap_or_else(|_| self.gate.host().clone())
        };
        let ask = || Ask {
            source: host(&info.from),
            target: host(&info.to),
            ..Ask::here(how.action(), info.vm_uuid, self.gate.host())
        };
        let migration = Some(MigrationId(*info.id.as_bytes()));
        let what = "ending the migration";
        self.clear_here(caller, ask, migration, what, how.is_harmless())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_leaves_the_vm_where_it_is_does_without_a_passport() {
        assert!(Ending::Abort.is_harmless());
        assert!(!Ending::TakeBack.is_harmless() && !Ending::GiveUp.is_harmless());
        assert_eq!(Ending::TakeBack.action(), Action::Abort);
        assert_eq!(Ending::GiveUp.action(), Action::Erase);
    }
}
