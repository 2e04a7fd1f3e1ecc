//! Guest RAM in the hands of a process that has nothing but its descriptors: no hypervisor, no privileges.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::Error;
use crate::qemu::Placer;
use crate::ram_file::RamFile;
use crate::vm::{GuestRam, MissingPages, Region, SharedFaults};

/// Guest RAM from the descriptors that [`GuestRam::share`] gave.
#[derive(Debug)]
pub struct SharedRam {
    regions: Vec<Region>,
    files: Vec<RamFile>,
}

impl SharedRam {
    /// Takes the descriptors of these regions, in their order.
    ///
    /// # Errors
    ///
    /// There are more or fewer of them, or one has another size than its region.
    pub fn new(regions: Vec<Region>, files: Vec<OwnedFd>) -> Result<Self, Error> {
        if regions.len() != files.len() {
            return Err(Error::Ram(format!(
                "{} descriptors for {} regions",
                files.len(),
                regions.len()
            )));
        }
        let files = regions
            .iter()
            .zip(files)
            .map(|(region, file)| RamFile::new(file.into(), &region.name, region.size_bytes))
            .collect::<Result<_, _>>()?;
        Ok(Self { regions, files })
    }

    fn file(&self, region: usize) -> Result<&RamFile, Error> {
        self.files
            .get(region)
            .ok_or_else(|| Error::Ram(format!("region {region} does not exist")))
    }
}

impl GuestRam for SharedRam {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn data_extents(&self, region: usize) -> Result<Vec<Range<u64>>, Error> {
        self.file(region)?.data_extents()
    }

    fn read(&self, region: usize, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.file(region)?.read(offset, buffer)
    }

    fn write(&self, region: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.file(region)?.write(offset, bytes)
    }

    fn discard(&self, region: usize, range: Range<u64>) -> Result<(), Error> {
        self.file(region)?.discard(&range)
    }
}

/// Missing pages from what [`MissingPages::share`] gave. [`MissingPages::finish`] is left to who gave it.
#[derive(Debug)]
pub struct SharedMissing(Placer);

impl SharedMissing {
    /// Takes it over.
    pub fn new(faults: SharedFaults) -> Self {
        Self(Placer::shared(faults))
    }
}

impl MissingPages for SharedMissing {
    fn wait_faults(
        &self,
        timeout: Duration,
        sink: &mut dyn FnMut(usize, u64),
    ) -> Result<(), Error> {
        self.0.wait_faults(timeout, sink)
    }

    fn place(&self, region: usize, page: u64, bytes: &[u8]) -> Result<u64, Error> {
        self.0.place(region, page, bytes)
    }

    fn place_zero(&self, region: usize, pages: Range<u64>) -> Result<u64, Error> {
        self.0.place_zero(region, pages)
    }

    fn finish(&self) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::vm::{PAGE_SIZE, Sharing};

    fn ram(sharing: Sharing) -> (RamFile, SharedRam) {
        let memfd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, 4 * PAGE_SIZE).unwrap();
        let file = RamFile::new(memfd.into(), "ram", 4 * PAGE_SIZE).unwrap();
        let region = Region {
            name: "ram".to_owned(),
            size_bytes: 4 * PAGE_SIZE,
        };
        let shared = SharedRam::new(vec![region], vec![file.share(sharing).unwrap()]).unwrap();
        (file, shared)
    }

    #[test]
    fn memory_that_is_shared_for_reading_can_be_read_and_not_written() {
        let (file, shared) = ram(Sharing::Read);
        file.write(PAGE_SIZE, &[7; 4096]).unwrap();
        let mut page = [0; 4096];
        shared.read(0, PAGE_SIZE, &mut page).unwrap();
        assert_eq!(page, [7; 4096]);
        assert!(shared.write(0, 0, &[1; 4096]).is_err());
        assert!(shared.discard(0, 0..PAGE_SIZE * 4).is_err());
        file.read(0, &mut page).unwrap();
        assert_eq!(page, [0; 4096]);
    }

    #[test]
    fn memory_that_is_shared_for_writing_is_the_same_memory() {
        let (file, shared) = ram(Sharing::ReadWrite);
        shared.write(0, 2 * PAGE_SIZE, &[3; 4096]).unwrap();
        assert_eq!(
            file.data_extents().unwrap(),
            shared.data_extents(0).unwrap()
        );
        assert!(shared.write(0, 4 * PAGE_SIZE, &[3; 1]).is_err());
        assert!(shared.write(1, 0, &[3; 1]).is_err());
    }

    #[test]
    fn descriptors_of_another_size_are_refused() {
        let (file, _) = ram(Sharing::Read);
        let region = Region {
            name: "ram".to_owned(),
            size_bytes: 8 * PAGE_SIZE,
        };
        let files = vec![file.share(Sharing::Read).unwrap()];
        assert!(SharedRam::new(vec![region.clone()], files).is_err());
        assert!(SharedRam::new(vec![region], Vec::new()).is_err());
    }
}
