//! Which memory nodes a container's memory comes from.

use std::fs;
use std::path::Path;

use palanquin_host::vm::{Accel, Hypervisor, Vm};

use crate::bench::{Bench, Guard, sweeps, wait_for};

/// What the kernel would tell of two nodes, of which this one has room.
fn two_nodes(dir: &Path, roomy: u32) {
    for id in 0..2 {
        let node = dir.join(format!("node{id}"));
        fs::create_dir_all(&node).unwrap();
        let free = if id == roomy { 64 << 20 } else { 1 };
        let text = format!("Node {id} MemTotal: {free} kB\nNode {id} MemFree: {free} kB\n");
        fs::write(node.join("meminfo"), text).unwrap();
    }
}

/// The policy of the VM's memory, see `numa_maps` in proc(5).
fn policy(vm: &dyn Vm) -> String {
    let maps = fs::read_to_string(format!("/proc/{}/numa_maps", vm.handle().pid)).unwrap();
    let ram = maps.lines().find(|line| line.contains("memfd:"));
    let words: Vec<&str> = ram.expect("memory").split(' ').collect();
    words[1].to_owned()
}

/// Prepares a container on a machine of two nodes.
fn prepared_where(roomy: u32) -> (Bench, Guard) {
    let mut bench = Bench::new();
    let dir = bench.path("a");
    let source = bench
        .qemu
        .spawn(&bench.machine(Accel::Tcg, vec![96 << 20]), &dir);
    let source = Guard(source.unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    let descriptor = source.0.describe().unwrap();
    let nodes = bench.path("nodes");
    two_nodes(&nodes, roomy);
    bench.qemu = bench.qemu.clone().with_nodes_of(nodes);
    let prepared = bench.qemu.prepare(&descriptor, &bench.path("b"), 8 << 30);
    let destination = Guard(prepared.unwrap_or_else(|error| panic!("{error:?}")));
    let next = destination.0.describe().unwrap();
    assert_eq!(next.arguments, descriptor.arguments, "nodes do not travel");
    (bench, destination)
}

#[test]
fn memory_comes_from_the_node_that_has_room_whoever_writes_it() {
    let (_bench, destination) = prepared_where(0);
    assert!(
        policy(&*destination.0).starts_with("prefer"),
        "{}",
        policy(&*destination.0)
    );
    // The policy is the file's, so that it counts for what arrives.
    let ram = destination.0.ram().unwrap();
    ram.write(0, 0, &[1; 4096]).unwrap();
    assert!(!ram.data_extents(0).unwrap().is_empty());
}

#[test]
fn a_qemu_that_takes_no_memory_from_there_takes_it_from_anywhere() {
    // This machine has no such node, or has it; QEMU ends where it is not there.
    let (_bench, destination) = prepared_where(1);
    let there = Path::new("/sys/devices/system/node/node1").exists();
    assert_eq!(policy(&*destination.0).starts_with("prefer"), there);
}
