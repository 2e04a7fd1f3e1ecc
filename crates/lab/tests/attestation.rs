//! What a host shows by its TPM decides: before a page is sent, and once more before the commit.
#![forbid(unsafe_code)]

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_api::control::{Outcome, Side};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::{SHORT, Told};
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::tpm::Swtpm;
use palanquin_lab::trust::{JudgingRig, decisions};
use palanquin_lab::wait;
use uuid::Uuid;

/// Exit status of a refusal by a gate.
const REFUSED: i32 = 3;
/// A slow migration takes less.
const LONG: Duration = Duration::from_secs(180);
/// The owner wants evidence of whoever takes the VM.
const WANTED: &str = "[attestation]\nmax-age = \"60s\"\n";
const VM: Uuid = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_0002);

fn with_guest(guest: &GuestSpec) -> Result<JudgingRig> {
    with_passport(guest, WANTED)
}

fn with_passport(guest: &GuestSpec, wanted: &str) -> Result<JudgingRig> {
    let judging = JudgingRig::attesting(true)?;
    let passport = judging.passport(VM, 1, wanted)?;
    judging.rig.hosts[0].boot_with(guest, &["--passport", &passport])?;
    Ok(judging)
}

fn refused_by(told: &Told, side: Side, code: &str) -> Result<()> {
    let error = told.error()?;
    let found = error.blockers.iter().find(|blocker| blocker.code == code);
    let blocker = found.with_context(|| format!("no {code} in {error:?}"))?;
    ensure!(
        blocker.side == side && blocker.gate.as_deref() == Some("attestation"),
        "{blocker:?}"
    );
    Ok(())
}

fn stayed(judging: &JudgingRig, vm: &str) -> Result<()> {
    for info in judging.rig.hosts[0].migrations()? {
        ensure!(info.outcome == Some(Outcome::RunningOnSource), "{info:?}");
    }
    judging.rig.check_lives_once(vm, 0)?;
    Ok(())
}

#[test]
fn hosts_that_show_what_they_were_enrolled_with_take_a_vm_whose_owner_wants_that() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("attested"))?;
    let rig = &judging.rig;
    let info = rig.move_vm("attested", 0, 1)?;
    let out: Vec<_> = decisions(&rig.hosts[0])?
        .into_iter()
        .filter(|decision| decision.action == "migrateOut")
        .collect();
    // Decided once, when the evidence was there; what it said at last was the same.
    ensure!(
        out.len() == 1 && out[0].permitted && out[0].migration == Some(info.id),
        "{out:?}"
    );
    rig.move_vm("attested", 1, 0)?;
    Ok(())
}

#[test]
fn a_copy_that_takes_longer_than_evidence_is_good_for_ends_with_new_evidence() -> Result<()> {
    let guest = GuestSpec::small("patient").filled(64);
    let judging = with_passport(&guest, "[attestation]\nmax-age = \"1s\"\n")?;
    let rig = &judging.rig;
    let (running, id) = rig.begin_slow_migration("patient", 0, 1)?;
    let told = running.finish(LONG)?.expect_status(0)?;
    let info = told.migration()?;
    ensure!(info.id == id && info.total_time_ms > 2000.0, "{info:?}");
    rig.check_lives_once("patient", 1)?;
    Ok(())
}

#[test]
fn a_destination_that_has_measured_something_else_gets_no_page_until_it_is_remedied() -> Result<()>
{
    let judging = with_guest(&GuestSpec::small("careful"))?;
    let rig = &judging.rig;
    judging.tpms[1].extend(7, [0xee; 32])?;
    let told = rig.migrate("careful", 0, 1, &[])?.expect_status(REFUSED)?;
    // It knows that itself, and says so before the source has to find out.
    refused_by(&told, Side::Destination, "target-state")?;
    for info in rig.hosts[0].migrations()? {
        ensure!(info.pages_sent == 0 && info.bytes_guest == 0, "{info:?}");
    }
    stayed(&judging, "careful")?;
    ensure!(rig.hosts[1].qemus()?.is_empty() && rig.hosts[1].vms()?.is_empty());
    // Switched off and on, it measures what it did before.
    judging.tpms[1].restart()?;
    rig.move_vm("careful", 0, 1)?;
    Ok(())
}

