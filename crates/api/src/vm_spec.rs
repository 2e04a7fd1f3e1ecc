//! What a VM is made of, as an operator writes it (TOML) and as the control interface carries it.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};
use uuid::Uuid;

use crate::config::{LoadError, NAME_RULE, Rules, Violation, is_name};
use crate::size::ByteSize;

/// A VM to run with `palanquin vm run SPEC.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmSpec {
    /// Name, unique on a host: 1 to 64 of `a-z A-Z 0-9 . _ -`, starting with a letter or digit.
    pub name: String,
    /// Identity over all hosts, not the nil UUID; made up when absent.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// Guest RAM: one size, or 1 to 16 for as many NUMA nodes with a memory backend each. A size is 16 MiB to 8 TiB in
    /// whole MiB.
    pub memory: Memory,
    /// Virtual CPUs, 1 to 255. Default 1.
    #[serde(default = "one")]
    pub cpus: u16,
    /// How guest code runs. Default `auto`: KVM where `/dev/kvm` opens, else TCG.
    #[serde(default)]
    pub accel: Accel,
    /// QEMU machine type. Default `q35`.
    #[serde(default = "default_machine")]
    pub machine: String,
    /// QEMU CPU model. Default: QEMU's.
    #[serde(default)]
    pub cpu: Option<String>,
    /// Kernel to boot directly: an absolute path without commas and control characters.
    #[serde(default)]
    pub kernel: Option<String>,
    /// Initial RAM disk for `kernel`: as there.
    #[serde(default)]
    pub initrd: Option<String>,
    /// Command line for `kernel`: at most 2047 bytes without control characters.
    #[serde(default)]
    pub append: Option<String>,
    /// Disks, at most 16, on storage that both hosts see under the same path.
    #[serde(default, rename = "disk")]
    pub disks: Vec<Disk>,
    /// Network interfaces, at most 8.
    #[serde(default, rename = "network")]
    pub networks: Vec<Network>,
    /// Whether the first serial port is written to a file in the VM's directory. Default true.
    #[serde(default = "yes")]
    pub console: bool,
}

impl VmSpec {
    /// Reads and checks a specification.
    ///
    /// # Errors
    ///
    /// Where it is not TOML of this form, with line and column, or every rule that it breaks.
    pub fn from_toml(text: &str) -> Result<Self, LoadError> {
        let spec: Self = toml::from_str(text)?;
        let violations = spec.validate();
        if violations.is_empty() {
            Ok(spec)
        } else {
            Err(LoadError::Rules(violations))
        }
    }

    /// Every rule that it breaks. What reaches the hypervisor's command line holds nothing that could end one of its
    /// options and begin another.
    pub fn validate(&self) -> Vec<Violation> {
        let mut rules = Rules::default();
        let name = &self.name;
        rules.check(
            is_name(name),
            "name",
            format!("{name:?} is no name for a VM"),
            NAME_RULE,
        );
        let nil = self.uuid.is_some_and(|uuid| uuid.is_nil());
        rules.check(
            !nil,
            "uuid",
            "the nil UUID identifies nothing",
            "leave it out, and one is made up",
        );
        self.check_memory(&mut rules);
        let cpus = self.cpus;
        rules.check(
            (1..=255).contains(&cpus),
            "cpus",
            format!("{cpus} is out of bounds"),
            "1 to 255",
        );
        let machine = &self.machine;
        rules.check(
            is_word(machine),
            "machine",
            format!("{machine:?} is no machine type"),
            "letters, digits, `.`, `_` and `-`, as in q35",
        );
        if let Some(cpu) = &self.cpu {
            rules.check(
                is_cpu(cpu),
                "cpu",
                format!("{cpu:?} is no CPU model"),
                "a model and its features, as in Skylake-Server,+pcid",
            );
        }
        self.check_boot(&mut rules);
        self.check_disks(&mut rules);
        self.check_networks(&mut rules);
        rules.into_violations()
    }

