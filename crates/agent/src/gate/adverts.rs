//! Advertisements: memory that this host promises to others, and what others have promised to it.
//!
//! A promise is made by measuring what there is and holding it ([`Agent::make_advertisement`], [`Agent::held_from`]), so that
//! who keeps to it can always give it. Who has promised it and refuses a reservation within it has advertised falsely
//! ([`Agent::audit_refusal`]): nothing is sent there until an operator pardons it.

use std::fs::File;
use std::io::Read;
use std::sync::MutexGuard;

use palanquin_api::advertisement::{
    AdvertisementInfo, Advertisements, MadeAdvertisement, MakeAdvertisement, PromiseInfo,
    QuarantineInfo,
};
use palanquin_api::control::{ApiError, ErrorKind, GateDecision, GateReason};
use palanquin_api::hex::Hex;
use palanquin_engine::message::WireBlocker;
use palanquin_engine::{MigrationId, Order};
use palanquin_host::facts;
use palanquin_host::vm::GuestRam;
use palanquin_trust::advertisement::{
    ADVERTISEMENT_MAX_S, Accepted, AdvertisementError, Parcel, Receiver, VERSION_MAX, needed_bytes,
};
use palanquin_trust::decision::{Action, Gate, Reason};
use palanquin_trust::{
    Advertisement, Identity, Keyring, Kind, Sha256, Sign, Signed, VerifiedClaims,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tracing::{error, info, warn};

use super::journal::Subject;
use super::passports::{judges_nothing, not_journaled};
use super::{Books, Caller, HostSigner, OutClearance, refusal};
use crate::agent::{Agent, Entry};
use crate::attest::remedy::{FALSE_ADVERTISEMENT, Quarantined};
use crate::chain::chain;
use crate::identity::key_of_certificate;
use crate::operations::{Answer, error as api_error, internal};
use crate::store::{Promise, StoreError, StoredAdvertisement};

/// What is told for a blocker of a host without enough memory.
const MEMORY_SHORT: &str = "memory-short";
/// No migration.
const NOBODY: MigrationId = MigrationId([0; 16]);
const ASK_ANEW: &str =
    "Get a new one from that host: `palanquin advertisement make --for` this host.";

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

fn bad(code: &'static str, message: impl Into<String>) -> Reason {
    Reason::new(Gate::Identity, code, message, ASK_ANEW)
}

fn not_accepted(error: &AdvertisementError) -> Reason {
    let (gate, remedy) = match error {
        AdvertisementError::Quarantined(_) => (
            Gate::Attestation,
            "Find out why; `palanquin advertisement pardon` ends a quarantine for a false advertisement.",
        ),
        AdvertisementError::Unlisted(_) | AdvertisementError::OtherPlace(_) => (
            Gate::Identity,
            "Bring `directory.toml` of both hosts to the same version.",
        ),
        _ => (Gate::Identity, ASK_ANEW),
    };
    Reason::new(gate, error.code(), error.to_string(), remedy)
}

fn unreadable(error: &StoreError) -> ApiError {
    internal("the state file does not tell what was advertised", error)
}

fn quarantine_info(entry: &Quarantined) -> QuarantineInfo {
    QuarantineInfo {
        host: entry.host.to_string(),
        since_unix_s: entry.since_unix_s,
        code: entry.code.clone(),
        message: entry.message.clone(),
    }
}

fn info_of(says: &Advertisement, sha256: Sha256, memory_left_bytes: u64) -> AdvertisementInfo {
    AdvertisementInfo {
        host: says.host.to_string(),
        audience: says.audience.to_string(),
        sequence: says.sequence,
        issued_unix_s: says.issued_unix_s,
        expires_unix_s: says.expires_unix_s,
        memory_total_bytes: says.memory_total_bytes,
        memory_free_bytes: says.memory_free_bytes,
        memory_left_bytes,
        cpu_threads: says.cpu_threads,
        hypervisor_version: says.hypervisor_version.clone(),
        hypervisor_sha256: says.hypervisor_sha256.map(|sha256| sha256.to_string()),
        region: says.region.clone(),
        groups: says.groups.clone(),
        sha256: sha256.to_string(),
    }
}

/// Guest RAM that holds no data yet.
fn untouched(ram: &dyn GuestRam) -> Result<u64, palanquin_host::Error> {
    let mut holes = 0_u64;
    for (index, region) in ram.regions().iter().enumerate() {
        let extents = ram.data_extents(index)?;
        let data = extents.iter().map(|extent| extent.end - extent.start);
        holes = holes.saturating_add(region.size_bytes.saturating_sub(data.sum()));
    }
    Ok(holes)
}

fn untouched_of(entry: &Entry) -> u64 {
    match &entry.vm {
        Some(vm) if !vm.wait_ended(std::time::Duration::ZERO) => {
            let found = vm.ram().and_then(|ram| untouched(ram.as_ref()));
            // What cannot be looked at may still be asked for.
            found.unwrap_or(entry.stored.memory_bytes)
        }
        _ => 0,
    }
}

impl Agent {
    /// Memory that may not be given to a VM from that host (or to one that begins here): what other hosts have been promised.
    /// Where there is any, what the VMs that run here have not touched yet is not given away either.
    pub(crate) fn held_from(&self, from: Option<&str>) -> u64 {
        let promises = self.store.promises(self.unix_s()).map_err(|problem| {
            let problem = chain(&problem);
            error!(problem, "what was promised is not known: nothing is given");
        });
        let Ok(promises) = promises else {
            return u64::MAX;
        };
        let others = promises
            .iter()
            .filter(|promise| Some(&*promise.audience) != from);
        let held = others.fold(0_u64, |sum, promise| sum.saturating_add(promise.left_bytes));
        match held {
            0 => 0,
            held => held.saturating_add(self.untouched_bytes()),
        }
    }

    fn untouched_bytes(&self) -> u64 {
        let entries = self.entries();
        let settled = entries.iter().filter(|entry| !entry.stored.incoming);
        settled.fold(0_u64, |sum, entry| sum.saturating_add(untouched_of(entry)))
    }

    /// Lets a VM begin here only where no promise is broken by it; the answer is to be held until it is known.
    ///
    /// # Errors
    ///
    /// It would take what was promised to others.
    pub(crate) fn spare_promises(&self, ram_bytes: u64) -> Answer<MutexGuard<'_, ()>> {
        let turn = self.reserving();
        if self.held_from(None) == 0 {
            return Ok(turn);
        }
        let available = self.memory_for(NOBODY, None);
        let available =
            available.map_err(|problem| internal("this machine can't be looked at", &problem))?;
        if needed_bytes(ram_bytes) <= available {
            return Ok(turn);
        }
        let message = format!(
            "the VM needs {} MiB, and {} MiB are left beside what was promised to other hosts",
            mib(needed_bytes(ram_bytes)),
            mib(available)
        );
        let hint = "`palanquin advertisement ls` shows until when promises hold";
        Err(api_error(ErrorKind::Blocked, message, Some(hint)))
    }

    /// Another host of the directory, by its name.
    fn listed(&self, books: &Books, name: &str) -> Answer<Identity> {
        let host = Identity::new(self.gate.host().trust_domain(), Kind::Host, name);
        let host = host.ok().filter(|host| {
            host != self.gate.host() && books.policies.directory().hosts.contains_key(host)
        });
        host.ok_or_else(|| {
            let message = format!("there is no other host {name:?} in the directory");
            let hint = "`directory.toml` of this host's policies lists them";
            api_error(ErrorKind::NotFound, message, Some(hint))
        })
    }

    fn advertiser(&self) -> Answer<&HostSigner> {
        let judged = self.gate.judged.as_ref().ok_or_else(judges_nothing)?;
        Ok(&judged.signer)
    }

    /// This host's certificates, as they lie beside its key.
    fn own_certificates(&self, signer: &HostSigner) -> Answer<Vec<Vec<u8>>> {
        let path = &self.config.tls.certificate;
        let unusable = |problem: String| {
            let message = format!("{} can't be shown to others: {problem}", path.display());
            let hint = "a certificate that was replaced counts from the agent's next start";
            api_error(ErrorKind::Internal, message, Some(hint))
        };
        let list: Result<Vec<_>, _> = std::fs::read(path)
            .map(|pem| CertificateDer::pem_slice_iter(&pem).collect())
            .map_err(|problem| unusable(problem.to_string()))?;
        let list = list.map_err(|problem| unusable(problem.to_string()))?;
        let own = list.first().and_then(|leaf| key_of_certificate(leaf).ok());
        if own != Some(signer.public_key()) {
            return Err(unusable(
                "it is of another key than this agent's".to_owned(),
            ));
        }
        Ok(list.iter().map(|der| der.to_vec()).collect())
    }

    /// Digest of the binary from which hypervisors are started; none for a script, which starts another.
    fn hypervisor_sha256(&self) -> Answer<Option<Sha256>> {
        let problem =
            |error: &dyn std::error::Error| internal("the hypervisor can't be measured", error);
        let showing = self.gate.showing().ok_or_else(judges_nothing)?;
        let mut file = File::open(&self.config.qemu.binary).map_err(|error| problem(&error))?;
        let mut magic = [0; 2];
        file.read_exact(&mut magic)
            .map_err(|error| problem(&error))?;
        if magic == *b"#!" {
            return Ok(None);
        }
        let digest = showing
            .meter()
            .file(&file)
            .map_err(|error| problem(&error))?;
        Ok(Some(Sha256(digest)))
    }

    /// Measures what this host has, promises it to another host, and signs that.
    ///
    /// # Errors
    ///
    /// Nothing is judged here, whoever asks is no operator, there is no such host, there is nothing to promise, or the promise
    /// can't be kept on the disk.
    pub fn make_advertisement(
        &self,
        request: &MakeAdvertisement,
        caller: Caller,
    ) -> Answer<MadeAdvertisement> {
        let books = self.gate.books().ok_or_else(judges_nothing)?;
        let operator = self.gate.operator(caller);
        operator.map_err(|reason| refusal("advertising", &[reason]))?;
        if !(1..=ADVERTISEMENT_MAX_S).contains(&request.lifetime_s) {
            let message = format!("an advertisement holds for 1 to {ADVERTISEMENT_MAX_S} seconds");
            return Err(api_error(ErrorKind::Usage, message, None));
        }
        let audience = self.listed(&books, &request.audience)?;
        let signer = self.advertiser()?;
        let certificates = self.own_certificates(signer)?;
        let hypervisor_sha256 = self.hypervisor_sha256()?;
        let problem = |e: palanquin_host::Error| internal("this machine can't be looked at", &e);
        let version = self.hypervisor.version().map_err(problem)?;
        let version = version.chars().filter(|c| matches!(c, ' '..='~'));
        let listed = books.policies.directory().hosts.get(self.gate.host());
        // Nobody gets any of it between measuring and promising.
        let turn = self.reserving();
        let memory_total_bytes = facts::memory_total_bytes().map_err(problem)?;
        let free = self.memory_free(NOBODY).map_err(problem)?;
        let now = self.unix_s();
        let promises = self.store.promises(now).map_err(|e| unreadable(&e))?;
        let others = promises
            .iter()
            .filter(|promise| promise.audience != request.audience);
        let taken = others.fold(self.untouched_bytes(), |sum, promise| {
            sum.saturating_add(promise.left_bytes)
        });
        let memory_free_bytes = free
            .saturating_sub(taken)
            .min(request.memory_bytes.unwrap_or(u64::MAX));
        if memory_free_bytes == 0 {
            let hint = "`palanquin advertisement ls` shows what was promised to other hosts";
            let message = "this host has no memory that it could promise";
            return Err(api_error(ErrorKind::Blocked, message, Some(hint)));
        }
        let expires_unix_s = now.saturating_add(request.lifetime_s);
        let promise = Promise {
            audience: request.audience.clone(),
            left_bytes: memory_free_bytes,
            expires_unix_s,
        };
        let sequence = self.store.promise(&promise, now);
        let sequence = sequence.map_err(|e| internal("the promise can't be kept", &e))?;
        drop(turn);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let says = Advertisement {
            host: self.gate.host().clone(),
            audience,
            sequence,
            issued_unix_s: now,
            expires_unix_s,
            memory_total_bytes,
            memory_free_bytes,
            cpu_threads: u32::try_from(cpus).unwrap_or(u32::MAX),
            hypervisor_version: version.take(VERSION_MAX).collect(),
            hypervisor_sha256,
            region: listed.and_then(|listed| listed.region.clone()),
            groups: listed.map_or_else(Vec::new, |listed| listed.groups.iter().cloned().collect()),
        };
        let unsigned = |e: &dyn std::error::Error| internal("the advertisement can't be signed", e);
        let signed = Signed::sign(&says, signer).map_err(|e| unsigned(&e))?;
        let parcel = Parcel {
            envelope: signed.as_bytes().to_vec().into(),
            certificates: certificates.into_iter().map(Into::into).collect(),
        };
        let parcel = parcel.to_bytes().map_err(|e| unsigned(&e))?;
        info!(
            audience = request.audience,
            sequence, memory_free_bytes, expires_unix_s, "promised"
        );
        Ok(MadeAdvertisement {
            parcel: Hex(parcel),
            says: info_of(&says, signed.sha256(), memory_free_bytes),
        })
    }

    /// An advertisement that holds now, for this host, by whom the certificates beside it say.
    fn judge_parcel(&self, books: &Books, parcel: &[u8]) -> Result<Accepted, Reason> {
        let malformed =
            |error: &dyn std::error::Error| bad("advertisement-malformed", chain(error));
        let parcel = Parcel::from_bytes(parcel).map_err(|error| malformed(&error))?;
        let certificates: Vec<&[u8]> = parcel.certificates.iter().map(|der| &der[..]).collect();
        let peer = self.network.identify(&certificates).map_err(|error| {
            let message = format!("its certificates are not believed: {}", chain(&error));
            bad("certificate-refused", message)
        })?;
        let mut ring = Keyring::default();
        let key = peer.key.ok_or_else(|| {
            bad(
                "key-unknown",
                "the key in the host's certificate signs no documents",
            )
        })?;
        ring.insert(peer.identity.clone(), key)
            .map_err(|error| bad("key-unknown", error.to_string()))?;
        let signed = Signed::<Advertisement>::from_bytes(&parcel.envelope);
        let signed = signed.map_err(|error| malformed(&error))?;
        // Its time is a rule of its own below.
        let verified = signed.verify_lapsed(&ring).map_err(|error| {
            let message = format!("the advertisement is not believed: {error}");
            bad(error.code(), message)
        })?;
        let stored = self.store.advertisements();
        let stored = stored.map_err(|error| bad("advertisement-unreadable", chain(&error)))?;
        let newest = stored.iter().find(|known| known.host == peer.identity);
        let quarantined = self.quarantine_of(&peer.identity);
        verified
            .accept(&Receiver {
                host: self.gate.host(),
                now_unix_s: self.unix_s(),
                newest: newest.map(|known| (known.sequence, known.sha256)),
                listed: books.policies.directory().hosts.get(&peer.identity),
                quarantined: quarantined.as_ref().map(|entry| &*entry.message),
            })
            .map_err(|error| not_accepted(&error))
    }

    fn quarantine_of(&self, host: &Identity) -> Option<Quarantined> {
        self.gate.showing()?.quarantine().of(host)
    }

    /// What was accepted of a host and holds now, by the certificates and keys that are believed now.
    fn advertised(&self, books: &Books, host: &Identity) -> Option<Accepted> {
        let stored = self.store.advertisements().map_err(|problem| {
            let problem = chain(&problem);
            warn!(problem, "what was advertised is not known");
        });
        let stored = stored.ok()?;
        let newest = stored.iter().find(|known| known.host == *host)?;
        self.judge_parcel(books, &newest.parcel).ok()
    }

    fn sent_since(&self, accepted: &Accepted, but: MigrationId) -> Result<u64, StoreError> {
        let host = accepted.advertisement().host.name();
        let since = accepted.counts_from_unix_s();
        self.store.departed_bytes(host, since, but)
    }

    fn told_of(&self, accepted: &Accepted) -> Answer<AdvertisementInfo> {
        let sent = self.sent_since(accepted, NOBODY);
        let left = accepted.left_bytes(sent.map_err(|e| unreadable(&e))?);
        Ok(info_of(accepted.advertisement(), accepted.sha256(), left))
    }

    /// Accepts an advertisement of another host, if it is the newest and holds.
    ///
    /// # Errors
    ///
    /// Nothing is judged here, whoever asks is no operator, or the advertisement breaks a rule.
    pub fn accept_advertisement(&self, parcel: &[u8], caller: Caller) -> Answer<AdvertisementInfo> {
        let books = self.gate.books().ok_or_else(judges_nothing)?;
        let operator = self.gate.operator(caller);
        let operator =
            operator.map_err(|reason| refusal("accepting an advertisement", &[reason]))?;
        let operator = operator.ok_or_else(judges_nothing)?;
        let judged = self.judge_parcel(&books, parcel).and_then(|accepted| {
            let says = accepted.advertisement();
            let stored = StoredAdvertisement {
                host: says.host.clone(),
                sequence: says.sequence,
                sha256: accepted.sha256(),
                parcel: parcel.to_vec(),
            };
            match self.store.put_advertisement(&stored) {
                Ok(true) => Ok(accepted),
                // A newer one was given in this moment.
                Ok(false) => Err(bad(
                    "advertisement-not-newest",
                    "a newer one of that host is known",
                )),
                Err(error) => Err(bad("advertisement-unreadable", chain(&error))),
            }
        });
        match judged {
            Ok(accepted) => {
                let says = accepted.advertisement();
                info!(host = %says.host, says.sequence, says.memory_free_bytes, "accepted an advertisement");
                self.told_of(&accepted)
            }
            Err(reason) => {
                self.note_word("acceptAdvertisement", &operator, false, &reason);
                Err(refusal("the advertisement", &[reason]))
            }
        }
    }

    /// Journals something that was decided on a host and concerns no VM.
    fn note_word(
        &self,
        action: &str,
        operator: &Identity,
        permitted: bool,
        reason: &Reason,
    ) -> bool {
        self.note_decision(GateDecision {
            at_unix_s: self.unix_s(),
            action: action.to_owned(),
            operator: operator.to_string(),
            vm: None,
            migration: None,
            permitted,
            permitted_by: Vec::new(),
            reasons: vec![GateReason {
                gate: reason.gate.name().to_owned(),
                code: reason.code.to_owned(),
                message: reason.message.clone(),
                remedy: reason.remedy.clone(),
                policy: None,
            }],
            policy_sha256: None,
            passport_sha256: None,
            peer: None,
            times: 1,
            last_unix_s: None,
        })
    }

    /// What others have promised to this host and this host to others, as far as it holds now.
    ///
    /// # Errors
    ///
    /// The state file cannot be read.
    pub fn list_advertisements(&self) -> Answer<Advertisements> {
        let Some(books) = self.gate.books() else {
            return Ok(Advertisements::default());
        };
        let stored = self.store.advertisements().map_err(|e| unreadable(&e))?;
        let holding = stored
            .iter()
            .filter_map(|known| self.judge_parcel(&books, &known.parcel).ok());
        let accepted = holding.map(|accepted| self.told_of(&accepted));
        let promises = self
            .store
            .promises(self.unix_s())
            .map_err(|e| unreadable(&e))?;
        Ok(Advertisements {
            accepted: accepted.collect::<Answer<_>>()?,
            promised: promises
                .into_iter()
                .map(|promise| PromiseInfo {
                    audience: promise.audience,
                    left_bytes: promise.left_bytes,
                    expires_unix_s: promise.expires_unix_s,
                })
                .collect(),
            quarantined: self
                .gate
                .quarantined()
                .iter()
                .map(quarantine_info)
                .collect(),
        })
    }

    /// Ends the quarantine of a host that had advertised falsely; what it had advertised counts no more.
    ///
    /// # Errors
    ///
    /// Nothing is judged here, whoever asks is no operator, the host is in no such quarantine, or it can't be journaled.
    pub fn pardon_host(&self, name: &str, caller: Caller) -> Answer<QuarantineInfo> {
        let books = self.gate.books().ok_or_else(judges_nothing)?;
        let operator = self.gate.operator(caller);
        let operator = operator.map_err(|reason| refusal("pardoning a host", &[reason]))?;
        let operator = operator.ok_or_else(judges_nothing)?;
        let host = self.listed(&books, name)?;
        let entry = self.quarantine_of(&host).filter(Quarantined::is_false);
        let entry = entry.ok_or_else(|| {
            let message = format!("host {name:?} is not in quarantine for a false advertisement");
            let hint = "`palanquin advertisement ls` lists who is";
            api_error(ErrorKind::NotFound, message, Some(hint))
        })?;
        let what = format!("{host} is not in quarantine any more: {}", entry.message);
        let reason = Reason::new(Gate::Attestation, "pardoned", what, "None is needed.");
        if !self.note_word("pardon", &operator, true, &reason) {
            return Err(not_journaled());
        }
        let voided = self.store.void_advertisement(&host);
        voided.map_err(|e| internal("what it had advertised can't be made void", &e))?;
        if let Some(showing) = self.gate.showing() {
            showing.quarantine().pardon(&host);
        }
        self.keep_checks();
        info!(%host, %operator, "pardoned");
        Ok(quarantine_info(&entry))
    }

    /// Nothing is sent to a host that has advertised falsely.
    pub(super) fn refuse_liar(&self, target: &Identity) -> Result<(), Reason> {
        match self.quarantine_of(target).filter(Quarantined::is_false) {
            Some(entry) => Err(not_accepted(&AdvertisementError::Quarantined(
                entry.message,
            ))),
            None => Ok(()),
        }
    }

    /// A VM is about to be sent to a host: it counts against what that has promised, whatever becomes of it.
    ///
    /// # Errors
    ///
    /// It can't be recorded.
    pub(crate) fn note_departure(&self, order: &Order, ram_bytes: u64) -> Answer<()> {
        if !self.gate.judges() {
            return Ok(());
        }
        let noted = self
            .store
            .put_departure(order, needed_bytes(ram_bytes), self.unix_s());
        noted.map_err(|e| internal("the migration can't be recorded", &e))
    }

    /// Compares a destination's refusal with what that host has promised. A false advertisement is journaled, and its host is
    /// in quarantine from now on.
    pub(crate) fn audit_refusal(
        &self,
        cleared: &OutClearance,
        order: &Order,
        ram_bytes: u64,
        blockers: &[WireBlocker],
    ) -> Option<Reason> {
        let short = blockers
            .iter()
            .find(|blocker| blocker.code == MEMORY_SHORT)?;
        let books = self.gate.books()?;
        let accepted = self.advertised(&books, cleared.target())?;
        let sent = self.sent_since(&accepted, order.migration);
        let sent = sent.inspect_err(|problem| {
            let problem = chain(problem);
            warn!(
                problem,
                "a refusal is not compared with what was advertised"
            );
        });
        let (sent, now) = (sent.ok()?, self.unix_s());
        let left = mib(accepted.left_bytes(sent));
        if !accepted.is_broken_by_refusing(ram_bytes, sent, now) {
            info!(host = %cleared.target(), left, "refused for want of memory, and has promised no more");
            return None;
        }
        let what = format!(
            "of {} MiB promised {left} MiB must be left, and it refuses a VM of {} MiB ({})",
            mib(accepted.advertisement().memory_free_bytes),
            mib(ram_bytes),
            short.message
        );
        Some(self.quarantine_liar(cleared, order, &accepted, &what))
    }

    /// Compares what a destination has proven with what it has advertised, as [`Agent::audit_refusal`].
    pub(super) fn audit_hypervisor(
        &self,
        cleared: &OutClearance,
        order: &Order,
        claims: &VerifiedClaims,
    ) -> Option<Reason> {
        let books = self.gate.books()?;
        let accepted = self.advertised(&books, cleared.target())?;
        let proven = claims.measured().hypervisor.as_ref();
        if !accepted.contradicts(proven, self.unix_s()) {
            return None;
        }
        let word = |sha256: Option<&Sha256>| sha256.map_or_else(String::new, Sha256::to_string);
        let what = format!(
            "the hypervisor is {}, and its evidence proves {}",
            word(accepted.advertisement().hypervisor_sha256.as_ref()),
            word(proven)
        );
        Some(self.quarantine_liar(cleared, order, &accepted, &what))
    }

    fn quarantine_liar(
        &self,
        cleared: &OutClearance,
        order: &Order,
        accepted: &Accepted,
        what: &str,
    ) -> Reason {
        let host = cleared.target();
        let (sequence, sha256) = (accepted.advertisement().sequence, accepted.sha256());
        let message = format!("advertisement {sequence} ({sha256}) of {host} is false: {what}");
        if let Some(showing) = self.gate.showing() {
            showing.quarantine().accuse(host, &message, self.unix_s());
        }
        self.keep_checks();
        let remedy = "Choose another host. Find out why it advertised that; `palanquin advertisement pardon` ends its quarantine.";
        let reason = Reason::new(Gate::Attestation, FALSE_ADVERTISEMENT, message, remedy);
        let operator = cleared.operator().to_string();
        let subject = Subject {
            action: Action::MigrateOut,
            operator: &operator,
            vm: Some(uuid::Uuid::from_bytes(order.vm.0)),
            migration: Some(order.migration),
        };
        self.note_refusal(&subject, &reason.clone().into());
        reason
    }
}
