//! Which arguments an arriving VM may bring. They come from another host, so everything that is not known to be
//! harmless is refused: QEMU's options can run programs, open sockets and read any file.

use std::path::{Path, PathBuf};

use super::command_line::{VM_DIR, is_flag};
use crate::vm::Obstacle;

const ARGUMENTS_MAX: usize = 512;
const ARGUMENT_BYTES_MAX: usize = 8192;

/// Options whose value is plain data.
const PLAIN: [&str; 12] = [
    "-name",
    "-uuid",
    "-accel",
    "-cpu",
    "-smp",
    "-m",
    "-numa",
    "-rtc",
    "-boot",
    "-append",
    "-k",
    "-watchdog-action",
];
/// Flags that an arriving VM may bring.
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
/// Devices that need nothing of the host but what other options give them.
const DEVICES: [&str; 44] = [
    "virtio-net-pci",
    "virtio-net-pci-non-transitional",
    "virtio-blk-pci",
    "virtio-blk-pci-non-transitional",
    "virtio-scsi-pci",
    "virtio-rng-pci",
    "virtio-balloon-pci",
    "virtio-serial-pci",
    "virtio-vga",
    "virtio-gpu-pci",
    "virtio-keyboard-pci",
    "virtio-mouse-pci",
    "virtio-tablet-pci",
    "virtconsole",
    "virtserialport",
    "virtio-crypto-pci",
    "e1000",
    "e1000e",
    "rtl8139",
    "ide-hd",
    "ide-cd",
    "scsi-hd",
    "scsi-cd",
    "ahci",
    "ich9-ahci",
    "nvme",
    "pcie-root-port",
    "pcie-pci-bridge",
    "pci-bridge",
    "isa-serial",
    "pci-serial",
    "qemu-xhci",
    "nec-usb-xhci",
    "usb-tablet",
    "usb-kbd",
    "usb-mouse",
    "usb-storage",
    "VGA",
    "bochs-display",
    "pvpanic",
    "pvpanic-pci",
    "i6300esb",
    "isa-debug-exit",
    "vmgenid",
];
/// Keys that name something of the host; with devices and objects they are never needed.
const HOST_KEYS: [&str; 14] = [
    "romfile", "path", "file", "filename", "host", "hostaddr", "socket", "fd", "fds", "vhostfd",
    "vhostfds", "sysfsdev", "mem-path", "exec",
];
const OBJECTS: [&str; 4] = [
    "memory-backend-memfd",
    "iothread",
    "rng-builtin",
    "throttle-group",
];
const DRIVE_KEYS: [&str; 14] = [
    "if",
    "id",
    "file",
    "format",
    "snapshot",
    "cache",
    "aio",
    "discard",
    "detect-zeroes",
    "readonly",
    "index",
    "media",
    "bus",
    "unit",
];
/// Keys of `-machine` that are plain data.
const MACHINE_KEYS: [&str; 14] = [
    "type",
    "accel",
    "memory-backend",
    "kernel-irqchip",
    "kernel_irqchip",
    "smm",
    "vmport",
    "hpet",
    "usb",
    "graphics",
    "dump-guest-core",
    "mem-merge",
    "nvdimm",
    "hmat",
];

/// Finds everything in the arguments that an arriving VM may not bring, all at once.
pub(crate) fn judge(arguments: &[String], allowed_paths: &[PathBuf]) -> Vec<Obstacle> {
    let judge = Judge { allowed_paths };
    let mut refused = Vec::new();
    if arguments.len() > ARGUMENTS_MAX
        || arguments
            .iter()
            .any(|argument| argument.len() > ARGUMENT_BYTES_MAX)
    {
        refused.push(obstacle(
            "its command line is longer than this host accepts",
        ));
        return refused;
    }
    let mut rest = arguments.iter();
    while let Some(option) = rest.next() {
        if option.contains(['\0', '\n']) {
            refused.push(obstacle("an option with control characters"));
        } else if FLAGS.contains(&option.as_str()) {
        } else if is_flag(option) || !option.starts_with('-') {
            refused.push(obstacle(&format!(
                "{option:?} is not accepted from another host"
            )));
        } else {
            match rest.next() {
                Some(value) if !value.contains(['\0', '\n']) => {
                    if let Err(problem) = judge.option(option, value) {
                        refused.push(obstacle(&format!("{option} {value:?}: {problem}")));
                    }
                }
                _ => refused.push(obstacle(&format!("{option} has no proper value"))),
            }
        }
    }
    refused
}