    fn check_memory(&self, rules: &mut Rules) {
        let sizes = self.memory.sizes();
        rules.check(
            (1..=NODES_MAX).contains(&sizes.len()),
            "memory",
            format!("{} nodes are out of bounds", sizes.len()),
            "one size, or a list of 1 to 16",
        );
        for (index, size) in sizes.iter().enumerate() {
            let key = match &self.memory {
                Memory::One(_) => "memory".to_owned(),
                Memory::Nodes(_) => format!("memory[{index}]"),
            };
            let bytes = size.bytes();
            let fits = bytes.is_multiple_of(1 << 20) && (MEMORY_MIN..=MEMORY_MAX).contains(&bytes);
            let message = format!("{size} is out of bounds");
            rules.check(fits, key, message, "16MiB to 8TiB in whole MiB");
        }
    }

    fn check_boot(&self, rules: &mut Rules) {
        for (key, path) in [("kernel", &self.kernel), ("initrd", &self.initrd)] {
            if let Some(path) = path {
                check_path(rules, key, path);
            }
        }
        for (key, present) in [
            ("initrd", self.initrd.is_some()),
            ("append", self.append.is_some()),
        ] {
            rules.check(
                self.kernel.is_some() || !present,
                key,
                "there is no `kernel` to give it to",
                "name the kernel, or leave it out to boot from a disk",
            );
        }
        if let Some(append) = &self.append {
            rules.check(
                append.len() <= APPEND_MAX && !append.chars().any(char::is_control),
                "append",
                "it is no command line for a kernel",
                "at most 2047 bytes without control characters",
            );
        }
    }

    fn check_disks(&self, rules: &mut Rules) {
        let count = self.disks.len();
        let message = format!("{count} disks are too many");
        rules.check(count <= DISKS_MAX, "disk", message, "at most 16");
        for (index, disk) in self.disks.iter().enumerate() {
            check_path(rules, &format!("disk[{index}].path"), &disk.path);
            for (key, word, known) in [
                ("format", &disk.format, ["raw", "qcow2"]),
                ("interface", &disk.interface, ["virtio", "ide"]),
            ] {
                rules.check(
                    known.contains(&word.as_str()),
                    format!("disk[{index}].{key}"),
                    format!("{word:?} is not known"),
                    &known.join(" or "),
                );
            }
        }
    }

    fn check_networks(&self, rules: &mut Rules) {
        let count = self.networks.len();
        let message = format!("{count} interfaces are too many");
        rules.check(count <= NETWORKS_MAX, "network", message, "at most 8");
        for (index, network) in self.networks.iter().enumerate() {
            let (tap, mac) = (&network.tap, &network.mac);
            let (tap_key, mac_key) = (
                format!("network[{index}].tap"),
                format!("network[{index}].mac"),
            );
            rules.check(
                is_device(tap),
                tap_key.as_str(),
                format!("{tap:?} is no name of a network device"),
                "1 to 15 letters, digits, `.`, `_` or `-`, starting with a letter or digit",
            );
            rules.check(
                is_mac(mac),
                mac_key.as_str(),
                format!("{mac:?} is no hardware address of one interface"),
                "as in 52:54:00:12:34:56; the first octet is even",
            );
            let earlier = &self.networks[..index];
            rules.check(
                earlier.iter().all(|other| other.tap != *tap),
                tap_key,
                format!("{tap:?} is used twice"),
                "a tap device serves one interface",
            );
            rules.check(
                earlier
                    .iter()
                    .all(|other| !other.mac.eq_ignore_ascii_case(mac)),
                mac_key,
                format!("{mac:?} is used twice"),
                "each interface has its own",
            );
        }
    }
}

const NODES_MAX: usize = 16;
const MEMORY_MIN: u64 = 16 << 20;
const MEMORY_MAX: u64 = 8 << 40;
/// `COMMAND_LINE_SIZE` of Linux on x86 is 2048 with the final NUL (arch/x86/include/asm/setup.h).
const APPEND_MAX: usize = 2047;
const DISKS_MAX: usize = 16;
const NETWORKS_MAX: usize = 8;
/// `PATH_MAX` of Linux is 4096 with the final NUL (limits.h).
const PATH_MAX: usize = 4095;

