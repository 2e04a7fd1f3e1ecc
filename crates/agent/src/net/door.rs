//! The door of the network process: who comes in, and what strangers, and hosts that belong to no migration, can make it
//! hold.

use std::fmt::Display;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use rustls::Connection;
use tracing::debug;

use super::process::Process;
use super::protocol::Listen;
use crate::chain::chain;
use crate::crowd::{Complaints, Crowd, Place, one_address};
use crate::stream_proof::{OPENING_BYTES, Opening};
use crate::tls::{Authenticated, HANDSHAKE_DEADLINE};

/// Bounds what can be held by connections that belong to no migration.
pub(super) struct Door {
    process: Arc<Process>,
    /// Connections whose other end is not known yet, by address.
    strangers: Arc<Crowd<IpAddr, TcpStream>>,
    /// Connections of hosts that have not shown what they are for, by the name in the certificate.
    hosts: Arc<Crowd<String, TcpStream>>,
    /// Threads that serve a connection, and the most there may be.
    threads: AtomicUsize,
    threads_max: usize,
    complaints: Complaints,
}

impl Door {
    /// Accepts connections for ever on a thread of its own.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub(super) fn open(
        process: &Arc<Process>,
        limits: Listen,
        listener: TcpListener,
    ) -> io::Result<()> {
        let count = |limit: u32| usize::try_from(limit).unwrap_or(usize::MAX);
        let most = count(limits.pending);
        let door = Arc::new(Self {
            process: Arc::clone(process),
            strangers: Crowd::new(most, count(limits.per_address)),
            hosts: Crowd::new(most, count(limits.per_host)),
            threads: AtomicUsize::new(0),
            // Both crowds, the threads of those that have just left them, and the migrations.
            threads_max: most
                .saturating_mul(4)
                .saturating_add(count(limits.migrations).saturating_mul(2)),
            complaints: Complaints::default(),
        });
        thread::Builder::new()
            .name("accept".to_owned())
            .spawn(move || {
                loop {
                    match listener.accept() {
                        Ok((tcp, address)) => door.enter(tcp, address),
                        Err(error) => {
                            door.complain("a connection could not be accepted", &error, &"");
                            // Out of descriptors, most likely: other connections have to end first.
                            let pause = rustix::event::Timespec {
                                tv_sec: 0,
                                tv_nsec: 100_000_000,
                            };
                            let _ = rustix::event::poll(&mut [], Some(&pause));
                        }
                    }
                }
            })?;
        Ok(())
    }

    fn enter(self: &Arc<Self>, tcp: TcpStream, address: SocketAddr) {
        if self.threads.fetch_add(1, Ordering::Relaxed) >= self.threads_max {
            self.threads.fetch_sub(1, Ordering::Relaxed);
            return self.complain("closed at once", &"too many connections", &address);
        }
        let guard = Thread(Arc::clone(self));
        let socket = match tcp.try_clone() {
            Ok(socket) => socket,
            Err(error) => return self.complain("closed at once", &error, &address),
        };
        let (place, left) = self.strangers.enter(one_address(address.ip()), socket);
        if let Some((from, socket)) = left {
            // Its thread notices.
            let _ = socket.shutdown(Shutdown::Both);
            let what = "too many connections that have not authenticated themselves";
            self.complain("closed the oldest", &what, &from);
        }
        let work = move || {
            let guard = guard;
            guard.0.serve(tcp, &address, place);
        };
        if let Err(error) = thread::Builder::new().name("peer".to_owned()).spawn(work) {
            self.complain("no thread for a connection", &error, &address);
        }
    }

    /// Says what a stranger did wrong, but not a thousand times.
    fn complain(&self, what: &str, why: &dyn Display, address: &dyn Display) {
        self.complaints.complain(what, why, address);
    }

    fn serve(&self, tcp: TcpStream, address: &SocketAddr, place: Place<IpAddr, TcpStream>) {
        let process = &self.process;
        let authenticated = match process.tls.accept(tcp) {
            Ok(authenticated) => authenticated,
            Err(error) if error.is_refusal() => {
                return self.complain("connection refused", &chain(&error), address);
            }
            Err(error) => return self.complain("no handshake", &chain(&error), address),
        };
        let peer = authenticated.peer.name().to_owned();
        debug!(peer, data = authenticated.is_data(), "connected");
        let socket = match authenticated.tcp.try_clone() {
            Ok(socket) => socket,
            Err(error) => return self.complain("closed at once", &error, address),
        };
        let (host, left) = self.hosts.enter(peer, socket);
        drop(place);
        if let Some((from, socket)) = left {
            let _ = socket.shutdown(Shutdown::Both);
            let what = "too many connections that belong to no migration";
            self.complain("closed the oldest", &what, &from);
        }
        if authenticated.is_data() {
            match read_opening(authenticated) {
                Ok((stream, opening)) => process.route_stream(stream, opening),
                Err(error) => self.complain("a data stream did not open", &error, address),
            }
            return;
        }
        if let Err(error) = process.arrived(authenticated, host) {
            self.complain("a connection cannot be handed over", &error, address);
        }
    }
}

/// Counts a thread for as long as it serves a connection.
struct Thread(Arc<Door>);

impl Drop for Thread {
    fn drop(&mut self) {
        self.0.threads.fetch_sub(1, Ordering::Relaxed);
    }
}

fn read_opening(mut stream: Authenticated) -> io::Result<(Authenticated, Opening)> {
    use std::io::Read;

    let deadline = Instant::now() + HANDSHAKE_DEADLINE;
    let mut bytes = [0; OPENING_BYTES];
    let mut filled = 0;
    while filled < OPENING_BYTES {
        match stream.connection.reader().read(&mut bytes[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                filled += count;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.tcp.set_read_timeout(Some(left))?;
        if stream.connection.read_tls(&mut stream.tcp)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        process(&mut stream.connection)?;
    }
    stream.tcp.set_read_timeout(None)?;
    Ok((stream, Opening::decode(&bytes)))
}

fn process(connection: &mut Connection) -> io::Result<()> {
    connection
        .process_new_packets()
        .map(drop)
        .map_err(io::Error::other)
}
