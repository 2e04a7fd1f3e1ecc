//! What both hosts show each other, and what the gates make of it.
//!
//! Evidence says to which challenge it was made and whether its host is as it should be. That it cannot be forged is
//! assumed here; that it is fresh, and asked for in time, is what is tried.

use palanquin_engine::ids::Challenge32;
use palanquin_engine::message::{Hello, WireBlocker};

use super::*;

/// In the source's greeting.
pub(super) const CHALLENGE: Challenge32 = Challenge32([1; 32]);
/// When the source begins to pause the VM.
pub(super) const LAST_CHALLENGE: Challenge32 = Challenge32([2; 32]);

/// What is true, and what was found out.
#[derive(Clone, Debug)]
pub(super) struct Trust {
    /// Whether the source is as it should be.
    source_sound: bool,
    /// The same of the destination: when it has the container, and when the VM is being paused.
    destination_sound: [bool; 2],
    /// The greeting that the destination has got, and on which connection.
    pub(super) greeted: Option<(u32, Hello)>,
    /// Whether the destination was found to be sound: before anything was sent, and before the commit.
    pub(super) judged: [bool; 2],
    /// The gates of the destination refused the newest offer.
    pub(super) refused: bool,
    /// The source gave up because a gate refused.
    pub(super) ended_it: bool,
}

impl Trust {
    pub(super) fn new(random: &mut Random) -> Self {
        let mut sound = || !random.one_in(48);
        let (source_sound, first) = (sound(), sound());
        Self {
            source_sound,
            // Somebody may alter a host that was checked.
            destination_sound: [first, first && sound()],
            greeted: None,
            judged: [false; 2],
            refused: false,
            ended_it: false,
        }
    }
}

/// What a host says about itself.
fn evidence(challenge: Challenge32, sound: bool) -> Vec<u8> {
    let mut evidence = challenge.0.to_vec();
    evidence.push(u8::from(sound));
    evidence
}

impl World {
    /// Of the destination on its newest connection.
    pub(super) fn destination_challenge(&self) -> Challenge32 {
        let mut challenge = [3; 32];
        challenge[..4].copy_from_slice(&self.destination_end.to_le_bytes());
        Challenge32(challenge)
    }

    /// Some never end.
    fn soon(&mut self) -> Option<u64> {
        let stuck = self.now < FAULTS_END && self.random.one_in(400);
        (!stuck).then(|| self.delay(10))
    }

    fn fails(&mut self) -> bool {
        self.now < FAULTS_END && self.random.one_in(300)
    }

    pub(super) fn vouch(&mut self, op: Op, challenge: Challenge32) {
        let credentials = evidence(challenge, self.trust.source_sound);
        let result = match self.fails() {
            true => Err(false),
            false => Ok(SourceDone::Vouched(credentials)),
        };
        if let Some(delay) = self.soon() {
            let life = self.source_life;
            self.after(delay, Event::SourceDone(life, op, result));
        }
    }

    pub(super) fn judge(&mut self, op: Op, challenge: Challenge32, shown: &[u8], last: bool) {
        let passes = shown == evidence(challenge, true) && !self.fails();
        if let Some(delay) = self.soon() {
            let life = self.source_life;
            self.after(delay, Event::Judged(life, op, last, passes));
        }
    }

    pub(super) fn judged(&mut self, op: Op, last: bool, passes: bool) {
        let now = self.time();
        self.trust.judged[usize::from(last)] |= passes;
        let blind = self.is(if last {
            Mutation::CommitUnjudged
        } else {
            Mutation::OpenUnjudged
        });
        if let Some(source) = &mut self.source {
            let result = if passes || blind {
                Ok(SourceDone::Done)
            } else {
                Err(failed(false))
            };
            source.handle_done(now, op, result);
        }
    }

    /// What the destination's gates say about an offer.
    pub(super) fn refusals(&mut self, offer: &Offer) -> Vec<WireBlocker> {
        let challenge = self.destination.as_ref().map(Destination::own_challenge);
        let challenge = challenge.unwrap_or(CHALLENGE);
        self.trust.refused = offer.credentials != evidence(challenge, true);
        if !self.trust.refused || self.is(Mutation::ReserveInSpiteOfGates) {
            return Vec::new();
        }
        vec![WireBlocker {
            code: "attestation".to_owned(),
            message: "not what it should be".to_owned(),
            remedy: String::new(),
        }]
    }

    /// With the container.
    pub(super) fn first_evidence(&self) -> Vec<u8> {
        let challenge = self.destination.as_ref().and_then(Destination::challenge);
        challenge.map_or_else(Vec::new, |challenge| {
            evidence(challenge, self.trust.destination_sound[0])
        })
    }

    pub(super) fn attest(&mut self, op: Op, challenge: Challenge32) {
        let attested = evidence(challenge, self.trust.destination_sound[1]);
        let result = match self.fails() {
            true => Err(false),
            false => Ok(DestinationDone::Attested(attested)),
        };
        if let Some(delay) = self.soon() {
            let life = self.destination_life;
            self.after(delay, Event::DestinationDone(life, op, result));
        }
    }

    /// What an action of the source must not come before.
    pub(super) fn check_judged(&mut self, action: &SourceAction) {
        let [first, last] = self.trust.judged;
        let law = match action {
            SourceAction::OpenStreams { .. }
            | SourceAction::SendPages { .. }
            | SourceAction::SendStale { .. }
            | SourceAction::SendUrgent { .. }
                if !first =>
            {
                "something of the VM left before its destination was judged"
            }
            SourceAction::Journal(_, SourceRecord::Committed(_)) if !last => {
                "committed before the destination was judged once more"
            }
            _ => return,
        };
        self.broken = Some(law);
    }
}
