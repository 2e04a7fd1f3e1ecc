//! `palanquin migrate` and `palanquin migration watch`: start, follow, and say how it ended.

mod progress;

use std::time::Duration;

use palanquin_api::control::{
    AbortAnswer, AbortOutcome, ErrorKind, MigrationInfo, Outcome, Phase, StartMigration,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use uuid::Uuid;

use crate::client::{Client, RequestError};
use crate::failure::Failure;
use crate::output::{line, note, say, say_line, to_json};
use crate::render;
use progress::Progress;

/// How long `migrate` stays with a migration in doubt before it leaves it to the agent, which goes on asking for ever.
/// Most doubts end within seconds, when an agent has been restarted or the network is back.
const DOUBT_PATIENCE: Duration = Duration::from_secs(60);

/// Starts a migration and, unless it shall be left alone, follows it to its end.
pub(crate) async fn migrate(
    client: &Client,
    request: &StartMigration,
    detach: bool,
    json: bool,
) -> Result<(), Failure> {
    let mut interrupts = interrupts()?;
    let mut abort_at_once = false;
    let started = client.post::<MigrationInfo>("/v1/migrations", request);
    tokio::pin!(started);
    let answer = loop {
        tokio::select! {
            answer = &mut started => break answer,
            _ = interrupts.recv() => {
                if abort_at_once {
                    let what = "whether the migration has started is not known";
                    let hint = "`palanquin migration ls` lists the migrations of this host";
                    return Err(Failure::new(ErrorKind::InDoubt, what).hint(hint));
                }
                abort_at_once = true;
                note_unless(json, "Aborting once it has started; press Ctrl-C again to leave it alone.");
            }
        }
    };
    let info = answer.map_err(|error| {
        error.leaves_in_doubt(
            "whether the migration has started is not known",
            "`palanquin migration ls` tells, once the agent is back",
        )
    })?;
    if detach && !abort_at_once {
        return if json {
            say_line(&to_json(&info))
        } else {
            let id = info.id;
            say_line(&format!(
                "Started. Follow it with: palanquin migration watch {id}"
            ))
        };
    }
    let mut follower = Follower::new(client, info, json, interrupts);
    follower.patience = Some(DOUBT_PATIENCE);
    follower.may_abort = true;
    if abort_at_once {
        follower.abort();
    }
    follower.follow().await
}

/// Follows a migration to its end. Ctrl-C leaves it alone.
pub(crate) async fn watch(client: &Client, info: MigrationInfo, json: bool) -> Result<(), Failure> {
    let interrupts = interrupts()?;
    Follower::new(client, info, json, interrupts).follow().await
}

fn interrupts() -> Result<Signal, Failure> {
    signal(SignalKind::interrupt())
        .map_err(|error| Failure::new(ErrorKind::Internal, "no signals").cause(error))
}

fn note_unless(json: bool, text: &str) {
    if !json {
        note(text);
    }
}

type Abort = JoinHandle<Result<AbortAnswer, RequestError>>;

/// Follows one migration.
struct Follower<'a> {
    client: &'a Client,
    info: MigrationInfo,
    json: bool,
    progress: Progress,
    interrupts: Signal,
    /// Whether the first Ctrl-C asks the agent to abort.
    may_abort: bool,
    /// The abort that was asked for and not answered yet.
    abort: Option<Abort>,
    /// Longest time in doubt; none is for ever.
    patience: Option<Duration>,
    doubt_since: Option<Instant>,
}

impl<'a> Follower<'a> {
    fn new(client: &'a Client, info: MigrationInfo, json: bool, interrupts: Signal) -> Self {
        Self {
            client,
            info,
            json,
            progress: Progress::new(json),
            interrupts,
            may_abort: false,
            abort: None,
            patience: None,
            doubt_since: None,
        }
    }

    async fn follow(mut self) -> Result<(), Failure> {
        let ending = self.wait_for_the_end().await;
        self.progress.show(&self.info);
        self.progress.clear();
        if let Some(abort) = self.abort.take() {
            // Whoever asked for an abort is told what came of it, also when the migration ended first.
            tell_abort(abort.await, self.json);
        }
        match ending {
            Ok(()) => ended(&self.info, self.json),
            Err(failure) => {
                // What was last known, so that a script has at least the identity.
                if self.json {
                    say_line(&to_json(&self.info))?;
                }
                Err(failure)
            }
        }
    }

