//! `palanquin vm`, `palanquin host`, and what goes wrong between the command and the agent.

use std::fs;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::agent::{Agent, Reply, Running, ok, palanquin, run};

fn vm() -> Value {
    json!({
        "name": "web", "uuid": "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee", "epoch": 1, "state": "running",
        "pid": 4711, "memory_bytes": 1_610_612_736_u64, "adopted": false, "console": null, "migration": null,
        "passport": null,
    })
}

#[test]
fn vms_are_listed_and_shown() {
    let agent = Agent::new(vec![
        ("GET /v1/vms", vec![ok(json!([vm()]))]),
        ("GET /v1/vms/web", vec![ok(vm())]),
    ]);
    assert_eq!(
        agent.run(&["vm", "ls"]).all(),
        "NAME  STATE    MEMORY   EPOCH  PID   MIGRATION\n\
         web   running  1.5 GiB  1      4711\n\
         --- stderr\n--- exit status 0\n"
    );
    assert_eq!(
        agent.run(&["vm", "show", "web"]).stdout,
        "name       web\n\
         uuid       aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee\n\
         state      running\n\
         memory     1.5 GiB\n\
         epoch      1\n\
         pid        4711\n\
         adopted    no\n\
         console    none\n\
         migration  none\n\
         passport   none\n"
    );
    let told = agent.run(&["--json", "vm", "show", "web"]);
    assert_eq!(serde_json::from_str::<Value>(&told.stdout).unwrap(), vm());
}

#[test]
fn a_specification_reaches_the_agent_whole() {
    let agent = Agent::new(vec![("POST /v1/vms", vec![ok(vm())])]);
    let spec = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/web.toml");
    assert_eq!(agent.run(&["vm", "run", spec]).status, Some(0));
    let request = agent.wait_for("POST /v1/vms", 1);
    assert_eq!(request["spec"]["name"], "web");
    assert_eq!(request["spec"]["memory"], "1536MiB");
    assert_eq!(request["spec"]["network"][0]["tap"], "tap-web");
}

#[test]
fn a_specification_with_mistakes_names_all_of_them_and_asks_nobody() {
    let agent = Agent::new(vec![]);
    let dir = tempfile::tempdir().unwrap();
    let spec = dir.path().join("web.toml");
    let path = spec.to_str().unwrap();
    fs::write(
        &spec,
        "name = \"a/b\"\nmemory = \"1MiB\"\nappend = \"quiet\"\n",
    )
    .unwrap();
    assert_eq!(
        agent.run(&["vm", "run", path]).all(),
        format!(
            "--- stderr\n\
             error: {path} is no usable specification\n\
             \x20 cause: `name`: \"a/b\" is no name for a VM (1 to 64 letters, digits, `.`, `_` or `-`, starting with a \
             letter or digit)\n\
             \x20 cause: `memory`: 1MiB is out of bounds (16MiB to 8TiB in whole MiB)\n\
             \x20 cause: `append`: there is no `kernel` to give it to (name the kernel, or leave it out to boot from a \
             disk)\n\
             --- exit status 2\n"
        )
    );
    fs::write(&spec, "name = \"a\"\nmemory = \"1GiB\"\ncpu-count = 1\n").unwrap();
    let told = agent.run(&["vm", "run", path]);
    assert!(
        told.status == Some(2) && told.stderr.contains("line 3, column 1"),
        "{told:?}"
    );
    assert_eq!(agent.count("POST /v1/vms"), 0);
}

#[test]
fn a_relative_socket_is_made_absolute_for_the_agent() {
    let agent = Agent::new(vec![("POST /v1/vms/adopt", vec![ok(vm())])]);
    let words = [
        "vm",
        "adopt",
        "web",
        "--pid",
        "4711",
        "--qmp",
        "/run/q.sock",
    ];
    assert_eq!(agent.run(&words).status, Some(0));
    assert_eq!(
        agent.wait_for("POST /v1/vms/adopt", 1),
        json!({"name": "web", "pid": 4711, "qmp": "/run/q.sock"})
    );
    let words = ["vm", "adopt", "web", "--pid", "4711", "--qmp", "q.sock"];
    assert_eq!(agent.run(&words).status, Some(0));
    let qmp = agent.wait_for("POST /v1/vms/adopt", 2)["qmp"].clone();
    assert!(qmp.as_str().unwrap().starts_with('/'));
}

