//! What a host that was refused has to remedy, the program that may do it, and the quarantine until a check passes.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use palanquin_api::attestation::RemediationHook;
use palanquin_host::inherit_nothing;
use palanquin_host::users::User;
use palanquin_host::vm::Obstacle;
use palanquin_trust::Identity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::{Deserialize, Serialize};

use super::AttestError;
use crate::chain::chain;

/// Most bytes that are kept of what a hook says.
const SAID_MAX: u64 = 4096;

/// What stands in the way, one entry for each thing that has to be remedied.
pub fn obstacles(error: &AttestError) -> Vec<Obstacle> {
    let findings = error.findings();
    if findings.is_empty() {
        return vec![Obstacle {
            code: error.code().to_owned(),
            message: chain(error),
            remedy: error.remedy().to_owned(),
        }];
    }
    let obstacle = |finding: &palanquin_trust::evidence::registers::Finding| Obstacle {
        code: finding.code.to_owned(),
        message: finding.to_string(),
        remedy: finding.remedy.clone(),
    };
    findings.iter().map(obstacle).collect()
}

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// No such user.
    #[error("`trust.attestation.remediation-hook.user`: there is no user {0:?}")]
    User(String),
    /// It has no program.
    #[error("the hook names no program")]
    Empty,
    /// It could not be started or waited for.
    #[error("the hook cannot be run")]
    Io(#[from] io::Error),
    /// It took longer than it may, and was ended.
    #[error("the hook has not ended within {} s", .0.as_secs())]
    Timeout(Duration),
    /// It failed.
    #[error("the hook has failed ({status}): {said}")]
    Failed {
        /// How it ended.
        status: ExitStatus,
        /// The beginning of what it said.
        said: String,
    },
}

#[derive(Serialize)]
struct Told<'a> {
    code: &'a str,
    message: &'a str,
    remedy: &'a str,
}

/// Lets the configured program remedy what it can: without a shell, with nothing of the agent's, in a process group of its
/// own, as a user without privileges. What is to be remedied is on its standard input as a JSON array. Whether it helped,
/// only another check shows.
///
/// # Errors
///
/// It can't be run, fails, or takes too long; then it and what it started are ended.
pub fn run_hook(hook: &RemediationHook, obstacles: &[Obstacle]) -> Result<String, HookError> {
    let (program, arguments) = hook.command.split_first().ok_or(HookError::Empty)?;
    let user = match &hook.user {
        Some(name) => User::find(name).ok_or_else(|| HookError::User(name.clone()))?,
        None => User::nobody(),
    };
    let told: Vec<Told<'_>> = obstacles
        .iter()
        .map(|obstacle| Told {
            code: &obstacle.code,
            message: &obstacle.message,
            remedy: &obstacle.remedy,
        })
        .collect();
    let told = serde_json::to_vec(&told).map_err(io::Error::from)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if rustix::process::geteuid().is_root() {
        // Other groups are given up with it.
        command.uid(user.uid).gid(user.gid);
    }
    let mut child = inherit_nothing(&mut command).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook that does not read must not hold us up.
        thread::spawn(move || stdin.write_all(&told));
    }
    let said = child.stdout.take().map(|stdout| {
        thread::spawn(move || {
            let mut said = Vec::new();
            let mut stdout = stdout;
            let _ = stdout.by_ref().take(SAID_MAX).read_to_end(&mut said);
            // The rest is read too, so that the hook is not stopped by a full pipe.
            let _ = io::copy(&mut stdout, &mut io::sink());
            said
        })
    });
    let deadline = Duration::from_millis(hook.deadline.as_millis());
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let has_ended = ends(&child, deadline);
    // Before the child is waited for, so that its number is still that of its group, which may have left others running.
    if let Some(group) = group {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let status = child.wait()?;
    if !has_ended? {
        return Err(HookError::Timeout(deadline));
    }
    let said = said
        .and_then(|thread| thread.join().ok())
        .unwrap_or_default();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    if status.success() {
        Ok(said)
    } else {
        Err(HookError::Failed { status, said })
    }
}

