//! `palanquin migrate`: phases, ends, interruptions, and an agent that vanishes.

use palanquin_api::control::{MigrationInfo, Outcome};
use serde_json::{Value, json};

use crate::agent::{Agent, ID, Reply, ok, run};

const START: &str = "POST /v1/migrations";
const WATCH: &str = "GET /v1/migrations/11111111-2222-4333-8444-555555555555/watch";
const ABORT: &str = "POST /v1/migrations/11111111-2222-4333-8444-555555555555/abort";
const GO: [&str; 4] = ["migrate", "web", "--to", "beta"];
const GO_JSON: [&str; 5] = ["--json", "migrate", "web", "--to", "beta"];

/// A migration with some fields changed.
pub(crate) fn info(changes: &Value) -> Value {
    let mut info = json!({
        "id": ID, "vm": "web", "vm_uuid": "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee",
        "from": "alpha", "to": "beta", "side": "source", "phase": "preparing", "outcome": null,
        "reason": null, "error": null, "strategy": "pre-copy", "rounds": 0, "total_time_ms": 0.0,
        "downtime_ms": 0.0, "downtime": {"pause_ms": 0.0, "final_pages_ms": 0.0,
        "device_state_ms": 0.0, "commit_ms": 0.0, "resume_ms": 0.0}, "predicted_downtime_ms": null,
        "bytes_on_wire": 0, "bytes_guest": 0, "bytes_remaining": 0, "rate_bytes_per_s": 0,
        "dirty_rate_bytes_per_s": 0, "percent": 0.0, "pages_sent": 0, "pages_zero": 0,
        "pages_delta": 0, "pages_duplicate": 0, "pages_compressed": 0, "bytes_saved": 0,
        "pages_resent": 0, "ram_bytes": 1_610_612_736_u64, "streams": 2, "cipher": null,
        "key_exchange": null, "memory_root": null, "verified": false, "epoch": 2, "revision": 1,
    });
    let later = json!({
        "pages_skipped": 0, "throttle_share": null, "pages_demanded": 0, "fault_wait": null, "rejoined": 0,
        "decisions": [], "operator": null, "gate_decisions": [],
    });
    let objects = [&later, changes].map(|object| object.as_object().unwrap());
    for (key, value) in objects.into_iter().flatten() {
        info[key] = value.clone();
    }
    info
}

pub(crate) fn completed() -> Value {
    info(&json!({
        "phase": "done", "outcome": "completed", "rounds": 3, "total_time_ms": 2345.6,
        "downtime_ms": 23.4, "downtime": {"pause_ms": 1.0, "final_pages_ms": 6.0,
        "device_state_ms": 11.0, "commit_ms": 2.4, "resume_ms": 3.0}, "bytes_on_wire": 1_181_116_006,
        "bytes_guest": 1_179_648_000, "pages_sent": 288_000, "pages_zero": 105_216, "pages_resent": 1200,
        "pages_delta": 900, "pages_duplicate": 120, "pages_compressed": 2048, "bytes_saved": 8_388_608,
        "percent": 100.0, "cipher": "TLS13_AES_128_GCM_SHA256", "key_exchange": "X25519MLKEM768",
        "memory_root": "00112233445566778899aabbccddeeff", "verified": true, "revision": 40,
    }))
}

fn not_moved(error: &Value) -> Value {
    info(&json!({
        "phase": "done", "outcome": "running_on_source", "reason": error["message"],
        "error": error, "revision": 9,
    }))
}

#[test]
fn a_migration_is_told_phase_by_phase_and_summed_up() {
    let round = |percent: f64, revision: u64| {
        ok(info(&json!({
            "phase": "pre-copy", "rounds": 1, "rate_bytes_per_s": 524_288_000, "bytes_remaining": 1_073_741_824,
            "predicted_downtime_ms": 412.0, "dirty_rate_bytes_per_s": 10_485_760, "percent": percent,
            "revision": revision,
        })))
    };
    let phase = |phase: &str| {
        ok(info(
            &json!({"phase": phase, "percent": 90.0, "revision": 8}),
        ))
    };
    let agent = Agent::new(vec![
        (START, vec![ok(info(&json!({})))]),
        (
            WATCH,
            vec![
                phase("reserving"),
                round(20.0, 3),
                round(10.0, 4),
                phase("switchover"),
                phase("committing"),
                phase("erasing"),
                ok(completed()),
            ],
        ),
    ]);
    let told = agent.run(&GO);
    assert_eq!(
        told.all(),
        "VM web runs on beta after 2345.6 ms and a downtime of 23.4 ms.\n\
         3 rounds, 1.1 GiB on the wire (8.0 MiB saved) over 2 streams (TLS13_AES_128_GCM_SHA256, X25519MLKEM768); \
         memory verified equal: yes.\n\
         --- stderr\n\
         web: preparing\n\
         web: reserving\n\
         web: pre-copy, round 1, 500.0 MiB/s, 1.0 GiB left, downtime now about 412.0 ms, guest writes 10.0 MiB/s\n\
         web: switchover\n\
         web: committing\n\
         web: finishing\n\
         web: done\n\
         --- exit status 0\n"
    );
    let request = agent.wait_for(START, 1);
    assert_eq!(
        request,
        json!({"vm": "web", "to": "beta", "strategy": "auto", "max_downtime_ms": 300, "deadline_ms": 600_000,
               "bandwidth_bytes_per_s": null, "streams": null, "allow": [], "compress": "auto"})
    );
}

