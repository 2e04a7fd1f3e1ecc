//! QEMU's command line: made from a [`Machine`], and read back from a running QEMU without what belongs to one host.

use std::path::Path;

use crate::facts::kvm_opens;
use crate::vm::{Accel, Machine, Region};

/// Stands for the VM's directory in arguments that cross hosts.
pub(crate) const VM_DIR: &str = "@VM_DIR@";
/// What a machine with a console gets. A file that is there is continued: a QEMU that starts again, or the VM that
/// comes back, does not wipe it.
const CONSOLE: &str = "file,id=console,path=@VM_DIR@/console.log,append=on";

/// Arguments for a machine, with [`VM_DIR`] for its directory.
pub(crate) fn arguments(machine: &Machine) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| args.extend([option.to_owned(), value]);
    add("-name", machine.name.clone());
    add("-uuid", machine.uuid.clone());
    let accel = match machine.accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
        Accel::Auto if kvm_opens() => "kvm",
        Accel::Auto => "tcg",
    };
    add("-accel", accel.to_owned());
    let total: u64 = machine.memory_bytes.iter().sum();
    add("-m", format!("{}k", total / 1024));
    add("-smp", machine.cpus.to_string());
    if let Some(cpu) = &machine.cpu {
        add("-cpu", cpu.clone());
    }
    for (node, size) in machine.memory_bytes.iter().enumerate() {
        add(
            "-object",
            format!("memory-backend-memfd,id=ram{node},size={size},share=on"),
        );
    }
    if let [_] = machine.memory_bytes[..] {
        add(
            "-machine",
            format!("{},memory-backend=ram0", machine.machine),
        );
    } else {
        add("-machine", machine.machine.clone());
        for node in 0..machine.memory_bytes.len() {
            add("-numa", format!("node,nodeid={node},memdev=ram{node}"));
        }
    }
    let boot = [
        ("-kernel", &machine.kernel),
        ("-initrd", &machine.initrd),
        ("-append", &machine.append),
    ];
    for (option, value) in boot {
        if let Some(value) = value {
            add(option, value.clone());
        }
    }
    for (index, disk) in machine.disks.iter().enumerate() {
        let snapshot = if disk.ephemeral { ",snapshot=on" } else { "" };
        let (path, format) = (&disk.path, &disk.format);
        add(
            "-drive",
            format!("if=none,id=disk{index},file={path},format={format}{snapshot}"),
        );
        let device = if disk.interface == "ide" {
            "ide-hd"
        } else {
            "virtio-blk-pci"
        };
        add("-device", format!("{device},drive=disk{index}"));
    }
    for (index, network) in machine.networks.iter().enumerate() {
        let (tap, mac) = (&network.tap, &network.mac);
        add(
            "-netdev",
            format!("tap,id=net{index},ifname={tap},script=no,downscript=no"),
        );
        add(
            "-device",
            format!("virtio-net-pci,netdev=net{index},mac={mac}"),
        );
    }
    if machine.console {
        add("-chardev", CONSOLE.to_owned());
        add("-serial", "chardev:console".to_owned());
    } else {
        add("-serial", "null".to_owned());
    }
    add("-display", "none".to_owned());
    args.extend(["-nodefaults".to_owned(), "-no-reboot".to_owned()]);
    args
}

