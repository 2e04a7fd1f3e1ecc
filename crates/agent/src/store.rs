//! The state that survives: VMs, the newest epoch of every VM ever seen, migrations and their journal.
//!
//! One SQLite file. Every write is a transaction that is on the disk before the call returns
//! (`synchronous=FULL` in WAL mode: an fsync at each commit), because the handover relies on it.

mod adverts;
mod arrivals;
mod gate;

pub(crate) use self::adverts::{Promise, StoredAdvertisement};
pub use self::gate::StoredPassport;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palanquin_api::control::MigrationInfo;
use palanquin_engine::{DestinationRecord, Epoch, MigrationId, Order, SourceRecord, VmId};
use palanquin_host::vm::Handle;
use rusqlite::{Connection, OptionalExtension, Row, params};

/// Version of the schema; another one is refused.
const SCHEMA: i64 = 2;

/// What went wrong with the state file.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite.
    #[error("the state file cannot be read or written")]
    Sqlite(#[from] rusqlite::Error),
    /// Written by another version.
    #[error("the state file has schema {found}, this agent knows {SCHEMA}")]
    Schema {
        /// In the file.
        found: i64,
    },
    /// A row that this version cannot have written.
    #[error("the state file holds a record that cannot be read: {0}")]
    Record(String),
    /// Another agent uses it.
    #[error("another agent uses this state directory")]
    InUse,
}

/// A VM as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredVm {
    /// Identity.
    pub id: VmId,
    /// Name.
    pub name: String,
    /// Epoch under which this host has it.
    pub epoch: Epoch,
    /// How to find its hypervisor.
    pub handle: Handle,
    /// Whether it was adopted.
    pub adopted: bool,
    /// Whether it is an incoming container that is not ours yet.
    pub incoming: bool,
    /// Bytes of RAM.
    pub memory_bytes: u64,
}

/// Side and newest record of a migration that has not ended.
#[derive(Clone, Debug)]
pub enum Unfinished {
    /// We are its source.
    Source(Order, SourceRecord),
    /// We are its destination.
    Destination(Order, DestinationRecord),
}

/// The state file.
pub struct Store {
    connection: Mutex<Connection>,
}

