//! A peer that is authenticated and lies, repeats, swaps and talks nonsense.
//!
//! Nothing can keep such a host from running a copy of what it was given. What the honest side can keep are its own
//! laws: it acts only on its own durable records, and it comes to an end, or to a doubt that an operator can end.

use palanquin_engine::ids::Challenge32;
use palanquin_engine::message::{Accepted, Query, Ready, Rejoin, Seal};

use super::*;

/// Which host lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rogue {
    Source,
    Destination,
}

impl World {
    pub(super) fn lies(&self, back: bool) -> bool {
        match self.rogue {
            Some(Rogue::Source) => !back,
            Some(Rogue::Destination) => back,
            None => false,
        }
    }

    /// What a rogue sends where its machine would send this.
    pub(super) fn twisted(&mut self, message: Message) -> Vec<Message> {
        match self.random.below(24) {
            0 => Vec::new(),
            1 => vec![message.clone(), message],
            2 => vec![message, self.nonsense()],
            3 => vec![self.nonsense(), message],
            4 => vec![self.nonsense()],
            5 => {
                let mut said = std::mem::take(&mut self.rogue_said);
                said.push(message);
                let index = self.random.below(said.len() as u64) as usize;
                let old = said.swap_remove(index);
                self.rogue_said = said;
                vec![old]
            }
            _ => {
                if self.rogue_said.len() < 32 {
                    self.rogue_said.push(message.clone());
                }
                vec![message]
            }
        }
    }

    fn nonsense(&mut self) -> Message {
        let epoch = Epoch(self.random.below(4));
        let number = self.random.below(4);
        let Order { migration, vm, .. } = self.order;
        let reason = Reason::new("rogue", "nonsense");
        let stream_secret = StreamSecret([3; 32]);
        match self.random.below(22) {
            0 => Message::Commit(epoch),
            1 => Message::Running(epoch),
            2 => Message::Erased,
            3 => Message::Abort(reason),
            4 => Message::Discarded(reason),
            5 => Message::Verdict(Verdict::Owned(epoch)),
            6 => Message::Verdict(Verdict::Discarded),
            7 => Message::Verdict(Verdict::Undecided),
            8 => Message::Verdict(Verdict::Unknown),
            9 => Message::Verdict(Verdict::Pulling(Rejoin {
                streams: number as u16,
                stream_secret,
            })),
            10 => Message::Ready(Ready {
                root: Root([number as u8; 32]),
                evidence: vec![number as u8; 33],
            }),
            11 => Message::RoundReceived(number as u32),
            12 => Message::Complete(Complete {
                root: None,
                fault_wait_log2_us: vec![number],
            }),
            13 => Message::Demand(Demand {
                region: number as u16,
                page: self.random.below(2 * PAGES),
            }),
            14 => Message::Present(Present {
                region: number as u16,
                first_page: 64 * number,
                bits: vec![0xff; number as usize * 8],
                last: number.is_multiple_of(2),
            }),
            15 => Message::Accepted(Accepted {
                streams: number as u16,
                stream_secret,
                post_copy: number.is_multiple_of(2),
                evidence: vec![number as u8; 33],
            }),
            16 => Message::Seal(Seal {
                rounds: number as u32,
                device_state_bytes: number,
                device_state_sha256: Sha256([0; 32]),
                post_copy: number.is_multiple_of(2),
            }),
            17 => Message::StreamsReady,
            18 => Message::Query(Query { migration, vm }),
            19 => Message::Verdict(Verdict::Receiving(
                Rejoin {
                    streams: number as u16,
                    stream_secret,
                },
                self.random.below(4) as u32,
            )),
            20 => Message::Challenge(Challenge32([number as u8; 32])),
            _ => Message::HelloReply(HelloReply {
                version: Some(number as u16),
                features: Vec::new(),
                software: String::new(),
                versions: Vec::new(),
                challenge: epoch.0.is_multiple_of(2).then_some(Challenge32([0; 32])),
            }),
        }
    }

    /// The laws of the side that does not lie.
    pub(super) fn check_honest(&self) -> Result<(), String> {
        let [source, destination] = &self.copies;
        let runs = |copy: &Option<Copy>| copy.as_ref().is_some_and(|c| c.run == Run::Running);
        match self.rogue {
            Some(Rogue::Destination) if runs(source) && !self.source_may_run() => {
                Err("the source runs a VM that its journal gave away".to_owned())
            }
            Some(Rogue::Destination) if source.is_none() && !self.killed && !self.released() => {
                Err("the source removed a VM that its journal had not released".to_owned())
            }
            Some(Rogue::Source) if runs(destination) && !self.owned() => {
                Err("the destination runs a VM that its journal does not own".to_owned())
            }
            Some(Rogue::Source) if self.stale_order && (self.owned() || runs(destination)) => {
                Err("an order of an epoch that is over was accepted".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn released(&self) -> bool {
        let gone = |r: &SourceRecord| matches!(r, SourceRecord::Released(_) | SourceRecord::Erased);
        self.source_records.iter().any(gone)
    }

    /// Operators end what a liar leaves open.
    pub(super) fn operator_steps_in(&mut self) {
        let now = self.time();
        if let Some(source) = &mut self.source {
            let verdict = if source.runs_on_destination() {
                Verdict::Owned(source.commit_epoch())
            } else {
                Verdict::Discarded
            };
            source.handle_operator_verdict(now, verdict);
        }
    }
}
