//! Debian's cloud kernel, unpacked without being installed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::programs;

/// Package that depends on the current cloud kernel.
const META: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
pub(crate) struct Kernel {
    /// The image.
    pub(crate) image: PathBuf,
    /// `lib/modules/VERSION`.
    pub(crate) modules: PathBuf,
}

/// Returns the kernel unpacked in `cache`, downloading it if there is none. A kernel that is there
/// is kept, so that a test run doesn't depend on what was released today.
pub(crate) fn fetch(cache: &Path) -> Result<Kernel> {
    let unpacked = cache.join("kernel");
    if let Ok(kernel) = locate(&unpacked) {
        return Ok(kernel);
    }
    let download = cache.join("download");
    // Package lists may be absent or name a version that is gone: then they are fetched, once.
    let archive = match get(&download) {
        Ok(archive) => archive,
        Err(why) => {
            println!("guest: {why:#}; fetching the package lists");
            programs::run("apt-get", &["update", "-q"])
                .context("the kernel's package can't be found without package lists")?;
            get(&download)?
        }
    };

    // Unpacked beside and renamed: an interrupted run leaves nothing that looks complete.
    let partial = cache.join("kernel.partial");
    remove(&partial)?;
    programs::output(
        programs::program("dpkg-deb")
            .arg("-x")
            .args([&archive, &partial]),
    )?;
    locate(&partial)?;
    remove(&unpacked)?;
    fs::rename(&partial, &unpacked)?;
    remove(&download)?;
    locate(&unpacked)
}

/// Downloads the current kernel's package into an empty directory.
fn get(download: &Path) -> Result<PathBuf> {
    let depends = programs::text(programs::program("apt-cache").args(["depends", META]))?;
    let package = package(&depends).with_context(|| format!("apt knows no {META}"))?;
    println!("guest: downloading {package}");
    remove(download)?;
    fs::create_dir_all(download)?;
    let mut get = programs::program("apt-get");
    // apt drops root for a user that may not write here.
    get.args(["-qq", "-o", "APT::Sandbox::User=root", "download", &package])
        .current_dir(download);
    programs::output(&mut get).context("the kernel can't be downloaded")?;
    fs::read_dir(download)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .with_context(|| format!("apt-get download {package} left no .deb"))
}

/// The versioned package among the lines of `apt-cache depends`.
fn package(depends: &str) -> Option<String> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
}

fn locate(unpacked: &Path) -> Result<Kernel> {
    let image = only(&unpacked.join("boot"), "vmlinuz-")?;
    // Trixie's packages install below /usr.
    let modules = only(&unpacked.join("lib/modules"), "")
        .or_else(|_| only(&unpacked.join("usr/lib/modules"), ""))?;
    Ok(Kernel { image, modules })
}

fn only(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found = fs::read_dir(directory)
        .with_context(|| directory.display().to_string())?
        .filter_map(|entry| entry.ok())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    match (found.next(), found.next()) {
        (Some(entry), None) => Ok(entry.path()),
        _ => bail!("{} doesn't hold exactly one {prefix}*", directory.display()),
    }
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(why) if why.kind() != std::io::ErrorKind::NotFound => {
            Err(why).with_context(|| directory.display().to_string())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_versioned_package_is_found_among_the_dependencies() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-base\n  \
                    Depends: linux-image-6.1.0-40-cloud-amd64\n  Suggests: x\n";
        assert_eq!(
            package(text).as_deref(),
            Some("linux-image-6.1.0-40-cloud-amd64")
        );
        assert_eq!(package("N: Unable to locate package\n"), None);
    }

    #[test]
    fn a_half_unpacked_kernel_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("boot")).unwrap();
        fs::write(dir.path().join("boot/vmlinuz-6.1"), "").unwrap();
        assert!(locate(dir.path()).is_err());
        fs::create_dir_all(dir.path().join("lib/modules/6.1")).unwrap();
        assert!(locate(dir.path()).is_ok());
    }
}