/// Options with a value that belong to one host: dropped.
const HOST_OPTIONS: [&str; 20] = [
    "-qmp",
    "-qmp-pretty",
    "-monitor",
    "-mon",
    "-incoming",
    "-pidfile",
    "-D",
    "-d",
    "-chroot",
    "-runas",
    "-run-with",
    "-gdb",
    "-vnc",
    "-spice",
    "-trace",
    "-sandbox",
    "-loadvm",
    "-overcommit",
    "-msg",
    "-qtest",
];
/// Options without a value that belong to one host: dropped.
const HOST_FLAGS: [&str; 6] = [
    "-S",
    "-daemonize",
    "-s",
    "-only-migratable",
    "-mem-prealloc",
    "-nodefconfig",
];
/// Keys of a memory backend that bind it to one host or fill it.
const HOST_MEMORY_KEYS: [&str; 6] = [
    "prealloc",
    "prealloc-threads",
    "prealloc-context",
    "host-nodes",
    "policy",
    "reserve",
];
/// Options without a value.
const FLAGS: [&str; 14] = [
    "-nodefaults",
    "-no-reboot",
    "-no-shutdown",
    "-no-user-config",
    "-nographic",
    "-no-hpet",
    "-no-acpi",
    "-enable-kvm",
    "-usb",
    "-snapshot",
    "-full-screen",
    "-no-fd-bootchk",
    "-win2k-hack",
    "-rtc-td-hack",
];

/// Whether this option stands alone.
pub(crate) fn is_flag(option: &str) -> bool {
    FLAGS.contains(&option) || HOST_FLAGS.contains(&option)
}

/// Removes from a running QEMU's arguments (without the program) what belongs to one host, and writes the VM's
/// directory as [`VM_DIR`]. `machine` is the machine type with its version.
pub(crate) fn portable(args: &[String], vm_dir: &Path, machine: &str) -> Vec<String> {
    let dir = vm_dir.to_string_lossy();
    // `--option` is `-option`.
    let normal = |arg: &str| -> String {
        arg.strip_prefix("--")
            .map_or_else(|| arg.to_owned(), |rest| format!("-{rest}"))
    };
    let monitors = monitor_chardevs(args, normal);
    let mut portable: Vec<String> = Vec::new();
    let mut serials = 0;
    let mut nographic = false;
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let option = normal(arg);
        if HOST_FLAGS.contains(&option.as_str()) {
            continue;
        }
        if option == "-nographic" {
            nographic = true;
            continue;
        }
        if is_flag(&option) || !option.starts_with('-') {
            portable.push(option);
            continue;
        }
        let Some(value) = rest.next() else {
            portable.push(option);
            break;
        };
        if HOST_OPTIONS.contains(&option.as_str()) {
            continue;
        }
        let mut value = value.replace(dir.as_ref(), VM_DIR);
        match option.as_str() {
            "-chardev" if monitors.iter().any(|id| has_key(&value, "id", id)) => continue,
            "-chardev" => value = portable_chardev(&value),
            "-object" => value = portable_object(&value),
            "-display" => "none".clone_into(&mut value),
            "-serial" => {
                value = portable_serial(&value, serials);
                serials += 1;
            }
            "-machine" | "-M" => value = versioned(&value, machine),
            _ => {}
        }
        let option = if option == "-M" {
            "-machine".to_owned()
        } else {
            option
        };
        portable.extend([option, value]);
    }
    if nographic {
        portable.extend(["-display".to_owned(), "none".to_owned()]);
        if serials == 0 && !portable.iter().any(|arg| arg == "-nodefaults") {
            portable.extend(["-serial".to_owned(), "null".to_owned()]);
        }
    }
    if !portable.iter().any(|arg| arg == "-machine") {
        portable.extend(["-machine".to_owned(), machine.to_owned()]);
    }
    portable
}

/// IDs of the character devices that only monitors use.
fn monitor_chardevs(args: &[String], normal: impl Fn(&str) -> String) -> Vec<String> {
    let monitors = args.windows(2).filter(|pair| normal(&pair[0]) == "-mon");
    let ids = monitors.filter_map(|pair| {
        let mut keys = pair[1].split(',');
        let first = keys.next()?;
        let named = first
            .strip_prefix("chardev=")
            .or_else(|| (!first.contains('=')).then_some(first));
        named
            .or_else(|| keys.find_map(|key| key.strip_prefix("chardev=")))
            .map(str::to_owned)
    });
    let is_used_elsewhere = |id: &String| {
        args.windows(2).any(|pair| {
            let uses = has_key(&pair[1], "chardev", id)
                || pair[1].strip_prefix("chardev:") == Some(id.as_str());
            uses && normal(&pair[0]) != "-mon"
        })
    };
    ids.filter(|id| !is_used_elsewhere(id)).collect()
}

