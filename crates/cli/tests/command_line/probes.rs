//! `palanquin watch record` and `run` on real sockets, between network namespaces.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant, SystemTime};

use palanquin_lab::network::{Namespace, PREFIX, Switch};
use palanquin_lab::process::{Kept, cpu_time, output};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::agent::{Agent, ok};
use crate::migrate::info;

const PATIENCE: Duration = Duration::from_secs(60);
const PAGE: &str = "127.0.0.1:9810";

/// A watcher, and a machine with the addresses 10.78.0.2 and following.
pub(crate) struct Net {
    pub(crate) watcher: Namespace,
    pub(crate) target: Namespace,
    switch: Switch,
}

pub(crate) fn net(addresses: u8) -> Net {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test makes network namespaces and needs root"
    );
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let id = format!("{PREFIX}-{}-w{number}", std::process::id());
    let switch = Switch::new(format!("{id}-s")).unwrap();
    let [watcher, target] = ["watcher", "target"].map(|name| {
        let namespace = Namespace::new(format!("{id}-{name}")).unwrap();
        switch.plug(&namespace, name).unwrap();
        namespace
    });
    let add = |namespace: &Namespace, last: u8| {
        let address = format!("10.78.0.{last}/24");
        namespace
            .ip(&["address", "add", &address, "dev", "eth0"])
            .unwrap();
    };
    add(&watcher, 1);
    for last in 0..addresses {
        add(&target, 2 + last);
    }
    Net {
        watcher,
        target,
        switch,
    }
}

impl Net {
    /// Lets the target answer no echoes, or answer them again.
    fn ignore_echoes(&self, ignored: bool) {
        let setting = "/proc/sys/net/ipv4/icmp_echo_ignore_all";
        let value = if ignored { "1" } else { "0" };
        let set = self.target.inside(move || Ok(fs::write(setting, value)?));
        set.unwrap();
    }

    /// Pulls the target's cable, or plugs it in again.
    pub(crate) fn cut(&self, is_cut: bool) {
        let to = if is_cut { "down" } else { "up" };
        let link = ["link", "set", "target", to];
        self.switch.namespace.ip(&link).unwrap();
    }

    /// Announces a VM with this hardware address by RARP, as QEMU does when it has arrived.
    pub(crate) fn announce(&self, mac: &str) {
        let index = self.target.ip(&["-o", "link", "show", "eth0"]).unwrap();
        let index = index.split(':').next().unwrap().trim();
        let mac = mac.replace(':', "");
        // Destination, source, RARP; Ethernet, IPv4, lengths, question; who asks, and about whom.
        let frame = format!("ffffffffffff{mac}80350001080006040003{mac}00000000{mac}00000000");
        let script = "socket(my $s, 17, 3, 0) or die $!; \
             my $to = pack('S n l S C C a8', 17, 0, $ARGV[0], 0, 0, 6, \"\\xff\" x 6); \
             defined send($s, pack('H*', $ARGV[1]), 0, $to) or die $!";
        let mut perl = self.target.command("perl");
        let sent = output(perl.args(["-e", script, index, &frame]), PATIENCE).unwrap();
        assert!(sent.status.success(), "{sent:?}");
    }
}

pub(crate) fn config(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("watch.toml");
    fs::write(&path, text).unwrap();
    path
}

const WEB: &str = r#"
    stall = "2s"
    [[target]]
    name = "web"
    address = "10.78.0.2"
    role = "vm"
    interval = "100ms"
"#;

/// A hardware address that no interface of the test has.
pub(crate) const MAC: &str = "52:54:00:00:00:01";
const OTHER_MAC: &str = "52:54:00:00:00:02";

fn palanquin(net: &Net) -> Command {
    net.watcher.command(env!("CARGO_BIN_EXE_palanquin"))
}

