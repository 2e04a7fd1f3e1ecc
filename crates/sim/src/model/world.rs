//! A state: both hosts and what is between them.

use std::collections::VecDeque;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use palanquin_engine::convergence::Limits;
use palanquin_engine::destination::DestinationConfig;
use palanquin_engine::ids::{Challenge32, StreamSecret};
use palanquin_engine::message::{Message, Offer, Reason};
use palanquin_engine::source::{Failure, Op, SourceConfig};
use palanquin_engine::strategy::PostCopyUse;
use palanquin_engine::time::Timing;
use palanquin_engine::{
    Destination, DestinationRecord, Epoch, MigrationId, Order, RamLayout, Root, Source,
    SourceRecord, Time, VmId,
};

use super::Bounds;
use crate::mutation::Mutation;

/// Everything happens now; only deadlines pass later.
pub(super) const NOW: Time = Time::from_micros(0);
/// What is shown decides nothing here, only whether it passes: with one for all, states that differ only in it are one.
pub(super) const CHALLENGE: Challenge32 = Challenge32([0; 32]);
/// Longer than any deadline that may pass.
const NEVER: Duration = Duration::from_secs(1_000_000);

/// The VM on the source.
#[derive(Clone, Debug, Hash)]
pub(super) struct Copy {
    pub(super) running: bool,
    /// Version of its page.
    pub(super) version: u8,
    pub(super) dirty: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Run {
    Incoming,
    Paused,
    Running,
}

/// The VM on the destination.
#[derive(Clone, Debug, Hash)]
pub(super) struct Container {
    pub(super) run: Run,
    /// Version of its page; 0 is none.
    pub(super) version: u8,
    /// Whether an access to a page that is not there waits.
    pub(super) waits: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum VmJob {
    Pause,
    Save,
    Resume,
    Erase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ContainerJob {
    Reserve,
    Load,
    Activate,
    EndPulling,
    Terminate,
}

/// What a restarted destination does without its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Recovery {
    Terminate,
    RecordDiscarded,
    Resume,
    RecordActivated,
}

/// On the data streams.
#[derive(Clone, Debug, Hash)]
pub(super) enum Data {
    /// The page in this version.
    Page(u8),
    /// The VM is paused and this is all; true where the rest follows once it runs.
    Drained(bool),
    RoundEnd(u32, bool),
    Stale,
    State,
    Pushed,
}

/// A control connection with its data streams.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    /// The source's name for it.
    pub(super) attempt: u32,
    pub(super) source_open: bool,
    pub(super) destination_open: bool,
    pub(super) cut: bool,
    pub(super) to_destination: VecDeque<Message>,
    pub(super) to_source: VecDeque<Message>,
    pub(super) data: VecDeque<Data>,
}

impl Connection {
    /// Whether nothing more can come of it.
    fn is_over(&self) -> bool {
        !self.source_open && !self.destination_open
    }
}

/// The host of the source.
#[derive(Clone, Debug)]
pub(super) struct SourceHost {
    pub(super) engine: Option<Arc<Source>>,
    pub(super) up: bool,
    pub(super) vm: Option<Copy>,
    pub(super) records: Vec<SourceRecord>,
    /// Records on their way to the disk.
    pub(super) journal: VecDeque<(Op, SourceRecord)>,
    pub(super) jobs: VecDeque<(Op, VmJob)>,
    pub(super) opening: Option<Op>,
    pub(super) dialling: bool,
    pub(super) attempt: u32,
    /// What the digest of the page says.
    pub(super) sent: u8,
    /// Somebody was told that the VM stays.
    pub(super) promised: bool,
    /// The destination is being judged: for the last time or not.
    pub(super) judging: Option<(Op, bool)>,
    /// Nothing was held against it: before anything was sent, before the commit.
    pub(super) judged: [bool; 2],
}

/// The host of the destination.
#[derive(Clone, Debug)]
pub(super) struct DestinationHost {
    pub(super) engine: Option<Arc<Destination>>,
    pub(super) up: bool,
    pub(super) container: Option<Container>,
    pub(super) records: Vec<DestinationRecord>,
    pub(super) journal: VecDeque<(Op, DestinationRecord)>,
    pub(super) jobs: VecDeque<(Op, ContainerJob)>,
    pub(super) recovery: VecDeque<Recovery>,
    pub(super) expecting: Option<Op>,
    /// To report with, once it is loaded.
    pub(super) loading: Option<Op>,
    /// The gates judge an offer.
    pub(super) consulting: bool,
    /// They have refused it.
    pub(super) refused: bool,
    /// Evidence is being made.
    pub(super) attesting: Option<Op>,
    /// The connection of the migration, as an index.
    pub(super) session: Option<usize>,
    pub(super) wishes: PostCopyUse,
    pub(super) state_arrived: bool,
    pub(super) state_sealed: bool,
    pub(super) received: u8,
    /// The page has arrived since the last whole round.
    pub(super) arrived: bool,
    /// How many times more resuming does not work: until it is given up, where that is still possible.
    pub(super) cannot_resume: u8,
}

/// A state.
#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) left: Bounds,
    pub(super) mutation: Option<Mutation>,
    pub(super) source: SourceHost,
    pub(super) destination: DestinationHost,
    pub(super) connections: Vec<Connection>,
    /// The page at the last pause.
    pub(super) paused_version: u8,
    /// The VM has run on the destination.
    pub(super) ran_there: bool,
    /// A law that a step broke.
    pub(super) broken: Option<&'static str>,
    /// What the machines asked for, where somebody wants to read it.
    pub(super) said: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(bounds: Bounds, mutation: Option<Mutation>) -> Self {
        let mut world = Self {
            left: bounds,
            mutation,
            source: SourceHost {
                engine: None,
                up: true,
                vm: Some(Copy {
                    running: true,
                    version: 1,
                    dirty: false,
                }),
                records: Vec::new(),
                journal: VecDeque::new(),
                jobs: VecDeque::new(),
                opening: None,
                dialling: false,
                attempt: 0,
                sent: 0,
                promised: false,
                judging: None,
                judged: [false; 2],
            },
            destination: DestinationHost {
                engine: None,
                up: true,
                container: None,
                records: Vec::new(),
                journal: VecDeque::new(),
                jobs: VecDeque::new(),
                recovery: VecDeque::new(),
                expecting: None,
                loading: None,
                consulting: false,
                refused: false,
                attesting: None,
                session: None,
                wishes: PostCopyUse::No,
                state_arrived: false,
                state_sealed: false,
                received: 0,
                arrived: false,
                cannot_resume: 0,
            },
            connections: Vec::new(),
            paused_version: 0,
            ran_there: false,
            broken: None,
            said: None,
        };
        let offer = Offer {
            order: order(),
            descriptor: Vec::new(),
            region_pages: vec![1],
            streams: 1,
            digest_seed: 0,
            post_copy: PostCopyUse::No,
            credentials: Vec::new(),
        };
        world.source.engine = Some(Arc::new(Source::new(NOW, world.source_config(), offer)));
        world.pump();
        world
    }