#[test]
fn a_source_that_has_measured_something_else_brings_nothing() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("suspect"))?;
    let rig = &judging.rig;
    judging.tpms[0].extend(0, [0xee; 32])?;
    let told = rig.migrate("suspect", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Destination, "register-not-allowed")?;
    let doctor = rig.hosts[1].palanquin(&["doctor"])?;
    ensure!(doctor.stdout.contains("in quarantine"), "{doctor:?}");
    stayed(&judging, "suspect")
}

#[test]
fn a_register_that_changes_between_the_check_and_the_switchover_turns_it_back() -> Result<()> {
    // The destination does not look at itself: it is the source that must.
    let judging = JudgingRig::attesting(false)?;
    let rig = &judging.rig;
    let passport = judging.passport(VM, 1, "")?;
    let guest = GuestSpec::small("altered").filled(64);
    rig.hosts[0].boot_with(&guest, &["--passport", &passport])?;
    let (running, id) = rig.begin_slow_migration("altered", 0, 1)?;
    judging.tpms[1].extend(7, [0xee; 32])?;
    ensure!(
        rig.hosts[0].migration(id)?.outcome.is_none(),
        "it was too fast for this test"
    );
    let told = running.finish(LONG)?.expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "register-not-allowed")?;
    let doctor = rig.hosts[0].palanquin(&["doctor"])?;
    ensure!(doctor.stdout.contains("in quarantine"), "{doctor:?}");
    stayed(&judging, "altered")?;
    ensure!(rig.hosts[1].qemus()?.is_empty() && rig.hosts[1].vms()?.is_empty());
    Ok(())
}

#[test]
fn a_host_without_its_tpm_is_refused_and_says_so() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("silent"))?;
    let rig = &judging.rig;
    judging.tpms[1].off()?;
    let told = rig.migrate("silent", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Destination, "target-state")?;
    stayed(&judging, "silent")
}

/// How often the log of a host has that.
fn logged(judging: &JudgingRig, index: usize, text: &str) -> Result<usize> {
    let log = std::fs::read_to_string(judging.rig.hosts[index].log())?;
    Ok(log.matches(text).count())
}

#[test]
fn enrolments_that_are_changed_count_when_they_are_read_again() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("reread"))?;
    let rig = &judging.rig;
    let reload = |times: usize, text: &str| {
        rig.hosts[0].reload_agent();
        wait::until_true(text, SHORT, || Ok(logged(&judging, 0, text)? >= times))
    };
    let (known, away) = (
        judging.enrolled(0).join("b.toml"),
        judging.rig.dir().join("b.away"),
    );
    std::fs::rename(&known, &away)?;
    // Nothing has changed yet.
    rig.move_vm("reread", 0, 1)?;
    rig.move_vm("reread", 1, 0)?;
    reload(1, "enrolments were read again hosts=1")?;
    let told = rig.migrate("reread", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "evidence-missing")?;
    // What is not usable changes nothing: the host is still not known.
    std::fs::write(&known, "nonsense")?;
    reload(1, "the new enrolments are refused; those of before stay")?;
    let told = rig.migrate("reread", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "evidence-missing")?;
    std::fs::rename(&away, &known)?;
    reload(1, "enrolments were read again hosts=2")?;
    rig.move_vm("reread", 0, 1)?;
    Ok(())
}

