//! Command lines of QEMU: those that arrive from another host, and those of a VM that was started by somebody else.
//!
//! What may arrive is stated here a second time, and differently: the judge says which arguments are known to be
//! harmless, this says what no argument that it accepted may do.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use palanquin_agent::destination_session::{descriptor_of, wire_blocker};
use palanquin_engine::message::Offer;
use palanquin_host::fuzzing::{VM_DIR, behind_image, judge_arguments, portable_arguments};
use palanquin_host::vm::{Descriptor, Region};

use super::message::offer_sample;
use super::{seeds_of, words_of};
use crate::entry::Target;

/// A line for each argument, `DIR` in it being a directory of allowed files.
pub(crate) const ARRIVING_VM: Target =
    Target::new("arriving-vm", arriving, || seeds_of(&ARRIVING)).words(words);

/// The description of a VM as it crosses the wire.
pub(crate) const DESCRIPTOR: Target = Target::new("descriptor", descriptor, || {
    let good = r#"{"hypervisor":"qemu","version":"7.2.0","machine":"q35","arguments":["-m","64M"],
        "regions":[{"name":"r","size_bytes":2457600},{"name":"s","size_bytes":12288}],"cpu_features":[["eax",7]]}"#;
    let deep = "[".repeat(5000);
    let huge = good.replace("2457600", "18446744073709551616");
    let twice = good.replace("\"version\"", "\"machine\":\"x\",\"version\"");
    seeds_of(&[
        good,
        &deep,
        &huge,
        &twice,
        "",
        "{}",
        "\u{feff}{}",
        "{\"hypervisor\":1e999}",
        "{\"hypervisor\":NaN}",
    ])
});

/// Headers of disk images.
pub(crate) const IMAGE: Target = Target::new("qcow2", image, || {
    vec![
        qcow2("", &[]),
        qcow2("base.img", &[(0xe279_2aca, "raw")]),
        qcow2("/etc/shadow", &[(7, "x"), (0xe279_2aca, "qcow2")]),
        qcow2("json:{}", &[(0xe279_2aca, "raw")]),
        qcow2("a", &[(0xe279_2aca, "raw"), (0xe279_2aca, "raw")]),
        qcow2("a", &[(1, "x"); 40]),
        b"QFI\xfb\0\0\0\x02".to_vec(),
        vec![],
    ]
});

/// A line for each argument of a running QEMU.
pub(crate) const ADOPTED_VM: Target =
    Target::new("adopted-vm", adopted, || seeds_of(&ADOPTED)).words(words);

const ARRIVING: [&str; 12] = [
    "-name\nweb,debug-threads=on\n-uuid\n1-2\n-accel\nkvm\n-m\n64M\n-smp\n2,maxcpus=4\n-cpu\nhost,+x",
    "-object\nmemory-backend-memfd,id=ram0,size=64M,share=on\n-machine\nq35,memory-backend=ram0",
    "-numa\nnode,nodeid=0,memdev=ram0\n-rtc\nbase=utc\n-boot\norder=c,menu=on\n-k\nde",
    "-kernel\nDIR/file\n-initrd\nDIR/file\n-append\nconsole=ttyS0 root=/dev/vda",
    "-drive\nif=none,id=d,file=DIR/file,format=raw\n-device\nvirtio-blk-pci,drive=d",
    "-drive\nif=none,id=d,file=DIR/image,format=qcow2\n-device\nide-hd,drive=d",
    "-drive\nif=none,id=d,file=DIR/link,format=raw\n-kernel\nDIR/../x\n-bios\n/etc/passwd",
    "-netdev\ntap,id=n,ifname=t0,script=no,downscript=no\n-device\nvirtio-net-pci,netdev=n,mac=52:54:00:00:00:01",
    "-netdev\nuser,id=n,restrict=on\n-object\nrng-random,id=r,filename=/dev/urandom\n-device\nvirtio-rng-pci,rng=r",
    "-chardev\nfile,id=c,path=@VM_DIR@/console.log,append=on\n-serial\nchardev:c\n-serial\nfile:@VM_DIR@/s.log",
    "-global\nICH9-LPC.disable_s3=1\n-smbios\ntype=1,serial=x\n-display\nnone\n-vga\nstd\n-nodefaults\n-no-reboot",
    "-qmp\nunix:/x,server=on\n-incoming\nexec:id\n-chardev\nsocket,id=c,path=/x\n-mon\nchardev=c\n--gdb\ntcp::1",
];

