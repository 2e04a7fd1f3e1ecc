//! Hardware addresses of machines near by, as this machine's kernel has learnt them (proc(5), `/proc/net/arp`).

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr};

use super::Mac;

/// Longest table that is read, in bytes: some ten thousand lines.
const TABLE_MAX: usize = 1 << 20;

/// Those of this machine's network, by their addresses; with IPv4 only. Nothing where there is no table. Whoever can forge
/// ARP there can have anything learnt.
#[must_use]
pub fn hardware_addresses() -> BTreeMap<IpAddr, Mac> {
    let mut bytes = Vec::new();
    let read = std::fs::File::open("/proc/net/arp")
        .and_then(|file| file.take(TABLE_MAX as u64).read_to_end(&mut bytes));
    match read {
        Ok(_) => table(&String::from_utf8_lossy(&bytes)),
        Err(_) => BTreeMap::new(),
    }
}

fn table(text: &str) -> BTreeMap<IpAddr, Mac> {
    let known = text.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let address: Ipv4Addr = fields.next()?.parse().ok()?;
        let mac: Mac = fields.nth(2)?.parse().ok()?;
        Some((IpAddr::from(address), mac))
    });
    known.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_that_answered_are_in_the_table_and_others_are_not() {
        let text = "IP address       HW type     Flags       HW address            Mask     Device\n\
            10.77.1.10       0x1         0x2         52:54:0a:4d:01:0a     *        eth0\n\
            10.77.1.11       0x1         0x0         00:00:00:00:00:00     *        eth0\n\
            nonsense\n10.77.1.12 0x1\n";
        let known = table(text);
        assert_eq!(known.len(), 1);
        let mac = known[&IpAddr::from([10, 77, 1, 10])];
        assert_eq!(mac.to_string(), "52:54:0a:4d:01:0a");
    }
}
