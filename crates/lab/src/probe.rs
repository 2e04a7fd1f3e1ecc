//! What a client outside sees of a guest: pings, a TCP connection, and the guest's own report.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketType, ipproto};
use serde::Deserialize;

use crate::network::Namespace;

/// Interval of pings and of the lines on the TCP connection: the resolution of what is measured.
pub const INTERVAL: Duration = Duration::from_millis(5);
/// A guest under emulation on a busy machine answers within this time.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the guest says of itself at `/status`.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// Seconds since the workload began.
    pub uptime_s: f64,
    /// Sweeps over the buffer.
    pub sweeps: u64,
    /// Pages verified.
    pub verified_pages: u64,
    /// Pages found wrong.
    pub corrupt_pages: u64,
    /// Random at the guest's start.
    pub boot_id: String,
}

/// Asks the guest for its status.
///
/// # Errors
///
/// If it does not answer.
pub fn status(client: &Namespace, guest: Ipv4Addr) -> Result<Status> {
    client.inside(move || {
        let address = SocketAddr::from((guest, 80));
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /status HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split("\r\n\r\n").nth(1).context("no body")?;
        serde_json::from_str(body).with_context(|| format!("not a status: {body}"))
    })
}

/// Sends a text to the guest's echo, unencrypted, and reads it back.
///
/// # Errors
///
/// If it does not come back.
pub fn echo(client: &Namespace, guest: Ipv4Addr, text: &str) -> Result<()> {
    let text = text.to_owned();
    client.inside(move || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((guest, 7000)), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(text.as_bytes())?;
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back)?;
        if back != text.as_bytes() {
            bail!("the echo is another text");
        }
        Ok(())
    })
}

/// Pings under way: ICMP echo requests (RFC 792), one each [`INTERVAL`].
///
/// The program `ping` waits actively at such an interval and takes most of a CPU; this thread sleeps in between, so
/// that what is measured is not slowed down by the measurement.
#[derive(Debug)]
pub struct Pings {
    stop: Arc<AtomicBool>,
    answered: mpsc::Receiver<()>,
    thread: JoinHandle<Result<PingReport>>,
}

/// What the pings saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PingReport {
    /// Answers.
    pub answers: u64,
    /// Pings sent but never answered.
    pub lost: u64,
    /// Longest time without an answer, in milliseconds, the interval included.
    pub longest_gap_ms: f64,
}

impl Pings {
    /// Begins; returns when the first is answered.
    ///
    /// # Errors
    ///
    /// If none is answered.
    pub fn start(client: &Namespace, guest: Ipv4Addr) -> Result<Self> {
        Self::start_each(client, guest, INTERVAL)
    }

    /// As [`Pings::start`], with another interval.
    ///
    /// # Errors
    ///
    /// If none is answered.
    pub fn start_each(client: &Namespace, guest: Ipv4Addr, interval: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let (first, answered) = mpsc::channel();
        let thread = client.spawn(move || ping(guest, interval, &seen, &first))?;
        let pings = Self {
            stop,
            answered,
            thread,
        };
        if pings.answered.recv_timeout(PATIENCE).is_err() {
            pings.finish().context("pinging failed")?;
            bail!("no ping was answered within {PATIENCE:?}");
        }
        Ok(pings)
    }

    /// Ends, and counts.
    ///
    /// # Errors
    ///
    /// If the socket failed.
    pub fn finish(self) -> Result<PingReport> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the client panicked"))?
    }
}

fn ping(
    guest: Ipv4Addr,
    interval: Duration,
    stop: &AtomicBool,
    first: &mpsc::Sender<()>,
) -> Result<PingReport> {
    // A namespace lets nobody open such a socket until it is told whose group may.
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0")?;
    let socket = net::socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP))?;
    net::connect(&socket, &SocketAddr::from((guest, 0)))?;
    let (mut sent, mut answers) = (0_u16, 0_u64);
    let mut all = 0_u64;
    let mut last: Option<Instant> = None;
    let mut longest = Duration::ZERO;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        if now >= next {
            // The kernel fills in checksum and identifier. A full queue is a ping lost.
            let [high, low] = sent.to_be_bytes();
            let _ = net::send(&socket, &[8, 0, 0, 0, 0, 0, high, low], SendFlags::DONTWAIT);
            sent = sent.wrapping_add(1);
            all += 1;
            // What was missed for want of a CPU is not sent in a burst.
            next = (next + interval).max(now);
        }
        let rest = Timespec::try_from(next.saturating_duration_since(now))?;
        match poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&rest)) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut answer = [0; 64];
        let Ok((_, length)) = net::recv(&socket, &mut answer[..], RecvFlags::DONTWAIT) else {
            // For example "host unreachable", which is no answer of the guest.
            continue;
        };
        if length >= 8 && answer[0] == 0 {
            let now = Instant::now();
            if let Some(last) = last.replace(now) {
                longest = longest.max(now - last);
            } else {
                let _ = first.send(());
            }
            answers += 1;
        }
    }
    // A guest that never came back has not been away for a moment only.
    longest = longest.max(last.map_or(Duration::ZERO, |last| last.elapsed()));
    Ok(PingReport {
        answers,
        lost: all.saturating_sub(answers),
        longest_gap_ms: longest.as_secs_f64() * 1e3,
    })
}

/// A TCP connection on which a line goes to the guest's echo each [`INTERVAL`].
#[derive(Debug)]
pub struct Connection {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<ConnectionReport>>,
}

/// What became of the connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConnectionReport {
    /// Lines that came back, all in order.
    pub lines: u64,
    /// Longest time in which nothing came back, in milliseconds, the interval included. TCP itself waits before it
    /// sends again what was lost, so this is more than the guest's pause.
    pub longest_gap_ms: f64,
}

impl Connection {
    /// Connects and begins.
    ///
    /// # Errors
    ///
    /// If the client's namespace cannot be entered.
    pub fn start(client: &Namespace, guest: Ipv4Addr) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = client.spawn(move || converse(guest, &seen))?;
        Ok(Self { stop, thread })
    }

    /// Ends, and says what was seen.
    ///
    /// # Errors
    ///
    /// If the connection broke, or a line came back changed, twice, or not at all.
    pub fn finish(self) -> Result<ConnectionReport> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the client panicked"))?
    }
}

fn converse(guest: Ipv4Addr, stop: &AtomicBool) -> Result<ConnectionReport> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((guest, 7000)), PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(INTERVAL))?;
    let (mut sent, mut returned) = (0_u64, 0_u64);
    let mut last = Instant::now();
    let mut longest = Duration::ZERO;
    let mut next = Instant::now();
    loop {
        let ending = stop.load(Ordering::Relaxed);
        if ending && sent == returned {
            break;
        }
        if !ending && Instant::now() >= next {
            stream
                .write_all(&sent.to_be_bytes())
                .context("the connection broke")?;
            sent += 1;
            next += INTERVAL;
        }
        let mut line = [0; 8];
        match stream.peek(&mut line) {
            Ok(0) => bail!("the guest closed the connection"),
            Ok(8..) => {
                stream.read_exact(&mut line)?;
                if u64::from_be_bytes(line) != returned {
                    bail!("line {returned} came back as {}", u64::from_be_bytes(line));
                }
                returned += 1;
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error).context("the connection broke"),
        }
        if last.elapsed() > PATIENCE {
            bail!("nothing came back for {PATIENCE:?}");
        }
    }
    Ok(ConnectionReport {
        lines: returned,
        longest_gap_ms: longest.as_secs_f64() * 1e3,
    })
}
