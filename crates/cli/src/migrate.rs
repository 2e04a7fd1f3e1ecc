//! `palanquin migrate` and `palanquin migration watch`: start, follow, and say how it ended.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use palanquin_api::control::{
    AbortAnswer, AbortOutcome, ErrorKind, MigrationInfo, Outcome, Phase, StartMigration,
};

use crate::client::{Client, RequestError};
use crate::failure::Failure;
use crate::render;

/// Shows how a migration goes: a bar on a terminal, a line for each phase elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    phase: Option<Phase>,
    percent: f64,
}

impl Progress {
    fn new(quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::stderr());
            // The template is a constant that is known to be good.
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self {
            bar,
            phase: None,
            percent: 0.0,
        }
    }

    fn show(&mut self, info: &MigrationInfo, quiet: bool) {
        // The agent never takes a percentage back; neither do we if it should.
        self.percent = self.percent.max(info.percent);
        let changed = self.phase != Some(info.phase);
        self.phase = Some(info.phase);
        match &self.bar {
            Some(bar) => {
                bar.set_position((self.percent * 10.0) as u64);
                bar.set_message(line(info));
            }
            None if changed && !quiet => eprintln!("{}: {}", info.vm, line(info)),
            None => {}
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn line(info: &MigrationInfo) -> String {
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
            text += &format!(
                ", guest writes {}/s",
                render::bytes(info.dirty_rate_bytes_per_s)
            );
        }
    }
    if info.phase == Phase::InDoubt
        && let Some(reason) = &info.reason
    {
        text += &format!(": {reason}");
    }
    text
}

/// Starts a migration and, unless it shall be left alone, follows it to its end.
pub(crate) async fn migrate(
    client: &Client,
    request: &StartMigration,
    detach: bool,
    json: bool,
) -> Result<(), Failure> {
    let info: MigrationInfo = client.post("/v1/migrations", request).await?;
    if detach {
        if json {
            render::say_line(&to_json(&info));
        } else {
            render::say_line(&format!(
                "Started. Follow it with: palanquin migration watch {}",
                info.id
            ));
        }
        return Ok(());
    }
    follow(client, info, json, true).await
}

/// Follows a migration to its end.
pub(crate) async fn follow(
    client: &Client,
    info: MigrationInfo,
    json: bool,
    may_abort: bool,
) -> Result<(), Failure> {
    let mut progress = Progress::new(json);
    let mut info = info;
    let mut interrupted = false;
    let id = info.id;
    while info.phase != Phase::Done {
        progress.show(&info, json);
        if info.phase == Phase::InDoubt && interrupted {
            break;
        }
        let path = format!("/v1/migrations/{id}/watch?after={}", info.revision);
        tokio::select! {
            news = client.get::<MigrationInfo>(&path) => info = match news {
                Ok(news) => news,
                Err(RequestError::Unreachable(problem)) => {
                    progress.clear();
                    return Err(vanished(&info, &problem));
                }
                Err(RequestError::Answered(failure)) => return Err(failure),
            },
            signal = tokio::signal::ctrl_c() => {
                progress.clear();
                if signal.is_err() || interrupted || !may_abort {
                    eprintln!("Left alone. Follow it with: palanquin migration watch {id}");
                    return Err(unknown(&info));
                }
                interrupted = true;
                eprintln!("Aborting; press Ctrl-C again to leave it alone.");
                let abort = client.clone();
                tokio::spawn(async move {
                    let path = format!("/v1/migrations/{id}/abort");
                    match abort.post::<AbortAnswer>(&path, &()).await {
                        Ok(answer) => eprintln!("{}", abort_text(&answer)),
                        Err(error) => drop(Failure::from(error).tell(false)),
                    }
                });
            }
        }
    }
    progress.show(&info, json);
    progress.clear();
    ended(&info, json)
}

/// An abort's answer in words.
pub(crate) fn abort_text(answer: &AbortAnswer) -> String {
    let text = match answer.outcome {
        AbortOutcome::RunningOnSource => "Aborted. The VM runs on the source.",
        AbortOutcome::TooLateCommitted => "Too late. The VM runs on the destination.",
        AbortOutcome::InDoubt => {
            "Too late. Whether the VM runs on the destination is not known yet."
        }
    };
    match &answer.hint {
        Some(hint) => format!("{text} {hint}"),
        None => text.to_owned(),
    }
}

fn vanished(info: &MigrationInfo, problem: &std::io::Error) -> Failure {
    Failure::new(ErrorKind::InDoubt, "the agent does not answer any more; how the migration goes on is not known")
        .cause(problem)
        .hint(format!(
            "the VM is safe: a restarted agent goes on from its journal; then `palanquin migration show {}`",
            info.id
        ))
}

fn unknown(info: &MigrationInfo) -> Failure {
    Failure::new(
        ErrorKind::InDoubt,
        "the end of the migration is not known yet",
    )
    .hint(format!(
        "`palanquin migration watch {}` follows it",
        info.id
    ))
}

/// Tells how a migration ended, and fails unless it completed.
pub(crate) fn ended(info: &MigrationInfo, json: bool) -> Result<(), Failure> {
    if json {
        render::say_line(&to_json(info));
    }
    match info.outcome {
        Some(Outcome::Completed) => {
            if !json {
                render::say(&render::summary(info));
                if let Some(reason) = &info.reason {
                    eprintln!("warning: {reason}");
                }
            }
            Ok(())
        }
        Some(Outcome::InDoubt) | None => Err(unknown(info)),
        Some(outcome) => {
            let mut failure = info.error.clone().map_or_else(
                || Failure::new(ErrorKind::Aborted, info.reason.clone().unwrap_or_default()),
                Failure::from,
            );
            let what = match outcome {
                Outcome::RunningOnSource => {
                    format!("VM {} was not moved: it goes on on {}", info.vm, info.from)
                }
                _ => format!("VM {} has ended on {}", info.vm, info.from),
            };
            let why = std::mem::replace(&mut failure.0.message, what);
            failure.0.causes.insert(0, why);
            Err(failure)
        }
    }
}

/// As one line of JSON.
pub(crate) fn to_json(value: &impl serde::Serialize) -> String {
    // These types always serialize.
    serde_json::to_string(value).unwrap_or_default()
}
