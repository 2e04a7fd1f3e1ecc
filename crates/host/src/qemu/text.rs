//! What QEMU tells only in words for people: `info mtree -f` and `info ramblock`. A line that is not understood is
//! skipped.

/// Whether a memory region or RAM block is this backend; QEMU may name it by its object path.
fn is_backend(name: &str, id: &str) -> bool {
    name.strip_prefix("/objects/").unwrap_or(name) == id
}

/// First guest-physical address of a backend in `info mtree -f`, and the offset in the backend found there.
pub(crate) fn guest_address(tree: &str, id: &str) -> Option<(u64, u64)> {
    tree.lines().find_map(|line| {
        let (range, rest) = line.trim().split_once(" (prio ")?;
        let (kind, name) = rest.split_once(", ")?.1.split_once("): ")?;
        if kind != "ram" {
            return None;
        }
        // `NAME`, `NAME @OFFSET`, either with the accelerator behind it.
        let mut words = name.split_ascii_whitespace();
        if !is_backend(words.next()?, id) {
            return None;
        }
        let offset = words.find_map(|word| word.strip_prefix('@'));
        let offset = offset.map_or(Some(0), |hex| u64::from_str_radix(hex, 16).ok())?;
        let start = u64::from_str_radix(range.split_once('-')?.0, 16).ok()?;
        Some((start, offset))
    })
}

/// Blocks of `info ramblock` that are none of the backends and larger than `threshold` bytes. They would travel with
/// the device state, while the VM stands still.
pub(crate) fn large_others(blocks: &str, ids: &[&str], threshold: u64) -> Vec<(String, u64)> {
    let parse = |line: &str| -> Option<(String, u64)> {
        // Name, page size in two words, offset, used, total; newer releases add more.
        let mut words = line.split_ascii_whitespace();
        let name = words.next()?;
        let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
        let mut numbers = words.filter_map(number);
        let used = numbers.nth(1)?;
        Some((name.to_owned(), used))
    };
    blocks
        .lines()
        .filter_map(parse)
        .filter(|(name, used)| *used > threshold && !ids.iter().any(|id| is_backend(name, id)))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TREE: &str = "
FlatView #1
 AS \"memory\", root: system
  0000000000000000-00000000000bffff (prio 0, ram): ram0 KVM
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000008000000-000000000fffffff (prio 0, ram): m1 @0000000000001000 KVM
  0000000010000000-000000001fffffff (prio 0, ram): /objects/m2 KVM
  00000000febc0000-00000000febc0fff (prio 1, i/o): msix-table
";
    const BLOCKS: &str =
        "              Block Name    PSize              Offset               Used              Total
                       r    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
   0000:00:01.0/vga.vram    4 KiB  0x0000000004080000 0x0000000008000000 0x0000000008000000
    /rom@etc/acpi/tables    4 KiB  0x00000000050c0000 0x0000000000020000 0x0000000000200000
             /objects/m2    2 MiB  0x00000000050c0000 0x0000000040000000 0x0000000040000000
";

    #[test]
    fn backends_are_found_in_the_flat_view() {
        assert_eq!(guest_address(TREE, "ram0"), Some((0, 0)));
        assert_eq!(guest_address(TREE, "m1"), Some((0x0800_0000, 0x1000)));
        assert_eq!(guest_address(TREE, "m2"), Some((0x1000_0000, 0)));
        assert_eq!(guest_address(TREE, "m"), None);
        assert_eq!(guest_address(TREE, "pc.rom"), None);
    }

    #[test]
    fn large_blocks_besides_the_backends_are_named() {
        assert_eq!(large_others(BLOCKS, &["r", "m2"], 1 << 30), []);
        assert_eq!(
            large_others(BLOCKS, &["r", "m2"], 64 << 20),
            [("0000:00:01.0/vga.vram".to_owned(), 128 << 20)]
        );
        assert_eq!(large_others(BLOCKS, &["m2"], 32 << 20).len(), 2);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "[ -~\n]{0,200}", noise in ".{0,80}") {
            let _ = guest_address(&text, "ram0");
            let _ = large_others(&text, &["ram0"], 0);
            let _ = guest_address(&noise, "ram0");
            let _ = large_others(&format!("{noise} 0x1 0x2"), &[], 0);
        }
    }
}
