//! What operators write: specifications, configurations, sizes, and the bodies of the control interface.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use palanquin_api::advertisement::{
    AcceptAdvertisement, Advertisements, MadeAdvertisement, MakeAdvertisement, PardonHost,
};
use palanquin_api::config::{AgentConfig, is_host_name, is_name};
use palanquin_api::control::{
    AbortAnswer, AdoptVm, ApiError, DoctorReport, DoctorRequest, HostInfo, MigrationInfo,
    ResolveMigration, RunVm, StartMigration, VmInfo,
};
use palanquin_api::size::{Bandwidth, ByteSize, HumanDuration};
use palanquin_api::vm_spec::VmSpec;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{seeds_of, within, words_of};
use crate::entry::Target;

/// Specifications of VMs (TOML).
pub(crate) const VM_SPEC: Target = Target::new("vm-spec", vm_spec, || {
    let deep = format!("name = {}", "[".repeat(2000));
    seeds_of(&[
        include_str!("../../../examples/web.toml"),
        "name = \"a\"\nmemory = [\"16MiB\", \"1GiB\"]\n",
        "name = \"a\"\nmemory = \"64MiB\"\nkernel = \"/k\"\nappend = \"x,y\"\n[[disk]]\npath = \"/d\"\nformat = \"qcow2\"\n",
        "name = \"a,b\"\nmemory = \"64MiB\"\n[[disk]]\npath = \"/d,readonly=off\"\n[[network]]\ntap = \"t,script=/x\"\n",
        "name = \"a\"\nname = \"b\"\nmemory = 18446744073709551615\n",
        "\u{feff}name = \"a\"\nmemory = \"99999999999999999999TiB\"\n",
        "name = \"\\u0000\"\nmemory = nan\ncpus = 1e999\n",
        &deep,
    ])
})
.words(|| {
    words_of(&[
        "name = ", "memory = ", "cpus = ", "accel = ", "machine = ", "cpu = ", "kernel = ", "initrd = ", "append = ",
        "[[disk]]\n", "[[network]]\n", "path = ", "format = ", "interface = ", "ephemeral = ", "tap = ", "mac = ", "uuid = ",
        "console = ", "64MiB", "\"raw\"", "\"qcow2\"", "52:54:00:00:00:01", "\\u0000", ",", "true",
    ])
});

/// Configurations of agents (TOML).
pub(crate) const CONFIG: Target = Target::new("config", config, || {
    seeds_of(&[
        include_str!("../../../examples/agent-alpha.toml"),
        include_str!("../../../examples/agent-beta.toml"),
        "name = \"a\"\n[tls]\nca = \"/c\"\ncertificate = \"/d\"\nkey = \"/k\"\n[hosts.b]\naddress = \"[::1]:0\"\n",
        "name = \"a\"\n[tls]\nca = \"c\"\ncertificate = \"\"\nkey = \"/../k\"\n[hosts.\"../b\"]\naddress = \"0.0.0.0:1\"\n",
        "[limits]\nmax-inbound = -1\n",
    ])
})
.words(|| {
    words_of(&[
        "name = ", "state-dir = ", "runtime-dir = ", "[tls]\n", "ca = ", "certificate = ", "key = ", "[listen]\n",
        "migration = ", "[hosts.", "address = ", "[qemu]\n", "binary = ", "allowed-paths = ", "[limits]\n", "max-inbound = ",
        "192.0.2.2:7810", "[::]:7810",
    ])
});

/// Sizes, rates and durations.
pub(crate) const SIZES: Target = Target::new("sizes", sizes, || {
    seeds_of(&[
        "1536MiB",
        "18446744073709551615",
        "18446744073709551616",
        "16777216TiB",
        "0B",
        " 1 GiB ",
        "10gbit",
        "1GB/s",
        "8Mb/s",
        "300ms",
        "10min",
        "1y 2months 3days 4h 5m 6s 7ms 8us 9ns",
        "584942417355y",
        "1e9s",
        "-1s",
        "\u{664}MiB",
    ])
})
.words(|| {
    words_of(&[
        "KiB",
        "MiB",
        "GiB",
        "TiB",
        "kbit",
        "gbit/s",
        "MiB/s",
        "MB/s",
        "ms",
        "min",
        "months",
        "18446744073709551615",
    ])
});

/// JSON on the control socket, in both directions: the first byte chooses what it should be.
pub(crate) const BODIES: Target = Target::new("bodies", bodies, || {
    let bodies = [
        r#"{"vm":"web","to":"b"}"#,
        r#"{"vm":"web","to":"b","max-downtime":"300ms","deadline":"10min","strategy":"auto","compress":"zstd"}"#,
        r#"{"spec":{"name":"a","memory":"64MiB"}}"#,
        r#"{"name":"a","pid":1,"qmp":"/x"}"#,
        r#"{"assert":"destination-lost-it"}"#,
        r#"{"kind":"refused","message":"no"}"#,
        r#"{"to":"b","to":"c","vm":1e999}"#,
        "{}",
        "\u{feff}{}",
    ];
    let deep = "[".repeat(4000);
    let all = bodies.iter().copied().chain([deep.as_str()]);
    let seeds = all.enumerate().flat_map(|(number, body)| {
        (0..12_u8).filter(move |kind| usize::from(*kind) == number || number < 2).map(move |kind| [&[kind], body.as_bytes()].concat())
    });
    seeds.collect()
})
.words(|| {
    words_of(&[
        "\"vm\":", "\"to\":", "\"spec\":", "\"name\":", "\"memory\":", "\"pid\":", "\"qmp\":", "\"kind\":", "\"message\":",
        "\"assert\":", "\"strategy\":", "\"compress\":", "\"id\":", "\"state\":", "\"for\":", "\"lifetime_s\":",
        "\"memory_bytes\":", "\"parcel\":", "\"host\":", "null", "true", "[]", "{}",
    ])
});

