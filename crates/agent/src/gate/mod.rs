//! Who may have what done to a VM: identities, passports, approvals, policies and quotas.
//!
//! With `[trust]` in the configuration nothing is done that is not judged here first, and every judgement is journaled;
//! without it nothing is judged but the quotas. What travels to the other host is in [`credentials`]; what the other host
//! has proven about itself comes from [`evidence`].

mod adverts;
pub mod credentials;
mod destination;
mod evidence;
mod journal;
mod local;
mod passports;
mod quota;
mod signer;
mod source;

pub use self::destination::{Bringer, InClearance};
pub use self::evidence::Question;
pub(crate) use self::evidence::told_state;
pub use self::journal::{Refusal, api_blockers, refusal, wire_blockers};
pub(crate) use self::journal::{Subject, gate_of, told_reason};
pub use self::local::{Adoption, Ending};
pub use self::quota::{Leaving, Quotas, Turn};
pub use self::signer::HostSigner;
pub use self::source::{OutClearance, encoded};

use self::evidence::Showing;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use palanquin_api::config::AgentConfig;
use palanquin_api::control::{Strategy, TrustInfo};
use palanquin_api::trust::Trust;
use palanquin_host::measure::Meter;
use palanquin_host::users::User;
use palanquin_trust::decision::{Action, Decision, Gate, Permit, Reason, Wish};
use palanquin_trust::identity::IdentityError;
use palanquin_trust::passport::LastPassport;
use palanquin_trust::policy::{Files, Policies, Request};
use palanquin_trust::{Approval, Identity, Keyring, Passport, Verified, VerifiedClaims};
use palanquin_trust_files::{FilesError, keyring, policies};
use tracing::{error, info};
use uuid::Uuid;

use crate::attest::AttestError;
use crate::chain::chain;

/// Who asks, over the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Local user, as the kernel says.
    pub uid: u32,
}

/// Why there is nothing to judge by.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// Policies or keys.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A name in the configuration.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A local user that does not exist.
    #[error("`trust.operators`: there is no user {0:?}")]
    NoUser(String),
    /// This host's TPM, or what is known of those of others.
    #[error("`[trust.attestation]` is not usable")]
    Attest(#[from] AttestError),
    /// This host cannot sign orders.
    #[error(
        "the key of this host's certificate signs no orders: it is neither Ed25519 nor ECDSA on P-256"
    )]
    NoSigner,
}

/// By what is judged: policies, and whose signatures are believed. Never changed, only replaced.
#[derive(Debug)]
pub struct Books {
    /// The provider's.
    pub policies: Policies,
    /// Of owners and approvers.
    pub keys: Keyring,
}

/// What decides where policies or keys cannot be read.
const UNUSABLE: &str = r#"
@id("policies-unusable")
@reason("the policies or keys of this host cannot be used")
@remedy("`palanquin config check` says why; mend them, and have them read again (SIGHUP).")
forbid (principal, action, resource);
"#;

impl Books {
    /// Permits nothing, and believes nobody. The error is why; it is given back should even that not be possible.
    fn refusing(error: GateError) -> Result<Self, GateError> {
        let files = Files {
            policies: [("unusable.cedar".to_owned(), UNUSABLE.to_owned())].into(),
            directory: "version = 1\n".to_owned(),
        };
        match Policies::load(&files) {
            Ok(policies) => Ok(Self {
                policies,
                keys: Keyring::default(),
            }),
            Err(_) => Err(error),
        }
    }
}

struct Judged {
    config: Trust,
    operators: HashMap<u32, Identity>,
    signer: HostSigner,
    showing: Showing,
    books: Mutex<Arc<Books>>,
    reload_error: Mutex<Option<String>>,
}

