//! What hosts promise each other: who promises more than it gives is found out by a reservation, and nothing is sent there.
#![forbid(unsafe_code)]

#[path = "shared/forger.rs"]
mod forger;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use palanquin_api::advertisement::{AdvertisementInfo, Advertisements};
use palanquin_api::control::{Outcome, Side};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::{Host, Told};
use palanquin_lab::rig::Rig;
use palanquin_lab::trust::{JudgingRig, decisions, identity};
use palanquin_trust::Sha256;
use palanquin_trust::advertisement::needed_bytes;
use uuid::Uuid;

use forger::Forger;

/// Exit statuses of a refusal by a gate, and of something that stands in the way.
const REFUSED: i32 = 3;
const BLOCKED: i32 = 4;
/// A handshake, a greeting and an offer are shorter; the smallest guest is a thousand times longer.
const TALK_MAX: u64 = 128 * 1024;
/// Hosts look for each other's hardware addresses, and nothing else.
const SILENCE_MAX: u64 = 2048;
const GIB: u64 = 1 << 30;
const RAM: u64 = 192 << 20;

const VM: Uuid = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_0003);

/// Two hosts that judge, and a VM with its owner's passport on the first.
fn with_guest(judging: JudgingRig, name: &str) -> Result<JudgingRig> {
    let passport = judging.passport(VM, 1, "")?;
    judging.rig.hosts[0].boot_with(&GuestSpec::small(name), &["--passport", &passport])?;
    Ok(judging)
}

fn accept(host: &Host, parcel: &[u8]) -> Result<Told> {
    let file = host.dir().join("parcel");
    std::fs::write(&file, parcel)?;
    host.palanquin(&["advertisement", "accept", &file.display().to_string()])
}

fn list(host: &Host) -> Result<Advertisements> {
    let told = host.palanquin(&["advertisement", "ls"])?.expect_status(0)?;
    Ok(serde_json::from_str(&told.stdout)?)
}

/// Has a host make an advertisement for another, as its operator does; the bytes of the file, and what it says.
fn make(host: &Host, audience: &str, more: &[&str]) -> Result<(Vec<u8>, AdvertisementInfo)> {
    let out = host.dir().join(format!("for-{audience}"));
    let _ = std::fs::remove_file(&out);
    let shown = out.display().to_string();
    let words = ["advertisement", "make", "--for", audience, "--out", &shown];
    let told = host.palanquin(&[&words[..], more].concat())?;
    let told = told.expect_status(0)?;
    Ok((std::fs::read(&out)?, serde_json::from_str(&told.stdout)?))
}

/// The command was refused by that gate of the first host, with what to do about it.
fn refused_by(told: &Told, gate: &str, code: &str) -> Result<()> {
    let error = told.error()?;
    let found = error.blockers.iter().find(|blocker| blocker.code == code);
    let blocker = found.with_context(|| format!("no {code} in {error:?}"))?;
    ensure!(
        blocker.side == Side::Source && blocker.gate.as_deref() == Some(gate),
        "{blocker:?}"
    );
    ensure!(
        !blocker.remedy.is_empty(),
        "{blocker:?} says not what to do"
    );
    Ok(())
}

/// The last decision of a host on that action was a refusal by that gate.
fn journaled(host: &Host, action: &str, gate: &str, code: &str) -> Result<Option<Uuid>> {
    let all = decisions(host)?;
    let last = all.iter().rfind(|decision| decision.action == action);
    let decision = last.with_context(|| format!("{action} was not decided: {all:?}"))?;
    let reasons = &decision.reasons;
    ensure!(
        !decision.permitted && reasons.iter().any(|r| r.gate == gate && r.code == code),
        "{decision:?}"
    );
    ensure!(decision.operator == identity("operator", "alice"));
    Ok(decision.migration)
}

/// No page left the first host, and the VM runs there and nowhere else.
fn nothing_moved(rig: &Rig, vm: &str) -> Result<()> {
    for info in rig.hosts[0].migrations()? {
        ensure!(
            info.pages_sent == 0 && info.bytes_guest == 0 && info.pages_zero == 0,
            "{info:?}"
        );
        ensure!(info.outcome == Some(Outcome::RunningOnSource), "{info:?}");
    }
    rig.check_lives_once(vm, 0)?;
    Ok(())
}