fn obstacle(message: &str) -> Obstacle {
    Obstacle {
        code: "argument-refused".to_owned(),
        message: format!("the VM brings an argument that is refused: {message}"),
        remedy: "Start the VM without it, or list the directory of its files in `qemu.allowed-paths` of the \
                 destination's configuration."
            .to_owned(),
    }
}

/// Splits `a,b=c` at commas; QEMU writes a comma within a value twice.
fn keys(value: &str) -> Vec<(String, String)> {
    let marked = value.replace(",,", "\0");
    marked
        .split(',')
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key.replace('\0', ","), value.replace('\0', ","))
        })
        .collect()
}

struct Judge<'a> {
    allowed_paths: &'a [PathBuf],
}

impl Judge<'_> {
    fn option(&self, option: &str, value: &str) -> Result<(), String> {
        match option {
            _ if PLAIN.contains(&option) => Ok(()),
            "-kernel" | "-initrd" | "-bios" => self.path(value),
            "-machine" => machine(value),
            "-global" => global(value),
            "-object" => self.kind(value, "qom-type", &OBJECTS),
            "-device" => self.kind(value, "driver", &DEVICES),
            "-drive" => self.drive(value),
            "-netdev" => netdev(value),
            "-chardev" => self.chardev(value),
            "-serial" => self.serial(value),
            "-parallel" | "-monitor" | "-vga" | "-display" => plain_word(value),
            "-smbios"
                if keys(value)
                    .iter()
                    .all(|(key, _)| key != "file" && key != "path") =>
            {
                Ok(())
            }
            _ => Err("this option is not accepted from another host".to_owned()),
        }
    }

    /// Below an allowed directory, with all links followed.
    fn path(&self, path: &str) -> Result<(), String> {
        let real = Path::new(path)
            .canonicalize()
            .map_err(|error| format!("this host has no such file ({error})"))?;
        let allowed = self
            .allowed_paths
            .iter()
            .filter_map(|dir| dir.canonicalize().ok())
            .any(|dir| real.starts_with(&dir) && real != dir);
        if Path::new(path).is_absolute() && allowed {
            Ok(())
        } else {
            Err("the file is not below an allowed directory".to_owned())
        }
    }

    fn without(&self, value: &str, forbidden: &[&str]) -> Result<(), String> {
        let found = keys(value)
            .into_iter()
            .find(|(key, _)| forbidden.contains(&key.as_str()));
        found.map_or(Ok(()), |(key, _)| {
            Err(format!("the key {key:?} names something of the host"))
        })
    }

    fn kind(&self, value: &str, type_key: &str, known: &[&str]) -> Result<(), String> {
        if value.starts_with('{') {
            return Err("JSON is not accepted here".to_owned());
        }
        let keys = keys(value);
        let kind = keys.iter().enumerate().find_map(|(index, (key, value))| {
            let positional = index == 0 && value.is_empty();
            if positional {
                Some(key)
            } else {
                (key == type_key).then_some(value)
            }
        });
        match kind {
            Some(kind) if known.contains(&kind.as_str()) => self.without(value, &HOST_KEYS),
            Some(kind) => Err(format!("{kind:?} is not accepted from another host")),
            None => Err("its kind is missing".to_owned()),
        }
    }

    fn drive(&self, value: &str) -> Result<(), String> {
        let keys = keys(value);
        for (key, value) in &keys {
            if !DRIVE_KEYS.contains(&key.as_str()) {
                return Err(format!("the key {key:?} is not accepted from another host"));
            }
            match key.as_str() {
                // A name with a colon would be a protocol, and `json:` anything at all.
                "file" => self.path(value)?,
                "format" if value != "raw" && value != "qcow2" => {
                    return Err(format!(
                        "format {value:?} is not accepted from another host"
                    ));
                }
                _ => {}
            }
        }
        // Without a format QEMU would guess it from the contents, which the guest writes.
        if keys.iter().any(|(key, _)| key == "file") && !keys.iter().any(|(key, _)| key == "format")
        {
            return Err("a drive needs its format".to_owned());
        }
        Ok(())
    }

    fn chardev(&self, value: &str) -> Result<(), String> {
        let keys = keys(value);
        let kind = keys.first().map_or("", |(kind, _)| kind);
        match kind {
            "null" | "ringbuf" => self.without(value, &HOST_KEYS),
            "file" => {
                let fits = keys.iter().all(|(key, value)| match key.as_str() {
                    "file" => value.is_empty(),
                    "path" => is_in_vm_dir(value),
                    "id" | "append" => true,
                    _ => false,
                });
                if fits {
                    Ok(())
                } else {
                    Err("only files in the VM's directory".to_owned())
                }
            }
            _ => Err(format!("{kind:?} is not accepted from another host")),
        }
    }

    fn serial(&self, value: &str) -> Result<(), String> {
        match value.split_once(':') {
            None => plain_word(value),
            Some(("chardev", _)) => Ok(()),
            Some(("file", path)) if is_in_vm_dir(path) => Ok(()),
            _ => Err("only files in the VM's directory".to_owned()),
        }
    }
}

