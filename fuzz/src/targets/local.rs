//! What programs and the kernel of this host say. Not hostile, but of any version.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use palanquin_host::fuzzing::{
    direct_disks, fault_address, group, guest_address, is_note, is_our_userfaultfd, large_blocks,
    mapped, monitor_answer,
};

use super::{seeds_of, within, words_of};
use crate::entry::Target;

/// A monitor of QEMU (QMP).
pub(crate) const MONITOR: Target = Target::new("monitor", monitor, || {
    let deep = format!("{{\"return\":{}", "[".repeat(3000));
    seeds_of(&[
        "{\"return\": {}, \"id\": \"1\"}\n",
        "{\"event\": \"STOP\", \"timestamp\": {}}\n{\"return\": [{\"drv\": \"file\", \"file\": \"/x\", \"cache\": {\"direct\": true}}], \"id\": \"1\"}\n",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n",
        "{\"return\": null}\n{\"return\": 1e999}\n",
        "{\"return\": 1, \"return\": 2}\n",
        "{\"return\": [{\"node-name\": \"n\", \"drv\": \"nvme\"}], \"id\": \"1\"}",
        "\n\n\n",
        "{}\n{}\n",
        &deep,
    ])
})
.words(|| words_of(&["return", "error", "event", "id", "1", "desc", "cache", "direct", "drv", "file", "node-name", "true", "null"]));

/// Texts of `/proc`, cgroups and the note of where guest RAM is.
pub(crate) const PROC: Target = Target::new("proc", proc, || {
    let mut seeds = seeds_of(&[
        "7f00-8f00 rw-s 00001000 00:01 77 /memfd:ram (deleted)\n5000-4000 r--p 0 0:0 0\nffffffffffffffff-0 ---s 0 0:0 0",
        "pos:\t0\nAPI:\taa:80004920:80000000000001ff\n",
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n0::/a/b\n",
        "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n4:cpu,cpuacct:/x\n",
        "{\"pid\":1,\"start_ticks\":2,\"boot_id\":\"b\",\"places\":[{\"name\":\"r\",\"size_bytes\":4096,\"file\":{\"device\":1,\"inode\":2}}]}",
    ]);
    let mut fault = vec![0x12];
    fault.resize(32, 7);
    seeds.push(fault);
    seeds
});

/// Trees and blocks of memory in words for people.
pub(crate) const TREE: Target = Target::new("tree", tree, || {
    seeds_of(&[
        "FlatView #1\n  0000000000000000-00000000000bffff (prio 0, ram): ram0 KVM\n  0000000008000000-000000000fffffff (prio 0, ram): ram0 @0000000000001000 KVM\n",
        "  0000000010000000-000000001fffffff (prio 0, ram): /objects/ram0\n  (prio 0, i/o): x",
        "   Block Name    PSize   Offset   Used   Total\n   ram0    4 KiB  0x0 0x4000000 0x4000000\n  vga.vram    4 KiB  0x4080000 0x8000000 0x8000000\n",
    ])
})
.words(|| words_of(&[" (prio 0, ram): ", "ram0", "/objects/", " @", "-", " KVM", "0x", "4 KiB"]));

fn monitor(data: &[u8]) {
    let (mut qemu, client) = UnixStream::pair().expect("two sockets");
    // What does not fit into the socket would wait for a reader.
    let data = &data[..data.len().min(64 << 10)];
    qemu.set_write_timeout(Some(Duration::from_secs(1)))
        .expect("a timeout");
    if qemu.write_all(data).is_err() || qemu.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let deadline = Instant::now() + Duration::from_secs(2);
    let answer = within(data.len() * 256 + (64 << 10), || {
        monitor_answer(client, deadline)
    });
    assert!(
        Instant::now() < deadline,
        "all that will ever come is there already"
    );
    if let Ok(Some(value)) = answer {
        for obstacle in direct_disks(&value) {
            assert_eq!(obstacle.code, "disk-direct-io");
        }
        let id = value["id"].as_str().unwrap_or("ram0");
        let _ = (
            value.as_str().map(|text| guest_address(text, id)),
            value["size"].as_u64(),
        );
    }
}

fn proc(data: &[u8]) {
    let _ = (is_note(data), fault_address(data));
    let text = String::from_utf8_lossy(data);
    for range in mapped(&text) {
        assert!(range.start <= range.end);
    }
    let _ = is_our_userfaultfd(&text);
    let (group, owners) = group(&text, &text);
    assert!(owners.len() <= text.lines().count());
    let lines: Vec<_> = text.lines().collect();
    assert!(group.is_none_or(|path| {
        lines
            .iter()
            .any(|line| line.ends_with(path.to_str().unwrap_or_default()))
    }));
}

fn tree(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if guest_address(&text, "ram0").is_some() {
        assert!(text.contains("ram0"));
    }
    for (name, used) in large_blocks(&text, &["ram0"], 1 << 20) {
        assert!(used > 1 << 20 && name != "ram0" && text.contains(&name));
    }
}