    /// Returns when the migration is done or in doubt for too long; fails when its end cannot be learnt.
    async fn wait_for_the_end(&mut self) -> Result<(), Failure> {
        let id = self.info.id;
        while self.info.phase != Phase::Done {
            self.progress.show(&self.info);
            let give_up = self.give_up_at();
            let path = format!("/v1/migrations/{id}/watch?after={}", self.info.revision);
            tokio::select! {
                news = self.client.get::<MigrationInfo>(&path) => {
                    self.info = news.map_err(|error| vanished(id, error))?;
                }
                answer = answered(&mut self.abort) => {
                    self.abort = None;
                    self.progress.clear();
                    if tell_abort(answer, self.json) == Some(AbortOutcome::InDoubt) {
                        return Ok(());
                    }
                }
                () = elapsed(give_up) => return Ok(()),
                _ = self.interrupts.recv() => {
                    self.progress.clear();
                    if !self.may_abort {
                        // The answer to an abort would come too late to be of use.
                        self.abort = None;
                        return Err(left_alone(id));
                    }
                    note_unless(self.json, "Aborting; press Ctrl-C again to leave it alone.");
                    self.abort();
                }
            }
        }
        Ok(())
    }

    /// Asks the agent to abort, once.
    fn abort(&mut self) {
        let client = self.client.clone();
        let path = format!("/v1/migrations/{}/abort", self.info.id);
        self.may_abort = false;
        self.abort = Some(tokio::spawn(async move { client.post(&path, &()).await }));
    }

    fn give_up_at(&mut self) -> Option<Instant> {
        if self.info.phase == Phase::InDoubt {
            let since = *self.doubt_since.get_or_insert_with(Instant::now);
            self.patience.map(|patience| since + patience)
        } else {
            self.doubt_since = None;
            None
        }
    }
}

/// The answer to an abort; never, where none was asked for.
async fn answered(
    abort: &mut Option<Abort>,
) -> Result<Result<AbortAnswer, RequestError>, tokio::task::JoinError> {
    match abort {
        Some(abort) => abort.await,
        None => std::future::pending().await,
    }
}

async fn elapsed(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn tell_abort(
    answer: Result<Result<AbortAnswer, RequestError>, tokio::task::JoinError>,
    json: bool,
) -> Option<AbortOutcome> {
    match answer {
        Ok(Ok(answer)) => {
            note_unless(json, &render::abort(&answer));
            Some(answer.outcome)
        }
        Ok(Err(error)) => {
            if !json {
                Failure::from(error).show(false);
            }
            None
        }
        Err(_) => None,
    }
}

/// Fails where `migration abort` could not do what was asked: the VM is not, or not certainly, on the source.
pub(crate) fn judge_abort(answer: &AbortAnswer) -> Result<(), Failure> {
    match answer.outcome {
        AbortOutcome::InDoubt => Err(Failure::new(
            ErrorKind::InDoubt,
            "the migration had committed, and the destination has not answered yet",
        )),
        _ => Ok(()),
    }
}

fn vanished(id: Uuid, error: RequestError) -> Failure {
    let failure = Failure::from(error);
    let what = "the agent does not answer any more; how the migration goes on is not known";
    let unknown = Failure::new(ErrorKind::InDoubt, what).cause(failure.0.message);
    let unknown = failure.0.causes.iter().fold(unknown, Failure::cause);
    unknown.hint(format!(
        "the VM is safe, and a restarted agent goes on from its journal: then `palanquin migration show {id}`"
    ))
}

fn left_alone(id: Uuid) -> Failure {
    let what = "the migration was left alone, and its end is not known yet";
    Failure::new(ErrorKind::InDoubt, what)
        .hint(format!("`palanquin migration watch {id}` follows it"))
}

fn unknown(info: &MigrationInfo) -> Failure {
    let what = format!(
        "whether VM {} runs on {} is not known yet; it is held on {} until that is known",
        info.vm, info.to, info.from
    );
    let failure = Failure::new(ErrorKind::InDoubt, what);
    let failure = info.reason.iter().fold(failure, Failure::cause);
    failure.hint(format!(
        "the agent keeps asking: `palanquin migration watch {}`",
        info.id
    ))
}

/// Tells how a migration ended, and fails unless it completed.
pub(crate) fn ended(info: &MigrationInfo, json: bool) -> Result<(), Failure> {
    if json {
        say_line(&to_json(info))?;
    }
    let kind = match info.outcome {
        Some(Outcome::Completed) => {
            if !json {
                say(&render::summary(info))?;
                if let Some(reason) = &info.reason {
                    note(&format!("warning: {}", line(reason)));
                }
            }
            return Ok(());
        }
        Some(Outcome::RunningOnSource) => ErrorKind::Aborted,
        Some(Outcome::VmEnded) => ErrorKind::Internal,
        _ => return Err(unknown(info)),
    };
    let mut failure = info.error.clone().map_or_else(
        || {
            let reason = info.reason.clone();
            Failure::new(
                kind,
                reason.unwrap_or_else(|| "no reason was given".to_owned()),
            )
        },
        Failure::from,
    );
    let what = if kind == ErrorKind::Aborted {
        format!("VM {} was not moved: it goes on on {}", info.vm, info.from)
    } else {
        format!("VM {} has ended on {}", info.vm, info.from)
    };
    let why = std::mem::replace(&mut failure.0.message, what);
    failure.0.causes.insert(0, why);
    Err(failure)
}