/// `driver.property=value`, the short form only.
fn global(value: &str) -> Result<(), String> {
    let word = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
    };
    let parts = value.split_once('.').and_then(|(driver, rest)| {
        let (property, _) = rest.split_once('=')?;
        Some((driver, property))
    });
    match parts {
        Some((driver, property))
            if word(driver) && word(property) && !HOST_KEYS.contains(&property) =>
        {
            Ok(())
        }
        _ => Err("only driver.property=value that names nothing of the host".to_owned()),
    }
}

fn machine(value: &str) -> Result<(), String> {
    let keys = keys(value);
    let unknown = keys.iter().enumerate().find(|(index, (key, value))| {
        let is_type = *index == 0 && value.is_empty();
        !is_type && !MACHINE_KEYS.contains(&key.as_str())
    });
    match unknown {
        Some((_, (key, _))) => Err(format!("the key {key:?} is not accepted from another host")),
        None => Ok(()),
    }
}

fn plain_word(value: &str) -> Result<(), String> {
    const WORDS: [&str; 7] = ["none", "null", "std", "virtio", "cirrus", "qxl", "vmware"];
    if WORDS.contains(&value) {
        Ok(())
    } else {
        Err("not accepted from another host".to_owned())
    }
}

/// A plain file name directly in the VM's directory.
fn is_in_vm_dir(path: &str) -> bool {
    path.strip_prefix(VM_DIR)
        .and_then(|rest| rest.strip_prefix('/'))
        .is_some_and(|name| {
            !name.is_empty()
                && !name.starts_with('.')
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        })
}

