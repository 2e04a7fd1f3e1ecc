//! The data streams of a migration that arrives, as the agent has them: the network process writes the pages.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palanquin_engine::frame::PAYLOAD_MAX;
use palanquin_engine::ids::{Root, StreamSecret};
use palanquin_engine::pages::{PageSet, RamLayout};
use palanquin_host::vm::MissingPages;

use crate::device_state::DeviceState;
use crate::net::port::{BODY_MAX, Port};
use crate::net::protocol::{
    Answer, FromReceiving, ToReceiving, WANTED_MAX, Wire, decode_pages, pages_bytes_max,
};
use crate::network::Flood;

/// Most bytes of a region and a page in CBOR.
const WANTED_BYTES: usize = 13;
/// Longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Bytes of the counter that the network process writes.
pub const COUNTER_BYTES: usize = 8;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum StreamsError {
    /// It ended.
    #[error("the network process is gone")]
    Gone,
    /// It is too slow.
    #[error("the network process does not answer")]
    Timeout,
    /// It says why.
    #[error("{0}")]
    Failed(String),
    /// It answers another question, or nonsense.
    #[error("the network process answers what makes no sense")]
    Nonsense,
    /// The VM.
    #[error(transparent)]
    Host(#[from] palanquin_host::Error),
}

/// What becomes of the streams; the number is the generation that was expected.
pub enum InEvent {
    /// All are open.
    Open(u32),
    /// One has delivered its part of a round.
    RoundEnd {
        /// Generation.
        generation: u32,
        /// The round.
        round: u32,
        /// Whether it was the last.
        last: bool,
    },
    /// The first piece of the device state is here that was saved before the pause.
    EarlyState,
    /// One has delivered its pages that were written until the pause.
    Drained {
        /// Generation.
        generation: u32,
        /// Whether the VM is to run here before its last pages are here.
        post_copy: bool,
    },
    /// One has delivered all of its pages that follow the last round.
    Pushed(u32),
    /// One ended before its time.
    Failed {
        /// Generation.
        generation: u32,
        /// Whether the path is to blame and not whoever sent.
        broken_link: bool,
        /// Why.
        why: String,
    },
    /// The network process is gone, and what it knew of this migration.
    Lost,
}

/// Who waits for the answer to which question; nobody any more once the network process is gone.
#[derive(Default)]
struct Questions(Mutex<Option<HashMap<u64, Sender<Answer>>>>);

impl Questions {
    fn open(&self) -> MutexGuard<'_, Option<HashMap<u64, Sender<Answer>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers to what nobody asks, or not any more, are dropped.
    fn answered(&self, id: u64, answer: Answer) {
        let asked = self.open().as_mut().and_then(|open| open.remove(&id));
        if let Some(sender) = asked {
            let _ = sender.send(answer);
        }
    }
}

/// A question that is being answered.
pub struct Pending<'a> {
    streams: &'a InStreams,
    id: u64,
    answer: Receiver<Answer>,
}

impl Pending<'_> {
    /// The answer.
    fn end(self) -> Result<Answer, StreamsError> {
        match self.answer.recv_timeout(ANSWER_TIMEOUT) {
            Ok(Answer::Failed(why)) => Err(StreamsError::Failed(why)),
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => Err(StreamsError::Timeout),
            Err(RecvTimeoutError::Disconnected) => Err(StreamsError::Gone),
        }
    }

    /// Waits until the network process has done what it was asked for.
    ///
    /// # Errors
    ///
    /// It does not answer, or can't.
    pub fn done(self) -> Result<(), StreamsError> {
        match self.end()? {
            Answer::Done => Ok(()),
            _ => Err(StreamsError::Nonsense),
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(open) = &mut *self.streams.questions.open() {
            open.remove(&self.id);
        }
    }
}

/// The streams of a migration that arrives. Dropping it ends them.
pub struct InStreams {
    port: Arc<Port>,
    guest_bytes: File,
    device_state: Arc<DeviceState>,
    questions: Arc<Questions>,
    next: AtomicU64,
}

