//! Parts of plots as SVG 1.1: readable on light and dark ground, and without colours by the shapes of the marks.

use std::fmt::Write as _;

/// Colours after Okabe and Ito, told apart by the colour-blind too; the same on light and dark ground.
pub const COLOURS: [&str; 6] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
];
/// How the classes of the parts look.
pub const STYLE: &str = ".ground{fill:#ffffff}.text{fill:#1f2328}.axis{stroke:#1f2328;fill:none}.grid{stroke:#d0d7de}\n\
     @media screen and (prefers-color-scheme: dark){.ground{fill:#0d1117}.text{fill:#e6edf3}.axis{stroke:#e6edf3}.grid{stroke:#30363d}}";

/// Adds a line. Writing to a string cannot fail.
pub fn add(out: &mut String, line: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(line);
    out.push('\n');
}

/// Adds a text; `anchor` is `start`, `middle` or `end`.
pub fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, what: &str) {
    let what = what.replace('&', "&amp;").replace('<', "&lt;");
    add(
        out,
        format_args!(
            "<text class=\"text\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>"
        ),
    );
}

/// Marks of an axis that cover everything up to `most`: powers of ten, or equal steps from 0.
pub fn marks(least: f64, most: f64, logarithmic: bool) -> Vec<f64> {
    if logarithmic {
        let from = least.max(0.1).log10().floor() as i32;
        let to = (most.max(1.0).log10().ceil() as i32).max(from + 1);
        return (from..=to).map(|power| 10_f64.powi(power)).collect();
    }
    let rough = most.max(1.0) / 5.0;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    (0..=(most / step).ceil().max(1.0) as u32)
        .map(|count| f64::from(count) * step)
        .collect()
}

/// The mark of one of several things; colours and shapes begin anew after six.
pub fn shape(out: &mut String, index: usize, (x, y): (f64, f64), filled: bool) {
    let index = index % COLOURS.len();
    let colour = COLOURS[index];
    let fill = if filled { colour } else { "none" };
    let path = match index {
        0 => format!("M{:.1},{:.1} h9 v9 h-9 z", x - 4.5, y - 4.5),
        1 => format!("M{x:.1},{:.1} l5.5,9 h-11 z", y - 5.5),
        2 => format!("M{x:.1},{:.1} l-5.5,-9 h11 z", y + 5.5),
        3 => format!("M{x:.1},{:.1} l5.5,5.5 l-5.5,5.5 l-5.5,-5.5 z", y - 5.5),
        4 => format!(
            "M{:.1},{y:.1} a4.5,4.5 0 1,0 9,0 a4.5,4.5 0 1,0 -9,0 z",
            x - 4.5
        ),
        _ => format!("M{:.1},{y:.1} h11 M{x:.1},{:.1} v11", x - 5.5, y - 5.5),
    };
    add(
        out,
        format_args!("<path d=\"{path}\" stroke=\"{colour}\" stroke-width=\"2\" fill=\"{fill}\"/>"),
    );
}

/// One thing over several places.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// Number of its colour and shape.
    pub index: usize,
    /// For each place the middle, least and greatest value; none where nothing was measured.
    pub values: Vec<Option<(f64, f64, f64)>>,
}

/// A plot of several things over the same places, with the spread of each.
#[derive(Clone, Debug)]
pub struct Chart {
    /// What is shown, with its unit.
    pub title: String,
    /// What the places are.
    pub axis: String,
    /// Their names.
    pub places: Vec<String>,
    /// What is shown.
    pub series: Vec<Series>,
}

impl Chart {
    /// Draws it.
    pub fn svg(&self) -> String {
        const WIDTH: f64 = 640.0;
        const HEIGHT: f64 = 330.0;
        let (left, right, top, bottom) = (60.0, 450.0, 34.0, 270.0);
        let title = self.title.replace('&', "&amp;").replace('"', "&quot;");
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n"
        );
        let most = self
            .series
            .iter()
            .flat_map(|series| series.values.iter().flatten())
            .map(|value| value.2)
            .fold(0.0, f64::max);
        let marks = marks(0.0, most, false);
        let high = marks[marks.len() - 1];
        let y = |value: f64| bottom - value / high * (bottom - top);
        let step = (right - left) / self.places.len().max(1) as f64;
        text(&mut out, (left, 18.0), "start", &self.title);
        for mark in &marks {
            let at = y(*mark);
            add(
                &mut out,
                format_args!(
                    "<line class=\"grid\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"
                ),
            );
            text(&mut out, (left - 8.0, at + 4.0), "end", &format!("{mark}"));
        }
        for (index, place) in self.places.iter().enumerate() {
            let at = left + (index as f64 + 0.5) * step;
            text(&mut out, (at, bottom + 18.0), "middle", place);
        }
        let middle = f64::midpoint(left, right);
        text(&mut out, (middle, bottom + 38.0), "middle", &self.axis);
        add(
            &mut out,
            format_args!(
                "<path class=\"axis\" d=\"M{left:.1},{top:.1} V{bottom:.1} H{right:.1}\"/>"
            ),
        );
        // Beside each other, so that no spread hides another.
        let gap = step / (self.series.len() + 1).max(2) as f64;
        for (nth, series) in self.series.iter().enumerate() {
            let colour = COLOURS[series.index % COLOURS.len()];
            for (place, value) in series.values.iter().enumerate() {
                let Some((median, least, greatest)) = *value else {
                    continue;
                };
                let x = left + place as f64 * step + (nth + 1) as f64 * gap;
                add(
                    &mut out,
                    format_args!(
                        "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                        y(least),
                        y(greatest)
                    ),
                );
                shape(&mut out, series.index, (x, y(median)), true);
            }
            let row = top + 10.0 + nth as f64 * 22.0;
            shape(&mut out, series.index, (right + 20.0, row), true);
            text(&mut out, (right + 34.0, row + 4.0), "start", &series.name);
        }
        out.push_str("</svg>\n");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_cover_what_is_drawn() {
        assert_eq!(marks(0.0, 400.0, false), [0.0, 100.0, 200.0, 300.0, 400.0]);
        assert_eq!(marks(7.0, 900.0, true), [1.0, 10.0, 100.0, 1000.0]);
    }

    #[test]
    fn a_chart_names_everything_and_what_is_missing_is_not_drawn() {
        let series = |name: &str, index, values| Series {
            name: name.to_owned(),
            index,
            values,
        };
        let chart = Chart {
            title: "a & b".to_owned(),
            axis: "MTU".to_owned(),
            places: vec!["576".to_owned(), "1500".to_owned()],
            series: vec![
                series("one", 0, vec![Some((2.0, 1.0, 3.0)), None]),
                series("none", 7, vec![None, None]),
            ],
        };
        let svg = chart.svg();
        for word in ["a &amp; b", "MTU", "576", "1500", ">one<", ">none<"] {
            assert!(svg.contains(word), "{word}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn an_empty_chart_is_drawn_without_a_panic() {
        let chart = Chart {
            title: String::new(),
            axis: String::new(),
            places: Vec::new(),
            series: Vec::new(),
        };
        assert!(!chart.svg().contains("NaN"));
    }
}
