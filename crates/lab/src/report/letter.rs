//! What the experiment with the letter has found.

use std::collections::BTreeSet;

use palanquin_lab::chart::{Chart, Series};
use palanquin_lab::results::{Leg, Results};
use palanquin_lab::transport::Transport;
use palanquin_lab::usage::median;

use super::document::{Block, Cell, Document, Tone};
use crate::experiment::{PALANQUIN, SENTENCE};

/// The MTU of which the first table speaks, if it was measured.
const USUAL: u32 = 1500;

/// Migration time in s, downtime in s and peak of CPU in percent, as the dissertation's own table has them.
const DISSERTATION: [(&str, &str); 4] = [
    ("vTPM", "22 s / 26 s / 62 %"),
    ("isolated VLAN", "14 s / 33 s / 51 %"),
    ("network security engine (PALM)", "19 s / 35 s / 63 %"),
    ("VPN", "15 s / 29 s / 45 %"),
];

/// Which of ours stands beside which of those.
const BESIDE: [Option<&str>; 4] = [
    None,
    Some("qemu-segment"),
    Some(PALANQUIN),
    Some("qemu-ipsec"),
];

/// Adds it to a document.
pub(super) fn add(document: &mut Document, results: &Results) {
    let legs: Vec<&Leg> = results.legs().collect();
    if legs.is_empty() {
        return;
    }
    document.heading("A letter on the wire");
    document.paragraph(&format!(
        "A file with the sentence \"{SENTENCE}\" is opened in a guest, which keeps its text as ASCII and as UTF-16, as \
         programs do. The guest is moved to another host and back while an observer records all that crosses the network \
         of the guests. Then the sentence is looked for in what was recorded. \"Within\" is what another observer finds who \
         has a foot in the isolated segment."
    ));
    let mtus: BTreeSet<u32> = legs.iter().map(|leg| leg.mtu).collect();
    let usual = if mtus.contains(&USUAL) {
        USUAL
    } else {
        mtus.iter().copied().next().unwrap_or(USUAL)
    };
    found(document, &legs);
    document.heading("What each way costs");
    costs(document, &legs, usual);
    if mtus.len() > 1 {
        document.heading("Over the MTU of the path");
        over_mtu(document, &legs, &mtus);
    }
    paths(document, results);
    beside(document, &legs, usual);
}

/// Transports in their order, ours last.
fn transports() -> impl Iterator<Item = (usize, &'static str, &'static str)> {
    let others = Transport::ALL.map(|transport| (transport.name(), transport.title()));
    others
        .into_iter()
        .chain([(PALANQUIN, "Palanquin")])
        .enumerate()
        .map(|(index, (name, title))| (index, name, title))
}

fn of<'a>(legs: &[&'a Leg], transport: &str, mtu: Option<u32>) -> Vec<&'a Leg> {
    let matches = |leg: &&&Leg| leg.transport == transport && mtu.is_none_or(|mtu| leg.mtu == mtu);
    legs.iter().filter(matches).copied().collect()
}

/// Middle, least and greatest of what was measured.
fn spread(legs: &[&Leg], value: impl Fn(&Leg) -> Option<f64>) -> Option<(f64, f64, f64)> {
    let values: Vec<f64> = legs.iter().filter_map(|leg| value(leg)).collect();
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    Some((median(values.into_iter())?, least, greatest))
}

fn shown(spread: Option<(f64, f64, f64)>, digits: usize) -> String {
    spread.map_or("-".to_owned(), |(median, least, greatest)| {
        format!("{median:.digits$} ({least:.digits$} to {greatest:.digits$})")
    })
}

fn found(document: &mut Document, legs: &[&Leg]) {
    let mut rows = Vec::new();
    for (_, name, title) in transports() {
        let of = of(legs, name, None);
        if of.is_empty() {
            continue;
        }
        let seen = |value: fn(&Leg) -> u64| of.iter().filter(|leg| value(leg) > 0).count();
        let cell = |count: usize| {
            let tone = if count > 0 { Tone::Bad } else { Tone::Good };
            Cell::toned(format!("in {count} of {} migrations", of.len()), tone)
        };
        let within = of.iter().filter(|leg| leg.segment_found.is_some()).count();
        rows.push(vec![
            Cell::plain(title),
            cell(seen(|leg| leg.ascii_found)),
            cell(seen(|leg| leg.utf16_found)),
            if within > 0 {
                cell(seen(|leg| leg.segment_found.unwrap_or(0)))
            } else {
                Cell::plain("no segment")
            },
            Cell::plain(
                of.iter()
                    .map(|leg| leg.missed_packets)
                    .sum::<u64>()
                    .to_string(),
            ),
        ]);
    }
    document.table(
        &[
            "transport",
            "found as ASCII",
            "found as UTF-16",
            "found within",
            "packets the observer missed",
        ],
        rows,
    );
}

