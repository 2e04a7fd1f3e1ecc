//! What QEMU tells of its disks: those whose reads bypass write tracking.

use std::collections::BTreeSet;

use serde_json::Value;

use super::obstacle;
use crate::vm::Obstacle;

/// Drivers that let a device write guest memory whatever their cache mode is.
const ALWAYS_DIRECT: [&str; 4] = [
    "nvme",
    "nvme-io_uring",
    "virtio-blk-vhost-vdpa",
    "virtio-blk-vfio-pci",
];

/// Disks that the host reads with O_DIRECT, from an answer to `query-named-block-nodes`.
///
/// The kernel pins the guest's pages when such a read begins, and the disk writes them when it ends. A page that was
/// protected in between changes without a fault, so that tracking never names it and its old contents would stay at
/// the destination. Reads through the page cache are copied by the processor, which faults.
pub(super) fn direct_disks(nodes: &Value) -> Vec<Obstacle> {
    let mut files = BTreeSet::new();
    for node in nodes.as_array().into_iter().flatten() {
        let driver = node["drv"].as_str().unwrap_or_default();
        let direct = node["cache"]["direct"].as_bool().unwrap_or(false);
        if (direct && !driver.starts_with("null-")) || ALWAYS_DIRECT.contains(&driver) {
            let name = node["file"].as_str().filter(|name| !name.is_empty());
            files.insert(name.or(node["node-name"].as_str()).unwrap_or("?"));
        }
    }
    let refuse = |file: &str| {
        obstacle(
            "disk-direct-io",
            format!(
                "disk {file:?} is read past the page cache, straight into the guest's memory, which cannot be followed"
            ),
            "Start the VM with `cache=writeback` or `cache=writethrough` (`cache.direct=off`) for this disk.",
        )
    };
    files.into_iter().map(refuse).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_disk_read_past_the_page_cache_is_named_once() {
        let nodes = json!([
            { "drv": "raw", "file": "/d/a", "node-name": "#1", "cache": { "direct": true } },
            { "drv": "file", "file": "/d/a", "node-name": "#2", "cache": { "direct": true } },
            { "drv": "file", "file": "/d/b", "node-name": "#3", "cache": { "direct": false } },
            { "drv": "null-co", "file": "null-co://", "cache": { "direct": true } },
            { "drv": "nvme", "file": "", "node-name": "fast", "cache": { "direct": false } },
        ]);
        let found = direct_disks(&nodes);
        let messages: Vec<&str> = found.iter().map(|o| o.message.as_str()).collect();
        assert_eq!(messages.len(), 2, "{messages:?}");
        assert!(messages[0].contains("/d/a") && messages[1].contains("fast"));
    }

    #[test]
    fn an_answer_of_another_form_names_nothing() {
        for odd in [json!(null), json!({}), json!([1, {}, { "cache": 3 }])] {
            assert_eq!(direct_disks(&odd), []);
        }
    }
}
