//! Migrations that must not happen: each is refused with its reason, and the VM goes on where it is.
#![forbid(unsafe_code)]

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_api::control::{AbortAnswer, AbortOutcome, ErrorKind, Outcome, Phase};
use palanquin_lab::control;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::{PORT, SHORT, Told};
use palanquin_lab::paths::guest_dir;
use palanquin_lab::qemu::Qemu;
use palanquin_lab::rig::{Rig, RigSpec};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection};

/// Exit status of a refusal by identity or policy.
const REFUSED: i32 = 3;
/// Exit status where the VM or a host can't.
const BLOCKED: i32 = 4;
/// Exit status of a migration that ended on the source.
const ABORTED: i32 = 5;

fn with_guest(name: &str) -> Result<Rig> {
    let rig = Rig::new(&RigSpec::default())?;
    rig.hosts[0].boot(&GuestSpec::small(name))?;
    Ok(rig)
}

fn has_blocker(told: &Told, code: &str) -> Result<()> {
    let error = told.error()?;
    let found = error.blockers.iter().find(|blocker| blocker.code == code);
    let blocker = found.with_context(|| format!("no blocker {code} in {error:?}"))?;
    ensure!(
        !blocker.remedy.is_empty(),
        "{blocker:?} says not what to do"
    );
    Ok(())
}

#[test]
fn a_destination_whose_agent_is_absent_blocks_until_it_is_back() -> Result<()> {
    let mut rig = with_guest("lonely")?;
    rig.hosts[1].stop_agent()?;
    let told = rig.migrate("lonely", 0, 1, &[])?.expect_status(BLOCKED)?;
    let error = told.error()?;
    ensure!(error.hint.is_some(), "{error:?}");
    rig.hosts[1].start_agent()?;
    rig.check_lives_once("lonely", 0)?;
    rig.move_vm("lonely", 0, 1)?;
    Ok(())
}

#[test]
fn a_destination_without_enough_memory_blocks_before_anything_moves() -> Result<()> {
    let mut rig = with_guest("large")?;
    rig.hosts[1].stop_agent()?;
    rig.hosts[1].spec.memory_reserve_mib = 1 << 22;
    rig.hosts[1].write_config()?;
    rig.hosts[1].start_agent()?;
    let told = rig.migrate("large", 0, 1, &[])?.expect_status(BLOCKED)?;
    has_blocker(&told, "memory-short")?;
    // The doctor knows it without a migration.
    let doctor = rig.hosts[0].palanquin(&["doctor", "--to", "b", "--vm", "large"])?;
    ensure!(format!("{doctor:?}").contains("memory-short"), "{doctor:?}");
    rig.check_lives_once("large", 0)?;
    Ok(())
}

#[test]
fn a_name_that_the_destination_has_already_blocks() -> Result<()> {
    let rig = with_guest("twin")?;
    rig.hosts[1].boot(&GuestSpec::small("twin"))?;
    let told = rig.migrate("twin", 0, 1, &[])?.expect_status(BLOCKED)?;
    ensure!(!told.error()?.blockers.is_empty(), "{told:?}");
    for host in &rig.hosts {
        ensure!(
            host.runs("twin")? && host.qemus()?.len() == 1,
            "{}",
            rig.logs()
        );
        host.console("twin")?.wait_beats(2, SHORT)?;
    }
    Ok(())
}

#[test]
fn a_host_of_another_authority_is_refused_from_both_sides() -> Result<()> {
    let mut rig = with_guest("picky")?;
    rig.authority("other")?;
    let foreign = rig.issue("other", "host", "b")?;
    rig.hosts[1].stop_agent()?;
    rig.hosts[1].spec.identity = foreign;
    rig.hosts[1].write_config()?;
    rig.hosts[1].start_agent()?;
    let told = rig.migrate("picky", 0, 1, &[])?.expect_status(REFUSED)?;
    ensure!(told.error()?.kind == ErrorKind::Refused, "{told:?}");
    rig.check_lives_once("picky", 0)?;
    // And the other way: a stranger brings a VM.
    rig.hosts[1].boot(&GuestSpec::small("gift"))?;
    rig.migrate("gift", 1, 0, &[])?.expect_status(REFUSED)?;
    ensure!(rig.hosts[0].vm("gift")?.is_none(), "{}", rig.logs());
    ensure!(
        rig.hosts[0].qemus()?.len() == 1,
        "a container was made for a stranger"
    );
    ensure!(rig.hosts[1].runs("gift")?, "{}", rig.logs());
    Ok(())
}