/// What was read is the same when it is written and read again.
fn again<T: DeserializeOwned + Serialize + PartialEq + Debug>(data: &[u8]) -> Option<T> {
    let value: T = within(data.len() * 64 + (64 << 10), || {
        serde_json::from_slice(data)
    })
    .ok()?;
    let text = serde_json::to_vec(&value).expect("what was read can be written");
    let read: T = serde_json::from_slice(&text).expect("what was written can be read");
    assert_eq!(read, value);
    Some(value)
}

fn bodies(data: &[u8]) {
    let Some((&kind, json)) = data.split_first() else {
        return;
    };
    match kind % 16 {
        0 => drop(again::<StartMigration>(json)),
        1 => {
            if let Some(RunVm { spec, .. }) = again::<RunVm>(json) {
                checked(&spec);
            }
        }
        2 => drop(again::<AdoptVm>(json)),
        3 => drop(again::<ResolveMigration>(json)),
        4 => drop(again::<DoctorRequest>(json)),
        // Answers, as the command line reads them.
        5 => drop(again::<ApiError>(json)),
        6 => drop(again::<MigrationInfo>(json)),
        7 => drop(again::<VmInfo>(json)),
        8 => drop(again::<HostInfo>(json)),
        9 => drop(again::<DoctorReport>(json)),
        10 => drop(again::<AbortAnswer>(json)),
        11 => drop(again::<MakeAdvertisement>(json)),
        12 => drop(again::<AcceptAdvertisement>(json)),
        13 => drop(again::<PardonHost>(json)),
        14 => drop(again::<MadeAdvertisement>(json)),
        _ => drop(again::<Advertisements>(json)),
    }
}

/// What reaches QEMU's command line from a specification without violations cannot end one option and begin another.
fn checked(spec: &VmSpec) {
    for violation in spec.validate() {
        assert!(!violation.key.is_empty() && !violation.message.is_empty());
    }
    if !spec.validate().is_empty() {
        return;
    }
    assert!(is_name(&spec.name));
    let paths = [&spec.kernel, &spec.initrd]
        .into_iter()
        .flatten()
        .chain(spec.disks.iter().map(|disk| &disk.path));
    for path in paths {
        assert!(
            path.starts_with('/') && !path.contains(|c: char| c == ',' || c.is_control()),
            "{path:?}"
        );
    }
    for disk in &spec.disks {
        assert!(disk.format == "raw" || disk.format == "qcow2", "{disk:?}");
    }
    for network in &spec.networks {
        assert!(
            !network
                .tap
                .contains(|c: char| c == ',' || c == '/' || c.is_control() || c.is_whitespace())
        );
        assert!(!network.mac.contains(','));
    }
    assert!(!spec.machine.contains([',', ' ', '/', '\n']) && !spec.machine.is_empty());
    let append = spec.append.as_deref().unwrap_or_default();
    assert!(!append.contains(|c: char| c.is_control()));
    assert!(
        spec.memory
            .sizes()
            .iter()
            .all(|size| size.bytes() > 0 && size.bytes().is_multiple_of(1 << 20))
    );
}

fn vm_spec(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match VmSpec::from_toml(text) {
        Ok(spec) => {
            checked(&spec);
            let json = serde_json::to_vec(&spec).expect("text");
            assert_eq!(again::<VmSpec>(&json), Some(spec));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match AgentConfig::from_toml(text) {
        Ok(config) => {
            assert!(
                is_host_name(&config.name) && config.hosts.keys().all(|name| is_host_name(name))
            );
            let directories = [&config.state_dir, &config.runtime_dir];
            assert!(
                directories
                    .iter()
                    .all(|dir| dir.is_absolute() && dir.as_os_str().len() <= 90)
            );
            assert!(
                config
                    .qemu
                    .allowed_paths
                    .iter()
                    .all(|path| path.is_absolute())
            );
            assert!(config.listen.migration.port() != 0);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// What was read is the same when it is written and read again.
fn shown_again<T: FromStr + Display + PartialEq + Debug>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let shown = value.to_string();
        match shown.parse::<T>() {
            Ok(read) => assert_eq!(read, value, "{text:?} is shown as {shown:?}"),
            Err(_) => panic!("{text:?} is shown as {shown:?}, which cannot be read"),
        }
    }
}

fn sizes(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        shown_again::<ByteSize>(text);
        shown_again::<HumanDuration>(text);
        // A rate is never shown.
        if let Ok(rate) = text.parse::<Bandwidth>() {
            assert!(rate.bytes_per_s() > 0);
        }
    }
}
