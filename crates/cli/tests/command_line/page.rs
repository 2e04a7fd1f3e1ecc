//! The page of `palanquin watch run` in a real browser: Chromium without a window, told what to do through its pipe.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use palanquin_lab::process::{Kept, run};
use serde_json::{Value, json};

use crate::probes::{MAC, Net, config, net};

const BROWSER: &str = "/usr/bin/chromium";
const PATIENCE: Duration = Duration::from_secs(60);
const PAGE: &str = "127.0.0.1:9810";

/// A browser with one page.
struct Browser {
    to: File,
    from: Receiver<Value>,
    session: Option<String>,
    number: u64,
    /// What it has said without being asked.
    said: Vec<Value>,
    _process: Kept,
}

impl Browser {
    fn start(net: &Net, dir: &Path) -> Self {
        let (to, from) = (dir.join("to"), dir.join("from"));
        run("mkfifo", &[&to, &from]).unwrap();
        // It reads descriptor 3 and writes descriptor 4. Root has no sandbox; the page is ours.
        let script = "exec \"$0\" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run \
             --disable-background-networking --remote-debugging-pipe --window-size=1200,1250 \
             --user-data-dir=\"$1/profile\" about:blank 3<\"$1/to\" 4>\"$1/from\"";
        let mut command = net.watcher.command("sh");
        command.args(["-c", script, BROWSER]).arg(dir);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let process = Kept::new(command.spawn().unwrap());
        // Opened for both, none of the two waits for the other.
        let open = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap()
        };
        let (to, read) = (open(&to), BufReader::new(open(&from)));
        let (sender, from) = channel();
        std::thread::spawn(move || {
            for message in read.split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice(&message) else {
                    return;
                };
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        Self {
            to,
            from,
            session: None,
            number: 0,
            said: Vec::new(),
            _process: process,
        }
    }

    /// Has it do something; what came of it.
    fn ask(&mut self, method: &str, parameters: Value) -> Value {
        self.number += 1;
        let mut message = json!({"id": self.number, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.to.write_all(&bytes).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = self.from.recv_timeout(left);
            let answer = answer.unwrap_or_else(|_| panic!("the browser does not answer {method}"));
            if answer["id"] == self.number {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.said.push(answer);
        }
    }

    fn open(&mut self, url: &str) {
        let target = self.ask("Target.createTarget", json!({"url": "about:blank"}));
        let target = target["targetId"].clone();
        let attached = self.ask(
            "Target.attachToTarget",
            json!({"targetId": target, "flatten": true}),
        );
        self.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Log.enable", "Runtime.enable", "Page.enable"] {
            self.ask(domain, json!({}));
        }
        self.ask("Page.navigate", json!({"url": url}));
    }

    fn value(&mut self, expression: &str) -> Value {
        let parameters = json!({"expression": expression, "returnByValue": true});
        self.ask("Runtime.evaluate", parameters)["result"]["value"].clone()
    }

    fn until(&mut self, expression: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.value(expression) != json!(true) {
            if Instant::now() > deadline {
                let text = self.value("document.body.innerText");
                panic!(
                    "never so: {expression}; the page: {text}; it said {:#?}",
                    self.said
                );
            }
            palanquin_lab::wait::pause(Duration::from_millis(200)).unwrap();
        }
    }

    /// What it complained about.
    fn complaints(&self) -> Vec<&Value> {
        let is_complaint = |said: &&Value| match said["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Log.entryAdded") => said["params"]["entry"]["level"] == "error",
            _ => false,
        };
        // Browsers ask for this by themselves.
        let is_icon = |said: &&Value| said.to_string().contains("favicon");
        self.said
            .iter()
            .filter(is_complaint)
            .filter(|said| !is_icon(said))
            .collect()
    }
}

/// How many pixels of a chart have about this colour.
const DRAWN: &str = "(id, red, green, blue) => {
    const canvas = document.querySelector(`#${id} canvas`);
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    let count = 0;
    for (let at = 0; at < data.length; at += 4) {
        const far = Math.abs(data[at] - red) + Math.abs(data[at + 1] - green) + Math.abs(data[at + 2] - blue);
        if (data[at + 3] > 60 && far < 30) count++;
    }
    return count;
}";
const BLUE: &str = "0x44, 0x88, 0xcc";
const GREEN: &str = "0x22, 0xaa, 0x77";
const AMBER: &str = "0xcc, 0x88, 0x00";
const RED: &str = "0xdd, 0x33, 0x33";