fn has_key(value: &str, key: &str, expected: &str) -> bool {
    value
        .split(',')
        .any(|pair| pair.split_once('=') == Some((key, expected)))
}

/// Output to a file goes to the VM's directory; anything else that a serial port may be belongs to one host.
fn portable_serial(value: &str, index: usize) -> String {
    if value.starts_with("file:") {
        match index {
            0 => format!("file:{VM_DIR}/console.log"),
            more => format!("file:{VM_DIR}/serial{more}.log"),
        }
    } else if value == "none" || value.starts_with("chardev:") {
        value.to_owned()
    } else {
        "null".to_owned()
    }
}

/// As with serial ports. The device that uses it stays, because the guest sees that.
fn portable_chardev(value: &str) -> String {
    let kind = value.split(',').next().unwrap_or_default();
    if matches!(kind, "null" | "ringbuf") {
        return value.to_owned();
    }
    let key = |wanted: &str| {
        value
            .split(',')
            .find_map(|pair| pair.strip_prefix(wanted)?.strip_prefix('='))
    };
    let id = key("id").unwrap_or_default();
    if kind != "file" {
        return format!("null,id={id}");
    }
    let in_vm_dir = key("path").filter(|path| path.starts_with(VM_DIR));
    let path = in_vm_dir.map_or_else(|| format!("{VM_DIR}/{id}.log"), str::to_owned);
    format!("file,id={id},path={path},append=on")
}

/// Memory is empty at its start and lies where the other host has room.
fn portable_object(value: &str) -> String {
    if !value.contains("memory-backend-") {
        return value.to_owned();
    }
    let is_kept = |pair: &&str| {
        let key = pair.split('=').next().unwrap_or_default();
        // `host-nodes.0=1` is a way to write it, too.
        !HOST_MEMORY_KEYS.contains(&key.split('.').next().unwrap_or_default())
    };
    value
        .split(',')
        .filter(is_kept)
        .collect::<Vec<_>>()
        .join(",")
}

/// The arguments of an arriving VM with each part of its memory from the node chosen for it, where one is. Preferred and
/// not bound: what does not fit there any more comes from elsewhere.
pub(crate) fn placed(args: &[String], regions: &[Region], nodes: &[Option<u32>]) -> Vec<String> {
    let mut args = args.to_vec();
    for (region, node) in regions.iter().zip(nodes) {
        let is_it = |value: &&mut String| {
            value.contains("memory-backend-") && has_key(value, "id", &region.name)
        };
        if let (Some(node), Some(value)) = (node, args.iter_mut().find(is_it)) {
            value.push_str(&format!(",host-nodes={node},policy=preferred"));
        }
    }
    args
}