#[test]
fn an_operators_certificate_makes_no_host() -> Result<()> {
    let mut rig = with_guest("careful")?;
    let operator = rig.issue("ca", "operator", "b")?;
    rig.hosts[1].stop_agent()?;
    let host = std::mem::replace(&mut rig.hosts[1].spec.identity, operator.clone());
    rig.hosts[1].write_config()?;
    // Its own agent does not even start with it.
    rig.hosts[1].launch_agent(&[])?;
    rig.hosts[1].wait_agent_died(SHORT)?;
    ensure!(
        rig.hosts[1].log_tail().contains("/operator/b"),
        "{}",
        rig.logs()
    );

    // An impostor with other software is refused by the source.
    let listener = rig.hosts[1]
        .namespace
        .inside(|| Ok(TcpListener::bind(("0.0.0.0", PORT))?))?;
    let config = impostor(&operator)?;
    let answering = std::thread::spawn(move || answer(&listener, &config));
    let told = rig.migrate("careful", 0, 1, &[])?.expect_status(REFUSED)?;
    ensure!(told.error()?.kind == ErrorKind::Refused, "{told:?}");
    let heard = answering
        .join()
        .map_err(|_| anyhow::anyhow!("the impostor panicked"))??;
    ensure!(heard == 0, "the impostor was told {heard} bytes");
    // The real one is welcome.
    rig.hosts[1].spec.identity = host;
    rig.hosts[1].write_config()?;
    rig.hosts[1].start_agent()?;
    rig.move_vm("careful", 0, 1)?;
    Ok(())
}

/// TLS with the operator's certificate, as an agent's would look.
fn impostor(identity: &std::path::Path) -> Result<Arc<ServerConfig>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = CertificateDer::pem_file_iter(identity.join("b.pem"))?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(identity.join("b.key"))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"palanquin-control/1".to_vec()];
    Ok(Arc::new(config))
}

/// Answers one connection; gives how many bytes of the source's it could read.
fn answer(listener: &TcpListener, config: &Arc<ServerConfig>) -> Result<usize> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut tls = ServerConnection::new(Arc::clone(config))?;
    let mut heard = 0;
    // Until the source hangs up, in whatever words.
    while let Ok((read, _)) = tls.complete_io(&mut stream) {
        heard += tls.process_new_packets()?.plaintext_bytes_to_read();
        if read == 0 {
            break;
        }
    }
    Ok(heard)
}

#[test]
fn private_guest_memory_is_refused_with_what_to_do() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let guest = GuestSpec::small("private");
    let dir = guest_dir()?;
    let arguments = [
        "-accel",
        "tcg",
        "-m",
        "192M",
        "-machine",
        "q35",
        "-kernel",
        &dir.join("vmlinuz").display().to_string(),
        "-initrd",
        &dir.join("initrd.gz").display().to_string(),
        "-append",
        &guest.command_line(),
    ]
    .map(str::to_owned);
    let host = &rig.hosts[0];
    let command = host.namespace.command("qemu-system-x86_64");
    let qemu = Qemu::start(command, &host.dir().join("by-hand"), arguments)?;
    qemu.console().wait_for("palanquin-workload ready", SHORT)?;
    let (pid, qmp) = (
        qemu.pid().to_string(),
        qemu.qmp_path().display().to_string(),
    );
    let adopted = host.palanquin(&["vm", "adopt", "private", "--pid", &pid, "--qmp", &qmp])?;
    // Whether it is refused at adoption or at the migration, it says why.
    let told = if adopted.status == 0 {
        rig.migrate("private", 0, 1, &[])?
    } else {
        adopted
    };
    let told = told.expect_status(BLOCKED)?;
    has_blocker(&told, "ram-private")?;
    // Whoever started it still has it.
    qemu.console().wait_beats(3, SHORT)?;
    ensure!(
        rig.hosts[1].qemus()?.is_empty(),
        "a container is left behind"
    );
    Ok(())
}

#[test]
fn an_abort_during_the_rounds_leaves_the_vm_on_the_source() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    rig.hosts[0].boot(&GuestSpec::small("wavering").filled(64))?;
    let (running, id) = rig.begin_slow_migration("wavering", 0, 1)?;
    let told = rig.hosts[0]
        .palanquin(&["migration", "abort", &id.to_string()])?
        .expect_status(0)?;
    let answer: AbortAnswer = serde_json::from_str(&told.stdout)?;
    ensure!(
        answer.outcome == AbortOutcome::RunningOnSource,
        "{answer:?}"
    );
    let told = running.finish(SHORT)?.expect_status(ABORTED)?;
    let info = rig.hosts[0].migration(id)?;
    ensure!(
        info.outcome == Some(Outcome::RunningOnSource),
        "{told:?} {info:?}"
    );
    ensure!(info.phase == Phase::Done, "{info:?}");
    rig.check_lives_once("wavering", 0)?;
    rig.move_vm("wavering", 0, 1)?;
    Ok(())
}

#[test]
fn the_observe_socket_answers_and_changes_nothing() -> Result<()> {
    let rig = with_guest("watched")?;
    let socket = rig.hosts[0].observe_socket();
    let metrics = control::request(&socket, "GET", "/metrics", &[])?;
    ensure!(metrics.status == 200, "{metrics:?}");
    let stop = control::request(&socket, "POST", "/v1/vms/watched/stop", b"{}")?;
    ensure!(stop.status == 404 || stop.status == 405, "{stop:?}");
    rig.check_lives_once("watched", 0)?;
    Ok(())
}