#[test]
fn the_page_draws_what_is_watched_with_losses_as_gaps_and_asks_nobody_else() {
    if !Path::new(BROWSER).exists() {
        eprintln!("SKIPPED: no {BROWSER}; `cargo xtask setup` installs it");
        return;
    }
    let (net, dir) = (net(3), tempfile::tempdir().unwrap());
    let mut text = format!(
        "listen = \"{PAGE}\"\ninterface = \"eth0\"\nstall = \"2s\"\ninterval = \"200ms\"\n"
    );
    for (name, last, role) in [("web", 2, "vm"), ("db", 3, "vm"), ("alpha", 4, "host")] {
        text += &format!(
            "[[target]]\nname = \"{name}\"\naddress = \"10.78.0.{last}\"\nrole = \"{role}\"\n"
        );
    }
    // The last is a host; the first gets the hardware address that is announced later.
    let text = text.replacen("role", &format!("mac = \"{MAC}\"\nrole"), 1);
    let config = config(dir.path(), &text);
    let mut watch = net.watcher.command(env!("CARGO_BIN_EXE_palanquin"));
    watch.args(["--json", "watch", "run"]).arg(&config);
    let mut watch = Kept::new(watch.stdout(Stdio::null()).spawn().unwrap());
    palanquin_lab::wait::until_true("the page is served", PATIENCE, || {
        let page = PAGE.to_owned();
        net.watcher
            .inside(move || Ok(std::net::TcpStream::connect(page).is_ok()))
    })
    .unwrap();
    let mut browser = Browser::start(&net, dir.path());
    browser.open(&format!("http://{PAGE}/"));
    browser.until("document.querySelectorAll('#targets tr').length === 3");
    browser.until("document.querySelectorAll('.chart canvas').length === 3");
    let drawn = |id: &str, colour: &str| format!("({DRAWN})('{id}', {colour})");
    // Round trips and clocks are drawn, and no loss where there is none.
    browser.until("state.data !== null && state.data.rtt.filter((ms) => ms > 0).length >= 8");
    browser.until(&format!("{} > 100", drawn("rtt", BLUE)));
    browser.until(&format!("{} > 100", drawn("offset", GREEN)));
    assert_eq!(browser.value(&drawn("rtt", RED)), json!(0));
    assert_eq!(browser.value(&drawn("offset", BLUE)), json!(0));
    let first = browser.value(
        "[...document.querySelectorAll('#targets tr td')].slice(0, 3).map((td) => td.textContent)",
    );
    assert_eq!(first, json!(["web", "vm", "calm"]));
    // It is silent as in a switchover, and what has come back announces itself.
    net.cut(true);
    palanquin_lab::wait::pause(Duration::from_millis(1500)).unwrap();
    net.cut(false);
    for _ in 0..5 {
        net.announce(MAC);
    }
    browser.until("state.data.lost.some((lost, at) => lost === 1 && state.data.rtt[at] === null)");
    browser.until(&format!("{} > 100", drawn("rtt", RED)));
    browser.until("state.data.rtt[state.data.rtt.length - 1] > 0");
    // Nobody ordered that: it is an alarm, in words, in colour and in the title.
    browser.until("document.querySelector('#targets .state').textContent === 'alarm'");
    browser.until("document.querySelector('#targets .state').className === 'state alarm' && document.title.startsWith('(1)')");
    browser.until("[...document.querySelectorAll('#events li')].some((li) => li.querySelector('b').textContent === 'web' && /migration.*nobody ordered it/.test(li.textContent) && li.querySelector('.alarm'))");
    // The other was silent as well, and is no alarm.
    assert_eq!(
        browser.value("document.querySelectorAll('#targets .state')[1].textContent"),
        json!("calm")
    );
    browser.until(&format!("{} > 20", drawn("likelihood", AMBER)));
    browser.until("Math.max(...state.data.likelihood) > 0.5");
    // The past of another target, as it is chosen.
    browser.value("document.querySelectorAll('#targets tr')[2].click()");
    browser.until("document.getElementById('chosen').textContent === 'alpha' && state.data !== null && state.data.lost.includes(1)");
    browser.value("document.querySelectorAll('#targets tr')[0].click()");
    let elsewhere = "performance.getEntriesByType('resource').filter((of) => !of.name.startsWith(location.origin)).length";
    assert_eq!(browser.value(elsewhere), json!(0));
    assert!(
        browser.complaints().is_empty(),
        "{:#?}",
        browser.complaints()
    );
    if let Some(to) = std::env::var_os("PALANQUIN_SCREENSHOT") {
        browser.until("state.data !== null");
        let shot = browser.ask("Page.captureScreenshot", json!({"format": "png"}));
        let text = dir.path().join("shot");
        fs::write(&text, shot["data"].as_str().unwrap()).unwrap();
        let mut decode = std::process::Command::new("base64");
        decode
            .arg("-d")
            .arg(&text)
            .stdout(File::create(to).unwrap());
        assert!(decode.status().unwrap().success());
    }
    // A script that somebody wrote into the page would not run.
    let attack = "(() => { const script = document.createElement('script'); script.textContent = 'window.attacked = 1'; document.body.append(script); return window.attacked === undefined; })()";
    assert_eq!(browser.value(attack), json!(true));
    browser.until("document.getElementById('link').textContent.startsWith('live')");
    let refused = browser.complaints();
    assert!(
        !refused.is_empty()
            && refused
                .iter()
                .all(|said| said.to_string().contains("Content Security Policy")),
        "{refused:#?}"
    );
    // Nobody takes what is old for what is.
    watch.kill();
    browser.until("document.getElementById('link').textContent.startsWith('not connected')");
}
