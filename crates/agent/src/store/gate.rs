//! Passports of VMs, and what was decided.

use palanquin_api::control::GateDecision;
use palanquin_engine::{MigrationId, VmId};
use palanquin_trust::passport::LastPassport;
use palanquin_trust::{Identity, Passport, Sha256, Verified};
use rusqlite::{OptionalExtension, Transaction, params};
use uuid::Uuid;

use super::{Store, StoreError, to_sql};
use crate::attest::remedy::Quarantined;

pub(super) const CREATE: &str = "
BEGIN;
CREATE TABLE IF NOT EXISTS passports (
    vm BLOB PRIMARY KEY, owner TEXT NOT NULL, version INTEGER NOT NULL, sha256 BLOB NOT NULL,
    expires_unix_s INTEGER NOT NULL, envelope BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS decisions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, migration BLOB, decision TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS checks (
    only INTEGER PRIMARY KEY CHECK (only = 1), quarantined TEXT NOT NULL, resets TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS refused_arrivals (
    peer TEXT NOT NULL, likeness TEXT NOT NULL, seq INTEGER NOT NULL, began_unix_s INTEGER NOT NULL,
    PRIMARY KEY (peer, likeness)) STRICT;
CREATE INDEX IF NOT EXISTS decisions_migration ON decisions (migration, seq);
COMMIT;
";

/// Owner, version, digest, expiry and envelope.
type PassportRow = (String, i64, Vec<u8>, i64, Vec<u8>);

/// Decisions that are kept: the oldest go first.
const DECISIONS_MAX: u32 = 100_000;
/// Decisions that are told at once.
const TOLD_MAX: u32 = 1000;

/// The newest passport of a VM that this host has seen; it stays when the VM is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPassport {
    /// What to compare others with.
    pub last: LastPassport,
    /// When it expires, seconds since 1970.
    pub expires_unix_s: u64,
    /// As it was signed.
    pub envelope: Vec<u8>,
}

/// Hosts in quarantine, and how many resets the TPM of each host has counted.
pub(crate) type Checks = (Vec<Quarantined>, Vec<(Identity, u32)>);

impl Store {
    /// The newest passport of a VM that this host has seen.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn passport(&self, vm: VmId) -> Result<Option<StoredPassport>, StoreError> {
        let row: Option<PassportRow> = self
            .lock()
            .query_row(
                "SELECT owner, version, sha256, expires_unix_s, envelope FROM passports WHERE vm = ?1",
                [&vm.0[..]],
                |row| {
                    let (owner, version) = (row.get(0)?, row.get(1)?);
                    Ok((owner, version, row.get(2)?, row.get(3)?, row.get(4)?))
                },
            )
            .optional()?;
        let Some((owner, version, sha256, expires, envelope)) = row else {
            return Ok(None);
        };
        let odd = || StoreError::Record("passports".to_owned());
        let last = LastPassport {
            vm: Uuid::from_bytes(vm.0),
            owner: owner.parse().map_err(|_| odd())?,
            version: version.cast_unsigned(),
            sha256: Sha256(sha256.try_into().map_err(|_| odd())?),
        };
        Ok(Some(StoredPassport {
            last,
            expires_unix_s: expires.cast_unsigned(),
            envelope,
        }))
    }

    /// Keeps a passport, unless a newer one of the VM is there: then false, and nothing changes.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn put_passport(&self, passport: &Verified<Passport>) -> Result<bool, StoreError> {
        let changed = self.lock().execute(
            "INSERT INTO passports (vm, owner, version, sha256, expires_unix_s, envelope)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (vm) DO UPDATE SET version = ?3, sha256 = ?4, expires_unix_s = ?5, envelope = ?6
             WHERE owner = ?2 AND (version < ?3 OR (version = ?3 AND sha256 = ?4))",
            params![
                &passport.vm.as_bytes()[..],
                passport.owner.to_string(),
                to_sql(passport.version),
                &passport.sha256().0[..],
                to_sql(passport.expires_unix_s),
                passport.as_signed_bytes()
            ],
        )?;
        Ok(changed == 1)
    }

    /// Keeps which hosts are in quarantine, and how many resets their TPMs have counted.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn put_checks(
        &self,
        quarantined: &[Quarantined],
        resets: &[(Identity, u32)],
    ) -> Result<(), StoreError> {
        let json = |error: serde_json::Error| StoreError::Record(error.to_string());
        let resets: Vec<(String, u32)> = resets
            .iter()
            .map(|(host, count)| (host.to_string(), *count))
            .collect();
        let quarantined = serde_json::to_string(quarantined).map_err(json)?;
        let resets = serde_json::to_string(&resets).map_err(json)?;
        self.lock().execute(
            "INSERT INTO checks (only, quarantined, resets) VALUES (1, ?1, ?2)
             ON CONFLICT (only) DO UPDATE SET quarantined = ?1, resets = ?2",
            params![quarantined, resets],
        )?;
        Ok(())
    }

    /// What [`Self::put_checks`] has kept.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn checks(&self) -> Result<Checks, StoreError> {
        let row: Option<(String, String)> = self
            .lock()
            .query_row(
                "SELECT quarantined, resets FROM checks WHERE only = 1",
                [],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
            .optional()?;
        let Some((quarantined, resets)) = row else {
            return Ok((Vec::new(), Vec::new()));
        };
        let odd = || StoreError::Record("checks".to_owned());
        let quarantined = serde_json::from_str(&quarantined).map_err(|_| odd())?;
        let resets: Vec<(String, u32)> = serde_json::from_str(&resets).map_err(|_| odd())?;
        let resets = resets
            .into_iter()
            .map(|(host, count)| Ok((host.parse().map_err(|_| odd())?, count)));
        Ok((quarantined, resets.collect::<Result<_, StoreError>>()?))
    }

    /// Makes a decision durable.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn put_decision(&self, decision: &GateDecision) -> Result<(), StoreError> {
        let json = serde_json::to_string(decision)
            .map_err(|error| StoreError::Record(error.to_string()))?;
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        insert_decision(&transaction, decision, &json)?;
        transaction.commit()?;
        Ok(())
    }

    /// The last decisions, oldest first; at most 1000.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn decisions(&self) -> Result<Vec<GateDecision>, StoreError> {
        let connection = self.lock();
        let mut statement = connection.prepare(
            "SELECT decision FROM (SELECT seq, decision FROM decisions ORDER BY seq DESC LIMIT ?1)
             ORDER BY seq",
        )?;
        let rows = statement.query_map([TOLD_MAX], |row| row.get::<_, String>(0))?;
        rows.map(|row| read(&row?)).collect()
    }

    /// What was decided on a migration, oldest first; at most 1000.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn decisions_on(&self, migration: MigrationId) -> Result<Vec<GateDecision>, StoreError> {
        let connection = self.lock();
        let mut statement = connection
            .prepare("SELECT decision FROM decisions WHERE migration = ?1 ORDER BY seq LIMIT ?2")?;
        let rows = statement.query_map(params![&migration.0[..], TOLD_MAX], |row| {
            row.get::<_, String>(0)
        })?;
        rows.map(|row| read(&row?)).collect()
    }
}