    pub(super) fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    pub(super) fn source_config(&self) -> SourceConfig {
        SourceConfig {
            order: order(),
            strategy: self.left.strategy,
            limits: Limits {
                deadline: NEVER,
                ..Limits::default()
            },
            timing: timing(),
            software: String::new(),
            layout: self.source.vm.as_ref().map(|_| layout()),
            challenge: CHALLENGE,
            last_challenge: CHALLENGE,
        }
    }

    pub(super) fn destination_config() -> DestinationConfig {
        DestinationConfig {
            timing: timing(),
            software: String::new(),
            stream_secret: StreamSecret([0; 32]),
            streams_max: 1,
            device_state_max: 1,
            challenge: CHALLENGE,
        }
    }

    /// The connection that the source's engine means.
    pub(super) fn newest(&mut self) -> Option<&mut Connection> {
        let attempt = self.source.attempt;
        let open = |c: &&mut Connection| c.source_open && c.attempt == attempt;
        self.connections.iter_mut().find(open)
    }

    /// The connection of the destination's session.
    pub(super) fn session(&mut self) -> Option<&mut Connection> {
        let index = self.destination.session?;
        self.connections
            .get_mut(index)
            .filter(|connection| connection.destination_open)
    }

    /// Drops connections that are over.
    pub(super) fn tidy(&mut self) {
        let mut index = 0;
        while let Some(connection) = self.connections.get(index) {
            if !connection.is_over() {
                index += 1;
                continue;
            }
            self.connections.remove(index);
            self.destination.session = match self.destination.session {
                Some(session) if session == index => None,
                Some(session) if session > index => Some(session - 1),
                session => session,
            };
        }
    }

