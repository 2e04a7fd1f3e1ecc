//! Memory nodes of this machine (NUMA), and which of them a VM's memory is to come from.
//!
//! What arrives is written by the agent's threads, wherever these run just then. Without a policy the kernel takes a page
//! from the node of the thread that writes it, so that a VM would end up with a part of its memory on each node, however
//! small it is. A policy of the memory itself (mbind(2) on shared memory) counts whoever writes.

use std::fs;
use std::path::Path;

/// Where Linux tells of them, see sysfs-devices-node in the kernel's ABI documentation.
pub(crate) const NODES_DIR: &str = "/sys/devices/system/node";
/// Most nodes that are looked at.
const NODES_MAX: usize = 1024;

/// A memory node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// Its number.
    pub(crate) id: u32,
    /// Bytes that can be had without swapping: free, or file pages that nobody has used lately.
    pub(crate) available_bytes: u64,
}

/// The nodes that have memory, by number. Where nothing is told, none.
pub(crate) fn nodes(dir: &Path) -> Vec<Node> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut nodes: Vec<Node> = entries
        .filter_map(|entry| {
            let id = entry.file_name().to_str()?.strip_prefix("node")?.parse();
            let text = fs::read_to_string(entry.path().join("meminfo")).ok()?;
            Some(Node {
                id: id.ok()?,
                available_bytes: available_bytes(&text)?,
            })
        })
        .take(NODES_MAX)
        .collect();
    nodes.sort_by_key(|node| node.id);
    nodes
}

/// Lines are `Node 0 MemFree:  123 kB`.
fn available_bytes(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| -> Option<u64> {
        meminfo.lines().find_map(|line| {
            let mut words = line.split_ascii_whitespace().skip(2);
            (words.next()? == name).then(|| words.next()?.parse().ok())?
        })
    };
    // A node of processors alone has no memory.
    kib("MemTotal:").filter(|&total| total > 0)?;
    let kib = kib("MemFree:")?.saturating_add(kib("Inactive(file):").unwrap_or(0));
    Some(kib.saturating_mul(1024))
}

/// For each part of a VM's memory (bytes) the node that it is to come from: the one with the most room where it fits, and
/// none where it fits nowhere. So several parts, which are the nodes that the VM sees, come from different nodes while
/// there are some, and a small VM from one. On a machine with one node there is nothing to choose.
pub(crate) fn choose(nodes: &[Node], parts: impl Iterator<Item = u64>) -> Vec<Option<u32>> {
    let mut nodes = nodes.to_vec();
    parts
        .map(|bytes| {
            if nodes.len() < 2 {
                return None;
            }
            // The first of those that are equal.
            let best = nodes
                .iter_mut()
                .rev()
                .max_by_key(|node| node.available_bytes)?;
            best.available_bytes = best.available_bytes.checked_sub(bytes)?;
            Some(best.id)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn machine(free_kib: &[(u32, u64)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (id, free) in free_kib {
            let node = dir.path().join(format!("node{id}"));
            fs::create_dir(&node).unwrap();
            let total = free * 2;
            let text = format!(
                "\nNode {id} MemTotal:       {total} kB\nNode {id} MemFree:        {free} kB\nNode {id} MemUsed:        1 kB\n\
                 Node {id} Inactive(file): 8 kB\n"
            );
            fs::write(node.join("meminfo"), text).unwrap();
        }
        fs::write(dir.path().join("online"), "0-1\n").unwrap();
        fs::create_dir(dir.path().join("power")).unwrap();
        dir
    }

    fn node(id: u32, available_bytes: u64) -> Node {
        Node {
            id,
            available_bytes,
        }
    }

    #[test]
    fn nodes_with_memory_are_found_and_others_are_not() {
        let dir = machine(&[(10, 4), (2, 100), (3, 0)]);
        assert_eq!(nodes(dir.path()), [node(2, 108 << 10), node(10, 12 << 10)]);
        assert_eq!(nodes(&dir.path().join("nowhere")), []);
    }

    #[test]
    fn this_machine_has_a_node() {
        let nodes = nodes(Path::new(NODES_DIR));
        assert!(
            nodes.iter().all(|node| node.available_bytes > 0),
            "{nodes:?}"
        );
    }

    #[test]
    fn a_vm_comes_from_the_node_with_the_most_room_and_its_own_nodes_from_different_ones() {
        let two = [node(0, 100), node(1, 120)];
        assert_eq!(choose(&two, [90].into_iter()), [Some(1)]);
        assert_eq!(choose(&two, [90, 90].into_iter()), [Some(1), Some(0)]);
        assert_eq!(
            choose(&two, [90, 90, 90].into_iter()),
            [Some(1), Some(0), None]
        );
        assert_eq!(
            choose(&[node(0, 7), node(1, 7)], [1].into_iter()),
            [Some(0)]
        );
    }

    #[test]
    fn there_is_nothing_to_choose_with_one_node() {
        assert_eq!(choose(&[node(0, 100)], [1].into_iter()), [None]);
        assert_eq!(choose(&[], [1, 2].into_iter()), [None, None]);
    }

    proptest! {
        #[test]
        fn no_node_gets_more_than_it_has(
            nodes in proptest::collection::vec(any::<u64>(), 0..6),
            parts in proptest::collection::vec(any::<u64>(), 0..9),
        ) {
            let nodes: Vec<Node> = (0..).zip(nodes).map(|(id, bytes)| node(id, bytes)).collect();
            let chosen = choose(&nodes, parts.iter().copied());
            prop_assert_eq!(chosen.len(), parts.len());
            for node in &nodes {
                let mine = chosen.iter().zip(&parts).filter(|(id, _)| **id == Some(node.id));
                let sum: u128 = mine.map(|(_, bytes)| u128::from(*bytes)).sum();
                prop_assert!(sum <= u128::from(node.available_bytes));
            }
        }

        #[test]
        fn any_text_is_read_or_not(text in ".{0,200}") {
            let _ = available_bytes(&text);
        }
    }
}
