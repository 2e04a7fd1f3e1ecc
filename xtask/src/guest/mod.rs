//! `cargo xtask guest`: what test guests boot, under fixed names in `target/guest`.

mod cpio;
mod kernel;
mod modules;

use std::fs;
use std::hash::{DefaultHasher, Hasher as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::programs;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Modules for a network card under QEMU; most else is built in or not needed.
const MODULES: [&str; 2] = ["virtio_pci", "virtio_net"];
/// Applets of busybox that `guest/initramfs/init` and a curious developer use.
const APPLETS: [&str; 17] = [
    "sh", "cat", "date", "dmesg", "free", "insmod", "ip", "ls", "mkdir", "mount", "ping", "ps",
    "sleep", "tar", "top", "usleep", "wget",
];
/// A disk is a whole number of sectors; this one is so large that no BIOS finds it odd.
const PAYLOAD_BYTES: usize = 1 << 20;

/// Builds whatever isn't up to date.
pub(crate) fn build() -> Result<()> {
    let root = programs::root();
    let out = root.join("target/guest");
    let cache = out.join("cache");
    fs::create_dir_all(&cache)?;
    payload(&root, &out)?;
    let workload = workload(&root)?;
    let kernel = kernel::fetch(&cache)?;
    replace(&out.join("vmlinuz"), &fs::read(&kernel.image)?)?;
    initrd(&root, &out, &workload, &kernel.modules)
}

/// The workload, linked statically: the RAM disk has no libraries.
fn workload(root: &Path) -> Result<PathBuf> {
    let target = root.join("target/guest-build");
    let mut build = programs::cargo();
    build
        .args(["build", "--quiet", "--release", "--package", "palanquin-workload"])
        // Without an explicit target the flags would hit build scripts too.
        .args(["--target", TARGET, "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    programs::output(&mut build).context("the guest's workload can't be built")?;
    Ok(target.join(TARGET).join("release/palanquin-workload"))
}

fn initrd(root: &Path, out: &Path, workload: &Path, modules: &Path) -> Result<()> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(Path::new)
        .find(|path| path.exists())
        .context("busybox is missing; run cargo xtask setup")?;
    let mut archive = cpio::Archive::default();
    for directory in ["bin", "dev", "modules", "proc", "sys"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("init", &fs::read(root.join("guest/initramfs/init"))?);
    archive.file("bin/busybox", &static_program(busybox)?);
    for applet in APPLETS {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.file("bin/palanquin-workload", &static_program(workload)?);
    let mut order = String::new();
    for module in modules::load(modules, &MODULES)? {
        archive.file(&format!("modules/{}.ko", module.name), &module.object);
        order.push_str(&format!("{}.ko\n", module.name));
    }
    archive.file("modules/order", order.as_bytes());
    let archive = archive.finish();

    // Packing takes longest; the archive's hash says whether it was packed already.
    let (image, stamp) = (out.join("initrd.gz"), out.join("cache/initrd.hash"));
    let mut hasher = DefaultHasher::new();
    hasher.write(&archive);
    let hash = format!("{:016x}", hasher.finish());
    if image.exists() && fs::read_to_string(&stamp).is_ok_and(|old| old == hash) {
        return Ok(());
    }
    replace(&image, &gzip(archive)?)?;
    replace(&stamp, hash.as_bytes())
}

/// Reads a program and makes sure that it needs no libraries.
fn static_program(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    if !is_static(&bytes) {
        bail!("{} is not linked statically", path.display());
    }
    Ok(bytes)
}

/// Whether an ELF64 program has no `PT_INTERP` segment (elf(5)).
fn is_static(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let half = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let offset = elf
        .get(32..40)
        .and_then(|b| b.try_into().ok())
        .map(u64::from_le_bytes)
        .and_then(|offset| usize::try_from(offset).ok());
    let (Some(offset), Some(size), Some(count)) = (offset, half(54), half(56)) else {
        return false;
    };
    (0..usize::from(count)).all(|index| {
        offset
            .checked_add(index * usize::from(size))
            .and_then(|at| elf.get(at..at.checked_add(4)?))
            .is_some_and(|kind| kind != PT_INTERP.to_le_bytes())
    })
}

fn gzip(bytes: Vec<u8>) -> Result<Vec<u8>> {
    let mut child = programs::program("gzip")
        .args(["-n", "-6"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("gzip can't be started")?;
    let mut input = child.stdin.take().context("gzip has no input")?;
    // Written beside, because gzip stops reading while nobody takes what it writes.
    let writer = std::thread::spawn(move || input.write_all(&bytes));
    let output = child.wait_with_output()?;
    match writer.join() {
        Ok(written) => written.context("gzip didn't take its input")?,
        Err(_) => bail!("the thread that feeds gzip ended early"),
    }
    if !output.status.success() {
        bail!("gzip ended with {}", output.status);
    }
    Ok(output.stdout)
}

/// The boot sector for software KVM, where Linux doesn't boot.
fn payload(root: &Path, out: &Path) -> Result<()> {
    let raw = out.join("cache/dirty_loop.bin");
    programs::output(
        programs::program("nasm")
            .args(["-f", "bin", "-o"])
            .arg(&raw)
            .arg(root.join("guest/payload/dirty_loop.asm")),
    )?;
    let mut bytes = fs::read(&raw)?;
    bytes.resize(PAYLOAD_BYTES, 0);
    replace(&out.join("dirty_loop.img"), &bytes)
}

/// Writes a file unless it holds these bytes already; readers never see half of it.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let partial = path.with_extension("partial");
    fs::write(&partial, bytes).with_context(|| partial.display().to_string())?;
    fs::rename(&partial, path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_the_right_content_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        replace(&path, b"one").unwrap();
        let written = fs::metadata(&path).unwrap().modified().unwrap();
        replace(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
    }

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        let mut elf = vec![0_u8; 64 + 2 * 56];
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 2;
        elf[64] = 1;
        elf[120] = 2;
        assert!(is_static(&elf));
        elf[120] = 3;
        assert!(!is_static(&elf));
        assert!(!is_static(b"short"));
    }

    #[test]
    fn gzip_takes_more_than_a_pipe_holds() {
        let packed = gzip(vec![7; 4 << 20]).unwrap();
        assert_eq!(packed[..2], [0x1f, 0x8b]);
    }
}