#[test]
fn what_is_recorded_can_be_replayed() {
    let (net, dir) = (net(1), tempfile::tempdir().unwrap());
    let text = format!("interface = \"eth0\"\n{WEB}mac = \"{MAC}\"\n");
    let (config, trace) = (config(dir.path(), &text), dir.path().join("trace.csv"));
    let mut record = palanquin(&net);
    record.args(["--json", "watch", "record"]).arg(&config);
    record.arg("--out").arg(&trace).args(["--for", "6s"]);
    let recorded = std::thread::scope(|scope| {
        let recording = scope.spawn(|| output(&mut record, PATIENCE).unwrap());
        let is_there = |kind: &'static str| {
            let trace = trace.clone();
            palanquin_lab::wait::until_true(kind, PATIENCE, move || {
                Ok(fs::read_to_string(&trace).is_ok_and(|text| text.contains(kind)))
            })
            .unwrap();
        };
        is_there(",web,rtt_ms,");
        net.announce(MAC);
        net.ignore_echoes(true);
        recording.join().unwrap()
    });
    assert!(recorded.status.success(), "{recorded:?}");
    let recorded: Value = serde_json::from_slice(&recorded.stdout).unwrap();
    assert!(recorded["bytes"].as_u64().unwrap() > 0);
    assert_eq!(recorded["late"], 0);
    let text = fs::read_to_string(&trace).unwrap();
    assert!(text.starts_with("time_s,target,kind,value\n"));
    for kind in ["lost", "icmp_offset_ms", "rtt_ms", "ttl", "announced"] {
        assert!(text.contains(&format!(",web,{kind},")), "{kind} in {text}");
    }
    assert_eq!(text.matches(",announced,").count(), 1, "{text}");
    let mut replay = Command::new(env!("CARGO_BIN_EXE_palanquin"));
    replay.args(["--json", "watch", "replay"]).arg(&trace);
    let replayed = output(&mut replay, PATIENCE).unwrap();
    assert!(replayed.status.success(), "{replayed:?}");
    let replayed: Value = serde_json::from_slice(&replayed.stdout).unwrap();
    assert_eq!(replayed["observations"], recorded["observations"]);
    let lines = text.lines().filter(|line| !line.starts_with('#')).count() as u64;
    assert_eq!(recorded["observations"], lines - 1);
    // Nothing is overwritten.
    let mut again = palanquin(&net);
    again.args(["watch", "record"]).arg(&config);
    again.arg("--out").arg(&trace).args(["--for", "1s"]);
    let again = output(&mut again, PATIENCE).unwrap();
    assert_eq!(again.status.code(), Some(2));
    let told = String::from_utf8(again.stderr).unwrap();
    assert!(told.contains("nothing is overwritten"), "{told}");
    assert_eq!(fs::read_to_string(&trace).unwrap(), text);
}

/// Runs without the capability that raw sockets need.
fn without_raw(net: &Net, words: &[&str], config: &Path) -> (Option<i32>, String) {
    let mut run = net.watcher.command("setpriv");
    run.args(["--bounding-set=-net_raw", "--inh-caps=-net_raw"])
        .arg(env!("CARGO_BIN_EXE_palanquin"))
        .arg("watch")
        .args(words)
        .arg(config);
    let output = output(&mut run, PATIENCE).unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), told)
}

#[test]
fn a_missing_right_is_named_with_what_to_do() {
    let (net, dir) = (net(1), tempfile::tempdir().unwrap());
    let text = format!("interface = \"eth0\"\n{WEB}");
    let config = config(dir.path(), &text);
    let (status, told) = without_raw(&net, &["run"], &config);
    assert_eq!(status, Some(4), "{told}");
    for word in ["CAP_NET_RAW", "ping_group_range", "hint: "] {
        assert!(told.contains(word), "{word} in {told}");
    }
    // Whose group may send echoes watches without the rest, and is told what is missing.
    let setting = "/proc/sys/net/ipv4/ping_group_range";
    let set = net.watcher.inside(move || Ok(fs::write(setting, "0 0")?));
    set.unwrap();
    let trace = dir.path().join("trace.csv");
    let trace = trace.to_str().unwrap();
    let words = ["record", "--out", trace, "--for", "2s"];
    let (status, told) = without_raw(&net, &words, &config);
    assert_eq!(status, Some(0), "{told}");
    for what in [
        "warning: ICMP timestamps need",
        "warning: hearing announcements",
    ] {
        assert!(told.contains(what), "{what} in {told}");
    }
    let text = fs::read_to_string(trace).unwrap();
    assert!(text.contains(",web,rtt_ms,") && !text.contains("icmp_offset_ms"));
}

