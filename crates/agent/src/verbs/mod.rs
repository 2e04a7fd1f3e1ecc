//! What can be asked of an agent, and what each credential fault comes to: the matrix of refusals.
//!
//! Both kinds of verbs are listed here and nowhere else: requests over the sockets ([`ControlVerb`], of which the router is
//! made) and messages of other hosts ([`HostVerb`], into which every message is sorted). Each has a [`Row`], by a `match`
//! without a wildcard: a verb without one does not compile. `crates/lab/tests/verbs` tries each cell on real agents, and
//! [`document`] is `docs/refusals.md`.

mod control;
mod hosts;

pub use self::control::{ControlVerb, Method, Socket};
pub use self::hosts::{Direction, HostVerb};

use std::fmt::Write as _;

/// An enumeration that knows all of its members.
macro_rules! verbs {
    ($(#[$outer:meta])* $name:ident { $($(#[$meta:meta])* $verb:ident,)* }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$meta])* $verb,)* }

        impl $name {
            /// All of them, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$verb,)*];
        }
    };
}
use verbs;

verbs! {
    /// What can be wrong with who asks, or with what is shown.
    Fault {
        /// Nothing says who asks: no certificate, or a local user whom the configuration does not name.
        NoCertificate,
        /// What is shown is signed by nobody who is believed here.
        WrongCa,
        /// It was good, and is over.
        Expired,
        /// It is somebody's of another kind, or whose role does not permit it.
        WrongRole,
        /// It is of the right kind, and nobody here knows whose.
        Unknown,
        /// Somebody known and permitted much, for what belongs to others.
        OtherTenant,
        /// It was used before, or was made for another connection.
        Replayed,
        /// It is of an epoch that is over, or was never ordered.
        WrongEpoch,
    }
}

impl Fault {
    /// As the table calls it.
    pub fn title(self) -> &'static str {
        match self {
            Self::NoCertificate => "no certificate",
            Self::WrongCa => "wrong authority",
            Self::Expired => "expired",
            Self::WrongRole => "wrong role",
            Self::Unknown => "unknown here",
            Self::OtherTenant => "other tenant",
            Self::Replayed => "replayed",
            Self::WrongEpoch => "wrong epoch",
        }
    }
}

