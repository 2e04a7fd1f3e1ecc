//! `palanquin watch inside`: what a guest can notice itself of having been paused or moved.

mod config;
mod reader;
mod shown;

use std::time::Duration;

use palanquin_host::inside::{Rtc, Unread};
use palanquin_host::probe::{self, Event, Prober, ProberSpec, TargetSpec};
use palanquin_watch::inside::{Finding, Inside, Neighbour};
use palanquin_watch::taxonomy::{Cell, Method, Place};
use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use self::config::Watched;
use self::reader::{Read, Reader, Start};
use super::both::{clock_text, ended, refused};
use crate::arguments::InsideArgs;
use crate::failure::Failure;
use crate::output::{line, say, say_line, to_json};

/// Most events of the prober, and most samples, that wait for us.
const WAITING_MAX: usize = 4096;
/// Most readings of a neighbour that are kept until the next sample.
const READINGS_MAX: usize = 4096;
/// Neighbours are asked so often: echo, and timestamp.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// The prober was late by more: it drops what was under way.
const STALL: Duration = Duration::from_millis(500);

/// What is said first.
#[derive(Serialize)]
struct Summary<'a> {
    event: &'static str,
    #[serde(flatten)]
    start: &'a Start,
    every_s: f64,
    neighbours: Vec<&'a str>,
    cells: Vec<Seen>,
    unread: Vec<NotRead>,
}

/// Whether something is looked at.
#[derive(Serialize)]
struct Seen {
    #[serde(flatten)]
    cell: Cell,
    watched: bool,
}

#[derive(Serialize)]
struct NotRead {
    what: String,
    why: String,
    hint: String,
}

impl From<&Unread> for NotRead {
    fn from(unread: &Unread) -> Self {
        Self {
            what: unread.what.to_owned(),
            why: unread.why.clone(),
            hint: unread.hint.to_owned(),
        }
    }
}

/// Does what was typed.
pub(crate) async fn run(arguments: &InsideArgs, json: bool) -> Result<(), Failure> {
    let watched = Watched::new(arguments)?;
    if arguments.samples && !json {
        let failure = Failure::usage("samples are told as JSON only");
        return Err(failure.hint("add --json"));
    }
    let (rtc, mut unread) = match Rtc::open() {
        Ok(rtc) => (Some(rtc), Vec::new()),
        Err(without) => (None, vec![NotRead::from(&without)]),
    };
    let has_rtc = rtc.is_some();
    let (sender, mut events) = mpsc::channel(WAITING_MAX);
    let prober = neighbours(&watched, arguments.once, sender)?;
    for error in prober.iter().flat_map(Prober::without) {
        unread.push(NotRead {
            what: "clocks of neighbours".to_owned(),
            why: error.to_string(),
            hint: "run it as root, or `setcap cap_net_raw+ep` the program".to_owned(),
        });
    }
    let (sender, mut reads) = mpsc::channel(WAITING_MAX);
    let reader = Reader::start(rtc, watched.every, arguments.once, sender)?;
    let mut live = Live {
        inside: Inside::new(),
        near: watched
            .neighbours
            .iter()
            .map(|of| Near::new(&of.0))
            .collect(),
        json,
        samples: arguments.samples,
    };
    let end = arguments
        .seconds
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let far = Instant::now() + Duration::from_secs(86_400 * 3650);
    let mut ending = std::pin::pin!(ended());
    loop {
        tokio::select! {
            read = reads.recv() => match read {
                Some(Read::Start(start)) => {
                    unread.extend(start.unread.iter().map(NotRead::from));
                    let has_offsets = !unread.iter().any(|of| of.what == "clocks of neighbours");
                    let has_lag = has_rtc || (!live.near.is_empty() && has_offsets);
                    let summary = Summary {
                        event: "start",
                        start: &start,
                        every_s: watched.every.as_secs_f64(),
                        neighbours: live.near.iter().map(|near| near.name.as_str()).collect(),
                        cells: cells(has_lag, !live.near.is_empty()),
                        unread: std::mem::take(&mut unread),
                    };
                    live.begin(&summary)?;
                    if arguments.once {
                        break;
                    }
                }
                Some(Read::Sample(sample)) => live.take(*sample)?,
                None => return Err(reader.ended_by_itself()),
            },
            Some(event) = events.recv() => live.hear(&event)?,
            () = sleep_until(end.unwrap_or(far)) => break,
            () = &mut ending => break,
        }
    }
    drop((reader, prober));
    if let Some(finding) = live.inside.finish() {
        live.found(&finding)?;
    }
    Ok(())
}

