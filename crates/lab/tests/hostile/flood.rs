//! Strangers, and a host that is enrolled, who want to use up what an agent has: threads, memory, descriptors, time.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use palanquin_api::control::MigrationInfo;
use palanquin_engine::ids::{Epoch, VmId};
use palanquin_engine::message::{MESSAGE_MAX, Offer};
use palanquin_engine::strategy::PostCopyUse;
use palanquin_engine::{Message, MigrationId, Order};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::{Host, PORT, SHORT};
use palanquin_lab::network::Namespace;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Resource, getrlimit, setrlimit};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::impostor::Impostor;
use crate::{Agent, agents, rss_kib, threads, unharmed};

/// Half-open connections.
const MANY: usize = 10_000;
/// Addresses that they come from.
const ADDRESSES: u8 = 20;
/// New ones each second once all stand.
const PER_SECOND: u32 = 1000;
/// The agent's default `limits.max-pending` and `limits.max-pending-per-address`.
const PENDING: u64 = 256;
const PENDING_OF_ONE: u64 = 64;
/// Threads of a migration.
const OTHER_THREADS: u64 = 40;
/// Most threads in all: those of connections that were closed need a moment to end.
const THREADS: u64 = 4 * PENDING + OTHER_THREADS;
/// Most threads for one host that fills all of its places: one for each connection, and for control connections one more,
/// which is the privileged process's.
const THREADS_OF_HOST: u64 = 2 * PENDING_OF_ONE + OTHER_THREADS;
/// Most memory that they may cost.
const MEMORY_KIB: u64 = 64 << 10;
/// The agent's deadline for a handshake, and a busy machine.
const HANDSHAKE: Duration = Duration::from_secs(10 + 8);

fn address_of(host: &Host) -> Result<SocketAddr> {
    let address: Ipv4Addr = host.spec.address.parse()?;
    Ok((address, PORT).into())
}

/// Looks at an agent again and again.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u64, u64)>>,
    threads: u64,
    rss_kib: u64,
}

impl Watch {
    fn start(agent: Agent) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let (now_threads, now_rss) = (threads(agent)?, rss_kib(agent)?);
        let thread = std::thread::spawn(move || {
            let mut most = (0, 0);
            while !seen.load(Ordering::Relaxed) {
                most = (most.0.max(threads(agent)?), most.1.max(rss_kib(agent)?));
                wait::pause(Duration::from_millis(5))?;
            }
            Ok(most)
        });
        Ok(Self {
            stop,
            thread,
            threads: now_threads,
            rss_kib: now_rss,
        })
    }

    /// The most threads and KiB more than at the start.
    fn finish(self) -> Result<(u64, u64)> {
        self.stop.store(true, Ordering::Relaxed);
        let most = self.thread.join();
        let (threads, rss) = most.map_err(|_| anyhow::anyhow!("the watch panicked"))??;
        let more = (
            threads.saturating_sub(self.threads),
            rss.saturating_sub(self.rss_kib),
        );
        println!(
            "threads {} and at most {} more, RSS {} KiB and at most {} KiB more",
            self.threads, more.0, self.rss_kib, more.1
        );
        Ok(more)
    }
}

/// Connections that say nothing, from many addresses: first all of them, then new ones in place of the oldest.
struct Flood {
    stop: Arc<AtomicBool>,
    opened: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Flood {
    fn start(from: &Namespace, to: SocketAddr) -> Result<Self> {
        allow_open_files()?;
        for number in 1..=ADDRESSES {
            from.ip(&[
                "address",
                "replace",
                &format!("10.77.3.{number}/16"),
                "dev",
                "eth0",
            ])?;
        }
        let (stop, opened) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (seen, count) = (Arc::clone(&stop), Arc::clone(&opened));
        let thread = from.spawn(move || {
            let mut held: VecDeque<OwnedFd> = VecDeque::new();
            while !seen.load(Ordering::Relaxed) {
                let number = count.load(Ordering::Relaxed);
                let host = u8::try_from(number % u64::from(ADDRESSES))? + 1;
                let own = SocketAddr::from((Ipv4Addr::new(10, 77, 3, host), 0));
                held.push_back(silent(own, to)?);
                count.store(number + 1, Ordering::Relaxed);
                if held.len() > MANY {
                    held.pop_front();
                    wait::pause(Duration::from_secs(1) / PER_SECOND)?;
                }
            }
            Ok(())
        })?;
        Ok(Self {
            stop,
            opened,
            thread,
        })
    }

    fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    fn await_all(&self) -> Result<()> {
        wait::until_true("all connections stand", SHORT, || {
            if self.thread.is_finished() {
                bail!("the flood has ended");
            }
            Ok(self.opened() >= MANY as u64)
        })
    }

    fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let opened = Arc::clone(&self.opened);
        let ended = self.thread.join();
        ended.map_err(|_| anyhow::anyhow!("the flood panicked"))??;
        Ok(opened.load(Ordering::Relaxed))
    }
}

