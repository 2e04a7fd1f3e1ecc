//! Installs what a bare Debian machine lacks.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{programs, run};

/// A file that shows that a package is there, and the package.
const NEEDED: [(&str, &str); 14] = [
    ("/usr/bin/cc", "build-essential"),
    // What the agent and the command line are linked with; the library loads what talks to the TPM.
    ("/usr/include/tss2/tss2_esys.h", "libtss2-dev"),
    // The watch page is tested in it.
    ("/usr/bin/chromium", "chromium"),
    ("/usr/bin/pkg-config", "pkg-config"),
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/sbin/ip", "iproute2"),
    ("/usr/bin/ping", "iputils-ping"),
    ("/usr/bin/nasm", "nasm"),
    ("/usr/bin/swtpm", "swtpm"),
    ("/usr/bin/swtpm_setup", "swtpm-tools"),
    ("/usr/bin/tcpdump", "tcpdump"),
    ("/usr/bin/tpm2_quote", "tpm2-tools"),
    ("/usr/bin/xz", "xz-utils"),
    // The dynamic busybox owns the same program, but doesn't run in an initial RAM disk.
    ("/var/lib/dpkg/info/busybox-static.list", "busybox-static"),
];

/// What the benches need beyond: QEMU through a tunnel of ssh is one of the paths compared. They start a server of
/// their own; the one that the package may start is not used.
const FOR_BENCHES: [(&str, &str); 2] = [
    ("/usr/bin/ssh", "openssh-client"),
    ("/usr/sbin/sshd", "openssh-server"),
];

/// What the lab's other transports need: IPsec by strongSwan, in user space because not every kernel has ESP, and what
/// measures a path. Their daemons are started in namespaces of the rig alone.
const FOR_LAB: [(&str, &str); 6] = [
    ("/usr/sbin/ethtool", "ethtool"),
    ("/usr/lib/ipsec/charon", "strongswan-charon"),
    ("/usr/sbin/swanctl", "strongswan-swanctl"),
    (
        "/usr/lib/ipsec/plugins/libstrongswan-kernel-libipsec.so",
        "libcharon-extra-plugins",
    ),
    (
        "/usr/lib/ipsec/plugins/libstrongswan-openssl.so",
        "libstrongswan-standard-plugins",
    ),
    ("/usr/bin/iperf3", "iperf3"),
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
    install_of(&NEEDED)
}

/// Installs what is missing for the benches as well.
pub(crate) fn install_for_benches() -> Result<()> {
    install_of(&[&NEEDED[..], &FOR_BENCHES[..]].concat())
}

/// Installs what is missing for the tests: all of the lab but a server of ssh, which Debian would start by itself.
pub(crate) fn install_for_tests() -> Result<()> {
    install_of(&[&NEEDED[..], &FOR_LAB[..]].concat())
}

/// Installs what is missing for the experiment and the attacks as well.
pub(crate) fn install_for_lab() -> Result<()> {
    install_of(&[&NEEDED[..], &FOR_BENCHES[..], &FOR_LAB[..]].concat())
}

fn install_of(needed: &[(&'static str, &'static str)]) -> Result<()> {
    let missing = missing(needed, |file| Path::new(file).exists());
    if missing.is_empty() {
        return Ok(());
    }
    require_root(&format!(
        "these packages are missing and have to be installed: {}",
        missing.join(" ")
    ))?;
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!(
            "this is no Debian: install what these packages of Debian hold: {}",
            missing.join(" ")
        );
    }
    println!("setup: installing {}", missing.join(" "));
    run("apt-get", &["update", "-q"])?;
    programs::visible(
        programs::program("apt-get")
            .args(["install", "-q", "-y", "--no-install-recommends"])
            .args(missing)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// Packages whose file isn't `there`; a file below `/usr` may lie directly below `/` as well.
fn missing(
    needed: &[(&'static str, &'static str)],
    there: impl Fn(&str) -> bool,
) -> Vec<&'static str> {
    needed
        .iter()
        .filter(|(file, _)| !there(file) && !there(file.strip_prefix("/usr").unwrap_or(file)))
        .map(|(_, package)| *package)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_machine_needs_everything_and_a_full_one_nothing() {
        assert_eq!(missing(&NEEDED, |_| false).len(), NEEDED.len());
        assert!(missing(&NEEDED, |_| true).is_empty());
    }

    #[test]
    fn programs_directly_below_the_root_count() {
        let missing = missing(&NEEDED, |file| {
            file == "/sbin/ip" || file.starts_with("/var")
        });
        assert!(!missing.contains(&"iproute2") && missing.contains(&"nasm"));
    }
}