fn restart(host: &mut Host, memory_reserve_mib: u64) -> Result<()> {
    host.stop_agent()?;
    host.spec.memory_reserve_mib = memory_reserve_mib;
    host.write_config()?;
    host.start_agent()
}

#[test]
fn a_host_that_promises_more_than_it_has_gets_nothing_until_it_is_pardoned() -> Result<()> {
    let mut judging = with_guest(JudgingRig::new()?, "lured")?;
    let reserve = judging.rig.hosts[1].spec.memory_reserve_mib;
    // The second host has nothing to give, and its agent would not say otherwise.
    restart(&mut judging.rig.hosts[1], 1 << 22)?;
    let out = judging.rig.dir().join("none").display().to_string();
    let words = ["advertisement", "make", "--for", "a", "--out", &out];
    judging.rig.hosts[1]
        .palanquin(&words)?
        .expect_status(BLOCKED)?;
    let liar = Forger::new(&judging.rig.hosts[1].spec.identity, "b")?;
    let lie = liar.parcel(|_| {})?.to_bytes()?;
    accept(&judging.rig.hosts[0], &lie)?.expect_status(0)?;
    let accepted = list(&judging.rig.hosts[0])?.accepted;
    ensure!(
        accepted.len() == 1 && accepted[0].memory_left_bytes == 1024 * GIB,
        "{accepted:?}"
    );
    {
        let rig = &judging.rig;
        let recording = rig.record()?;
        let told = rig.migrate("lured", 0, 1, &[])?.expect_status(REFUSED)?;
        refused_by(&told, "attestation", "advertisement-false")?;
        // What the other host said to it is told, too.
        let error = told.error()?;
        ensure!(
            error
                .blockers
                .iter()
                .any(|blocker| blocker.code == "memory-short" && blocker.side == Side::Destination),
            "{error:?}"
        );
        let gate = ("attestation", "advertisement-false");
        let migration = journaled(&rig.hosts[0], "migrateOut", gate.0, gate.1)?;
        let infos = rig.hosts[0].migrations()?;
        ensure!(
            infos.len() == 1 && migration == Some(infos[0].id),
            "{infos:?}"
        );
        let shown = infos[0].gate_decisions.last().context("none is shown")?;
        ensure!(!shown.permitted, "{shown:?}");
        ensure!(recording.finish()?.bytes < TALK_MAX);
        ensure!(rig.hosts[1].qemus()?.is_empty() && rig.hosts[1].vms()?.is_empty());
        nothing_moved(rig, "lured")?;
        let quarantined = list(&rig.hosts[0])?.quarantined;
        ensure!(
            quarantined.len() == 1
                && quarantined[0].host == identity("host", "b")
                && quarantined[0].code == "advertisement-false",
            "{quarantined:?}"
        );
    }
    // Nobody is dialled any more, also after a restart of the agent, and no other word of that host counts.
    for restarted in [false, true] {
        if restarted {
            let reserve = judging.rig.hosts[0].spec.memory_reserve_mib;
            restart(&mut judging.rig.hosts[0], reserve)?;
        }
        let rig = &judging.rig;
        let recording = rig.record()?;
        let told = rig.migrate("lured", 0, 1, &[])?.expect_status(REFUSED)?;
        refused_by(&told, "attestation", "host-quarantined")?;
        journaled(
            &rig.hosts[0],
            "migrateOut",
            "attestation",
            "host-quarantined",
        )?;
        ensure!(recording.finish()?.bytes < SILENCE_MAX);
        let another = liar.parcel(|says| says.sequence += 1)?.to_bytes()?;
        let told = accept(&rig.hosts[0], &another)?.expect_status(REFUSED)?;
        refused_by(&told, "attestation", "host-quarantined")?;
        journaled(
            &rig.hosts[0],
            "acceptAdvertisement",
            "attestation",
            "host-quarantined",
        )?;
        nothing_moved(rig, "lured")?;
    }
    let doctor = judging.rig.hosts[0].palanquin(&["doctor"])?;
    ensure!(
        doctor.stdout.contains("until somebody pardons it"),
        "{doctor:?}"
    );
    // It is put in order and pardoned; what it had promised falsely is not believed again.
    restart(&mut judging.rig.hosts[1], reserve)?;
    let rig = &judging.rig;
    let pardon = ["advertisement", "pardon", "b"];
    rig.hosts[0].palanquin(&pardon)?.expect_status(0)?;
    let all = decisions(&rig.hosts[0])?;
    let last = all.last().context("nothing was decided")?;
    ensure!(last.action == "pardon" && last.permitted, "{last:?}");
    ensure!(rig.hosts[0].palanquin(&pardon)?.status != 0);
    let told = accept(&rig.hosts[0], &lie)?.expect_status(REFUSED)?;
    refused_by(&told, "identity", "advertisement-not-newest")?;
    let (parcel, _) = make(&rig.hosts[1], "a", &[])?;
    accept(&rig.hosts[0], &parcel)?.expect_status(0)?;
    rig.move_vm("lured", 0, 1)?;
    Ok(())
}

