//! What both sides show each other before anything of the VM leaves, and once more before it is given away.
//!
//! The machine judges nothing: it asks the driver, and goes on only when the driver says so.

use super::{Op, Source, SourceAction, State};
use crate::message::{
    Accepted, CREDENTIALS_MAX, HelloReply, Message, Ready, Reason, Refused, VERSIONS,
};
use crate::strategy::PostCopyUse;
use crate::time::Time;

/// How far the evidence that came with `Ready` is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum LastJudgement {
    NotYet,
    Judging(Op),
    Passed,
}

impl Source {
    /// Whether a gate of either host refused: this is why the VM stays here.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// The destination has answered the greeting: ask for what speaks for us there.
    pub(super) fn greeted(&mut self, now: Time, reply: &HelloReply) {
        if !reply
            .version
            .is_some_and(|version| VERSIONS.contains(&version))
        {
            let reason = Reason::new(
                "protocol-version",
                format!(
                    "no common version of the protocol: the destination (palanquin {}) speaks {:?}, this host {VERSIONS:?}",
                    reply.software, reply.versions
                ),
            );
            return self.abort(now, reason);
        }
        let Some(challenge) = reply.challenge else {
            return self.misbehaved(now, "it greeted without a challenge");
        };
        let op = self.op();
        self.state = State::Vouching(op);
        self.deadline = Some(now + self.config.timing.handshake);
        self.actions
            .push_back(SourceAction::Vouch { op, challenge });
    }

    /// The driver has made our credentials.
    pub(super) fn vouched(&mut self, now: Time, credentials: Vec<u8>) {
        if credentials.len() > CREDENTIALS_MAX {
            let what = format!(
                "the credentials of this host have {} bytes, at most {CREDENTIALS_MAX} are allowed",
                credentials.len()
            );
            return self.abort(now, Reason::new("credentials-too-long", what));
        }
        let Some(offer) = &mut self.offer else {
            return;
        };
        offer.credentials = credentials;
        let offer = offer.clone();
        self.state = State::Offering;
        self.deadline = Some(now + self.config.timing.reservation);
        self.send(now, Message::Offer(offer));
    }

    pub(super) fn refused_there(&mut self, now: Time, refused: Refused) {
        let code = if refused.by_gate {
            "refused"
        } else {
            "blocked"
        };
        self.refused = refused.by_gate;
        self.blockers = refused.blockers;
        let reason = Reason::new(code, "the destination does not take the VM");
        self.abort(now, reason);
    }

    /// The destination has a container: before a stream is opened to it, judge what it says about itself.
    pub(super) fn accepted(&mut self, now: Time, mut accepted: Accepted) {
        let most = self.offer.as_ref().map_or(0, |offer| offer.streams);
        if accepted.streams > most {
            return self.misbehaved(now, "it accepted more streams than were offered");
        }
        let wanted = self.scheduler.post_copy_use();
        if accepted.post_copy && wanted == PostCopyUse::No {
            return self.misbehaved(now, "it accepted post-copy, which was not offered");
        }
        if !accepted.post_copy && wanted == PostCopyUse::Required {
            return self.misbehaved(now, "it accepted without post-copy, which was required");
        }
        self.scheduler.post_copy_ready(accepted.post_copy);
        if !accepted.post_copy && wanted == PostCopyUse::IfPossible {
            self.note("the destination cannot run the VM before all of its pages are there");
        }
        let op = self.op();
        let evidence = std::mem::take(&mut accepted.evidence);
        self.state = State::Judging { op, accepted };
        self.deadline = Some(now + self.config.timing.handshake);
        self.actions.push_back(SourceAction::Judge {
            op,
            challenge: self.config.challenge,
            evidence,
            last: false,
        });
    }

    /// Nothing is held against the destination.
    pub(super) fn trusted(&mut self, now: Time) {
        let State::Judging { accepted, .. } = &self.state else {
            return;
        };
        let (streams, urgent) = (accepted.streams, accepted.post_copy);
        let secret = accepted.stream_secret;
        let op = self.op();
        self.streams = Some((streams, urgent));
        self.state = State::OpeningStreams {
            op,
            opened: false,
            ready: false,
        };
        self.deadline = Some(now + self.config.timing.handshake);
        self.actions.push_back(SourceAction::OpenStreams {
            op,
            streams,
            urgent,
            secret,
        });
    }

    /// The pause begins: the destination has to show once more what it is, while everything else goes on.
    pub(super) fn challenge_again(&mut self, now: Time) {
        self.send(now, Message::Challenge(self.config.last_challenge));
    }

    /// The destination could run the VM. Its evidence is judged while our own root is being computed.
    pub(super) fn ready_there(&mut self, now: Time, ready: Ready) {
        let judge = self.op();
        let State::AwaitReady { theirs, judged, .. } = &mut self.state else {
            return;
        };
        *theirs = Some(ready.root);
        *judged = LastJudgement::Judging(judge);
        // A long pause may have been asked for; for its pages, not for this.
        let until = now + self.config.timing.switchover;
        self.deadline = Some(self.deadline.map_or(until, |at| at.min(until)));
        self.progress.downtime.device_state = now - self.mark;
        self.mark = now;
        self.actions.push_back(SourceAction::Judge {
            op: judge,
            challenge: self.config.last_challenge,
            evidence: ready.evidence,
            last: true,
        });
        self.compare(now);
    }

    /// Whether a report of this action is a judgement that is awaited.
    pub(super) fn judges(&self, op: Op) -> bool {
        match &self.state {
            State::Judging { op: expected, .. } => *expected == op,
            State::AwaitReady { judged, .. } => *judged == LastJudgement::Judging(op),
            _ => false,
        }
    }
}