impl Store {
    /// Opens or creates it, and keeps others from using it.
    ///
    /// # Errors
    ///
    /// The file cannot be used, was written by another version, or is in use.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(Duration::from_millis(500))?;
        connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        connection
            .pragma_update(None, "journal_mode", "WAL")
            .map_err(busy)?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", "ON")?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match found {
            0 => connection.execute_batch(CREATE).map_err(busy)?,
            1 | SCHEMA => {}
            found => return Err(StoreError::Schema { found }),
        }
        // From here on since schema 2.
        connection.execute_batch(gate::CREATE).map_err(busy)?;
        connection.execute_batch(adverts::CREATE).map_err(busy)?;
        // A write takes the lock that keeps a second agent out.
        connection
            .pragma_update(None, "user_version", SCHEMA)
            .map_err(busy)?;
        Ok(Self {
            connection: Mutex::new(connection),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// All VMs.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn vms(&self) -> Result<Vec<StoredVm>, StoreError> {
        let connection = self.lock();
        let mut statement = connection.prepare(
            "SELECT uuid, name, epoch, handle, adopted, incoming, memory_bytes FROM vms ORDER BY name",
        )?;
        let rows = statement.query_map([], stored_vm)?;
        rows.map(|row| row?.ok_or_else(|| StoreError::Record("vms".to_owned())))
            .collect()
    }

    /// Adds or replaces a VM.
    ///
    /// # Errors
    ///
    /// The file cannot be written, or the name is taken by another VM.
    pub fn put_vm(&self, vm: &StoredVm) -> Result<(), StoreError> {
        let handle = serde_json::to_string(&vm.handle)
            .map_err(|error| StoreError::Record(error.to_string()))?;
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        transaction.execute(
            "INSERT INTO vms (uuid, name, epoch, handle, adopted, incoming, memory_bytes)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
             ON CONFLICT (uuid) DO UPDATE SET name = ?2, epoch = ?3, handle = ?4, adopted = ?5,
             incoming = ?6, memory_bytes = ?7",
            params![
                &vm.id.0[..],
                vm.name,
                to_sql(vm.epoch.0),
                handle,
                vm.adopted,
                vm.incoming,
                to_sql(vm.memory_bytes)
            ],
        )?;
        if !vm.incoming {
            learn_epoch(&transaction, vm.id, vm.epoch)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Removes a VM; what is known of its epochs stays.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn remove_vm(&self, id: VmId) -> Result<(), StoreError> {
        self.lock()
            .execute("DELETE FROM vms WHERE uuid = ?1", [&id.0[..]])?;
        Ok(())
    }

    /// Newest epoch of the VM that this host has known.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn epoch(&self, id: VmId) -> Result<Option<Epoch>, StoreError> {
        let found: Option<i64> = self
            .lock()
            .query_row(
                "SELECT epoch FROM epochs WHERE uuid = ?1",
                [&id.0[..]],
                |row| row.get(0),
            )
            .optional()?;
        Ok(found.map(|epoch| Epoch(epoch.cast_unsigned())))
    }

    /// Makes a record of the source durable, together with what follows from it for the VM.
    ///
    /// # Errors
    ///
    /// The file cannot be written; whether the record is durable is then not known.
    pub fn record_source(&self, order: &Order, record: &SourceRecord) -> Result<(), StoreError> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        append(&transaction, order.migration, "source", record, order)?;
        match record {
            SourceRecord::TakenBack(epoch) => set_epoch(&transaction, order.vm, *epoch)?,
            SourceRecord::Committed(epoch) => learn_epoch(&transaction, order.vm, *epoch)?,
            SourceRecord::Erased => {
                transaction.execute("DELETE FROM vms WHERE uuid = ?1", [&order.vm.0[..]])?;
            }
            _ => {}
        }
        transaction.commit()?;
        Ok(())
    }

    /// Makes a record of the destination durable, together with what follows from it for the VM.
    ///
    /// # Errors
    ///
    /// The file cannot be written; whether the record is durable is then not known.
    pub fn record_destination(
        &self,
        order: &Order,
        record: &DestinationRecord,
    ) -> Result<(), StoreError> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        append(&transaction, order.migration, "destination", record, order)?;
        match record {
            DestinationRecord::Owned(epoch) | DestinationRecord::Pulling(epoch) => {
                transaction.execute(
                    "UPDATE vms SET incoming = 0 WHERE uuid = ?1",
                    [&order.vm.0[..]],
                )?;
                set_epoch(&transaction, order.vm, *epoch)?;
            }
            DestinationRecord::Discarded(_) if !superseded(&transaction, order.migration)? => {
                transaction.execute("DELETE FROM vms WHERE uuid = ?1", [&order.vm.0[..]])?;
            }
            _ => {}
        }
        transaction.commit()?;
        Ok(())
    }

    /// Whether a migration of this identity was recorded.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn migration_seen(&self, id: MigrationId) -> Result<bool, StoreError> {
        let found: Option<i64> = self
            .lock()
            .query_row(
                "SELECT 1 FROM migrations WHERE id = ?1",
                [&id.0[..]],
                |row| row.get(0),
            )
            .optional()?;
        Ok(found.is_some())
    }

    /// Whether a newer migration of the same VM was recorded. Then what is here of the VM is none of the older one's
    /// business, whatever its newest record is: it may have ended without being able to say so.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn superseded(&self, id: MigrationId) -> Result<bool, StoreError> {
        superseded(&self.lock(), id)
    }

    /// The order and all records of a migration to this host, oldest first.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn destination_records(
        &self,
        id: MigrationId,
    ) -> Result<Option<(Order, Vec<DestinationRecord>)>, StoreError> {
        let connection = self.lock();
        let order: Option<Vec<u8>> = connection
            .query_row(
                "SELECT order_cbor FROM migrations WHERE id = ?1 AND side = 'destination'",
                [&id.0[..]],
                |row| row.get(0),
            )
            .optional()?;
        let Some(order) = order else { return Ok(None) };
        let mut statement =
            connection.prepare("SELECT record FROM journal WHERE migration = ?1 ORDER BY seq")?;
        let rows = statement.query_map([&id.0[..]], |row| row.get::<_, Vec<u8>>(0))?;
        let records: Result<Vec<_>, StoreError> = rows.map(|row| decode(&row?)).collect();
        Ok(Some((decode(&order)?, records?)))
    }

    /// All migrations whose newest record is not an end, but for those after which another of the same VM began.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn unfinished(&self) -> Result<Vec<Unfinished>, StoreError> {
        let connection = self.lock();
        let mut statement = connection.prepare(
            "SELECT m.side, m.order_cbor, j.record FROM migrations m
             JOIN journal j ON j.seq = (SELECT max(seq) FROM journal WHERE migration = m.id)
             WHERE m.rowid = (SELECT max(rowid) FROM migrations WHERE vm = m.vm)",
        )?;
        let rows = statement.query_map([], |row| {
            Ok((
                row.get::<_, String>(0)?,
                row.get::<_, Vec<u8>>(1)?,
                row.get::<_, Vec<u8>>(2)?,
            ))
        })?;
        let mut unfinished = Vec::new();
        for row in rows {
            let (side, order, record) = row?;
            let order: Order = decode(&order)?;
            if side == "source" {
                let record: SourceRecord = decode(&record)?;
                if !matches!(record, SourceRecord::Erased | SourceRecord::Aborted(_)) {
                    unfinished.push(Unfinished::Source(order, record));
                }
            } else {
                let record: DestinationRecord = decode(&record)?;
                if !matches!(
                    record,
                    DestinationRecord::Activated | DestinationRecord::Discarded(_)
                ) {
                    unfinished.push(Unfinished::Destination(order, record));
                }
            }
        }
        Ok(unfinished)
    }

    /// Keeps what people may ask about a migration later.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn put_info(&self, info: &MigrationInfo) -> Result<(), StoreError> {
        let json =
            serde_json::to_string(info).map_err(|error| StoreError::Record(error.to_string()))?;
        self.lock().execute(
            "INSERT INTO infos (id, info) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET info = ?2",
            params![&info.id.as_bytes()[..], json],
        )?;
        Ok(())
    }

    /// What was kept about the last migrations, newest last; at most 1000.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn infos(&self) -> Result<Vec<MigrationInfo>, StoreError> {
        let connection = self.lock();
        let mut statement = connection.prepare(
            "SELECT info FROM (SELECT rowid, info FROM infos ORDER BY rowid DESC LIMIT 1000)
             ORDER BY rowid",
        )?;
        let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
        rows.map(|row| {
            serde_json::from_str(&row?).map_err(|error| StoreError::Record(error.to_string()))
        })
        .collect()
    }
}