fn check_path(rules: &mut Rules, key: &str, path: &str) {
    let fits = path.len() <= PATH_MAX
        && path.starts_with('/')
        && !path.contains(',')
        && !path.chars().any(char::is_control);
    rules.check(
        fits,
        key,
        format!("{path:?} is not usable"),
        "an absolute path without commas and control characters",
    );
}

fn is_word(word: &str) -> bool {
    let known = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    word.len() <= 64
        && word.starts_with(|c: char| c.is_ascii_alphanumeric())
        && word.bytes().all(known)
}

/// A model, then features: `+name`, `-name` or `name=value`.
fn is_cpu(cpu: &str) -> bool {
    let known = |b: u8| b.is_ascii_alphanumeric() || b"._-+=".contains(&b);
    let feature = |word: &str| !word.is_empty() && word.len() <= 64 && word.bytes().all(known);
    let mut words = cpu.split(',');
    cpu.len() <= 1024 && words.next().is_some_and(is_word) && words.all(feature)
}

/// `IFNAMSIZ` of Linux is 16 with the final NUL (netdevice(7)).
fn is_device(name: &str) -> bool {
    is_word(name) && name.len() <= 15
}

/// Six octets; the lowest bit of the first tells a group (IEEE 802, 8.2), and all zeros is nobody.
fn is_mac(mac: &str) -> bool {
    let octets: Vec<Option<u8>> = mac
        .split(':')
        .map(|octet| {
            let digits = octet.len() == 2 && octet.bytes().all(|b| b.is_ascii_hexdigit());
            digits.then(|| u8::from_str_radix(octet, 16).ok()).flatten()
        })
        .collect();
    let first_is_even = matches!(octets.first(), Some(Some(first)) if first & 1 == 0);
    octets.len() == 6
        && octets.iter().all(Option::is_some)
        && first_is_even
        && octets.iter().any(|octet| *octet != Some(0))
}

/// Guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Memory {
    /// One backend.
    One(ByteSize),
    /// One backend for each NUMA node.
    Nodes(Vec<ByteSize>),
}