#[test]
fn options_reach_the_agent_in_its_units() {
    let agent = Agent::new(vec![(START, vec![ok(completed())])]);
    let mut words = GO.to_vec();
    words.extend(["--strategy", "pre-copy", "--max-downtime", "50ms"]);
    words.extend(["--deadline", "1h", "--bandwidth", "800mbit"]);
    words.extend(["--streams", "4", "--compress", "zstd"]);
    assert_eq!(agent.run(&words).status, Some(0));
    assert_eq!(
        agent.wait_for(START, 1),
        json!({"vm": "web", "to": "beta", "strategy": "pre-copy", "max_downtime_ms": 50, "deadline_ms": 3_600_000,
               "bandwidth_bytes_per_s": 100_000_000, "streams": 4, "allow": [], "compress": "zstd"})
    );
}

#[test]
fn scripts_get_exactly_one_object_with_every_promised_field() {
    let agent = Agent::new(vec![
        (START, vec![ok(info(&json!({})))]),
        (WATCH, vec![ok(completed())]),
    ]);
    let told = agent.run(&GO_JSON);
    assert_eq!((told.status, told.stderr.as_str()), (Some(0), ""));
    assert_eq!(told.stdout.lines().count(), 1);
    let object: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(object, completed());
    for field in [
        "id",
        "vm",
        "from",
        "to",
        "outcome",
        "reason",
        "strategy",
        "rounds",
        "total_time_ms",
        "downtime_ms",
        "downtime",
        "bytes_on_wire",
        "bytes_guest",
        "pages_sent",
        "pages_zero",
        "pages_delta",
        "pages_duplicate",
        "pages_compressed",
        "bytes_saved",
        "pages_resent",
        "streams",
        "cipher",
        "key_exchange",
        "memory_root",
        "verified",
        "epoch",
    ] {
        assert!(object.get(field).is_some(), "{field}");
    }
    for part in [
        "pause_ms",
        "final_pages_ms",
        "device_state_ms",
        "commit_ms",
        "resume_ms",
    ] {
        assert!(object["downtime"].get(part).is_some(), "{part}");
    }
}

#[test]
fn a_refusal_says_who_refused_and_why() {
    let error = json!({
        "kind": "refused", "message": "host \"beta\" is not who it says", "causes": ["unknown issuer"],
        "hint": "check the certificates", "blockers": [],
    });
    let agent = Agent::new(vec![(START, vec![ok(not_moved(&error))])]);
    assert_eq!(
        agent.run(&GO).all(),
        "--- stderr\n\
         web: done\n\
         error: VM web was not moved: it goes on on alpha\n\
         \x20 cause: host \"beta\" is not who it says\n\
         \x20 cause: unknown issuer\n\
         \x20 hint: check the certificates\n\
         --- exit status 3\n"
    );
}

#[test]
fn every_blocker_is_told_with_its_remedy() {
    let error = json!({
        "kind": "blocked", "message": "VM \"web\" can't be migrated", "causes": [], "hint": null,
        "blockers": [
            {"side": "source", "code": "ram-private", "message": "its RAM is private", "remedy": "Share it."},
            {"side": "destination", "code": "memory-short", "message": "1 GiB is missing", "remedy": "Add some."},
        ],
    });
    let agent = Agent::new(vec![(START, vec![Reply::Json(409, error.clone())])]);
    assert_eq!(
        agent.run(&GO).all(),
        "--- stderr\n\
         error: VM \"web\" can't be migrated\n\
         \x20 blocker: its RAM is private (source, ram-private)\n\
         \x20   remedy: Share it.\n\
         \x20 blocker: 1 GiB is missing (destination, memory-short)\n\
         \x20   remedy: Add some.\n\
         --- exit status 4\n"
    );
    let told = agent.run(&GO_JSON);
    assert_eq!((told.status, told.stdout.as_str()), (Some(4), ""));
    assert_eq!(serde_json::from_str::<Value>(&told.stderr).unwrap(), error);
}

