//! Installs what a bare Debian machine lacks.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::run;

/// (file that shows it is there, Debian package)
const NEEDED: [(&str, &str); 9] = [
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/sbin/ip", "iproute2"),
    ("/bin/busybox", "busybox-static"),
    ("/usr/bin/cpio", "cpio"),
    ("/usr/bin/nasm", "nasm"),
    ("/usr/bin/tcpdump", "tcpdump"),
    ("/usr/bin/ping", "iputils-ping"),
    ("/usr/bin/gcc", "gcc"),
    ("/usr/bin/xz", "xz-utils"),
];

/// Whether we are root.
pub(crate) fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

/// Fails clearly for everybody but root.
pub(crate) fn require_root(why: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    bail!("this must run as root, because {why}: try `sudo -E cargo xtask ...`")
}

/// Installs what is missing.
pub(crate) fn install() -> Result<()> {
    let there =
        |file: &str| Path::new(file).exists() || Path::new(&file.replace("/usr/", "/")).exists();
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(file, _)| !there(file))
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    require_root(&format!(
        "these packages are missing and have to be installed: {}",
        missing.join(" ")
    ))?;
    println!("installing {}", missing.join(" "));
    run("apt-get", &["update", "-q"])?;
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(missing);
    run("apt-get", &arguments)
}
