//! What is aimed at, as ratios within one run, and whether it was met.

use crate::floor::FLOOR;
use crate::palanquin::{DEFAULT, HYBRID, IMPROVED, POST_COPY};
use crate::qemu::{PLAIN, PLAIN_MULTIFD, TLS_MULTIFD};
use crate::row::Row;
use crate::service::Service;

/// One bar: a ratio and its bound.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bar {
    what: String,
    /// The ratio; none where one of its sides was not measured.
    ratio: Option<f64>,
    bound: Bound,
    /// Why there is no ratio, or what makes it miss whatever the ratio is.
    but: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    /// Whether it was met; none if that is not known.
    fn met(&self) -> Option<bool> {
        let ratio = self.ratio?;
        let within = match self.bound {
            Bound::AtMost(bound) => ratio <= bound,
            Bound::AtLeast(bound) => ratio >= bound,
        };
        Some(within && self.but.is_none())
    }

    /// As a line of a table.
    fn line(&self) -> String {
        let bound = match self.bound {
            Bound::AtMost(bound) => format!("at most {bound:.2}"),
            Bound::AtLeast(bound) => format!("at least {bound:.2}"),
        };
        let verdict = match self.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        };
        let ratio = self
            .ratio
            .map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let but = self
            .but
            .as_ref()
            .map_or(String::new(), |but| format!(": {but}"));
        format!("| {} | {ratio} | {bound} | {verdict}{but} |", self.what)
    }
}

/// Which of a row's values a bar compares.
type Value = fn(&Row) -> Option<f64>;

struct Rows<'a>(&'a [Row]);

impl Rows<'_> {
    fn get(&self, workload: &str, path: &str) -> Option<&Row> {
        self.0
            .iter()
            .find(|row| row.workload == workload && row.path == path)
    }

    fn bar(
        &self,
        workload: &str,
        (ours, theirs): (&str, &str),
        value: Value,
        what: &str,
        most: f64,
    ) -> Bar {
        let (our_row, their_row) = (self.get(workload, ours), self.get(workload, theirs));
        let values = our_row.and_then(value).zip(their_row.and_then(value));
        // What QEMU sent until it was given up counts; what we sent in vain does not.
        let but = match our_row {
            Some(row) if row.refused => Some(format!("{ours} is not offered")),
            Some(row) if !row.completed => Some(format!("{ours} did not complete")),
            _ => None,
        };
        Bar {
            what: format!("{workload}: {what}, {ours} / {theirs}"),
            ratio: values.map(|(ours, theirs)| ours / theirs),
            bound: Bound::AtMost(most),
            but,
        }
    }
}

/// All bars.
pub(crate) fn all(rows: &[Row], service: &[Service]) -> Vec<Bar> {
    let rows = Rows(rows);
    let total: Value = |row| row.total_ms;
    let downtime: Value = |row| row.downtime_ms;
    let bytes: Value = |row| row.bytes_on_wire;
    let mut bars = vec![
        rows.bar("idle", (DEFAULT, TLS_MULTIFD), total, "total time", 0.4),
        rows.bar("idle", (DEFAULT, PLAIN_MULTIFD), total, "total time", 1.0),
        rows.bar("idle", (DEFAULT, FLOOR), downtime, "downtime", 1.5),
        rows.bar("idle", (DEFAULT, PLAIN), downtime, "downtime", 0.2),
        rows.bar("idle", (DEFAULT, TLS_MULTIFD), downtime, "downtime", 0.2),
    ];
    for ours in [IMPROVED, HYBRID] {
        bars.push(rows.bar("hot", (ours, PLAIN), bytes, "bytes on the wire", 0.6));
    }
    bars.push(rows.bar("hot", (POST_COPY, FLOOR), downtime, "downtime", 2.0));
    bars.push(rows.bar("gbit", (DEFAULT, PLAIN), total, "total time", 0.4));
    let limited = service.iter().find(|service| service.bandwidth.is_some());
    bars.push(Bar {
        what: "service: a client's requests per second during / before, with --bandwidth"
            .to_owned(),
        ratio: limited.map(Service::ratio),
        bound: Bound::AtLeast(0.8),
        but: None,
    });
    bars
}

/// The table of all bars, as Markdown.
pub(crate) fn table(bars: &[Bar]) -> String {
    let mut text = "| bar | ratio | bound | |\n|---|---|---|---|\n".to_owned();
    for bar in bars {
        text += &bar.line();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::sample;

    fn row(path: &str, workload: &str, total_ms: f64, completed: bool) -> Row {
        Row::new(&[&sample(path, workload, total_ms, completed)], "").unwrap()
    }

    fn find<'a>(bars: &'a [Bar], what: &str) -> &'a Bar {
        bars.iter().find(|bar| bar.what.contains(what)).unwrap()
    }

    #[test]
    fn a_ratio_on_its_bound_is_met_and_one_beyond_is_missed() {
        let rows = [
            row(DEFAULT, "idle", 400.0, true),
            row(TLS_MULTIFD, "idle", 1000.0, true),
            row(PLAIN_MULTIFD, "idle", 399.0, true),
        ];
        let bars = all(&rows, &[]);
        let tls = find(&bars, "total time, palanquin / qemu tls");
        assert_eq!(tls.met(), Some(true), "{tls:?}");
        assert_eq!(
            find(&bars, "palanquin / qemu plaintext multifd").met(),
            Some(false)
        );
        assert_eq!(find(&bars, "gbit").met(), None);
        assert!(table(&bars).contains("MISSED"));
    }

    #[test]
    fn what_does_not_complete_misses_however_little_it_sent() {
        let rows = [
            row(IMPROVED, "hot", 1.0, false),
            row(PLAIN, "hot", 900.0, false),
        ];
        let mut few = rows.clone();
        few[0].bytes_on_wire = Some(1.0);
        assert_eq!(find(&all(&few, &[]), IMPROVED).met(), Some(false));
    }
}