/// Judges.
pub struct Gatekeeper {
    host: Identity,
    judged: Option<Judged>,
    /// How much is begun, also where nothing is judged.
    pub quotas: Quotas,
    /// Decisions since the start: permitted, and refused.
    decided: [AtomicU64; 2],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn load(config: &Trust) -> Result<Books, GateError> {
    let mut entries: Vec<(Identity, &PathBuf)> = Vec::new();
    for (identity, paths) in config.owners.iter().chain(&config.approvers) {
        let identity: Identity = identity.parse()?;
        entries.extend(paths.iter().map(|path| (identity.clone(), path)));
    }
    let entries = entries
        .iter()
        .map(|(identity, path)| (identity, Path::as_ref(path)));
    Ok(Books {
        policies: policies(&config.policies)?,
        keys: keyring(entries)?,
    })
}

fn uid_of(user: &str) -> Result<u32, GateError> {
    let number = user.parse().ok();
    number
        .or_else(|| User::find(user).map(|user| user.uid))
        .ok_or_else(|| GateError::NoUser(user.to_owned()))
}

impl Gatekeeper {
    /// Reads what the configuration names, and opens this host's TPM. The meter is that of the hypervisors.
    ///
    /// # Errors
    ///
    /// A file or name is not usable, or this host's key signs no orders.
    pub fn new(
        config: &AgentConfig,
        host: Identity,
        signer: Option<HostSigner>,
        meter: Arc<Meter>,
    ) -> Result<Self, GateError> {
        let judged = match &config.trust {
            None => None,
            Some(trust) => {
                // What runs here has to be recovered also where nothing new can be permitted.
                let (books, problem) = match load(trust) {
                    Ok(books) => (books, None),
                    Err(error) => {
                        let problem = chain(&error);
                        error!(
                            problem,
                            "policies or keys are not usable: nothing is permitted until they are, and read again"
                        );
                        (Books::refusing(error)?, Some(problem))
                    }
                };
                let mut operators = HashMap::new();
                for (user, identity) in &trust.operators {
                    operators.insert(uid_of(user)?, identity.parse()?);
                }
                Some(Judged {
                    config: trust.clone(),
                    operators,
                    signer: signer.ok_or(GateError::NoSigner)?,
                    showing: Showing::open(trust.attestation.as_ref(), &config.state_dir, meter)?,
                    books: Mutex::new(Arc::new(books)),
                    reload_error: Mutex::new(problem),
                })
            }
        };
        Ok(Self {
            host,
            judged,
            quotas: Quotas::new(&config.limits),
            decided: Default::default(),
        })
    }

    /// How many decisions there were since the start: permitted, and refused.
    pub fn decided(&self) -> (u64, u64) {
        let [permitted, refused] = &self.decided;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (count(permitted), count(refused))
    }

    fn count(&self, permitted: bool) {
        self.decided[usize::from(!permitted)].fetch_add(1, Ordering::Relaxed);
    }

    /// Whether anything is judged.
    pub fn judges(&self) -> bool {
        self.judged.is_some()
    }

    /// This host.
    pub fn host(&self) -> &Identity {
        &self.host
    }

    /// By what is judged now; absent where nothing is.
    pub fn books(&self) -> Option<Arc<Books>> {
        let judged = self.judged.as_ref()?;
        Some(Arc::clone(&lock(&judged.books)))
    }

    /// Users other than root and the agent's own who may enter the control socket.
    pub fn may_enter(&self, uid: u32) -> bool {
        self.judged
            .as_ref()
            .is_some_and(|judged| judged.operators.contains_key(&uid))
    }

    /// Whether users other than root have a part.
    pub fn has_local_operators(&self) -> bool {
        self.judged
            .as_ref()
            .is_some_and(|judged| judged.operators.keys().any(|uid| *uid != 0))
    }

    /// Reads policies, keys and enrolments again. Those of before stay where the new ones are not usable. What is under way is
    /// judged anew by the new ones before it commits.
    pub fn reload(&self) {
        let Some(judged) = &self.judged else {
            return;
        };
        let mut problems = Vec::new();
        match load(&judged.config) {
            Ok(books) => {
                let (sha256, version) =
                    (books.policies.sha256(), books.policies.directory().version);
                let before = std::mem::replace(&mut *lock(&judged.books), Arc::new(books));
                info!(%sha256, version, before = %before.policies.sha256(), "policies were read again");
            }
            Err(problem) => {
                let problem = chain(&problem);
                error!(
                    problem,
                    "the new policies or keys are refused; those of before stay"
                );
                problems.push(problem);
            }
        }
        match judged.showing.reload() {
            Ok(None) => {}
            Ok(Some(hosts)) => info!(hosts, "enrolments were read again"),
            Err(problem) => {
                let problem = chain(&problem);
                error!(
                    problem,
                    "the new enrolments are refused; those of before stay"
                );
                problems.push(problem);
            }
        }
        *lock(&judged.reload_error) = (!problems.is_empty()).then(|| problems.join("; "));
    }

    /// What people may see of it; absent where nothing is judged.
    pub fn info(&self) -> Option<TrustInfo> {
        let judged = self.judged.as_ref()?;
        let books = self.books()?;
        Some(TrustInfo {
            policies: judged.config.policies.display().to_string(),
            policy_version: books.policies.directory().version,
            policy_sha256: books.policies.sha256().to_string(),
            reload_error: lock(&judged.reload_error).clone(),
        })
    }

