//! `palanquin migration` and `palanquin doctor`.

use serde_json::{Value, json};

use crate::agent::{Agent, ID, Reply, ok};
use crate::migrate::{completed, info};

const LIST: &str = "GET /v1/migrations";

fn other() -> Value {
    info(&json!({"id": "11112222-2222-4333-8444-555555555555", "phase": "pre-copy"}))
}

fn abort_path() -> String {
    format!("POST /v1/migrations/{ID}/abort")
}

#[test]
fn a_list_has_a_line_for_each_migration() {
    let agent = Agent::new(vec![(
        LIST,
        vec![ok(json!([completed(), other()])), ok(json!([]))],
    )]);
    assert_eq!(
        agent.run(&["migration", "ls"]).stdout,
        "ID        VM   WAY            PHASE     OUTCOME    TIME       DOWNTIME\n\
         11111111  web  alpha -> beta  done      completed  2345.6 ms  23.4 ms\n\
         11112222  web  alpha -> beta  pre-copy  under way  0.0 ms     0.0 ms\n"
    );
    assert_eq!(
        agent.run(&["migration", "ls"]).stdout,
        "No migrations on this host.\n"
    );
}

#[test]
fn everything_readable_is_shown_with_the_parts_of_the_downtime() {
    let agent = Agent::new(vec![(LIST, vec![ok(json!([completed()]))])]);
    assert_eq!(
        agent.run(&["migration", "show", "1111"]).all(),
        format!(
            "id              {ID}\n\
             vm              web (aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee)\n\
             way             alpha -> beta\n\
             side            source\n\
             ordered by      not known\n\
             phase           done\n\
             outcome         completed\n\
             strategy        pre-copy\n\
             total time      2345.6 ms\n\
             downtime        23.4 ms\n\
             \x20 pause         1.0 ms\n\
             \x20 final pages   6.0 ms\n\
             \x20 device state  11.0 ms\n\
             \x20 commit        2.4 ms\n\
             \x20 resume        3.0 ms\n\
             rounds          3\n\
             on the wire     1.1 GiB\n\
             pages sent      288000 (1.1 GiB)\n\
             \x20 deltas        900\n\
             \x20 duplicates    120\n\
             \x20 compressed    2048\n\
             \x20 saved         8.0 MiB\n\
             pages zero      105216 (411.0 MiB)\n\
             pages resent    1200 (4.7 MiB)\n\
             memory          1.5 GiB\n\
             streams         2\n\
             cipher          TLS13_AES_128_GCM_SHA256\n\
             key exchange    X25519MLKEM768\n\
             memory root     00112233445566778899aabbccddeeff\n\
             verified        yes, equal on both hosts\n\
             epoch           2\n\
             --- stderr\n\
             --- exit status 0\n"
        )
    );
}

#[test]
fn an_identity_may_be_shortened_as_long_as_it_is_unique() {
    let agent = Agent::new(vec![(LIST, vec![ok(json!([completed(), other()]))])]);
    for id in ["11111", "11111111-2222", ID] {
        let told = agent.run(&["--json", "migration", "show", id]);
        let shown: Value = serde_json::from_str(&told.stdout).unwrap();
        assert_eq!(shown["id"], ID);
    }
    for (id, said) in [
        (
            "1111",
            "error: several migrations begin with \"1111\"\n  hint: write more of it\n",
        ),
        (
            "9",
            "error: there is no migration \"9\" on this host\n  hint: `palanquin migration ls` lists them\n",
        ),
        (
            "",
            "error: \"\" is no identity of a migration\n  hint: `palanquin migration ls` lists them\n",
        ),
        (
            "../vms",
            "error: \"../vms\" is no identity of a migration\n  hint: `palanquin migration ls` lists them\n",
        ),
    ] {
        let told = agent.run(&["migration", "abort", id]);
        assert_eq!((told.status, told.stderr.as_str()), (Some(2), said));
    }
}

#[test]
fn an_abort_is_answered_exactly() {
    for (outcome, said, status) in [
        (
            "running_on_source",
            "Aborted. The VM runs on the source.\n",
            0,
        ),
        (
            "too_late_committed",
            "Too late. The VM runs on the destination.\n",
            0,
        ),
        (
            "in_doubt",
            "Too late. Whether the VM runs on the destination is not known yet.\n",
            6,
        ),
    ] {
        let agent = Agent::new(vec![
            (LIST, vec![ok(json!([other(), info(&json!({}))]))]),
            (
                &abort_path(),
                vec![ok(json!({"outcome": outcome, "hint": null}))],
            ),
        ]);
        let told = agent.run(&["migration", "abort", "11111"]);
        assert_eq!((told.status, told.stdout.as_str()), (Some(status), said));
        let told = agent.run(&["--json", "migration", "abort", "11111"]);
        let answer: Value = serde_json::from_str(&told.stdout).unwrap();
        assert_eq!(
            (told.status, &answer["outcome"]),
            (Some(status), &json!(outcome))
        );
    }
}