/// Waits until a child has ended, and leaves it to be waited for; false if it has not in time.
fn ends(child: &Child, limit: Duration) -> io::Result<bool> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        match poll(
            &mut [PollFd::new(&process, PollFlags::IN)],
            timeout.as_ref(),
        ) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Why a host is in quarantine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Quarantined {
    /// Who.
    pub host: Identity,
    /// Since when, seconds since 1970.
    pub since_unix_s: u64,
    /// Code of what was wrong.
    pub code: String,
    /// What was wrong.
    pub message: String,
}

impl Quarantined {
    /// Whether the host has advertised what it did not have.
    pub fn is_false(&self) -> bool {
        self.code == FALSE_ADVERTISEMENT
    }
}

/// Code of those that advertised what they did not have: no check ends that, only somebody who pardons it.
pub const FALSE_ADVERTISEMENT: &str = "advertisement-false";

/// Hosts that failed a check, until they pass one.
#[derive(Debug, Default)]
pub struct Quarantine(Mutex<BTreeMap<Identity, Quarantined>>);

impl Quarantine {
    /// As it was kept.
    pub fn new(kept: impl IntoIterator<Item = Quarantined>) -> Self {
        let hosts = kept.into_iter().map(|entry| (entry.host.clone(), entry));
        Self(Mutex::new(hosts.collect()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Identity, Quarantined>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how a check of a host ended, and says whether that changed anything that has to be kept. A failure by which
    /// nothing is known of the host (its evidence is missing, ours is the fault) changes nothing.
    pub fn checked(
        &self,
        host: &Identity,
        result: Result<(), &AttestError>,
        now_unix_s: u64,
    ) -> bool {
        if self.of(host).is_some_and(|entry| entry.is_false()) {
            // Its state is another matter than its word.
            return false;
        }
        let error = match result {
            Ok(()) => return self.lock().remove(host).is_some(),
            Err(error) => error,
        };
        if !matches!(
            error,
            AttestError::State { .. } | AttestError::Evidence { .. }
        ) {
            return false;
        }
        let mut hosts = self.lock();
        let since_unix_s = hosts
            .get(host)
            .map_or(now_unix_s, |known| known.since_unix_s);
        let entry = Quarantined {
            host: host.clone(),
            since_unix_s,
            code: error.code().to_owned(),
            message: chain(error),
        };
        hosts.insert(host.clone(), entry.clone()) != Some(entry)
    }

    /// A host has advertised what it did not have.
    pub fn accuse(&self, host: &Identity, message: &str, now_unix_s: u64) {
        let entry = Quarantined {
            host: host.clone(),
            since_unix_s: now_unix_s,
            code: FALSE_ADVERTISEMENT.to_owned(),
            message: message.to_owned(),
        };
        self.lock().insert(host.clone(), entry);
    }

    /// Somebody pardons a host that had advertised what it did not have.
    pub fn pardon(&self, host: &Identity) {
        let mut hosts = self.lock();
        if hosts.get(host).is_some_and(Quarantined::is_false) {
            hosts.remove(host);
        }
    }

    /// Adds what was kept.
    pub fn restore(&self, kept: impl IntoIterator<Item = Quarantined>) {
        let hosts = kept.into_iter().map(|entry| (entry.host.clone(), entry));
        self.lock().extend(hosts);
    }

    /// Why a host is in quarantine, if it is.
    pub fn of(&self, host: &Identity) -> Option<Quarantined> {
        self.lock().get(host).cloned()
    }

    /// All that are in quarantine, to be kept.
    pub fn all(&self) -> Vec<Quarantined> {
        self.lock().values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use palanquin_trust::Sha256;
    use palanquin_trust::evidence::registers::RegisterPolicy;

    use super::*;

    fn state() -> AttestError {
        let allowed = [(4, vec![Sha256([1; 32])]), (7, vec![Sha256([2; 32])])];
        let policy = RegisterPolicy::new(allowed.into(), BTreeMap::new()).unwrap();
        let registers = [(4, Sha256([9; 32])), (7, Sha256([9; 32]))];
        AttestError::State {
            host: beta(),
            findings: policy.judge(&registers.into(), &BTreeMap::new()),
        }
    }

    fn beta() -> Identity {
        "spiffe://example.org/host/beta".parse().unwrap()
    }

    fn hook(command: &[&str], deadline_s: u64) -> RemediationHook {
        RemediationHook {
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            user: None,
            deadline: palanquin_api::HumanDuration::from_secs(deadline_s),
        }
    }

    #[test]
    fn each_register_that_differs_is_named_with_what_to_do() {
        let found = obstacles(&state());
        assert_eq!(found.len(), 2);
        assert!(
            found[0]
                .message
                .starts_with("register 4 (the boot loader) holds sha256:09")
        );
        assert_eq!(found[1].code, "register-not-allowed");
        assert!(found[1].remedy.contains("Secure Boot"));
        let missing = obstacles(&AttestError::Missing(beta()));
        assert_eq!(
            (missing.len(), missing[0].code.as_str()),
            (1, "evidence-missing")
        );
    }

    #[test]
    fn a_hook_gets_what_is_to_be_remedied_without_shell_environment_or_privileges() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("hook");
        std::fs::write(
            &script,
            "#!/bin/sh\ncat\necho\nid -u\nenv | grep -c CARGO\necho \"$1\"\n",
        )
        .unwrap();
        for path in [dir.path(), script.as_path()] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = script.display().to_string();
        let said = run_hook(&hook(&[&path, "$(id)"], 20), &obstacles(&state())).unwrap();
        let lines: Vec<&str> = said.lines().collect();
        assert!(
            lines[0].starts_with("[{\"code\":\"register-not-allowed\",\"message\":\"register 4")
        );
        if rustix::process::geteuid().is_root() {
            assert_eq!(lines[1], User::nobody().uid.to_string());
        }
        assert_eq!(lines[2..], ["0", "$(id)"]);
    }

    #[test]
    fn a_hook_that_fails_hangs_or_is_not_there_is_said_and_ended() {
        let failed = run_hook(&hook(&["/bin/sh", "-c", "echo no; exit 3"], 20), &[]).unwrap_err();
        assert!(failed.to_string().ends_with(": no"), "{failed}");
        let began = Instant::now();
        let words = ["/bin/sh", "-c", "sleep 1000 & sleep 1000"];
        let hung = run_hook(&hook(&words, 1), &[]).unwrap_err();
        assert!(matches!(hung, HookError::Timeout(_)), "{hung}");
        assert!(began.elapsed() < Duration::from_secs(10));
        // One that leaves something behind which holds its output.
        let left = run_hook(&hook(&["/bin/sh", "-c", "sleep 1000 & echo done"], 20), &[]);
        assert_eq!(left.unwrap(), "done");
        assert!(matches!(
            run_hook(&hook(&["/none"], 1), &[]),
            Err(HookError::Io(_))
        ));
        let nobody = RemediationHook {
            user: Some("nobody-of-that-name".to_owned()),
            ..hook(&["/bin/true"], 1)
        };
        assert!(matches!(run_hook(&nobody, &[]), Err(HookError::User(_))));
    }

    #[test]
    fn a_host_stays_in_quarantine_until_it_passes_a_check() {
        let quarantine = Quarantine::default();
        assert!(!quarantine.checked(&beta(), Ok(()), 5));
        assert!(!quarantine.checked(&beta(), Err(&AttestError::Missing(beta())), 5));
        assert!(quarantine.checked(&beta(), Err(&state()), 10));
        assert!(!quarantine.checked(&beta(), Err(&state()), 20));
        let kept = Quarantine::new(quarantine.all());
        let entry = kept.of(&beta()).unwrap();
        assert_eq!(
            (entry.since_unix_s, entry.code.as_str()),
            (10, "host-state")
        );
        assert!(kept.checked(&beta(), Ok(()), 30));
        assert_eq!(kept.of(&beta()), None);
    }

    #[test]
    fn a_host_that_advertised_falsely_stays_in_quarantine_whatever_it_runs_until_it_is_pardoned() {
        let quarantine = Quarantine::default();
        quarantine.accuse(&beta(), "it had less", 10);
        assert!(!quarantine.checked(&beta(), Ok(()), 20));
        assert!(!quarantine.checked(&beta(), Err(&state()), 30));
        let kept = Quarantine::new(quarantine.all());
        let entry = kept.of(&beta()).unwrap();
        assert_eq!((entry.since_unix_s, entry.is_false()), (10, true));
        kept.pardon(&beta());
        assert_eq!(kept.of(&beta()), None);
        // What is wrong with its state is not pardoned.
        assert!(kept.checked(&beta(), Err(&state()), 40));
        kept.pardon(&beta());
        assert!(kept.of(&beta()).is_some());
    }
}
