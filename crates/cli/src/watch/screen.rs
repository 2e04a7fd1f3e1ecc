//! The view in a terminal: a line for each target, round trips of the chosen one, and what happened.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use palanquin_api::control::ErrorKind;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Row, Sparkline, SparklineBar, Table, TableState};

use super::board::{Board, Mood, Shown};
use super::both::clock_text;
use super::live::{Shared, held};
use crate::failure::Failure;
use crate::output::line;

/// How often it is drawn.
const EVERY: Duration = Duration::from_millis(500);

/// The screen; dropped, the terminal is as it was.
pub(crate) struct Screen {
    closed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Screen {
    /// Takes the terminal.
    pub(crate) fn open(board: Shared) -> Result<Self, Failure> {
        let failed =
            |error| Failure::new(ErrorKind::Usage, "there is no terminal to draw on").cause(error);
        let mut terminal = ratatui::try_init().map_err(failed)?;
        let closed = Arc::new(AtomicBool::new(false));
        let is_closed = Arc::clone(&closed);
        let draws = std::thread::Builder::new().name("screen".to_owned());
        let thread = draws.spawn(move || {
            let mut chosen = TableState::default().with_selected(0);
            while !is_closed.load(Ordering::Relaxed) {
                let draw = |frame: &mut Frame<'_>| draw(frame, &held(&board), &mut chosen);
                let is_drawn = terminal.draw(draw).is_ok();
                let targets = held(&board).targets.len();
                // A terminal that went away is left as well.
                if !is_drawn || !goes_on(&mut chosen, targets).unwrap_or(false) {
                    break;
                }
            }
            is_closed.store(true, Ordering::Relaxed);
        });
        let thread = thread.map_err(|error| {
            ratatui::restore();
            failed(error)
        })?;
        Ok(Self {
            closed,
            thread: Some(thread),
        })
    }

    /// Whether the operator has left it.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        ratatui::restore();
    }
}

/// Waits for a key until it is time to draw again; whether to go on.
fn goes_on(chosen: &mut TableState, targets: usize) -> io::Result<bool> {
    if !event::poll(EVERY)? {
        return Ok(true);
    }
    let Event::Key(key) = event::read()? else {
        return Ok(true);
    };
    if key.kind != KeyEventKind::Press {
        return Ok(true);
    }
    let is_interrupt =
        key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
    let at = chosen.selected().unwrap_or(0);
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return Ok(false),
        KeyCode::Down | KeyCode::Char('j') => {
            chosen.select(Some((at + 1).min(targets.saturating_sub(1))));
        }
        KeyCode::Up | KeyCode::Char('k') => chosen.select(Some(at.saturating_sub(1))),
        _ => {}
    }
    Ok(!is_interrupt)
}

fn colour(mood: Mood) -> Color {
    match mood {
        Mood::Calm => Color::Green,
        Mood::Ordered => Color::Blue,
        Mood::Warn => Color::Yellow,
        Mood::Alarm => Color::Red,
    }
}

fn ms(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.2} ms"))
}

fn draw(frame: &mut Frame<'_>, board: &Board, chosen: &mut TableState) {
    let areas = Layout::vertical([
        Constraint::Min(4),
        Constraint::Length(8),
        Constraint::Length(10),
        Constraint::Length(1),
    ]);
    let [targets, chart, events, foot] = areas.areas(frame.area());
    table(frame, board, targets, chosen);
    let at = chosen.selected().unwrap_or(0);
    if let Some(target) = board.targets.get(at) {
        round_trips(frame, target, chart);
    }
    let room = usize::from(events.height.saturating_sub(2));
    let lines: Vec<Line<'_>> = board
        .events
        .iter()
        .rev()
        .take(room)
        .map(|happened| {
            let who = happened.target.as_deref().unwrap_or("watcher");
            let text = format!(
                "{}  {}  {}",
                clock_text(happened.time_s),
                line(who),
                line(&happened.text)
            );
            Line::from(Span::styled(text, Style::new().fg(colour(happened.mood))))
        })
        .collect();
    frame.render_widget(
        Paragraph::new(lines).block(Block::bordered().title(" events ")),
        events,
    );
    let stalls = format!(
        " q leaves, up and down choose; the watcher itself stalled {} times, {:.1} s in all",
        board.stalls, board.stalled_s
    );
    frame.render_widget(Paragraph::new(stalls), foot);
}