    /// Which operator that local user is; absent where nothing is judged.
    ///
    /// # Errors
    ///
    /// The user is no operator here.
    pub fn operator(&self, caller: Caller) -> Result<Option<Identity>, Reason> {
        let Some(judged) = &self.judged else {
            return Ok(None);
        };
        let known = judged.operators.get(&caller.uid).cloned();
        known.map(Some).ok_or_else(|| {
            Reason::new(
                Gate::Identity,
                "operator-unknown",
                format!("local user {} is no operator of this host", caller.uid),
                "Name the user under `[trust.operators]` in the agent's configuration, or be another.",
            )
        })
    }
}

/// What is to be done, kept.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) action: Action,
    pub(crate) vm: Uuid,
    pub(crate) source: Identity,
    pub(crate) target: Identity,
    pub(crate) strategy: Strategy,
    pub(crate) post_copy: bool,
}

impl Ask {
    /// Something that moves nothing.
    pub(crate) fn here(action: Action, vm: Uuid, host: &Identity) -> Self {
        Self {
            action,
            vm,
            source: host.clone(),
            target: host.clone(),
            strategy: Strategy::Auto,
            post_copy: false,
        }
    }

    fn wish(&self) -> Wish<'_> {
        Wish {
            action: self.action,
            vm: self.vm,
            source: &self.source,
            target: &self.target,
            strategy: self.strategy,
            post_copy: self.post_copy,
        }
    }
}

/// What was permitted, with all that it rests on, so that it can be judged anew.
#[derive(Debug)]
pub(crate) struct Clearance {
    pub(crate) ask: Ask,
    pub(crate) operator: Identity,
    pub(crate) passport: Verified<Passport>,
    pub(crate) approvals: Vec<Verified<Approval>>,
    /// Absent as long as what the target shows has to be waited for.
    permit: Option<Permit>,
    books: Arc<Books>,
}

/// What others have proven about themselves.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Proven<'a> {
    pub(crate) source: Option<&'a VerifiedClaims>,
    pub(crate) target: Option<&'a VerifiedClaims>,
}

impl Clearance {
    /// Decides by these books.
    pub(crate) fn ask(
        books: Arc<Books>,
        ask: Ask,
        operator: Identity,
        passport: (Verified<Passport>, Option<&LastPassport>),
        approvals: Vec<Verified<Approval>>,
        proven: Proven<'_>,
        now_unix_s: u64,
    ) -> Result<Self, Refusal> {
        let (passport, last_passport) = passport;
        let permit = books.policies.decide(&Request {
            wish: ask.wish(),
            operator: &operator,
            passport: Some(&passport),
            last_passport,
            approvals: &approvals,
            source_claims: proven.source,
            target_claims: proven.target,
            under_way: false,
            now_unix_s,
        })?;
        Ok(Self {
            ask,
            operator,
            passport,
            approvals,
            permit: Some(permit),
            books,
        })
    }

    /// Decides nothing yet: what the target shows has to be waited for.
    pub(crate) fn wait(
        books: Arc<Books>,
        ask: Ask,
        operator: Identity,
        passport: Verified<Passport>,
        approvals: Vec<Verified<Approval>>,
    ) -> Self {
        Self {
            ask,
            operator,
            passport,
            approvals,
            permit: None,
            books,
        }
    }

    /// What was decided, if it was.
    pub(crate) fn decision(&self) -> Option<&Decision> {
        self.permit.as_ref().map(Permit::decision)
    }

    /// Whether it still is permission for just that, by these books and with that passport as the newest.
    pub(crate) fn holds(
        &self,
        books: &Arc<Books>,
        last_passport: Option<&LastPassport>,
        now_unix_s: u64,
    ) -> bool {
        Arc::ptr_eq(&self.books, books)
            && last_passport.is_some_and(|last| last.sha256 == self.passport.sha256())
            && self
                .permit
                .as_ref()
                .is_some_and(|permit| permit.covers(&self.ask.wish(), now_unix_s).is_ok())
    }

    /// Decides anew on the same, by these books and what is proven now. A key that is believed no more makes what it has
    /// signed worthless.
    pub(crate) fn renew(
        &mut self,
        books: &Arc<Books>,
        last_passport: Option<&LastPassport>,
        proven: Proven<'_>,
        now_unix_s: u64,
    ) -> Result<(), Refusal> {
        self.passport = passports::verify(books, self.passport.as_signed_bytes(), self.ask.vm)?;
        self.approvals.retain(|approval| {
            passports::verify_approval(books, approval.as_signed_bytes()).is_ok()
        });
        self.permit = None;
        self.permit = Some(books.policies.decide(&Request {
            wish: self.ask.wish(),
            operator: &self.operator,
            passport: Some(&self.passport),
            last_passport,
            approvals: &self.approvals,
            source_claims: proven.source,
            target_claims: proven.target,
            under_way: true,
            now_unix_s,
        })?);
        self.books = Arc::clone(books);
        Ok(())
    }
}