impl InStreams {
    /// At this port, for a VM with this much RAM; events are reported from a thread of its own.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn new(
        port: Port,
        guest_bytes: File,
        ram_bytes: u64,
        device_state_max: u64,
        report: impl Fn(InEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let port = Arc::new(port);
        let device_state = Arc::new(DeviceState::new(device_state_max));
        let questions = Arc::new(Questions(Mutex::new(Some(HashMap::new()))));
        let (from, state) = (Arc::clone(&port), Arc::clone(&device_state));
        let asked = Arc::clone(&questions);
        let packet_max = packet_max(ram_bytes);
        let work = move || {
            let mut flood = Flood::default();
            let mut begun = false;
            // Whatever the reason: there is nobody to tell it to but who uses the streams.
            while let Ok(Some(packet)) = from.receive(None, packet_max) {
                let event = match FromReceiving::decoded(&packet.body) {
                    Ok(FromReceiving::Streams(generation)) => InEvent::Open(generation),
                    Ok(FromReceiving::RoundEnd(generation, round, last)) => InEvent::RoundEnd {
                        generation,
                        round,
                        last,
                    },
                    Ok(FromReceiving::Drained(generation, post_copy)) => InEvent::Drained {
                        generation,
                        post_copy,
                    },
                    Ok(FromReceiving::Pushed(generation)) => InEvent::Pushed(generation),
                    Ok(FromReceiving::Failed(generation, broken_link, why)) => InEvent::Failed {
                        generation,
                        broken_link,
                        why,
                    },
                    Ok(FromReceiving::DeviceState(piece, early)) => {
                        if state.push(&piece, early).is_err() {
                            break;
                        }
                        if begun || !early {
                            continue;
                        }
                        begun = true;
                        InEvent::EarlyState
                    }
                    Ok(FromReceiving::Answer(id, answer)) => {
                        asked.answered(id, answer);
                        continue;
                    }
                    Err(_) => break,
                };
                if flood.is_one() {
                    break;
                }
                report(event);
            }
            from.close();
            // Who reads it must not wait for what does not come.
            state.cancel();
            *asked.open() = None;
            report(InEvent::Lost);
        };
        std::thread::Builder::new()
            .name("streams-in".to_owned())
            .spawn(work)?;
        Ok(Self {
            port,
            guest_bytes,
            device_state,
            questions,
            next: AtomicU64::new(1),
        })
    }

    fn tell(&self, what: &ToReceiving) {
        // One that is lost is reported by the thread that receives.
        let _ = self.port.send(&what.encoded(), &[]);
    }

    fn begin(
        &self,
        question: impl FnOnce(u64) -> ToReceiving,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<Pending<'_>, StreamsError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = channel();
        match &mut *self.questions.open() {
            Some(open) => drop(open.insert(id, sender)),
            None => return Err(StreamsError::Gone),
        }
        let pending = Pending {
            streams: self,
            id,
            answer,
        };
        let sent = self.port.send(&question(id).encoded(), fds);
        sent.map_err(|_| StreamsError::Gone)?;
        Ok(pending)
    }

    fn ask(&self, question: impl FnOnce(u64) -> ToReceiving) -> Result<Answer, StreamsError> {
        self.begin(question, &[])?.end()
    }

    /// Expects streams; they may come when this returns, and of those before nothing is written any more.
    ///
    /// # Errors
    ///
    /// The network process does not answer.
    pub fn expect(
        &self,
        generation: u32,
        count: u16,
        secret: StreamSecret,
    ) -> Result<(), StreamsError> {
        let question = |id| ToReceiving::Expect {
            id,
            generation,
            count,
            secret,
        };
        self.begin(question, &[])?.done()
    }

    /// Closes the streams.
    pub fn close(&self) {
        self.tell(&ToReceiving::Close);
    }

    /// Missing pages are asked for on this control connection.
    pub fn ask_on(&self, channel: &crate::channel::Channel) {
        self.tell(&ToReceiving::AskOn(channel.id));
    }

