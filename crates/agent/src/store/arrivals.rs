//! Refusals of what other hosts bring: what one host repeats is counted, so that it cannot fill the journal.

use palanquin_api::control::GateDecision;
use rusqlite::{OptionalExtension, params};

use super::{Store, StoreError, to_sql};

/// Seconds for which repetitions are counted in one row; then another begins.
const COUNTED_S: u64 = 86_400;
/// Rows of one host in that time, with the one that counts all that is left.
const ROWS_MAX: i64 = 100;
/// Under which the last of them is found: no code has such a name.
const REST: &str = "*";

/// What makes two refusals the same: who asked, and the codes of everything that refused. Words don't count, because the
/// other host chooses some of them.
fn likeness(decision: &GateDecision) -> String {
    let mut words = vec![decision.action.as_str(), decision.operator.as_str()];
    for reason in &decision.reasons {
        words.extend([reason.gate.as_str(), reason.code.as_str()]);
    }
    words.join(" ")
}

impl Store {
    /// Makes a refusal durable of what that host has brought. One that is like another of the same host within a day is
    /// counted there; beyond 100 different ones a day, the rest are counted in one.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn put_refused_arrival(
        &self,
        peer: &str,
        decision: &GateDecision,
    ) -> Result<(), StoreError> {
        let json = |decision: &GateDecision| {
            serde_json::to_string(decision).map_err(|error| StoreError::Record(error.to_string()))
        };
        let (now, like) = (decision.at_unix_s, likeness(decision));
        let over = now.saturating_sub(COUNTED_S);
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        // Also what a clock has left in the future that was set back since.
        transaction.execute(
            "DELETE FROM refused_arrivals WHERE began_unix_s <= ?1 OR began_unix_s > ?2
             OR seq NOT IN (SELECT seq FROM decisions)",
            [to_sql(over), to_sql(now)],
        )?;
        let find = |like: &str| {
            let found = transaction.query_row(
                "SELECT seq, decision FROM refused_arrivals JOIN decisions USING (seq)
                 WHERE peer = ?1 AND likeness = ?2",
                params![peer, like],
                |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)),
            );
            found.optional()
        };
        let rows: i64 = transaction.query_row(
            "SELECT count(*) FROM refused_arrivals WHERE peer = ?1",
            [peer],
            |row| row.get(0),
        )?;
        let (like, known) = match find(&like)? {
            None if rows >= ROWS_MAX - 1 => (REST.to_owned(), find(REST)?),
            known => (like, known),
        };
        match known {
            Some((seq, kept)) => {
                let kept = super::gate::read(&kept)?;
                // Of the rest the last one is told, of what is alike the first.
                let told = if like == REST { decision } else { &kept };
                let counted = GateDecision {
                    at_unix_s: kept.at_unix_s,
                    times: kept.times.saturating_add(1),
                    last_unix_s: Some(now),
                    ..told.clone()
                };
                transaction.execute(
                    "UPDATE decisions SET decision = ?2 WHERE seq = ?1",
                    params![seq, json(&counted)?],
                )?;
            }
            None => {
                super::gate::insert_decision(&transaction, decision, &json(decision)?)?;
                transaction.execute(
                    "INSERT INTO refused_arrivals (peer, likeness, seq, began_unix_s)
                     VALUES (?1, ?2, last_insert_rowid(), ?3)",
                    params![peer, like, to_sql(now)],
                )?;
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use palanquin_api::control::GateReason;
    use uuid::Uuid;

    use super::*;

    fn refusal(at_unix_s: u64, operator: &str, code: &str, message: &str) -> GateDecision {
        let reason = GateReason {
            gate: "identity".to_owned(),
            code: code.to_owned(),
            message: message.to_owned(),
            remedy: String::new(),
            policy: None,
        };
        GateDecision {
            at_unix_s,
            action: "migrateIn".to_owned(),
            operator: operator.to_owned(),
            vm: None,
            migration: Some(Uuid::from_u128(at_unix_s.into())),
            permitted: false,
            permitted_by: Vec::new(),
            reasons: vec![reason],
            policy_sha256: None,
            passport_sha256: None,
            peer: None,
            times: 1,
            last_unix_s: None,
        }
    }

    #[test]
    fn a_host_that_repeats_itself_is_counted_and_another_is_not_mistaken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        for at in 0..5000 {
            let words = format!("migration {at}");
            let replayed = refusal(1000 + at, "a", "order-replayed", &words);
            store.put_refused_arrival("a", &replayed).unwrap();
        }
        let other = refusal(7000, "a", "order-replayed", "x");
        store.put_refused_arrival("b", &other).unwrap();
        let expired = refusal(7001, "a", "order-expired", "x");
        store.put_refused_arrival("a", &expired).unwrap();
        let all = store.decisions().unwrap();
        let told: Vec<_> = all
            .iter()
            .map(|row| (row.at_unix_s, row.times, row.last_unix_s))
            .collect();
        assert_eq!(
            told,
            [(1000, 5000, Some(5999)), (7000, 1, None), (7001, 1, None)]
        );
        assert_eq!(all[0].reasons[0].message, "migration 0");
        // The next day begins anew.
        let next = refusal(1000 + COUNTED_S, "a", "order-replayed", "again");
        store.put_refused_arrival("a", &next).unwrap();
        assert_eq!(store.decisions().unwrap().len(), 4);
    }

    #[test]
    fn a_host_that_finds_ever_new_ways_to_be_refused_has_so_many_rows_a_day_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let mine = refusal(1, "alice", "policy-forbids", "not by another host");
        store.put_decision(&mine).unwrap();
        for at in 0..500 {
            let operator = format!("operator {at}");
            let refused = refusal(1000 + at, &operator, "order-replayed", "x");
            store.put_refused_arrival("a", &refused).unwrap();
        }
        let all = store.decisions().unwrap();
        assert_eq!(all.len(), 1 + usize::try_from(ROWS_MAX).unwrap());
        assert_eq!(all[0], mine);
        let rest = all.last().unwrap();
        assert_eq!((rest.times, rest.last_unix_s), (401, Some(1499)));
        assert_eq!(rest.operator, "operator 499");
        // What was there before is still told one by one.
        assert_eq!(all[1].operator, "operator 0");
        let counted: u64 = all[1..].iter().map(|row| row.times).sum();
        assert_eq!(counted, 500);
    }
}
