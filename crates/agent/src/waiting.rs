//! Post-copy at the destination: pages that are not here yet, who waits for them, and for how long.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use palanquin_engine::message::{Demand, FAULT_BUCKETS, Message};
use palanquin_engine::pages::{PAGE_BYTES, PageSet, RamLayout};
use palanquin_host::Error;
use palanquin_host::vm::{GuestRam, MissingPages, Region};
use tracing::{debug, trace, warn};

use crate::data_send::Pulled;
use crate::digest::Digests;
use crate::net::wire::WireChannel;

/// How long an access is waited for before it is looked whether to go on.
const TICK: Duration = Duration::from_millis(100);

/// The control connection to the source, which may be another after a while.
pub type ChannelSlot = Arc<Mutex<Option<Arc<WireChannel>>>>;

/// Pages of a VM as they arrive. As [`GuestRam`] it places what is written.
pub struct Waiting {
    missing: Arc<dyn MissingPages>,
    ram: Arc<dyn GuestRam>,
    digests: Arc<Pulled>,
    arrived: Vec<Vec<AtomicU64>>,
    accesses: Mutex<Accesses>,
}

#[derive(Default)]
struct Accesses {
    since: HashMap<(usize, u64), Instant>,
    /// Entry `n` counts waits below 2 to the power of `n` microseconds.
    waits_log2_us: Vec<u64>,
}

impl Waiting {
    /// For a VM whose accesses to missing pages wait already.
    pub fn new(
        missing: Arc<dyn MissingPages>,
        ram: Arc<dyn GuestRam>,
        layout: &RamLayout,
        digests: Arc<Pulled>,
    ) -> Self {
        let words = |region| usize::try_from(layout.pages(region).div_ceil(64)).unwrap_or(0);
        let region = |region| (0..words(region)).map(|_| AtomicU64::new(0)).collect();
        Self {
            missing,
            ram,
            digests,
            arrived: (0..layout.regions()).map(region).collect(),
            accesses: Mutex::default(),
        }
    }

    /// Digests of what arrived.
    pub fn digests(&self) -> &Digests {
        self.digests.digests()
    }

    /// Places zeros.
    ///
    /// # Errors
    ///
    /// The hypervisor is gone, or the range is none of its pages.
    pub fn place_zero(&self, region: usize, pages: Range<u64>) -> Result<(), Error> {
        self.missing.place_zero(region, pages.clone())?;
        self.note(region, pages);
        Ok(())
    }

    /// Notes what was here before: an access to one of these pages means that the guest has given it back since, and needs
    /// no answer of the source.
    ///
    /// # Errors
    ///
    /// The memory cannot be looked at.
    pub fn note_present(&self) -> Result<(), Error> {
        for region in 0..self.arrived.len() {
            for extent in self.ram.data_extents(region)? {
                self.note(region, extent.start / PAGE_BYTES..extent.end / PAGE_BYTES);
            }
        }
        Ok(())
    }

    /// Adds the pages that have arrived.
    pub fn add_arrived(&self, pages: &mut PageSet) {
        for (region, words) in self.arrived.iter().enumerate() {
            for (first, word) in (0_u64..).step_by(64).zip(words) {
                let bits = word.load(Ordering::Acquire).to_le_bytes();
                pages.insert_bits(region, first, &bits);
            }
        }
    }

    /// Ends the waiting: what is not here reads as zeros from now on.
    ///
    /// # Errors
    ///
    /// The hypervisor does not let go.
    pub fn finish(&self) -> Result<(), Error> {
        self.missing.finish()
    }

    /// Pages that are waited for now.
    pub fn wanted(&self) -> Vec<(usize, u64)> {
        self.accesses().since.keys().copied().collect()
    }

    /// How long accesses waited, see [`palanquin_engine::message::Complete`].
    pub fn waits_log2_us(&self) -> Vec<u64> {
        self.accesses().waits_log2_us.clone()
    }

    fn accesses(&self) -> MutexGuard<'_, Accesses> {
        self.accesses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn word(&self, region: usize, page: u64) -> Option<&AtomicU64> {
        self.arrived
            .get(region)?
            .get(usize::try_from(page / 64).ok()?)
    }

    fn has_arrived(&self, region: usize, page: u64) -> bool {
        self.word(region, page)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    /// These pages are here.
    fn note(&self, region: usize, pages: Range<u64>) {
        for page in pages.clone() {
            if let Some(word) = self.word(region, page) {
                word.fetch_or(1 << (page % 64), Ordering::Release);
            }
        }
        let mut accesses = self.accesses();
        if accesses.since.is_empty() {
            return;
        }
        for page in pages {
            if let Some(since) = accesses.since.remove(&(region, page)) {
                let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
                trace!(
                    region,
                    page,
                    wait_us = micros,
                    "a page that was waited for is here"
                );
                let bucket = (64 - micros.leading_zeros()) as usize;
                let bucket = bucket.min(FAULT_BUCKETS - 1);
                if accesses.waits_log2_us.len() <= bucket {
                    accesses.waits_log2_us.resize(bucket + 1, 0);
                }
                if let Some(count) = accesses.waits_log2_us.get_mut(bucket) {
                    *count += 1;
                }
            }
        }
    }

    /// Somebody waits for this page; true if the source has to be asked for it.
    fn touched(&self, region: usize, page: u64) -> bool {
        if !self.has_arrived(region, page) {
            let mut accesses = self.accesses();
            let first = accesses.since.insert((region, page), Instant::now());
            drop(accesses);
            if !self.has_arrived(region, page) {
                return first.is_none();
            }
            self.note(region, page..page + 1);
        }
        // It is here: a page that holds data keeps it. If the guest gave it back meanwhile, zeros are what it gets.
        if let Err(error) = self.missing.place_zero(region, page..page + 1) {
            debug!(%error, region, page, "an access could not be answered");
        }
        false
    }
}

impl GuestRam for Waiting {
    fn regions(&self) -> &[Region] {
        self.ram.regions()
    }

