//! Requests and answers of the control interface: HTTP/JSON over a UNIX socket.
//!
//! | method | path | body | answer |
//! |---|---|---|---|
//! | GET | `/v1/host` | | [`HostInfo`] |
//! | GET | `/v1/vms` | | `[VmInfo]` |
//! | POST | `/v1/vms` | [`RunVm`] | [`VmInfo`] |
//! | POST | `/v1/vms/adopt` | [`AdoptVm`] | [`VmInfo`] |
//! | GET | `/v1/vms/{name}` | | [`VmInfo`] |
//! | POST | `/v1/vms/{name}/stop` | | [`VmInfo`] |
//! | POST | `/v1/vms/{name}/passport` | [`GivePassport`] | [`VmInfo`] |
//! | GET | `/v1/migrations` | | `[MigrationInfo]` |
//! | POST | `/v1/migrations` | [`StartMigration`] | [`MigrationInfo`] |
//! | GET | `/v1/migrations/{id}` | | [`MigrationInfo`] |
//! | GET | `/v1/migrations/{id}/watch?after=N` | | [`MigrationInfo`], once its `revision` exceeds N or after 10 s |
//! | POST | `/v1/migrations/{id}/abort` | | [`AbortAnswer`] |
//! | POST | `/v1/migrations/{id}/resolve` | [`ResolveMigration`] | [`MigrationInfo`] |
//! | GET | `/v1/decisions` | | `[GateDecision]`, the last 1000, oldest first |
//! | POST | `/v1/doctor` | [`DoctorRequest`] | [`DoctorReport`] |
//!
//! Those about advertisements are in [`crate::advertisement`].
//!
//! An error is an [`ApiError`] with a 4xx or 5xx status. The observe socket serves `GET /metrics`
//! (Prometheus text), `GET /v1/vms`, `GET /v1/migrations`, `GET /v1/events` (SSE of
//! [`MigrationInfo`]) and nothing else.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::{NAME_RULE, Rules, Violation, is_name};
use crate::hex::Hex;
use crate::vm_spec::VmSpec;

/// Who is at fault and therefore what a script should do; decides the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// A defect or a failing machine: exit status 1.
    Internal,
    /// The request makes no sense: exit status 2.
    Usage,
    /// No VM, migration or host of that name: exit status 2.
    NotFound,
    /// Refused by identity, attestation or policy: exit status 3.
    Refused,
    /// The VM or a host can't: exit status 4.
    Blocked,
    /// The migration ended and the VM runs on the source: exit status 5.
    Aborted,
    /// The migration's end is not known yet: exit status 6.
    InDoubt,
}

impl ErrorKind {
    /// Exit status of a command that ends with this error (DESIGN section 6).
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Internal => 1,
            Self::Usage | Self::NotFound => 2,
            Self::Refused => 3,
            Self::Blocked => 4,
            Self::Aborted => 5,
            Self::InDoubt => 6,
        }
    }
}

/// An error as it crosses the control interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// Who is at fault.
    pub kind: ErrorKind,
    /// What failed, one lowercase sentence without a full stop.
    pub message: String,
    /// Why, outermost first.
    #[serde(default)]
    pub causes: Vec<String>,
    /// What to do about it.
    #[serde(default)]
    pub hint: Option<String>,
    /// Every reason at once where there are several.
    #[serde(default)]
    pub blockers: Vec<Blocker>,
}

/// One reason why a migration cannot happen, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// Where the reason lies.
    pub side: Side,
    /// What refused (`identity`, `attestation`, `policy`, `passport` or `quota`), where it was not the host that can't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<String>,
    /// Stable machine-readable code, for example `memory-short` or `ram-private`.
    pub code: String,
    /// What is wrong, one lowercase sentence.
    pub message: String,
    /// What to do about it, one sentence.
    pub remedy: String,
}

/// One of the two hosts of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The host that runs the VM.
    Source,
    /// The host that is to run it.
    Destination,
}