fn silent(own: SocketAddr, to: SocketAddr) -> Result<OwnedFd> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    rustix::net::bind(&socket, &own)?;
    rustix::net::connect(&socket, &to)?;
    Ok(socket)
}

fn allow_open_files() -> Result<()> {
    let wanted = MANY as u64 * 2;
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|now| now < wanted) {
        limit.current = Some(wanted);
        limit.maximum = limit.maximum.map(|most| most.max(wanted));
        setrlimit(Resource::Nofile, limit).context("20,000 open files are needed")?;
    }
    Ok(())
}

fn with_guest(mib: u64) -> Result<Rig> {
    let rig = Rig::new(&RigSpec::default())?;
    rig.hosts[0].boot(&GuestSpec::small("calm").filled(mib))?;
    Ok(rig)
}

/// The threads of an agent are as few as before.
fn recovered(agent: Agent, before: u64) -> Result<()> {
    wait::until_true("the threads have ended", HANDSHAKE, || {
        Ok(threads(agent)? <= before + 3)
    })
    .with_context(|| format!("{before} threads before, {:?} now", threads(agent)))
}

#[test]
fn ten_thousand_half_open_connections_take_bounded_memory_and_no_migration() -> Result<()> {
    let rig = with_guest(32)?;
    let agents = agents(&rig)?;
    let before = threads(agents[1])?;
    // The first migration warms up what every migration needs.
    rig.move_vm("calm", 0, 1)?;
    rig.move_vm("calm", 1, 0)?;
    let watch = Watch::start(agents[1])?;
    let flood = Flood::start(&rig.client, address_of(&rig.hosts[1])?)?;
    flood.await_all()?;
    for (from, to) in [(0, 1), (1, 0)] {
        rig.move_vm("calm", from, to)?;
    }
    let opened = flood.finish()?;
    let (more_threads, more_kib) = watch.finish()?;
    ensure!(opened > MANY as u64, "{opened}");
    ensure!(more_threads <= THREADS, "{more_threads}");
    ensure!(more_kib <= MEMORY_KIB, "{more_kib}");
    recovered(agents[1], before)?;
    // Thousands were closed, and the log says so in a few lines.
    let log = std::fs::read_to_string(rig.hosts[1].log())?;
    ensure!(log.contains("too many connections"), "{}", rig.logs());
    ensure!(log.lines().count() < 300, "{} lines", log.lines().count());
    unharmed(&rig, &agents)
}