#[test]
fn what_a_host_measures_and_promises_it_keeps() -> Result<()> {
    let judging = with_guest(JudgingRig::new()?, "invited")?;
    let rig = &judging.rig;
    let (parcel, says) = make(&rig.hosts[1], "a", &["--memory", "2GiB"])?;
    ensure!(
        says.memory_free_bytes == 2 * GIB
            && says.memory_total_bytes > says.memory_free_bytes
            && says.cpu_threads > 0
            && says.hypervisor_sha256.is_some(),
        "{says:?}"
    );
    accept(&rig.hosts[0], &parcel)?.expect_status(0)?;
    // Once more the same changes nothing.
    accept(&rig.hosts[0], &parcel)?.expect_status(0)?;
    // All that is left is promised to a third host.
    let (_, rest) = make(&rig.hosts[1], "c", &[])?;
    ensure!(
        rest.memory_free_bytes < rest.memory_total_bytes - 2 * GIB,
        "{rest:?}"
    );
    let promised = list(&rig.hosts[1])?.promised;
    ensure!(
        promised.len() == 2 && promised[0].left_bytes == 2 * GIB,
        "{promised:?}"
    );
    // So nothing large may begin there,
    let spec = rig.hosts[1].dir().join("greedy.toml");
    let greedy = GuestSpec {
        memory_mib: vec![rest.memory_free_bytes >> 21],
        ..GuestSpec::small("greedy")
    };
    std::fs::write(&spec, greedy.to_toml()?)?;
    let passport = judging.passport(Uuid::from_u128(2), 1, "")?;
    let spec = spec.display().to_string();
    let told = rig.hosts[1]
        .palanquin(&["vm", "run", &spec, "--passport", &passport])?
        .expect_status(BLOCKED)?;
    ensure!(told.error()?.message.contains("promised"), "{told:?}");
    // and what was promised to the first is there for it.
    let recorded = decisions(&rig.hosts[0])?.len();
    rig.move_vm("invited", 0, 1)?;
    ensure!(
        decisions(&rig.hosts[0])?[recorded..]
            .iter()
            .all(|decision| decision.permitted)
    );
    let left = 2 * GIB - needed_bytes(RAM);
    let promised = list(&rig.hosts[1])?.promised;
    ensure!(promised[0].left_bytes == left, "{promised:?}");
    let accepted = list(&rig.hosts[0])?.accepted;
    ensure!(accepted[0].memory_left_bytes == left, "{accepted:?}");
    ensure!(list(&rig.hosts[0])?.quarantined.is_empty());
    Ok(())
}

#[test]
fn a_host_that_refuses_more_than_it_has_promised_has_not_lied() -> Result<()> {
    let mut judging = with_guest(JudgingRig::new()?, "unlucky")?;
    restart(&mut judging.rig.hosts[1], 1 << 22)?;
    let honest = Forger::new(&judging.rig.hosts[1].spec.identity, "b")?;
    let rig = &judging.rig;
    // The VM would fit, but not with the margin; and then it would, but what was sent before counts.
    let promises = [(RAM + (70 << 20)), (needed_bytes(RAM) * 2)];
    for (round, promise) in promises.into_iter().enumerate() {
        let parcel = honest.parcel(|says| {
            says.sequence += 1 + round as u64;
            says.memory_free_bytes = promise;
        })?;
        accept(&rig.hosts[0], &parcel.to_bytes()?)?.expect_status(0)?;
        let told = rig.migrate("unlucky", 0, 1, &[])?.expect_status(BLOCKED)?;
        let error = told.error()?;
        ensure!(
            error.blockers.len() == 1 && error.blockers[0].code == "memory-short",
            "{error:?}"
        );
        ensure!(list(&rig.hosts[0])?.quarantined.is_empty());
        nothing_moved(rig, "unlucky")?;
    }
    Ok(())
}

