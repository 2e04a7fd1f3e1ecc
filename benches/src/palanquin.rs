//! Palanquin between two hosts of the rig.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use palanquin_api::control::{ApiError, MigrationInfo};
use palanquin_lab::host::{Host, Told};
use palanquin_lab::probe::Pings;
use palanquin_lab::rig::Rig;
use palanquin_lab::usage::{Inhabitants, Watch, sent_bytes, wait_quiet, warm_up};

use crate::measure::Sample;
use crate::peers::{Case, GUEST};
use crate::workload::VM;

/// What came of one try.
pub(crate) enum Tried {
    /// A migration, completed or not.
    Done(Box<Sample>),
    /// The agent does not offer this: its own words.
    Refused(String),
}

/// A path: its name and what is added to `palanquin migrate`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    /// Name in the tables.
    pub(crate) name: &'static str,
    /// Words of the command line.
    pub(crate) words: &'static [&'static str],
}

/// Name of the path with nothing set.
pub(crate) const DEFAULT: &str = "palanquin";
/// Name of a path that bars refer to.
pub(crate) const IMPROVED: &str = "palanquin --strategy improved";
/// As [`IMPROVED`].
pub(crate) const HYBRID: &str = "palanquin --strategy hybrid";
/// As [`IMPROVED`].
pub(crate) const POST_COPY: &str = "palanquin --strategy post-copy";

/// Paths of every workload.
pub(crate) const PATHS: [Path; 1] = [Path {
    name: DEFAULT,
    words: &[],
}];
/// Paths of a guest that writes faster than the link.
pub(crate) const HOT_PATHS: [Path; 3] = [
    Path {
        name: IMPROVED,
        words: &["--strategy", "improved"],
    },
    Path {
        name: HYBRID,
        words: &["--strategy", "hybrid"],
    },
    Path {
        name: POST_COPY,
        words: &["--strategy", "post-copy"],
    },
];

/// Boots a guest with the agent of the first host and moves it to the second. The start of the container is part of
/// it; QEMU's own migration finds its destination started.
pub(crate) fn measure(rig: &Rig, case: &Case, path: &Path) -> Result<Tried> {
    let source = &rig.hosts[0];
    let console = source.boot(&case.guest)?;
    let rewritten = case.wait_settled(&console)?;
    let pings = Pings::start(&rig.client, GUEST)?;
    wait_quiet(rig)?;
    warm_up(case.memory_mib())?;
    let watch = Watch::start(Inhabitants::of(rig, Vec::new())?)?;
    let sent = sent_bytes(source)?;
    let deadline = format!("{}s", case.deadline.as_secs());
    let mut words = vec!["--deadline", &deadline];
    words.extend(path.words);
    let began = Instant::now();
    let told = rig.migrate(VM, 0, 1, &words)?;
    let total = began.elapsed();
    let watched = watch.finish();
    let bytes_on_wire = sent_bytes(source)? - sent;
    let tried = match judge(&told) {
        Ended::Refused(why) => {
            pings.finish()?;
            Tried::Refused(why)
        }
        ended => {
            let info = told.migration().ok().or_else(|| newest(source));
            let mut reason = match ended {
                Ended::Completed => None,
                Ended::NotCompleted(why) => Some(why),
                Ended::Refused(_) => unreachable!("handled above"),
            };
            if let Some(why) = &reason {
                rig.find_the_one(VM).with_context(|| why.clone())?;
            } else if let Err(why) = rig.check_lives_once(VM, 1) {
                reason = Some(format!("the guest does not go on: {why:#}"));
            }
            let completed = reason.is_none();
            let gap = pings.finish()?.longest_gap_ms;
            let of =
                |value: fn(&MigrationInfo) -> f64| info.as_ref().filter(|_| completed).map(value);
            Tried::Done(Box::new(Sample {
                path: path.name.to_owned(),
                workload: case.workload.to_owned(),
                completed,
                reason,
                total_ms: total.as_secs_f64() * 1e3,
                downtime_ms: of(|info| info.downtime_ms),
                reported_total_ms: of(|info| info.total_time_ms),
                reported_downtime_ms: of(|info| info.downtime_ms),
                ping_gap_ms: gap,
                bytes_on_wire,
                cpu_s: watched.cpu_s,
                rss_mib: watched.rss_mib,
                agents_rss_mib: Some(watched.agents_rss_mib),
                rounds: info.as_ref().map(|info| info.rounds.into()),
                rewritten_mib_s: Some(rewritten),
                foreign_share: watched.foreign_share,
            }))
        }
    };
    rig.stop_vm(VM)?;
    Ok(tried)
}

/// How a command ended.
enum Ended {
    Completed,
    /// With the agent's own words.
    NotCompleted(String),
    /// As [`Ended::NotCompleted`]: nothing was even begun.
    Refused(String),
}

fn judge(told: &Told) -> Ended {
    if told.status == 0 {
        return Ended::Completed;
    }
    let error = told.error();
    // The command line itself refuses a word that it does not know, and not in JSON.
    if told.status == 2 {
        let said = told.stderr.lines().next().unwrap_or_default().to_owned();
        return Ended::Refused(error.map_or(said, |error| error.message));
    }
    let ended = told.migration().ok().and_then(|info| info.reason);
    let all = |error: ApiError| [&[error.message], &error.causes[..]].concat().join(": ");
    let why = error.map(all).ok().or(ended);
    Ended::NotCompleted(why.unwrap_or_else(|| format!("exit status {}", told.status)))
}

/// The migration that began last.
fn newest(source: &Host) -> Option<MigrationInfo> {
    let all = source.migrations().ok()?;
    all.into_iter().max_by_key(|info| info.epoch)
}

/// Bounds of an experiment that needs a VM on the first host: boots, works, and stops the VM in any case.
pub(crate) fn with_vm<T>(rig: &Rig, case: &Case, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let console = rig.hosts[0].boot(&case.guest)?;
    let worked = case.wait_settled(&console).and_then(|_| work());
    let stopped = rig.stop_vm(VM);
    let result = worked?;
    if let Err(problem) = stopped {
        bail!("the VM can't be stopped: {problem:#}");
    }
    Ok(result)
}
