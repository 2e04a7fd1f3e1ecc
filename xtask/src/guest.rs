//! Builds what the guests run: Debian's cloud kernel, unpacked without installing it, and a RAM disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{root, run};

/// Drivers of the network card, in the order in which they are loaded.
const MODULES: [&str; 8] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];

/// Builds everything that is not there or older than its source.
pub(crate) fn build() -> Result<()> {
    let out = root().join("target/guest");
    fs::create_dir_all(&out)?;
    kernel(&out)?;
    payload(&out)?;
    initrd(&out)
}

fn kernel(out: &Path) -> Result<()> {
    if out.join("vmlinuz").exists() && out.join("modules/order").exists() {
        return Ok(());
    }
    println!("fetching Debian's cloud kernel");
    let download = out.join("download");
    let _ = fs::remove_dir_all(&download);
    fs::create_dir_all(&download)?;
    let package = kernel_package().or_else(|_| {
        run("apt-get", &["update", "-q"])?;
        kernel_package()
    })?;
    // `apt-get download` drops root for a user that may not write here.
    let status = Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", &package])
        .current_dir(&download)
        .status()?;
    if !status.success() {
        bail!("{package} could not be downloaded");
    }
    let archive = only_file(&download)?;
    let tree = out.join("tree");
    let _ = fs::remove_dir_all(&tree);
    run(
        "dpkg-deb",
        &[
            "-x",
            &archive.display().to_string(),
            &tree.display().to_string(),
        ],
    )?;
    let is_kernel = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
    };
    let mut boot = fs::read_dir(tree.join("boot"))?
        .flatten()
        .map(|entry| entry.path());
    let kernel = boot.find(is_kernel).context("no kernel in the package")?;
    modules(&tree, out)?;
    fs::copy(kernel, out.join("vmlinuz"))?;
    fs::remove_dir_all(&tree)?;
    fs::remove_dir_all(&download)?;
    Ok(())
}

fn kernel_package() -> Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", "linux-image-cloud-amd64"])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let package = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    Ok(format!(
        "linux-image-{}",
        package.context("linux-image-cloud-amd64 is not known to apt")?
    ))
}

fn only_file(dir: &Path) -> Result<PathBuf> {
    fs::read_dir(dir)?
        .flatten()
        .map(|entry| entry.path())
        .next()
        .context("nothing was downloaded")
}

fn modules(tree: &Path, out: &Path) -> Result<()> {
    let base = ["lib/modules", "usr/lib/modules"].map(|dir| tree.join(dir));
    let base = base
        .iter()
        .find(|dir| dir.exists())
        .context("no modules in the package")?;
    let version = only_file(base)?;
    let dir = out.join("modules");
    fs::create_dir_all(&dir)?;
    let mut order = String::new();
    for module in MODULES {
        let from = version.join("kernel").join(module);
        let name = from
            .file_name()
            .context("a module without a name")?
            .to_owned();
        let to = dir.join(&name);
        // Built in, or another compression: both are told apart by what is there.
        if from.exists() {
            fs::copy(&from, &to)?;
        } else if from.with_extension("ko.xz").exists() {
            let unpacked = Command::new("xz")
                .args(["-dc"])
                .arg(from.with_extension("ko.xz"))
                .output()?;
            fs::write(&to, unpacked.stdout)?;
        } else {
            continue;
        }
        order += &format!("{}\n", name.to_string_lossy());
    }
    fs::write(dir.join("order"), order)?;
    Ok(())
}

fn payload(out: &Path) -> Result<()> {
    let source = root().join("guest/payload/dirty_loop.asm");
    let image = out.join("dirty_loop.img");
    if newer(&image, &source) {
        return Ok(());
    }
    run(
        "nasm",
        &[
            "-f",
            "bin",
            &source.display().to_string(),
            "-o",
            &image.display().to_string(),
        ],
    )?;
    fs::OpenOptions::new()
        .write(true)
        .open(&image)?
        .set_len(1 << 20)?;
    Ok(())
}

fn newer(one: &Path, other: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified());
    matches!((time(one), time(other)), (Ok(one), Ok(other)) if one >= other)
}

fn initrd(out: &Path) -> Result<()> {
    let target = root().join("target/guest-build");
    let status = Command::new("cargo")
        .args(["build", "--release", "-q", "-p", "palanquin-workload", "--target", "x86_64-unknown-linux-gnu"])
        .arg("--target-dir")
        .arg(&target)
        // Static, because the RAM disk has no C library.
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .current_dir(root())
        .status()?;
    if !status.success() {
        bail!("the guest's workload does not build");
    }
    let program = target.join("x86_64-unknown-linux-gnu/release/palanquin-workload");
    let initrd = out.join("initrd.gz");
    if newer(&initrd, &program) && newer(&initrd, &out.join("modules/order")) {
        return Ok(());
    }
    let tree = out.join("initrd");
    let _ = fs::remove_dir_all(&tree);
    for dir in ["bin", "dev", "proc", "sys", "modules"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    fs::copy(&program, tree.join("init"))?;
    fs::copy("/bin/busybox", tree.join("bin/busybox"))?;
    for entry in fs::read_dir(out.join("modules"))?.flatten() {
        fs::copy(entry.path(), tree.join("modules").join(entry.file_name()))?;
    }
    let mut pack = Command::new("sh")
        .args(["-c", "find . | cpio -o -H newc --quiet | gzip -9"])
        .current_dir(&tree)
        .stdout(Stdio::from(fs::File::create(out.join("initrd.part"))?))
        .spawn()?;
    if !pack.wait()?.success() {
        bail!("the RAM disk could not be packed");
    }
    fs::rename(out.join("initrd.part"), initrd)?;
    Ok(())
}
