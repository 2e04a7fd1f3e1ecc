//! Messages and data streams of other hosts, with certificates good and bad.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use palanquin_agent::gate::HostSigner;
use palanquin_agent::gate::credentials::Credentials;
use palanquin_agent::identity::key_of_certificate;
use palanquin_agent::stream_proof::Opening;
use palanquin_agent::tls::Material;
use palanquin_agent::verbs::{Cell, Direction, Fault, HostVerb};
use palanquin_api::control::{
    DoctorReport, DoctorRequest, MigrationInfo, Outcome, Phase, StartMigration, Strategy,
};
use palanquin_engine::ids::{Challenge32, Epoch, Sha256 as WireSha256, StreamSecret, VmId};
use palanquin_engine::message::{
    Accepted, Complete, Demand, Hello, HelloReply, Offer, Present, Query, Ready, Reason, Refused,
    Seal, Verdict,
};
use palanquin_engine::strategy::PostCopyUse;
use palanquin_engine::{Message, MigrationId, Order, Root};
use palanquin_lab::control;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::{PORT, SHORT};
use palanquin_lab::trust::{DOMAIN, JudgingRig, identity};
use palanquin_lab::wait;
use palanquin_trust::{Order as SignedOrder, Sha256, Signed};
use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, RootCertStore, ServerConfig,
    ServerConnection, StreamOwned,
};
use uuid::Uuid;

use super::{Came, Wrong};

const VM: Uuid = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_0004);
const OTHER: Uuid = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_0005);
const NAME: &str = "web";
const CONTROL: &[u8] = b"palanquin-control/1";
const DATA: &[u8] = b"palanquin-data/1";

/// A certificate with its key, in files.
struct Shown {
    dir: PathBuf,
    name: &'static str,
}

type Pair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Shown {
    fn pair(&self) -> Result<Pair> {
        let file = |end: &str| self.dir.join(format!("{}.{end}", self.name));
        let chain = CertificateDer::pem_file_iter(file("pem"))?.collect::<Result<_, _>>()?;
        Ok((chain, PrivateKeyDer::from_pem_file(file("key"))?))
    }
}

/// A host's certificate whose time is over.
fn expired(judging: &JudgingRig, name: &'static str) -> Result<Shown> {
    let authority = judging.rig.dir().join("ca");
    let read = |file: &str| std::fs::read_to_string(authority.join(file));
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem")?, KeyPair::from_pem(&read("ca.key")?)?)?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![
        SanType::URI(identity("host", name).try_into()?),
        SanType::DnsName(name.to_owned().try_into()?),
    ];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    let dir = judging.rig.dir().join(format!("expired-{name}"));
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join(format!("{name}.pem")), certificate.pem())?;
    std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
    Ok(Shown { dir, name })
}

/// What is heard at the other end of a connection.
#[derive(Debug)]
enum Heard {
    Alert(AlertDescription),
    Closed,
    Messages(Vec<Message>),
}

struct Trial {
    judging: JudgingRig,
    roots: Arc<RootCertStore>,
    passports: [Vec<u8>; 2],
    /// A migration from the first host to the second, and back.
    moved: MigrationId,
    next: AtomicU8,
}

fn id(uuid: Uuid) -> MigrationId {
    MigrationId(*uuid.as_bytes())
}

impl Trial {
    fn new() -> Result<Self> {
        let judging = JudgingRig::new()?;
        let passport = judging.passport(VM, 1, "")?;
        let other = judging.passport(OTHER, 1, "")?;
        let guest = GuestSpec::small(NAME);
        judging.rig.hosts[0].boot_with(&guest, &["--passport", &passport])?;
        let moved = id(judging.rig.move_vm(NAME, 0, 1)?.id);
        judging.rig.move_vm(NAME, 1, 0)?;
        // One of another name, and one that calls itself as ours.
        let elsewhere = judging.rig.dir().join("elsewhere").display().to_string();
        let words = [
            "ca",
            "init",
            &elsewhere,
            "--trust-domain",
            "elsewhere.example",
        ];
        judging.rig.hosts[0].palanquin(&words)?.expect_status(0)?;
        judging.rig.authority("other")?;
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(judging.rig.dir().join("ca/ca.pem"))? {
            roots.add(root?)?;
        }
        let passports = [std::fs::read(passport)?, std::fs::read(other)?];
        Ok(Self {
            judging,
            roots: Arc::new(roots),
            passports,
            moved,
            next: AtomicU8::new(1),
        })
    }