const ADOPTED: [&str; 6] = [
    "-machine\nq35,memory-backend=ram\n-m\n64\n-nodefaults\n-S\n-daemonize\n--qmp\nunix:/run/x,server=on",
    "-chardev\nsocket,id=mon0,path=/x\n-mon\nchardev=mon0,mode=control\n-pidfile\n/p\n-incoming\ndefer",
    "-serial\nfile:/var/log/x\n-serial\nmon:stdio\n-display\ngtk\n-M\ntype=pc\n-nographic",
    "-object\nmemory-backend-memfd,id=ram,size=64M,share=on,prealloc=on,host-nodes.0=1,policy=bind",
    "-chardev\nfile,id=log,path=/vm/x\n-chardev\nstdio,id=both,mux=on\n-mon\nchardev=both\n-serial\nchardev:both",
    "-name\nweb",
];

/// Options and keys of QEMU.
fn words() -> Vec<String> {
    words_of(&[
        "-object\n",
        "-device\n",
        "-drive\n",
        "-chardev\n",
        "-netdev\n",
        "-machine\n",
        "-M\n",
        "-serial\n",
        "-monitor\n",
        "-qmp\n",
        "-mon\n",
        "-kernel\n",
        "-initrd\n",
        "-bios\n",
        "-append\n",
        "-name\n",
        "-smbios\n",
        "-global\n",
        "-accel\n",
        "-smp\n",
        "-numa\n",
        "-boot\n",
        "-add-fd\n",
        "-fw_cfg\n",
        "-readconfig\n",
        "-plugin\n",
        "-net\n",
        "-nic\n",
        "-vnc\n",
        "-spice\n",
        "-incoming\n",
        "-blockdev\n",
        "-virtfs\n",
        "-fsdev\n",
        "-tpmdev\n",
        "-L\n",
        "-sandbox\n",
        "-snapshot\n",
        "-nographic\n",
        "-S\n",
        "-daemonize\n",
        "-enable-kvm\n",
        "--",
        "DIR/file",
        "DIR/image",
        "DIR/link",
        "DIR/sub",
        "@VM_DIR@",
        "@VM_DIR@/",
        ".log",
        "/../",
        "../",
        ",id=",
        ",size=",
        ",share=on",
        ",path=",
        ",file=",
        ",filename=",
        ",format=raw",
        ",format=qcow2",
        ",script=no",
        ",downscript=no",
        ",ifname=",
        ",fd=",
        "memory-backend-memfd",
        "memory-backend-file",
        "mem-path=",
        "qom-type=",
        "driver=",
        "backend=",
        "type=",
        "chardev=",
        "chardev:",
        "file:",
        "unix:",
        "tcp:",
        "udp:",
        "pipe:",
        "exec:",
        "json:",
        "nbd:",
        "fat:",
        ",,",
        "virtio-net-pci",
        "tap",
        "user",
        "socket",
        "null",
        "ringbuf",
        "rng-random",
        "secret",
        "raw",
        "1T",
        "64M",
    ])
}

/// A directory with a file, an image with a file behind it, a directory, and a link that leads out of it.
fn allowed_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("palanquin-fuzz-{}", std::process::id()));
        fs::create_dir_all(dir.join("sub")).expect("a directory for files");
        fs::write(dir.join("file"), b"x").expect("a file");
        fs::write(dir.join("image"), qcow2("file", &[(0xe279_2aca, "raw")])).expect("an image");
        // One left by a process of the same number leads to the same place.
        let _ = symlink("/etc/passwd", dir.join("link"));
        dir
    })
}

