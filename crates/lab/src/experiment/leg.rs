//! One migration, seen by an observer, a client and whoever counts what it costs.

use std::time::Duration;

use anyhow::Result;
use palanquin_lab::host::Host;
use palanquin_lab::observer::Recording;
use palanquin_lab::probe::Pings;
use palanquin_lab::results::Leg;
use palanquin_lab::rig::Rig;
use palanquin_lab::transport::segment::{DEVICE, Segment};
use palanquin_lab::usage::{Inhabitants, Watch, sent};
use palanquin_lab::wait;

use super::{GUEST, PING, SENTENCE};

/// The client sees the end of the pause a moment later than who moves the guest.
const AFTER: Duration = Duration::from_secs(1);

/// What the one who moves says.
pub(crate) struct Moved {
    /// From the request to the answer.
    pub(crate) total: Duration,
    /// How long the guest stood still, in milliseconds.
    pub(crate) downtime_ms: Option<f64>,
    /// Why it did not complete.
    pub(crate) reason: Option<String>,
}

/// Who and where.
pub(crate) struct Case<'a> {
    pub(crate) rig: &'a Rig,
    pub(crate) source: &'a Host,
    pub(crate) segment: Option<&'a Segment>,
    /// Processes that take no part.
    pub(crate) but: Vec<u32>,
    pub(crate) transport: &'a str,
    pub(crate) way: &'a str,
}

/// Watches while `work` moves the guest; `check` says afterwards why it did not arrive after all, and how long it stood
/// still. MTU and number of the run are for the caller to fill in.
pub(crate) fn observe(
    case: &Case<'_>,
    work: impl FnOnce() -> Result<Moved>,
    check: impl FnOnce(&mut Moved) -> Result<()>,
) -> Result<Leg> {
    let Case { rig, source, .. } = *case;
    let device = if case.segment.is_some() {
        DEVICE
    } else {
        "eth0"
    };
    let recording = rig.record()?;
    let within = case
        .segment
        .map(|segment| Recording::named(&segment.switch, rig.dir(), "segment"))
        .transpose()?;
    let pings = Pings::start_each(&rig.client, GUEST, PING)?;
    let watch = Watch::start(Inhabitants::of(rig, case.but.clone())?)?;
    let before = sent(source, device)?;
    let mut moved = work()?;
    let watched = watch.finish();
    let after = sent(source, device)?;
    check(&mut moved)?;
    wait::pause(AFTER)?;
    let pings = pings.finish()?;
    let capture = recording.finish()?;
    let within = within.map(Recording::finish).transpose()?;
    let total_s = moved.total.as_secs_f64();
    Ok(Leg {
        transport: case.transport.to_owned(),
        mtu: 0,
        run: 0,
        way: case.way.to_owned(),
        completed: moved.reason.is_none(),
        reason: moved.reason,
        ascii_found: capture.count_plain(SENTENCE)?,
        utf16_found: capture.count_wide(SENTENCE)?,
        segment_found: within
            .as_ref()
            .map(|capture| capture.count(SENTENCE))
            .transpose()?,
        total_ms: total_s * 1e3,
        downtime_ms: moved.downtime_ms,
        lost_pings: pings.lost,
        ping_gap_ms: pings.longest_gap_ms,
        cpu_s: watched.cpu_s,
        cpu_percent: watched.cpu_s / total_s * 100.0,
        peak_cpu_percent: watched.peak_cpu_percent,
        bytes: after.0 - before.0,
        packets: after.1 - before.1,
        missed_packets: capture.dropped + within.map_or(0, |capture| capture.dropped),
    })
}