    fn host(&self, index: usize) -> Shown {
        let spec = &self.judging.rig.hosts[index].spec;
        Shown {
            dir: spec.identity.clone(),
            name: ["a", "b"][index],
        }
    }

    /// A good order of that operator by that host, signed with its key.
    fn offer(&self, source: &Shown, operator: &str, vm: Uuid, epoch: u64) -> Result<Offer> {
        let passport = &self.passports[usize::from(vm == OTHER)];
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let migration = [self.next.fetch_add(1, Ordering::Relaxed); 16];
        let order = Order {
            migration: MigrationId(migration),
            vm: VmId(*vm.as_bytes()),
            vm_name: "offered".to_owned(),
            epoch: Epoch(epoch),
            source: source.name.to_owned(),
            destination: "b".to_owned(),
            expires_unix_s: now.as_secs() + 100,
            run: true,
        };
        let file = |end: &str| source.dir.join(end);
        let material = Material::load(
            &file("ca.pem"),
            &file(&format!("{}.pem", source.name)),
            &file(&format!("{}.key", source.name)),
            source.name,
        )?;
        let public = key_of_certificate(&material.chain[0])?;
        let signer = HostSigner::new(Arc::clone(&material.key), public);
        let signed = SignedOrder {
            migration: Uuid::from_bytes(migration),
            vm,
            vm_name: order.vm_name.clone(),
            epoch,
            source: identity("host", source.name).parse()?,
            destination: identity("host", "b").parse()?,
            operator: format!("spiffe://{DOMAIN}/operator/{operator}").parse()?,
            issued_unix_s: now.as_secs(),
            expires_unix_s: order.expires_unix_s,
            strategy: Strategy::Auto,
            post_copy: false,
            run: true,
            policy_sha256: Sha256::of(b"whatever"),
            passport_sha256: Sha256::of(passport),
        };
        let signed = Signed::sign(&signed, &signer)?;
        let credentials = Credentials {
            order: signed.as_bytes().to_vec().into(),
            passport: passport.clone().into(),
            approvals: Vec::new(),
            evidence: Vec::new().into(),
        };
        Ok(Offer {
            order,
            descriptor: b"{}".to_vec(),
            region_pages: vec![1024],
            streams: 1,
            digest_seed: 1,
            post_copy: PostCopyUse::No,
            credentials: credentials.to_bytes()?,
        })
    }