    pub(super) fn say(&mut self, who: &str, what: &impl std::fmt::Debug) {
        if let Some(said) = &mut self.said {
            said.push(format!("    {who}: {:.200}", format!("{what:?}")));
        }
    }

    /// Carries out what both machines ask for, until they ask for nothing.
    pub(super) fn pump(&mut self) {
        loop {
            let source = self.source.engine.as_mut().map(Arc::make_mut);
            if let Some(action) = source.and_then(Source::poll_action) {
                self.say("source", &action);
                self.source_action(action);
                continue;
            }
            let destination = self.destination.engine.as_mut().map(Arc::make_mut);
            if let Some(action) = destination.and_then(Destination::poll_action) {
                self.say("destination", &action);
                self.destination_action(action);
                continue;
            }
            break;
        }
        self.tidy();
    }

    /// What tells this state from others.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.left.hash(&mut hasher);
        let SourceHost {
            engine,
            up,
            vm,
            records,
            journal,
            jobs,
            opening,
            dialling,
            attempt,
            sent,
            promised,
            judging,
            judged,
        } = &self.source;
        engine.is_some().hash(&mut hasher);
        if let Some(engine) = engine {
            engine.hash_behaviour(&mut hasher);
        }
        (up, vm, records, journal, jobs).hash(&mut hasher);
        (opening, dialling, sent, promised).hash(&mut hasher);
        (judging, judged).hash(&mut hasher);
        let DestinationHost {
            engine,
            up,
            container,
            records,
            journal,
            jobs,
            recovery,
            expecting,
            loading,
            consulting,
            refused,
            attesting,
            session,
            wishes,
            state_arrived,
            state_sealed,
            received,
            arrived,
            cannot_resume,
        } = &self.destination;
        engine.is_some().hash(&mut hasher);
        if let Some(engine) = engine {
            engine.hash_behaviour(&mut hasher);
        }
        (up, container, records, journal, jobs, recovery).hash(&mut hasher);
        (expecting, loading, session, wishes, received).hash(&mut hasher);
        (consulting, refused, attesting).hash(&mut hasher);
        (state_arrived, state_sealed, arrived).hash(&mut hasher);
        (cannot_resume, self.paused_version, self.ran_there).hash(&mut hasher);
        self.connections.len().hash(&mut hasher);
        for connection in &self.connections {
            // Only whether it is the newest matters, not how often was dialled before.
            (connection.attempt == *attempt).hash(&mut hasher);
            (connection.source_open, connection.destination_open).hash(&mut hasher);
            (connection.cut, &connection.to_destination).hash(&mut hasher);
            (&connection.to_source, &connection.data).hash(&mut hasher);
        }
        hasher.finish()
    }
}

pub(super) fn order() -> Order {
    Order {
        migration: MigrationId([1; 16]),
        vm: VmId([2; 16]),
        vm_name: "vm".to_owned(),
        epoch: Epoch(1),
        source: "a".to_owned(),
        destination: "b".to_owned(),
        expires_unix_s: 100,
        run: true,
    }
}

fn timing() -> Timing {
    Timing {
        silence: NEVER,
        handshake: Duration::ZERO,
        reservation: Duration::ZERO,
        switchover: Duration::ZERO,
        redial_min: Duration::ZERO,
        redial_max: Duration::ZERO,
        // That it gives up is what an abort does, too.
        redial: NEVER,
        // To be told apart from zero, which is none at all.
        rejoin: Duration::from_micros(1),
        // That it gives up is what the loss of its container does, too.
        copying: NEVER,
    }
}

pub(super) fn layout() -> RamLayout {
    // One region of one page is within all bounds.
    RamLayout::new(vec![1]).unwrap_or_else(|_| unreachable!("layout"))
}

/// Stands for the digest over all pages.
pub(super) fn root(version: u8) -> Root {
    Root([version; 32])
}

/// Texts decide nothing: with one for all, states that differ only in them are one.
pub(super) fn reason() -> Reason {
    Reason::new("model", "")
}

pub(super) fn failure(vm_gone: bool) -> Failure {
    Failure {
        reason: reason(),
        vm_gone,
    }
}

/// The message without its texts.
pub(super) fn plain(message: Message) -> Message {
    match message {
        Message::Abort(_) => Message::Abort(reason()),
        Message::Discarded(_) => Message::Discarded(reason()),
        other => other,
    }
}
