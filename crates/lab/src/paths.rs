//! Where the programs and the guest's files lie: beside the program that runs, as Cargo puts them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The program of that name: in `PALANQUIN_BIN_DIR`, else beside the program that runs.
///
/// # Errors
///
/// If it was not built.
pub fn program(name: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("PALANQUIN_BIN_DIR") {
        return Ok(PathBuf::from(dir).join(name));
    }
    let here = std::env::current_exe().context("no path of this program")?;
    // Tests lie one level deeper, in `deps`.
    let found = here
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        let dir = here.parent().unwrap_or(Path::new("."));
        format!(
            "no {name} beside {}: build palanquin-agent and palanquin-cli first",
            dir.display()
        )
    })
}

/// Directory with `vmlinuz`, `initrd.gz` and `dirty_loop.img`: `PALANQUIN_GUEST_DIR`, else `guest` in the target
/// directory.
///
/// # Errors
///
/// If it was not built.
pub fn guest_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("PALANQUIN_GUEST_DIR") {
        return Ok(dir.into());
    }
    let here = std::env::current_exe().context("no path of this program")?;
    let found = here
        .ancestors()
        .map(|dir| dir.join("guest"))
        .find(|dir| dir.join("vmlinuz").is_file());
    let Some(found) = found else {
        bail!("the test guests are not built: run `cargo xtask setup` and `cargo xtask guest`");
    };
    Ok(found)
}
