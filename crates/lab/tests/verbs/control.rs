//! Requests over the sockets, as local users whom the kernel vouches for.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use palanquin_agent::verbs::{Cell, ControlVerb, Fault, Method, Socket};
use palanquin_api::advertisement::{AcceptAdvertisement, MakeAdvertisement, PardonHost};
use palanquin_api::control::{
    AdoptVm, ApiError, DoctorReport, DoctorRequest, GivePassport, MigrationInfo, OperatorAssertion,
    Phase, ResolveMigration, RunVm, StartMigration,
};
use palanquin_api::hex::Hex;
use palanquin_api::vm_spec::VmSpec;
use palanquin_lab::control::{self, Answer};
use palanquin_lab::fail_point::Mode;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::SHORT;
use palanquin_lab::trust::{JudgingRig, identity};
use palanquin_lab::wait;
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;
use serde::Serialize;
use uuid::Uuid;

use super::forger::Forger;
use super::{Came, Wrong};

const VM: Uuid = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_0003);
const NAME: &str = "web";
/// Local users: three operators, somebody who is nobody here, and root, who is no operator.
const ALICE: u32 = 4000;
const MALLORY: u32 = 4001;
const BOB: u32 = 4002;
const STRANGER: u32 = 4003;
const ROOT: u32 = 0;

/// Documents, good and bad.
struct Papers {
    old: Vec<u8>,
    newest: Vec<u8>,
    unknown: Vec<u8>,
    over: Vec<u8>,
    unknown_approval: Vec<u8>,
    /// With the other host's key, and with one by an authority of nobody's.
    host: Forger,
    foreign: Forger,
}

struct Trial {
    judging: JudgingRig,
    papers: Papers,
    /// A migration that has ended, and one in doubt.
    ended: Uuid,
    doubtful: Option<Uuid>,
}

impl Trial {
    fn new() -> Result<Self> {
        let mut judging = JudgingRig::new()?;
        let read = |path: String| fs::read(&path).with_context(|| path.clone());
        let old = judging.passport(VM, 1, "")?;
        let newest = judging.passport(VM, 2, "")?;
        let owner = judging.rig.dir().join("keys");
        let over = judging.passport_by(&owner, VM, 3, "2021-01-01", "")?;
        let stranger = judging.unknown_owner()?;
        let unknown = judging.passport_by(&stranger, VM, 4, "2100-01-01", "")?;
        let eve = judging.rig.issue("ca", "operator", "eve")?;
        let approval = judging.approval_by("eve", &eve, VM, 0, 1)?;
        judging.rig.authority("other")?;
        let foreign = judging.rig.issue("other", "host", "b")?;
        let papers = Papers {
            host: Forger::new(&judging.rig.hosts[1].spec.identity, "b")?,
            foreign: Forger::new(&foreign, "b")?,
            old: read(old)?,
            unknown: read(unknown)?,
            over: read(over)?,
            unknown_approval: read(approval)?,
            newest: read(newest.clone())?,
        };
        let guest = GuestSpec::small(NAME);
        judging.rig.hosts[0].boot_with(&guest, &["--passport", &newest])?;
        let ended = judging.rig.move_vm(NAME, 0, 1)?.id;
        judging.rig.move_vm(NAME, 1, 0)?;
        // From now on root is no operator.
        let host = &mut judging.rig.hosts[0];
        let trust = host.spec.trust.as_mut().context("no trust")?;
        let users = [(ALICE, "alice"), (MALLORY, "mallory"), (BOB, "bob")]
            .map(|(uid, name)| format!("{uid} = {:?}\n", identity("operator", name)));
        let root = format!("root = {:?}\n", identity("operator", "alice"));
        ensure!(trust.contains(&root), "{trust}");
        *trust = trust.replace(&root, &users.concat());
        host.write_config()?;
        host.stop_agent()?;
        host.start_agent()?;
        fs::set_permissions(judging.rig.dir(), fs::Permissions::from_mode(0o711))?;
        Ok(Self {
            judging,
            papers,
            ended,
            doubtful: None,
        })
    }

    fn socket(&self, verb: ControlVerb, fault: Fault) -> PathBuf {
        let host = &self.judging.rig.hosts[0];
        match (verb.socket(), fault) {
            (Socket::Observe, _) | (Socket::Both, Fault::NoCertificate) => host.observe_socket(),
            _ => host.socket(),
        }
    }

    fn user(fault: Fault) -> u32 {
        match fault {
            Fault::NoCertificate => STRANGER,
            Fault::WrongRole => BOB,
            Fault::Unknown => ROOT,
            Fault::OtherTenant => MALLORY,
            Fault::WrongCa | Fault::Expired | Fault::Replayed | Fault::WrongEpoch => ALICE,
        }
    }

    fn passport(&self, fault: Fault) -> Hex {
        Hex(match fault {
            Fault::WrongCa => self.papers.unknown.clone(),
            Fault::Expired => self.papers.over.clone(),
            Fault::Replayed => self.papers.old.clone(),
            _ => self.papers.newest.clone(),
        })
    }

