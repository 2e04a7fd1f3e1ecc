//! What local users can ask for, over the control and the observe socket.

use std::fmt;

use super::{Cell, Row, verbs};
use Cell::{Answered, NotApplicable, Refused};

/// How it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// It changes nothing.
    Get,
    /// It may change something.
    Post,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "GET",
            Self::Post => "POST",
        })
    }
}

/// Where it can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// Only where a door looks at who comes.
    Control,
    /// Only where everybody may look.
    Observe,
    /// At both.
    Both,
}

verbs! {
    /// A request over a socket. Every route is made from one of these.
    ControlVerb {
        /// This host.
        Host,
        /// Its VMs.
        ListVms,
        /// Its migrations.
        ListMigrations,
        /// Numbers for Prometheus.
        Metrics,
        /// Migrations whenever they change.
        Events,
        /// A VM.
        ShowVm,
        /// What the gates have decided.
        ListDecisions,
        /// A migration.
        ShowMigration,
        /// A migration when it has changed.
        WatchMigration,
        /// Starts a VM.
        RunVm,
        /// Takes a running VM over.
        AdoptVm,
        /// Ends and removes a VM.
        StopVm,
        /// Gives the newest passport of a VM.
        GivePassport,
        /// Moves a VM.
        StartMigration,
        /// Ends a migration.
        AbortMigration,
        /// Decides a migration in doubt.
        ResolveMigration,
        /// What would stand in the way.
        Doctor,
        /// What hosts have promised each other.
        ListAdvertisements,
        /// Promises memory to another host.
        MakeAdvertisement,
        /// Accepts what another host promises.
        AcceptAdvertisement,
        /// Ends the quarantine of a host that advertised falsely.
        PardonHost,
    }
}

/// Code of a connection that the door of the control socket closes at once.
const TURNED_AWAY: &str = "turned-away";

const NO_DOCUMENT: &str = "no document comes with it, and for local users the kernel vouches";
const NO_EPOCH: &str = "no epoch is named over the sockets";
const MAY_LOOK: &str = "whoever may enter may look at everything";
const NO_TRACE: &str = "to ask again changes nothing";
const OWNERS_WORD: &str = "it is the owner's signature that counts, not who brings it";
const OWN_ORDER: &str = "each request makes an order of its own";
const NO_VM: &str = "it concerns no VM: whoever is an operator here may";
const NEVER_HELD: &str = "that a passport is over never holds up an abort or an erasure";

/// Everybody may ask at the observe socket, and at both only for what is there too.
const OBSERVE: Row = Row {
    no_certificate: Answered(
        "everybody on the host may observe; at the control socket: `turned-away`",
    ),
    wrong_ca: NotApplicable(NO_DOCUMENT),
    expired: NotApplicable(NO_DOCUMENT),
    wrong_role: Answered(MAY_LOOK),
    unknown: Answered(MAY_LOOK),
    other_tenant: Answered(MAY_LOOK),
    replayed: NotApplicable(NO_TRACE),
    wrong_epoch: NotApplicable(NO_EPOCH),
};

/// To look is permitted to whoever may enter.
const LOOK: Row = Row {
    no_certificate: Refused(TURNED_AWAY),
    ..OBSERVE
};

/// A VM begins here, with a passport.
const BEGIN: Row = Row {
    no_certificate: Refused(TURNED_AWAY),
    wrong_ca: Refused("key-unknown"),
    expired: Refused("passport-expired"),
    wrong_role: Refused("policy-no-permit"),
    unknown: Refused("operator-unknown"),
    other_tenant: Refused("policy-no-permit"),
    replayed: Refused("passport-not-newest"),
    wrong_epoch: NotApplicable(NO_EPOCH),
};

/// What ends something.
const END: Row = Row {
    no_certificate: Refused(TURNED_AWAY),
    wrong_ca: NotApplicable(NO_DOCUMENT),
    expired: Answered(NEVER_HELD),
    wrong_role: Refused("policy-no-permit"),
    unknown: Refused("operator-unknown"),
    other_tenant: Refused("policy-no-permit"),
    replayed: NotApplicable("what has ended ends only once"),
    wrong_epoch: NotApplicable(NO_EPOCH),
};

