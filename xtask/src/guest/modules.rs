//! Kernel modules a guest needs, and the order to load them in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::programs;

/// A module, ready for insmod(8).
pub(crate) struct Module {
    /// Name with underscores.
    pub(crate) name: String,
    /// The object file, not compressed.
    pub(crate) object: Vec<u8>,
}

/// Reads `wanted` and all they depend on from the tree of an unpacked kernel package
/// (`lib/modules/VERSION`), dependencies first. What is built into the kernel is left out.
pub(crate) fn load(tree: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let builtin = fs::read_to_string(tree.join("modules.builtin"))
        .with_context(|| format!("{} has no modules.builtin", tree.display()))?;
    let builtin: BTreeSet<String> = builtin.lines().filter_map(|l| name(Path::new(l))).collect();
    let mut files = BTreeMap::new();
    find(tree, &mut files)?;
    let mut order = Order {
        builtin,
        files,
        seen: BTreeSet::new(),
        modules: Vec::new(),
    };
    for name in wanted {
        order.add(name)?;
    }
    Ok(order.modules)
}

struct Order {
    builtin: BTreeSet<String>,
    files: BTreeMap<String, PathBuf>,
    seen: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Order {
    fn add(&mut self, name: &str) -> Result<()> {
        if self.builtin.contains(name) || !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self
            .files
            .get(name)
            .with_context(|| format!("the kernel has no module {name}"))?;
        let object = read(path)?;
        for dependency in depends(&object) {
            self.add(&dependency)?;
        }
        self.modules.push(Module {
            name: name.to_owned(),
            object,
        });
        Ok(())
    }
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if let Some(name) = name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `virtio_net` for `.../virtio-net.ko.xz`: the kernel takes both signs for the same.
fn name(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("ko") => fs::read(path).with_context(|| path.display().to_string()),
        Some("xz") => programs::output(Command::new("xz").arg("-dc").arg(path)),
        Some("zst") => programs::output(Command::new("zstd").arg("-dcq").arg(path)),
        _ => bail!("{} is compressed in an unknown way", path.display()),
    }
}

/// What the module's `.modinfo` section says under `depends`. The package comes without the
/// `modules.dep` that depmod(8) makes at installation, so the modules themselves are asked.
fn depends(object: &[u8]) -> Vec<String> {
    object
        .split(|byte| *byte == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="))
        .map(String::from_utf8_lossy)
        .map(|names| {
            names
                .split(',')
                .filter(|name| !name.is_empty())
                .map(|name| name.replace('-', "_"))
                .collect()
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)], builtin: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        fs::create_dir(dir.path().join("kernel")).unwrap();
        for (file, depends) in modules {
            let object = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
            fs::write(dir.path().join("kernel").join(file), object).unwrap();
        }
        dir
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tree(
            &[
                ("a-x.ko", "b,c"),
                ("b.ko", "c"),
                ("c.ko", "ring"),
                ("other.ko", ""),
            ],
            "kernel/drivers/ring.ko\n",
        );
        let modules = load(dir.path(), &["a_x", "b"]).unwrap();
        let names: Vec<&str> = modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["c", "b", "a_x"]);
    }

    #[test]
    fn a_missing_module_is_named() {
        let dir = tree(&[("a.ko", "gone")], "");
        let error = load(dir.path(), &["a"]).err().unwrap();
        assert_eq!(error.to_string(), "the kernel has no module gone");
    }
}