/// A header of version 3 with a file behind it, and these extensions.
fn qcow2(name: &str, extensions: &[(u32, &str)]) -> Vec<u8> {
    let mut bytes = vec![0; 104];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    bytes[7] = 3;
    bytes[103] = 104;
    for (kind, text) in extensions {
        bytes.extend(kind.to_be_bytes());
        bytes.extend((text.len() as u32).to_be_bytes());
        bytes.extend(text.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend([0; 8]);
    if !name.is_empty() {
        let at = bytes.len() as u64;
        bytes[8..16].copy_from_slice(&at.to_be_bytes());
        bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        bytes.extend(name.as_bytes());
    }
    bytes
}

/// The value of a key, as QEMU would find it.
fn key<'a>(value: &'a str, wanted: &str) -> Option<&'a str> {
    value
        .split(',')
        .find_map(|pair| pair.strip_prefix(wanted)?.strip_prefix('='))
}

fn bytes_of(size: &str) -> Option<u64> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match size[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn arriving(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let dir = allowed_dir();
    let text = text.replace("DIR", dir.to_str().expect("a name that we made"));
    let arguments: Vec<String> = text.split('\n').map(str::to_owned).collect();
    // The memory that goes with the arguments, so that they are not refused for that.
    let regions = arguments
        .iter()
        .filter(|arg| arg.contains("memory-backend-"))
        .filter_map(|arg| {
            Some(Region {
                name: key(arg, "id")?.to_owned(),
                size_bytes: bytes_of(key(arg, "size")?)?,
            })
        });
    let descriptor = Descriptor {
        hypervisor: "qemu".to_owned(),
        version: "7.2.0".to_owned(),
        machine: "q35".to_owned(),
        regions: regions.collect(),
        arguments,
        cpu_features: Vec::new(),
    };
    let refused = judge_arguments(&descriptor, &[dir.to_owned()]);
    if refused.is_empty() {
        harmless(&descriptor, dir);
    } else {
        for obstacle in refused {
            assert!(!obstacle.message.contains('\n'));
            assert!(
                wire_blocker(&obstacle).message.len() <= 2048,
                "more than may cross the wire"
            );
        }
    }
}

/// What every accepted command line must be like.
fn harmless(descriptor: &Descriptor, dir: &Path) {
    const FLAGS: [&str; 9] = [
        "-nodefaults",
        "-no-reboot",
        "-no-shutdown",
        "-no-user-config",
        "-no-hpet",
        "-no-acpi",
        "-enable-kvm",
        "-usb",
        "-snapshot",
    ];
    const FOR_THE_GUEST: [&str; 2] = ["-append", "-name"];
    let mut rest = descriptor.arguments.iter().map(String::as_str);
    let mut memory = 0;
    while let Some(option) = rest.next() {
        if FLAGS.contains(&option) {
            continue;
        }
        let Some(value) = rest.next() else {
            panic!("{option} has no value");
        };
        assert!(option.starts_with('-') && !value.contains(|c: char| c.is_control()));
        // Options that run programs, read files or open sockets whatever their value.
        for bad in [
            "-qmp",
            "-mon",
            "-incoming",
            "-gdb",
            "-vnc",
            "-spice",
            "-readconfig",
            "-writeconfig",
            "-plugin",
            "-add-fd",
            "-fw_cfg",
            "-virtfs",
            "-fsdev",
            "-tpmdev",
            "-L",
            "-pidfile",
            "-D",
            "-trace",
            "-loadvm",
            "-blockdev",
            "-hda",
            "-cdrom",
            "-pflash",
            "-dtb",
            "-acpitable",
            "-runas",
            "-chroot",
            "-set",
            "-semihosting-config",
            "-sandbox",
            "-mem-path",
            "-option-rom",
            "-shim",
            "-audio",
            "-audiodev",
            "-M",
            "-usbdevice",
            "-qtest",
            "-run-with",
        ] {
            assert_ne!(
                option.trim_start_matches('-'),
                bad.trim_start_matches('-'),
                "{option}"
            );
        }
        if FOR_THE_GUEST.contains(&option) {
            continue;
        }
        // JSON says in another way what is judged here.
        assert!(!value.starts_with('{'), "{option} {value}");
        let keys = value.split(',').filter_map(|pair| pair.split_once('='));
        for (name, of) in keys.clone() {
            // Of plain words and numbers the last may count.
            let times = keys.clone().filter(|(other, _)| *other == name).count();
            let plain = [
                "-watchdog-action",
                "-numa",
                "-cpu",
                "-smp",
                "-m",
                "-rtc",
                "-uuid",
                "-k",
                "-action",
            ]
            .contains(&option);
            assert!(times == 1 || plain, "{option} {value}: QEMU takes the last");
            let taken_from_the_host = match option {
                "-netdev" => matches!(
                    name,
                    "fd" | "fds"
                        | "vhostfd"
                        | "vhostfds"
                        | "helper"
                        | "br"
                        | "hostfwd"
                        | "guestfwd"
                        | "smb"
                        | "tftp"
                        | "bootfile"
                        | "listen"
                        | "connect"
                        | "path"
                ),
                "-device" | "-object" => matches!(
                    name,
                    "fd" | "fds"
                        | "vhostfd"
                        | "vhostfds"
                        | "mem-path"
                        | "romfile"
                        | "sysfsdev"
                        | "socket"
                        | "path"
                        | "host"
                        | "exec"
                        | "file"
                ),
                "-chardev" => matches!(name, "fd" | "host" | "port" | "server" | "input-path"),
                "-machine" => matches!(name, "kernel" | "initrd" | "dtb" | "firmware" | "dumpdtb"),
                "-boot" => name == "splash",
                "-accel" => name == "device",
                _ => false,
            };
            assert!(!taken_from_the_host, "{option} {value}");
            if option == "-netdev" && matches!(name, "script" | "downscript") {
                assert_eq!(of, "no", "{value}");
            }
        }
        // Only what is judged as a file of the host names one.
        let paths = value.split(',').filter(|part| part.contains('/'));
        for part in paths {
            let (name, path) = part.split_once('=').unwrap_or(("", part));
            let path = path
                .strip_prefix("file:")
                .filter(|_| option == "-serial")
                .unwrap_or(path);
            if let Some(log) = path.strip_prefix(VM_DIR) {
                let log = log.strip_prefix('/').expect("a file of the directory");
                assert!(
                    matches!((option, name), ("-chardev", "path") | ("-serial", "")),
                    "{option} {value}"
                );
                assert!(
                    !log.contains('/')
                        && !log.starts_with('.')
                        && log.ends_with(".log")
                        && log != "qemu.log"
                );
                continue;
            }
            if (option, name) == ("-object", "filename") {
                assert!(path == "/dev/urandom" || path == "/dev/random");
                continue;
            }
            if (option, name) == ("-netdev", "net") {
                assert!(
                    path.bytes()
                        .all(|b| b.is_ascii_hexdigit() || b".:/".contains(&b))
                );
                continue;
            }
            let judged = matches!((option, name), ("-drive", "file"))
                || matches!(option, "-kernel" | "-initrd" | "-bios");
            assert!(judged, "{option} {value}");
            let path = if option == "-drive" { path } else { value };
            let real = fs::canonicalize(path).expect("an accepted file is there");
            let dir = fs::canonicalize(dir).expect("our directory");
            assert!(real.starts_with(&dir) && real.is_file(), "{option} {value}");
        }
        match option {
            "-object" => {
                let kind = key(value, "qom-type").or(value.split(',').next());
                memory += usize::from(kind.is_some_and(|kind| kind.starts_with("memory-backend-")));
            }
            "-drive" => {
                assert!(
                    key(value, "file").is_none()
                        || matches!(key(value, "format"), Some("raw" | "qcow2"))
                );
            }
            "-chardev" => {
                let kind = value
                    .split(',')
                    .next()
                    .unwrap_or_default()
                    .trim_start_matches("backend=");
                let implied = key(value, "backend").unwrap_or(kind);
                assert!(matches!(implied, "null" | "ringbuf" | "file"), "{value}");
            }
            "-netdev" => {
                let kind = value
                    .split(',')
                    .next()
                    .unwrap_or_default()
                    .trim_start_matches("type=");
                let implied = key(value, "type").unwrap_or(kind);
                assert!(matches!(implied, "tap" | "user"), "{value}");
            }
            "-parallel" | "-monitor" | "-display" | "-net" | "-nic" | "-vga" => {
                assert!(value.bytes().all(|b| b.is_ascii_lowercase()), "{value}");
            }
            _ => {}
        }
    }
    assert_eq!(
        memory,
        descriptor.regions.len(),
        "all of its memory is announced"
    );
}

fn descriptor(data: &[u8]) {
    let offer = Offer {
        descriptor: data.to_vec(),
        ..offer_sample()
    };
    match descriptor_of(&offer) {
        Ok(descriptor) => {
            let sizes: Vec<_> = descriptor
                .regions
                .iter()
                .map(|region| region.size_bytes)
                .collect();
            assert_eq!(sizes, [600 * 4096, 3 * 4096]);
            let text = serde_json::to_vec(&descriptor).expect("text");
            assert_eq!(
                descriptor_of(&Offer {
                    descriptor: text,
                    ..offer
                }),
                Ok(descriptor.clone())
            );
            let _ = judge_arguments(&descriptor, &[]);
        }
        Err(blocker) => assert!(!blocker.code.is_empty() && blocker.message.len() <= 2048),
    }
}

fn image(data: &[u8]) {
    let path = allowed_dir().join("sub/fuzzed");
    fs::write(&path, data).expect("a file");
    if let Ok(Some((behind, format))) = behind_image(&path) {
        let text = behind.to_str().expect("a name");
        assert!(!text.contains([':', '\0']) && behind.is_absolute());
        assert!(format == "raw" || format == "qcow2");
    }
}

/// Whether these are options and values of which it is known which is which.
fn is_proper(arguments: &[String]) -> bool {
    const ALONE: [&str; 6] = [
        "nodefaults",
        "S",
        "daemonize",
        "nographic",
        "snapshot",
        "enable-kvm",
    ];
    const WITH_VALUE: [&str; 16] = [
        "machine", "M", "m", "chardev", "mon", "pidfile", "incoming", "serial", "display",
        "object", "name", "qmp", "device", "drive", "netdev", "kernel",
    ];
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let option = argument
            .strip_prefix("--")
            .or(argument.strip_prefix('-'))
            .unwrap_or_default();
        let mut has_value = || rest.next().is_some_and(|value| !value.starts_with('-'));
        if !ALONE.contains(&option) && !(WITH_VALUE.contains(&option) && has_value()) {
            return false;
        }
    }
    true
}

fn adopted(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let arguments: Vec<String> = text.split('\n').map(str::to_owned).collect();
    let dir = Path::new("/state/vms/1");
    let portable = portable_arguments(&arguments, dir, "pc-q35-7.2");
    if is_proper(&arguments) {
        let again = portable_arguments(&portable, dir, "pc-q35-7.2");
        assert_eq!(again, portable, "what is portable stays as it is");
        for bad in [
            "-qmp",
            "-mon",
            "-incoming",
            "-pidfile",
            "-S",
            "-daemonize",
            "-M",
        ] {
            assert!(
                !portable.iter().any(|arg| arg == bad),
                "{bad} is of this host"
            );
        }
    }
    assert!(portable.iter().any(|arg| arg == "-machine"));
}