    /// What is shown at the handshake.
    fn shown(&self, verb: HostVerb, fault: Fault, server: bool) -> Result<Option<Shown>> {
        let name = if server { "b" } else { "a" };
        let issued = |authority: &str, kind: &str, name: &'static str| -> Result<Shown> {
            let dir = self.judging.rig.dir();
            let dir = dir.join(format!("{authority}-{kind}-{name}"));
            if !dir.exists() {
                self.judging.rig.issue(authority, kind, name)?;
            }
            Ok(Shown { dir, name })
        };
        let is_order = matches!(verb, HostVerb::Offer | HostVerb::Check);
        Ok(match fault {
            Fault::NoCertificate => None,
            Fault::WrongCa => Some(issued("elsewhere", "host", name)?),
            Fault::Expired => {
                let dir = self.judging.rig.dir().join(format!("expired-{name}"));
                Some(if dir.exists() {
                    Shown { dir, name }
                } else {
                    expired(&self.judging, name)?
                })
            }
            Fault::WrongRole => Some(issued("ca", "operator", name)?),
            Fault::Unknown => Some(issued("ca", "host", "z")?),
            // It knows itself, and has no part in what the first host has ordered.
            Fault::OtherTenant if !is_order => Some(self.host(1)),
            Fault::OtherTenant | Fault::Replayed | Fault::WrongEpoch => {
                Some(self.host(usize::from(server)))
            }
        })
    }

    /// Says all of that to the second host, and hears so many answers.
    fn say(
        &self,
        shown: Option<&Shown>,
        alpn: &[u8],
        bytes: &[u8],
        answers: usize,
    ) -> Result<Heard> {
        let address: Ipv4Addr = self.judging.rig.hosts[1].spec.address.parse()?;
        let client = &self.judging.rig.client;
        let tcp = client.inside(move || Ok(TcpStream::connect((address, PORT))?))?;
        tcp.set_read_timeout(Some(SHORT))?;
        tcp.set_write_timeout(Some(SHORT))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(Arc::clone(&self.roots));
        let mut config = match shown.map(Shown::pair).transpose()? {
            Some((chain, key)) => config.with_client_auth_cert(chain, key)?,
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        let name = ServerName::try_from("b")?;
        let mut tls = StreamOwned::new(ClientConnection::new(Arc::new(config), name)?, tcp);
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock)?;
        }
        // Whoever is refused may be so before all of this is sent.
        let sent = tls.write_all(bytes).and_then(|()| tls.flush());
        if let Some(alert) = sent.err().as_ref().and_then(alert_of) {
            return Ok(Heard::Alert(alert));
        }
        let mut messages = Vec::new();
        while messages.len() < answers {
            match receive(&mut tls) {
                Ok(message) => messages.push(message),
                Err(error) => {
                    return match (alert_of(&error), error.kind()) {
                        (Some(alert), _) => Ok(Heard::Alert(alert)),
                        (None, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
                            Ok(Heard::Closed)
                        }
                        _ => Err(error).context("another end of the connection"),
                    };
                }
            }
        }
        Ok(Heard::Messages(messages))
    }

    fn attempt(&self, verb: HostVerb, fault: Fault) -> Result<Came> {
        let shown = self.shown(verb, fault, false)?;
        let heard = match verb {
            HostVerb::OpenStream => {
                let opening = Opening::new(&StreamSecret([7; 32]), self.moved, 0, &[7; 32]);
                self.say(shown.as_ref(), DATA, &opening.encode(), 1)?
            }
            HostVerb::Hello => self.say(shown.as_ref(), CONTROL, &greeting()?, 1)?,
            verb => {
                let message = match verb {
                    HostVerb::Offer => Message::Offer(self.faulty(fault)?),
                    HostVerb::Check => Message::Check(self.faulty(fault)?),
                    verb => sample(verb, self.moved)?,
                };
                ensure!(HostVerb::of(&message) == verb);
                let mut bytes = [greeting()?, message.encode()?].concat();
                if verb == HostVerb::Ping {
                    // It is answered by nothing: that the connection goes on shows that it was heard.
                    bytes.extend(sample(HostVerb::Query, MigrationId([9; 16]))?.encode()?);
                }
                self.say(shown.as_ref(), CONTROL, &bytes, 2)?
            }
        };
        Ok(match heard {
            Heard::Alert(alert) => Came::code(&match alert {
                AlertDescription::CertificateRequired => "tls:certificate-required".to_owned(),
                AlertDescription::UnknownCA => "tls:unknown-ca".to_owned(),
                AlertDescription::CertificateExpired => "tls:certificate-expired".to_owned(),
                AlertDescription::AccessDenied => "tls:access-denied".to_owned(),
                other => format!("{other:?}"),
            }),
            Heard::Closed => Came::code("closed"),
            Heard::Messages(messages) => match messages.last().context("nothing")? {
                Message::Abort(reason) => Came::code(&reason.code),
                Message::Refused(refused) => {
                    ensure!(refused.by_gate, "{refused:?}");
                    Came::Codes(refused.blockers.iter().map(|b| b.code.clone()).collect())
                }
                Message::CheckReply(blockers) => {
                    let codes: BTreeSet<_> = blockers.iter().map(|b| b.code.clone()).collect();
                    Came::Codes(codes)
                }
                Message::Verdict(Verdict::Unknown) if verb == HostVerb::Query => {
                    Came::code("verdict-unknown")
                }
                Message::HelloReply(_) | Message::Verdict(_) => Came::Answer,
                other => bail!("another answer: {other:?}"),
            },
        })
    }

    /// An offer with that fault.
    fn faulty(&self, fault: Fault) -> Result<Offer> {
        let good = self.host(0);
        match fault {
            Fault::Unknown => {
                let stranger = self.shown(HostVerb::Offer, fault, false)?;
                self.offer(&stranger.context("it shows nothing")?, "alice", OTHER, 1)
            }
            Fault::OtherTenant => self.offer(&good, "mallory", OTHER, 1),
            Fault::WrongEpoch => self.offer(&good, "alice", VM, 1),
            Fault::Replayed => {
                let offer = self.offer(&good, "alice", OTHER, 1)?;
                let bytes = [greeting()?, Message::Offer(offer.clone()).encode()?].concat();
                // Its gates let it pass; there is only no VM that could be started.
                let first = self.say(Some(&good), CONTROL, &bytes, 2)?;
                let Heard::Messages(messages) = &first else {
                    bail!("{first:?}");
                };
                let Some(Message::Refused(refused)) = messages.last() else {
                    bail!("{first:?}");
                };
                ensure!(!refused.by_gate, "{refused:?}");
                Ok(offer)
            }
            Fault::NoCertificate | Fault::WrongCa | Fault::Expired | Fault::WrongRole => {
                self.offer(&good, "alice", OTHER, 1)
            }
        }
    }
}

