//! Which arguments an arriving VM may bring. They come from another host, so everything that is not known to be
//! harmless is refused: QEMU's options can run programs, open sockets and read any file.

mod image;
mod keys;
mod lists;

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use self::keys::{Keys, is_word, size};
use self::lists::{
    ACCEL_KEYS, BOOT_KEYS, DEVICES, DRIVE_KEYS, FLAGS, HOST_KEYS, MACHINE_KEYS, MEMFD_KEYS,
    OBJECTS, PLAIN, TEXT,
};
use super::command_line::{VM_DIR, is_flag};
use super::{obstacle, shown};
use crate::vm::{Descriptor, Obstacle, Region};

const ARGUMENTS_MAX: usize = 512;
const ARGUMENT_BYTES_MAX: usize = 8192;
/// Most files behind an image.
const BACKING_MAX: usize = 16;
/// Most virtual CPUs, and the largest of any number that `-smp` takes.
const CPUS_MAX: u32 = 1024;

/// Finds everything in a VM's arguments that it may not bring, all at once.
pub(crate) fn judge(descriptor: &Descriptor, allowed_paths: &[PathBuf]) -> Vec<Obstacle> {
    let mut judge = Judge {
        allowed_paths,
        machine: &descriptor.machine,
        memory: Vec::new(),
    };
    let mut refused = judge.all(&descriptor.arguments);
    // Where something was refused already, its memory may be among it.
    if refused.is_empty() {
        judge.memory.sort_by(|a, b| a.name.cmp(&b.name));
        let mut regions = descriptor.regions.clone();
        regions.sort_by(|a, b| a.name.cmp(&b.name));
        if judge.memory != regions {
            refused.push(refusal(
                "its memory backends are not those of the memory that it announces",
            ));
        }
    }
    refused
}

fn refusal(message: &str) -> Obstacle {
    obstacle(
        "argument-refused",
        format!("the VM brings an argument that is refused: {message}"),
        "Start the VM without it, or list the directory of its files in `qemu.allowed-paths` of the \
         destination's configuration.",
    )
}

struct Judge<'a> {
    allowed_paths: &'a [PathBuf],
    machine: &'a str,
    /// Backends seen so far.
    memory: Vec<Region>,
}

