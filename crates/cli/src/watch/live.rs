//! `palanquin watch run`: the prober tells, the detector judges, page and terminal show it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palanquin_host::probe::{self, Event, Prober};
use palanquin_watch::inside::Evidence;
use palanquin_watch::outside::Outside;
use palanquin_watch::{Joined, Ledger, Unconfirmed, Verdict};
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};

use super::board::{Board, Mood};
use super::both::{clock_text, ended};
use super::config::Config;
use super::ordered::{self, Agents, Answer, Records};
use super::probing::{Detector, TICK, ended_by_itself, reading, start, words};
use super::{finding_text, page, screen};
use crate::arguments::RunArgs;
use crate::failure::Failure;
use crate::output::{line, note, say_line, to_json};

/// How often the file of records is looked at.
const RECORDS_EVERY: Duration = Duration::from_secs(1);
/// Announcements of a target are told again after that, in microseconds: there are several of every arrival.
const ANNOUNCED_AGAIN_US: u64 = 10_000_000;

/// What is shown, shared with those who show it.
pub(crate) type Shared = Arc<Mutex<Board>>;

pub(crate) fn held(board: &Shared) -> MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does what was typed.
pub(crate) async fn run(arguments: &RunArgs, json: bool) -> Result<(), Failure> {
    let config = Config::load(&arguments.config)?;
    let detector = Detector::new(&config)?;
    let listener = match config.listen {
        Some(listen) => Some(page::bind(listen).await?),
        None => None,
    };
    let (prober, mut events) = start(&config)?;
    let prober = Arc::new(prober);
    let now_s = prober.clock().now_us() as f64 / 1e6;
    let board: Shared = Arc::new(Mutex::new(Board::new(&config.targets, now_s)));
    let page = page::Page::new(Arc::clone(&board), Arc::clone(&prober));
    if let Some(listener) = listener {
        if !json && !arguments.tui {
            let at = listener.local_addr().map(|at| at.to_string());
            let at = at.unwrap_or_default();
            note(&format!("the page is at http://{at}/"));
        }
        tokio::spawn(page::serve(listener, page.clone()));
    }
    let screen = if arguments.tui {
        Some(screen::Screen::open(Arc::clone(&board))?)
    } else {
        None
    };
    let mut answers = ordered::ask(&config.agents);
    let mut live = Live {
        ledger: Ledger::new(),
        records: config.records.clone().map(Records::new),
        agents: Agents::new(&config.agents),
        announced_us: vec![0; config.targets.len()],
        outside: config.targets.iter().map(|_| Outside::default()).collect(),
        config,
        detector,
        prober,
        board,
        page,
        began_s: now_s,
        json,
        is_silent: arguments.tui,
    };
    let hears = live.prober.hears();
    live.detector.watcher.listen(hears);
    live.begin()?;
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut look = interval(RECORDS_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ending = std::pin::pin!(ended());
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => live.take(&event)?,
                None => return Err(ended_by_itself()),
            },
            _ = tick.tick() => {
                live.advance()?;
                if let Some(screen) = &screen && screen.is_closed() {
                    break;
                }
            }
            _ = look.tick() => {
                live.read_records()?;
                live.look_at_cards()?;
            }
            Some(answer) = answers.recv() => live.answered(answer)?,
            () = &mut ending => break,
        }
    }
    live.detector.watcher.finish();
    live.take_findings()
}

struct Live {
    config: Config,
    detector: Detector,
    prober: Arc<Prober>,
    ledger: Ledger,
    records: Option<Records>,
    agents: Agents,
    board: Shared,
    page: page::Page,
    /// When announcements of each target were told last.
    announced_us: Vec<u64>,
    /// What each target looks like, and how fast it answers.
    outside: Vec<Outside>,
    began_s: f64,
    json: bool,
    is_silent: bool,
}

impl Live {
    /// What can't be done is shown as long as anything is.
    fn begin(&mut self) -> Result<(), Failure> {
        let without: Vec<String> = self
            .prober
            .without()
            .iter()
            .map(|error| format!("{error}; goes on without"))
            .collect();
        for problem in without {
            self.problem(&problem)?;
        }
        Ok(())
    }

    fn now_s(&self) -> f64 {
        self.prober.clock().now_us() as f64 / 1e6
    }

    fn problem(&self, text: &str) -> Result<(), Failure> {
        let value = || json!({"event": "problem", "text": text});
        self.tell(self.now_s(), None, Mood::Warn, text, value)
    }

    fn take(&mut self, event: &Event) -> Result<(), Failure> {
        held(&self.board).take(event);
        match event {
            Event::Seen {
                target,
                sent_us,
                reading: seen,
            } => {
                if !self.detector.observe(*target, *sent_us, reading(*seen)) {
                    held(&self.board).refused += 1;
                }
                if *seen == probe::Reading::Announced {
                    self.announced(*target, *sent_us)?;
                }
                let outside = self.outside.get_mut(*target);
                if let Some(sign) = outside.and_then(|of| of.read(reading(*seen))) {
                    self.sign(*target, &sign)?;
                }
                self.take_findings()
            }
            Event::Stalled { from_us, until_us } => {
                self.detector.watcher.stalled(*from_us, *until_us);
                let long_s = until_us.saturating_sub(*from_us) as f64 / 1e6;
                let text = format!(
                    "the watcher itself stalled for {long_s:.3} s: what it saw then is dropped"
                );
                self.tell(*until_us as f64 / 1e6, None, Mood::Calm, &text, || {
                    json!({"event": "stall", "from_s": *from_us as f64 / 1e6, "until_s": *until_us as f64 / 1e6})
                })
            }
            Event::Deaf { why } => {
                self.detector.watcher.listen(false);
                self.problem(&format!("announcements are not heard any more: {why}"))
            }
            Event::Hears => {
                self.detector.watcher.listen(true);
                let text = "announcements are heard again";
                let value = || json!({"event": "news", "text": text});
                self.tell(self.now_s(), None, Mood::Calm, text, value)
            }
            Event::News { target, news } => self.news(*target, &words(news)),
        }
    }

