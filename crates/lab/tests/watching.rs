//! `palanquin watch run` beside real migrations: what an agent says explains what was noticed, and nothing else does.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use palanquin_lab::guest::{GuestSpec, mac};
use palanquin_lab::paths;
use palanquin_lab::process::Kept;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;
use serde_json::Value;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 10);
const LONG: Duration = Duration::from_secs(60);
/// What is usual is to be known before something happens.
const LEARN: Duration = Duration::from_secs(20);
/// A finding comes within that time from the end of a migration, if it comes.
const FOUND: Duration = Duration::from_secs(20);
/// Not every migration is noticed: see the trials.
const MOVES: usize = 4;

struct Watch {
    lines: Receiver<Value>,
    _process: Kept,
}

/// Begins to watch the guest from outside.
fn watch(rig: &Rig, name: &str, agents: &[String]) -> Result<Watch> {
    let config = rig.dir().join(format!("{name}.toml"));
    let mut text = format!("interface = \"eth0\"\nstall = \"2s\"\nagents = {agents:?}\n");
    text += &format!(
        "[[target]]\nname = \"traveller\"\naddress = \"{GUEST}\"\nrole = \"vm\"\ninterval = \"200ms\"\nmac = \"{}\"\n",
        mac(&GUEST.to_string())
    );
    fs::write(&config, text)?;
    let mut command = rig.client.command(paths::program("palanquin")?);
    command.args(["--json", "watch", "run"]).arg(&config);
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().context("no output")?;
    let (sender, lines) = channel();
    // It ends with the process.
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Ok(value) = serde_json::from_str(&line)
                && sender.send(value).is_err()
            {
                return;
            }
        }
    });
    Ok(Watch {
        lines,
        _process: Kept::new(child),
    })
}

impl Watch {
    /// The next finding of a migration, if there is one in time.
    fn migration(&self, deadline: Instant) -> Option<Value> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).ok()?;
            eprintln!("{line}");
            if line["event"] == "finding" && line["class"] == "migration" && line["level"] != "note"
            {
                return Some(line);
            }
        }
    }
}

#[test]
fn a_real_migration_is_noticed_and_only_what_its_agent_says_explains_it() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let guest = GuestSpec::small("traveller").filled(32).on_network();
    rig.hosts[0].boot(&guest)?.wait_verified(2048, LONG)?;
    let sockets: Vec<String> = rig
        .hosts
        .iter()
        .map(|host| host.observe_socket().display().to_string())
        .collect();
    let told = watch(&rig, "told", &sockets)?;
    let alone = watch(&rig, "alone", &[])?;
    wait::pause(LEARN)?;
    for number in 0..MOVES {
        let (from, to) = (number % 2, (number + 1) % 2);
        let info = rig.move_vm("traveller", from, to)?;
        let deadline = Instant::now() + FOUND;
        let found = [told.migration(deadline), alone.migration(deadline)];
        let [Some(told), Some(alone)] = found else {
            continue;
        };
        ensure!(told["target"] == "traveller", "{told:#}");
        ensure!(told["verdict"] == "authorised", "{told:#}");
        ensure!(told["record"] == info.id.to_string(), "{told:#}");
        ensure!(alone["verdict"] == "unknown", "{alone:#}");
        return Ok(());
    }
    Err(anyhow::anyhow!("none of {MOVES} migrations was noticed"))
}