impl Judge<'_> {
    fn all(&mut self, arguments: &[String]) -> Vec<Obstacle> {
        if arguments.len() > ARGUMENTS_MAX
            || arguments.iter().any(|arg| arg.len() > ARGUMENT_BYTES_MAX)
        {
            return vec![refusal("its command line is longer than this host accepts")];
        }
        let mut refused = Vec::new();
        if !is_word(self.machine) {
            refused.push(refusal("its machine type is not a name"));
        }
        let mut rest = arguments.iter();
        while let Some(option) = rest.next() {
            if FLAGS.contains(&option.as_str()) {
                continue;
            }
            if is_flag(option) || !option.starts_with('-') {
                refused.push(refusal(&shown(option)));
                continue;
            }
            match rest.next() {
                Some(value) if !value.contains(|c: char| c.is_control()) => {
                    if let Err(problem) = self.option(option, value) {
                        let (option, value) = (shown(option), shown(value));
                        refused.push(refusal(&format!("{option} {value}: {problem}")));
                    }
                }
                _ => refused.push(refusal(&format!("{} has no proper value", shown(option)))),
            }
        }
        refused
    }

    fn option(&mut self, option: &str, value: &str) -> Result<(), String> {
        match option {
            _ if TEXT.contains(&option) => Ok(()),
            "-smp" => plain(value).and_then(|()| small_numbers(value)),
            _ if PLAIN.contains(&option) => plain(value),
            "-kernel" | "-initrd" | "-bios" => self.path(value),
            "-accel" => Keys::parse(value, Some("accel")).and_then(|keys| accel(&keys)),
            "-boot" => {
                let keys = Keys::parse(value, Some("order"))?;
                keys.only(&BOOT_KEYS)?;
                keys.without(&[])
            }
            "-machine" => self.machine(&Keys::parse(value, Some("type"))?),
            "-global" => global(value),
            "-object" => self.object(&Keys::parse(value, Some("qom-type"))?),
            "-device" => device(&Keys::parse(value, Some("driver"))?),
            "-drive" => self.drive(&Keys::parse(value, None)?),
            "-netdev" => netdev(&Keys::parse(value, Some("type"))?),
            "-chardev" => chardev(&Keys::parse(value, Some("backend"))?),
            "-serial" => serial(value),
            "-parallel" | "-monitor" | "-vga" | "-display" | "-net" | "-nic" => word(value),
            "-smbios" => {
                let keys = Keys::parse(value, None)?;
                keys.without(&["file", "path"])
            }
            _ => Err("this option is not accepted from another host".to_owned()),
        }
    }

    /// Below an allowed directory, with all links followed.
    fn path(&self, path: &str) -> Result<(), String> {
        let path = Path::new(path);
        if !path.is_absolute() {
            return Err("the path is not absolute".to_owned());
        }
        let real = path
            .canonicalize()
            .map_err(|error| format!("this host has no such file ({error})"))?;
        let allowed = self
            .allowed_paths
            .iter()
            .filter_map(|dir| dir.canonicalize().ok())
            .any(|dir| real.starts_with(&dir) && real != dir);
        if !allowed {
            return Err("the file is not below an allowed directory".to_owned());
        }
        // Anything else could stop QEMU, as a pipe does.
        let kind = real.metadata().map(|meta| meta.file_type());
        if kind.is_ok_and(|kind| kind.is_file() || kind.is_block_device()) {
            Ok(())
        } else {
            Err("this is neither a regular file nor a block device".to_owned())
        }
    }

    fn machine(&self, keys: &Keys) -> Result<(), String> {
        if keys.get("type").is_some_and(|kind| kind != self.machine) {
            return Err("this is another machine than the VM announces".to_owned());
        }
        keys.only(&MACHINE_KEYS)?;
        keys.without(&[])?;
        keys.get("accel").map_or(Ok(()), known_accel)
    }

    fn object(&mut self, keys: &Keys) -> Result<(), String> {
        match keys.get("qom-type") {
            Some("memory-backend-memfd") => {
                keys.only(&MEMFD_KEYS)?;
                keys.without(&[])?;
                if !matches!(keys.get("share"), Some("on" | "yes" | "true")) {
                    return Err("memory needs share=on".to_owned());
                }
                let name = keys.get("id").filter(|id| is_word(id));
                let size = keys.get("size").and_then(size);
                let (Some(name), Some(size_bytes)) = (name, size) else {
                    return Err("memory needs a name and a size".to_owned());
                };
                self.memory.push(Region {
                    name: name.to_owned(),
                    size_bytes,
                });
                Ok(())
            }
            Some("rng-random") => {
                keys.only(&["qom-type", "id", "filename"])?;
                keys.no_path_but(&["filename"])?;
                match keys.get("filename") {
                    None | Some("/dev/urandom" | "/dev/random") => Ok(()),
                    Some(_) => Err("only /dev/urandom and /dev/random".to_owned()),
                }
            }
            Some(kind) if OBJECTS.contains(&kind) => keys.without(&HOST_KEYS),
            _ => Err("this object is not accepted from another host".to_owned()),
        }
    }

    fn drive(&self, keys: &Keys) -> Result<(), String> {
        keys.only(&DRIVE_KEYS)?;
        for (key, value) in keys.iter() {
            match key {
                // A name with a colon would be a protocol, and `json:` anything at all: no absolute path is either.
                "file" => self.path(value)?,
                "format" if value != "raw" && value != "qcow2" => {
                    return Err(format!(
                        "format {value:?} is not accepted from another host"
                    ));
                }
                _ if value.contains('/') => return Err(format!("{value:?} names a file")),
                _ => {}
            }
        }
        match (keys.get("file"), keys.get("format")) {
            // QEMU would guess it from the contents, which the guest writes.
            (Some(_), None) => Err("a drive needs its format".to_owned()),
            (Some(file), Some("qcow2")) => self.behind(Path::new(file)),
            _ => Ok(()),
        }
    }

    /// Judges all files behind an image of format qcow2.
    fn behind(&self, image: &Path) -> Result<(), String> {
        let mut image = image.to_owned();
        for _ in 0..BACKING_MAX {
            let Some(next) = image::backing(&image)? else {
                return Ok(());
            };
            let path = next.path.to_str().ok_or("a file has no proper name")?;
            let behind = |problem| format!("{path:?} behind the image: {problem}");
            self.path(path).map_err(behind)?;
            if next.format == "raw" {
                return Ok(());
            }
            image = next.path;
        }
        Err("too many files are behind the image".to_owned())
    }
}

fn accel(keys: &Keys) -> Result<(), String> {
    keys.only(&ACCEL_KEYS)?;
    keys.without(&[])?;
    keys.get("accel").map_or(Ok(()), known_accel)
}

fn known_accel(value: &str) -> Result<(), String> {
    if value.split(':').all(|one| one == "kvm" || one == "tcg") {
        Ok(())
    } else {
        Err("only kvm and tcg are accepted".to_owned())
    }
}

