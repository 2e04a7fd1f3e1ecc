//! Advertisements: what this host has promised to others, what others have promised to it, and what it has sent there.

use palanquin_engine::{MigrationId, Order};
use palanquin_trust::advertisement::ADVERTISEMENT_MAX_S;
use palanquin_trust::{Identity, Sha256};
use rusqlite::{OptionalExtension, params};

use super::{Store, StoreError, to_sql};

pub(super) const CREATE: &str = "
BEGIN;
CREATE TABLE IF NOT EXISTS promises (
    audience TEXT PRIMARY KEY, left_bytes INTEGER NOT NULL, expires_unix_s INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS promised (
    only INTEGER PRIMARY KEY CHECK (only = 1), sequence INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS advertisements (
    host TEXT PRIMARY KEY, sequence INTEGER NOT NULL, sha256 BLOB NOT NULL, parcel BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS departures (
    migration BLOB PRIMARY KEY, host TEXT NOT NULL, at_unix_s INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;
COMMIT;
";

/// Departures are counted against an advertisement, and none is older than this.
const DEPARTURES_KEPT_S: u64 = 2 * ADVERTISEMENT_MAX_S;

/// Memory that is held for VMs of another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Promise {
    /// Name of that host.
    pub(crate) audience: String,
    /// What is left of it, in bytes.
    pub(crate) left_bytes: u64,
    /// When it is void, seconds since 1970.
    pub(crate) expires_unix_s: u64,
}

/// The newest advertisement of a host that was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredAdvertisement {
    /// Who has made it.
    pub(crate) host: Identity,
    /// Its sequence.
    pub(crate) sequence: u64,
    /// Digest of its envelope.
    pub(crate) sha256: Sha256,
    /// As it was carried; empty where it does not count any more.
    pub(crate) parcel: Vec<u8>,
}

impl Store {
    /// Promises to others that hold now.
    pub(crate) fn promises(&self, now_unix_s: u64) -> Result<Vec<Promise>, StoreError> {
        let connection = self.lock();
        let mut statement = connection.prepare(
            "SELECT audience, left_bytes, expires_unix_s FROM promises WHERE expires_unix_s >= ?1
             ORDER BY audience",
        )?;
        let rows = statement.query_map([to_sql(now_unix_s)], |row| {
            let (left, expires): (i64, i64) = (row.get(1)?, row.get(2)?);
            Ok(Promise {
                audience: row.get(0)?,
                left_bytes: left.cast_unsigned(),
                expires_unix_s: expires.cast_unsigned(),
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Makes a promise durable, and gives its sequence: higher than every one before, also where the state file was lost. An
    /// earlier promise to the same host is a part of it, and is kept as long as it was to be.
    pub(crate) fn promise(&self, made: &Promise, now_unix_s: u64) -> Result<u64, StoreError> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        let last: Option<i64> = transaction
            .query_row("SELECT sequence FROM promised WHERE only = 1", [], |row| {
                row.get(0)
            })
            .optional()?;
        let next = last.map_or(0, |last| last.cast_unsigned().saturating_add(1));
        let sequence = next.max(now_unix_s);
        transaction.execute(
            "INSERT INTO promised (only, sequence) VALUES (1, ?1)
             ON CONFLICT (only) DO UPDATE SET sequence = ?1",
            [to_sql(sequence)],
        )?;
        transaction.execute(
            "DELETE FROM promises WHERE expires_unix_s < ?1",
            [to_sql(now_unix_s)],
        )?;
        transaction.execute(
            "INSERT INTO promises (audience, left_bytes, expires_unix_s) VALUES (?1, ?2, ?3)
             ON CONFLICT (audience) DO UPDATE SET left_bytes = max(left_bytes, ?2),
             expires_unix_s = max(expires_unix_s, ?3)",
            params![
                made.audience,
                to_sql(made.left_bytes),
                to_sql(made.expires_unix_s)
            ],
        )?;
        transaction.commit()?;
        Ok(sequence)
    }

    /// A VM of that host has its reservation: so much less is held for others of it.
    pub(crate) fn keep_promise(&self, audience: &str, bytes: u64) -> Result<(), StoreError> {
        self.lock().execute(
            "UPDATE promises SET left_bytes = max(0, left_bytes - ?2) WHERE audience = ?1",
            params![audience, to_sql(bytes.min(i64::MAX.unsigned_abs()))],
        )?;
        Ok(())
    }

    /// The newest advertisement of each host that was accepted.
    pub(crate) fn advertisements(&self) -> Result<Vec<StoredAdvertisement>, StoreError> {
        let connection = self.lock();
        let mut statement = connection
            .prepare("SELECT host, sequence, sha256, parcel FROM advertisements ORDER BY host")?;
        let rows = statement.query_map([], |row| {
            let (host, sequence): (String, i64) = (row.get(0)?, row.get(1)?);
            let (sha256, parcel): (Vec<u8>, Vec<u8>) = (row.get(2)?, row.get(3)?);
            Ok((host, sequence, sha256, parcel))
        })?;
        let odd = || StoreError::Record("advertisements".to_owned());
        let mut found = Vec::new();
        for row in rows {
            let (host, sequence, sha256, parcel) = row?;
            found.push(StoredAdvertisement {
                host: host.parse().map_err(|_| odd())?,
                sequence: sequence.cast_unsigned(),
                sha256: Sha256(sha256.try_into().map_err(|_| odd())?),
                parcel,
            });
        }
        Ok(found)
    }

    /// Keeps an advertisement, unless a newer one of that host is there: then false, and nothing changes.
    pub(crate) fn put_advertisement(
        &self,
        accepted: &StoredAdvertisement,
    ) -> Result<bool, StoreError> {
        let changed = self.lock().execute(
            "INSERT INTO advertisements (host, sequence, sha256, parcel) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (host) DO UPDATE SET sequence = ?2, sha256 = ?3, parcel = ?4
             WHERE sequence < ?2 OR (sequence = ?2 AND sha256 = ?3)",
            params![
                accepted.host.to_string(),
                to_sql(accepted.sequence),
                &accepted.sha256.0[..],
                accepted.parcel
            ],
        )?;
        Ok(changed == 1)
    }

    /// What that host has advertised counts no more; that there was one is still known, so that none so old is accepted.
    pub(crate) fn void_advertisement(&self, host: &Identity) -> Result<(), StoreError> {
        self.lock().execute(
            "UPDATE advertisements SET parcel = x'', sha256 = zeroblob(32) WHERE host = ?1",
            [host.to_string()],
        )?;
        Ok(())
    }

    /// A VM is sent to a host, and takes so much of what that has promised.
    pub(crate) fn put_departure(
        &self,
        order: &Order,
        bytes: u64,
        now_unix_s: u64,
    ) -> Result<(), StoreError> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        transaction.execute(
            "DELETE FROM departures WHERE at_unix_s < ?1",
            [to_sql(now_unix_s.saturating_sub(DEPARTURES_KEPT_S))],
        )?;
        transaction.execute(
            "INSERT OR REPLACE INTO departures (migration, host, at_unix_s, bytes) VALUES (?1, ?2, ?3, ?4)",
            params![
                &order.migration.0[..],
                order.destination,
                to_sql(now_unix_s),
                to_sql(bytes.min(i64::MAX.unsigned_abs()))
            ],
        )?;
        transaction.commit()?;
        Ok(())
    }

    /// How much was sent to a host since then, but for one migration. Those that were refused count too.
    pub(crate) fn departed_bytes(
        &self,
        host: &str,
        since_unix_s: u64,
        but: MigrationId,
    ) -> Result<u64, StoreError> {
        let connection = self.lock();
        let mut statement = connection.prepare(
            "SELECT bytes FROM departures WHERE host = ?1 AND at_unix_s >= ?2 AND migration <> ?3",
        )?;
        let mut rows = statement
            .query_map(params![host, to_sql(since_unix_s), &but.0[..]], |row| {
                row.get::<_, i64>(0)
            })?;
        rows.try_fold(0_u64, |sum, bytes| {
            Ok(sum.saturating_add(bytes?.cast_unsigned()))
        })
    }
}

#[cfg(test)]
mod tests {
    use palanquin_engine::{Epoch, VmId};

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        (dir, store)
    }

    fn promise(audience: &str, left_bytes: u64, expires_unix_s: u64) -> Promise {
        Promise {
            audience: audience.to_owned(),
            left_bytes,
            expires_unix_s,
        }
    }

    #[test]
    fn a_promise_is_kept_until_it_expires_and_shrinks_by_what_arrives() {
        let (_dir, store) = store();
        let first = store.promise(&promise("a", 100, 50), 10).unwrap();
        let second = store.promise(&promise("b", 70, 60), 10).unwrap();
        assert!(second > first && first >= 10);
        store.keep_promise("a", 30).unwrap();
        store.keep_promise("c", 30).unwrap();
        let all = [promise("a", 70, 50), promise("b", 70, 60)];
        assert_eq!(store.promises(50).unwrap(), all);
        assert_eq!(store.promises(51).unwrap(), all[1..]);
        store.keep_promise("b", u64::MAX).unwrap();
        assert_eq!(store.promises(51).unwrap(), [promise("b", 0, 60)]);
    }

    #[test]
    fn a_smaller_or_shorter_promise_takes_nothing_back() {
        let (_dir, store) = store();
        store.promise(&promise("a", 100, 50), 10).unwrap();
        store.promise(&promise("a", 20, 90), 10).unwrap();
        assert_eq!(store.promises(10).unwrap(), [promise("a", 100, 90)]);
        store.promise(&promise("a", 120, 40), 10).unwrap();
        assert_eq!(store.promises(10).unwrap(), [promise("a", 120, 90)]);
        // Once it has expired nothing of it is left.
        store.promise(&promise("a", 5, 200), 100).unwrap();
        assert_eq!(store.promises(100).unwrap(), [promise("a", 5, 200)]);
    }

    #[test]
    fn sequences_grow_beyond_a_restart_and_beyond_the_loss_of_the_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let made = promise("a", 1, 5000);
        let first = Store::open(&path).unwrap().promise(&made, 1000).unwrap();
        let second = Store::open(&path).unwrap().promise(&made, 1000).unwrap();
        let third = Store::open(&path).unwrap().promise(&made, 900).unwrap();
        assert!(first < second && second < third);
        let anew = Store::open(&dir.path().join("new")).unwrap();
        assert!(anew.promise(&made, 1010).unwrap() > third);
    }

    #[test]
    fn the_newest_advertisement_of_a_host_is_kept_also_when_it_counts_no_more() {
        let (_dir, store) = store();
        let of = |sequence: u64, digest: u8| StoredAdvertisement {
            host: "spiffe://example.org/host/b".parse().unwrap(),
            sequence,
            sha256: Sha256([digest; 32]),
            parcel: vec![digest],
        };
        assert!(store.put_advertisement(&of(4, 1)).unwrap());
        assert!(store.put_advertisement(&of(4, 1)).unwrap());
        for refused in [of(3, 2), of(4, 2)] {
            assert!(!store.put_advertisement(&refused).unwrap());
        }
        assert!(store.put_advertisement(&of(5, 3)).unwrap());
        assert_eq!(store.advertisements().unwrap(), [of(5, 3)]);
        store.void_advertisement(&of(5, 3).host).unwrap();
        let void = &store.advertisements().unwrap()[0];
        assert_eq!((void.sequence, void.parcel.len()), (5, 0));
        assert!(!store.put_advertisement(&of(5, 3)).unwrap());
        assert!(store.put_advertisement(&of(6, 4)).unwrap());
    }

    #[test]
    fn what_was_sent_to_a_host_since_then_is_counted_but_for_the_one_that_asks() {
        let (_dir, store) = store();
        let order = |migration: u8, to: &str| Order {
            migration: MigrationId([migration; 16]),
            vm: VmId([7; 16]),
            vm_name: "web".to_owned(),
            epoch: Epoch(1),
            source: "a".to_owned(),
            destination: to.to_owned(),
            expires_unix_s: 0,
            run: true,
        };
        let (kept, now) = (DEPARTURES_KEPT_S, 1_000_000);
        store.put_departure(&order(1, "b"), 1, now).unwrap();
        store.put_departure(&order(2, "b"), 10, now + 5).unwrap();
        store.put_departure(&order(3, "c"), 100, now + 5).unwrap();
        store.put_departure(&order(4, "b"), 1000, now + 9).unwrap();
        let sum = |since, but| store.departed_bytes("b", since, MigrationId([but; 16]));
        assert_eq!(sum(now, 0).unwrap(), 1011);
        assert_eq!(sum(now, 4).unwrap(), 11);
        assert_eq!(sum(now + 1, 4).unwrap(), 10);
        store
            .put_departure(&order(5, "b"), u64::MAX, now + kept + 2)
            .unwrap();
        // The oldest was forgotten, and no sum overflows.
        assert_eq!(sum(0, 5).unwrap(), 1010);
        assert_eq!(sum(0, 0).unwrap(), i64::MAX.unsigned_abs() + 1010);
    }
}