/// Replaces the machine type by its version, so that another release of QEMU builds the same machine.
fn versioned(value: &str, machine: &str) -> String {
    let mut keys: Vec<String> = value.split(',').map(str::to_owned).collect();
    let is_type = |key: &str| key.starts_with("type=") || !key.contains('=');
    match keys.iter_mut().find(|key| is_type(key)) {
        Some(key) => machine.clone_into(key),
        None => keys.insert(0, machine.to_owned()),
    }
    keys.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Vec<String> {
        line.split_ascii_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn memory_comes_from_the_nodes_chosen_and_the_next_host_is_not_told() {
        let line = "-m 96 -object memory-backend-memfd,id=ram0,size=64M,share=on -object rng-random,id=ram1 \
                    -object memory-backend-memfd,id=ram1,size=32M,share=on -numa node,memdev=ram0";
        let region = |name: &str| Region {
            name: name.to_owned(),
            size_bytes: 1,
        };
        let regions = [region("ram0"), region("ram1"), region("ram2")];
        let placed = placed(&args(line), &regions, &[None, Some(3), Some(1)]);
        let expected = line.replace(
            "size=32M,share=on",
            "size=32M,share=on,host-nodes=3,policy=preferred",
        );
        assert_eq!(placed, args(&expected));
        let next = portable(&placed, Path::new("/vm"), "q35");
        assert_eq!(next[..next.len() - 2], args(line));
    }

    #[test]
    fn what_belongs_to_one_host_is_removed() {
        let line = "-machine q35,memory-backend=ram -m 64 -nodefaults -S -daemonize --qmp unix:/run/x,server=on \
                    -chardev socket,id=mon0,path=/x -mon chardev=mon0,mode=control -pidfile /p -incoming defer \
                    -serial file:/var/log/x -display gtk -object memory-backend-memfd,id=ram,size=64M,share=on";
        assert_eq!(
            portable(&args(line), Path::new("/vm"), "pc-q35-7.2"),
            args(
                "-machine pc-q35-7.2,memory-backend=ram -m 64 -nodefaults -serial file:@VM_DIR@/console.log \
                 -display none -object memory-backend-memfd,id=ram,size=64M,share=on"
            )
        );
    }

    #[test]
    fn a_terminal_becomes_no_display_and_a_silent_port() {
        assert_eq!(
            portable(
                &args("-M type=q35 -nographic"),
                Path::new("/vm"),
                "pc-q35-7.2"
            ),
            args("-machine pc-q35-7.2 -display none -serial null")
        );
    }

    #[test]
    fn the_directory_of_the_vm_is_written_as_a_placeholder() {
        let value = args("-serial file:/state/vms/1/console.log -kernel /boot/vmlinuz");
        let portable = portable(&value, Path::new("/state/vms/1"), "m");
        assert_eq!(portable[1], "file:@VM_DIR@/console.log");
        assert_eq!(portable[3], "/boot/vmlinuz");
    }

    #[test]
    fn character_devices_of_one_host_fall_silent_and_their_devices_stay() {
        let line = "-chardev socket,id=agent,path=/run/agent,server=on -device virtserialport,chardev=agent \
                    -chardev stdio,id=both,mux=on -mon chardev=both -serial chardev:both \
                    -chardev file,id=log,path=/var/log/vm -machine q35";
        assert_eq!(
            portable(&args(line), Path::new("/vm"), "q35"),
            args(
                "-chardev null,id=agent -device virtserialport,chardev=agent -chardev null,id=both \
                 -serial chardev:both -chardev file,id=log,path=@VM_DIR@/log.log,append=on -machine q35"
            )
        );
    }

    #[test]
    fn memory_is_bound_to_no_host_and_not_filled() {
        let line = "-object memory-backend-memfd,id=m,size=1G,share=on,prealloc=on,host-nodes=0,policy=bind \
                    -object iothread,id=i -machine q35 -overcommit mem-lock=on -mem-prealloc";
        assert_eq!(
            portable(&args(line), Path::new("/vm"), "q35"),
            args(
                "-object memory-backend-memfd,id=m,size=1G,share=on -object iothread,id=i -machine q35"
            )
        );
    }

    #[test]
    fn serial_ports_get_a_file_each() {
        let line = "-serial file:a -serial file:b -serial mon:stdio -machine q35";
        let serials = "-serial file:@VM_DIR@/console.log -serial file:@VM_DIR@/serial1.log -serial null \
                       -machine q35";
        assert_eq!(
            portable(&args(line), Path::new("/vm"), "q35"),
            args(serials)
        );
    }

    proptest::proptest! {
        #[test]
        fn any_command_line_is_rewritten_without_panic(
            arguments in proptest::collection::vec("[-a-z,=:./{}\"é]{0,24}", 0..12),
            noise in proptest::collection::vec(".{0,24}", 0..6),
        ) {
            let _ = portable(&arguments, Path::new("/vm"), "q35");
            let _ = portable(&noise, Path::new("/vm"), "q35");
        }
    }
}
