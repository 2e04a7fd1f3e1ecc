//! `palanquin migration abort` at every step of the protocol, on either side: it answers exactly one of three outcomes,
//! and what it answers is true.
#![forbid(unsafe_code)]

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use palanquin_api::control::{AbortOutcome, Side};
use palanquin_lab::matrix::{Chain, POST_COPY, PRE_COPY, Place, Selection, Step};

#[test]
fn an_abort_at_any_step_of_pre_copy_answers_the_truth() -> Result<()> {
    let mut aborts = Aborts::new("pre-copy")?;
    aborts.at_every_step(PRE_COPY, &[])?;
    // Where the destination cannot be asked, nothing but the records decides.
    let cut = [
        ("source-round", Some(AbortOutcome::RunningOnSource)),
        ("source-recorded-Committed", Some(AbortOutcome::InDoubt)),
        // The destination's answer may have crossed the link before it was cut.
        ("source-sent-Commit", None),
    ];
    for (point, expected) in cut {
        let step = step(PRE_COPY, point)?;
        let answer = aborts.abort(step, Side::Source, true)?;
        let answer = answer.map(|(outcome, _)| outcome);
        aborts.check(
            step,
            expected.is_none() || answer.is_none() || answer == expected,
        );
    }
    aborts.end()
}

#[test]
fn an_abort_at_any_step_of_post_copy_answers_the_truth() -> Result<()> {
    let mut aborts = Aborts::new("post-copy")?;
    // Up to the commit it is as under pre-copy.
    let same = POST_COPY
        .iter()
        .take_while(|step| step.point != "source-received-Ready");
    let same: Vec<&str> = same.map(|step| step.point).collect();
    aborts.at_every_step(POST_COPY, &same)?;
    aborts.end()
}

fn step(steps: &'static [Step], point: &str) -> Result<&'static Step> {
    let mut steps = steps.iter();
    steps
        .find(|step| step.point == point)
        .with_context(|| format!("no step {point}"))
}

struct Aborts {
    strategy: &'static str,
    selection: Selection,
    chain: Option<Chain>,
    failed: Vec<String>,
}

impl Aborts {
    fn new(strategy: &'static str) -> Result<Self> {
        let selection = std::env::var("PALANQUIN_MATRIX").unwrap_or_default();
        Ok(Self {
            strategy,
            selection: Selection::parse(&selection)?,
            chain: None,
            failed: Vec::new(),
        })
    }

    /// Asks the side that stands at the step; in the full matrix also the other one, where it knows of the migration.
    /// Continuous integration passes over `not_chosen`.
    fn at_every_step(&mut self, steps: &'static [Step], not_chosen: &[&str]) -> Result<()> {
        let known = steps
            .iter()
            .position(|step| step.point == "destination-received-Offer");
        let known = known.context("no step at which the destination knows")?;
        let mut number = 0;
        for (index, step) in steps.iter().enumerate() {
            for asked in [Side::Source, Side::Destination] {
                if asked == Side::Destination && index < known {
                    continue;
                }
                let chosen = asked == step.side && !not_chosen.contains(&step.point);
                if self.selection.has(number, chosen) {
                    self.abort(step, asked, false)?;
                }
                number += 1;
            }
        }
        Ok(())
    }

    /// The answer and where the VM lives; nothing where that failed, which is noted.
    fn abort(
        &mut self,
        step: &Step,
        asked: Side,
        cut: bool,
    ) -> Result<Option<(AbortOutcome, Place)>> {
        let began = Instant::now();
        let mut chain = match self.chain.take() {
            Some(chain) => chain,
            None => Chain::new(self.strategy)?,
        };
        let (strategy, point) = (self.strategy, step.point);
        let what = format!(
            "{strategy:9} {point:32} {asked:?} asked{}",
            if cut { ", link cut" } else { "" }
        );
        match chain.abort(step, asked, cut) {
            Ok((outcome, place)) => {
                let seconds = began.elapsed().as_secs_f64();
                println!("{what}: {outcome:?}, lives at {place:?}, {seconds:.1} s");
                self.chain = Some(chain);
                Ok(Some((outcome, place)))
            }
            Err(error) => {
                println!("{what}: FAILED: {error:#}");
                self.failed.push(what);
                Ok(None)
            }
        }
    }

    fn check(&mut self, step: &Step, holds: bool) {
        if !holds {
            self.failed
                .push(format!("{}: another answer was expected", step.point));
        }
    }

    fn end(mut self) -> Result<()> {
        if let Some(mut chain) = self.chain.take() {
            chain.round_trip()?;
        }
        ensure!(self.failed.is_empty(), "these failed: {:#?}", self.failed);
        Ok(())
    }
}