/// What concerns hosts, and no VM.
const HOSTS: Row = Row {
    no_certificate: Refused(TURNED_AWAY),
    wrong_ca: NotApplicable(NO_DOCUMENT),
    expired: NotApplicable(NO_DOCUMENT),
    wrong_role: Answered(NO_VM),
    unknown: Refused("operator-unknown"),
    other_tenant: Answered(NO_VM),
    replayed: NotApplicable("each request makes a promise of its own, or ends a quarantine once"),
    wrong_epoch: NotApplicable(NO_EPOCH),
};

impl ControlVerb {
    /// What each fault comes to. No wildcard: a new verb has to say.
    pub fn row(self) -> Row {
        match self {
            Self::Host | Self::ListVms | Self::ListMigrations | Self::Metrics | Self::Events => {
                OBSERVE
            }
            Self::ShowVm
            | Self::ListDecisions
            | Self::ShowMigration
            | Self::WatchMigration
            | Self::ListAdvertisements => LOOK,
            Self::RunVm | Self::AdoptVm => BEGIN,
            Self::GivePassport => Row {
                expired: Answered("it is the newest all the same, and stops moves"),
                wrong_role: Answered(OWNERS_WORD),
                other_tenant: Answered(OWNERS_WORD),
                ..BEGIN
            },
            Self::StartMigration => Row {
                replayed: NotApplicable(OWN_ORDER),
                ..BEGIN
            },
            Self::StopVm | Self::AbortMigration | Self::ResolveMigration => END,
            Self::Doctor => Row {
                wrong_ca: NotApplicable(NO_DOCUMENT),
                replayed: NotApplicable(NO_TRACE),
                ..BEGIN
            },
            Self::MakeAdvertisement | Self::PardonHost => HOSTS,
            Self::AcceptAdvertisement => Row {
                wrong_ca: Refused("certificate-refused"),
                expired: Refused("advertisement-expired"),
                replayed: Refused("advertisement-not-newest"),
                ..HOSTS
            },
        }
    }

    /// Where it can be asked for.
    pub fn socket(self) -> Socket {
        match self {
            Self::Host | Self::ListVms | Self::ListMigrations => Socket::Both,
            Self::Metrics | Self::Events => Socket::Observe,
            Self::ShowVm
            | Self::ListDecisions
            | Self::ShowMigration
            | Self::WatchMigration
            | Self::RunVm
            | Self::AdoptVm
            | Self::StopVm
            | Self::GivePassport
            | Self::StartMigration
            | Self::AbortMigration
            | Self::ResolveMigration
            | Self::Doctor
            | Self::ListAdvertisements
            | Self::MakeAdvertisement
            | Self::AcceptAdvertisement
            | Self::PardonHost => Socket::Control,
        }
    }

    /// How it is asked for.
    pub fn method(self) -> Method {
        match self {
            Self::Host
            | Self::ListVms
            | Self::ListMigrations
            | Self::Metrics
            | Self::Events
            | Self::ShowVm
            | Self::ListDecisions
            | Self::ShowMigration
            | Self::WatchMigration
            | Self::ListAdvertisements => Method::Get,
            Self::RunVm
            | Self::AdoptVm
            | Self::StopVm
            | Self::GivePassport
            | Self::StartMigration
            | Self::AbortMigration
            | Self::ResolveMigration
            | Self::Doctor
            | Self::MakeAdvertisement
            | Self::AcceptAdvertisement
            | Self::PardonHost => Method::Post,
        }
    }

    /// Its route, with `{name}` of a VM or `{id}` of a migration.
    pub fn path(self) -> &'static str {
        match self {
            Self::Host => "/v1/host",
            Self::ListVms | Self::RunVm => "/v1/vms",
            Self::ListMigrations | Self::StartMigration => "/v1/migrations",
            Self::Metrics => "/metrics",
            Self::Events => "/v1/events",
            Self::ShowVm => "/v1/vms/{name}",
            Self::ListDecisions => "/v1/decisions",
            Self::ShowMigration => "/v1/migrations/{id}",
            Self::WatchMigration => "/v1/migrations/{id}/watch",
            Self::AdoptVm => "/v1/vms/adopt",
            Self::StopVm => "/v1/vms/{name}/stop",
            Self::GivePassport => "/v1/vms/{name}/passport",
            Self::AbortMigration => "/v1/migrations/{id}/abort",
            Self::ResolveMigration => "/v1/migrations/{id}/resolve",
            Self::Doctor => "/v1/doctor",
            Self::ListAdvertisements | Self::MakeAdvertisement => "/v1/advertisements",
            Self::AcceptAdvertisement => "/v1/advertisements/accept",
            Self::PardonHost => "/v1/advertisements/pardon",
        }
    }
}