// By hand, because an untagged enum would swallow what is wrong with a size.
impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Memory;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"1536MiB\", or a list of sizes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Memory, E> {
                text.parse().map(Memory::One).map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Memory, E> {
                Ok(Memory::One(ByteSize::new(bytes)))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Memory, E> {
                u64::try_from(bytes)
                    .map(|bytes| Memory::One(ByteSize::new(bytes)))
                    .map_err(|_| E::custom("a size is not negative"))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Memory, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = list.next_element()? {
                    sizes.push(size);
                }
                Ok(Memory::Nodes(sizes))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl Memory {
    /// The backends' sizes in order.
    pub fn sizes(&self) -> &[ByteSize] {
        match self {
            Self::One(size) => std::slice::from_ref(size),
            Self::Nodes(sizes) => sizes,
        }
    }

    /// Sum of all backends, in bytes; saturates.
    pub fn total_bytes(&self) -> u64 {
        self.sizes()
            .iter()
            .fold(0_u64, |sum, size| sum.saturating_add(size.bytes()))
    }
}

/// How guest code runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// KVM where `/dev/kvm` opens, else TCG.
    #[default]
    Auto,
    /// Linux's KVM.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// A disk image on storage both hosts see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Disk {
    /// Absolute path of the image, without commas and control characters.
    pub path: String,
    /// `raw` or `qcow2`. Default `raw`.
    #[serde(default = "raw")]
    pub format: String,
    /// `virtio` or `ide`. Default `virtio`.
    #[serde(default = "virtio")]
    pub interface: String,
    /// Writes go to a temporary file and are lost at the end (QEMU's `snapshot=on`). Default false.
    #[serde(default)]
    pub ephemeral: bool,
}

/// A network interface on a tap device that exists under the same name on both hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Network {
    /// Name of the tap device: 1 to 15 letters, digits, `.`, `_` or `-`.
    pub tap: String,
    /// Hardware address of one interface, for example `52:54:00:12:34:56`.
    pub mac: String,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

fn default_machine() -> String {
    "q35".to_owned()
}

fn raw() -> String {
    "raw".to_owned()
}

fn virtio() -> String {
    "virtio".to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "name = \"web\"\nmemory = [\"1GiB\", \"512MiB\"]\n";

    #[test]
    fn a_short_specification_has_sensible_defaults() {
        let spec = VmSpec::from_toml(GOOD).unwrap();
        assert_eq!(
            (spec.cpus, spec.machine.as_str(), spec.console),
            (1, "q35", true)
        );
        assert_eq!(spec.memory.total_bytes(), 1536 << 20);
    }

    fn keys(text: &str) -> Vec<String> {
        match VmSpec::from_toml(text) {
            Err(LoadError::Rules(found)) => found.into_iter().map(|found| found.key).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_violations_are_named_at_once() {
        let text = "name = \"../x\"\nmemory = [\"1MiB\", \"32MiB\", 16777217]\ncpus = 0\nmachine = \"q35,x=y\"\n\
                    uuid = \"00000000-0000-0000-0000-000000000000\"\ncpu = \"host,\"\n\
                    initrd = \"relative\"\nappend = \"a\\nb\"\n\
                    [[network]]\ntap = \"tap0,script=/x\"\nmac = \"zz\"\n\
                    [[disk]]\npath = \"/a,b\"\n[[disk]]\npath = \"/a\"\nformat = \"vmdk\"\ninterface = \"scsi\"\n";
        assert_eq!(
            keys(text),
            [
                "name",
                "uuid",
                "memory[0]",
                "memory[2]",
                "cpus",
                "machine",
                "cpu",
                "initrd",
                "initrd",
                "append",
                "append",
                "disk[0].path",
                "disk[1].format",
                "disk[1].interface",
                "network[0].tap",
                "network[0].mac"
            ]
        );
    }

    #[test]
    fn bounds_are_included_and_what_lies_beyond_is_refused() {
        let with = |memory: &str| format!("name = \"web\"\nmemory = {memory}\n");
        for good in ["\"16MiB\"", "\"8TiB\"", "[\"16MiB\"]", "16777216"] {
            VmSpec::from_toml(&with(good)).unwrap();
        }
        for odd in ["\"15MiB\"", "\"8193GiB\"", "0", "16777217"] {
            assert_eq!(keys(&with(odd)), ["memory"], "{odd}");
        }
        assert_eq!(keys(&with("[]")), ["memory"]);
        let sixteen = format!("[{}]", "\"16MiB\",".repeat(16));
        VmSpec::from_toml(&with(&sixteen)).unwrap();
        let seventeen = format!("[{}]", "\"16MiB\",".repeat(17));
        assert_eq!(keys(&with(&seventeen)), ["memory"]);
        let long = format!("{GOOD}kernel = \"/k\"\nappend = \"{}\"\n", "x".repeat(2048));
        assert_eq!(keys(&long), ["append"]);
    }

    #[test]
    fn nothing_on_the_command_line_can_begin_another_option() {
        for value in [
            "/a,b",
            "/a\\nb",
            "/a\\u0000b",
            "relative",
            "-x",
            "",
            "/a\\u007f",
        ] {
            let text = format!("{GOOD}kernel = \"{value}\"\n");
            assert_eq!(keys(&text), ["kernel"], "{value}");
            let text = format!("{GOOD}[[disk]]\npath = \"{value}\"\n");
            assert_eq!(keys(&text), ["disk[0].path"], "{value}");
        }
        for value in ["", "-x", "q35,accel=kvm", "q35 x", "q\\n"] {
            let text = format!("{GOOD}machine = \"{value}\"\n");
            assert_eq!(keys(&text), ["machine"], "{value}");
        }
    }

    #[test]
    fn hardware_addresses_and_devices_are_those_of_one_interface() {
        for good in [
            "52:54:00:12:34:56",
            "AA:bb:cc:dd:ee:ff",
            "00:00:00:00:00:01",
        ] {
            assert!(is_mac(good), "{good}");
        }
        for odd in [
            "",
            "00:00:00:00:00:00",
            "53:54:00:12:34:56",
            "ff:ff:ff:ff:ff:ff",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52-54-00-12-34-56",
            "52:54:00:12:34:+6",
        ] {
            assert!(!is_mac(odd), "{odd}");
        }
        for odd in ["", ".", "..", "a/b", "a b", "0123456789abcdef", "-a"] {
            assert!(!is_device(odd), "{odd}");
        }
        let twice = "[[network]]\ntap = \"t\"\nmac = \"52:54:00:12:34:5a\"\n\
                     [[network]]\ntap = \"t\"\nmac = \"52:54:00:12:34:5A\"\n";
        assert_eq!(
            keys(&format!("{GOOD}{twice}")),
            ["network[1].tap", "network[1].mac"]
        );
    }

    #[test]
    fn a_size_that_cannot_be_read_is_explained_with_its_place() {
        for memory in ["\"1.5GiB\"", "[\"1GiB\", \"1.5GiB\"]"] {
            let error = VmSpec::from_toml(&format!("name = \"web\"\nmemory = {memory}\n"))
                .unwrap_err()
                .to_string();
            let explained = error.contains("`1.5GiB` is not a size") && error.contains("line 2");
            assert!(explained, "{error}");
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_their_place() {
        let error = VmSpec::from_toml(&format!("{GOOD}memroy = 1\n"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("memroy") && error.contains("line 3"),
            "{error}"
        );
    }

    fn specs() -> impl Strategy<Value = VmSpec> {
        let size = || (16_u64..=8 << 20).prop_map(ByteSize::mib);
        let memory = prop_oneof![
            size().prop_map(Memory::One),
            prop::collection::vec(size(), 1..=16).prop_map(Memory::Nodes),
        ];
        let disk = ("/[a-z/ .]{1,20}", prop::bool::ANY, prop::bool::ANY);
        let disks = disk.prop_map(|(path, qcow2, ephemeral)| Disk {
            path,
            format: if qcow2 { "qcow2" } else { "raw" }.to_owned(),
            interface: "virtio".to_owned(),
            ephemeral,
        });
        let accel = prop_oneof![Just(Accel::Auto), Just(Accel::Kvm), Just(Accel::Tcg)];
        (
            "[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}",
            prop::option::of((1_u128..).prop_map(Uuid::from_u128)),
            memory,
            1_u16..=255,
            accel,
            prop::option::of(("/[a-z]{1,9}", "[ -~]{0,40}")),
            prop::collection::vec(disks, 0..3),
            prop::bool::ANY,
        )
            .prop_map(
                |(name, uuid, memory, cpus, accel, kernel, disks, console)| VmSpec {
                    name,
                    uuid,
                    memory,
                    cpus,
                    accel,
                    machine: "q35".to_owned(),
                    cpu: None,
                    kernel: kernel.as_ref().map(|(kernel, _)| kernel.clone()),
                    initrd: None,
                    append: kernel.map(|(_, append)| append),
                    disks,
                    networks: vec![Network {
                        tap: "tap0".to_owned(),
                        mac: "52:54:00:12:34:56".to_owned(),
                    }],
                    console,
                },
            )
    }

    proptest! {
        #[test]
        fn a_specification_is_read_back_as_written(spec in specs()) {
            let text = toml::to_string(&spec).unwrap();
            prop_assert_eq!(&VmSpec::from_toml(&text).unwrap(), &spec);
            let json = serde_json::to_string(&spec).unwrap();
            prop_assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
        }

        #[test]
        fn arbitrary_text_is_answered_and_never_panics(text in "(?s).{0,200}") {
            let _ = VmSpec::from_toml(&text);
            let _ = VmSpec::from_toml(&format!("{GOOD}{text}"));
        }

        #[test]
        fn no_value_that_passes_holds_a_comma_or_control_character(text in "(?s).{0,12}") {
            let mut spec = VmSpec::from_toml(GOOD).unwrap();
            spec.machine = text.clone();
            spec.kernel = Some(format!("/{text}"));
            spec.networks = vec![Network { tap: text.clone(), mac: text.clone() }];
            let odd = text.contains(',') || text.chars().any(char::is_control);
            let kernel_passes = !spec.validate().iter().any(|found| found.key == "kernel");
            prop_assert_eq!(kernel_passes, !odd);
            prop_assert!(!odd || spec.validate().len() >= 4);
        }
    }
}