    fn advertisement(&self, fault: Fault) -> Result<Hex> {
        let forger = match fault {
            Fault::WrongCa => &self.papers.foreign,
            _ => &self.papers.host,
        };
        let parcel = forger.parcel(|says| match fault {
            Fault::Expired => {
                says.issued_unix_s -= 1000;
                says.expires_unix_s -= 1000;
            }
            Fault::Replayed => says.sequence -= 5000,
            // Each newer than the one before.
            other => says.sequence += other as u64,
        })?;
        Ok(Hex(parcel.to_bytes()?))
    }

    /// What is asked for. No wildcard: a new verb has to be tried.
    fn body(&self, verb: ControlVerb, fault: Fault) -> Result<Vec<u8>> {
        let json = |value: &dyn erased::Json| value.json();
        match verb {
            ControlVerb::Host
            | ControlVerb::ListVms
            | ControlVerb::ListMigrations
            | ControlVerb::Metrics
            | ControlVerb::Events
            | ControlVerb::ShowVm
            | ControlVerb::ListDecisions
            | ControlVerb::ShowMigration
            | ControlVerb::WatchMigration
            | ControlVerb::StopVm
            | ControlVerb::AbortMigration
            | ControlVerb::ListAdvertisements => Ok(Vec::new()),
            ControlVerb::RunVm => json(&RunVm {
                spec: VmSpec::from_toml(&GuestSpec::small("another").to_toml()?)?,
                passport: Some(self.passport(fault)),
            }),
            ControlVerb::AdoptVm => json(&AdoptVm {
                name: "another".to_owned(),
                pid: 1,
                qmp: "/none".to_owned(),
                passport: Some(self.passport(fault)),
            }),
            ControlVerb::GivePassport => json(&GivePassport {
                passport: self.passport(fault),
            }),
            ControlVerb::StartMigration => {
                let approvals = match fault {
                    Fault::WrongCa => vec![Hex(self.papers.unknown_approval.clone())],
                    _ => Vec::new(),
                };
                json(&StartMigration {
                    approvals,
                    ..StartMigration::of(NAME, "b")
                })
            }
            ControlVerb::ResolveMigration => json(&ResolveMigration {
                assert: Some(OperatorAssertion::DestinationLostIt),
            }),
            ControlVerb::Doctor => json(&DoctorRequest {
                to: Some("b".to_owned()),
                vm: Some(NAME.to_owned()),
            }),
            ControlVerb::MakeAdvertisement => json(&MakeAdvertisement {
                audience: "b".to_owned(),
                memory_bytes: Some(1 << 20),
                lifetime_s: 60,
            }),
            ControlVerb::AcceptAdvertisement => json(&AcceptAdvertisement {
                parcel: self.advertisement(fault)?,
            }),
            ControlVerb::PardonHost => json(&PardonHost {
                host: "b".to_owned(),
            }),
        }
    }

    fn attempt(&self, verb: ControlVerb, fault: Fault) -> Result<Came> {
        let id = match verb {
            ControlVerb::ResolveMigration => self.doubtful.context("nothing is in doubt")?,
            _ => self.ended,
        };
        let path = verb
            .path()
            .replace("{name}", NAME)
            .replace("{id}", &id.to_string());
        let socket = self.socket(verb, fault);
        let (uid, body) = (Self::user(fault), self.body(verb, fault)?);
        let method = verb.method().to_string();
        let answer = match verb {
            ControlVerb::Events => as_user(uid, move || status(&socket, &path))?,
            _ => as_user(uid, move || {
                control::request(&socket, &method, &path, &body)
            })?,
        };
        match answer {
            Err(error) => {
                // The door closes without a word.
                let log = fs::read_to_string(self.judging.rig.hosts[0].log())?;
                let away = format!("who may not control was turned away uid={uid}");
                if log.contains(&away) {
                    Ok(Came::code("turned-away"))
                } else {
                    Err(error)
                }
            }
            Ok(answer) if verb == ControlVerb::Doctor && answer.status == 200 => {
                let report: DoctorReport = serde_json::from_slice(&answer.body)?;
                let gates = report.blockers.into_iter().filter(|b| b.gate.is_some());
                let codes: std::collections::BTreeSet<_> = gates.map(|b| b.code).collect();
                Ok(if codes.is_empty() {
                    Came::Answer
                } else {
                    Came::Codes(codes)
                })
            }
            Ok(answer) if answer.status == 200 => Ok(Came::Answer),
            // There is nothing to pardon: so far it came.
            Ok(answer) if verb == ControlVerb::PardonHost && answer.status == 404 => {
                Ok(Came::Answer)
            }
            Ok(answer) => {
                let error: ApiError = serde_json::from_slice(&answer.body)?;
                ensure!(!error.blockers.is_empty(), "{error:?}");
                Ok(Came::Codes(
                    error.blockers.into_iter().map(|b| b.code).collect(),
                ))
            }
        }
    }

    fn look(&self, wrong: &mut Wrong, verb: ControlVerb, fault: Fault) {
        let cell = verb.row().cell(fault);
        if !matches!(cell, Cell::NotApplicable(_)) {
            let came = self.attempt(verb, fault);
            wrong.look(cell, &format!("{verb:?}, {}", fault.title()), came);
        }
    }

