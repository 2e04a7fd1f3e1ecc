//! What of this module the fuzz targets reach.

use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;

use super::{allowed, command_line, missing, qmp, ram, record, storage, text};
use crate::vm::{Descriptor, Obstacle};

/// Stands for the VM's directory in arguments that cross hosts.
pub const VM_DIR: &str = command_line::VM_DIR;

/// Everything in the arguments of a VM from another host that it may not bring; its files must be below a directory
/// of `allowed_paths`.
pub fn judge_arguments(descriptor: &Descriptor, allowed_paths: &[PathBuf]) -> Vec<Obstacle> {
    allowed::judge(descriptor, allowed_paths)
}

/// Arguments of a running QEMU without what belongs to one host.
pub fn portable_arguments(args: &[String], vm_dir: &Path, machine: &str) -> Vec<String> {
    command_line::portable(args, vm_dir, machine)
}

/// First guest-physical address of a backend in `info mtree -f`, and the offset in the backend found there.
pub fn guest_address(tree: &str, id: &str) -> Option<(u64, u64)> {
    text::guest_address(tree, id)
}

/// Blocks of `info ramblock` that are none of the backends and larger than `threshold` bytes.
pub fn large_blocks(blocks: &str, ids: &[&str], threshold: u64) -> Vec<(String, u64)> {
    text::large_others(blocks, ids, threshold)
}

/// Addresses of the mappings in `/proc/PID/maps`.
pub fn mapped(maps: &str) -> Vec<Range<u64>> {
    ram::mapped(maps)
}

/// Whether a text of `/proc/PID/fdinfo/FD` shows a userfaultfd of ours.
pub fn is_our_userfaultfd(info: &str) -> bool {
    missing::is_ours(info)
}

/// Address of a fault, from a message of a userfaultfd.
pub fn fault_address(message: &[u8]) -> Option<u64> {
    missing::fault_address(message)
}

/// Disks read past the page cache, from an answer to `query-named-block-nodes`.
pub fn direct_disks(nodes: &Value) -> Vec<Obstacle> {
    storage::direct_disks(nodes)
}

/// Whether this is a note of where guest RAM is.
pub fn is_note(bytes: &[u8]) -> bool {
    record::is_note(bytes)
}

/// What a client makes of what a monitor says on this socket: the result, nothing for a refusal.
pub fn monitor_answer(said: UnixStream, deadline: Instant) -> io::Result<Option<Value>> {
    qmp::answer(said, deadline)
}

pub(crate) fn behind(image: &Path) -> Result<Option<(PathBuf, String)>, String> {
    allowed::behind_image(image)
}
