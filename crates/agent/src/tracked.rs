//! What people may see of a migration, and how they reach it.

use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use palanquin_api::control::{ApiError, ErrorKind, MigrationInfo, Outcome, Phase, Side, Strategy};
use palanquin_engine::message::{Reason, WireBlocker};
use palanquin_engine::order::Order;
use uuid::Uuid;

use crate::destination_session::DestinationEvent;
use crate::gate::gate_of;
use crate::source_session::SourceEvent;

/// The session that works on a migration.
#[derive(Clone)]
pub enum Session {
    /// We are its source.
    Source(Sender<SourceEvent>),
    /// We are its destination.
    Destination(Sender<DestinationEvent>),
}

/// A migration that this agent knows.
pub struct Tracked {
    info: Mutex<MigrationInfo>,
    changed: Condvar,
    session: Mutex<Option<Session>>,
}

/// Shortest time after which a watcher is told something new, other than the end.
const NEWS_INTERVAL: Duration = Duration::from_millis(50);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tracked {
    /// With a session, or without one for a migration that has ended.
    pub fn new(info: MigrationInfo, session: Option<Session>) -> Self {
        Self {
            info: Mutex::new(info),
            changed: Condvar::new(),
            session: Mutex::new(session),
        }
    }

    /// As it stands.
    pub fn info(&self) -> MigrationInfo {
        lock(&self.info).clone()
    }

    /// Changes it and wakes who watches.
    pub fn update(&self, change: impl FnOnce(&mut MigrationInfo)) {
        let mut info = lock(&self.info);
        let percent = info.percent;
        change(&mut info);
        info.percent = info.percent.max(percent);
        info.revision += 1;
        self.changed.notify_all();
    }

    /// Waits until it has changed since that revision, or is done, or the time is up. Tells changes no more often than
    /// people can read them: during a switchover there is one each millisecond, and the processors are needed otherwise.
    pub fn wait_change(&self, after: u64, timeout: Duration) -> MigrationInfo {
        self.wait(NEWS_INTERVAL.min(timeout), |info| info.phase == Phase::Done);
        self.wait(timeout, |info| {
            info.revision > after || info.phase == Phase::Done
        })
    }

    /// Waits until it is done or the time is up.
    pub fn wait_done(&self, timeout: Duration) -> MigrationInfo {
        self.wait(timeout, |info| info.phase == Phase::Done)
    }

    fn wait(&self, timeout: Duration, until: impl Fn(&MigrationInfo) -> bool) -> MigrationInfo {
        let deadline = Instant::now() + timeout;
        let mut info = lock(&self.info);
        while !until(&info) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            info = self
                .changed
                .wait_timeout(info, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(info, _)| info);
        }
        info.clone()
    }

    /// The session, while there is one.
    pub fn session(&self) -> Option<Session> {
        lock(&self.session).clone()
    }

    /// The session has ended.
    pub fn forget_session(&self) {
        *lock(&self.session) = None;
    }
}

/// A migration at its beginning.
pub fn info_of(order: &Order, side: Side, ram_bytes: u64) -> MigrationInfo {
    MigrationInfo {
        id: Uuid::from_bytes(order.migration.0),
        vm: order.vm_name.clone(),
        vm_uuid: Uuid::from_bytes(order.vm.0),
        from: order.source.clone(),
        to: order.destination.clone(),
        side,
        phase: Phase::Preparing,
        outcome: None,
        reason: None,
        error: None,
        strategy: Strategy::Auto,
        rounds: 0,
        total_time_ms: 0.0,
        downtime_ms: 0.0,
        downtime: Default::default(),
        predicted_downtime_ms: None,
        bytes_on_wire: 0,
        bytes_guest: 0,
        bytes_remaining: 0,
        rate_bytes_per_s: 0,
        dirty_rate_bytes_per_s: 0,
        percent: 0.0,
        pages_sent: 0,
        pages_delta: 0,
        pages_duplicate: 0,
        pages_compressed: 0,
        bytes_saved: 0,
        pages_zero: 0,
        pages_resent: 0,
        pages_skipped: 0,
        throttle_share: None,
        pages_demanded: 0,
        fault_wait: None,
        rejoined: 0,
        decisions: Vec::new(),
        gate_decisions: Vec::new(),
        operator: None,
        ram_bytes,
        streams: 0,
        cipher: None,
        key_exchange: None,
        memory_root: None,
        verified: false,
        epoch: order.epoch.next().0,
        revision: 1,
    }
}

