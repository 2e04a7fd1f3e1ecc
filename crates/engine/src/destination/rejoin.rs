//! The connection broke while pages arrived: they are kept for a while, and only the source that sends them may go on.

use super::{Attest, Destination, DestinationAction, Load, State};
use crate::ids::StreamSecret;
use crate::message::{Message, Reason, Rejoin, Verdict};
use crate::time::{Liveness, Time};

impl Destination {
    /// Whether the source may go on here on another connection. Not from the pause on: it turns back then.
    pub(super) fn may_rejoin(&self) -> bool {
        self.is_before_pause() && !self.config.timing.rejoin.is_zero()
    }

    /// Whether pages arrive, or would if its source were there, of a VM that is not about to pause.
    fn is_before_pause(&self) -> bool {
        matches!(
            self.state,
            State::Receiving {
                drained: None,
                // What a container has loaded it cannot forget.
                load: Load::NotYet,
                // Its source is about to pause the VM.
                attest: Attest::NotYet,
                seal: None,
                ..
            } | State::AwaitRejoin { .. }
                | State::Reopening { .. }
        )
    }

    /// Whether it waits for its source to come back.
    pub fn is_waiting_for_source(&self) -> bool {
        matches!(
            self.state,
            State::AwaitRejoin { .. } | State::Reopening { .. }
        )
    }

    fn kept_until(&self, now: Time) -> Time {
        match self.state {
            State::AwaitRejoin { until } | State::Reopening { until, .. } => until,
            _ => now + self.config.timing.rejoin,
        }
    }

    pub(super) fn await_rejoin(&mut self, now: Time, reason: Reason) {
        let until = self.kept_until(now);
        self.live = None;
        self.reason = Some(reason);
        self.deadline = Some(until);
        self.state = State::AwaitRejoin { until };
        self.actions.push_back(DestinationAction::Disconnect);
    }

    /// The source has come back.
    pub(super) fn reopen(&mut self, now: Time, secret: StreamSecret) {
        let Some(layout) = self.layout.clone() else {
            return;
        };
        let until = self.kept_until(now);
        let (op, streams) = (self.op(), self.streams);
        self.live = Some(Liveness::new(now, self.config.timing.silence));
        self.deadline = Some((now + self.config.timing.handshake).min(until));
        self.state = State::Reopening { op, until };
        self.actions.push_back(DestinationAction::ExpectStreams {
            op,
            streams,
            urgent: self.post_copy_ready,
            secret,
            layout,
        });
        let rejoin = Rejoin {
            streams,
            stream_secret: secret,
        };
        let verdict = Verdict::Receiving(rejoin, self.rounds);
        self.send(now, Message::Verdict(verdict));
    }

    /// All streams are open.
    pub(super) fn receive(&mut self, now: Time) {
        self.deadline = None;
        self.reason = None;
        self.state = State::Receiving {
            drained: None,
            load: Load::NotYet,
            attest: Attest::NotYet,
            last: None,
            seal: None,
        };
        self.send(now, Message::StreamsReady);
    }

    /// The source is there, and comes to no end. Of its own accord it would have given up long before.
    pub(super) fn end_holding(&mut self, now: Time) {
        let reason = if matches!(self.state, State::AwaitCommit) {
            let what = "the VM could run here, and the source did not commit in time";
            Reason::new("timeout", what)
        } else {
            let copying = self.config.timing.copying.as_secs();
            let what = format!(
                "the copy has taken {copying} s, longer than this host holds a place for one"
            );
            Reason::new("copied-too-long", what)
        };
        self.discard(now, reason);
    }

    /// Why a migration ends whose source did not come back.
    pub(super) fn not_back(&self) -> Reason {
        let last = self.reason_or_unknown();
        Reason::new(
            "connection-lost",
            format!("the connection was lost, and the source did not come back in time: {last}"),
        )
    }
}
