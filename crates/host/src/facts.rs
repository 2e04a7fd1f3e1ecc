//! Facts about this machine.

use std::fs;

use crate::Error;

fn meminfo(field: &str) -> Result<u64, Error> {
    let text = fs::read_to_string("/proc/meminfo").map_err(Error::io("reading /proc/meminfo"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib.saturating_mul(1024))
        .ok_or_else(|| Error::Io {
            action: format!("reading {field} in /proc/meminfo"),
            source: std::io::ErrorKind::InvalidData.into(),
        })
}

/// Memory of the machine in bytes.
///
/// # Errors
///
/// `/proc/meminfo` can't be read.
pub fn memory_total_bytes() -> Result<u64, Error> {
    meminfo("MemTotal")
}

/// Memory that can be given out without swapping, in bytes.
///
/// # Errors
///
/// `/proc/meminfo` can't be read.
pub fn memory_available_bytes() -> Result<u64, Error> {
    meminfo("MemAvailable")
}

/// Release of the running kernel.
pub fn kernel_release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// Whether KVM can be used: as root or a member of its group, where the CPU has what it needs.
pub fn kvm_opens() -> bool {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
}