#[test]
fn a_host_whose_state_was_remedied_by_the_hook_is_checked_again_by_itself() -> Result<()> {
    let mut judging = with_guest(&GuestSpec::small("mended"))?;
    // It says that it was called, and ends when the host was mended: here, when the test did that.
    let dir = judging.rig.dir().join("hook");
    std::fs::create_dir(&dir)?;
    for open in [judging.rig.dir(), dir.as_path()] {
        std::fs::set_permissions(open, std::fs::Permissions::from_mode(0o777))?;
    }
    let shown = dir.display();
    let script = format!("cat > {shown}/told; while [ ! -e {shown}/mended ]; do sleep 0.1; done");
    judging.hook = Some(["/bin/sh", "-c", &script].map(str::to_owned).to_vec());
    judging.set_operator(1, "alice")?;
    judging.rig.hosts[1].stop_agent()?;
    judging.rig.hosts[1].start_agent()?;
    let fine = "this host was checked: it is what was enrolled of it";
    // Once with each start.
    wait::until_true("it is checked at the start", SHORT, || {
        Ok(logged(&judging, 1, fine)? >= 2)
    })?;
    let before = logged(&judging, 1, fine)?;
    judging.tpms[1].extend(7, [0xee; 32])?;
    let rig = &judging.rig;
    let told = rig.migrate("mended", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Destination, "target-state")?;
    wait::until_true("the hook is told what to remedy", SHORT, || {
        let told = std::fs::read_to_string(dir.join("told")).unwrap_or_default();
        Ok(told.contains("register 7"))
    })?;
    let in_quarantine = || -> Result<bool> {
        let doctor = rig.hosts[1].palanquin(&["doctor"])?;
        Ok(doctor.stdout.contains("/host/b is in quarantine"))
    };
    ensure!(in_quarantine()? && logged(&judging, 1, fine)? == before);
    judging.tpms[1].restart()?;
    std::fs::write(dir.join("mended"), "")?;
    // Nobody asks for anything: it is checked because the hook has ended.
    wait::until_true("it is checked again", SHORT, || {
        Ok(logged(&judging, 1, fine)? > before && !in_quarantine()?)
    })?;
    rig.move_vm("mended", 0, 1)?;
    Ok(())
}

#[test]
fn an_agent_with_a_sealed_key_starts_in_the_state_it_was_sealed_in_and_in_no_other() -> Result<()> {
    let mut rig = Rig::without_agents(&RigSpec::default())?;
    let host = &rig.hosts[1];
    let tpm = Swtpm::start_in(&host.namespace, host.dir().join("tpm"))?;
    let (key, kept) = (host.spec.identity.join("b.key"), rig.dir().join("b.kept"));
    std::fs::rename(&key, &kept)?;
    let [kept, sealed] = [&kept, &key].map(|path| path.display().to_string());
    let words = ["attest", "seal", &kept, "--registers", "0,7", "--tpm"];
    let (tcti, out) = (tpm.tcti(), ["--out", &sealed]);
    host.palanquin_inside(&[&words[..], &[&tcti], &out].concat())?
        .expect_status(0)?;
    // No agent could find the key elsewhere.
    std::fs::remove_file(&kept)?;
    ensure!(!std::fs::read_to_string(&key)?.contains("PRIVATE KEY"));
    for host in &mut rig.hosts {
        host.start_agent()?;
    }
    // It is its own key: the other host knows it by that, in both directions.
    rig.hosts[0].boot(&GuestSpec::small("sealed"))?;
    rig.move_vm("sealed", 0, 1)?;
    rig.move_vm("sealed", 1, 0)?;
    rig.hosts[1].stop_agent()?;
    tpm.extend(7, [0xee; 32])?;
    rig.hosts[1].launch_agent(&[])?;
    rig.hosts[1].wait_agent_died(SHORT)?;
    let says =
        "b.key: the measured state is another than when the secret was sealed: registers 7 changed";
    ensure!(rig.hosts[1].log_tail().contains(says), "{}", rig.logs());
    ensure!(!rig.hosts[1].socket().exists() || rig.hosts[1].vms().is_err());
    // Switched off and on, the machine measures what it did before.
    tpm.restart()?;
    rig.hosts[1].start_agent()?;
    rig.move_vm("sealed", 0, 1)?;
    Ok(())
}