/// This host, as its agent sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Name in the host's certificate.
    pub name: String,
    /// SPIFFE ID of the host's certificate.
    pub spiffe_id: String,
    /// Version of the agent.
    pub version: String,
    /// Version of QEMU, where the binary answers.
    pub qemu_version: Option<String>,
    /// Kernel release.
    pub kernel: String,
    /// Memory of the host in bytes.
    pub memory_total_bytes: u64,
    /// Memory that could be given to a VM now, in bytes.
    pub memory_available_bytes: u64,
    /// Names of the hosts this one knows.
    pub peers: Vec<String>,
    /// Process ID of the process that talks to other hosts; absent while it is started anew.
    #[serde(default)]
    pub network_pid: Option<u32>,
    /// What this host lacks for the agent's processes to be confined as they should be.
    #[serde(default)]
    pub unconfined: Vec<String>,
    /// By what this host judges; absent where nothing is judged.
    #[serde(default)]
    pub trust: Option<TrustInfo>,
}

/// By what a host judges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustInfo {
    /// Directory of the policies.
    pub policies: String,
    /// Version of their `directory.toml`.
    pub policy_version: u64,
    /// Digest of policies, directory and schema: `sha256:` and 64 digits.
    pub policy_sha256: String,
    /// Why the policies were not replaced when that was last asked for; absent where they were.
    #[serde(default)]
    pub reload_error: Option<String>,
}

/// `POST /v1/vms`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunVm {
    /// What to run; paths are absolute.
    pub spec: VmSpec,
    /// The owner's passport, signed: the VM gets the UUID named in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passport: Option<Hex>,
}

/// `POST /v1/vms/{name}/passport`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GivePassport {
    /// The owner's passport, signed.
    pub passport: Hex,
}

/// The passport of a VM, as this host has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassportInfo {
    /// Whose the VM is.
    pub owner: String,
    /// Version.
    pub version: u64,
    /// Digest of the signed passport.
    pub sha256: String,
    /// When it expires, seconds since 1970.
    pub expires_unix_s: u64,
}

/// What was decided on something that was to be done to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateDecision {
    /// When, seconds since 1970.
    pub at_unix_s: u64,
    /// What: `migrateOut`, `migrateIn`, `adopt`, `abort` or `erase`; and what concerns no VM: `acceptAdvertisement`,
    /// `pardon`.
    pub action: String,
    /// By whom: an operator's identity, or a local user or host that is no operator.
    pub operator: String,
    /// UUID of the VM; absent where it is not known.
    pub vm: Option<Uuid>,
    /// The migration that it is about.
    pub migration: Option<Uuid>,
    /// Whether nothing refused.
    pub permitted: bool,
    /// Policies that permit it.
    #[serde(default)]
    pub permitted_by: Vec<String>,
    /// Everything that refused.
    #[serde(default)]
    pub reasons: Vec<GateReason>,
    /// Digest of the policies by which it was decided; absent where they were not asked.
    pub policy_sha256: Option<String>,
    /// Digest of the passport.
    pub passport_sha256: Option<String>,
    /// The host that brought what was refused; absent where it was asked for here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// How often this was refused: what a host repeats within a day is counted in one.
    #[serde(default = "once")]
    pub times: u64,
    /// When it was refused for the last time, seconds since 1970, where that was more than once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_unix_s: Option<u64>,
}

fn once() -> u64 {
    1
}

/// One reason for a refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateReason {
    /// What refused: `identity`, `attestation`, `policy`, `passport` or `quota`.
    pub gate: String,
    /// Stable code.
    pub code: String,
    /// What is wrong, one lowercase sentence.
    pub message: String,
    /// What to do about it, one sentence.
    pub remedy: String,
    /// The policy that refused, where it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
}