#[test]
fn what_can_not_be_watched_is_refused_with_its_kind_its_cause_and_what_to_do() {
    let (net, dir) = (net(1), tempfile::tempdir().unwrap());
    let page: SocketAddr = PAGE.parse().unwrap();
    let taken = net
        .watcher
        .inside(move || Ok(std::net::TcpListener::bind(page)?));
    let _taken = taken.unwrap();
    let host = WEB.replace("10.78.0.2", "web.example");
    let group = WEB.replace("10.78.0.2", "224.0.0.1");
    for (text, status, words) in [
        (
            format!("listen = \"{PAGE}\"\n{WEB}"),
            4,
            ["in use", "another program listens there"],
        ),
        (
            format!("listen = \"192.0.2.1:80\"\nlisten-to-all = true\n{WEB}"),
            2,
            ["assign", "an address of this machine"],
        ),
        (
            format!("listen = \"0.0.0.0:80\"\n{WEB}"),
            2,
            ["`listen`", "listen-to-all"],
        ),
        (
            format!("interface = \"none0\"\n{WEB}"),
            2,
            ["interface none0", "ip -br link"],
        ),
        (
            format!("interface = \"lo\"\n{WEB}"),
            2,
            ["no Ethernet", "ip -br link"],
        ),
        (host, 2, ["IP address", "hide a move"]),
        (group, 2, ["target[0].address", "no address of one machine"]),
        (
            format!("typo = 1\n{WEB}"),
            2,
            ["typo", "examples/watch.toml"],
        ),
        (String::new(), 2, ["`target`", "1 to 1024"]),
    ] {
        let config = config(dir.path(), &text);
        let mut run = palanquin(&net);
        run.args(["watch", "run"]).arg(&config);
        let refused = output(&mut run, PATIENCE).unwrap();
        let told = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(status), "{told}");
        for word in ["error: ", "cause: "].into_iter().chain(words) {
            assert!(told.contains(word), "{word} in {told}");
        }
        assert!(refused.stdout.is_empty());
    }
}

/// Lines of a program, as they come.
fn lines(from: ChildStdout) -> Receiver<Value> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let Ok(value) = serde_json::from_str(&line) else {
                continue;
            };
            if sender.send(value).is_err() {
                return;
            }
        }
    });
    lines
}

fn until(lines: &Receiver<Value>, mut is_it: impl FnMut(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    let mut before = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left) {
            Ok(value) if is_it(&value) => return value,
            Ok(value) => before.push(value),
            Err(_) => panic!("it was not told; what was: {before:#?}"),
        }
    }
}

