//! Which migrations somebody ordered: from a file that is read again as it changes, and from agents' sockets.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use palanquin_api::control::{MigrationInfo, Outcome, Phase};
use palanquin_watch::{Ledger, RECORDS_MAX, Record, RecordError};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use uuid::Uuid;

use super::RECORDS_FILE_MAX;
use crate::client::Client;
use crate::failure::Failure;
use crate::files::read_text;

/// How often agents are asked.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for an agent's answer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// A migration that began and ended between two answers happened then; if they are further apart, in seconds, it is not
/// known when, and it explains nothing.
const UNSEEN_S_MAX: f64 = 60.0;

/// The file of what was ordered.
pub(super) struct Records {
    path: PathBuf,
    changed: Option<(SystemTime, u64)>,
    told: Option<String>,
}

impl Records {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            changed: None,
            told: None,
        }
    }

    /// Adds what is new in the file; nothing is forgotten. What is wrong with it, if that is news.
    pub(super) fn look(&mut self, ledger: &mut Ledger) -> Option<String> {
        let changed = fs::metadata(&self.path)
            .and_then(|of| Ok((of.modified()?, of.len())))
            .ok();
        if changed.is_some() && changed == self.changed {
            return None;
        }
        self.changed = changed;
        let mut problem = None;
        match read_records(&self.path) {
            Ok(list) => {
                for record in list {
                    match ledger.add(record) {
                        // It is still in the file.
                        Ok(()) | Err(RecordError::Replayed(_) | RecordError::Expired(_)) => {}
                        Err(error) => problem = Some(error.to_string()),
                    }
                }
            }
            Err(why) => problem = Some(why),
        }
        let is_news = problem != self.told;
        self.told.clone_from(&problem);
        let problem = problem.filter(|_| is_news)?;
        Some(format!("records of {}: {problem}", self.path.display()))
    }
}

fn read_records(path: &Path) -> Result<Vec<Record>, String> {
    let text = read_text(path, RECORDS_FILE_MAX).map_err(told)?;
    serde_json::from_str(&text).map_err(|error| error.to_string())
}

fn told(failure: Failure) -> String {
    let mut words = vec![failure.0.message];
    words.extend(failure.0.causes);
    words.join(": ")
}

/// What an agent has answered.
pub(super) struct Answer {
    agent: usize,
    migrations: Result<Vec<MigrationInfo>, String>,
}

/// Asks the agents behind these sockets, each by itself, until nobody takes the answers any more.
pub(super) fn ask(sockets: &[PathBuf]) -> mpsc::Receiver<Answer> {
    let (sender, answers) = mpsc::channel(sockets.len().max(1));
    for (agent, socket) in sockets.iter().enumerate() {
        let (client, sender) = (Client::new(socket), sender.clone());
        tokio::spawn(async move {
            let mut every = interval(ASK_EVERY);
            every.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                every.tick().await;
                let asked = timeout(ANSWER_WAIT, client.get("/v1/migrations")).await;
                let migrations = match asked {
                    Ok(answer) => answer.map_err(|error| told(error.into())),
                    Err(_) => Err(format!("no answer within {ANSWER_WAIT:?}")),
                };
                if sender.send(Answer { agent, migrations }).await.is_err() {
                    return;
                }
            }
        });
    }
    answers
}

/// Migrations that moved nothing in the end: that nothing was noticed of them is no news.
#[derive(Default)]
pub(super) struct EndedHere {
    names: BTreeSet<String>,
    /// The oldest first, also of what was taken meanwhile.
    order: VecDeque<String>,
}

impl EndedHere {
    /// Adds one. The oldest makes room: a ledger holds no more records, so it is explained or over by then.
    fn add(&mut self, name: &str) {
        if !self.names.insert(name.to_owned()) {
            return;
        }
        self.order.push_back(name.to_owned());
        while self.order.len() > RECORDS_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.names.remove(&oldest);
            }
        }
    }

    /// Whether it is one; it is asked for once.
    pub(super) fn take(&mut self, name: &str) -> bool {
        self.names.remove(name)
    }
}

/// What is known of agents' migrations.
pub(super) struct Agents {
    agents: Vec<Agent>,
    pub(super) ended_here: EndedHere,
}

