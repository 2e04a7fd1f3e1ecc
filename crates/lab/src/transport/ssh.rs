//! A tunnel of ssh between two hosts, as Proxmox VE uses it: a UNIX socket of the source, forwarded to one of the
//! destination (ssh(1), `-L`), with the cipher that both prefer by themselves.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::host::Host;
use crate::process::{self, Kept};
use crate::wait;
use anyhow::{Context, Result, bail};

/// A server starts and a client connects within this time, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// The server's program.
pub const SERVER: &str = "/usr/sbin/sshd";
/// Port at which the server listens.
pub const PORT: u16 = 2222;

/// A server at the destination and a client at the source; both are killed when it is dropped.
#[derive(Debug)]
pub struct Tunnel {
    /// Socket at the source's end.
    near: PathBuf,
    _client: Kept,
    _server: Kept,
}

impl Tunnel {
    /// Forwards a new socket at the source to the socket `far` of the destination. Keys, configuration and sockets lie
    /// in `dir`; nothing of the system's own ssh is used.
    ///
    /// # Errors
    ///
    /// If openssh-server is not installed, or one of both does not start.
    pub fn open(source: &Host, destination: &Host, far: &Path, dir: &Path) -> Result<Self> {
        Self::open_any(source, destination, far, dir, None)
    }

    /// As [`Tunnel::open`], and forwards a port of the source's own to the same of the destination's own.
    ///
    /// # Errors
    ///
    /// As [`Tunnel::open`].
    pub fn open_with_port(
        source: &Host,
        destination: &Host,
        far: &Path,
        dir: &Path,
        port: u16,
    ) -> Result<Self> {
        Self::open_any(source, destination, far, dir, Some(port))
    }

    fn open_any(
        source: &Host,
        destination: &Host,
        far: &Path,
        dir: &Path,
        port: Option<u16>,
    ) -> Result<Self> {
        if !Path::new(SERVER).exists() {
            bail!("no {SERVER}: install openssh-server");
        }
        fs::create_dir_all(dir)?;
        // Made by the package's service otherwise; the server insists on it (sshd(8)).
        fs::create_dir_all("/run/sshd")?;
        for key in ["host-key", "user-key"] {
            let path = dir.join(key);
            if !path.exists() {
                let path = path.display().to_string();
                let words = ["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", &path];
                process::run("ssh-keygen", &words)?;
            }
        }
        let keys = dir.join("authorized-keys");
        fs::copy(dir.join("user-key.pub"), &keys)?;
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o600))?;
        let server = serve(destination, dir)?;
        let address = &destination.spec.address;
        let known = fs::read_to_string(dir.join("host-key.pub"))?;
        fs::write(
            dir.join("known-hosts"),
            format!("[{address}]:{PORT} {known}"),
        )?;
        let near = dir.join("near.sock");
        let _ = fs::remove_file(&near);
        let client = connect(source, address, (&near, far), dir, port)?;
        Ok(Self {
            near,
            _client: client,
            _server: server,
        })
    }

    /// Socket at the source's end.
    pub fn near(&self) -> &Path {
        &self.near
    }
}

/// Starts the server with the keys that [`Tunnel::open`] has put into `dir`, and waits until it listens.
///
/// # Errors
///
/// If it does not.
pub fn serve(destination: &Host, dir: &Path) -> Result<Kept> {
    let keys = (&*dir.join("host-key"), &*dir.join("authorized-keys"));
    serve_with(destination, &destination.spec.address, keys, dir)
}

/// As [`serve`], at an address, with a key of the host and a file of keys that are let in.
///
/// # Errors
///
/// If it does not listen.
pub fn serve_with(
    host: &Host,
    address: &str,
    (host_key, authorized): (&Path, &Path),
    dir: &Path,
) -> Result<Kept> {
    // The rig's directory belongs to root alone, but lies below one that everybody may write: hence no StrictModes.
    let text = format!(
        "Port {PORT}\nListenAddress {address}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\n\
         PermitRootLogin prohibit-password\nPasswordAuthentication no\nAllowStreamLocalForwarding yes\n\
         StreamLocalBindUnlink yes\nLogLevel INFO\n",
        host_key.display(),
        authorized.display(),
    );
    let (config, log) = (dir.join("sshd-config"), dir.join("sshd.log"));
    fs::write(&config, text)?;
    let mut command = host.namespace.command(SERVER);
    command.args(["-D", "-e", "-f"]).arg(&config);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log)?);
    let mut server = Kept::new(command.spawn().context("cannot start sshd")?);
    wait::until_true("sshd listens", PATIENCE, || {
        let said = fs::read_to_string(&log)?;
        if server.ended()?.is_some() {
            bail!("sshd ended: {said}");
        }
        Ok(said.contains("Server listening"))
    })?;
    Ok(server)
}

/// Starts the client, which forwards the socket `near` to the socket `far` of the destination, and waits until it does.
///
/// # Errors
///
/// If it does not.
pub fn connect(
    source: &Host,
    address: &str,
    (near, far): (&Path, &Path),
    dir: &Path,
    port: Option<u16>,
) -> Result<Kept> {
    let log = dir.join("ssh.log");
    let shown = |name: &str| dir.join(name).display().to_string();
    let mut command = source.namespace.command("ssh");
    command.args(["-F", "none", "-N", "-p", &PORT.to_string()]);
    command.args(["-l", "root", "-e", "none"]);
    command.arg("-i").arg(shown("user-key"));
    for option in [
        "BatchMode=yes".to_owned(),
        "ExitOnForwardFailure=yes".to_owned(),
        "IdentitiesOnly=yes".to_owned(),
        "StrictHostKeyChecking=yes".to_owned(),
        "StreamLocalBindUnlink=yes".to_owned(),
        format!("UserKnownHostsFile={}", shown("known-hosts")),
    ] {
        command.args(["-o", &option]);
    }
    // The socket comes last: when it is there, so is the port.
    if let Some(port) = port {
        command.args(["-L", &format!("127.0.0.1:{port}:127.0.0.1:{port}")]);
    }
    let forwarded = format!("{}:{}", near.display(), far.display());
    command.args(["-L", &forwarded, address]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log)?);
    let mut client = Kept::new(command.spawn().context("cannot start ssh")?);
    wait::until_true("ssh forwards", PATIENCE, || {
        if client.ended()?.is_some() {
            let server = fs::read_to_string(dir.join("sshd.log"))?;
            bail!("ssh ended: {}; {server}", fs::read_to_string(&log)?);
        }
        Ok(near.exists())
    })?;
    Ok(client)
}