#[test]
fn each_outcome_has_its_exit_status() {
    let doubt = json!({"phase": "in-doubt", "outcome": "in_doubt"});
    for (outcome, kind, status) in [
        ("running_on_source", "aborted", 5),
        ("running_on_source", "blocked", 4),
        ("vm_ended", "internal", 1),
    ] {
        let mut end = not_moved(&json!({"kind": kind, "message": "it did not work"}));
        end["outcome"] = json!(outcome);
        let agent = Agent::new(vec![(START, vec![ok(end)])]);
        assert_eq!(agent.run(&GO).status, Some(status), "{outcome} {kind}");
    }
    // A VM that has ended runs nowhere: that is not "aborted and running on the source".
    let end = info(&json!({"phase": "done", "outcome": "vm_ended"}));
    let agent = Agent::new(vec![(START, vec![ok(end)])]);
    assert_eq!(agent.run(&GO).status, Some(1));
    let resolve = format!("POST /v1/migrations/{ID}/resolve");
    let agent = Agent::new(vec![
        ("GET /v1/migrations", vec![ok(json!([info(&doubt)]))]),
        (&resolve, vec![ok(info(&doubt))]),
    ]);
    assert_eq!(agent.run(&["migration", "resolve", ID]).status, Some(6));
}

#[test]
fn the_first_interrupt_aborts_and_tells_the_answer() {
    let aborted = json!({"kind": "aborted", "message": "aborted by the operator"});
    let agent = Agent::new(vec![
        (START, vec![ok(info(&json!({})))]),
        (WATCH, vec![Reply::After(ABORT, not_moved(&aborted))]),
        (
            ABORT,
            vec![ok(json!({"outcome": "running_on_source", "hint": null}))],
        ),
    ]);
    let running = agent.start(&GO);
    agent.wait_for(WATCH, 1);
    running.interrupt();
    let told = running.finish().all();
    // The answer and the end come at the same time: either may be told first.
    let (end, answer) = ("web: done\n", "Aborted. The VM runs on the source.\n");
    let expected = [format!("{end}{answer}"), format!("{answer}{end}")].map(|both| {
        format!(
            "--- stderr\n\
             web: preparing\n\
             Aborting; press Ctrl-C again to leave it alone.\n\
             {both}\
             error: VM web was not moved: it goes on on alpha\n\
             \x20 cause: aborted by the operator\n\
             --- exit status 5\n"
        )
    });
    assert!(expected.contains(&told), "{told}");
    assert_eq!(agent.count(ABORT), 1);
}

#[test]
fn an_abort_that_comes_too_late_ends_in_doubt_or_done() {
    let doubt = ok(info(
        &json!({"phase": "in-doubt", "outcome": "in_doubt", "reason": "beta is silent"}),
    ));
    let answer = json!({"outcome": "in_doubt", "hint": "wait"});
    let agent = Agent::new(vec![
        (START, vec![doubt]),
        (WATCH, vec![Reply::Silence]),
        (ABORT, vec![ok(answer)]),
    ]);
    let running = agent.start(&GO);
    agent.wait_for(WATCH, 1);
    running.interrupt();
    assert_eq!(
        running.finish().all(),
        format!(
            "--- stderr\n\
             web: in doubt: beta is silent\n\
             Aborting; press Ctrl-C again to leave it alone.\n\
             Too late. Whether the VM runs on the destination is not known yet.\n\
             \x20 hint: wait\n\
             error: whether VM web runs on beta is not known yet; it is held on alpha until that is known\n\
             \x20 cause: beta is silent\n\
             \x20 hint: the agent keeps asking: `palanquin migration watch {ID}`\n\
             --- exit status 6\n"
        )
    );
}

#[test]
fn the_second_interrupt_leaves_the_migration_alone() {
    let agent = Agent::new(vec![
        (START, vec![ok(info(&json!({})))]),
        (WATCH, vec![Reply::Silence]),
        (ABORT, vec![Reply::Silence]),
    ]);
    let running = agent.start(&GO);
    agent.wait_for(WATCH, 1);
    running.interrupt();
    agent.wait_for(ABORT, 1);
    running.interrupt();
    assert_eq!(
        running.finish().all(),
        format!(
            "--- stderr\n\
             web: preparing\n\
             Aborting; press Ctrl-C again to leave it alone.\n\
             error: the migration was left alone, and its end is not known yet\n\
             \x20 hint: `palanquin migration watch {ID}` follows it\n\
             --- exit status 6\n"
        )
    );
}