const CREATE: &str = "
BEGIN;
CREATE TABLE vms (
    uuid BLOB PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch INTEGER NOT NULL, handle TEXT NOT NULL,
    adopted INTEGER NOT NULL, incoming INTEGER NOT NULL, memory_bytes INTEGER NOT NULL) STRICT;
CREATE TABLE epochs (uuid BLOB PRIMARY KEY, epoch INTEGER NOT NULL) STRICT;
CREATE TABLE migrations (
    id BLOB PRIMARY KEY, side TEXT NOT NULL, vm BLOB NOT NULL, order_cbor BLOB NOT NULL) STRICT;
CREATE TABLE journal (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, migration BLOB NOT NULL REFERENCES migrations (id),
    record BLOB NOT NULL, at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))) STRICT;
CREATE INDEX journal_migration ON journal (migration, seq);
CREATE TABLE infos (id BLOB UNIQUE NOT NULL, info TEXT NOT NULL) STRICT;
COMMIT;
";

fn busy(error: rusqlite::Error) -> StoreError {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
            StoreError::InUse
        }
        _ => StoreError::Sqlite(error),
    }
}

/// SQLite's integers are signed; the bits are kept.
fn to_sql(value: u64) -> i64 {
    value.cast_signed()
}

fn stored_vm(row: &Row<'_>) -> rusqlite::Result<Option<StoredVm>> {
    let uuid: Vec<u8> = row.get(0)?;
    let handle: String = row.get(3)?;
    let (Ok(uuid), Ok(handle)) = (<[u8; 16]>::try_from(uuid), serde_json::from_str(&handle)) else {
        return Ok(None);
    };
    Ok(Some(StoredVm {
        id: VmId(uuid),
        name: row.get(1)?,
        epoch: Epoch(row.get::<_, i64>(2)?.cast_unsigned()),
        handle,
        adopted: row.get(4)?,
        incoming: row.get(5)?,
        memory_bytes: row.get::<_, i64>(6)?.cast_unsigned(),
    }))
}

