//! What other hosts can ask for: messages of the control connection, and data streams.

use palanquin_engine::Message;

use super::{Cell, Row, verbs};
use Cell::{Answered, NotApplicable, Refused};

/// Who says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The source, which has dialled.
    ToDestination,
    /// The destination, which was dialled.
    ToSource,
    /// Either.
    Both,
}

verbs! {
    /// What a host can say to another.
    HostVerb {
        /// First message of the side that connected.
        Hello,
        /// To take a VM.
        Offer,
        /// What would stand in the way of an offer.
        Check,
        /// What became of a migration; also to come back to one.
        Query,
        /// A data stream, opened with its proof.
        OpenStream,
        /// The VM is being paused: shows itself once more.
        Challenge,
        /// Everything was sent.
        Seal,
        /// The VM is given away.
        Commit,
        /// The VM was removed.
        Erased,
        /// Answer to a greeting.
        HelloReply,
        /// An offer is not taken.
        Refused,
        /// A container is there.
        Accepted,
        /// All streams are open.
        StreamsReady,
        /// A round has arrived.
        RoundReceived,
        /// The destination could run the VM.
        Ready,
        /// It runs it.
        Running,
        /// It has given the migration up.
        Discarded,
        /// Answer to a query.
        Verdict,
        /// Answer to a check.
        CheckReply,
        /// A page is waited for.
        Demand,
        /// Pages that are there.
        Present,
        /// All pages are there.
        Complete,
        /// The migration ends before its commit.
        Abort,
        /// Still there.
        Ping,
    }
}

/// The connection's other end broke the protocol.
const OUT_OF_TURN: Cell = Refused("peer-misbehaved");
const NO_EPOCH: &str = "it names no epoch";
const NO_OWNER: &str = "it is about nobody's VM";
const GREETING: &str =
    "every host of the trust domain is greeted; what it may have done is judged with its offer";
const OF_ITS_CONNECTION: &str =
    "a connection is one migration's, and its answers are the other end's own";
const READS_ALONE: &str = "it tells what is recorded, to whom it concerns, however often";

/// To a destination: TLS comes first.
const ASKED: Row = Row {
    no_certificate: Refused("tls:certificate-required"),
    wrong_ca: Refused("tls:unknown-ca"),
    expired: Refused("tls:certificate-expired"),
    wrong_role: Refused("tls:access-denied"),
    unknown: OUT_OF_TURN,
    other_tenant: OUT_OF_TURN,
    replayed: OUT_OF_TURN,
    wrong_epoch: NotApplicable(NO_EPOCH),
};

/// With an order, which the gates judge.
const ORDERED: Row = Row {
    unknown: Refused("identity:host-unknown"),
    other_tenant: Refused("policy:policy-no-permit"),
    replayed: Refused("order-replayed"),
    wrong_epoch: Refused("order-stale-epoch"),
    ..ASKED
};

/// To a source, which has dialled one host and wants that and no other.
const ANSWERED: Row = Row {
    no_certificate: NotApplicable("who is dialled always shows one: TLS has no server without"),
    wrong_ca: Refused("identity-refused"),
    expired: Refused("identity-refused"),
    wrong_role: Refused("identity-refused"),
    unknown: Refused("identity-refused"),
    other_tenant: NotApplicable(OF_ITS_CONNECTION),
    replayed: OUT_OF_TURN,
    wrong_epoch: NotApplicable(NO_EPOCH),
};

impl HostVerb {
    /// Which one a message is. No wildcard: a new message has to be one.
    pub fn of(message: &Message) -> Self {
        match message {
            Message::Hello(_) => Self::Hello,
            Message::HelloReply(_) => Self::HelloReply,
            Message::Offer(_) => Self::Offer,
            Message::Refused(_) => Self::Refused,
            Message::Accepted(_) => Self::Accepted,
            Message::StreamsReady => Self::StreamsReady,
            Message::RoundReceived(_) => Self::RoundReceived,
            Message::Seal(_) => Self::Seal,
            Message::Ready(_) => Self::Ready,
            Message::Commit(_) => Self::Commit,
            Message::Running(_) => Self::Running,
            Message::Erased => Self::Erased,
            Message::Abort(_) => Self::Abort,
            Message::Discarded(_) => Self::Discarded,
            Message::Ping => Self::Ping,
            Message::Query(_) => Self::Query,
            Message::Verdict(_) => Self::Verdict,
            Message::Check(_) => Self::Check,
            Message::CheckReply(_) => Self::CheckReply,
            Message::Demand(_) => Self::Demand,
            Message::Present(_) => Self::Present,
            Message::Complete(_) => Self::Complete,
            Message::Challenge(_) => Self::Challenge,
        }
    }

    /// Who says it.
    pub fn direction(self) -> Direction {
        match self {
            Self::Hello
            | Self::Offer
            | Self::Check
            | Self::Query
            | Self::OpenStream
            | Self::Challenge
            | Self::Seal
            | Self::Commit
            | Self::Erased => Direction::ToDestination,
            Self::HelloReply
            | Self::Refused
            | Self::Accepted
            | Self::StreamsReady
            | Self::RoundReceived
            | Self::Ready
            | Self::Running
            | Self::Discarded
            | Self::Verdict
            | Self::CheckReply
            | Self::Demand
            | Self::Present
            | Self::Complete => Direction::ToSource,
            Self::Abort | Self::Ping => Direction::Both,
        }
    }

    /// What each fault comes to. No wildcard: a new verb has to say. What either may say is told as to a destination; to a
    /// source, faults of a certificate are `identity-refused` whatever is said.
    pub fn row(self) -> Row {
        match self {
            Self::Hello => Row {
                unknown: Answered(GREETING),
                other_tenant: NotApplicable(NO_OWNER),
                replayed: Answered(
                    "nothing rests on it but a nonce, and evidence is bound to the connection",
                ),
                ..ASKED
            },
            Self::Offer | Self::Check => ORDERED,
            Self::Query => Row {
                unknown: Refused("verdict-unknown"),
                other_tenant: Refused("verdict-unknown"),
                replayed: Answered(READS_ALONE),
                ..ASKED
            },
            Self::OpenStream => Row {
                unknown: Refused("closed"),
                other_tenant: Refused("closed"),
                replayed: Refused("closed"),
                ..ASKED
            },
            Self::Challenge | Self::Seal | Self::Erased | Self::Abort => ASKED,
            Self::Commit => Row {
                wrong_epoch: Refused("epoch-mismatch"),
                ..ASKED
            },
            Self::HelloReply => Row {
                replayed: Answered(
                    "nothing rests on it but a nonce, and evidence is bound to the connection",
                ),
                ..ANSWERED
            },
            Self::Refused
            | Self::Accepted
            | Self::StreamsReady
            | Self::RoundReceived
            | Self::Ready
            | Self::CheckReply
            | Self::Demand
            | Self::Present
            | Self::Complete => ANSWERED,
            Self::Discarded => Row {
                replayed: Answered(
                    "whom a VM is offered may always decline; it goes on where it is",
                ),
                ..ANSWERED
            },
            Self::Running => Row {
                wrong_epoch: Answered(
                    "by silence: the VM stays paused at the source, which asks for the record",
                ),
                ..ANSWERED
            },
            Self::Verdict => Row {
                wrong_epoch: Refused("epoch-mismatch"),
                ..ANSWERED
            },
            Self::Ping => Row {
                unknown: Answered("it says nothing"),
                other_tenant: NotApplicable(NO_OWNER),
                replayed: Answered("it says nothing"),
                ..ASKED
            },
        }
    }
}
