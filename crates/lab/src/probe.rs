//! What a client outside sees of a guest: pings, a TCP connection, and the guest's own report.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use serde::Deserialize;

use crate::network::Namespace;
use crate::process::Kept;
use crate::wait;

/// Interval of pings and of the lines on the TCP connection: the resolution of what is measured.
pub const INTERVAL: Duration = Duration::from_millis(5);
/// Between two pings: below 10 ms ping(8) spins, and takes a core from what is measured.
pub const PING_INTERVAL: Duration = Duration::from_millis(20);
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

/// Pings under way.
#[derive(Debug)]
pub struct Pings {
    ping: Kept,
    output: PathBuf,
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
    /// Begins, one each [`PING_INTERVAL`]; returns when the first is answered.
    ///
    /// # Errors
    ///
    /// If none is answered.
    pub fn start(client: &Namespace, guest: Ipv4Addr, dir: &Path) -> Result<Self> {
        let output = dir.join("ping.log");
        let seconds = PING_INTERVAL.as_secs_f64().to_string();
        let mut command = client.command("ping");
        command.args(["-n", "-D", "-i", &seconds, &guest.to_string()]);
        command
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(Stdio::null());
        let ping = Kept::new(command.spawn().context("cannot start ping")?);
        wait::until_true("a ping is answered", PATIENCE, || {
            Ok(fs::read_to_string(&output)?.contains("bytes from"))
        })?;
        Ok(Self { ping, output })
    }

    /// Ends, and counts.
    ///
    /// # Errors
    ///
    /// If ping does not end or was never answered.
    pub fn finish(mut self) -> Result<PingReport> {
        // Its summary comes at an interrupt only.
        self.ping.signal(Signal::INT);
        self.ping.wait(PATIENCE)?;
        ping_report(&fs::read_to_string(&self.output)?).context("ping was never answered")
    }
}

fn ping_report(log: &str) -> Option<PingReport> {
    let arrivals: Vec<f64> = log
        .lines()
        .filter(|line| line.contains("bytes from"))
        .filter_map(|line| line.strip_prefix('[')?.split_once(']')?.0.parse().ok())
        .collect();
    let summary = log
        .lines()
        .find(|line| line.contains("packets transmitted"))?;
    let sent: u64 = summary.split(' ').next()?.parse().ok()?;
    let gaps = arrivals.windows(2).map(|pair| pair[1] - pair[0]);
    let answers = u64::try_from(arrivals.len()).ok()?;
    Some(PingReport {
        answers,
        lost: sent.saturating_sub(answers),
        longest_gap_ms: gaps.fold(0.0, f64::max) * 1e3,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_between_answers() {
        let log = "PING\n[100.000] 64 bytes from 1: icmp_seq=1\n[100.005] 64 bytes from 1: icmp_seq=2\n\
                   [100.105] 64 bytes from 1: icmp_seq=9\n\n--- 1 ping statistics ---\n\
                   10 packets transmitted, 3 received, 70% packet loss, time 9ms\n";
        let report = ping_report(log).unwrap();
        assert_eq!((report.answers, report.lost), (3, 7));
        assert!((report.longest_gap_ms - 100.0).abs() < 0.01);
        assert_eq!(ping_report("nothing"), None);
    }
}
