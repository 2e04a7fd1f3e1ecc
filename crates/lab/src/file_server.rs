//! A server of one tar archive over HTTP, for guests that hold files (`palanquin.files=` on their command line).

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use crate::network::Namespace;

/// Address of the client in the rig, which serves the files.
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 2, 1);
const PORT: u16 = 8000;

/// A server of the archive in the client's namespace.
#[derive(Debug)]
pub struct FileServer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl FileServer {
    /// Begins to serve.
    ///
    /// # Errors
    ///
    /// If the port is taken.
    pub fn start(client: &Namespace, archive: &Path) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, path) = (Arc::clone(&stop), archive.to_owned());
        let listener = client.inside(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?))?;
        let thread = client.spawn(move || {
            loop {
                let (stream, _) = listener.accept()?;
                if seen.load(Ordering::Relaxed) {
                    return Ok(());
                }
                // A guest that goes away is its own affair: it will not be ready.
                let _ = answer(stream, &path);
            }
        })?;
        Ok(Self { stop, thread })
    }

    /// What guests are told.
    pub fn url() -> String {
        format!("http://{SERVER}:{PORT}/files.tar")
    }

    /// Ends.
    ///
    /// # Errors
    ///
    /// If it failed meanwhile.
    pub fn finish(self, client: &Namespace) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        // The connection is what wakes it.
        client.inside(|| {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
            drop(TcpStream::connect_timeout(
                &address,
                Duration::from_secs(5),
            )?);
            Ok(())
        })?;
        self.thread
            .join()
            .map_err(|_| anyhow!("the server of files panicked"))?
    }
}

fn answer(mut stream: TcpStream, archive: &Path) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(60)))?;
    let mut head = Vec::new();
    let mut bytes = [0; 1024];
    while !head.ends_with(b"\r\n\r\n") {
        let read = stream.read(&mut bytes)?;
        if read == 0 || head.len() > 8192 {
            bail!("no request");
        }
        head.extend_from_slice(&bytes[..read]);
    }
    let mut file = File::open(archive)?;
    let length = file.metadata()?.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/x-tar\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    io::copy(&mut file, &mut stream)?;
    Ok(())
}
