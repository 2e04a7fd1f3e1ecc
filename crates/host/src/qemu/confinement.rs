//! What a QEMU that we start may not do.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::getuid;

use super::{major_minor, obstacle};
use crate::Error;
use crate::process::wait_child;
use crate::users::User;
use crate::vm::Obstacle;

/// Longest time to look whether a user may open a file.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// From this version on QEMU wants the user in another option (its "Deprecated features", 9.1).
const RUN_WITH: (u32, u32) = (9, 1);

/// What a QEMU that we start may not do.
#[derive(Clone, Debug, Default)]
pub struct Confinement {
    /// As whom it runs when it has opened what it was given; as us where absent.
    pub user: Option<User>,
    /// Whether it has no sandbox of its own (`-sandbox`).
    pub no_sandbox: bool,
}

impl Confinement {
    /// Options for QEMU of this version.
    ///
    /// It opens its files, tap devices and KVM as we do and becomes the user then: so it can be given what only root may
    /// open. For that the sandbox must let it change the user once; that it gains nothing by that is seen to by
    /// `no_new_privs`, and that it has no capability left.
    pub(super) fn options(&self, version: &str) -> Vec<String> {
        let mut options = Vec::new();
        let user = self.user.as_ref().filter(|_| getuid().is_root());
        if !self.no_sandbox {
            let elevate = if user.is_some() {
                ""
            } else {
                ",elevateprivileges=deny"
            };
            options.push("-sandbox".to_owned());
            options.push(format!(
                "on,obsolete=deny{elevate},spawn=deny,resourcecontrol=deny"
            ));
        }
        if let Some(user) = user {
            if major_minor(version) >= Some(RUN_WITH) {
                options.extend(["-run-with".to_owned(), format!("user={}", user.name)]);
            } else {
                options.extend(["-runas".to_owned(), user.name.clone()]);
            }
        }
        options
    }

    /// What is lacking, one sentence each.
    pub(super) fn lacks(&self) -> Vec<String> {
        let mut lacks = Vec::new();
        if !getuid().is_root() {
            lacks.push("QEMU runs as the agent's user, because that is not root".to_owned());
        } else if self.user.is_none() {
            lacks.push("QEMU runs as root: no user for it exists".to_owned());
        }
        if self.no_sandbox {
            lacks.push("QEMU runs without its sandbox: `qemu.sandbox` is off".to_owned());
        }
        lacks
    }

    /// Disks that the user can't write. QEMU opens them anew when the VM arrives, or when it stays after all: too late to
    /// find out.
    pub(super) fn disks(&self, arguments: &[String]) -> Result<Vec<Obstacle>, Error> {
        let Some(user) = self.user.as_ref().filter(|_| getuid().is_root()) else {
            return Ok(Vec::new());
        };
        let mut obstacles = Vec::new();
        for path in written(arguments) {
            if !may_write(user, Path::new(path))? {
                obstacles.push(obstacle(
                    "disk-permission",
                    format!("user {:?}, as whom QEMU runs, cannot read and write {path:?}", user.name),
                    "Give the file to that user or its group, or choose another user with `qemu.user`.",
                ));
            }
        }
        Ok(obstacles)
    }
}

/// Files of the disks that are not opened for reading only.
fn written(arguments: &[String]) -> impl Iterator<Item = &str> {
    let drives = arguments.windows(2).filter(|pair| pair[0] == "-drive");
    drives.filter_map(|pair| {
        let keys = || pair[1].split(',');
        let reads = ["readonly=on", "read-only=on", "readonly", "snapshot=on"];
        let only_reads = keys().any(|key| reads.contains(&key));
        let file = keys().find_map(|key| key.strip_prefix("file="));
        file.filter(|_| !only_reads)
    })
}

/// Whether the kernel would let this user read and write the file: asked as that user.
fn may_write(user: &User, path: &Path) -> Result<bool, Error> {
    let mut command = Command::new("test");
    command
        .arg("-r")
        .arg(path)
        .args(["-a", "-w"])
        .arg(path)
        .uid(user.uid)
        .gid(user.gid)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command
        .spawn()
        .map_err(Error::io("looking whether QEMU's user may write a disk"))?;
    let status = wait_child(&mut child, LOOK_TIMEOUT)
        .map_err(Error::io("looking whether QEMU's user may write a disk"))?;
    let status = status.ok_or(Error::Timeout(
        "looking whether QEMU's user may write a disk",
    ))?;
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn nobody() -> Confinement {
        Confinement {
            user: Some(User::nobody()),
            no_sandbox: false,
        }
    }

    #[test]
    fn the_user_is_named_as_the_version_wants_it() {
        if !getuid().is_root() {
            return;
        }
        let confinement = nobody();
        assert_eq!(
            confinement.options("7.2.22"),
            [
                "-sandbox",
                "on,obsolete=deny,spawn=deny,resourcecontrol=deny",
                "-runas",
                "nobody"
            ]
        );
        assert_eq!(
            confinement.options("10.0.2")[2..],
            ["-run-with", "user=nobody"]
        );
        let root = Confinement::default();
        assert_eq!(
            root.options("7.2.22"),
            [
                "-sandbox",
                "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
            ]
        );
        assert_eq!(root.lacks().len(), 1);
        assert!(confinement.lacks().is_empty());
    }

    #[test]
    fn a_disk_that_only_root_can_write_is_an_obstacle_unless_it_is_only_read() {
        if !getuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mode = |mode| std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(dir.path(), mode(0o755)).unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, b"").unwrap();
        let drive = |more: &str| {
            let value = format!("if=none,id=d,file={}{more}", disk.display());
            nobody().disks(&["-drive".to_owned(), value]).unwrap().len()
        };
        std::fs::set_permissions(&disk, mode(0o644)).unwrap();
        assert_eq!(drive(",format=raw"), 1);
        assert_eq!(drive(",readonly=on"), 0);
        assert_eq!(drive(",snapshot=on"), 0);
        std::fs::set_permissions(&disk, mode(0o666)).unwrap();
        assert_eq!(drive(""), 0);
    }
}
