//! Pages that QEMU's virtio devices look into while their state is loaded: the indices of the rings they share with the
//! guest (`virtio_load` compares them with those of the state). Under post-copy each of these pages would be asked for, one
//! after the other, while the VM stands still.
//!
//! QEMU tells where rings are by commands that it calls experimental (since 7.2). Without them nothing is known, and
//! nothing but time is lost.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::Value;

use super::qmp::Monitor;
use super::ram::{QemuRam, host_address};
use crate::Error;
use crate::vm::PAGE_SIZE;

/// Most devices that are asked for.
const DEVICES_MAX: usize = 64;
/// Most queues in all: a device can have 1024.
const QUEUES_MAX: usize = 256;
/// Both rings begin with flags; the index is behind them (VIRTIO 1.2, 2.7.6 and 2.7.8).
const INDEX_OFFSET: u64 = 2;

/// The pages, as region and page, in order. What cannot be found until the time is up is left out.
pub(super) fn pages(monitor: &Monitor, ram: &QemuRam, patience: Duration) -> Vec<(usize, u64)> {
    let deadline = Instant::now() + patience;
    let mut pages = BTreeSet::new();
    if let Err(error) = find(monitor, ram, deadline, &mut pages) {
        tracing::debug!(%error, found = pages.len(), "not all rings of the devices are known");
    }
    pages.into_iter().collect()
}

fn find(
    monitor: &Monitor,
    ram: &QemuRam,
    deadline: Instant,
    pages: &mut BTreeSet<(usize, u64)>,
) -> Result<(), Error> {
    let left = || deadline.saturating_duration_since(Instant::now());
    let devices = monitor.execute_within(&qmp::x_query_virtio {}, left())?;
    let mut places = BTreeSet::new();
    let mut queues = 0;
    let paths = devices.as_array().into_iter().flatten().take(DEVICES_MAX);
    for path in paths.filter_map(|device| device["path"].as_str()) {
        for queue in 0.. {
            if queues == QUEUES_MAX || left().is_zero() {
                break;
            }
            queues += 1;
            let command = qmp::x_query_virtio_queue_status {
                path: path.to_owned(),
                queue,
            };
            // That there is no such queue is an error, too.
            let Ok(status) = monitor.execute_within(&command, left()) else {
                break;
            };
            places.extend(indices(&status).map(|address| address / PAGE_SIZE));
        }
    }
    for page in places {
        if left().is_zero() {
            return Err(Error::Timeout("asking for the rings of the devices"));
        }
        let host = host_address(monitor, page * PAGE_SIZE)?;
        pages.extend(host.and_then(|host| ram.page_at(host)));
    }
    Ok(())
}

/// Guest-physical addresses of a queue's two indices; of one that the guest has not set up, none.
fn indices(status: &Value) -> impl Iterator<Item = u64> + use<> {
    ["vring-avail", "vring-used"]
        .map(|ring| status[ring].as_u64().filter(|&address| address != 0))
        .into_iter()
        .flatten()
        .filter_map(|address| address.checked_add(INDEX_OFFSET))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_queue_that_is_set_up_has_two_indices() {
        let status = json!({"name": "virtio-net", "vring-num": 256, "vring-desc": 4096, "vring-avail": 8192, "vring-used": 12284});
        assert_eq!(indices(&status).collect::<Vec<_>>(), [8194, 12286]);
    }

    #[test]
    fn a_queue_that_is_not_has_none_and_odd_answers_are_passed_over() {
        for status in [
            json!({"vring-avail": 0, "vring-used": 0}),
            json!({"vring-avail": u64::MAX, "vring-used": -1}),
            json!({"vring-avail": "8192"}),
            json!([1, 2]),
            json!(null),
        ] {
            assert_eq!(indices(&status).count(), 0, "{status}");
        }
    }
}
