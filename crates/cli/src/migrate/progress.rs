//! How a migration goes, for people: a bar on a terminal, a line for each phase elsewhere, nothing for scripts.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use palanquin_api::control::{MigrationInfo, Phase};

use crate::output::{line, note};
use crate::render;

/// Units of the bar for each per cent.
const STEPS: f64 = 10.0;

enum Form {
    Bar(ProgressBar),
    Lines,
    Nothing,
}

/// Shows how a migration goes.
pub(super) struct Progress {
    form: Form,
    phase: Option<Phase>,
    redialling: bool,
    percent: f64,
}

impl Progress {
    pub(super) fn new(json: bool) -> Self {
        let form = if json {
            Form::Nothing
        } else if std::io::stderr().is_terminal() {
            Form::Bar(bar())
        } else {
            Form::Lines
        };
        Self {
            form,
            phase: None,
            redialling: false,
            percent: 0.0,
        }
    }

    pub(super) fn show(&mut self, info: &MigrationInfo) {
        let redialling = is_redialling(info);
        let changed = self.phase != Some(info.phase) || self.redialling != redialling;
        self.phase = Some(info.phase);
        self.redialling = redialling;
        let percent = self.advance(info.percent);
        match &self.form {
            Form::Bar(bar) => {
                bar.set_position((percent * STEPS) as u64);
                bar.set_message(text(info));
            }
            Form::Lines if changed => note(&line(&format!("{}: {}", info.vm, text(info)))),
            Form::Lines | Form::Nothing => {}
        }
    }

    /// The agent never takes a percentage back; neither do we if it should, also after its restart.
    fn advance(&mut self, percent: f64) -> f64 {
        self.percent = self.percent.max(percent).clamp(0.0, 100.0);
        self.percent
    }

    /// Takes the bar away, so that lines can be written; the next [`Progress::show`] brings it back.
    pub(super) fn clear(&mut self) {
        if let Form::Bar(shown) = &mut self.form {
            shown.finish_and_clear();
            *shown = bar();
        }
    }
}

fn bar() -> ProgressBar {
    let bar =
        ProgressBar::with_draw_target(Some((100.0 * STEPS) as u64), ProgressDrawTarget::stderr());
    // The template is a constant that is known to be good.
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {wide_msg}") {
        bar.set_style(style);
    }
    bar
}

/// Whether the connection broke while pages were being sent; then the agent gives the reason.
fn is_redialling(info: &MigrationInfo) -> bool {
    info.phase == Phase::PreCopy && info.reason.is_some()
}

fn text(info: &MigrationInfo) -> String {
    let mut text = render::phase(info.phase).to_owned();
    if info.phase == Phase::PreCopy && info.rounds > 0 {
        text += &format!(", round {}", info.rounds);
        if info.rate_bytes_per_s > 0 {
            text += &format!(", {}/s", render::bytes(info.rate_bytes_per_s));
        }
        text += &format!(", {} left", render::bytes(info.bytes_remaining));
        if let Some(predicted) = info.predicted_downtime_ms {
            text += &format!(", downtime now about {}", render::ms(predicted));
        }
        if info.dirty_rate_bytes_per_s > 0 {
            let rate = render::bytes(info.dirty_rate_bytes_per_s);
            text += &format!(", guest writes {rate}/s");
        }
    }
    if info.phase == Phase::InDoubt
        && let Some(reason) = &info.reason
    {
        text += &format!(": {reason}");
    }
    if is_redialling(info)
        && let Some(reason) = &info.reason
    {
        text += &format!("; the link is lost, dialling again: {reason}");
    }
    line(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentage_never_runs_backwards_and_never_leaves_its_bounds() {
        let mut progress = Progress::new(true);
        let told = [10.0, 5.0, f64::NAN, 40.0, -1.0, 130.0, 99.0];
        let shown: Vec<f64> = told.map(|percent| progress.advance(percent)).to_vec();
        assert_eq!(shown, [10.0, 10.0, 10.0, 40.0, 40.0, 100.0, 100.0]);
    }
}