/// What a fault comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Refused, with this code.
    Refused(&'static str),
    /// It is answered all the same, because of this.
    Answered(&'static str),
    /// There is no such fault, because of this.
    NotApplicable(&'static str),
}

/// What every fault comes to for one verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// See [`Fault::NoCertificate`].
    pub no_certificate: Cell,
    /// See [`Fault::WrongCa`].
    pub wrong_ca: Cell,
    /// See [`Fault::Expired`].
    pub expired: Cell,
    /// See [`Fault::WrongRole`].
    pub wrong_role: Cell,
    /// See [`Fault::Unknown`].
    pub unknown: Cell,
    /// See [`Fault::OtherTenant`].
    pub other_tenant: Cell,
    /// See [`Fault::Replayed`].
    pub replayed: Cell,
    /// See [`Fault::WrongEpoch`].
    pub wrong_epoch: Cell,
}

impl Row {
    /// What this fault comes to.
    pub fn cell(&self, fault: Fault) -> Cell {
        match fault {
            Fault::NoCertificate => self.no_certificate,
            Fault::WrongCa => self.wrong_ca,
            Fault::Expired => self.expired,
            Fault::WrongRole => self.wrong_role,
            Fault::Unknown => self.unknown,
            Fault::OtherTenant => self.other_tenant,
            Fault::Replayed => self.replayed,
            Fault::WrongEpoch => self.wrong_epoch,
        }
    }
}

const HEAD: &str = "# Refusals

Generated from `crates/agent/src/verbs`; a test of `palanquin-agent` fails when this page is stale, and writes it anew with
`PALANQUIN_WRITE_DOCS=1`. `crates/lab/tests/verbs` tries each cell on real agents; those of wrong epochs within a migration are
tried in `crates/engine/tests` (`attesting.rs`, `mute_destination.rs`) on the state machines that decide them. A verb without
a row does not compile.

A code in a cell is the refusal: over the sockets the code of a blocker; between hosts `tls:` and the alert of TLS (RFC 8446,
section 6.2) that ends the handshake, or the code of the message that answers; `closed` is a connection that is closed without
a word. *answered* means that the fault is let pass on purpose, `-` that there is no such fault; why is below each table.

| fault | over the sockets | between hosts |
|---|---|---|
| no certificate | a local user who is neither root, nor the agent's own, nor under `[trust.operators]` | no certificate in the handshake |
| wrong authority | a passport or approval signed with a key that nobody here knows | a certificate of another authority; of one that has the name of ours and another key: `tls:decrypt-error` |
| expired | the VM's passport is over | a certificate whose time is over |
| wrong role | an operator whose role no policy permits it | an operator's certificate in place of a host's |
| unknown here | root, who is no operator here | a host's certificate, and the host is in no `directory.toml`; to a source: of another host than it dialled |
| other tenant | an operator who works for another owner | an order of such an operator; another host's migration |
| replayed | a passport older than one seen | an order or message sent before, on another connection |
| wrong epoch | | an order or message with another epoch than that of the VM, or of the order |
";

fn table(title: &str, rows: &[(String, Row)]) -> String {
    let mut text = format!("\n## {title}\n\n| verb |");
    for fault in Fault::ALL {
        let _ = write!(text, " {} |", fault.title());
    }
    text.push_str("\n|---|");
    text.push_str(&"---|".repeat(Fault::ALL.len()));
    text.push('\n');
    let mut notes: Vec<&str> = Vec::new();
    for (verb, row) in rows {
        let _ = write!(text, "| {verb} |");
        for fault in Fault::ALL {
            let (shown, why) = match row.cell(*fault) {
                Cell::Refused(code) => (format!("`{code}`"), None),
                Cell::Answered(why) => ("*answered*".to_owned(), Some(why)),
                Cell::NotApplicable(why) => ("-".to_owned(), Some(why)),
            };
            let note = why.map(|why| {
                let known = notes.iter().position(|note| *note == why);
                known.unwrap_or_else(|| {
                    notes.push(why);
                    notes.len() - 1
                }) + 1
            });
            let note = note.map_or_else(String::new, |note| format!(" ({note})"));
            let _ = write!(text, " {shown}{note} |");
        }
        text.push('\n');
    }
    text.push('\n');
    for (at, note) in notes.iter().enumerate() {
        let _ = writeln!(text, "{}. {note}", at + 1);
    }
    text
}

/// The matrix as a page in Markdown.
pub fn document() -> String {
    let control = |socket: Socket| -> Vec<(String, Row)> {
        let verbs = ControlVerb::ALL
            .iter()
            .filter(|verb| verb.socket() == socket);
        verbs
            .map(|verb| (format!("`{} {}`", verb.method(), verb.path()), verb.row()))
            .collect()
    };
    let hosts = |direction: Direction| -> Vec<(String, Row)> {
        let verbs = HostVerb::ALL
            .iter()
            .filter(|verb| verb.direction() == direction);
        verbs
            .map(|verb| (format!("`{verb:?}`"), verb.row()))
            .collect()
    };
    let tables = [
        table("The control socket", &control(Socket::Control)),
        table("The control and the observe socket", &control(Socket::Both)),
        table("The observe socket", &control(Socket::Observe)),
        table(
            "From a source to a destination",
            &hosts(Direction::ToDestination),
        ),
        table(
            "From a destination to a source",
            &hosts(Direction::ToSource),
        ),
        table("From either to the other", &hosts(Direction::Both)),
    ];
    format!("{HEAD}{}", tables.concat())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_page_of_refusals_says_what_the_code_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/refusals.md");
        let (says, must) = (
            std::fs::read_to_string(&path).unwrap_or_default(),
            document(),
        );
        if std::env::var_os("PALANQUIN_WRITE_DOCS").is_some() {
            std::fs::write(&path, must).unwrap();
        } else {
            assert!(
                says == must,
                "docs/refusals.md is stale: PALANQUIN_WRITE_DOCS=1 cargo test -p palanquin-agent --lib page_of_refusals"
            );
        }
    }

    #[test]
    fn no_two_verbs_are_asked_for_in_the_same_way() {
        let ways: HashSet<_> = ControlVerb::ALL
            .iter()
            .map(|verb| (verb.method(), verb.path()))
            .collect();
        assert_eq!(ways.len(), ControlVerb::ALL.len());
    }

    #[test]
    fn whatever_changes_something_is_refused_to_whoever_is_not_known() {
        for verb in ControlVerb::ALL {
            let row = verb.row();
            let is_guarded = matches!(row.no_certificate, Cell::Refused(_));
            assert_eq!(is_guarded, verb.socket() == Socket::Control, "{verb:?}");
            if verb.method() == Method::Post {
                assert!(matches!(row.unknown, Cell::Refused(_)), "{verb:?}");
            }
        }
        for verb in HostVerb::ALL {
            let row = verb.row();
            for cell in [row.wrong_ca, row.expired, row.wrong_role] {
                assert!(matches!(cell, Cell::Refused(_)), "{verb:?}");
            }
        }
    }
}