fn netdev(value: &str) -> Result<(), String> {
    let keys = keys(value);
    let kind = keys.first().map_or("", |(kind, _)| kind);
    let (known, scripts_off): (&[&str], bool) = match kind {
        "tap" => {
            let off = |wanted: &str| {
                keys.iter()
                    .any(|(key, value)| key == wanted && value == "no")
            };
            (
                &[
                    "tap",
                    "id",
                    "ifname",
                    "script",
                    "downscript",
                    "queues",
                    "vhost",
                ],
                off("script") && off("downscript"),
            )
        }
        "user" => (&["user", "id", "net", "restrict", "ipv4", "ipv6"], true),
        _ => return Err(format!("{kind:?} is not accepted from another host")),
    };
    if let Some((key, _)) = keys.iter().find(|(key, _)| !known.contains(&key.as_str())) {
        return Err(format!("the key {key:?} is not accepted from another host"));
    }
    if scripts_off {
        Ok(())
    } else {
        Err("a tap needs script=no,downscript=no: scripts run as root".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(line: &[&str]) -> bool {
        let arguments: Vec<String> = line.iter().map(|arg| (*arg).to_owned()).collect();
        !judge(&arguments, &["/usr/bin".into()]).is_empty()
    }

    #[test]
    fn what_runs_programs_opens_sockets_or_files_is_refused() {
        for line in [
            &["-netdev", "tap,id=n,ifname=t,script=/tmp/x,downscript=no"][..],
            &["-netdev", "tap,id=n,ifname=t"],
            &["-netdev", "user,id=n,hostfwd=tcp::22-:22"],
            &["-netdev", "user,id=n,guestfwd=tcp:1.1.1.1:1-cmd:sh"],
            &["-netdev", "bridge,id=n,helper=/tmp/x"],
            &["-chardev", "pipe,id=x,path=/tmp/x"],
            &["-chardev", "file,id=x,path=/etc/passwd"],
            &["-chardev", "file,id=x,path=@VM_DIR@/../x"],
            &["-chardev", "socket,id=x,host=1.1.1.1,port=1"],
            &["-serial", "tcp:1.1.1.1:1"],
            &["-serial", "file:/etc/cron.d/x"],
            &["-monitor", "stdio"],
            &["-qmp", "tcp:0.0.0.0:1,server"],
            &["-incoming", "exec:sh"],
            &["-readconfig", "/etc/passwd"],
            &["-plugin", "/tmp/x.so"],
            &["-drive", "file=/etc/shadow,format=raw,if=none,id=d"],
            &["-drive", "file=/usr/bin/env,if=none,id=d"],
            &["-drive", "file=json:{},format=raw"],
            &["-drive", "file=/usr/bin/../../etc/shadow,format=raw"],
            &["-drive", "file=nbd://1.1.1.1/x,format=raw"],
            &["-kernel", "/etc/passwd"],
            &["-kernel", "usr/bin/env"],
            &["-device", "vfio-pci,host=00:01.0"],
            &["-device", "virtio-net-pci,netdev=n,romfile=/etc/shadow"],
            &["-device", "{\"driver\":\"virtio-net-pci\"}"],
            &["-device", "vhost-user-fs-pci,chardev=c"],
            &[
                "-object",
                "memory-backend-file,id=m,size=1G,mem-path=/etc/x",
            ],
            &["-object", "secret,id=s,file=/etc/shadow"],
            &["-machine", "q35,firmware=/etc/shadow"],
            &["-sandbox", "off"],
            &["-daemonize"],
            &["stray"],
            &["-append"],
            &["-name", "a\nb"],
            &["-global", "virtio-net-pci.romfile=/etc/shadow"],
            &["-smbios", "type=0,file=/etc/shadow"],
        ] {
            assert!(refused(line), "{line:?}");
        }
    }

    #[test]
    fn what_our_own_vms_bring_is_accepted() {
        let machine = crate::vm::Machine {
            name: "web".to_owned(),
            uuid: "u".to_owned(),
            memory_bytes: vec![1 << 28, 1 << 28],
            cpus: 2,
            accel: crate::vm::Accel::Tcg,
            machine: "q35".to_owned(),
            cpu: Some("max".to_owned()),
            kernel: Some("/usr/bin/env".to_owned()),
            initrd: None,
            append: Some("console=ttyS0 a,b=c".to_owned()),
            disks: vec![crate::vm::Disk {
                path: "/usr/bin/env".to_owned(),
                format: "raw".to_owned(),
                interface: "ide".to_owned(),
                ephemeral: true,
            }],
            networks: vec![crate::vm::Network {
                tap: "tap0".to_owned(),
                mac: "52:54:00:00:00:01".to_owned(),
            }],
            console: true,
        };
        let arguments = super::super::command_line::arguments(&machine);
        assert_eq!(judge(&arguments, &["/usr/bin".into()]), []);
        let outside = judge(&arguments, &["/boot".into()]);
        assert_eq!(
            outside.len(),
            2,
            "kernel and disk, both at once: {outside:?}"
        );
    }

    proptest! {
        #[test]
        fn no_path_outside_is_ever_accepted(
            option in prop::sample::select(vec![
                "-kernel", "-drive", "-chardev", "-serial", "-device", "-object", "-netdev", "-machine", "-global",
            ]),
            prefix in "[a-z,=:{}\"@]{0,20}",
            suffix in "[a-z,=:{}\"@./]{0,20}",
        ) {
            let value = format!("{prefix}file={suffix}/etc/shadow");
            let arguments = [option.to_owned(), value];
            let accepted = judge(&arguments, &["/usr/bin".into()]).is_empty();
            prop_assert!(!accepted, "{arguments:?}");
        }

        #[test]
        fn arbitrary_arguments_never_panic(arguments in prop::collection::vec(".{0,40}", 0..8)) {
            let _ = judge(&arguments, &["/usr/bin".into()]);
        }
    }
}
