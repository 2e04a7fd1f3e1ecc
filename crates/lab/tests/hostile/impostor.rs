//! A third host, properly enrolled, and others that are not, take part in what is not theirs.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use palanquin_agent::net::wire::{WireChannel, WireError};
use palanquin_agent::stream_proof::{Opening, exporter_context};
use palanquin_agent::tls::{Authenticated, Material, Tls};
use palanquin_engine::ids::{Challenge32, Epoch, Root, StreamSecret, VmId};
use palanquin_engine::message::{
    Complete, Demand, Hello, Offer, Query, Ready, Reason, Refused, Rejoin, Verdict,
};
use palanquin_engine::strategy::PostCopyUse;
use palanquin_engine::{Message, MigrationId, Order};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::{Host, PORT, SHORT};
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;

use crate::{agents, unharmed};

/// A slow migration takes less.
const LONG: Duration = Duration::from_secs(120);

/// Somebody in the client's namespace with a certificate, who speaks the protocol as he likes.
pub(crate) struct Impostor<'a> {
    rig: &'a Rig,
    tls: Tls,
    /// Whom he talks to.
    victim: &'a Host,
}

impl<'a> Impostor<'a> {
    pub(crate) fn new(rig: &'a Rig, victim: &'a Host, identity: &Path, name: &str) -> Result<Self> {
        let file = |end: &str| identity.join(end);
        let (certificate, key) = (file(&format!("{name}.pem")), file(&format!("{name}.key")));
        let material = Material::load(&file("ca.pem"), &certificate, &key, name)?;
        let tls = Tls::new(material.roots, material.chain, material.key)?;
        Ok(Self { rig, tls, victim })
    }

    fn tcp(&self) -> Result<TcpStream> {
        let address: Ipv4Addr = self.victim.spec.address.parse()?;
        self.rig
            .client
            .inside(move || Ok(TcpStream::connect((address, PORT))?))
    }

    pub(crate) fn connect(&self, data: bool) -> Result<Authenticated> {
        let connection = self.tls.connect(self.tcp()?, self.victim.name(), data);
        let connection = connection?;
        connection.tcp.set_read_timeout(Some(SHORT))?;
        Ok(connection)
    }

    /// A control connection that has exchanged greetings.
    fn greet(&self) -> Result<WireChannel> {
        let channel = WireChannel::new(self.connect(false)?)?;
        let hello = Hello::ours("impostor", Challenge32([9; 32]));
        channel.send(&Message::Hello(hello))?;
        let Message::HelloReply(_) = channel.receive()? else {
            bail!("no greeting");
        };
        Ok(channel)
    }

