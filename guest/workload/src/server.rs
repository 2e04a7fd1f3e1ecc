//! What the guest offers its network: `GET /status` on port 80, an echo on port 7000, and on port
//! 7001 a numbered line every 5 ms, by which a client measures how long the guest was away.
//! `GET /load?seconds=N` keeps a CPU busy for that long, `GET /step?ms=N` sets the clock.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::clock;
use crate::stats::Stats;
use crate::wait;

/// Port of `GET /status`.
const HTTP_PORT: u16 = 80;
/// Port that sends back what it gets.
const ECHO_PORT: u16 = 7000;
/// Port that counts.
const TICK_PORT: u16 = 7001;
/// Distance between two numbers.
const TICK: Duration = Duration::from_millis(5);
/// Connections served at once on each port; further ones are closed.
const CONNECTIONS: usize = 64;
/// Longest head of a request, in bytes.
const HEAD: usize = 8192;
/// How long a request may take to arrive and its answer to leave.
const HTTP_DEADLINE: Duration = Duration::from_secs(10);
/// How long an echo connection may be silent: longer than any migration of the tests.
const ECHO_SILENCE: Duration = Duration::from_secs(3600);
/// Longest load, in seconds.
const LOAD_MAX: u64 = 600;
/// Stack of a connection's thread; guests are small.
const STACK: usize = 128 << 10;

/// Opens the ports and serves them in the background.
pub(crate) fn start(stats: &Arc<Stats>) -> Result<(), String> {
    let http = Arc::clone(stats);
    serve(HTTP_PORT, move |stream| answer(stream, &http.json()))?;
    serve(ECHO_PORT, echo)?;
    serve(TICK_PORT, tick)
}

fn serve<F>(port: u16, connection: F) -> Result<(), String>
where
    F: Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        .map_err(|why| format!("port {port} can't be opened: {why}"))?;
    let open = Arc::new(AtomicUsize::new(0));
    let accept = move || loop {
        let Ok((stream, _)) = listener.accept() else {
            // Out of memory or descriptors: both pass.
            wait::until(Instant::now() + Duration::from_millis(100));
            continue;
        };
        if open.load(Ordering::Relaxed) >= CONNECTIONS {
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (open_here, connection) = (Arc::clone(&open), connection.clone());
        let spawned = thread::Builder::new().stack_size(STACK).spawn(move || {
            // A peer that goes away is its own affair.
            let _ = connection(stream);
            open_here.fetch_sub(1, Ordering::Relaxed);
        });
        if spawned.is_err() {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    };
    thread::Builder::new()
        .stack_size(STACK)
        .spawn(accept)
        .map(drop)
        .map_err(|why| format!("no thread for port {port}: {why}"))
}

/// One request, one answer, then the connection is closed (RFC 9112).
fn answer(mut stream: TcpStream, status: &str) -> io::Result<()> {
    let deadline = Instant::now() + HTTP_DEADLINE;
    stream.set_write_timeout(Some(HTTP_DEADLINE))?;
    let (mut head, mut used) = ([0_u8; HEAD], 0);
    while !head[..used].windows(4).any(|end| end == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || used == head.len() {
            return respond(&mut stream, "400 Bad Request", "{}");
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut head[used..])? {
            0 => return Ok(()),
            n => used += n,
        }
    }
    let (code, body) = route(&head[..used], status);
    respond(&mut stream, code, &body)
}

fn route(head: &[u8], status: &str) -> (&'static str, String) {
    const OK: &str = "200 OK";
    let mut words = head
        .split(|byte| matches!(byte, b' ' | b'\r'))
        .map(|word| std::str::from_utf8(word).unwrap_or_default());
    let (method, target) = (words.next(), words.next().unwrap_or_default());
    if method != Some("GET") {
        return ("405 Method Not Allowed", "{}".to_owned());
    }
    let refused = |why: String| ("400 Bad Request", format!("{{\"error\":{why:?}}}"));
    if target == "/status" {
        (OK, status.to_owned())
    } else if let Some(seconds) = target.strip_prefix("/load?seconds=") {
        match seconds.parse() {
            Ok(seconds @ 1..=LOAD_MAX) => {
                thread::spawn(move || load(Duration::from_secs(seconds)));
                (OK, "{}".to_owned())
            }
            _ => refused(format!("a load is 1 to {LOAD_MAX} seconds")),
        }
    } else if let Some(ms) = target.strip_prefix("/step?ms=") {
        let stepped = ms.parse().map_err(|_| "no number of ms".to_owned());
        match stepped.and_then(clock::step) {
            Ok(ms) => (OK, format!("{{\"stepped_ms\":{ms}}}")),
            Err(why) => refused(why),
        }
    } else {
        ("404 Not Found", "{}".to_owned())
    }
}

/// Keeps a CPU busy.
fn load(length: Duration) {
    let end = Instant::now() + length;
    let mut number = 1_u64;
    while Instant::now() < end {
        for _ in 0..10_000 {
            number = std::hint::black_box(number.wrapping_mul(6_364_136_223_846_793_005) + 1);
        }
    }
}

fn respond(stream: &mut TcpStream, code: &str, body: &str) -> io::Result<()> {
    let length = body.len();
    stream.write_all(
        format!(
            "HTTP/1.1 {code}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\
             Connection: close\r\n\r\n{body}"
        )
        .as_bytes(),
    )
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ECHO_SILENCE))?;
    stream.set_write_timeout(Some(ECHO_SILENCE))?;
    let mut bytes = [0_u8; 16 << 10];
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            n => stream.write_all(&bytes[..n])?,
        }
    }
}

/// Counts until the peer goes away. What a pause kept back is not made up for.
fn tick(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(ECHO_SILENCE))?;
    let mut next = Instant::now();
    for number in 0_u64.. {
        stream.write_all(format!("{number}\n").as_bytes())?;
        next = (next + TICK).max(Instant::now());
        wait::until(next);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_get_of_status_gets_the_status() {
        let code = |head: &str| route(head.as_bytes(), "{}").0;
        assert_eq!(code("GET /status HTTP/1.1\r\n\r\n"), "200 OK");
        assert_eq!(code("GET / HTTP/1.1\r\n\r\n"), "404 Not Found");
        assert_eq!(code("POST /status HTTP/1.1\r\n"), "405 Method Not Allowed");
        assert_eq!(code("\r\n\r\n"), "405 Method Not Allowed");
        assert_eq!(code("GET /load?seconds=0 HTTP/1.1\r\n"), "400 Bad Request");
        assert_eq!(code("GET /step?ms=x HTTP/1.1\r\n"), "400 Bad Request");
    }

    #[test]
    fn an_echo_sends_back_every_byte() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        let thread = thread::spawn(move || echo(server));
        client.write_all(b"heron").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = String::new();
        client.read_to_string(&mut back).unwrap();
        assert_eq!(back, "heron");
        thread.join().unwrap().unwrap();
    }
}