#[test]
fn an_abort_without_an_answer_is_in_doubt() {
    let agent = Agent::new(vec![
        (LIST, vec![ok(json!([info(&json!({}))]))]),
        (&abort_path(), vec![Reply::HangUp]),
    ]);
    let told = agent.run(&["migration", "abort", ID]);
    assert_eq!(told.status, Some(6));
    assert!(
        told.stderr
            .starts_with("error: whether the migration was aborted is not known\n"),
        "{told:?}"
    );
}

#[test]
fn what_the_operator_asserts_reaches_the_agent() {
    let resolve = format!("POST /v1/migrations/{ID}/resolve");
    let taken_back =
        info(&json!({"phase": "done", "outcome": "running_on_source", "reason": "taken back"}));
    let agent = Agent::new(vec![
        (LIST, vec![ok(json!([info(&json!({"phase": "in-doubt"}))]))]),
        (&resolve, vec![ok(completed()), ok(taken_back)]),
    ]);
    let told = agent.run(&["migration", "resolve", ID]);
    assert_eq!(told.status, Some(0), "{told:?}");
    assert_eq!(agent.wait_for(&resolve, 1), json!({"assert": null}));
    let words = [
        "migration",
        "resolve",
        ID,
        "--assert",
        "destination-lost-it",
    ];
    let told = agent.run(&words);
    assert_eq!(
        agent.wait_for(&resolve, 2),
        json!({"assert": "destination-lost-it"})
    );
    assert_eq!(
        told.all(),
        "--- stderr\n\
         error: VM web was not moved: it goes on on alpha\n\
         \x20 cause: taken back\n\
         --- exit status 5\n"
    );
}

#[test]
fn a_watched_migration_is_left_alone_by_an_interrupt() {
    let watch = format!("GET /v1/migrations/{ID}/watch");
    let agent = Agent::new(vec![
        (LIST, vec![ok(json!([info(&json!({}))]))]),
        (&watch, vec![Reply::Silence]),
    ]);
    let running = agent.start(&["migration", "watch", ID]);
    agent.wait_for(&watch, 1);
    running.interrupt();
    let told = running.finish();
    assert_eq!((told.status, agent.count(&abort_path())), (Some(6), 0));
}

#[test]
fn the_doctor_names_everything_at_once() {
    let report = json!({
        "passed": ["QEMU 7.2.22", "Linux 6.18"],
        "blockers": [
            {"side": "source", "code": "ram-private", "message": "its RAM is private", "remedy": "Share it."},
            {"side": "destination", "code": "memory-short", "message": "1 GiB is missing", "remedy": "Add some."},
        ],
    });
    let agent = Agent::new(vec![("POST /v1/doctor", vec![ok(report.clone())])]);
    let told = agent.run(&["doctor", "--to", "beta", "--vm", "web"]);
    assert_eq!(
        told.all(),
        "ok    QEMU 7.2.22\n\
         ok    Linux 6.18\n\
         STOP  its RAM is private (source, ram-private)\n\
         \x20     Share it.\n\
         STOP  1 GiB is missing (destination, memory-short)\n\
         \x20     Add some.\n\
         --- stderr\n\
         error: 2 things stand in the way\n\
         --- exit status 4\n"
    );
    assert_eq!(
        agent.wait_for("POST /v1/doctor", 1),
        json!({"to": "beta", "vm": "web"})
    );
    let told = agent.run(&["--json", "doctor"]);
    assert_eq!(told.status, Some(4));
    assert_eq!(serde_json::from_str::<Value>(&told.stdout).unwrap(), report);
    assert!(serde_json::from_str::<Value>(&told.stderr).is_ok());
}

#[test]
fn a_healthy_host_passes() {
    let report = json!({"passed": ["QEMU 7.2.22"], "blockers": []});
    let agent = Agent::new(vec![("POST /v1/doctor", vec![ok(report)])]);
    assert_eq!(
        agent.run(&["doctor"]).all(),
        "ok    QEMU 7.2.22\nNothing stands in the way.\n--- stderr\n--- exit status 0\n"
    );
}