    fn data_extents(&self, region: usize) -> Result<Vec<Range<u64>>, Error> {
        self.ram.data_extents(region)
    }

    fn read(&self, region: usize, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.ram.read(region, offset, buffer)
    }

    fn write(&self, region: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let first = offset / PAGE_BYTES;
        self.missing.place(region, first, bytes)?;
        self.note(region, first..first + bytes.len() as u64 / PAGE_BYTES);
        Ok(())
    }

    fn discard(&self, region: usize, range: Range<u64>) -> Result<(), Error> {
        self.place_zero(region, range.start / PAGE_BYTES..range.end / PAGE_BYTES)
    }
}

/// Asks the source for pages that are waited for, until it is dropped.
pub struct Asking {
    ended: Arc<AtomicBool>,
}

impl Asking {
    /// Begins.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn start(holder: Arc<dyn AsWaiting>, channel: ChannelSlot) -> std::io::Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        let work = move || {
            let Some(waiting) = holder.waiting() else {
                return;
            };
            let mut touched = Vec::new();
            while !seen.load(Ordering::Relaxed) {
                let found = waiting.missing.wait_faults(TICK, &mut |region, page| {
                    touched.push((region, page));
                });
                if let Err(error) = found {
                    // The end of the hypervisor is noticed by those who watch it.
                    warn!(%error, "accesses to missing pages are not seen any more");
                    return;
                }
                for (region, page) in touched.drain(..) {
                    trace!(region, page, "an access waits");
                    if waiting.touched(region, page) {
                        ask(&channel, region, page);
                    }
                }
            }
        };
        thread::Builder::new()
            .name("faults".to_owned())
            .spawn(work)?;
        Ok(Self { ended })
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// Something that holds a [`Waiting`].
pub trait AsWaiting: Send + Sync {
    /// It, once there is one.
    fn waiting(&self) -> Option<&Waiting>;
}

/// Asks for a page; without a connection it is asked for again when there is one.
pub fn ask(channel: &ChannelSlot, region: usize, page: u64) {
    let channel = channel
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let (Some(channel), Ok(region)) = (channel, u16::try_from(region)) else {
        return;
    };
    if let Err(error) = channel.send(&Message::Demand(Demand { region, page })) {
        debug!(%error, "a page could not be asked for");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A VM of one region whose missing pages are counted.
    #[derive(Default)]
    struct Fake {
        placed: Mutex<Vec<(u64, usize)>>,
        zeroed: Mutex<Vec<Range<u64>>>,
        regions: Vec<Region>,
    }

    impl MissingPages for Fake {
        fn wait_faults(&self, _: Duration, _: &mut dyn FnMut(usize, u64)) -> Result<(), Error> {
            Ok(())
        }

        fn place(&self, _: usize, page: u64, bytes: &[u8]) -> Result<u64, Error> {
            self.placed.lock().unwrap().push((page, bytes.len()));
            Ok(1)
        }

        fn place_zero(&self, _: usize, pages: Range<u64>) -> Result<u64, Error> {
            self.zeroed.lock().unwrap().push(pages);
            Ok(1)
        }

        fn finish(&self) -> Result<(), Error> {
            Ok(())
        }
    }

    impl GuestRam for Fake {
        fn regions(&self) -> &[Region] {
            &self.regions
        }

        fn data_extents(&self, _: usize) -> Result<Vec<Range<u64>>, Error> {
            Ok(Vec::new())
        }

        fn read(&self, _: usize, _: u64, _: &mut [u8]) -> Result<(), Error> {
            Ok(())
        }

        fn write(&self, _: usize, _: u64, _: &[u8]) -> Result<(), Error> {
            Ok(())
        }

        fn discard(&self, _: usize, _: Range<u64>) -> Result<(), Error> {
            Ok(())
        }
    }

    fn waiting() -> (Arc<Fake>, Waiting) {
        let fake = Arc::new(Fake::default());
        let layout = RamLayout::new(vec![100]).unwrap();
        let missing: Arc<dyn MissingPages> = Arc::clone(&fake) as _;
        let ram: Arc<dyn GuestRam> = Arc::clone(&fake) as _;
        let digests = Arc::new(Pulled::new(&layout, 1));
        (fake, Waiting::new(missing, ram, &layout, digests))
    }

    #[test]
    fn a_page_is_asked_for_once_and_its_wait_is_counted_when_it_arrives() {
        let (fake, waiting) = waiting();
        assert!(waiting.touched(0, 7));
        assert!(!waiting.touched(0, 7));
        assert_eq!(waiting.wanted(), [(0, 7)]);
        waiting.write(0, 6 * PAGE_BYTES, &[1; 8192]).unwrap();
        assert_eq!(*fake.placed.lock().unwrap(), [(6, 8192)]);
        assert!(waiting.wanted().is_empty());
        assert_eq!(waiting.waits_log2_us().iter().sum::<u64>(), 1);
    }

    #[test]
    fn an_access_to_a_page_that_has_arrived_is_answered_without_the_source() {
        let (fake, waiting) = waiting();
        waiting.write(0, 3 * PAGE_BYTES, &[1; 4096]).unwrap();
        assert!(!waiting.touched(0, 3));
        assert_eq!(fake.zeroed.lock().unwrap().first(), Some(&(3..4)));
    }

    #[test]
    fn a_page_outside_of_the_vm_is_no_reason_to_panic() {
        let (_, waiting) = waiting();
        assert!(waiting.touched(9, 1 << 60));
        waiting.note(9, 0..3);
    }
}