/// `POST /v1/vms/adopt`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdoptVm {
    /// Name the VM gets here.
    pub name: String,
    /// Process ID of the running QEMU.
    pub pid: u32,
    /// Path of a QMP UNIX socket of that QEMU that nobody else uses.
    pub qmp: String,
    /// The owner's passport, signed: the VM gets the UUID named in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passport: Option<Hex>,
}

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum VmState {
    /// Runs here.
    Running,
    /// Paused here, ours to resume.
    Paused,
    /// Paused here; a migration has committed or is in doubt, so it may not be resumed.
    Held,
    /// A container that waits for a VM to arrive.
    Incoming,
    /// The hypervisor ended.
    Stopped,
}

/// One VM of this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Name, unique on a host.
    pub name: String,
    /// Identity of the VM over all hosts.
    pub uuid: Uuid,
    /// Counts the owners the VM has had.
    pub epoch: u64,
    /// What it does.
    pub state: VmState,
    /// Process ID of its hypervisor.
    pub pid: Option<u32>,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Whether the hypervisor was adopted rather than started by the agent.
    pub adopted: bool,
    /// File with the guest's console, where there is one.
    pub console: Option<String>,
    /// The migration under way, where there is one.
    pub migration: Option<Uuid>,
    /// Its owner's passport, where this host has one.
    #[serde(default)]
    pub passport: Option<PassportInfo>,
}

/// How the pages are moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Strategy {
    /// Chosen from the intent: pre-copy that leaves out what is written all the time; where that does not converge, what
    /// [`StartMigration::allow`] names.
    #[default]
    Auto,
    /// Pause, copy, resume.
    StopAndCopy,
    /// Copy while the VM runs, in rounds.
    PreCopy,
    /// The same in at most five rounds; pages that are written all the time wait for the last.
    Improved,
    /// Resume first, fetch pages on fault.
    PostCopy,
    /// Pre-copy, then post-copy.
    Hybrid,
}

/// What a migration may do to a VM that it would not be rid of otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Allow {
    /// Give it less CPU time for a while.
    Throttle,
    /// Run it on the destination before all of its pages are there: until they are, it needs both hosts.
    PostCopy,
}

/// Why something was decided during a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Rounds begun by then.
    pub rounds: u32,
    /// One sentence.
    pub why: String,
}

/// How long the VM waited for pages on the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultWait {
    /// Accesses that waited.
    pub count: u64,
    /// Half of them waited for less than this, in microseconds; a power of two.
    pub p50_below_us: u64,
    /// 99 % of them waited for less than this.
    pub p99_below_us: u64,
    /// All of them waited for less than this.
    pub max_below_us: u64,
    /// Entry `n` counts those below 2 to the power of `n` microseconds and not in an entry before.
    pub log2_us: Vec<u64>,
}

/// How pages are made shorter before they go onto the wire. Zero pages never carry contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Compress {
    /// By what is measured: nothing where the CPU is the bottleneck, LZ4 or Zstandard where the link is; deltas and
    /// duplicates where they pay.
    #[default]
    Auto,
    /// Not at all.
    Off,
    /// Deltas and duplicates, the rest with LZ4.
    Lz4,
    /// Deltas and duplicates, the rest with Zstandard.
    Zstd,
}

/// `POST /v1/migrations`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartMigration {
    /// Name of the VM.
    pub vm: String,
    /// Name of the destination host.
    pub to: String,
    /// How the pages are moved.
    #[serde(default)]
    pub strategy: Strategy,
    /// What may be done where strategy `auto` does not converge. Default: nothing.
    #[serde(default)]
    pub allow: Vec<Allow>,
    /// Longest pause aimed at, in milliseconds. 1 to 3 600 000 (1 h), default 300.
    #[serde(default)]
    pub max_downtime_ms: Option<u64>,
    /// Longest time for the whole migration before it is aborted, in milliseconds. 1000 to 604 800 000 (7 days),
    /// default 600 000.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    /// Limit of what goes onto the wire, in bytes per second. At least 100 000. Default: none.
    #[serde(default)]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Number of data streams, 1 to 16. Default: one for each CPU, 2 to 4.
    #[serde(default)]
    pub streams: Option<u16>,
    /// How pages are made shorter. Default: by what is measured.
    #[serde(default)]
    pub compress: Compress,
    /// Signed approvals of other operators; at most [`APPROVALS_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approvals: Vec<Hex>,
}

