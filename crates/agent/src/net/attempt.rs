//! For tests: gives up all privileges as the network process does, and tries to do what it must not, or must be able to.

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::{PidfdFlags, Signal, getpid, kill_process, pidfd_open};
use rustix::thread::{Uid, set_thread_res_uid};

use super::confine::confine;
use super::port::Port;

/// Argument by which this program knows that it is to try something.
pub const ARGUMENT: &str = "network-process-attempt";

/// Gives up what the network process gives up, tries it, and says how it went, if that is still possible.
///
/// # Errors
///
/// What was tried failed, or there is no such attempt.
pub fn attempt(words: &[String]) -> io::Result<String> {
    let [agent, user, group, what] = words else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let number = |text: &String| text.parse::<u32>().map_err(io::Error::other);
    // What a process holds from before it may go on using.
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let lacks = confine(number(agent)?, number(user)?, number(group)?);
    let lacks = lacks.map_err(io::Error::other)?;
    if !lacks.is_empty() {
        return Ok(format!("lacking: {}", lacks.join("; ")));
    }
    match what.as_str() {
        "open" => File::open("/etc/passwd").map(drop),
        "create" => File::create("/tmp/palanquin-attempt").map(drop),
        "list" => std::fs::read_dir("/proc").map(drop),
        "look" => std::fs::metadata("/etc/passwd").map(drop),
        "program" => Command::new("/bin/true").status().map(drop),
        "connect" => TcpStream::connect("127.0.0.1:1").map(drop),
        "listen" => TcpListener::bind("127.0.0.1:0").map(drop),
        "datagrams" => UdpSocket::bind("127.0.0.1:0").map(drop),
        "pair" => std::os::unix::net::UnixStream::pair().map(drop),
        "signal" => Ok(kill_process(getpid(), Signal::CONT)?),
        "process" => Ok(pidfd_open(getpid(), PidfdFlags::empty()).map(drop)?),
        "root" => Ok(set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?),
        "work" => work(&listener, client),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }?;
    Ok("done".to_owned())
}

/// What it does all day.
fn work(listener: &TcpListener, client: TcpStream) -> io::Result<()> {
    use std::io::{Read, Write};

    let (mut server, _) = listener.accept()?;
    client.set_read_timeout(Some(Duration::from_secs(5)))?;
    client.set_nodelay(true)?;
    server.write_all(b"x")?;
    (&client).read_exact(&mut [0])?;
    let (ours, theirs) = Port::pair()?;
    let theirs = Port::from_fd(theirs)?;
    let memory = OwnedFd::from(client);
    let big = vec![1; 1 << 20];
    ours.send(&big, &[std::os::fd::AsFd::as_fd(&memory)])?;
    let sum = thread::Builder::new()
        .name("named".to_owned())
        .spawn(move || {
            let packet = theirs.receive(Some(Duration::from_secs(5)), 1 << 20);
            let _ = thread::available_parallelism();
            packet.map(|packet| packet.map_or(0, |packet| packet.body.len()))
        })?;
    let len = sum.join().map_err(|_| io::ErrorKind::Other)??;
    let _ = aws_lc_rs::rand::fill(&mut [0; 64]);
    if len == big.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}