    /// What he is told for a message behind the greeting; none if he is hung up on.
    pub(crate) fn tell(&self, message: &Message) -> Result<Option<Message>> {
        let channel = self.greet()?;
        channel.send(message)?;
        match channel.receive() {
            Ok(answer) => Ok(Some(answer)),
            Err(WireError::Closed | WireError::Io(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a data stream with a secret that he has made up; whether he is hung up on.
    fn join(&self, migration: MigrationId, index: u16) -> Result<bool> {
        use std::io::{Read, Write};

        let mut stream = self.connect(true)?;
        let exporter = stream.exporter(&exporter_context(migration, index))?;
        let opening = Opening::new(&StreamSecret([7; 32]), migration, index, &exporter);
        stream.connection.writer().write_all(&opening.encode())?;
        while stream.connection.wants_write() {
            stream.connection.write_tls(&mut stream.tcp)?;
        }
        let mut answer = [0; 1];
        // An end in whatever words, but no byte of an answer.
        Ok(!matches!(stream.tcp.read(&mut answer), Ok(1..)))
    }
}

fn log_has(host: &Host, words: &[&str]) -> Result<()> {
    wait::until_true(&format!("{words:?} in the log"), SHORT, || {
        let log = fs::read_to_string(host.log())?;
        let fits = |line: &str| words.iter().all(|word| line.contains(word));
        Ok(log.lines().any(fits))
    })
    .with_context(|| host.log_tail())
}

fn offer(order: Order) -> Message {
    Message::Offer(Offer {
        order,
        descriptor: b"{}".to_vec(),
        region_pages: vec![1024],
        streams: 2,
        digest_seed: 1,
        post_copy: PostCopyUse::No,
        credentials: Vec::new(),
    })
}

fn codes(answer: Option<Message>) -> Result<Vec<String>> {
    match answer {
        Some(Message::Refused(Refused { by_gate, blockers })) => {
            ensure!(by_gate, "{blockers:?}");
            Ok(blockers.into_iter().map(|blocker| blocker.code).collect())
        }
        other => bail!("not refused: {other:?}"),
    }
}

#[test]
fn another_host_of_the_authority_can_take_no_part_in_a_running_migration() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    rig.hosts[0].boot(&GuestSpec::small("private").filled(64))?;
    let agents = agents(&rig)?;
    let identity = rig.issue("ca", "host", "c")?;
    let (running, id) = rig.begin_slow_migration("private", 0, 1)?;
    let info = rig.hosts[0].migration(id)?;
    let migration = MigrationId(*id.as_bytes());
    let vm = VmId(*info.vm_uuid.as_bytes());
    let [source, destination] = [&rig.hosts[0], &rig.hosts[1]];
    let c = Impostor::new(&rig, destination, &identity, "c")?;

    // Streams: those that are there, the one for urgent pages, and one that cannot be.
    for index in [0, 1, 2, 15, u16::MAX] {
        ensure!(c.join(migration, index)?, "stream {index} was not refused");
    }
    log_has(destination, &["host/c", "a data stream was refused"])?;
    ensure!(c.join(MigrationId([9; 16]), 0)?);
    log_has(
        destination,
        &["host/c", "a data stream for no migration was refused"],
    )?;

    // The order of the migration that runs, and others in its source's name.
    let order = Order {
        migration,
        vm,
        vm_name: "private".to_owned(),
        epoch: Epoch(info.epoch - 1),
        source: "a".to_owned(),
        destination: "b".to_owned(),
        expires_unix_s: u64::MAX,
        run: true,
    };
    let stolen = codes(c.tell(&offer(order.clone()))?)?;
    ensure!(stolen == ["order-other-source"], "{stolen:?}");
    log_has(
        destination,
        &["host/c", "an order was refused", "order-other-source"],
    )?;
    let own_name = Order {
        source: "c".to_owned(),
        ..order.clone()
    };
    let replayed = codes(c.tell(&offer(own_name))?)?;
    ensure!(replayed == ["order-replayed"], "{replayed:?}");
    let elsewhere = Order {
        migration: MigrationId([8; 16]),
        source: "c".to_owned(),
        destination: "a".to_owned(),
        ..order
    };
    let elsewhere = codes(c.tell(&offer(elsewhere))?)?;
    ensure!(elsewhere == ["order-other-destination"], "{elsewhere:?}");

    // Questions about it, and messages that belong to its session.
    let verdict = c.tell(&Message::Query(Query { migration, vm }))?;
    ensure!(
        verdict == Some(Message::Verdict(Verdict::Unknown)),
        "{verdict:?}"
    );
    log_has(
        destination,
        &["asks about a migration that is not its own", "peer=\"c\""],
    )?;
    let rejoin = Rejoin {
        streams: 2,
        stream_secret: StreamSecret([7; 32]),
    };
    for message in [
        Message::Demand(Demand { region: 0, page: 0 }),
        Message::Verdict(Verdict::Pulling(rejoin)),
        Message::Commit(Epoch(info.epoch)),
        Message::Ready(Ready {
            root: Root([0; 32]),
            evidence: Vec::new(),
        }),
        Message::Challenge(Challenge32([0; 32])),
        Message::Erased,
        Message::Abort(Reason::new("operator", "no reason")),
        Message::Complete(Complete {
            root: None,
            fault_wait_log2_us: Vec::new(),
        }),
    ] {
        let answer = c.tell(&message)?;
        let refused =
            matches!(&answer, Some(Message::Abort(reason)) if reason.code == "peer-misbehaved");
        ensure!(refused, "{}: {answer:?}", message.name());
    }
    log_has(destination, &["host/c", "the peer broke the protocol"])?;
    // The same at the source, which is nobody's destination.
    let at_source = Impostor::new(&rig, source, &identity, "c")?;
    let verdict = at_source.tell(&Message::Query(Query { migration, vm }))?;
    ensure!(
        verdict == Some(Message::Verdict(Verdict::Unknown)),
        "{verdict:?}"
    );
    ensure!(at_source.join(migration, 0)?);

    ensure!(
        rig.hosts[0].migration(id)?.outcome.is_none(),
        "it was too fast for this test"
    );
    let told = running.finish(LONG)?.expect_status(0)?;
    ensure!(told.migration()?.verified, "{told:?}");
    rig.check_lives_once("private", 1)?;
    // Of the orders that were refused nothing is kept.
    ensure!(
        destination.migrations()?.len() == 1,
        "{:?}",
        destination.migrations()?
    );
    unharmed(&rig, &agents)
}

#[test]
fn a_host_that_shows_another_certificate_at_the_destinations_address_is_refused() -> Result<()> {
    let mut rig = Rig::without_agents(&RigSpec {
        hosts: ["a", "b", "c"].map(str::to_owned).to_vec(),
        link_mbit_s: None,
    })?;
    let elsewhere = rig.hosts[2].spec.address.clone();
    rig.hosts[0].spec.peers = vec![("b".to_owned(), elsewhere)];
    for host in &mut rig.hosts {
        host.write_config()?;
        host.start_agent()?;
    }
    rig.hosts[0].boot(&GuestSpec::small("letter"))?;
    let told = rig.migrate("letter", 0, 1, &[])?.expect_status(3)?;
    ensure!(!told.error()?.message.is_empty(), "{told:?}");
    ensure!(rig.hosts[2].migrations()?.is_empty(), "{}", rig.logs());
    rig.check_lives_once("letter", 0)?;
    Ok(())
}

#[test]
fn certificates_of_another_authority_or_out_of_date_open_nothing() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let destination = &rig.hosts[1];
    rig.authority("other")?;
    // The name of a host that is welcome, from an authority that nobody knows.
    let foreign = rig.issue("other", "host", "a")?;
    fs::copy(rig.dir().join("ca/ca.pem"), foreign.join("ca.pem"))?;
    let stale = stale(&rig)?;
    for (identity, name, why) in [
        (&foreign, "a", "invalid peer certificate"),
        (&stale, "a", "certificate expired"),
    ] {
        let impostor = Impostor::new(&rig, destination, identity, name)?;
        for data in [false, true] {
            // A client counts itself as connected before it has the server's word (RFC 8446, section 4.4.2.4).
            if let Ok(connection) = impostor.connect(data) {
                let told = WireChannel::new(connection)?.receive();
                ensure!(told.is_err(), "{why}: {told:?}");
            }
        }
        log_has(destination, &["connection refused", why])?;
    }
    ensure!(destination.migrations()?.is_empty());
    Ok(())
}

/// An identity of host a by the rig's own authority that was good until yesterday.
fn stale(rig: &Rig) -> Result<std::path::PathBuf> {
    use rcgen::{CertificateParams, DnType, Issuer, KeyPair, SanType};

    let ca = rig.dir().join("ca");
    let ca_key = KeyPair::from_pem(&fs::read_to_string(ca.join("ca.key"))?)?;
    let issuer = Issuer::from_ca_cert_pem(&fs::read_to_string(ca.join("ca.pem"))?, ca_key)?;
    let good = &rig.hosts[0].spec.identity;
    let mut params = CertificateParams::new(vec!["a".to_owned()])?;
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    params.distinguished_name.push(DnType::CommonName, "a");
    let identity = Material::load(
        &good.join("ca.pem"),
        &good.join("a.pem"),
        &good.join("a.key"),
        "a",
    )?
    .identity;
    params
        .subject_alt_names
        .push(SanType::URI(identity.to_string().try_into()?));
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2020, 2, 1);
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    let dir = rig.dir().join("stale");
    fs::create_dir_all(&dir)?;
    fs::copy(good.join("ca.pem"), dir.join("ca.pem"))?;
    fs::write(dir.join("a.pem"), certificate.pem())?;
    fs::write(dir.join("a.key"), key.serialize_pem())?;
    Ok(dir)
}
