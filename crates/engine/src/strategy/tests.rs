use super::*;
use crate::pages::RamLayout;

const SECOND: Duration = Duration::from_secs(1);
/// 1 GiB.
const PAGES: u64 = 1 << 18;

/// A guest that writes the same pages all the time, over a path that moves 100 MiB a second.
struct Model {
    scheduler: Scheduler,
    predictor: Predictor,
    left: PageSet,
    hot: PageSet,
    /// The hot page that is written next.
    sweep: u64,
    rounds: u32,
    elapsed: Duration,
    sent_pages: u64,
    sent_bytes: u64,
    share: f64,
    shares: Vec<f64>,
}

fn limits() -> Limits {
    Limits {
        deadline: Duration::from_secs(120),
        ..Limits::default()
    }
}

fn pages(count: u64) -> PageSet {
    let mut set = PageSet::empty(&RamLayout::new(vec![PAGES]).unwrap());
    set.insert(0, 0..count);
    set
}

impl Model {
    fn new(strategy: Strategy, limits: Limits, hot_pages: u64) -> Self {
        let mut scheduler = Scheduler::new(strategy, limits);
        scheduler.post_copy_ready(scheduler.post_copy_use() != PostCopyUse::No);
        Self {
            scheduler,
            predictor: Predictor::default(),
            left: pages(PAGES),
            hot: pages(hot_pages),
            sweep: 0,
            rounds: 0,
            elapsed: Duration::ZERO,
            sent_pages: 0,
            sent_bytes: 0,
            share: 1.0,
            shares: Vec::new(),
        }
    }

    /// Plays until the rounds end; `None` if the deadline comes first.
    fn play(&mut self, deadline: Duration) -> Option<Decision> {
        let mut written = self.left.clone();
        while self.elapsed < deadline {
            let decision = self.scheduler.decide(&Boundary {
                rounds: self.rounds,
                written: &written,
                left: &self.left,
                sent_bytes: self.sent_bytes,
                elapsed: self.elapsed,
                predictor: &self.predictor,
            });
            let postponed = match decision.next {
                Next::Round { postponed } => postponed,
                Next::Throttle { share, postponed } => {
                    self.share = share;
                    self.shares.push(share);
                    postponed
                }
                _ => return Some(decision),
            };
            let mut sends = self.left.clone();
            sends.subtract(&postponed);
            let time = Duration::from_secs_f64(sends.bytes() as f64 / f64::from(100 << 20))
                .max(Duration::from_millis(100));
            self.elapsed += time;
            self.sent_pages += sends.len();
            self.sent_bytes = sends.bytes();
            self.left.intersect(&postponed);
            // All hot pages are written within a second where the guest runs at full speed.
            let hot = self.hot.len();
            let count = hot as f64 * (time.as_secs_f64() * self.share).min(1.0);
            let end = self.sweep + count as u64;
            written = pages(0);
            written.insert(0, self.sweep..end.min(hot));
            written.insert(0, 0..end.saturating_sub(hot));
            self.sweep = end % hot.max(1);
            self.left.union(&written);
            self.rounds += u32::from(!sends.is_empty());
            self.predictor.round(sends.bytes(), time, written.len());
        }
        None
    }
}

#[test]
fn an_idle_vm_is_switched_over_after_one_round_whatever_the_strategy() {
    for strategy in [
        Strategy::PreCopy,
        Strategy::Improved,
        Strategy::Hybrid,
        Strategy::Auto,
    ] {
        let mut model = Model::new(strategy, limits(), 10);
        let decision = model.play(limits().deadline).unwrap();
        assert_eq!(
            (decision.next, model.rounds),
            (Next::Switchover, 1),
            "{strategy:?}"
        );
    }
}

#[test]
fn stop_and_copy_and_post_copy_have_no_rounds() {
    let mut model = Model::new(Strategy::StopAndCopy, limits(), 10);
    assert_eq!(model.play(SECOND).unwrap().next, Next::Switchover);
    let mut model = Model::new(Strategy::PostCopy, limits(), 10);
    assert_eq!(model.play(SECOND).unwrap().next, Next::PostCopy);
    assert_eq!(model.rounds, 0);
}

