//! Which pages of the VM are looked for, and found.

use palanquin_engine::pages::{PAGE_BYTES, PageSet};
use palanquin_engine::source::Failure;
use palanquin_host::vm::GuestRam;

use super::{SourceSession, failure, missing};

impl SourceSession {
    pub(super) fn collect(&mut self, first: bool) -> Result<PageSet, Failure> {
        let (Some(tracker), Some(layout), Some(vm)) =
            (&mut self.tracker, &self.params.layout, &self.vm)
        else {
            return Err(missing("tracking"));
        };
        let mut pages = PageSet::empty(layout);
        tracker
            .collect(&mut |region, range| {
                if !first {
                    pages.insert(region, range);
                }
            })
            .map_err(|error| failure("tracking", &error))?;
        if first {
            // Tracking is armed now: what is filled from here on is collected later, holes are never touched.
            let ram = vm.ram().map_err(|error| failure("memory", &error))?;
            insert_data(ram.as_ref(), &mut pages)?;
        }
        Ok(pages)
    }

    pub(super) fn peek(&mut self) -> Result<PageSet, Failure> {
        let (Some(tracker), Some(layout)) = (&mut self.tracker, &self.params.layout) else {
            return Err(missing("tracking"));
        };
        let mut pages = PageSet::empty(layout);
        tracker
            .peek(&mut |region, range| pages.insert(region, range))
            .map_err(|error| failure("tracking", &error))?;
        Ok(pages)
    }

    pub(super) fn find_data(&self) -> Result<PageSet, Failure> {
        let (Some(vm), Some(layout)) = (&self.vm, &self.params.layout) else {
            return Err(missing("VM"));
        };
        let ram = vm.ram().map_err(|error| failure("memory", &error))?;
        let mut pages = PageSet::empty(layout);
        insert_data(ram.as_ref(), &mut pages)?;
        Ok(pages)
    }
}

/// Adds the pages that hold data.
fn insert_data(ram: &dyn GuestRam, pages: &mut PageSet) -> Result<(), Failure> {
    for region in 0..ram.regions().len() {
        let extents = ram.data_extents(region);
        for extent in extents.map_err(|error| failure("memory", &error))? {
            let first = extent.start / PAGE_BYTES;
            pages.insert(region, first..extent.end.div_ceil(PAGE_BYTES));
        }
    }
    Ok(())
}