/// By what alert the other end has ended the connection.
fn alert_of(error: &io::Error) -> Option<AlertDescription> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    match error {
        rustls::Error::AlertReceived(alert) => Some(*alert),
        _ => None,
    }
}

fn receive(stream: &mut impl Read) -> io::Result<Message> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let length = Message::length(prefix).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    Message::decode(&bytes).map_err(io::Error::other)
}

fn greeting() -> Result<Vec<u8>> {
    Ok(Message::Hello(Hello::ours("test", Challenge32([1; 32]))).encode()?)
}

/// One of its kind, as it might come. No wildcard: a new verb has to be tried.
fn sample(verb: HostVerb, migration: MigrationId) -> Result<Message> {
    let hello = Hello::ours("test", Challenge32([1; 32]));
    let reason = || Reason::new("test", "somebody says so");
    Ok(match verb {
        HostVerb::Hello => Message::Hello(hello),
        HostVerb::Offer | HostVerb::Check | HostVerb::OpenStream => {
            bail!("it is made for each fault")
        }
        HostVerb::Query => Message::Query(Query {
            migration,
            vm: VmId(*VM.as_bytes()),
        }),
        HostVerb::Challenge => Message::Challenge(Challenge32([2; 32])),
        HostVerb::Seal => Message::Seal(Seal {
            rounds: 1,
            device_state_bytes: 1,
            device_state_sha256: WireSha256([0; 32]),
            post_copy: false,
        }),
        HostVerb::Commit => Message::Commit(Epoch(2)),
        HostVerb::Erased => Message::Erased,
        HostVerb::HelloReply => {
            Message::HelloReply(HelloReply::to(&hello, "test", Challenge32([3; 32])))
        }
        HostVerb::Refused => Message::Refused(Refused {
            by_gate: true,
            blockers: Vec::new(),
        }),
        HostVerb::Accepted => Message::Accepted(Accepted {
            streams: 1,
            stream_secret: StreamSecret([0; 32]),
            post_copy: false,
            evidence: Vec::new(),
        }),
        HostVerb::StreamsReady => Message::StreamsReady,
        HostVerb::RoundReceived => Message::RoundReceived(1),
        HostVerb::Ready => Message::Ready(Ready {
            root: Root([0; 32]),
            evidence: Vec::new(),
        }),
        HostVerb::Running => Message::Running(Epoch(2)),
        HostVerb::Discarded => Message::Discarded(reason()),
        HostVerb::Verdict => Message::Verdict(Verdict::Discarded),
        HostVerb::CheckReply => Message::CheckReply(Vec::new()),
        HostVerb::Demand => Message::Demand(Demand { region: 0, page: 0 }),
        HostVerb::Present => Message::Present(Present {
            region: 0,
            first_page: 0,
            bits: Vec::new(),
            last: true,
        }),
        HostVerb::Complete => Message::Complete(Complete {
            root: None,
            fault_wait_log2_us: Vec::new(),
        }),
        HostVerb::Abort => Message::Abort(reason()),
        HostVerb::Ping => Message::Ping,
    })
}