fn encode<T: minicbor::Encode<()>>(value: &T) -> Result<Vec<u8>, StoreError> {
    minicbor::to_vec(value).map_err(|error| StoreError::Record(error.to_string()))
}

fn decode<T: for<'b> minicbor::Decode<'b, ()>>(bytes: &[u8]) -> Result<T, StoreError> {
    minicbor::decode(bytes).map_err(|error| StoreError::Record(error.to_string()))
}

fn append<T: minicbor::Encode<()>>(
    connection: &Connection,
    migration: MigrationId,
    side: &str,
    record: &T,
    order: &Order,
) -> Result<(), StoreError> {
    connection.execute(
        "INSERT INTO migrations (id, side, vm, order_cbor) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (id) DO NOTHING",
        params![&migration.0[..], side, &order.vm.0[..], encode(order)?],
    )?;
    connection.execute(
        "INSERT INTO journal (migration, record) VALUES (?1, ?2)",
        params![&migration.0[..], encode(record)?],
    )?;
    Ok(())
}

fn superseded(connection: &Connection, id: MigrationId) -> Result<bool, StoreError> {
    Ok(connection.query_row(
        "SELECT EXISTS (SELECT 1 FROM migrations old JOIN migrations new ON new.vm = old.vm
         WHERE old.id = ?1 AND new.rowid > old.rowid)",
        [&id.0[..]],
        |row| row.get(0),
    )?)
}

fn learn_epoch(connection: &Connection, vm: VmId, epoch: Epoch) -> Result<(), StoreError> {
    connection.execute(
        "INSERT INTO epochs (uuid, epoch) VALUES (?1, ?2)
         ON CONFLICT (uuid) DO UPDATE SET epoch = max(epoch, ?2)",
        params![&vm.0[..], to_sql(epoch.0)],
    )?;
    Ok(())
}

fn set_epoch(connection: &Connection, vm: VmId, epoch: Epoch) -> Result<(), StoreError> {
    connection.execute(
        "UPDATE vms SET epoch = ?2 WHERE uuid = ?1",
        params![&vm.0[..], to_sql(epoch.0)],
    )?;
    learn_epoch(connection, vm, epoch)
}

#[cfg(test)]
mod tests {
    use palanquin_engine::message::Reason;

    use super::*;

    fn order(migration: u8) -> Order {
        Order {
            migration: MigrationId([migration; 16]),
            vm: VmId([9; 16]),
            vm_name: "web".to_owned(),
            epoch: Epoch(1),
            source: "a".to_owned(),
            destination: "b".to_owned(),
            expires_unix_s: 1,
            run: true,
        }
    }

    fn vm(incoming: bool) -> StoredVm {
        StoredVm {
            id: VmId([9; 16]),
            name: "web".to_owned(),
            epoch: Epoch(1),
            handle: Handle {
                pid: 1,
                start_ticks: 2,
                boot_id: "b".to_owned(),
                qmp: "/q".into(),
            },
            adopted: false,
            incoming,
            memory_bytes: 1 << 30,
        }
    }

