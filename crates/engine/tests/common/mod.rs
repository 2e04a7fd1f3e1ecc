//! What the tests of a source share: an order, what is offered under it, and challenges.

use palanquin_engine::ids::Challenge32;
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
        credentials: Vec::new(),
    }
}

/// What the source's greeting has.
pub(crate) const CHALLENGE: Challenge32 = Challenge32([1; 32]);
/// What the source sends when it begins to pause the VM.
pub(crate) const LAST_CHALLENGE: Challenge32 = Challenge32([2; 32]);
/// What the destination's greeting has.
pub(crate) const THEIR_CHALLENGE: Challenge32 = Challenge32([3; 32]);