/// Most approvals of a migration.
pub const APPROVALS_MAX: usize = 16;

impl StartMigration {
    /// To move that VM to that host, everything else by default.
    pub fn of(vm: &str, to: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            to: to.to_owned(),
            strategy: Strategy::default(),
            allow: Vec::new(),
            max_downtime_ms: None,
            deadline_ms: None,
            bandwidth_bytes_per_s: None,
            streams: None,
            compress: Compress::default(),
            approvals: Vec::new(),
        }
    }

    /// Every bound that it breaks.
    pub fn validate(&self) -> Vec<Violation> {
        let mut rules = Rules::default();
        for (key, name) in [("vm", &self.vm), ("to", &self.to)] {
            rules.check(
                is_name(name),
                key,
                format!("{name:?} is no name"),
                NAME_RULE,
            );
        }
        let out_of_bounds = |value: u64, unit: &str| format!("{value}{unit} is out of bounds");
        if let Some(ms) = self.max_downtime_ms {
            let fits = (1..=HOUR_MS).contains(&ms);
            let message = out_of_bounds(ms, " ms");
            rules.check(fits, "max_downtime_ms", message, "1 ms to 1 h");
        }
        if let Some(ms) = self.deadline_ms {
            let fits = (1_000..=7 * 24 * HOUR_MS).contains(&ms);
            let message = out_of_bounds(ms, " ms");
            rules.check(fits, "deadline_ms", message, "1 s to 7 days");
        }
        if let Some(rate) = self.bandwidth_bytes_per_s {
            let message = out_of_bounds(rate, " bytes per second");
            let fits = rate >= 100_000;
            rules.check(fits, "bandwidth_bytes_per_s", message, "at least 100 kB/s");
        }
        if let Some(streams) = self.streams {
            let message = out_of_bounds(streams.into(), "");
            rules.check((1..=16).contains(&streams), "streams", message, "1 to 16");
        }
        let count = self.approvals.len();
        let message = format!("{count} are too many");
        rules.check(count <= APPROVALS_MAX, "approvals", message, "at most 16");
        rules.into_violations()
    }
}

const HOUR_MS: u64 = 3_600_000;

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// The VM runs on the destination and nowhere else.
    Completed,
    /// The VM runs on the source and nowhere else.
    RunningOnSource,
    /// The hypervisor ended on the source by itself; the VM runs nowhere.
    VmEnded,
    /// The source holds the VM paused until the destination's record is known.
    InDoubt,
}

/// Where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Phase {
    /// Versions, order and preflight.
    Preparing,
    /// The destination reserves memory and starts an empty container.
    Reserving,
    /// Rounds of pages while the VM runs.
    PreCopy,
    /// The VM is paused; last pages and device state.
    Switchover,
    /// The VM runs on the destination and gets its last pages.
    PostCopy,
    /// The commit record is being made durable and sent.
    Committing,
    /// The end is unknown; the source redials.
    InDoubt,
    /// The source removes the VM.
    Erasing,
    /// Ended.
    Done,
}

/// The pause, in parts that add up to about `downtime_ms`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// Stopping the virtual CPUs.
    pub pause_ms: f64,
    /// Sending the pages written since the last round.
    pub final_pages_ms: f64,
    /// Saving, sending and loading the device state, up to the destination's `Ready`.
    pub device_state_ms: f64,
    /// Comparing the roots and making the commit record durable.
    pub commit_ms: f64,
    /// From the commit to the destination's `Running`.
    pub resume_ms: f64,
}