    #[test]
    fn what_was_recorded_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("palanquin.db");
        {
            let store = Store::open(&path).unwrap();
            store.put_vm(&vm(false)).unwrap();
            store
                .record_source(&order(1), &SourceRecord::Ordered(order(1)))
                .unwrap();
            store
                .record_source(&order(1), &SourceRecord::Committed(Epoch(2)))
                .unwrap();
        }
        let store = Store::open(&path).unwrap();
        assert_eq!(store.vms().unwrap(), [vm(false)]);
        assert_eq!(store.epoch(VmId([9; 16])).unwrap(), Some(Epoch(2)));
        let unfinished = store.unfinished().unwrap();
        assert!(
            matches!(&unfinished[..], [Unfinished::Source(o, SourceRecord::Committed(Epoch(2)))] if *o == order(1))
        );
        store
            .record_source(&order(1), &SourceRecord::Erased)
            .unwrap();
        assert!(store.unfinished().unwrap().is_empty());
        assert!(store.vms().unwrap().is_empty());
        assert_eq!(
            store.epoch(VmId([9; 16])).unwrap(),
            Some(Epoch(2)),
            "epochs are never forgotten"
        );
    }

    #[test]
    fn owning_and_discarding_change_the_vm_in_the_same_transaction() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("palanquin.db")).unwrap();
        store
            .record_destination(&order(1), &DestinationRecord::Reserved(order(1)))
            .unwrap();
        store.put_vm(&vm(true)).unwrap();
        assert_eq!(
            store.epoch(VmId([9; 16])).unwrap(),
            None,
            "a container is not a VM yet"
        );
        store
            .record_destination(&order(1), &DestinationRecord::Owned(Epoch(2)))
            .unwrap();
        let vms = store.vms().unwrap();
        assert_eq!((vms[0].incoming, vms[0].epoch), (false, Epoch(2)));
        assert!(store.migration_seen(MigrationId([1; 16])).unwrap());
        let reason = Reason::new("x", "y");
        store
            .record_destination(&order(1), &DestinationRecord::Discarded(reason))
            .unwrap();
        assert!(store.vms().unwrap().is_empty());
        let (_, records) = store
            .destination_records(MigrationId([1; 16]))
            .unwrap()
            .unwrap();
        assert_eq!(records.len(), 3);
    }

    #[test]
    fn a_vm_that_still_needs_pages_is_owned_and_unfinished() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("palanquin.db")).unwrap();
        let record = |record| store.record_destination(&order(1), &record).unwrap();
        record(DestinationRecord::Reserved(order(1)));
        store.put_vm(&vm(true)).unwrap();
        record(DestinationRecord::Pulling(Epoch(2)));
        let vms = store.vms().unwrap();
        assert_eq!((vms[0].incoming, vms[0].epoch), (false, Epoch(2)));
        assert_eq!(store.unfinished().unwrap().len(), 1);
        record(DestinationRecord::Activated);
        assert!(store.unfinished().unwrap().is_empty());
    }

    #[test]
    fn an_older_migration_decides_nothing_about_a_vm_that_has_moved_on() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("palanquin.db")).unwrap();
        let source = |order: &Order, record| store.record_source(order, &record).unwrap();
        store.put_vm(&vm(false)).unwrap();
        // The VM was taken back, which is the last word of that migration; the next one is in doubt.
        source(&order(1), SourceRecord::Ordered(order(1)));
        source(&order(1), SourceRecord::Committed(Epoch(2)));
        source(&order(1), SourceRecord::TakenBack(Epoch(3)));
        assert_eq!(store.unfinished().unwrap().len(), 1);
        source(&order(2), SourceRecord::Ordered(order(2)));
        source(&order(2), SourceRecord::Committed(Epoch(4)));
        let unfinished = store.unfinished().unwrap();
        assert!(
            matches!(&unfinished[..], [Unfinished::Source(o, SourceRecord::Committed(Epoch(4)))] if *o == order(2)),
            "{} unfinished: a VM that may run elsewhere would be resumed",
            unfinished.len()
        );
        assert!(store.superseded(MigrationId([1; 16])).unwrap());
        assert!(!store.superseded(MigrationId([2; 16])).unwrap());
        // Another VM's migration has nothing to do with it.
        let other = Order {
            vm: VmId([8; 16]),
            ..order(3)
        };
        source(&other, SourceRecord::Ordered(other.clone()));
        assert_eq!(store.unfinished().unwrap().len(), 2);
    }

    #[test]
    fn a_late_discard_leaves_the_container_of_a_newer_migration() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("palanquin.db")).unwrap();
        let record = |order: &Order, record| store.record_destination(order, &record).unwrap();
        record(&order(1), DestinationRecord::Reserved(order(1)));
        record(&order(2), DestinationRecord::Reserved(order(2)));
        store.put_vm(&vm(true)).unwrap();
        record(&order(2), DestinationRecord::Owned(Epoch(2)));
        let late = DestinationRecord::Discarded(Reason::new("x", "y"));
        record(&order(1), late);
        assert_eq!(store.vms().unwrap().len(), 1);
    }

    #[test]
    fn a_second_agent_cannot_use_the_same_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("palanquin.db");
        let _first = Store::open(&path).unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::InUse)));
    }
}
