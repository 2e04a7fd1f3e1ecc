//! Connections that nothing is known of yet: how many there may be, and who has to go when there are more.
//!
//! Whoever comes last is let in, because a host that means well needs a place for milliseconds only; the oldest of those
//! who take most places goes. So a flood from one address pushes out itself and nobody else, and one from many addresses
//! would have to fill all places anew within the time of one handshake.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

/// Places for connections, each of somebody.
pub struct Crowd<K, T> {
    most: usize,
    most_of_one: usize,
    inside: Mutex<Inside<K, T>>,
}

struct Inside<K, T> {
    next: u64,
    /// By number, so the oldest comes first.
    places: BTreeMap<u64, (K, T)>,
    counts: HashMap<K, usize>,
}

impl<K: Clone + Eq + Hash, T> Inside<K, T> {
    fn take(&mut self, number: u64) -> Option<(K, T)> {
        let (key, item) = self.places.remove(&number)?;
        if let Some(count) = self.counts.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&key);
            }
        }
        Some((key, item))
    }

    /// The oldest of all that this holds for.
    fn oldest(&self, is: impl Fn(&K) -> bool) -> Option<u64> {
        let found = self.places.iter().find(|(_, (key, _))| is(key));
        found.map(|(number, _)| *number)
    }
}

/// A place, free again when this is dropped.
pub struct Place<K: Clone + Eq + Hash, T> {
    crowd: Arc<Crowd<K, T>>,
    number: u64,
}

impl<K: Clone + Eq + Hash, T> Crowd<K, T> {
    /// With so many places, and so many for one; at least one each.
    pub fn new(most: usize, most_of_one: usize) -> Arc<Self> {
        Arc::new(Self {
            most: most.max(1),
            most_of_one: most_of_one.max(1),
            inside: Mutex::new(Inside {
                next: 0,
                places: BTreeMap::new(),
                counts: HashMap::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inside<K, T>> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a place, and whoever had to leave for that: the caller has to see to it.
    pub fn enter(self: &Arc<Self>, key: K, item: T) -> (Place<K, T>, Option<(K, T)>) {
        let mut inside = self.lock();
        let number = inside.next;
        inside.next += 1;
        inside.places.insert(number, (key.clone(), item));
        let count = inside.counts.entry(key.clone()).or_insert(0);
        *count += 1;
        let leaves = if *count > self.most_of_one {
            inside.oldest(|other| *other == key)
        } else if inside.places.len() > self.most {
            let most = inside.counts.values().copied().max();
            inside.oldest(|other| inside.counts.get(other).copied() == most)
        } else {
            None
        };
        let left = leaves.and_then(|number| inside.take(number));
        drop(inside);
        let place = Place {
            crowd: Arc::clone(self),
            number,
        };
        (place, left)
    }

    /// Places that are taken.
    pub fn len(&self) -> usize {
        self.lock().places.len()
    }

    /// Whether all places are free.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K: Clone + Eq + Hash, T> Drop for Place<K, T> {
    fn drop(&mut self) {
        let left = self.crowd.lock().take(self.number);
        // Not while the lock is held: closing a socket takes its time.
        drop(left);
    }
}

/// What counts as one address: an IPv4 address, or the 64 bits of an IPv6 address that one customer has at least
/// (RFC 6177).
pub fn one_address(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => {
            let network = u128::from(ip) >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from(network))
        }
        ip => ip,
    }
}

/// How long complaints are counted together.
const WINDOW: Duration = Duration::from_secs(10);
/// Complaints of a window that are told one by one.
const TOLD: u64 = 10;

/// Keeps whoever connects and misbehaves from filling the log: in every ten seconds ten lines, and a number.
#[derive(Default)]
pub struct Complaints {
    window: Mutex<Option<(Instant, u64)>>,
}

impl Complaints {
    /// Counts a complaint at this time: whether it is told, and how many of the window before were not.
    pub fn count(&self, now: Instant) -> (bool, u64) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let (began, count) = window.unwrap_or((now, 0));
        if now.saturating_duration_since(began) < WINDOW {
            *window = Some((began, count + 1));
            (count < TOLD, 0)
        } else {
            *window = Some((now, 1));
            (true, count.saturating_sub(TOLD))
        }
    }

    /// Logs a complaint about whoever is at this address, unless there were too many just now.
    pub fn complain(&self, what: &str, why: &dyn Display, address: &dyn Display) {
        let (told, untold) = self.count(Instant::now());
        if untold > 0 {
            warn!(
                untold,
                "more connections were refused in the seconds before"
            );
        }
        if told {
            warn!(%address, %why, "{what}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_from_one_pushes_out_its_own_oldest_only() {
        let crowd = Crowd::new(8, 3);
        let (_good, none) = crowd.enter("good", 0);
        assert!(none.is_none());
        let mut kept = Vec::new();
        for number in 1..=100 {
            let (place, left) = crowd.enter("bad", number);
            kept.push(place);
            assert_eq!(left, (number > 3).then(|| ("bad", number - 3)));
        }
        assert_eq!(crowd.len(), 4);
        // Places that were lost already free nothing.
        drop(kept);
        assert_eq!(crowd.len(), 1);
    }

    #[test]
    fn when_all_places_are_taken_the_oldest_of_those_with_most_leaves() {
        let crowd = Crowd::new(4, 3);
        let places = [("good", 0), ("bad", 1), ("worse", 2), ("worse", 3)];
        let _kept = places.map(|(key, item)| crowd.enter(key, item).0);
        let (_place, left) = crowd.enter("new", 4);
        assert_eq!(left, Some(("worse", 2)));
        // Now everybody has one: the oldest of all.
        let (_other, left) = crowd.enter("newer", 5);
        assert_eq!(left, Some(("good", 0)));
        assert_eq!(crowd.len(), 4);
    }

    #[test]
    fn a_place_is_free_again_when_it_is_dropped() {
        let crowd = Crowd::new(2, 2);
        for number in 0..10 {
            let (_place, left) = crowd.enter("a", number);
            assert!(left.is_none());
        }
        assert!(crowd.is_empty());
    }

    #[test]
    fn an_ipv6_network_and_a_mapped_address_count_as_one() {
        let one = |text: &str| one_address(text.parse().unwrap());
        assert_eq!(one("2001:db8:1:2::7"), one("2001:db8:1:2:ffff::1"));
        assert_ne!(one("2001:db8:1:2::7"), one("2001:db8:1:3::7"));
        assert_eq!(one("::ffff:192.0.2.1"), one("192.0.2.1"));
        assert_ne!(one("192.0.2.1"), one("192.0.2.2"));
    }

    #[test]
    fn complaints_beyond_ten_are_counted_and_told_later() {
        let complaints = Complaints::default();
        let began = Instant::now();
        let told = (0..1000).filter(|_| complaints.count(began).0).count();
        assert_eq!(told, 10);
        assert_eq!(complaints.count(began + WINDOW), (true, 990));
        assert_eq!(complaints.count(began + WINDOW), (true, 0));
    }
}