    fn news(&self, target: usize, text: &str) -> Result<(), Failure> {
        let Some(target) = self.config.targets.get(target) else {
            return Ok(());
        };
        let name = &target.name;
        let value = || json!({"event": "news", "target": name, "text": text});
        self.tell(self.now_s(), Some(name), Mood::Calm, text, value)
    }

    fn announced(&mut self, target: usize, at_us: u64) -> Result<(), Failure> {
        let Some(told_us) = self.announced_us.get_mut(target) else {
            return Ok(());
        };
        if at_us.saturating_sub(*told_us) < ANNOUNCED_AGAIN_US {
            return Ok(());
        }
        *told_us = at_us;
        self.news(target, "it announces itself on the network")
    }

    /// Something looks otherwise, or is faster or slower, than it was.
    fn sign(&self, target: usize, sign: &Evidence) -> Result<(), Failure> {
        let Some(target) = self.config.targets.get(target) else {
            return Ok(());
        };
        let name = &target.name;
        self.tell(self.now_s(), Some(name), Mood::Warn, &sign.text, || {
            let mut value = serde_json::to_value(sign).unwrap_or_default();
            (value["event"], value["target"]) = (json!("sign"), json!(name));
            value
        })
    }

    /// Who made the network cards of targets that are near.
    fn look_at_cards(&mut self) -> Result<(), Failure> {
        let known = probe::hardware_addresses();
        for at in 0..self.config.targets.len() {
            let mac = known.get(&self.config.targets[at].address);
            let sign = mac.and_then(|mac| self.outside.get_mut(at)?.looks.hardware_address(mac.0));
            if let Some(sign) = sign {
                self.sign(at, &sign)?;
            }
        }
        Ok(())
    }

    /// Says something that is no finding.
    fn tell(
        &self,
        time_s: f64,
        target: Option<&str>,
        mood: Mood,
        text: &str,
        value: impl FnOnce() -> Value,
    ) -> Result<(), Failure> {
        let happened = held(&self.board).happened(time_s, target, mood, text);
        self.page.send("happened", &happened);
        if self.is_silent {
            Ok(())
        } else if self.json {
            say_line(&to_json(&value()))
        } else {
            let name = target.map_or(String::new(), |name| format!("{}: ", line(name)));
            say_line(&format!("{}  {name}{}", clock_text(time_s), line(text)))
        }
    }

    fn advance(&mut self) -> Result<(), Failure> {
        self.detector.advance(&self.prober);
        self.take_findings()?;
        let now_s = self.now_s();
        self.confirm(now_s)?;
        let closed = held(&self.board).advance(now_s);
        self.page.seconds(&closed);
        Ok(())
    }

    fn take_findings(&mut self) -> Result<(), Failure> {
        while let Some(finding) = self.detector.watcher.poll() {
            self.confirm(finding.time_s)?;
            let joined = self.ledger.judge(finding);
            if joined.finding.ended_s.is_some()
                && matches!(joined.verdict, Verdict::Authorised { .. })
                && let Some(target) = self.detector.watcher.target(&joined.finding.target)
            {
                // It lives elsewhere now: other round trips are usual there.
                self.detector.watcher.relearn(target);
            }
            self.found(&joined)?;
        }
        Ok(())
    }

    fn found(&self, joined: &Joined) -> Result<(), Failure> {
        let time_s = joined.finding.time_s;
        let text = finding_text(joined);
        let happened = held(&self.board).found(joined, &text);
        self.page.send("happened", &happened);
        if self.is_silent {
            return Ok(());
        }
        if self.json {
            let mut value = serde_json::to_value(joined).unwrap_or_default();
            value["event"] = json!("finding");
            return say_line(&to_json(&value));
        }
        let name = line(&joined.finding.target);
        say_line(&format!("{}  {name}: {text}", clock_text(time_s)))
    }

    fn confirm(&mut self, now_s: f64) -> Result<(), Failure> {
        let (config, began_s) = (&self.config, self.began_s);
        let unconfirmed = self.ledger.advance(now_s, |record| {
            record.to_s >= began_s && config.targets.iter().any(|of| of.name == record.vm)
        });
        for Unconfirmed { record, watched } in unconfirmed {
            if self.agents.ended_here.take(&record.id) {
                // It ended where it was: there was nothing to be noticed.
                continue;
            }
            let why = if watched {
                "nothing was noticed"
            } else {
                "it was not watched then"
            };
            let text = format!("unconfirmed: {} moves it, and {why}", record.id);
            self.tell(
                now_s,
                Some(&record.vm),
                Mood::Calm,
                &text,
                || json!({"event": "unconfirmed", "record": record, "watched": watched}),
            )?;
        }
        Ok(())
    }

    fn read_records(&mut self) -> Result<(), Failure> {
        let Some(records) = &mut self.records else {
            return Ok(());
        };
        match records.look(&mut self.ledger) {
            Some(problem) => self.problem(&problem),
            None => Ok(()),
        }
    }

    fn answered(&mut self, answer: Answer) -> Result<(), Failure> {
        let now_s = self.now_s();
        let targets = &self.config.targets;
        let is_watched = |vm: &str| targets.iter().any(|target| target.name == vm);
        match self
            .agents
            .take(answer, now_s, &mut self.ledger, is_watched)
        {
            Some(problem) => self.problem(&problem),
            None => Ok(()),
        }
    }
}