#[test]
fn whoever_sends_a_byte_each_second_is_cut_at_the_deadline() -> Result<()> {
    let rig = with_guest(16)?;
    let agents = agents(&rig)?;
    let (agent, to) = (agents[1], address_of(&rig.hosts[1])?);
    let watch = Watch::start(agent)?;
    let slow = rig.client.spawn(move || {
        let began = Instant::now();
        // The beginning of a ClientHello of 255 bytes.
        let hello = [&[22, 3, 1, 1, 3, 1, 0, 0, 255, 3, 3][..], &[0; 64]].concat();
        let mut all = Vec::new();
        for _ in 0..50 {
            let stream = TcpStream::connect(to)?;
            stream.set_nonblocking(true)?;
            all.push(stream);
        }
        for byte in hello {
            for stream in &mut all {
                // Cut already, perhaps.
                let _ = stream.write(&[byte]);
            }
            all.retain(|stream| {
                let mut answer = [0; 1];
                let read = (&*stream).read(&mut answer);
                matches!(read, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
            });
            if all.is_empty() {
                return Ok(began.elapsed());
            }
            wait::pause(Duration::from_secs(1))?;
        }
        bail!(
            "{} were still welcome after {:?}",
            all.len(),
            began.elapsed()
        )
    })?;
    rig.move_vm("calm", 0, 1)?;
    let ended = slow.join().map_err(|_| anyhow::anyhow!("panicked"))??;
    ensure!(
        ended > Duration::from_secs(8) && ended < HANDSHAKE,
        "{ended:?}"
    );
    let (more_threads, more_kib) = watch.finish()?;
    ensure!(
        more_threads <= PENDING_OF_ONE + OTHER_THREADS,
        "{more_threads}"
    );
    ensure!(more_kib <= MEMORY_KIB, "{more_kib}");
    unharmed(&rig, &agents)
}

/// Whether a stream ends, or breaks, before so many bytes could be sent on it.
fn ends_within(mut stream: TcpStream, first: &[u8], again: &[u8], most: usize) -> Result<usize> {
    stream.set_write_timeout(Some(SHORT))?;
    stream.set_read_timeout(Some(SHORT))?;
    let mut sent = 0;
    let mut piece = first;
    while sent < most {
        match stream.write(piece) {
            Ok(count) => sent += count,
            Err(_) => return Ok(sent),
        }
        piece = again;
    }
    bail!("{sent} bytes were taken");
}

#[test]
fn oversize_handshakes_are_refused_before_they_take_memory() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let agents = agents(&rig)?;
    let (agent, to) = (agents[1], address_of(&rig.hosts[1])?);
    let before = threads(agent)?;
    let watch = Watch::start(agent)?;
    // A ClientHello of 16 MiB in records of 16 KiB, a record that is longer than one may be, and no TLS at all.
    let record = |head: [u8; 5], body: &[u8]| [&head[..], body].concat();
    let mut hello = vec![0; 16384];
    hello[..4].copy_from_slice(&[1, 0xFF, 0xFF, 0xFF]);
    let first = record([22, 3, 1, 0x40, 0], &hello);
    let again = record([22, 3, 1, 0x40, 0], &[0; 16384]);
    let too_long = record([22, 3, 1, 0xFF, 0xFF], &[1; 65535]);
    let no_tls = b"GET / HTTP/1.1\r\nHost: b\r\n\r\n".to_vec();
    for (first, again) in [
        (first, again),
        (too_long.clone(), too_long),
        (no_tls.clone(), no_tls),
    ] {
        let senders: Result<Vec<_>> = (0..32)
            .map(|_| {
                let (first, again) = (first.clone(), again.clone());
                rig.client.spawn(move || {
                    let stream = TcpStream::connect(to)?;
                    // What lies in the buffers of both sockets counts as sent.
                    ends_within(stream, &first, &again, 15 << 20)
                })
            })
            .collect();
        for sender in senders? {
            sender.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        }
    }
    // A chain of certificates, each of them good, and all too many.
    let identity = rig.issue("ca", "host", "c")?;
    let own = CertificateDer::pem_file_iter(identity.join("c.pem"))?;
    let own: Vec<CertificateDer<'static>> = own.collect::<Result<_, _>>()?;
    let chain: Vec<_> = own.iter().cycle().take(400).cloned().collect();
    ensure!(chain.iter().map(|one| one.len()).sum::<usize>() > 128 << 10);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(identity.join("ca.pem"))?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(identity.join("c.key"))?)?;
    for _ in 0..8 {
        let mut tls = ClientConnection::new(Arc::new(config.clone()), ServerName::try_from("b")?)?;
        let mut tcp = rig.client.inside(move || Ok(TcpStream::connect(to)?))?;
        tcp.set_read_timeout(Some(SHORT))?;
        // It says no, in an alert or by hanging up.
        let refused = loop {
            match tls.complete_io(&mut tcp) {
                Err(_) | Ok((0, 0)) => break true,
                Ok(_) if !tls.is_handshaking() && !tls.wants_write() => {
                    let mut byte = [0; 1];
                    break !matches!(tcp.peek(&mut byte), Ok(1..))
                        || tls.complete_io(&mut tcp).is_err();
                }
                Ok(_) => {}
            }
        };
        ensure!(refused, "a chain of 400 certificates was accepted");
    }
    let (more_threads, more_kib) = watch.finish()?;
    ensure!(
        more_threads <= PENDING_OF_ONE + OTHER_THREADS,
        "{more_threads}"
    );
    ensure!(more_kib <= MEMORY_KIB, "{more_kib}");
    recovered(agent, before)?;
    unharmed(&rig, &agents)
}