fn table(frame: &mut Frame<'_>, board: &Board, area: Rect, chosen: &mut TableState) {
    let header = [
        "target",
        "is",
        "state",
        "since",
        "likelihood",
        "round trip",
        "loss",
        "clock",
        "told last",
    ];
    let rows = board.targets.iter().map(|target| {
        let is_host = target.role == "host";
        let (state, since, likelihood) = if is_host {
            ("-".to_owned(), String::new(), String::new())
        } else {
            let likelihood = format!("{:.3}", target.likelihood);
            (
                target.mood.name().to_owned(),
                clock_text(target.since_s),
                likelihood,
            )
        };
        let loss = target
            .loss
            .map_or("-".to_owned(), |loss| format!("{:.1} %", loss * 100.0));
        Row::new([
            line(&target.name),
            target.role.to_owned(),
            state,
            since,
            likelihood,
            ms(target.rtt_ms),
            loss,
            ms(target.offset_ms),
            line(&target.why),
        ])
        .style(Style::new().fg(if is_host {
            Color::Reset
        } else {
            colour(target.mood)
        }))
    });
    let widths = [
        Constraint::Length(20),
        Constraint::Length(4),
        Constraint::Length(7),
        Constraint::Length(20),
        Constraint::Length(10),
        Constraint::Length(11),
        Constraint::Length(7),
        Constraint::Length(13),
        Constraint::Fill(1),
    ];
    let table = Table::new(rows, widths)
        .header(Row::new(header).style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
        .block(Block::bordered().title(" Palanquin watch "));
    frame.render_stateful_widget(table, area, chosen);
}

/// Seconds with losses are red and as high as the chart: they are no round trips of nothing.
fn round_trips(frame: &mut Frame<'_>, target: &Shown, area: Rect) {
    let width = usize::from(area.width.saturating_sub(2));
    let shown = target.history.iter().rev().take(width);
    let most_ms = shown
        .clone()
        .filter_map(|second| second.rtt_ms)
        .fold(0.0, f64::max)
        .max(1e-3);
    // In microseconds: bars are whole numbers.
    let most_us = (most_ms * 1e3).ceil() as u64;
    let bars: Vec<SparklineBar> = shown
        .rev()
        .map(|second| match (second.lost, second.rtt_ms) {
            (0, Some(ms)) => SparklineBar::from((ms * 1e3) as u64),
            (0, None) => SparklineBar::from(None::<u64>),
            _ => SparklineBar::from(most_us).style(Style::new().fg(Color::Red)),
        })
        .collect();
    let title = format!(
        " {}: round trips, at most {most_ms:.2} ms; red: lost ",
        line(&target.name)
    );
    let chart = Sparkline::default()
        .data(bars)
        .max(most_us)
        .block(Block::bordered().title(title));
    frame.render_widget(chart, area);
}

#[cfg(test)]
mod tests {
    use palanquin_host::probe::{Event as Told, Reading};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::buffer::Cell;

    use super::*;

    #[test]
    fn targets_states_and_events_are_drawn_in_any_size() {
        let target = "name = 'web'\naddress = '10.0.0.1'\nrole = 'vm'";
        let mut board = Board::new(&[toml::from_str(target).unwrap()], 0.0);
        for second in 0..30 {
            let reading = if second == 20 {
                Reading::Lost
            } else {
                Reading::Rtt { ms: 1.5 }
            };
            let (target, sent_us) = (0, second * 1_000_000);
            board.take(&Told::Seen {
                target,
                sent_us,
                reading,
            });
        }
        board.advance(40.0);
        board.happened(1.0, None, Mood::Alarm, "it\u{1b}[2J happened");
        for (width, height) in [(120, 40), (20, 10), (3, 3), (1, 1)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            let mut chosen = TableState::default().with_selected(0);
            terminal
                .draw(|frame| draw(frame, &board, &mut chosen))
                .unwrap();
            if width == 120 {
                let text = terminal.backend().to_string();
                for word in ["web", "calm", "1.50 ms", "happened", "3.3 %"] {
                    assert!(text.contains(word), "{word} in {text}");
                }
                assert!(!text.contains('\u{1b}'));
                // The second without an answer is a red bar as high as the chart, the others are not.
                let buffer = terminal.backend().buffer();
                let chart = buffer.content().chunks(120).skip(22).take(6);
                let red: Vec<usize> = chart
                    .map(|row| {
                        let is_red = |cell: &&Cell| cell.fg == Color::Red && cell.symbol() != " ";
                        row.iter().filter(is_red).count()
                    })
                    .collect();
                assert_eq!(red, [1; 6], "{text}");
            }
        }
    }
}