fn costs(document: &mut Document, legs: &[&Leg], mtu: u32) {
    document.paragraph(&format!(
        "At an MTU of {mtu} bytes: medians, with the least and the greatest. Times and downtime are of migrations that \
         completed. Downtime is from the source's stop to the destination's start, as those who move the guest say it; lost \
         pings are of a client that sends 20 a second. CPU is of everything at both hosts, the guest included, in percent of \
         one CPU; its peak is within half a second. Segments of TCP are cut in software before \
         they cross the virtual cable, as for a network card without an engine for it."
    ));
    let mut rows = Vec::new();
    for (_, name, title) in transports() {
        let all = of(legs, name, Some(mtu));
        if all.is_empty() {
            continue;
        }
        let arrived: Vec<&Leg> = all.iter().filter(|leg| leg.completed).copied().collect();
        let lost = all.len() - arrived.len();
        let completed = format!("{} of {}", arrived.len(), all.len());
        rows.push(vec![
            Cell::plain(title),
            Cell::toned(completed, if lost > 0 { Tone::Bad } else { Tone::Plain }),
            Cell::plain(shown(spread(&arrived, |leg| Some(leg.total_ms)), 0)),
            Cell::plain(shown(spread(&arrived, |leg| leg.downtime_ms), 0)),
            Cell::plain(shown(
                spread(&arrived, |leg| Some(leg.lost_pings as f64)),
                0,
            )),
            Cell::plain(shown(spread(&arrived, |leg| Some(leg.ping_gap_ms)), 0)),
            Cell::plain(shown(spread(&arrived, |leg| Some(leg.cpu_percent)), 0)),
            Cell::plain(shown(spread(&arrived, |leg| Some(leg.peak_cpu_percent)), 0)),
            Cell::plain(shown(spread(&arrived, |leg| Some(mib(leg.bytes))), 0)),
            Cell::plain(shown(spread(&arrived, |leg| Some(leg.packets as f64)), 0)),
        ]);
    }
    document.table(
        &[
            "transport",
            "completed",
            "total, ms",
            "downtime, ms",
            "pings lost",
            "longest gap, ms",
            "CPU, %",
            "peak, %",
            "sent, MiB",
            "packets",
        ],
        rows,
    );
    let reasons: BTreeSet<String> = legs
        .iter()
        .filter_map(|leg| Some(format!("{}: {}", leg.transport, leg.reason.as_deref()?)))
        .map(|reason| without_uptime(&reason))
        .collect();
    if !reasons.is_empty() {
        document.paragraph(
            "Why some did not complete. A guest that dies under QEMU's own migration fits a defect of QEMU's emulated CPU \
             (TCG) that was mended in QEMU 9.0; that it is this one is not proven.",
        );
        document
            .blocks
            .push(Block::List(reasons.into_iter().collect()));
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A table over the MTU: its heading with the unit, and the value of a migration.
type Measure = (&'static str, fn(&Leg) -> Option<f64>);

fn over_mtu(document: &mut Document, legs: &[&Leg], mtus: &BTreeSet<u32>) {
    let measures: [Measure; 4] = [
        ("total time in ms", |leg| Some(leg.total_ms)),
        ("downtime in ms", |leg| leg.downtime_ms),
        ("CPU in % of one", |leg| Some(leg.cpu_percent)),
        ("packets", |leg| Some(leg.packets as f64)),
    ];
    for (title, value) in measures {
        let mut series = Vec::new();
        let mut rows = Vec::new();
        for (index, name, _) in transports() {
            let values: Vec<_> = mtus
                .iter()
                .map(|&mtu| {
                    let mut of = of(legs, name, Some(mtu));
                    of.retain(|leg| leg.completed);
                    spread(&of, value)
                })
                .collect();
            if values.iter().all(Option::is_none) {
                continue;
            }
            let cells = values.iter().map(|&value| Cell::plain(shown(value, 0)));
            rows.push([Cell::plain(name)].into_iter().chain(cells).collect());
            series.push(Series {
                name: name.to_owned(),
                index,
                values,
            });
        }
        let places: Vec<String> = mtus.iter().map(u32::to_string).collect();
        document.blocks.push(Block::Chart(Chart {
            title: title.to_owned(),
            axis: "MTU in bytes; the line is from the least to the greatest".to_owned(),
            places: places.clone(),
            series,
        }));
        let head = [format!("{title}, by MTU")].into_iter().chain(places);
        document.blocks.push(Block::Table {
            head: head.collect(),
            rows,
        });
    }
}

fn paths(document: &mut Document, results: &Results) {
    let names: BTreeSet<(&str, u32)> = results
        .paths()
        .map(|cell| (cell.path.as_str(), cell.mtu))
        .collect();
    if names.is_empty() {
        return;
    }
    document.heading("The paths by themselves");
    document.paragraph(
        "With no migration under way: the median round trip of a ping, and what iperf3 carries over one connection. QEMU's \
         TLS and Palanquin use the bare path. The plugin that encrypts IPsec in user space carries packets of at most 1400 \
         bytes within, whatever the MTU outside.",
    );
    let mut rows = Vec::new();
    for (path, mtu) in names {
        let of: Vec<_> = results
            .paths()
            .filter(|cell| cell.path == path && cell.mtu == mtu)
            .collect();
        let value = |values: Vec<f64>, digits: usize| {
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let spread = median(values.into_iter()).map(|median| (median, least, greatest));
            Cell::plain(shown(spread, digits))
        };
        let reason = of.iter().find_map(|cell| cell.reason.clone());
        rows.push(vec![
            Cell::plain(path),
            Cell::plain(mtu.to_string()),
            value(of.iter().filter_map(|cell| cell.rtt_ms).collect(), 3),
            value(of.iter().filter_map(|cell| cell.mbit_s).collect(), 0),
            Cell::plain(reason.unwrap_or_default()),
        ]);
    }
    document.table(&["path", "MTU", "ping, ms", "Mbit/s", "note"], rows);
}

fn beside(document: &mut Document, legs: &[&Leg], mtu: u32) {
    document.heading("Beside the dissertation's own table");
    document.paragraph(
        "Migration time, downtime and peak of CPU use. The two cannot be compared number by number: the table says nothing \
         of the hosts, hypervisors and guests behind it, and here all hosts share one machine, the guest is small, its CPU is \
         emulated, and there is no disk to move. The dissertation counted downtime by lost pings, so the longest gap between \
         two answers stands beside it. What can be compared is the order: which way costs more than another on the same \
         machine. Its vTPM protocol and PALM are not to be had to run; Palanquin stands where PALM stood, because it too \
         protects the move by itself.",
    );
    let rows = DISSERTATION
        .iter()
        .zip(BESIDE)
        .map(|((model, theirs), ours)| {
            let of = ours.map_or(Vec::new(), |ours| of(legs, ours, Some(mtu)));
            let arrived: Vec<&Leg> = of.into_iter().filter(|leg| leg.completed).collect();
            let middle = |value: fn(&Leg) -> Option<f64>| {
                spread(&arrived, value).map_or(f64::NAN, |(median, ..)| median)
            };
            let measured = if arrived.is_empty() {
                "not measured".to_owned()
            } else {
                format!(
                    "{:.1} s / {:.3} s / {:.0} %",
                    middle(|leg| Some(leg.total_ms / 1e3)),
                    middle(|leg| Some(leg.ping_gap_ms / 1e3)),
                    middle(|leg| Some(leg.peak_cpu_percent)),
                )
            };
            vec![
                Cell::plain(*model),
                Cell::plain(*theirs),
                Cell::plain(ours.unwrap_or("-")),
                Cell::plain(measured),
            ]
        })
        .collect();
    document.table(
        &[
            "model of the dissertation",
            "its time / downtime / CPU",
            "here",
            "time / longest ping gap / peak of CPU",
        ],
        rows,
    );
}

/// A line of a kernel without its `[    6.617987]`, by which each would be another.
fn without_uptime(line: &str) -> String {
    let uptime = line.split_once('[').and_then(|(before, rest)| {
        let (uptime, after) = rest.split_once("] ")?;
        uptime.trim().parse::<f64>().ok()?;
        Some(format!("{before}{after}"))
    });
    uptime.unwrap_or_else(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leg(transport: &str, mtu: u32, total_ms: f64, found: u64) -> Leg {
        Leg {
            transport: transport.to_owned(),
            mtu,
            run: 1,
            way: "there".to_owned(),
            completed: true,
            reason: None,
            ascii_found: found,
            utf16_found: found,
            segment_found: None,
            total_ms,
            downtime_ms: Some(20.0),
            lost_pings: 1,
            ping_gap_ms: 60.0,
            cpu_s: 1.0,
            cpu_percent: 50.0,
            peak_cpu_percent: 90.0,
            bytes: 1 << 20,
            packets: 1000,
            missed_packets: 0,
        }
    }

    #[test]
    fn a_kernel_that_panics_later_is_the_same_reason() {
        let line = "the guest died: [    6.617987] Kernel panic - not syncing";
        assert_eq!(
            without_uptime(line),
            "the guest died: Kernel panic - not syncing"
        );
        for line in ["not within 30s", "[a] b", "[", "] [1.0]"] {
            assert_eq!(without_uptime(line), line);
        }
    }

    #[test]
    fn the_median_stands_with_its_spread() {
        let legs = [
            leg("qemu", 1500, 1.0, 1),
            leg("qemu", 1500, 9.0, 1),
            leg("qemu", 1500, 2.0, 1),
        ];
        let legs: Vec<&Leg> = legs.iter().collect();
        let spread = spread(&legs, |leg| Some(leg.total_ms));
        assert_eq!(shown(spread, 0), "2 (1 to 9)");
    }

    #[test]
    fn a_sentence_that_was_found_is_bad_and_one_that_was_not_is_good() {
        let legs = [leg("qemu", 1500, 1.0, 7), leg("palanquin", 1500, 1.0, 0)];
        let legs: Vec<&Leg> = legs.iter().collect();
        let mut document = Document::new("t");
        found(&mut document, &legs);
        let Some(Block::Table { rows, .. }) = document.blocks.first() else {
            panic!("no table");
        };
        assert_eq!(rows[0][1].tone, Tone::Bad);
        assert_eq!(rows[1][1].tone, Tone::Good);
        assert_eq!(rows[1][1].text, "in 0 of 1 migrations");
    }
}