fn device(keys: &Keys) -> Result<(), String> {
    match keys.get("driver") {
        Some(driver) if DEVICES.contains(&driver) => keys.without(&HOST_KEYS),
        _ => Err("this device is not accepted from another host".to_owned()),
    }
}

fn chardev(keys: &Keys) -> Result<(), String> {
    keys.no_path_but(&["path"])?;
    match keys.get("backend") {
        Some("null") => keys.only(&["backend", "id"]),
        Some("ringbuf") => {
            keys.only(&["backend", "id", "size"])?;
            let small = keys
                .get("size")
                .is_none_or(|text| size(text).is_some_and(|bytes| bytes <= 1 << 20));
            if small {
                Ok(())
            } else {
                Err("the buffer is larger than 1 MiB".to_owned())
            }
        }
        Some("file") => {
            keys.only(&["backend", "id", "path", "append"])?;
            match keys.get("path") {
                Some(path) if is_in_vm_dir(path) => Ok(()),
                _ => Err("only logs in the VM's directory".to_owned()),
            }
        }
        _ => Err("this character device is not accepted from another host".to_owned()),
    }
}

fn serial(value: &str) -> Result<(), String> {
    match value.split_once(':') {
        None => word(value),
        Some(("chardev", id)) if is_word(id) => Ok(()),
        Some(("file", path)) if is_in_vm_dir(path) => Ok(()),
        _ => Err("only logs in the VM's directory".to_owned()),
    }
}

/// `driver.property=value`, the short form only.
fn global(value: &str) -> Result<(), String> {
    let parts = value
        .split_once('=')
        .and_then(|(name, value)| Some((name.split_once('.')?, value)));
    match parts {
        Some(((driver, property), value))
            if is_word(driver)
                && is_word(property)
                && !property.contains('.')
                && !HOST_KEYS.contains(&property)
                && !value.contains(['/', ',']) =>
        {
            Ok(())
        }
        _ => Err("only driver.property=value that names nothing of the host".to_owned()),
    }
}

/// Words and numbers, with what QEMU puts between them; never a path.
fn plain(value: &str) -> Result<(), String> {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b" _-.,=:+".contains(&b);
    if value.bytes().all(is_plain) {
        Ok(())
    } else {
        Err("only letters, digits and separators are accepted from another host".to_owned())
    }
}

fn small_numbers(value: &str) -> Result<(), String> {
    let numbers = value
        .split(|c: char| !c.is_ascii_digit())
        .filter(|digits| !digits.is_empty());
    for digits in numbers {
        if digits
            .parse::<u32>()
            .map_or(true, |number| number > CPUS_MAX)
        {
            return Err(format!("more than {CPUS_MAX} CPUs"));
        }
    }
    Ok(())
}

fn word(value: &str) -> Result<(), String> {
    const WORDS: [&str; 4] = ["none", "null", "std", "virtio"];
    if WORDS.contains(&value) {
        Ok(())
    } else {
        Err("not accepted from another host".to_owned())
    }
}

/// A log directly in the VM's directory, but not QEMU's own.
fn is_in_vm_dir(path: &str) -> bool {
    path.strip_prefix(VM_DIR)
        .and_then(|rest| rest.strip_prefix('/'))
        .is_some_and(|name| {
            is_word(name)
                && !name.starts_with('.')
                && Path::new(name).extension().is_some_and(|end| end == "log")
                && name != "qemu.log"
        })
}

fn netdev(keys: &Keys) -> Result<(), String> {
    // A network with the length of its prefix.
    keys.no_path_but(&["net"])?;
    match keys.get("type") {
        Some("tap") => {
            keys.only(&[
                "type",
                "id",
                "ifname",
                "script",
                "downscript",
                "queues",
                "vhost",
            ])?;
            if keys.get("script") != Some("no") || keys.get("downscript") != Some("no") {
                return Err("a tap needs script=no,downscript=no: scripts run as root".to_owned());
            }
            match keys.get("ifname") {
                Some(name) if is_word(name) => Ok(()),
                _ => Err("a tap needs its name".to_owned()),
            }
        }
        Some("user") => {
            keys.only(&["type", "id", "net", "restrict", "ipv4", "ipv6"])?;
            let is_part = |b: u8| b.is_ascii_hexdigit() || b".:/".contains(&b);
            match keys.get("net") {
                Some(net) if !net.bytes().all(is_part) => Err("not an address".to_owned()),
                _ => Ok(()),
            }
        }
        _ => Err("this network is not accepted from another host".to_owned()),
    }
}