    /// Moves the VM, and kills the other agent when it has heard the commit.
    fn come_into_doubt(&mut self) -> Result<()> {
        let hosts = &mut self.judging.rig.hosts;
        hosts[1].arm("destination-received-Commit", Mode::Kill)?;
        let socket = hosts[0].socket();
        let body = serde_json::to_vec(&StartMigration::of(NAME, "b"))?;
        let answer = as_user(ALICE, move || {
            control::request(&socket, "POST", "/v1/migrations", &body)
        })??;
        ensure!(answer.status == 200, "{answer:?}");
        let info: MigrationInfo = serde_json::from_slice(&answer.body)?;
        hosts[1].wait_agent_died(SHORT)?;
        hosts[1].release("destination-received-Commit")?;
        wait::until_true("the migration is in doubt", SHORT, || {
            Ok(hosts[0].migration(info.id)?.phase == Phase::InDoubt)
        })?;
        self.doubtful = Some(info.id);
        Ok(())
    }
}

mod erased {
    //! What can be written as JSON, whatever it is.
    use anyhow::Result;

    pub(super) trait Json {
        fn json(&self) -> Result<Vec<u8>>;
    }

    impl<T: super::Serialize> Json for T {
        fn json(&self) -> Result<Vec<u8>> {
            Ok(serde_json::to_vec(self)?)
        }
    }
}

/// Does something on a thread that is another user, as the kernel tells whom it connects to.
fn as_user<T: Send + 'static>(uid: u32, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let thread = std::thread::spawn(move || {
        if uid != ROOT {
            // Of this thread alone, which ends with it.
            set_thread_res_uid(None::<Uid>, Some(Uid::from_raw(uid)), None::<Uid>)?;
        }
        Ok::<T, anyhow::Error>(work())
    });
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

/// Status of an answer that does not end.
fn status(socket: &Path, path: &str) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SHORT))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes())?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let head = String::from_utf8_lossy(&head).into_owned();
    let Some(status) = head.strip_prefix("HTTP/1.1 ") else {
        bail!("not HTTP: {head:?}");
    };
    Ok(Answer {
        status: status.parse()?,
        body: Vec::new(),
    })
}

#[test]
fn each_request_over_a_socket_refuses_each_fault_with_its_code() -> Result<()> {
    let mut trial = Trial::new()?;
    let mut wrong = Wrong::default();
    let doubtful = |verb: ControlVerb| verb == ControlVerb::ResolveMigration;
    for verb in ControlVerb::ALL.iter().filter(|verb| !doubtful(**verb)) {
        for fault in Fault::ALL.iter().filter(|fault| **fault != Fault::Expired) {
            trial.look(&mut wrong, *verb, *fault);
        }
    }
    // The VM is where it was, whoever tried what.
    trial.judging.rig.check_lives_once(NAME, 0)?;
    trial.come_into_doubt()?;
    for fault in Fault::ALL.iter().filter(|fault| **fault != Fault::Expired) {
        trial.look(&mut wrong, ControlVerb::ResolveMigration, *fault);
    }
    let doubt = trial.doubtful.context("nothing is in doubt")?;
    let info = trial.judging.rig.hosts[0].migration(doubt)?;
    ensure!(info.phase == Phase::InDoubt, "{info:?}");
    // From here on the newest passport is over; who resolves takes the VM back, and who stops it ends it.
    trial.look(&mut wrong, ControlVerb::GivePassport, Fault::Expired);
    trial.look(&mut wrong, ControlVerb::ResolveMigration, Fault::Expired);
    trial.judging.rig.hosts[1].start_agent()?;
    trial.judging.rig.check_lives_once(NAME, 0)?;
    let last = |verb: ControlVerb| verb == ControlVerb::StopVm;
    let done = |verb: ControlVerb| doubtful(verb) || verb == ControlVerb::GivePassport;
    for verb in ControlVerb::ALL
        .iter()
        .filter(|verb| !last(**verb) && !done(**verb))
    {
        trial.look(&mut wrong, *verb, Fault::Expired);
    }
    trial.look(&mut wrong, ControlVerb::StopVm, Fault::Expired);
    let hosts = &trial.judging.rig.hosts;
    ensure!(hosts[0].vms()?.is_empty() && hosts[0].qemus()?.is_empty());
    wrong.end(70)
}

#[test]
fn nothing_that_changes_something_is_found_at_the_observe_socket() -> Result<()> {
    let judging = JudgingRig::new()?;
    let socket = judging.rig.hosts[0].observe_socket();
    for verb in ControlVerb::ALL {
        let path = verb.path().replace("{name}", NAME);
        let path = path.replace("{id}", &Uuid::nil().to_string());
        let is_there = match verb {
            ControlVerb::Events => status(&socket, &path)?.status,
            verb => control::request(&socket, &verb.method().to_string(), &path, b"")?.status,
        } == 200;
        let expected = verb.socket() != Socket::Control && verb.method() == Method::Get;
        ensure!(is_there == expected, "{verb:?}");
    }
    Ok(())
}
