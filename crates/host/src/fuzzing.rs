//! Parsers that are no part of this crate's interface, for the fuzz targets.

use std::path::{Path, PathBuf};

pub use crate::probe::fuzzing::*;
use crate::qemu::fuzzing::behind;
pub use crate::qemu::fuzzing::*;

/// The group in a text of `/proc/PID/cgroup`, in the first hierarchy of a text of `/proc/PID/mountinfo`; and the
/// processes that groups of these names are for.
pub fn group(mounts: &str, groups: &str) -> (Option<PathBuf>, Vec<u32>) {
    crate::throttle::group(mounts, groups)
}

/// The file behind a disk image of format qcow2, and its format; or why the image is refused.
pub fn behind_image(image: &Path) -> Result<Option<(PathBuf, String)>, String> {
    behind(image)
}