#[derive(Default)]
struct Agent {
    socket: PathBuf,
    /// Migrations that it has told of, and whether they are over.
    known: BTreeMap<Uuid, bool>,
    /// When it has answered last.
    answered_s: Option<f64>,
    told: Option<String>,
}

impl Agents {
    pub(super) fn new(sockets: &[PathBuf]) -> Self {
        let agent = |socket: &PathBuf| Agent {
            socket: socket.clone(),
            ..Agent::default()
        };
        Self {
            agents: sockets.iter().map(agent).collect(),
            ended_here: EndedHere::default(),
        }
    }

    /// Takes an answer at that time; what is wrong, if that is news. Only migrations of watched VMs are looked at.
    pub(super) fn take(
        &mut self,
        answer: Answer,
        now_s: f64,
        ledger: &mut Ledger,
        is_watched: impl Fn(&str) -> bool,
    ) -> Option<String> {
        let agent = self.agents.get_mut(answer.agent)?;
        let problem = match answer.migrations {
            Ok(mut migrations) => {
                migrations.retain(|info| is_watched(&info.vm));
                let problem = agent.list(&migrations, now_s, ledger, &mut self.ended_here);
                agent.answered_s = Some(now_s);
                problem
            }
            Err(why) => Some(why),
        };
        let is_news = problem != agent.told;
        agent.told.clone_from(&problem);
        let problem = problem.filter(|_| is_news)?;
        Some(format!("agent at {}: {problem}", agent.socket.display()))
    }
}

impl Agent {
    fn list(
        &mut self,
        migrations: &[MigrationInfo],
        now_s: f64,
        ledger: &mut Ledger,
        ended_here: &mut EndedHere,
    ) -> Option<String> {
        let mut problem = None;
        let before = std::mem::take(&mut self.known);
        for info in migrations {
            let is_over = info.phase == Phase::Done;
            self.known.insert(info.id, is_over);
            let from_s = match (before.get(&info.id), is_over, self.answered_s) {
                (Some(true), ..) => continue,
                // It ended before we began, nobody says when.
                (None, true, None) => continue,
                (None, true, Some(answered_s)) if now_s - answered_s > UNSEEN_S_MAX => {
                    problem = Some(format!(
                        "migration {} happened while the agent did not answer: it is not known when, so it explains nothing",
                        info.id
                    ));
                    continue;
                }
                (None, true, Some(answered_s)) => answered_s,
                // When it began is known from the first time on.
                _ => now_s - info.total_time_ms.max(0.0) / 1e3,
            };
            let record = Record {
                id: info.id.to_string(),
                vm: info.vm.clone(),
                source: info.from.clone(),
                destination: info.to.clone(),
                from_s,
                to_s: now_s,
            };
            if is_over && info.outcome != Some(Outcome::Completed) {
                ended_here.add(&record.id);
            }
            match ledger.follow(record) {
                Ok(()) | Err(RecordError::Expired(_)) => {}
                Err(error) => problem = Some(error.to_string()),
            }
        }
        problem
    }
}

#[cfg(test)]
mod tests {
    use palanquin_watch::{Class, Finding, Level, Stage, Verdict};
    use serde_json::json;

    use super::*;

    fn finding(onset_s: f64, break_s: f64) -> Finding {
        Finding {
            target: "web".to_owned(),
            episode: 1,
            time_s: break_s,
            onset_s,
            break_s: Some(break_s),
            ended_s: None,
            level: Level::Alarm,
            class: Class::Migration,
            likelihood: 0.9,
            stage: Stage::Full,
            score: 3.0,
            evidence: Vec::new(),
            hosts: Vec::new(),
        }
    }