/// Milliseconds with their fraction.
pub fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// A reason and its blockers as the control interface tells them, and whether the reason is that a gate refused.
pub fn api_error(
    reason: &Reason,
    blockers: &[WireBlocker],
    outcome: Outcome,
    refused: bool,
) -> ApiError {
    // A gate that refuses after its host had accepted is named in the code.
    let refused = refused || gate_of(&reason.code).0.is_some();
    let (kind, hint) = classify(&reason.code, outcome, refused);
    ApiError {
        kind,
        message: reason.message.clone(),
        causes: Vec::new(),
        hint: hint.map(str::to_owned),
        blockers: blockers.iter().map(api_blocker).collect(),
    }
}

/// A blocker that the destination named.
pub fn api_blocker(blocker: &WireBlocker) -> palanquin_api::control::Blocker {
    let (gate, code) = gate_of(&blocker.code);
    palanquin_api::control::Blocker {
        side: Side::Destination,
        gate: gate.map(str::to_owned),
        code: code.to_owned(),
        message: blocker.message.clone(),
        remedy: blocker.remedy.clone(),
    }
}

fn classify(code: &str, outcome: Outcome, refused: bool) -> (ErrorKind, Option<&'static str>) {
    match (outcome, code) {
        (Outcome::InDoubt, "destination-forgot") => (
            ErrorKind::InDoubt,
            Some(
                "look at the destination; then `palanquin migration resolve ID --assert \
                 destination-lost-it` or `destination-runs-it`",
            ),
        ),
        (Outcome::InDoubt, _) => (
            ErrorKind::InDoubt,
            Some("the agent keeps asking the destination; `palanquin migration watch ID` shows it"),
        ),
        // Whatever the reason: nobody goes on running it.
        (Outcome::VmEnded, _) => (
            ErrorKind::Internal,
            Some("the VM's log on the host that had it last says why"),
        ),
        (_, "refused") => (
            ErrorKind::Refused,
            Some("each reason says what to do; nothing of the VM was sent"),
        ),
        (_, "identity-refused") => (
            ErrorKind::Refused,
            Some(
                "check the certificates, names and clocks of both hosts; nothing of the VM was sent",
            ),
        ),
        (Outcome::RunningOnSource, _) if refused => (
            ErrorKind::Refused,
            Some("a gate refused; the VM goes on running on the source"),
        ),
        (_, "blocked") => (
            ErrorKind::Blocked,
            Some("`palanquin doctor --to HOST --vm VM` lists what to do"),
        ),
        (_, "unreachable") => (
            ErrorKind::Blocked,
            Some(
                "is palanquind running on the destination, and does its address in `[hosts]` match?",
            ),
        ),
        (_, "protocol-version") => (
            ErrorKind::Blocked,
            Some("upgrade the older of the two agents"),
        ),
        (_, "not-converging") => (
            ErrorKind::Aborted,
            Some(
                "allow a longer --max-downtime or more bandwidth, or try when the guest writes less",
            ),
        ),
        (_, "operator") => (ErrorKind::Aborted, None),
        _ => (
            ErrorKind::Aborted,
            Some("the VM goes on running on the source; try again"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_told_that_a_vm_that_ended_goes_on() {
        for code in ["vm-ended", "vm-ended-on-destination", "pages-lost", "x"] {
            let (kind, hint) = classify(code, Outcome::VmEnded, true);
            assert_eq!(kind, ErrorKind::Internal, "{code}");
            assert!(!hint.unwrap_or_default().contains("goes on"), "{code}");
        }
        let (kind, _) = classify("x", Outcome::RunningOnSource, false);
        assert_eq!(kind, ErrorKind::Aborted);
    }

    #[test]
    fn what_a_gate_refused_is_told_as_refused_whatever_its_code() {
        for code in ["refused", "attestation-stale", "timeout"] {
            let (kind, _) = classify(code, Outcome::RunningOnSource, true);
            assert_eq!(kind, ErrorKind::Refused, "{code}");
        }
    }
}