#[test]
fn each_message_to_a_destination_is_refused_with_each_fault_and_its_code() -> Result<()> {
    let trial = Trial::new()?;
    let mut wrong = Wrong::default();
    let verbs = HostVerb::ALL
        .iter()
        .filter(|verb| verb.direction() != Direction::ToSource);
    for verb in verbs {
        for fault in Fault::ALL {
            let cell = verb.row().cell(*fault);
            // Within a migration: tried on the state machine, see the page.
            let inside = *verb == HostVerb::Commit && *fault == Fault::WrongEpoch;
            if !inside && !matches!(cell, Cell::NotApplicable(_)) {
                let came = trial.attempt(*verb, *fault);
                wrong.look(cell, &format!("{verb:?}, {}", fault.title()), came);
            }
        }
    }
    // An authority that only calls itself as ours signs with another key.
    let rig = &trial.judging.rig;
    let dir = rig.issue("other", "host", "a")?;
    let heard = trial.say(Some(&Shown { dir, name: "a" }), CONTROL, &greeting()?, 1)?;
    ensure!(
        matches!(heard, Heard::Alert(AlertDescription::DecryptError)),
        "{heard:?}"
    );
    ensure!(rig.hosts[1].vms()?.is_empty() && rig.hosts[1].qemus()?.is_empty());
    rig.check_lives_once(NAME, 0)?;
    wrong.end(70)
}

/// One at the second host's address that shows a certificate to whoever dials, and says one thing, until it is done. A
/// source may dial more than once: it says farewell to whom it has offered something.
fn answer(
    listener: &TcpListener,
    config: &Arc<ServerConfig>,
    bytes: &[u8],
    done: &AtomicBool,
) -> Result<()> {
    let look = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    std::thread::scope(|scope| {
        while !done.load(Ordering::Acquire) {
            if poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&look))? > 0 {
                let (tcp, _) = listener.accept()?;
                // A farewell to the one before must not hold up who dials now. How it ends the source tells.
                scope.spawn(|| drop(talk(tcp, config, bytes)));
            }
        }
        Ok(())
    })
}

fn talk(tcp: TcpStream, config: &Arc<ServerConfig>, bytes: &[u8]) -> Result<()> {
    tcp.set_read_timeout(Some(SHORT))?;
    tcp.set_write_timeout(Some(SHORT))?;
    let mut tls = StreamOwned::new(ServerConnection::new(Arc::clone(config))?, tcp);
    while tls.conn.is_handshaking() {
        tls.conn.complete_io(&mut tls.sock)?;
    }
    tls.write_all(bytes)?;
    tls.flush()?;
    // Until the source hangs up, or offers its VM: then that was an answer.
    while !matches!(receive(&mut tls)?, Message::Offer(_)) {}
    Ok(())
}

