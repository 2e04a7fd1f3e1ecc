//! What the tests of a source share: an order, and what is offered under it.

use palanquin_engine::message::Offer;
use palanquin_engine::strategy::PostCopyUse;
use palanquin_engine::{Epoch, MigrationId, Order, VmId};

/// Of a VM with one region, from host a to host b, without post-copy.
pub(crate) fn offer(pages: u64, streams: u16) -> Offer {
    let order = Order {
        migration: MigrationId([1; 16]),
        vm: VmId([2; 16]),
        vm_name: "vm".to_owned(),
        epoch: Epoch(1),
        source: "a".to_owned(),
        destination: "b".to_owned(),
        expires_unix_s: 100,
        run: true,
    };
    Offer {
        order,
        descriptor: Vec::new(),
        region_pages: vec![pages],
        streams,
        digest_seed: 0,
        post_copy: PostCopyUse::No,
    }
}