/// Begins to ask the neighbours, if there are any.
fn neighbours(
    watched: &Watched,
    is_once: bool,
    to: mpsc::Sender<Event>,
) -> Result<Option<Prober>, Failure> {
    if watched.neighbours.is_empty() || is_once {
        return Ok(None);
    }
    let targets = watched.neighbours.iter().map(|(name, address)| {
        let mut target = TargetSpec::new(name, *address);
        target.interval = ASK_EVERY;
        target
    });
    let mut spec = ProberSpec::new(targets.collect());
    spec.stall = STALL;
    let tell = move |event| {
        // Who does not keep up must not make the prober late.
        let _ = to.try_send(event);
    };
    let prober = Prober::start(spec, tell).map_err(|error| refused(&error))?;
    Ok(Some(prober))
}

/// Which cells are looked at. A lag shows only against a clock that goes on elsewhere.
fn cells(has_lag: bool, has_neighbours: bool) -> Vec<Seen> {
    let seen = |method, watched| Seen {
        cell: Cell::new(Place::Internal, method),
        watched,
    };
    vec![
        seen(Method::HypervisorFingerprint, true),
        seen(Method::HardwareBenchmark, true),
        seen(Method::TimeLag, has_lag),
        seen(Method::Delay, has_neighbours),
    ]
}

/// A neighbour, and what was seen of it since the last sample.
struct Near {
    name: String,
    rtts_ms: Vec<f64>,
    offsets_ms: Vec<f64>,
    is_told: bool,
}

impl Near {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            rtts_ms: Vec::new(),
            offsets_ms: Vec::new(),
            is_told: false,
        }
    }

    fn take(&mut self) -> Neighbour {
        Neighbour {
            name: self.name.clone(),
            rtt_ms: middle(&mut self.rtts_ms),
            offset_ms: middle(&mut self.offsets_ms),
        }
    }
}

/// The middle of what was read, which is forgotten.
fn middle(values: &mut Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.get(values.len() / 2).copied();
    values.clear();
    middle
}

struct Live {
    inside: Inside,
    near: Vec<Near>,
    json: bool,
    samples: bool,
}

impl Live {
    fn begin(&self, summary: &Summary<'_>) -> Result<(), Failure> {
        if self.json {
            say_line(&to_json(summary))
        } else {
            say(&shown::start(summary))
        }
    }

    fn take(&mut self, mut sample: palanquin_watch::inside::Sample) -> Result<(), Failure> {
        sample.neighbours = self.near.iter_mut().map(Near::take).collect();
        let taken = self.inside.take(&sample);
        if self.samples {
            let statistics = self.inside.statistics();
            let value = json!({"event": "sample", "sample": sample, "statistics": statistics});
            say_line(&to_json(&value))?;
        }
        match taken {
            Ok(findings) => findings.iter().try_for_each(|finding| self.found(finding)),
            Err(error) => self.problem(&error.to_string()),
        }
    }

    fn hear(&mut self, event: &Event) -> Result<(), Failure> {
        match event {
            Event::Seen {
                target, reading, ..
            } => {
                let Some(near) = self.near.get_mut(*target) else {
                    return Ok(());
                };
                let (values, ms) = match reading {
                    probe::Reading::Rtt { ms } => (&mut near.rtts_ms, *ms),
                    probe::Reading::IcmpOffset { ms } => (&mut near.offsets_ms, *ms),
                    _ => return Ok(()),
                };
                if values.len() < READINGS_MAX {
                    values.push(ms);
                }
                Ok(())
            }
            Event::News {
                target,
                news: probe::News::Unanswered(kind) | probe::News::NotSent(kind, _),
            } => {
                let Some(near) = self.near.get_mut(*target) else {
                    return Ok(());
                };
                if std::mem::replace(&mut near.is_told, true) {
                    return Ok(());
                }
                let text = format!("neighbour {} gives no answer to {}", near.name, kind.name());
                self.problem(&text)
            }
            _ => Ok(()),
        }
    }

    fn problem(&self, text: &str) -> Result<(), Failure> {
        if self.json {
            say_line(&to_json(&json!({"event": "problem", "text": text})))
        } else {
            say_line(&format!("problem: {}", line(text)))
        }
    }

    fn found(&self, finding: &Finding) -> Result<(), Failure> {
        if self.json {
            let mut value = serde_json::to_value(finding).unwrap_or_default();
            value["event"] = json!("finding");
            value["target"] = json!("inside");
            return say_line(&to_json(&value));
        }
        let time = clock_text(finding.time_s);
        say(&format!("{time}  inside: {}", shown::finding(finding)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_readings_is_taken_once() {
        let mut values = vec![9.0, 1.0, 5.0];
        assert_eq!(middle(&mut values), Some(5.0));
        assert_eq!(middle(&mut values), None);
    }
}