#[test]
fn an_interrupt_before_the_start_is_answered_aborts_once_it_is() {
    let aborted = json!({"kind": "aborted", "message": "aborted by the operator"});
    let agent = Agent::new(vec![
        (START, vec![Reply::After("interrupted", info(&json!({})))]),
        (WATCH, vec![Reply::After(ABORT, not_moved(&aborted))]),
        (
            ABORT,
            vec![ok(json!({"outcome": "running_on_source", "hint": null}))],
        ),
    ]);
    let running = agent.start(&GO);
    agent.wait_for(START, 1);
    running.interrupt();
    // Whether the signal is taken before the answer or after it, the agent is asked to abort.
    agent.note("interrupted");
    let told = running.finish();
    assert_eq!((told.status, agent.count(ABORT)), (Some(5), 1), "{told:?}");
}

#[test]
fn an_agent_that_vanishes_leaves_the_end_unknown() {
    let agent = Agent::new(vec![
        (START, vec![ok(info(&json!({"phase": "switchover"})))]),
        (WATCH, vec![Reply::HangUp]),
    ]);
    let told = agent.run(&GO);
    let hint = format!(
        "  hint: the VM is safe, and a restarted agent goes on from its journal: then `palanquin migration show {ID}`\n"
    );
    assert_eq!(told.status, Some(6));
    assert!(
        told.stderr.starts_with(
            "web: switchover\n\
             error: the agent does not answer any more; how the migration goes on is not known\n\
             \x20 cause: the agent did not answer\n"
        ) && told.stderr.ends_with(&hint),
        "{told:?}"
    );
    let told = agent.run(&GO_JSON);
    let last: MigrationInfo = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!((told.status, last.outcome), (Some(6), None::<Outcome>));
}

#[test]
fn a_start_without_an_answer_is_in_doubt_but_one_that_nobody_heard_is_not() {
    let agent = Agent::new(vec![(START, vec![Reply::HangUp])]);
    let told = agent.run(&GO);
    assert_eq!(told.status, Some(6));
    assert!(
        told.stderr
            .starts_with("error: whether the migration has started is not known\n"),
        "{told:?}"
    );
    let told = run(&[
        "--socket",
        "/nowhere/control.sock",
        "migrate",
        "web",
        "--to",
        "beta",
    ]);
    assert_eq!(told.status, Some(1));
}

#[test]
fn a_detached_migration_says_how_to_follow_it() {
    let agent = Agent::new(vec![(START, vec![ok(info(&json!({})))])]);
    let mut words = GO.to_vec();
    words.push("--detach");
    assert_eq!(
        agent.run(&words).all(),
        format!(
            "Started. Follow it with: palanquin migration watch {ID}\n--- stderr\n--- exit status 0\n"
        )
    );
    assert_eq!(agent.count(WATCH), 0);
}

#[test]
fn what_makes_no_sense_is_refused_before_the_agent_is_asked() {
    let agent = Agent::new(vec![]);
    for (words, said) in [
        (["--compress", "gzip"], "invalid value 'gzip'"),
        (
            ["--max-downtime", "0ms"],
            "`max_downtime_ms`: 0 ms is out of bounds (1 ms to 1 h)",
        ),
        (["--deadline", "1ms"], "`deadline_ms`"),
        (["--bandwidth", "100Mb/s"], "`100Mb/s` is not a rate"),
        (["--streams", "17"], "17 is not in 1..=16"),
        (["--strategy", "magic"], "invalid value 'magic'"),
    ] {
        let told = agent.run(&[&GO[..], &words[..]].concat());
        assert!(
            told.status == Some(2) && told.stderr.contains(said),
            "{told:?}"
        );
    }
    assert_eq!(agent.count(START), 0);
}

#[test]
fn what_another_host_wrote_cannot_steer_the_terminal() {
    let error = json!({"kind": "aborted", "message": "\u{1b}[2J\u{1b}[31mno\nerror: lie", "causes": [],
                       "hint": "\u{9b}2J", "blockers": []});
    let agent = Agent::new(vec![(START, vec![ok(not_moved(&error))])]);
    let told = agent.run(&GO);
    assert!(!told.stderr.contains(['\u{1b}', '\u{9b}']), "{told:?}");
    assert!(!told.stderr.contains("\nerror: lie"), "{told:?}");
}