/// A migration, under way or ended; also what `migrate --json` ends with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationInfo {
    /// Identity of the migration.
    pub id: Uuid,
    /// Name of the VM.
    pub vm: String,
    /// Identity of the VM.
    pub vm_uuid: Uuid,
    /// Source host.
    pub from: String,
    /// Destination host.
    pub to: String,
    /// Which side this agent is.
    pub side: Side,
    /// Where it is.
    pub phase: Phase,
    /// How it ended; absent while it runs.
    pub outcome: Option<Outcome>,
    /// Why it ended so, or what it waits for.
    pub reason: Option<String>,
    /// The error behind a migration that did not complete.
    pub error: Option<ApiError>,
    /// How the pages are moved.
    pub strategy: Strategy,
    /// Rounds so far, the first counted as 1.
    pub rounds: u32,
    /// From the order to the end, or so far.
    pub total_time_ms: f64,
    /// From the pause on the source to the answer `Running`; 0 before.
    pub downtime_ms: f64,
    /// The parts of `downtime_ms`.
    pub downtime: Downtime,
    /// Pause that a switchover now would take, in milliseconds.
    pub predicted_downtime_ms: Option<f64>,
    /// Bytes sent to the destination's sockets, encryption and framing included.
    pub bytes_on_wire: u64,
    /// Guest page bytes sent, before framing.
    pub bytes_guest: u64,
    /// Bytes of this round still to send.
    pub bytes_remaining: u64,
    /// Smoothed rate of guest bytes.
    pub rate_bytes_per_s: u64,
    /// Rate at which the guest writes pages.
    pub dirty_rate_bytes_per_s: u64,
    /// Share of the work done, 0 to 100, never less than said before.
    pub percent: f64,
    /// Pages sent with their contents.
    pub pages_sent: u64,
    /// Pages of `pages_sent` that went as what differs from the version sent before.
    #[serde(default)]
    pub pages_delta: u64,
    /// Pages of `pages_sent` that went as a reference to an equal page.
    #[serde(default)]
    pub pages_duplicate: u64,
    /// Pages of `pages_sent` that went compressed.
    #[serde(default)]
    pub pages_compressed: u64,
    /// Bytes that these three were shorter than their pages.
    #[serde(default)]
    pub bytes_saved: u64,
    /// Pages sent as "all zero".
    pub pages_zero: u64,
    /// Pages sent more than once.
    pub pages_resent: u64,
    /// Pages left out of a round because they were written again before their turn.
    #[serde(default)]
    pub pages_skipped: u64,
    /// Share of its CPU time that the VM gets, where it was throttled.
    #[serde(default)]
    pub throttle_share: Option<f64>,
    /// Pages that the VM waited for on the destination, and that were sent before others.
    #[serde(default)]
    pub pages_demanded: u64,
    /// How long it waited, once all pages have arrived.
    #[serde(default)]
    pub fault_wait: Option<FaultWait>,
    /// How often both sides connected again after their connection broke.
    #[serde(default)]
    pub rejoined: u32,
    /// What was decided on the way and why, oldest first.
    #[serde(default)]
    pub decisions: Vec<Decision>,
    /// The operator who ordered it, or the local user where nothing is judged.
    #[serde(default)]
    pub operator: Option<String>,
    /// What the gates of this host have decided on it, oldest first; empty where nothing is judged.
    #[serde(default)]
    pub gate_decisions: Vec<GateDecision>,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Data streams.
    pub streams: u16,
    /// Negotiated cipher suite.
    pub cipher: Option<String>,
    /// Negotiated key exchange.
    pub key_exchange: Option<String>,
    /// Root over the digests of all pages, lowercase hex.
    pub memory_root: Option<String>,
    /// Whether source and destination computed the same root; with post-copy also over the pages that came later.
    pub verified: bool,
    /// Epoch of the VM once this migration completes.
    pub epoch: u64,
    /// Grows with every change of this record.
    pub revision: u64,
}

/// Answer to an abort: exactly one of three (DESIGN section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AbortOutcome {
    /// The migration ended; the VM runs on the source.
    RunningOnSource,
    /// The commit record was durable already; the VM runs on the destination.
    TooLateCommitted,
    /// The commit record was durable already and the destination has not answered yet.
    InDoubt,
}