#[test]
fn pre_copy_of_a_hot_vm_never_switches_over_by_itself() {
    let mut model = Model::new(Strategy::PreCopy, limits(), PAGES / 4);
    assert_eq!(model.play(limits().deadline), None);
}

#[test]
fn improved_pre_copy_ends_within_five_rounds_and_does_not_resend_what_is_hot() {
    let (mut patient, hot) = (limits(), PAGES / 4);
    patient.max_downtime = Duration::from_secs(4);
    let mut improved = Model::new(Strategy::Improved, patient, hot);
    let decision = improved.play(limits().deadline).unwrap();
    assert_eq!(decision.next, Next::Switchover);
    assert!(improved.rounds < 5);

    let mut hurried = Model::new(Strategy::Improved, limits(), hot);
    let decision = hurried.play(limits().deadline).unwrap();
    assert_eq!(decision.next, Next::NotConverging);
    assert!(hurried.rounds < 5);
    assert!(hurried.sent_pages <= PAGES + hot, "{}", hurried.sent_pages);
}

#[test]
fn hybrid_leaves_what_is_hot_for_after_the_switchover() {
    let mut model = Model::new(Strategy::Hybrid, limits(), PAGES / 4);
    let decision = model.play(limits().deadline).unwrap();
    assert_eq!(decision.next, Next::PostCopy);
    assert!((2..=3).contains(&model.rounds));
    assert_eq!(model.left.len(), PAGES / 4);
}

#[test]
fn auto_does_nothing_to_the_vm_that_was_not_allowed() {
    let mut model = Model::new(Strategy::Auto, limits(), PAGES / 4);
    assert_eq!(model.play(limits().deadline), None);
    assert!(model.shares.is_empty());
    // What waits for the last round is not sent again and again.
    assert!(model.sent_pages < PAGES + PAGES, "{}", model.sent_pages);
}

#[test]
fn auto_converges_where_the_path_is_faster_than_the_guest() {
    let mut model = Model::new(Strategy::Auto, limits(), PAGES / 4);
    model.share = 0.2;
    assert_eq!(
        model.play(limits().deadline).unwrap().next,
        Next::Switchover
    );
}

#[test]
fn auto_uses_post_copy_where_allowed_once_rounds_do_not_help() {
    let mut allowing = limits();
    allowing.allowed.post_copy = true;
    let mut model = Model::new(Strategy::Auto, allowing, PAGES / 4);
    let decision = model.play(limits().deadline).unwrap();
    assert_eq!(decision.next, Next::PostCopy);
    assert!(decision.why.contains("allowed"));
    assert!(model.elapsed < limits().deadline);
}

#[test]
fn auto_does_not_use_post_copy_where_the_destination_cannot() {
    let mut allowing = limits();
    allowing.allowed.post_copy = true;
    let mut model = Model::new(Strategy::Auto, allowing, PAGES / 4);
    model.scheduler.post_copy_ready(false);
    assert_eq!(model.play(limits().deadline), None);
}

#[test]
fn auto_throttles_in_steps_where_allowed_and_then_switches_over() {
    let mut allowing = limits();
    allowing.allowed.throttle = true;
    allowing.max_downtime = Duration::from_millis(1000);
    let mut model = Model::new(Strategy::Auto, allowing, PAGES / 4);
    let decision = model.play(limits().deadline).unwrap();
    assert_eq!(decision.next, Next::Switchover);
    assert!(!model.shares.is_empty());
    assert!(
        model.shares.is_sorted_by(|a, b| a > b),
        "{:?}",
        model.shares
    );
}

#[test]
fn a_throttle_that_does_not_work_is_not_tried_again() {
    let mut allowing = limits();
    allowing.allowed.throttle = true;
    let mut model = Model::new(Strategy::Auto, allowing, PAGES / 4);
    model.scheduler.throttle_failed();
    assert_eq!(model.play(limits().deadline), None);
    assert!(model.shares.is_empty());
}

#[test]
fn the_names_are_those_that_are_typed() {
    for strategy in Strategy::ALL {
        assert_eq!(Strategy::from_name(strategy.name()), Some(strategy));
    }
    assert_eq!(Strategy::from_name("best"), None);
}