    fn info(phase: &str, outcome: Option<&str>, total_time_ms: f64) -> MigrationInfo {
        let value = json!({
            "id": "11111111-2222-4333-8444-555555555555", "vm": "web",
            "vm_uuid": "11111111-2222-4333-8444-666666666666", "from": "alpha", "to": "beta", "side": "source",
            "phase": phase, "outcome": outcome, "reason": null, "error": null, "strategy": "auto", "rounds": 1,
            "total_time_ms": total_time_ms, "downtime_ms": 0.0,
            "downtime": {"pause_ms": 0.0, "final_pages_ms": 0.0, "device_state_ms": 0.0, "commit_ms": 0.0, "resume_ms": 0.0},
            "predicted_downtime_ms": null, "bytes_on_wire": 0, "bytes_guest": 0, "bytes_remaining": 0,
            "rate_bytes_per_s": 0, "dirty_rate_bytes_per_s": 0, "percent": 0.0, "pages_sent": 0, "pages_zero": 0,
            "pages_resent": 0, "ram_bytes": 0, "streams": 1, "cipher": null, "key_exchange": null, "memory_root": null,
            "verified": false, "epoch": 2, "revision": 1,
        });
        serde_json::from_value(value).unwrap()
    }

    struct Told {
        agents: Agents,
        ledger: Ledger,
    }

    fn told() -> Told {
        Told {
            agents: Agents::new(&[PathBuf::from("/a")]),
            ledger: Ledger::new(),
        }
    }

    impl Told {
        fn at(
            &mut self,
            now_s: f64,
            migrations: Result<Vec<MigrationInfo>, String>,
        ) -> Option<String> {
            let agent = 0;
            let answer = Answer { agent, migrations };
            let is_watched = |vm: &str| vm == "web";
            self.agents
                .take(answer, now_s, &mut self.ledger, is_watched)
        }

        fn is_explained(&mut self, onset_s: f64, break_s: f64) -> bool {
            let verdict = self.ledger.judge(finding(onset_s, break_s)).verdict;
            matches!(verdict, Verdict::Authorised { .. })
        }
    }

    #[test]
    fn a_migration_explains_what_happens_while_it_goes_on_and_nothing_long_before_or_after() {
        let mut told = told();
        assert_eq!(told.at(1000.0, Ok(vec![])), None);
        assert_eq!(
            told.at(1010.0, Ok(vec![info("pre-copy", None, 5000.0)])),
            None
        );
        assert!(told.is_explained(1006.0, 1009.0));
        assert!(!told.is_explained(1006.0, 1050.0));
        told.at(1060.0, Ok(vec![info("post-copy", None, 55_000.0)]));
        assert!(told.is_explained(1006.0, 1050.0));
        told.at(1061.0, Ok(vec![info("done", Some("completed"), 55_500.0)]));
        // Once over it grows no more.
        told.at(1100.0, Ok(vec![info("done", Some("completed"), 55_500.0)]));
        assert!(!told.is_explained(1006.0, 1090.0));
        assert!(!told.is_explained(980.0, 1010.0));
        assert!(told.agents.ended_here.names.is_empty());
    }

    #[test]
    fn what_is_known_of_migrations_that_ended_where_they_began_is_bounded() {
        let mut ended = EndedHere::default();
        for number in 0..3 * RECORDS_MAX {
            ended.add(&number.to_string());
            ended.add(&number.to_string());
        }
        assert_eq!(
            (ended.names.len(), ended.order.len()),
            (RECORDS_MAX, RECORDS_MAX)
        );
        assert!(!ended.take("0"), "the oldest are forgotten");
        let last = (3 * RECORDS_MAX - 1).to_string();
        assert!(ended.take(&last) && !ended.take(&last));
    }

    #[test]
    fn one_between_two_answers_counts_and_one_of_unknown_time_does_not() {
        let over = || Ok(vec![info("done", Some("running_on_source"), 300.0)]);
        let mut first = told();
        // It was over when we came.
        assert_eq!(first.at(1000.0, over()), None);
        assert!(!first.is_explained(999.0, 999.5));
        let mut between = told();
        between.at(1000.0, Ok(vec![]));
        assert_eq!(between.at(1001.0, over()), None);
        assert!(between.is_explained(1000.2, 1000.5));
        assert_eq!(between.agents.ended_here.names.len(), 1);
        let mut away = told();
        away.at(1000.0, Ok(vec![]));
        let why = away.at(1030.0, Err("gone".to_owned()));
        assert_eq!(why, Some("agent at /a: gone".to_owned()));
        assert_eq!(away.at(1031.0, Err("gone".to_owned())), None);
        assert!(
            away.at(2000.0, over())
                .unwrap()
                .contains("explains nothing")
        );
        assert!(!away.is_explained(1500.0, 1501.0));
    }
}