/// `POST /v1/migrations/{id}/abort`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AbortAnswer {
    /// What became of the VM.
    pub outcome: AbortOutcome,
    /// How to go on, where there is something to do.
    pub hint: Option<String>,
}

/// `POST /v1/migrations/{id}/resolve`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveMigration {
    /// What the operator asserts, having looked at the destination; without it the agent asks the
    /// destination's agent once more.
    #[serde(default)]
    pub assert: Option<OperatorAssertion>,
}

/// What an operator has verified by hand where the destination cannot answer any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OperatorAssertion {
    /// The VM does not run on the destination and never will: take it back.
    DestinationLostIt,
    /// The VM runs on the destination: erase it here.
    DestinationRunsIt,
}

/// `POST /v1/doctor`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DoctorRequest {
    /// Destination to check against.
    #[serde(default)]
    pub to: Option<String>,
    /// VM to check.
    #[serde(default)]
    pub vm: Option<String>,
}

/// Every check made and every blocker found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorReport {
    /// What was looked at, and found good.
    pub passed: Vec<String>,
    /// What stands in the way.
    pub blockers: Vec<Blocker>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_has_the_exit_status_that_scripts_know() {
        let statuses = [
            (ErrorKind::Internal, "\"internal\"", 1),
            (ErrorKind::Usage, "\"usage\"", 2),
            (ErrorKind::NotFound, "\"not-found\"", 2),
            (ErrorKind::Refused, "\"refused\"", 3),
            (ErrorKind::Blocked, "\"blocked\"", 4),
            (ErrorKind::Aborted, "\"aborted\"", 5),
            (ErrorKind::InDoubt, "\"in-doubt\"", 6),
        ];
        for (kind, word, status) in statuses {
            assert_eq!(kind.exit_status(), status);
            assert_eq!(serde_json::to_string(&kind).unwrap(), word);
        }
    }

    #[test]
    fn outcomes_are_spelled_as_scripts_know_them() {
        let words = serde_json::to_string(&[
            Outcome::Completed,
            Outcome::RunningOnSource,
            Outcome::VmEnded,
            Outcome::InDoubt,
        ]);
        assert_eq!(
            words.unwrap(),
            "[\"completed\",\"running_on_source\",\"vm_ended\",\"in_doubt\"]"
        );
        let words = serde_json::to_string(&[
            AbortOutcome::RunningOnSource,
            AbortOutcome::TooLateCommitted,
            AbortOutcome::InDoubt,
        ]);
        assert_eq!(
            words.unwrap(),
            "[\"running_on_source\",\"too_late_committed\",\"in_doubt\"]"
        );
    }

    #[test]
    fn an_error_needs_no_more_than_kind_and_message() {
        let error: ApiError = serde_json::from_str(r#"{"kind":"refused","message":"no"}"#).unwrap();
        assert_eq!((error.kind, error.causes.len()), (ErrorKind::Refused, 0));
    }

    #[test]
    fn a_request_is_bounded_and_takes_no_unknown_fields() {
        let request: StartMigration = serde_json::from_str(r#"{"vm":"web","to":"b"}"#).unwrap();
        assert_eq!(request.validate(), []);
        assert!(
            serde_json::from_str::<StartMigration>(r#"{"vm":"web","to":"b","force":1}"#).is_err()
        );
        let odd = StartMigration {
            vm: "a/b".to_owned(),
            to: String::new(),
            max_downtime_ms: Some(0),
            deadline_ms: Some(u64::MAX),
            bandwidth_bytes_per_s: Some(1),
            streams: Some(17),
            ..request
        };
        let keys: Vec<String> = odd.validate().into_iter().map(|found| found.key).collect();
        assert_eq!(
            keys,
            [
                "vm",
                "to",
                "max_downtime_ms",
                "deadline_ms",
                "bandwidth_bytes_per_s",
                "streams"
            ]
        );
    }
}
