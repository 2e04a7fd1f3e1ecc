//! A TPM for a host: `swtpm`, with a state of its own, on the loopback of this machine or of a namespace.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::network::Namespace;
use crate::process;

/// Port in a namespace; the next one is for control.
const PORT: u16 = 2321;
/// Longest wait for it to start, to stop, and for a tool.
const LIMIT: Duration = Duration::from_secs(30);

/// A virtual TPM; ended when dropped. It answers one program at a time.
#[derive(Debug)]
pub struct Swtpm {
    dir: PathBuf,
    port: u16,
    namespace: Option<String>,
}

impl Swtpm {
    /// Starts one with its state in a directory, on the loopback.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub fn start(dir: impl Into<PathBuf>) -> Result<Self> {
        let mut tpm = Self {
            dir: dir.into(),
            port: 0,
            namespace: None,
        };
        fs::create_dir_all(&tpm.dir)?;
        for _ in 0..10 {
            let Some(port) = two_ports()? else { continue };
            tpm.port = port;
            // Somebody else may have been faster.
            if tpm.on().is_ok() {
                return Ok(tpm);
            }
        }
        tpm.on()?;
        Ok(tpm)
    }

    /// The same on the loopback of a namespace.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub fn start_in(namespace: &Namespace, dir: impl Into<PathBuf>) -> Result<Self> {
        let tpm = Self {
            dir: dir.into(),
            port: PORT,
            namespace: Some(namespace.name().to_owned()),
        };
        fs::create_dir_all(&tpm.dir)?;
        tpm.on()?;
        Ok(tpm)
    }

    /// Gives the state in a directory, before a TPM is started with it, an endorsement key with a certificate by an
    /// authority in another directory, which is made if need be. Returns the authority's certificates: the root, and the
    /// one that issues.
    ///
    /// # Errors
    ///
    /// The tool fails.
    pub fn manufacture(dir: &Path, authority: &Path) -> Result<[PathBuf; 2]> {
        fs::create_dir_all(dir)?;
        fs::create_dir_all(authority)?;
        let shown = authority.display();
        let ca = authority.join("ca.conf");
        fs::write(
            &ca,
            format!(
                "statedir = {shown}\nsigningkey = {shown}/signkey.pem\nissuercert = {shown}/issuercert.pem\n\
                 certserial = {shown}/certserial\n"
            ),
        )?;
        let setup = authority.join("setup.conf");
        fs::write(
            &setup,
            format!(
                "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {}\n\
                 create_certs_tool_options = /etc/swtpm-localca.options\nactive_pcr_banks = sha256\n",
                ca.display()
            ),
        )?;
        let mut command = Command::new("swtpm_setup");
        command
            .args(["--tpm2", "--create-ek-cert", "--tpm-state"])
            .arg(dir)
            .arg("--config")
            .arg(setup);
        succeed(&mut command)?;
        Ok(["swtpm-localca-rootca-cert.pem", "issuercert.pem"].map(|name| authority.join(name)))
    }

    /// What a program has to be given to find it.
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    fn command(&self, program: &str) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some(name) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{name}")).arg("--");
                command.arg(program);
                command
            }
        }
    }

    /// Switches it on, as a host does that is started.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub fn on(&self) -> Result<()> {
        let dir = self.dir.display();
        let socket = |port: u16| format!("type=tcp,port={port},bindaddr=127.0.0.1");
        // It puts itself into the background once its sockets are there, and must hold none of ours: a connection to
        // another TPM that a library in C has just opened would never be closed.
        const ALONE: &str = "for fd in /proc/$$/fd/*; do n=${fd##*/}; \
            if [ \"$n\" -gt 2 ]; then eval \"exec $n>&-\"; fi; done; exec \"$@\"";
        succeed(
            self.command("bash")
                .args(["-c", ALONE, "bash", "swtpm"])
                .args(["socket", "--tpm2", "--daemon", "--flags", "startup-clear"])
                .args(["--tpmstate", &format!("dir={dir}")])
                .args(["--pid", &format!("file={dir}/pid")])
                .args(["--server", &socket(self.port)])
                .args(["--ctrl", &socket(self.port + 1)]),
        )
        .map(drop)
    }

    /// Its process.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn pid(&self) -> Result<u32> {
        let text = fs::read_to_string(self.dir.join("pid")).context("the TPM does not run")?;
        Ok(text.trim().parse()?)
    }

    /// Sends a signal to it: SIGSTOP lets it hang, SIGCONT go on.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        process::signal(self.pid()?, signal);
        Ok(())
    }

    /// Switches it off, without a word to it.
    ///
    /// # Errors
    ///
    /// It does not end.
    pub fn off(&self) -> Result<()> {
        let Ok(pid) = self.pid() else { return Ok(()) };
        process::kill(pid);
        if !process::wait_for_end(pid, LIMIT) {
            bail!("the TPM does not end");
        }
        // It had no time to remove it.
        let _ = fs::remove_file(self.dir.join("pid"));
        Ok(())
    }

    /// Starts the host again, as it were: the registers begin anew, and the TPM counts a reset. It must not be in use.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub fn restart(&self) -> Result<()> {
        self.tool("shutdown", &["-c"])?;
        self.off()?;
        self.on()
    }

    /// Measures something into a register.
    ///
    /// # Errors
    ///
    /// The tool fails.
    pub fn extend(&self, register: u8, digest: [u8; 32]) -> Result<()> {
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        self.tool("pcrextend", &[&format!("{register}:sha256={hex}")])
            .map(drop)
    }

    /// Runs `tpm2_TOOL`, in the directory of the state.
    ///
    /// # Errors
    ///
    /// It fails; with what it said.
    pub fn tool(&self, tool: &str, words: &[&str]) -> Result<String> {
        succeed(
            self.command(&format!("tpm2_{tool}"))
                .args(words)
                .current_dir(&self.dir)
                .env("TPM2TOOLS_TCTI", self.tcti()),
        )
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        // A TPM that was stopped ends too.
        let _ = self.off();
    }
}

/// Two ports in a row that are free just now.
fn two_ports() -> Result<Option<u16>> {
    let first = TcpListener::bind("127.0.0.1:0")?;
    let port = first.local_addr()?.port();
    let next = port
        .checked_add(1)
        .and_then(|next| TcpListener::bind(("127.0.0.1", next)).ok());
    Ok(next.map(|_| port))
}

fn succeed(command: &mut Command) -> Result<String> {
    let output = process::output(command, LIMIT)?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{command:?}: {}", String::from_utf8_lossy(&said).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
