//! A plot of downtime and data against the dirty rate, as SVG 1.1: readable on light and dark ground, and without
//! colours by the shapes of the marks.

use std::fmt::Write as _;

use palanquin_lab::chart::{COLOURS, STYLE, add, marks, shape, text};

use crate::strategies::{Point, STRATEGIES};

/// Width and height of a panel's axes.
const SIZE: (f64, f64) = (400.0, 260.0);
const LEFT: f64 = 70.0;
const TOP: f64 = 50.0;
/// Distance between the left edges of two panels.
const STEP: f64 = 500.0;
struct Panel<'a> {
    title: &'a str,
    left: f64,
    value: fn(&Point) -> Option<f64>,
    /// Powers of ten rather than equal steps.
    logarithmic: bool,
}

/// Draws all points.
pub(crate) fn svg(points: &[Point], link_mbit_s: u32) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 1000 420\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <style>\n{STYLE}\n</style>\n<rect class=\"ground\" width=\"1000\" height=\"420\"/>\n"
    );
    let panels = [
        Panel {
            title: "downtime in ms",
            left: LEFT,
            value: |point| point.downtime_ms.filter(|_| point.completed),
            logarithmic: true,
        },
        Panel {
            title: "data on the wire in MiB",
            left: LEFT + STEP,
            value: |point| point.bytes_on_wire.map(|bytes| bytes / f64::from(1 << 20)),
            logarithmic: false,
        },
    ];
    for panel in &panels {
        draw(&mut out, panel, points);
    }
    legend(&mut out, points);
    let note = format!(
        "link: {link_mbit_s} Mbit/s; hollow: not completed, what was sent until it was given up"
    );
    text(&mut out, (LEFT, 408.0), "start", &note);
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, panel: &Panel<'_>, points: &[Point]) {
    let values: Vec<f64> = points.iter().filter_map(panel.value).collect();
    let least = values
        .iter()
        .copied()
        .fold(f64::INFINITY, f64::min)
        .min(1e6);
    let most = values.iter().copied().fold(0.0, f64::max);
    let fastest = points
        .iter()
        .map(|point| point.dirty_mib_s)
        .max()
        .unwrap_or(0) as f64;
    let (y_marks, x_marks) = (
        marks(least, most, panel.logarithmic),
        marks(0.0, fastest, false),
    );
    let scale = |value: f64| {
        if panel.logarithmic {
            value.max(1e-3).log10()
        } else {
            value
        }
    };
    let (low, high) = (scale(y_marks[0]), scale(y_marks[y_marks.len() - 1]));
    let (left, bottom) = (panel.left, TOP + SIZE.1);
    let x = |rate: f64| left + rate / x_marks[x_marks.len() - 1] * SIZE.0;
    let y = |value: f64| bottom - (scale(value) - low) / (high - low) * SIZE.1;
    text(out, (left, TOP - 18.0), "start", panel.title);
    for mark in &y_marks {
        let at = y(*mark);
        add(
            out,
            format_args!(
                "<line class=\"grid\" x1=\"{left:.1}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
                left + SIZE.0
            ),
        );
        text(out, (left - 8.0, at + 4.0), "end", &format!("{mark}"));
    }
    for mark in &x_marks {
        text(out, (x(*mark), bottom + 18.0), "middle", &format!("{mark}"));
    }
    text(
        out,
        (left + SIZE.0 / 2.0, bottom + 36.0),
        "middle",
        "rewritten by the guest, MiB/s",
    );
    add(
        out,
        format_args!(
            "<path class=\"axis\" d=\"M{left:.1},{TOP:.1} V{bottom:.1} H{:.1}\"/>",
            left + SIZE.0
        ),
    );
    for (index, path) in STRATEGIES.iter().enumerate() {
        let mut line = String::new();
        let mut shapes = String::new();
        for point in points.iter().filter(|point| point.strategy == path.name) {
            let Some(value) = (panel.value)(point) else {
                continue;
            };
            let at = (x(point.dirty_mib_s as f64), y(value));
            let command = if line.is_empty() { 'M' } else { 'L' };
            let _ = write!(line, "{command}{:.1},{:.1} ", at.0, at.1);
            shape(&mut shapes, index, at, point.completed);
        }
        let colour = COLOURS[index];
        add(
            out,
            format_args!(
                "<path d=\"{line}\" stroke=\"{colour}\" stroke-width=\"2\" fill=\"none\"/>"
            ),
        );
        out.push_str(&shapes);
    }
}

fn legend(out: &mut String, points: &[Point]) {
    for (index, path) in STRATEGIES.iter().enumerate() {
        let left = LEFT + index as f64 * 150.0;
        shape(out, index, (left, 376.0), true);
        let refused = points
            .iter()
            .any(|point| point.strategy == path.name && point.refused);
        let what = if refused {
            format!("{} (refused)", path.name)
        } else {
            path.name.to_owned()
        };
        text(out, (left + 12.0, 380.0), "start", &what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(strategy: &str, rate: u64, downtime_ms: Option<f64>) -> Point {
        Point {
            strategy: strategy.to_owned(),
            dirty_mib_s: rate,
            dirtied_mib_s: None,
            rounds: None,
            downtime_ms,
            total_ms: None,
            bytes_on_wire: downtime_ms.map(|_| 1e9),
            completed: downtime_ms.is_some(),
            refused: downtime_ms.is_none(),
            reason: None,
            runs: 1,
        }
    }

    #[test]
    fn every_strategy_is_in_the_legend_and_what_is_refused_says_so() {
        let svg = svg(
            &[point("pre-copy", 50, Some(20.0)), point("hybrid", 50, None)],
            1000,
        );
        for path in STRATEGIES {
            assert!(svg.contains(path.name));
        }
        assert!(svg.contains("hybrid (refused)") && !svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn nothing_measured_is_drawn_without_a_panic() {
        assert!(!svg(&[], 1000).contains("NaN"));
    }
}