#[test]
fn an_advertisement_that_breaks_a_rule_is_refused_by_its_name() -> Result<()> {
    let judging = JudgingRig::new()?;
    let rig = &judging.rig;
    rig.authority("other")?;
    let foreign = rig.issue("other", "host", "b")?;
    let of = |dir: &Path, name: &str| Forger::new(dir, name);
    let (b, a) = (
        of(&rig.hosts[1].spec.identity, "b")?,
        of(&rig.hosts[0].spec.identity, "a")?,
    );
    let mut altered = b.parcel(|_| {})?;
    *altered.envelope.last_mut().context("empty")? ^= 1;
    let mut torn = b.parcel(|_| {})?.to_bytes()?;
    torn.pop();
    let elsewhere = identity("host", "c").parse()?;
    let old = b.parcel(|says| {
        says.issued_unix_s -= 1000;
        says.expires_unix_s -= 1000;
    })?;
    let early = b.parcel(|says| {
        says.issued_unix_s += 1000;
        says.expires_unix_s += 1000;
    })?;
    let odd = [
        (old.to_bytes()?, "advertisement-expired"),
        (early.to_bytes()?, "advertisement-expired"),
        (altered.to_bytes()?, "signature-invalid"),
        (torn, "advertisement-malformed"),
        (
            b.parcel(|says| says.audience = elsewhere)?.to_bytes()?,
            "advertisement-other-audience",
        ),
        // Another host's key and certificate under this host's name.
        (a.parcel(|_| {})?.to_bytes()?, "signer-wrong"),
        (
            of(&foreign, "b")?.parcel(|_| {})?.to_bytes()?,
            "certificate-refused",
        ),
        (
            b.parcel(|says| says.region = Some("de".to_owned()))?
                .to_bytes()?,
            "advertisement-other-place",
        ),
    ];
    let host = &rig.hosts[0];
    for (parcel, code) in &odd {
        let told = accept(host, parcel)?.expect_status(REFUSED)?;
        refused_by(&told, "identity", code)?;
        journaled(host, "acceptAdvertisement", "identity", code)?;
        ensure!(list(host)? == Advertisements::default(), "{code}");
    }
    let newer = b.parcel(|says| says.sequence += 5)?.to_bytes()?;
    accept(host, &newer)?.expect_status(0)?;
    let older = b.parcel(|_| {})?.to_bytes()?;
    let told = accept(host, &older)?.expect_status(REFUSED)?;
    refused_by(&told, "identity", "advertisement-not-newest")?;
    ensure!(list(host)?.accepted.len() == 1);
    Ok(())
}

#[test]
fn a_host_whose_evidence_proves_another_hypervisor_than_it_advertises_gets_no_page() -> Result<()> {
    let judging = with_guest(JudgingRig::attesting(false)?, "wary")?;
    let rig = &judging.rig;
    let liar = Forger::new(&rig.hosts[1].spec.identity, "b")?;
    // What its agent measures is what its TPM signs.
    let (parcel, _) = make(&rig.hosts[1], "a", &["--memory", "2GiB"])?;
    accept(&rig.hosts[0], &parcel)?.expect_status(0)?;
    rig.move_vm("wary", 0, 1)?;
    rig.move_vm("wary", 1, 0)?;
    let lie = liar.parcel(|says| {
        says.sequence += 200;
        says.memory_free_bytes = 2 * GIB;
        says.hypervisor_sha256 = Some(Sha256([7; 32]));
    })?;
    accept(&rig.hosts[0], &lie.to_bytes()?)?.expect_status(0)?;
    let recording = rig.record()?;
    let told = rig.migrate("wary", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, "attestation", "advertisement-false")?;
    let gate = ("attestation", "advertisement-false");
    let migration = journaled(&rig.hosts[0], "migrateOut", gate.0, gate.1)?;
    ensure!(recording.finish()?.bytes < TALK_MAX);
    let info = rig.hosts[0].migration(migration.context("no migration")?)?;
    ensure!(
        info.pages_sent == 0 && info.bytes_guest == 0 && info.pages_zero == 0,
        "{info:?}"
    );
    ensure!(info.outcome == Some(Outcome::RunningOnSource), "{info:?}");
    rig.check_lives_once("wary", 0)?;
    // Its registers are as they must be, and it stays in quarantine all the same.
    let told = rig.migrate("wary", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, "attestation", "host-quarantined")?;
    Ok(())
}