    /// From now on pages are placed where somebody may wait for them, and those that are waited for are asked for. Once.
    /// It has begun when the answer is there; what waits until then waits a little longer.
    ///
    /// # Errors
    ///
    /// The network process is gone, or there is nothing to give it.
    pub fn wait(&self, missing: &dyn MissingPages) -> Result<Pending<'_>, StreamsError> {
        let faults = missing.share()?;
        let windows = faults.windows.iter().map(|list| {
            let list = list.iter();
            list.map(|w| (w.address, w.offset, w.len)).collect()
        });
        let question = |id| ToReceiving::Wait {
            id,
            pid: faults.pid,
            windows: windows.collect(),
        };
        self.begin(question, &[faults.uffd.as_fd()])
    }

    /// Adds the pages that have arrived since they may be waited for; gives those that are waited for.
    ///
    /// # Errors
    ///
    /// The network process does not answer, or with pages that the VM does not have.
    pub fn arrived(
        &self,
        layout: &RamLayout,
        pages: &mut PageSet,
    ) -> Result<Vec<(u16, u64)>, StreamsError> {
        match self.ask(ToReceiving::Arrived)? {
            Answer::Arrived(arrived, wanted) => {
                let arrived = decode_pages(&arrived, layout).map_err(|_| StreamsError::Nonsense)?;
                pages.union(&arrived);
                let exists = |(region, page): &(u16, u64)| {
                    usize::from(*region) < layout.regions()
                        && *page < layout.pages(usize::from(*region))
                };
                if wanted.iter().all(exists) {
                    Ok(wanted)
                } else {
                    Err(StreamsError::Nonsense)
                }
            }
            _ => Err(StreamsError::Nonsense),
        }
    }

    /// The pages that have arrived of the round after so many whole ones.
    ///
    /// # Errors
    ///
    /// The network process does not answer, or with pages that the VM does not have.
    pub fn received(&self, layout: &RamLayout, rounds: u32) -> Result<PageSet, StreamsError> {
        match self.ask(|id| ToReceiving::Received(id, rounds))? {
            Answer::Arrived(pages, _) => {
                decode_pages(&pages, layout).map_err(|_| StreamsError::Nonsense)
            }
            _ => Err(StreamsError::Nonsense),
        }
    }

    /// The root over the digests of all pages.
    ///
    /// # Errors
    ///
    /// The network process does not answer.
    pub fn root(&self) -> Result<Root, StreamsError> {
        match self.ask(ToReceiving::Root)? {
            Answer::Root(root) => Ok(root),
            _ => Err(StreamsError::Nonsense),
        }
    }

    /// Nothing is waited for any more: the root over what arrived since it was, and how long was waited.
    ///
    /// # Errors
    ///
    /// The network process does not answer.
    pub fn pulled(&self) -> Result<(Root, Vec<u64>), StreamsError> {
        match self.ask(ToReceiving::Pulled)? {
            Answer::Pulled(root, waits) => Ok((root, waits)),
            _ => Err(StreamsError::Nonsense),
        }
    }

    /// The device state as it arrives.
    pub fn device_state(&self) -> &DeviceState {
        &self.device_state
    }

    /// Guest page bytes that arrived.
    pub fn guest_bytes(&self) -> u64 {
        let mut bytes = [0; COUNTER_BYTES];
        // Whoever writes it may have cut it off.
        let read = self.guest_bytes.read_exact_at(&mut bytes, 0);
        read.map_or(0, |()| u64::from_le_bytes(bytes))
    }
}

/// Longest packet of the network process: the pages of a VM with this much RAM and those that are waited for, or a piece of
/// device state.
fn packet_max(ram_bytes: u64) -> usize {
    let pages = usize::try_from(pages_bytes_max(ram_bytes)).unwrap_or(BODY_MAX);
    let wanted = WANTED_MAX * WANTED_BYTES;
    pages
        .saturating_add(wanted)
        .max(PAYLOAD_MAX)
        .saturating_add(1024)
        .min(BODY_MAX)
}

