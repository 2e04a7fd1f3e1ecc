//! The migration protocol and its scheduling, without I/O.
//!
//! Two state machines, [`Source`] and [`Destination`], have the shape of `quinn-proto`: inputs come in
//! through `handle_*` with the time as an argument, outputs are taken from [`Source::poll_action`] and
//! [`Source::poll_timeout`]. A driver executes the actions and reports how each ended. Neither machine
//! reads a clock, draws randomness, opens anything or touches a byte of guest memory: they decide which
//! *ranges* move and who may run.
//!
//! The rule that everything here serves: **at most one copy of a VM runs**. The source may resume it
//! until its commit record is durable; after that only a durable answer of the destination
//! ([`Message::Running`], [`Message::Verdict`] or [`Message::Discarded`]) decides. A broken connection decides nothing.
//!
//! ```text
//! source                                   destination
//! Hello(challenge) ───────────────────▶
//!                  ◀───────────────────    HelloReply(challenge)
//! make credentials
//! Offer            ───────────────────▶    gates judge; journal Reserved, start container, make evidence
//!                  ◀───────────────────    Accepted(evidence) | Refused
//! judge evidence
//! N data streams   ═══════════════════▶
//!                  ◀───────────────────    StreamsReady
//! rounds           ═══════════════════▶
//!                  ◀───────────────────    RoundReceived
//! Challenge        ───────────────────▶    make evidence anew, beside all else
//! pause; last pages                ═══▶
//! device state     ═══════════════════▶    load it while it arrives
//! Seal             ───────────────────▶
//!                  ◀───────────────────    Ready(root, evidence)
//! judge evidence
//! journal Committed
//! Commit           ───────────────────▶    journal Owned, resume
//!                  ◀───────────────────    Running
//! journal Released, erase
//! Erased           ───────────────────▶
//! ```
//!
//! What the hosts show each other (credentials, evidence) is bytes here: the machines say when it is made and judged, and that
//! nothing goes on without; the drivers make and judge it.
//!
//! Under post-copy the last pages are left out, and from then on:
//!
//! ```text
//!                  ◀───────────────────    Demand: a page that is waited for
//! pages            ═══════════════════▶
//!                  ◀───────────────────    Running (journal Pulling, not Owned)
//! all other pages  ═══════════════════▶    journal Activated
//!                  ◀───────────────────    Complete
//! journal Released, erase
//! ```
//!
//! After a lost connection a source that has committed sends `Query` on a new one and gets a `Verdict`.
#![forbid(unsafe_code)]

pub mod convergence;
pub mod destination;
pub mod frame;
pub mod ids;
pub mod journal;
pub mod message;
pub mod order;
pub mod pages;
pub mod progress;
pub mod source;
pub mod strategy;
pub mod time;

pub use destination::{Destination, DestinationAction, DestinationConfig};
pub use frame::{Frame, FrameError, HEADER_BYTES};
pub use ids::{Epoch, MigrationId, Root, VmId};
pub use journal::{DestinationRecord, SourceRecord};
pub use message::{Message, MessageError};
pub use order::Order;
pub use pages::{PageSet, RamLayout};
pub use source::{Source, SourceAction, SourceConfig};
pub use time::Time;
