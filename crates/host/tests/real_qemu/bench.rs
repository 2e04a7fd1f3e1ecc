//! A place for QEMUs with the boot sector, and what to look at.

use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use palanquin_host::qemu::Qemu;
use palanquin_host::vm::{Accel, Disk, Machine, Vm};

pub(crate) const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Ends the hypervisor also when the test fails.
pub(crate) struct Guard(pub(crate) Arc<dyn Vm>);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.terminate();
    }
}

pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) qemu: Qemu,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("dirty_loop.img");
        let source = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../guest/payload/dirty_loop.asm"
        );
        let built = Command::new("nasm")
            .args(["-f", "bin", source, "-o"])
            .arg(&image)
            .status()
            .expect("nasm is needed: cargo xtask setup");
        assert!(built.success());
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&image)
            .unwrap();
        file.set_len(1 << 20).unwrap();
        let qemu = Qemu::new(QEMU.into(), vec![dir.path().to_owned()]);
        Self { dir, qemu }
    }

    pub(crate) fn machine(&self, accel: Accel, memory_bytes: Vec<u64>) -> Machine {
        Machine {
            name: "payload".to_owned(),
            uuid: "6f1f6f44-0000-4000-8000-000000000001".to_owned(),
            memory_bytes,
            cpus: 1,
            accel,
            machine: "q35".to_owned(),
            cpu: None,
            kernel: None,
            initrd: None,
            append: None,
            disks: vec![Disk {
                path: self.dir.path().join("dirty_loop.img").display().to_string(),
                format: "raw".to_owned(),
                interface: "ide".to_owned(),
                ephemeral: true,
            }],
            networks: Vec::new(),
            console: true,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

pub(crate) fn wait_for(what: &str, seconds: u64, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let (_sender, receiver) = std::sync::mpsc::channel::<()>();
    while !check() {
        assert!(
            Instant::now() < deadline,
            "{what} did not happen in {seconds} s"
        );
        let _ = receiver.recv_timeout(Duration::from_millis(20));
    }
}

/// Whether somebody answers at `socket`: its file is there a moment before anybody listens.
pub(crate) fn listens(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

pub(crate) fn sweeps(dir: &Path) -> usize {
    let console = std::fs::read(dir.join("console.log")).unwrap_or_default();
    console.iter().filter(|&&byte| byte == b'B').count()
}

pub(crate) fn copy(from: &dyn Vm, to: &dyn Vm, pages: &[(usize, Range<u64>)]) {
    let (from, to) = (from.ram().unwrap(), to.ram().unwrap());
    for (region, pages) in pages {
        for page in pages.clone() {
            let mut buffer = [0; 4096];
            from.read(*region, page * 4096, &mut buffer).unwrap();
            to.write(*region, page * 4096, &buffer).unwrap();
        }
    }
}

pub(crate) fn data_pages(vm: &dyn Vm) -> Vec<(usize, Range<u64>)> {
    let ram = vm.ram().unwrap();
    let regions = 0..ram.regions().len();
    let extents = regions.flat_map(|region| {
        let extents = ram.data_extents(region).unwrap();
        extents
            .into_iter()
            .map(move |e| (region, e.start / 4096..e.end / 4096))
    });
    extents.collect()
}

pub(crate) fn memory(vm: &dyn Vm) -> Vec<Vec<u8>> {
    let ram = vm.ram().unwrap();
    let mut all = Vec::new();
    for (region, info) in ram.regions().iter().enumerate() {
        let mut bytes = vec![0; usize::try_from(info.size_bytes).unwrap()];
        for extent in ram.data_extents(region).unwrap() {
            let range =
                usize::try_from(extent.start).unwrap()..usize::try_from(extent.end).unwrap();
            ram.read(region, extent.start, &mut bytes[range]).unwrap();
        }
        all.push(bytes);
    }
    all
}

pub(crate) fn different_pages(one: &dyn Vm, other: &dyn Vm) -> Vec<(usize, usize)> {
    let (one, other) = (memory(one), memory(other));
    let mut different = Vec::new();
    for (region, (one, other)) in one.iter().zip(&other).enumerate() {
        let pages = one.chunks(4096).zip(other.chunks(4096)).enumerate();
        different.extend(
            pages
                .filter(|(_, (a, b))| a != b)
                .map(|(page, _)| (region, page)),
        );
    }
    different.truncate(20);
    different
}