impl Drop for InStreams {
    fn drop(&mut self) {
        self.port.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::net::protocol::{encode_blocks, encode_pages};

    fn streams(limit: u64) -> (Arc<InStreams>, Port, Receiver<InEvent>) {
        let (ours, theirs) = Port::pair().unwrap();
        let (sender, events) = channel();
        let counter = crate::network::counters(COUNTER_BYTES).unwrap();
        let report = move |event| {
            let _ = sender.send(event);
        };
        let streams = InStreams::new(ours, counter, 1 << 30, limit, report).unwrap();
        (Arc::new(streams), Port::from_fd(theirs).unwrap(), events)
    }

    /// A network process that answers the next question.
    fn answering(process: Port, answer: Answer) -> std::thread::JoinHandle<Port> {
        std::thread::spawn(move || {
            let packet = process.receive(None, 1 << 20).unwrap().unwrap();
            let (ToReceiving::Root(id) | ToReceiving::Arrived(id) | ToReceiving::Pulled(id)) =
                ToReceiving::decoded(&packet.body).unwrap()
            else {
                panic!("another question");
            };
            // One that nobody asked for comes first.
            for (id, answer) in [(id + 7, Answer::Done), (id, answer)] {
                let told = FromReceiving::Answer(id, answer);
                process.send(&told.encoded(), &[]).unwrap();
            }
            process
        })
    }

    #[test]
    fn an_answer_belongs_to_its_question() {
        let (streams, process, _events) = streams(100);
        let process = answering(process, Answer::Root(Root([3; 32])));
        assert_eq!(streams.root().unwrap(), Root([3; 32]));
        let process = answering(process.join().unwrap(), Answer::Done);
        assert!(matches!(streams.root(), Err(StreamsError::Nonsense)));
        drop(process.join().unwrap());
        assert!(matches!(streams.root(), Err(StreamsError::Gone)));
    }

    #[test]
    fn pages_that_the_vm_does_not_have_are_not_believed() {
        let (streams, process, _events) = streams(100);
        let layout = RamLayout::new(vec![100]).unwrap();
        let mut arrived = PageSet::empty(&layout);
        arrived.insert(0, 3..5);
        let good = Answer::Arrived(encode_pages(&arrived), vec![(0, 99)]);
        let process = answering(process, good).join_after(|| {
            let mut pages = PageSet::empty(&layout);
            assert_eq!(streams.arrived(&layout, &mut pages).unwrap(), [(0, 99)]);
            assert_eq!(pages, arrived);
        });
        let block = palanquin_engine::pages::Block {
            region: 0,
            index: 1,
            mask: [1; 4],
        };
        let mut process = process;
        for bad in [
            Answer::Arrived(encode_blocks(std::iter::once(block)), Vec::new()),
            Answer::Arrived(encode_pages(&arrived), vec![(0, 100)]),
            Answer::Arrived(encode_pages(&arrived), vec![(1, 0)]),
        ] {
            process = answering(process, bad).join_after(|| {
                let mut pages = PageSet::empty(&layout);
                let error = streams.arrived(&layout, &mut pages).unwrap_err();
                assert!(matches!(error, StreamsError::Nonsense));
            });
        }
    }

    #[test]
    fn more_device_state_than_is_accepted_ends_it() {
        let (streams, process, events) = streams(100);
        let piece = |len: usize| FromReceiving::DeviceState(vec![1; len].into(), false).encoded();
        process.send(&piece(60), &[]).unwrap();
        process.send(&piece(60), &[]).unwrap();
        assert!(matches!(events.recv().unwrap(), InEvent::Lost));
        assert!(matches!(streams.root(), Err(StreamsError::Gone)));
    }

    trait JoinAfter {
        fn join_after(self, work: impl FnOnce()) -> Port;
    }

    impl JoinAfter for std::thread::JoinHandle<Port> {
        fn join_after(self, work: impl FnOnce()) -> Port {
            work();
            self.join().unwrap()
        }
    }
}