#[test]
fn a_host_that_is_enrolled_can_fill_its_own_places_only() -> Result<()> {
    let rig = with_guest(32)?;
    allow_open_files()?;
    let agents = agents(&rig)?;
    let agent = agents[1];
    let before = threads(agent)?;
    let identity = rig.issue("ca", "host", "c")?;
    let c = Impostor::new(&rig, &rig.hosts[1], &identity, "c")?;
    let watch = Watch::start(agent)?;
    // Connections of both kinds that say nothing more, or a byte, or begin a message of the largest size.
    let mut held = Vec::new();
    for number in 0..300_u32 {
        let mut connection = c.connect(number % 2 == 0)?;
        if number % 3 == 0 {
            let mut start = u32::try_from(MESSAGE_MAX)?.to_le_bytes().to_vec();
            start.resize(200 << 10, 0);
            connection.connection.set_buffer_limit(None);
            connection.connection.writer().write_all(&start)?;
            connection
                .tcp
                .set_write_timeout(Some(Duration::from_secs(2)))?;
            while connection.connection.wants_write() {
                // Who was cut meanwhile can't be told anything.
                if connection
                    .connection
                    .write_tls(&mut connection.tcp)
                    .is_err()
                {
                    break;
                }
            }
        }
        held.push(connection);
    }
    rig.move_vm("calm", 0, 1)?;
    // A message longer than any may be.
    let mut channel = c.connect(false)?;
    channel
        .connection
        .writer()
        .write_all(&u32::MAX.to_le_bytes())?;
    while channel.connection.wants_write() {
        channel.connection.write_tls(&mut channel.tcp)?;
    }
    let mut answer = [0; 4096];
    while let Ok(1..) = channel.tcp.read(&mut answer) {}
    // Orders that are refused, by the hundred: nothing of them stays.
    for number in 0..300_u32 {
        let mut migration = [0; 16];
        migration[..4].copy_from_slice(&number.to_le_bytes());
        let offer = Offer {
            order: Order {
                migration: MigrationId(migration),
                vm: VmId([3; 16]),
                vm_name: "wanted".to_owned(),
                epoch: Epoch(1),
                source: "a".to_owned(),
                destination: "b".to_owned(),
                expires_unix_s: u64::MAX,
                run: true,
            },
            descriptor: vec![b' '; 200 << 10],
            region_pages: vec![1024],
            streams: 2,
            digest_seed: 1,
            post_copy: PostCopyUse::No,
            credentials: Vec::new(),
        };
        let answer = c.tell(&Message::Offer(offer))?;
        ensure!(matches!(answer, Some(Message::Refused(_))), "{answer:?}");
    }
    let (more_threads, more_kib) = watch.finish()?;
    ensure!(more_threads <= THREADS_OF_HOST, "{more_threads}");
    ensure!(more_kib <= MEMORY_KIB, "{more_kib}");
    ensure!(rig.hosts[1].migrations()?.len() == 1, "{}", rig.logs());
    rig.check_lives_once("calm", 1)?;
    drop(held);
    recovered(agent, before)?;
    unharmed(&rig, &agents)
}

/// Not a test but a measurement: migrations with and without the flood, in turns.
#[test]
#[ignore = "a measurement, for a quiet machine: run it alone, with --nocapture"]
fn measure_migrations_under_the_flood() -> Result<()> {
    const RUNS: usize = 5;

    let rig = with_guest(64)?;
    rig.move_vm("calm", 0, 1)?;
    rig.move_vm("calm", 1, 0)?;
    let mut rows: [Vec<MigrationInfo>; 2] = [Vec::new(), Vec::new()];
    for _ in 0..RUNS {
        for (row, floods) in rows.iter_mut().zip([false, true]) {
            let flood = if floods {
                let flood = Flood::start(&rig.client, address_of(&rig.hosts[1])?)?;
                flood.await_all()?;
                Some(flood)
            } else {
                None
            };
            let info = rig.move_vm("calm", 0, 1)?;
            let (total, downtime) = (info.total_time_ms, info.downtime_ms);
            println!("flood {floods}: total {total} ms, downtime {downtime} ms");
            row.push(info);
            if let Some(flood) = flood {
                flood.finish()?;
                recovered(agents(&rig)?[1], 40)?;
            }
            rig.move_vm("calm", 1, 0)?;
        }
    }
    for (row, name) in rows.iter().zip(["alone", "under the flood"]) {
        let spread = |value: fn(&MigrationInfo) -> f64| {
            let mut all: Vec<f64> = row.iter().map(value).collect();
            all.sort_by(f64::total_cmp);
            format!(
                "{:.1} ({:.1} to {:.1})",
                all[RUNS / 2],
                all[0],
                all[RUNS - 1]
            )
        };
        println!(
            "{name}: total {} ms, downtime {} ms",
            spread(|info| info.total_time_ms),
            spread(|info| info.downtime_ms)
        );
    }
    Ok(())
}