fn serve(shown: &Shown) -> Result<Arc<ServerConfig>> {
    let (chain, key) = shown.pair()?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![CONTROL.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// What a source makes of it.
fn dialled(trial: &Trial, socket: &Path, verb: HostVerb, fault: Fault) -> Result<Came> {
    if fault != Fault::Replayed {
        let request = DoctorRequest {
            to: Some("b".to_owned()),
            vm: None,
        };
        let report: DoctorReport = control::post(socket, "/v1/doctor", &request)?;
        let codes: BTreeSet<_> = report.blockers.into_iter().map(|b| b.code).collect();
        return Ok(if codes.is_empty() {
            Came::Answer
        } else {
            Came::Codes(codes)
        });
    }
    let started: MigrationInfo =
        control::post(socket, "/v1/migrations", &StartMigration::of(NAME, "b"))?;
    let host = &trial.judging.rig.hosts[0];
    let info = wait::until("the migration has ended", Duration::from_secs(60), || {
        let info = host.migration(started.id)?;
        Ok((info.phase == Phase::Done).then_some(info))
    })?;
    ensure!(info.outcome == Some(Outcome::RunningOnSource), "{info:?}");
    ensure!(info.pages_sent == 0 && info.pages_zero == 0, "{info:?}");
    let reason = info.reason.clone().unwrap_or_default();
    let out_of_turn = format!(
        "broke the protocol: it sent {} out of turn",
        verb_name(verb)?
    );
    Ok(if reason.contains(&out_of_turn) {
        Came::code("peer-misbehaved")
    } else {
        ensure!(!reason.contains("broke the protocol"), "{info:?}");
        Came::Answer
    })
}

fn verb_name(verb: HostVerb) -> Result<&'static str> {
    Ok(sample(verb, MigrationId([0; 16]))?.name())
}

#[test]
fn each_answer_of_a_destination_is_refused_with_each_fault() -> Result<()> {
    let mut trial = Trial::new()?;
    trial.judging.rig.hosts[1].stop_agent()?;
    let listener = trial.judging.rig.hosts[1].namespace.inside(|| {
        // The network process may hold it a moment longer than the agent.
        wait::until("the port is free", SHORT, || {
            Ok(TcpListener::bind(("0.0.0.0", PORT)).ok())
        })
    })?;
    let socket = trial.judging.rig.hosts[0].socket();
    let mut wrong = Wrong::default();
    let verbs = HostVerb::ALL
        .iter()
        .filter(|verb| verb.direction() != Direction::ToDestination);
    for verb in verbs {
        let both = verb.direction() == Direction::Both;
        for fault in Fault::ALL {
            // What either may say has its row as said to a destination; to a source its certificate comes first as well.
            let cell = match (both, fault) {
                (true, Fault::WrongCa | Fault::Expired | Fault::WrongRole) => {
                    Cell::Refused("identity-refused")
                }
                (true, _) => continue,
                (false, fault) => verb.row().cell(*fault),
            };
            // Those of wrong epochs are tried within a migration, on the state machine.
            if *fault == Fault::WrongEpoch || matches!(cell, Cell::NotApplicable(_)) {
                continue;
            }
            let shown = trial.shown(*verb, *fault, true)?.context("nothing")?;
            let (config, bytes) = (serve(&shown)?, sample(*verb, trial.moved)?.encode()?);
            let done = AtomicBool::new(false);
            let came = std::thread::scope(|scope| {
                let answering = scope.spawn(|| answer(&listener, &config, &bytes, &done));
                let came = dialled(&trial, &socket, *verb, *fault);
                done.store(true, Ordering::Release);
                let answered = answering.join();
                answered.map_err(|_| anyhow!("the other end panicked"))??;
                came
            });
            wrong.look(cell, &format!("{verb:?}, {}", fault.title()), came);
        }
    }
    drop(listener);
    trial.judging.rig.hosts[1].start_agent()?;
    trial.judging.rig.move_vm(NAME, 0, 1)?;
    wrong.end(60)
}