/// Adds a row, and lets the oldest go. The row is the last that was inserted when this returns.
pub(super) fn insert_decision(
    transaction: &Transaction<'_>,
    decision: &GateDecision,
    json: &str,
) -> Result<(), StoreError> {
    let migration = decision.migration.map(|id| id.as_bytes().to_vec());
    transaction.execute(
        "INSERT INTO decisions (migration, decision) VALUES (?1, ?2)",
        params![migration, json],
    )?;
    transaction.execute(
        "DELETE FROM decisions WHERE seq <= (SELECT max(seq) FROM decisions) - ?1",
        [DECISIONS_MAX],
    )?;
    Ok(())
}

pub(super) fn read(json: &str) -> Result<GateDecision, StoreError> {
    serde_json::from_str(json).map_err(|error| StoreError::Record(error.to_string()))
}

#[cfg(test)]
mod tests {
    use palanquin_trust::keys::Ed25519Signer;
    use palanquin_trust::{Keyring, Sign, Signed};

    use super::*;

    const VM: [u8; 16] = [7; 16];

    fn passport(owner: &str, version: u64, sensitivity: u8) -> Verified<Passport> {
        let passport = Passport {
            vm: Uuid::from_bytes(VM),
            owner: owner.parse().unwrap(),
            version,
            not_before_unix_s: 1,
            expires_unix_s: 2,
            sensitivity,
            hosts: None,
            groups: None,
            regions: None,
            roles: None,
            strategies: None,
            attestation: None,
        };
        let key = Ed25519Signer::from_seed(&[1; 32]).unwrap();
        let mut ring = Keyring::default();
        ring.insert(passport.owner.clone(), key.public_key())
            .unwrap();
        let signed = Signed::sign(&passport, &key).unwrap();
        signed.verify_lapsed(&ring).unwrap()
    }

    fn decision(migration: Option<u8>, code: &str) -> GateDecision {
        GateDecision {
            at_unix_s: 1,
            action: "migrateOut".to_owned(),
            operator: code.to_owned(),
            vm: Some(Uuid::from_bytes(VM)),
            migration: migration.map(|id| Uuid::from_bytes([id; 16])),
            permitted: false,
            permitted_by: Vec::new(),
            reasons: Vec::new(),
            policy_sha256: None,
            passport_sha256: None,
            peer: None,
            times: 1,
            last_unix_s: None,
        }
    }

    #[test]
    fn the_newest_passport_of_a_vm_is_kept_and_no_older_or_other_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let (acme, other) = (
            "spiffe://example.org/owner/acme",
            "spiffe://example.org/owner/other",
        );
        {
            let store = Store::open(&path).unwrap();
            assert_eq!(store.passport(VmId(VM)).unwrap(), None);
            assert!(store.put_passport(&passport(acme, 4, 0)).unwrap());
            assert!(store.put_passport(&passport(acme, 4, 0)).unwrap());
            for refused in [
                passport(acme, 3, 0),
                passport(acme, 4, 1),
                passport(other, 9, 0),
            ] {
                assert!(!store.put_passport(&refused).unwrap());
            }
            assert!(store.put_passport(&passport(acme, 5, 1)).unwrap());
        }
        let newest = passport(acme, 5, 1);
        let store = Store::open(&path).unwrap();
        let stored = store.passport(VmId(VM)).unwrap().unwrap();
        assert_eq!(stored.last, newest.to_last());
        assert_eq!(stored.envelope, newest.as_signed_bytes());
        assert_eq!(store.passport(VmId([8; 16])).unwrap(), None);
    }

    #[test]
    fn decisions_are_told_in_their_order_and_by_their_migration() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let all = [
            decision(Some(1), "a"),
            decision(None, "b"),
            decision(Some(1), "c"),
        ];
        for decision in &all {
            store.put_decision(decision).unwrap();
        }
        assert_eq!(store.decisions().unwrap(), all);
        let [a, _, c] = all;
        assert_eq!(store.decisions_on(MigrationId([1; 16])).unwrap(), [a, c]);
        assert_eq!(store.decisions_on(MigrationId([2; 16])).unwrap(), []);
    }
}