/// The file behind an image and its format.
#[cfg(feature = "fuzzing")]
pub(crate) fn behind_image(image: &Path) -> Result<Option<(PathBuf, String)>, String> {
    image::backing(image).map(|found| found.map(|found| (found.path, found.format)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn descriptor(arguments: Vec<String>, regions: Vec<Region>) -> Descriptor {
        Descriptor {
            hypervisor: "qemu".to_owned(),
            version: "7.2.0".to_owned(),
            machine: "q35".to_owned(),
            arguments,
            regions,
            cpu_features: Vec::new(),
        }
    }

    fn refusals(line: &[&str]) -> Vec<Obstacle> {
        let arguments = line.iter().map(|arg| (*arg).to_owned()).collect();
        judge(&descriptor(arguments, Vec::new()), &["/usr/bin".into()])
    }

    fn refused(line: &[&str]) -> bool {
        !refusals(line).is_empty()
    }

    #[test]
    fn what_runs_programs_opens_sockets_or_files_is_refused() {
        for line in [
            &["-netdev", "tap,id=n,ifname=t,script=/tmp/x,downscript=no"][..],
            &["-netdev", "tap,id=n,ifname=t"],
            &["-netdev", "user,id=n,hostfwd=tcp::22-:22"],
            &["-netdev", "user,id=n,restrict=/dev/urandom"],
            &["-netdev", "user,id=n,net=@VM_DIR@/x"],
            &[
                "-netdev",
                "tap,id=n,ifname=t,script=no,downscript=no,vhost=/x",
            ],
            &["-chardev", "null,id=/x"],
            &["-object", "rng-random,id=/x,filename=/dev/urandom"],
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
            // Of two equal keys QEMU takes the last.
            &[
                "-netdev",
                "tap,id=n,ifname=t,script=no,downscript=no,script=/tmp/x",
            ],
            &["-device", "virtio-net-pci,driver=vfio-pci"],
            &["-object", "iothread,id=i,qom-type=filter-dump"],
            &["-chardev", "null,id=c,backend=pty"],
            &["-chardev", "file,id=x,path=@VM_DIR@/x.log,,/../y"],
            &["-chardev", "file,id=x,path=@VM_DIR@/qemu.log"],
            &["-boot", "splash=/etc/shadow"],
            &["-boot", "order=c,splash=shadow"],
            &["-k", "../../etc/shadow"],
            &["-accel", "kvm,device=/dev/sda"],
            &["-accel", "xen"],
            &["-machine", "pc"],
            &["-machine", "q35,accel=xen"],
            &["-smp", "4096"],
            &["-smp", "2,maxcpus=99999999999"],
            &["-object", "memory-backend-memfd,id=m,size=1G"],
            &[
                "-object",
                "memory-backend-memfd,id=m,size=1G,share=on,share=off",
            ],
            &[
                "-object",
                "memory-backend-memfd,id=m,size=1G,share=on,prealloc=on",
            ],
            &["-object", "memory-backend-memfd,id=m,size=1G,share=on"],
            &["-object", "rng-random,id=r,filename=/dev/sda"],
            &["-device", "loader,file=/etc/shadow"],
            &["-device", "virtio-9p-pci,fsdev=f,mount_tag=t"],
            &["-fsdev", "local,id=f,path=/,security_model=none"],
            &["-virtfs", "local,path=/,mount_tag=t"],
            &["-fw_cfg", "name=opt/x,file=/etc/shadow"],
            &["-acpitable", "file=/etc/shadow"],
            &["-dtb", "/etc/shadow"],
            &[
                "-blockdev",
                "{\"driver\":\"file\",\"filename\":\"/etc/shadow\",\"node-name\":\"n\"}",
            ],
            &["-hda", "/etc/shadow"],
            &["-kernel", "/usr/bin"],
            &["-global", "isa-debugcon.chardev=a/b"],
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
        let region = |name: &str| Region {
            name: name.to_owned(),
            size_bytes: 1 << 28,
        };
        let mut ours = descriptor(arguments, vec![region("ram1"), region("ram0")]);
        assert_eq!(judge(&ours, &["/usr/bin".into()]), []);
        let outside = judge(&ours, &["/boot".into()]);
        assert_eq!(
            outside.len(),
            2,
            "kernel and disk, both at once: {outside:?}"
        );
        ours.regions[1].size_bytes += 4096;
        assert_eq!(
            judge(&ours, &["/usr/bin".into()]).len(),
            1,
            "memory as announced"
        );
    }

    #[test]
    fn the_usual_arguments_of_others_are_accepted() {
        for line in [
            &["-name", "guest=web,debug-threads=on"][..],
            &["-rtc", "base=utc,driftfix=slew"],
            &["-cpu", "Skylake-Client,+vmx,-hle,model-id=Some CPU"],
            &["-boot", "menu=on,strict=on"],
            &["-global", "ICH9-LPC.disable_s3=1"],
            &["-object", "rng-random,id=r,filename=/dev/urandom"],
            &["-device", "virtio-rng-pci,rng=r,id=rng0,bus=pci.4,addr=0x0"],
            &["-netdev", "user,id=n"],
            &[
                "-netdev",
                "tap,id=n,ifname=t,script=no,downscript=no,vhost=on",
            ],
            &["-smbios", "type=1,manufacturer=x,uuid=y"],
            &["-smp", "4,sockets=1,cores=4,threads=1"],
            &["-accel", "tcg,thread=multi"],
            &["-chardev", "file,id=c,path=@VM_DIR@/console.log,append=on"],
        ] {
            assert_eq!(refusals(line), [], "{line:?}");
        }
    }

    #[test]
    fn the_files_behind_an_image_are_judged_too() {
        use super::image::tests::{FORMAT, header};
        let dir = tempfile::tempdir().unwrap();
        let image = |name: &str, behind: &str, format: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, header(behind, &[(FORMAT, format)])).unwrap();
            let drive = format!("file={},format=qcow2,if=none,id=d", path.display());
            let arguments = vec!["-drive".to_owned(), drive];
            judge(&descriptor(arguments, Vec::new()), &[dir.path().to_owned()])
        };
        assert_eq!(image("base", "", "raw"), []);
        assert_eq!(image("overlay", "base", "qcow2"), []);
        assert_eq!(image("over-overlay", "overlay", "qcow2"), []);
        for (behind, format) in [
            ("/etc/passwd", "raw"),
            ("../../../../../../etc/passwd", "raw"),
            ("/dev/zero", "raw"),
            ("missing", "raw"),
            ("loop", "qcow2"),
        ] {
            assert_eq!(image("loop", behind, format).len(), 1, "{behind}");
        }
    }

    #[test]
    fn a_long_command_line_is_refused_as_a_whole() {
        assert_eq!(refusals(&["-append"; 600]).len(), 1);
        assert_eq!(refusals(&["-append", &"a".repeat(9000)]).len(), 1);
    }

    const PATH_OPTIONS: [&str; 13] = [
        "-kernel", "-drive", "-chardev", "-serial", "-device", "-object", "-netdev", "-machine",
        "-global", "-boot", "-accel", "-smbios", "-k",
    ];

    proptest! {
        #[test]
        fn no_path_outside_is_ever_accepted(
            option in prop::sample::select(PATH_OPTIONS.to_vec()),
            prefix in "[a-z,=:{}\"@]{0,20}",
            key in prop::sample::select(vec!["", "file=", "path=", "script=", "romfile="]),
            suffix in "[a-z,=:{}\"@./]{0,20}",
        ) {
            let value = format!("{prefix}{key}{suffix}/etc/shadow");
            let accepted = !refused(&[option, &value]);
            prop_assert!(!accepted, "{option} {value}");
        }

        #[test]
        fn what_is_added_to_a_good_argument_never_brings_in_a_path(
            good in prop::sample::select(vec![
                ("-netdev", "tap,id=n,ifname=t,script=no,downscript=no"),
                ("-device", "virtio-net-pci,netdev=n"),
                ("-chardev", "file,id=c,path=@VM_DIR@/c.log"),
                ("-drive", "file=/usr/bin/env,format=raw,if=none,id=d"),
                ("-object", "iothread,id=i"),
                ("-machine", "q35,smm=off"),
                ("-accel", "tcg"),
                ("-boot", "order=c"),
            ]),
            added in "[,=a-z]{0,6}[a-z-]{0,10}[,=]{1,2}[a-z.]{0,4}/etc/shadow[,=a-z]{0,8}",
        ) {
            let value = format!("{},{added}", good.1);
            prop_assert!(refused(&[good.0, &value]), "{} {value}", good.0);
        }

        #[test]
        fn arbitrary_arguments_never_panic(arguments in prop::collection::vec(".{0,40}", 0..8)) {
            let _ = judge(&descriptor(arguments, Vec::new()), &["/usr/bin".into()]);
        }

        #[test]
        fn arbitrary_values_never_panic(
            option in prop::sample::select(PATH_OPTIONS.to_vec()),
            value in "[a-z0-9,=:./{}\"@é-]{0,60}",
        ) {
            let _ = refused(&[option, &value]);
        }
    }
}