#[test]
fn a_name_cannot_lead_to_another_path() {
    let agent = Agent::new(vec![]);
    for name in ["../host", "a/b", "", "a?b", "a%2fb"] {
        for command in ["show", "stop"] {
            let told = agent.run(&["vm", command, name]);
            assert_eq!(told.status, Some(2), "{told:?}");
        }
    }
}

#[test]
fn an_agent_that_does_not_run_is_named_with_what_to_do() {
    let socket = "/nowhere/control.sock";
    assert_eq!(
        run(&["--socket", socket, "vm", "ls"]).all(),
        "--- stderr\n\
         error: the agent cannot be reached\n\
         \x20 cause: /nowhere/control.sock: No such file or directory (os error 2)\n\
         \x20 hint: is palanquind running? `systemctl status palanquind`, or pass --socket PATH\n\
         --- exit status 1\n"
    );
    let told = run(&["--json", "--socket", socket, "vm", "ls"]);
    let error: Value = serde_json::from_str(&told.stderr).unwrap();
    assert_eq!(
        (told.stdout.as_str(), &error["kind"]),
        ("", &json!("internal"))
    );
}

#[test]
fn the_socket_may_be_named_in_the_environment() {
    let agent = Agent::new(vec![("GET /v1/vms", vec![ok(json!([]))])]);
    let mut command = palanquin();
    command
        .env("PALANQUIN_SOCKET", agent.socket())
        .args(["vm", "ls"]);
    assert_eq!(
        Running::new(command).finish().stdout,
        "No VMs on this host.\n"
    );
}

#[test]
fn an_answer_that_is_not_understood_is_an_error_and_a_long_one_is_not_read() {
    let agent = Agent::new(vec![(
        "GET /v1/vms",
        vec![
            Reply::Text(500, "<html>".to_owned()),
            Reply::Text(200, "[{}]".to_owned()),
            Reply::Text(200, format!("[{}", " ".repeat(9 << 20))),
            Reply::HangUp,
        ],
    )]);
    for said in [
        "error: the agent's answer is not understood\n  cause: status 500",
        "error: the agent's answer is not understood\n  cause: missing field",
        "error: the agent did not answer\n  cause: length limit exceeded",
        "error: the agent did not answer\n  cause: connection closed",
    ] {
        let told = agent.run(&["vm", "ls"]);
        assert!(
            told.status == Some(1) && told.stderr.starts_with(said),
            "{told:?}"
        );
    }
}

#[test]
fn a_usage_error_is_an_object_for_scripts() {
    let told = run(&["--json", "vm", "frobnicate"]);
    let error: Value = serde_json::from_str(&told.stderr).unwrap();
    assert_eq!((told.status, &error["kind"]), (Some(2), &json!("usage")));
    assert!(error["message"].as_str().unwrap().contains("frobnicate"));
    assert_eq!(run(&["vm", "frobnicate"]).status, Some(2));
    assert_eq!(run(&["--help"]).status, Some(0));
}

#[test]
fn a_reader_that_went_away_is_quiet() {
    for words in [&["completions", "bash"][..], &["vm", "ls"][..]] {
        for is_stdout in [true, false] {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let mut command = palanquin();
            command.args(["--socket", "/nowhere"]).args(words);
            if is_stdout {
                command.stdout(Stdio::from(writer));
            } else {
                command.stderr(Stdio::from(writer));
            }
            let told = Running::new(command).finish();
            let expected = i32::from(words[0] == "vm");
            assert_eq!(told.status, Some(expected), "{told:?}");
        }
    }
}

#[test]
fn a_full_disk_is_not() {
    let mut command = palanquin();
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    command.args(["completions", "bash"]).stdout(full);
    let told = Running::new(command).finish();
    assert!(
        told.status == Some(1)
            && told
                .stderr
                .starts_with("error: cannot write to standard output\n"),
        "{told:?}"
    );
}
