//! The option ROM by which QEMU speeds up the guest's access to its interrupt controller (`kvmvapic`): the device reads and
//! patches it while its state is loaded (`vapic_post_load`), where the guest uses it. Under post-copy each of its pages
//! would be asked for, one after the other, while the VM stands still.

use std::ops::Range;

use super::qmp::Monitor;
use super::ram::{QemuRam, host_address};
use crate::Error;
use crate::vm::{GuestRam, PAGE_SIZE};

/// Where the firmware of a PC has option ROMs (`BUILD_ROM_START` to `BUILD_BIOS_ADDR` of SeaBIOS): guest-physical addresses.
const ROMS: Range<u64> = 0xC_0000..0xF_0000;
/// An option ROM begins at a multiple of this, and counts its length in units of a quarter of it.
const ALIGN: usize = 2048;
const UNIT: usize = 512;
/// An option ROM begins with it.
const SIGNATURE: [u8; 2] = [0x55, 0xAA];
/// What this one has in it.
const MARK: &[u8] = b"kvm aPiC";

/// Its pages, as region and page, in order; none where it is not there.
pub(super) fn pages(monitor: &Monitor, ram: &QemuRam) -> Vec<(usize, u64)> {
    find(monitor, ram).unwrap_or_else(|error| {
        tracing::debug!(%error, "option ROMs are not known");
        Vec::new()
    })
}

fn find(monitor: &Monitor, ram: &QemuRam) -> Result<Vec<(usize, u64)>, Error> {
    let host = host_address(monitor, ROMS.start)?;
    let Some((region, first)) = host.and_then(|host| ram.page_at(host)) else {
        return Ok(Vec::new());
    };
    let mut roms = vec![0; (ROMS.end - ROMS.start) as usize];
    ram.read(region, first * PAGE_SIZE, &mut roms)?;
    let pages = marked(&roms)
        .into_iter()
        .flat_map(|bytes| bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE));
    Ok(pages.map(|page| (region, first + page)).collect())
}

/// The bytes of each option ROM that has the mark in it.
fn marked(roms: &[u8]) -> Vec<Range<u64>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some([a, b, units]) = roms.get(at..).and_then(|rest| rest.first_chunk()) {
        let end = (at + usize::from(*units) * UNIT).min(roms.len());
        if [*a, *b] != SIGNATURE || end == at {
            at += ALIGN;
            continue;
        }
        if roms[at..end].windows(MARK.len()).any(|bytes| bytes == MARK) {
            found.push(at as u64..end as u64);
        }
        at = end.next_multiple_of(ALIGN);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rom(roms: &mut [u8], at: usize, units: u8, mark: Option<usize>) {
        roms[at..at + 3].copy_from_slice(&[0x55, 0xAA, units]);
        if let Some(offset) = mark {
            roms[at + offset..at + offset + MARK.len()].copy_from_slice(MARK);
        }
    }

    #[test]
    fn only_the_rom_with_the_mark_is_found() {
        let mut roms = vec![0; 0x3_0000];
        rom(&mut roms, 0, 76, None);
        // What looks like one within another is not one.
        rom(&mut roms, 0x9000, 18, None);
        rom(&mut roms, 0xA000, 18, Some(9208));
        roms[0xA000 - 8..0xA000].copy_from_slice(MARK);
        assert_eq!(marked(&roms), vec![0xA000..0xA000 + 18 * 512]);
    }

    #[test]
    fn nonsense_ends_within_bounds() {
        assert!(marked(&[]).is_empty());
        assert!(marked(&[0x55, 0xAA]).is_empty());
        let mut roms = vec![0x55; 4096];
        roms[2048..2051].copy_from_slice(&[0x55, 0xAA, 255]);
        assert!(marked(&roms).is_empty());
        roms[4088..].copy_from_slice(MARK);
        assert_eq!(marked(&roms), vec![2048..4096]);
        roms[2050] = 0;
        assert!(marked(&roms).is_empty());
    }
}
