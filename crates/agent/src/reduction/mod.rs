//! Wire reduction: fewer bytes for the same memory.
//!
//! [`encode`] turns the pages of a block into frames, [`decode`] turns frames into guest memory. In order, each page is
//! nothing but a bit if it is zero, a reference if an equal page was sent over the same stream ([`cache`]), what
//! differs from the version sent before if that is little ([`delta`]), or else goes with the rest of its block through
//! the compression that pays just now ([`choose`]). Frames are described in [`palanquin_engine::frame`].
//!
//! Pages of one block always use the same stream, and a stream keeps its order. So what a stream has sent last of its
//! own pages is what the destination holds when the next frame of that stream arrives, and references need no
//! acknowledgements. They must not be used once the VM writes at the destination.

use palanquin_engine::pages::PAGE_BYTES;

pub mod cache;
pub mod choose;
pub mod decode;
pub mod delta;
pub mod encode;
#[cfg(test)]
mod speed;
#[cfg(test)]
mod tests;

/// Bytes of a page.
pub const PAGE: usize = PAGE_BYTES as usize;
/// Bytes of page versions that the streams of a migration keep together.
pub const CACHE_BYTES: usize = 32 << 20;

/// The stream that a block's pages use.
pub fn stream_of(region: u16, block: u32, streams: usize) -> usize {
    (block as usize + usize::from(region)) % streams.max(1)
}