/// Asks the page, from inside.
fn get(net: &Net, path: &str, host: &str) -> anyhow::Result<String> {
    let request = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n");
    net.watcher.inside(move || {
        let page: SocketAddr = PAGE.parse()?;
        let mut stream = TcpStream::connect_timeout(&page, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

/// Waits until the metrics have this in them.
fn until_measured(net: &Net, what: &str) {
    palanquin_lab::wait::until_true(what, PATIENCE, || {
        Ok(get(net, "/metrics", PAGE).is_ok_and(|metrics| metrics.contains(what)))
    })
    .unwrap();
}

/// What the page says of a target.
fn status(net: &Net, target: usize) -> anyhow::Result<Value> {
    let answer = get(net, "/api/status", PAGE)?;
    let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
    let status: Value = serde_json::from_str(body)?;
    Ok(status["targets"][target].clone())
}

/// Begins to watch, and waits until there are answers.
fn watched(net: &Net, config: &Path) -> (Kept, Receiver<Value>) {
    let mut run = palanquin(net);
    run.args(["--json", "watch", "run"]).arg(config);
    let mut child = run.stdout(Stdio::piped()).spawn().unwrap();
    let lines = lines(child.stdout.take().unwrap());
    let child = Kept::new(child);
    until_measured(net, "response_duration_seconds{target=\"web\"}");
    (child, lines)
}

#[test]
fn an_outage_is_found_bursts_are_sent_and_page_and_metrics_show_it() {
    let (net, dir) = (net(1), tempfile::tempdir().unwrap());
    let config = config(dir.path(), &format!("listen = \"{PAGE}\"\n{WEB}"));
    let (mut child, lines) = watched(&net, &config);
    assert!(
        get(&net, "/metrics", PAGE)
            .unwrap()
            .contains("findings_total{level=\"note\"} 0")
    );
    net.cut(true);
    until(&lines, |value| value["text"] == "burst of probes begins");
    palanquin_lab::wait::until_true("losses are shown", PATIENCE, || {
        Ok(status(&net, 0)?["loss"].as_f64() > Some(0.3))
    })
    .unwrap();
    net.cut(false);
    let finding = until(&lines, |value| value["event"] == "finding");
    assert_eq!(finding["target"], "web");
    let level = finding["level"].as_str().unwrap();
    until_measured(
        &net,
        &format!("palanquin_watch_findings_total{{level=\"{level}\"}} 1"),
    );
    let events = get(&net, "/api/status", PAGE).unwrap();
    let class = finding["class"].as_str().unwrap();
    assert!(
        events.contains(&format!("\"text\":\"{level}: {class}, ")),
        "{events}"
    );
    let metrics = get(&net, "/metrics", PAGE).unwrap();
    for line in [
        "palanquin_watch_state{target=\"web\",state=\"",
        "palanquin_watch_unanswered_total{target=\"web\",probe=\"echo\"} ",
        "palanquin_watch_loss_ratio{target=\"web\"} 0.",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    assert!(!metrics.contains("unanswered_total{target=\"web\",probe=\"echo\"} 0\n"));
    child.signal(Signal::TERM);
    assert!(child.wait(PATIENCE).unwrap().success());
}

/// Sends this from inside; what is answered until the connection ends, or for a moment.
fn exchange(net: &Net, request: String, moment: Duration) -> String {
    let answer = net.watcher.inside(move || {
        let page: SocketAddr = PAGE.parse()?;
        let mut stream = TcpStream::connect_timeout(&page, PATIENCE)?;
        stream.set_read_timeout(Some(moment))?;
        stream.write_all(request.as_bytes())?;
        let (mut answer, mut bytes) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            answer.extend(&bytes[..count]);
        }
        Ok(answer)
    });
    String::from_utf8(answer.unwrap()).unwrap()
}

#[test]
fn the_page_is_for_its_viewers_only_takes_no_command_and_has_few_of_them() {
    let (net, dir) = (net(1), tempfile::tempdir().unwrap());
    let config = config(dir.path(), &format!("listen = \"{PAGE}\"\n{WEB}"));
    let (_child, _lines) = watched(&net, &config);
    let ask = |request: &str| {
        exchange(
            &net,
            format!("{request}\r\nConnection: close\r\n\r\n"),
            PATIENCE,
        )
    };
    let page = ask(&format!("GET / HTTP/1.1\r\nHost: {PAGE}"));
    assert!(page.starts_with("HTTP/1.1 200 "), "{page}");
    for header in [
        "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self';",
        "frame-ancestors 'none'",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
        "cross-origin-resource-policy: same-origin",
    ] {
        assert!(page.contains(header), "{header} in {page}");
    }
    for (request, answer) in [
        ("GET / HTTP/1.1\r\nHost: evil.example", " 421 "),
        (
            "GET / HTTP/1.1\r\nHost: localhost.evil.example:9810",
            " 421 ",
        ),
        (
            "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1.evil.example",
            " 421 ",
        ),
        ("GET / HTTP/1.0", " 421 "),
        ("GET /api/status HTTP/1.1\r\nHost: localhost:9810", " 200 "),
        (
            "GET /api/status HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site",
            " 403 ",
        ),
        (
            "GET /api/events HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site",
            " 403 ",
        ),
        (
            "GET / HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site",
            " 200 ",
        ),
        ("POST /api/status HTTP/1.1\r\nHost: localhost", " 405 "),
        ("DELETE / HTTP/1.1\r\nHost: localhost", " 405 "),
        (
            "GET /api/history?target=0 HTTP/1.1\r\nHost: localhost",
            " 200 ",
        ),
        (
            "GET /api/history?target=7 HTTP/1.1\r\nHost: localhost",
            " 404 ",
        ),
        (
            "GET /api/history?target=-1 HTTP/1.1\r\nHost: localhost",
            " 400 ",
        ),
        ("GET /../etc/passwd HTTP/1.1\r\nHost: localhost", " 404 "),
    ] {
        let told = ask(request);
        let first = told.lines().next().unwrap_or_default();
        assert!(first.contains(answer), "{request}: {told}");
    }
    // A viewer gets what is new; the one too many is refused, and has a place once another has gone.
    let viewer = || {
        net.watcher.inside(|| {
            let page: SocketAddr = PAGE.parse()?;
            let mut stream = TcpStream::connect_timeout(&page, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
            let mut line = String::new();
            let mut reader = BufReader::new(stream);
            reader.read_line(&mut line)?;
            Ok((line, reader))
        })
    };
    let mut viewers = Vec::new();
    for _ in 0..32 {
        let (line, stream) = viewer().unwrap();
        assert!(line.contains(" 200 "), "{line}");
        viewers.push(stream);
    }
    assert!(viewer().unwrap().0.contains(" 503 "));
    let mut news = viewers.pop().unwrap().lines().map_while(Result::ok);
    assert!(news.any(|line| line == "event: seconds"));
    drop(news);
    palanquin_lab::wait::until_true("a place is free", PATIENCE, || {
        Ok(viewer()?.0.contains(" 200 "))
    })
    .unwrap();
}

#[test]
fn a_move_is_noticed_by_its_announcements_and_is_explained_only_by_its_own_order() {
    let (net, dir) = (net(2), tempfile::tempdir().unwrap());
    let running = json!([info(&json!({"phase": "pre-copy", "total_time_ms": 1000.0}))]);
    let agent = Agent::new(vec![("GET /v1/migrations", vec![ok(running)])]);
    let records = dir.path().join("records.json");
    fs::write(&records, "[]").unwrap();
    let mut text = format!(
        "listen = \"{PAGE}\"\ninterface = \"eth0\"\nstall = \"2s\"\nagents = [{:?}]\nrecords = {records:?}\n",
        agent.socket()
    );
    for (name, last, mac) in [("web", 2, MAC), ("db", 3, OTHER_MAC)] {
        text += &format!(
            "[[target]]\nname = \"{name}\"\naddress = \"10.78.0.{last}\"\nrole = \"vm\"\ninterval = \"100ms\"\nmac = \"{mac}\"\n"
        );
    }
    let config = config(dir.path(), &text);
    let (_child, lines) = watched(&net, &config);
    // What is usual is to be known first.
    palanquin_lab::wait::pause(Duration::from_secs(10)).unwrap();
    let moved = || {
        net.cut(true);
        palanquin_lab::wait::pause(Duration::from_millis(1500)).unwrap();
        net.cut(false);
        for _ in 0..5 {
            net.announce(MAC);
            net.announce(OTHER_MAC);
            palanquin_lab::wait::pause(Duration::from_millis(150)).unwrap();
        }
    };
    moved();
    let mut verdicts = [Value::Null, Value::Null];
    until(&lines, |value| {
        if value["event"] == "finding" && value["class"] == "migration" {
            let at = usize::from(value["target"] != "web");
            verdicts[at] = value["verdict"].clone();
        }
        verdicts.iter().all(|verdict| !verdict.is_null())
    });
    assert_eq!(verdicts, ["authorised", "unknown"]);
    until_measured(
        &net,
        "palanquin_watch_announcements_total{target=\"web\"} 5",
    );
    until_measured(
        &net,
        "palanquin_watch_state{target=\"web\",state=\"ordered\"} 1",
    );
    until_measured(
        &net,
        "palanquin_watch_state{target=\"db\",state=\"alarm\"} 1",
    );
    // An order that comes into the file later explains what comes after it.
    let now_s = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let order = json!([{"id": "m7", "vm": "db", "source": "alpha", "destination": "beta", "from_s": now_s - 60.0, "to_s": now_s + 60.0}]);
    fs::write(&records, order.to_string()).unwrap();
    until(&lines, |value| {
        value["event"] == "finding" && value["target"] == "db" && value["record"] == "m7"
    });
    // A file that is none is said to be so, and changes nothing.
    fs::write(&records, "no records").unwrap();
    until(&lines, |value| {
        value["event"] == "problem" && value["text"].as_str().unwrap().contains("records.json")
    });
}

/// By bytes and by CPU time, not by the wall's. What `docs/watch.md` says of the cost was measured by this: `--nocapture`.
#[test]
fn probing_costs_little_at_rest() {
    const TARGETS: u8 = 50;
    const SECONDS: f64 = 10.0;
    let (net, dir) = (net(TARGETS), tempfile::tempdir().unwrap());
    let mut text = format!("listen = \"{PAGE}\"\n");
    for last in 0..TARGETS {
        text += &format!(
            "[[target]]\nname = \"t{last}\"\naddress = \"10.78.0.{}\"\nrole = \"vm\"\nntp = \"8s\"\n",
            2 + last
        );
    }
    let config = config(dir.path(), &text);
    let mut run = palanquin(&net);
    run.args(["--json", "watch", "run"]).arg(&config);
    let child = Kept::new(run.stdout(Stdio::null()).spawn().unwrap());
    let sent = || -> u64 {
        let counted = net.watcher.inside(|| {
            let mut sum = 0;
            for way in ["rx", "tx"] {
                let of = net_statistic(way)?;
                sum += of;
            }
            Ok(sum)
        });
        counted.unwrap()
    };
    palanquin_lab::wait::pause(Duration::from_secs(5)).unwrap();
    let (bytes, cpu, began) = (sent(), cpu_time(child.pid()).unwrap(), Instant::now());
    palanquin_lab::wait::pause(Duration::from_secs_f64(SECONDS)).unwrap();
    let passed_s = began.elapsed().as_secs_f64();
    let targets = f64::from(TARGETS);
    let kbit_per_s = (sent() - bytes) as f64 * 8.0 / 1e3 / passed_s / targets;
    let cpu_s = (cpu_time(child.pid()).unwrap() - cpu).as_secs_f64();
    let share = cpu_s / passed_s / targets;
    println!(
        "{TARGETS} targets for {passed_s:.0} s: {kbit_per_s:.2} kbit/s both ways with Ethernet's headers, {:.3} % of a core, each",
        share * 100.0
    );
    assert!(kbit_per_s < 20.0 && share < 0.01);
}

/// Bytes that the interface has counted.
fn net_statistic(way: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("eth0:"));
    let column = if way == "rx" { 0 } else { 8 };
    let value = line.and_then(|line| line.split_ascii_whitespace().nth(column));
    Ok(value.unwrap_or_default().parse()?)
}
