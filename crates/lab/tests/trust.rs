//! Who may move which VM where: each attack is refused by the gate it belongs to, at the host it concerns, and the VM goes
//! on where it is.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use palanquin_agent::gate::HostSigner;
use palanquin_agent::gate::credentials::Credentials;
use palanquin_agent::identity::key_of_certificate;
use palanquin_agent::net::wire::WireChannel;
use palanquin_agent::tls::{Material, Tls};
use palanquin_api::control::{GateDecision, Outcome, Side, Strategy};
use palanquin_engine::ids::{Challenge32, Epoch, VmId};
use palanquin_engine::message::{Hello, Offer, Refused};
use palanquin_engine::strategy::PostCopyUse;
use palanquin_engine::{Message, MigrationId, Order};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::{Host, PORT, SHORT, Told};
use palanquin_lab::rig::Rig;
use palanquin_lab::trust::{DOMAIN, JudgingRig, PERMISSIVE, decisions, identity};
use palanquin_lab::wait;
use palanquin_trust::{Identity, Order as SignedOrder, Sha256, Signed};
use uuid::Uuid;

/// Exit status of a refusal by a gate.
const REFUSED: i32 = 3;
/// A slow migration takes less.
const LONG: Duration = Duration::from_secs(180);
/// A handshake, a greeting and an offer are shorter; the smallest guest is a thousand times longer.
const TALK_MAX: u64 = 128 * 1024;

const VM: Uuid = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_0001);

/// Two hosts that judge, and a VM with its owner's passport on the first.
fn with_guest(guest: &GuestSpec) -> Result<JudgingRig> {
    let judging = JudgingRig::new()?;
    let passport = judging.passport(VM, 1, "")?;
    judging.rig.hosts[0].boot_with(guest, &["--passport", &passport])?;
    Ok(judging)
}

fn forbidding(action: &str) -> String {
    format!(
        "{PERMISSIVE}\n@id(\"frozen\")\n@reason(\"nothing moves today\")\n\
         @remedy(\"Come back tomorrow.\")\nforbid (principal, action == Action::\"{action}\", resource);\n"
    )
}

/// The command was refused by that gate, on that side, with what to do about it.
fn refused_by(told: &Told, side: Side, gate: &str, code: &str) -> Result<()> {
    let error = told.error()?;
    let blockers = &error.blockers;
    let found = blockers.iter().find(|blocker| blocker.code == code);
    let blocker = found.with_context(|| format!("no {code} in {error:?}"))?;
    ensure!(
        blocker.side == side && blocker.gate.as_deref() == Some(gate),
        "{blocker:?}"
    );
    ensure!(
        !blocker.remedy.is_empty(),
        "{blocker:?} says not what to do"
    );
    Ok(())
}

/// The last decision of a host on that action: refused by that gate.
fn journaled(host: &Host, action: &str, gate: &str, code: &str) -> Result<GateDecision> {
    let all = decisions(host)?;
    let last = all.iter().rfind(|decision| decision.action == action);
    let decision = last.with_context(|| format!("{action} was not decided: {all:?}"))?;
    let reasons = &decision.reasons;
    ensure!(
        !decision.permitted && reasons.iter().any(|r| r.gate == gate && r.code == code),
        "{decision:?}"
    );
    Ok(decision.clone())
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

#[test]
fn a_move_that_both_hosts_permit_takes_the_passport_along_and_is_journaled() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("traveller"))?;
    let rig = &judging.rig;
    let info = rig.move_vm("traveller", 0, 1)?;
    ensure!(
        info.operator == Some(identity("operator", "alice")),
        "{info:?}"
    );
    let actions: Vec<_> = info.gate_decisions.iter().map(|d| &*d.action).collect();
    ensure!(actions == ["migrateOut", "erase"], "{info:?}");
    for (host, action) in rig.hosts.iter().zip(["migrateOut", "migrateIn"]) {
        let all = decisions(host)?;
        let decision = all.iter().find(|d| d.action == action).context("none")?;
        ensure!(
            decision.permitted
                && decision.permitted_by == ["operators-move"]
                && decision.migration == Some(info.id)
                && decision.policy_sha256.is_some()
                && decision.passport_sha256.is_some(),
            "{decision:?}"
        );
    }
    let there = rig.hosts[1].vm("traveller")?.context("it did not arrive")?;
    let passport = there.passport.context("its passport stayed behind")?;
    ensure!(passport.version == 1, "{passport:?}");
    ensure!(there.uuid == VM);
    // A newer one travels back with it.
    let newer = judging.passport(VM, 2, "")?;
    rig.hosts[1]
        .palanquin(&["vm", "passport", "traveller", &newer])?
        .expect_status(0)?;
    rig.move_vm("traveller", 1, 0)?;
    let back = rig.hosts[0].vm("traveller")?.context("it is not back")?;
    ensure!(back.passport.is_some_and(|passport| passport.version == 2));
    Ok(())
}

#[test]
fn a_vm_without_a_passport_or_with_a_strangers_is_not_taken_over() -> Result<()> {
    let judging = JudgingRig::new()?;
    let host = &judging.rig.hosts[0];
    let spec = host.dir().join("orphan.toml");
    std::fs::write(&spec, GuestSpec::small("orphan").to_toml()?)?;
    let spec = spec.display().to_string();
    let told = host
        .palanquin(&["vm", "run", &spec])?
        .expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "passport", "passport-missing")?;
    journaled(host, "adopt", "passport", "passport-missing")?;
    let passport = judging.passport(VM, 1, "")?;
    let mut bytes = std::fs::read(&passport)?;
    *bytes.last_mut().context("empty")? ^= 1;
    std::fs::write(&passport, bytes)?;
    let words = ["vm", "run", &spec, "--passport", &passport];
    let told = host.palanquin(&words)?.expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "passport", "signature-invalid")?;
    ensure!(host.vms()?.is_empty() && host.qemus()?.is_empty());
    Ok(())
}

#[test]
fn a_source_whose_policies_forbid_it_dials_nobody() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("kept"))?;
    let rig = &judging.rig;
    judging.set_policies(0, &forbidding("migrateOut"))?;
    rig.hosts[0].reload_agent();
    wait_reloaded(&rig.hosts[0])?;
    let recording = rig.record()?;
    let told = rig.migrate("kept", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "policy", "policy-forbids")?;
    ensure!(told.error()?.blockers[0].remedy == "Come back tomorrow.");
    journaled(&rig.hosts[0], "migrateOut", "policy", "policy-forbids")?;
    ensure!(rig.hosts[0].migrations()?.is_empty());
    let capture = recording.finish()?;
    // At most that hosts look for each other's hardware addresses.
    ensure!(capture.bytes < 2048 && capture.dropped == 0, "{capture:?}");
    nothing_moved(rig, "kept")
}

fn wait_reloaded(host: &Host) -> Result<()> {
    wait::until_true("policies were read again", SHORT, || {
        let log = std::fs::read_to_string(host.log())?;
        Ok(log.contains("policies were read again"))
    })
}

#[test]
fn a_destination_whose_policies_forbid_it_says_so_before_a_page_is_sent() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("unwelcome"))?;
    let rig = &judging.rig;
    judging.set_policies(1, &forbidding("migrateIn"))?;
    rig.hosts[1].reload_agent();
    wait_reloaded(&rig.hosts[1])?;
    // The doctor knows it without a migration.
    let doctor = rig.hosts[0].palanquin(&["doctor", "--to", "b", "--vm", "unwelcome"])?;
    ensure!(doctor.stdout.contains("policy-forbids"), "{doctor:?}");
    let recording = rig.record()?;
    let told = rig
        .migrate("unwelcome", 0, 1, &[])?
        .expect_status(REFUSED)?;
    refused_by(&told, Side::Destination, "policy", "policy-forbids")?;
    let decision = journaled(&rig.hosts[1], "migrateIn", "policy", "policy-forbids")?;
    ensure!(decision.operator == identity("operator", "alice"));
    let capture = recording.finish()?;
    ensure!(capture.bytes < TALK_MAX, "{capture:?}");
    ensure!(rig.hosts[1].qemus()?.is_empty() && rig.hosts[1].vms()?.is_empty());
    nothing_moved(rig, "unwelcome")
}

#[test]
fn a_passport_that_is_older_than_one_the_destination_knows_is_refused() -> Result<()> {
    let judging = JudgingRig::new()?;
    let rig = &judging.rig;
    let (old, new) = (judging.passport(VM, 1, "")?, judging.passport(VM, 2, "")?);
    let guest = GuestSpec::small("revoked");
    // The destination has had the VM with the newer one.
    rig.hosts[1].boot_with(&guest, &["--passport", &new])?;
    rig.hosts[1]
        .palanquin(&["vm", "stop", "revoked"])?
        .expect_status(0)?;
    rig.hosts[0].boot_with(&guest, &["--passport", &old])?;
    let recording = rig.record()?;
    let told = rig.migrate("revoked", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Destination, "passport", "passport-not-newest")?;
    journaled(
        &rig.hosts[1],
        "migrateIn",
        "passport",
        "passport-not-newest",
    )?;
    ensure!(recording.finish()?.bytes < TALK_MAX);
    nothing_moved(rig, "revoked")?;
    // Nor is it taken where the newer one is.
    let host = &rig.hosts[0];
    host.palanquin(&["vm", "passport", "revoked", &new])?
        .expect_status(0)?;
    let told = host
        .palanquin(&["vm", "passport", "revoked", &old])?
        .expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "passport", "passport-not-newest")?;
    rig.move_vm("revoked", 0, 1)?;
    Ok(())
}

#[test]
fn an_operator_of_another_tenant_moves_and_ends_nothing() -> Result<()> {
    let mut judging = with_guest(&GuestSpec::small("foreign"))?;
    judging.set_operator(0, "mallory")?;
    judging.rig.hosts[0].stop_agent()?;
    judging.rig.hosts[0].start_agent()?;
    let rig = &judging.rig;
    let recording = rig.record()?;
    let told = rig.migrate("foreign", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "policy", "policy-no-permit")?;
    let decision = journaled(&rig.hosts[0], "migrateOut", "policy", "policy-no-permit")?;
    ensure!(decision.operator == identity("operator", "mallory"));
    let told = rig.hosts[0]
        .palanquin(&["vm", "stop", "foreign"])?
        .expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "policy", "policy-no-permit")?;
    journaled(&rig.hosts[0], "erase", "policy", "policy-no-permit")?;
    ensure!(recording.finish()?.bytes < 2048);
    nothing_moved(rig, "foreign")
}

#[test]
fn somebody_who_is_no_operator_here_may_look_and_change_nothing() -> Result<()> {
    let mut judging = with_guest(&GuestSpec::small("watched"))?;
    let host = &mut judging.rig.hosts[0];
    let trust = host.spec.trust.as_mut().context("no trust")?;
    *trust = trust.replace("root = ", "4242 = ");
    host.write_config()?;
    host.stop_agent()?;
    host.start_agent()?;
    let rig = &judging.rig;
    let told = rig.migrate("watched", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "identity", "operator-unknown")?;
    let decision = journaled(&rig.hosts[0], "migrateOut", "identity", "operator-unknown")?;
    ensure!(decision.operator == "local user 0", "{decision:?}");
    nothing_moved(rig, "watched")
}

#[test]
fn policies_that_are_edited_during_the_copy_decide_before_the_commit() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("overtaken").filled(64))?;
    let rig = &judging.rig;
    for (index, action) in [(0, "migrateOut"), (1, "migrateIn")] {
        let (running, id) = rig.begin_slow_migration("overtaken", 0, 1)?;
        // What is not usable changes nothing.
        judging.set_policies(index, "permit (nonsense")?;
        rig.hosts[index].reload_agent();
        wait::until_true("the new policies are refused", SHORT, || {
            let log = std::fs::read_to_string(rig.hosts[index].log())?;
            Ok(log.contains("those of before stay"))
        })?;
        judging.set_policies(index, &forbidding(action))?;
        rig.hosts[index].reload_agent();
        wait_reloaded(&rig.hosts[index])?;
        let info = rig.hosts[0].migration(id)?;
        ensure!(info.outcome.is_none(), "it was too fast for this test");
        let told = running.finish(LONG)?.expect_status(REFUSED)?;
        let side = [Side::Source, Side::Destination][index];
        refused_by(&told, side, "policy", "policy-forbids")?;
        let decision = journaled(&rig.hosts[index], action, "policy", "policy-forbids")?;
        ensure!(decision.migration == Some(id), "{decision:?}");
        let info = rig.hosts[0].migration(id)?;
        ensure!(info.outcome == Some(Outcome::RunningOnSource), "{info:?}");
        rig.check_lives_once("overtaken", 0)?;
        judging.set_policies(index, PERMISSIVE)?;
        rig.hosts[index].reload_agent();
        wait::until_true("the policies of before are back", SHORT, || {
            let log = std::fs::read_to_string(rig.hosts[index].log())?;
            Ok(log.matches("policies were read again").count() >= 2)
        })?;
    }
    rig.move_vm("overtaken", 0, 1)?;
    Ok(())
}

#[test]
fn an_abort_is_possible_also_where_the_passport_is_not_believed_any_more() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("orphaned").filled(64))?;
    let rig = &judging.rig;
    let (running, id) = rig.begin_slow_migration("orphaned", 0, 1)?;
    judging.replace_owner_key()?;
    rig.hosts[0].reload_agent();
    wait_reloaded(&rig.hosts[0])?;
    // Nothing else is.
    let told = rig.hosts[0]
        .palanquin(&["vm", "stop", "orphaned"])?
        .expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "passport", "key-unknown")?;
    rig.hosts[0]
        .palanquin(&["migration", "abort", &id.to_string()])?
        .expect_status(0)?;
    running.finish(LONG)?;
    let all = decisions(&rig.hosts[0])?;
    let abort = all.iter().find(|decision| decision.action == "abort");
    let abort = abort.context("the abort is not journaled")?;
    ensure!(
        abort.permitted && abort.permitted_by.is_empty() && abort.reasons.len() == 1,
        "{abort:?}"
    );
    rig.check_lives_once("orphaned", 0)?;
    Ok(())
}

#[test]
fn a_flood_of_migrations_is_stopped_by_quotas() -> Result<()> {
    let mut judging = with_guest(&GuestSpec::small("first").filled(64))?;
    let other = Uuid::from_u128(2);
    let passport = judging.passport(other, 1, "")?;
    let host = &mut judging.rig.hosts[0];
    host.boot_with(&GuestSpec::small("second"), &["--passport", &passport])?;
    host.spec.limits = vec![
        "max-outbound-per-target = 1".to_owned(),
        "starts-per-hour-per-operator = 2".to_owned(),
    ];
    host.write_config()?;
    host.stop_agent()?;
    host.start_agent()?;
    let rig = &judging.rig;
    let (running, id) = rig.begin_slow_migration("first", 0, 1)?;
    let before = rig.hosts[1].migrations()?.len();
    for _ in 0..20 {
        let told = rig.migrate("second", 0, 1, &[])?.expect_status(REFUSED)?;
        refused_by(&told, Side::Source, "quota", "quota-target")?;
    }
    journaled(&rig.hosts[0], "migrateOut", "quota", "quota-target")?;
    ensure!(rig.hosts[1].migrations()?.len() == before, "it was dialled");
    rig.hosts[0]
        .palanquin(&["migration", "abort", &id.to_string()])?
        .expect_status(0)?;
    running.finish(LONG)?;
    rig.migrate("second", 0, 1, &[])?.expect_status(0)?;
    let told = rig.migrate("first", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "quota", "quota-hour-operator")?;
    journaled(&rig.hosts[0], "migrateOut", "quota", "quota-hour-operator")?;
    ensure!(rig.hosts[0].runs("first")? && rig.hosts[1].runs("second")?);
    Ok(())
}

#[test]
fn two_persons_are_needed_where_a_policy_says_so() -> Result<()> {
    let judging = with_guest(&GuestSpec::small("secret"))?;
    let rig = &judging.rig;
    let two = format!(
        "{PERMISSIVE}\n@id(\"two-persons\")\nforbid (principal, action in [Action::\"migrateOut\", \
         Action::\"migrateIn\"], resource)\nunless {{ context.approvals >= 1 && \
         context.approverRoles.contains(Role::\"security-officer\") }};\n"
    );
    for index in [0, 1] {
        judging.set_policies(index, &two)?;
        rig.hosts[index].reload_agent();
        wait_reloaded(&rig.hosts[index])?;
    }
    let told = rig.migrate("secret", 0, 1, &[])?.expect_status(REFUSED)?;
    refused_by(&told, Side::Source, "policy", "policy-forbids")?;
    // An approval of another way is none.
    let other = judging.approval(VM, 1, 0)?;
    let told = rig.migrate("secret", 0, 1, &["--approval", &other])?;
    refused_by(
        &told.expect_status(REFUSED)?,
        Side::Source,
        "policy",
        "policy-forbids",
    )?;
    nothing_moved(rig, "secret")?;
    std::fs::remove_file(&other)?;
    let approval = judging.approval(VM, 0, 1)?;
    rig.migrate("secret", 0, 1, &["--approval", &approval])?
        .expect_status(0)?;
    rig.check_lives_once("secret", 1)?;
    Ok(())
}

/// The first host, as somebody would be who has its key and speaks the protocol as he likes.
struct Impostor {
    tls: Tls,
    signer: HostSigner,
}

impl Impostor {
    fn new(rig: &Rig) -> Result<Self> {
        let dir = &rig.hosts[0].spec.identity;
        let file = |end: &str| dir.join(end);
        let material = Material::load(&file("ca.pem"), &file("a.pem"), &file("a.key"), "a")?;
        let public = key_of_certificate(&material.chain[0])?;
        let signer = HostSigner::new(Arc::clone(&material.key), public);
        let tls = Tls::new(material.roots, material.chain, material.key)?;
        Ok(Self { tls, signer })
    }

    /// What the second host answers to an offer.
    fn offer(&self, rig: &Rig, offer: &Offer) -> Result<Message> {
        let address: Ipv4Addr = rig.hosts[1].spec.address.parse()?;
        let tcp = rig
            .client
            .inside(move || Ok(TcpStream::connect((address, PORT))?))?;
        let connection = self.tls.connect(tcp, "b", false)?;
        connection.tcp.set_read_timeout(Some(SHORT))?;
        let channel = WireChannel::new(connection)?;
        let hello = Hello::ours("impostor", Challenge32([1; 32]));
        channel.send(&Message::Hello(hello))?;
        let Message::HelloReply(_) = channel.receive()? else {
            bail!("no greeting");
        };
        channel.send(&Message::Offer(offer.clone()))?;
        Ok(channel.receive()?)
    }
}

fn codes(answer: &Message) -> Result<(bool, Vec<&str>)> {
    match answer {
        Message::Refused(Refused { by_gate, blockers }) => {
            Ok((*by_gate, blockers.iter().map(|b| &*b.code).collect()))
        }
        other => bail!("not refused: {other:?}"),
    }
}

#[test]
fn an_order_is_good_once_unaltered_and_with_its_signature() -> Result<()> {
    let judging = JudgingRig::new()?;
    let rig = &judging.rig;
    let impostor = Impostor::new(rig)?;
    let passport = std::fs::read(judging.passport(VM, 1, "")?)?;
    let host = |name: &str| -> Result<Identity> { Ok(identity("host", name).parse()?) };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let now = now.as_secs();
    let order = |migration: u8| Order {
        migration: MigrationId([migration; 16]),
        vm: VmId(*VM.as_bytes()),
        vm_name: "replayed".to_owned(),
        epoch: Epoch(1),
        source: "a".to_owned(),
        destination: "b".to_owned(),
        expires_unix_s: now + 100,
        run: true,
    };
    let offer = |migration: u8| -> Result<Offer> {
        let order = order(migration);
        let signed = SignedOrder {
            migration: Uuid::from_bytes(order.migration.0),
            vm: VM,
            vm_name: order.vm_name.clone(),
            epoch: 1,
            source: host("a")?,
            destination: host("b")?,
            operator: format!("spiffe://{DOMAIN}/operator/alice").parse()?,
            issued_unix_s: now,
            expires_unix_s: order.expires_unix_s,
            strategy: Strategy::Auto,
            post_copy: false,
            run: true,
            policy_sha256: Sha256::of(b"whatever"),
            passport_sha256: Sha256::of(&passport),
        };
        let credentials = Credentials {
            order: Signed::sign(&signed, &impostor.signer)?
                .as_bytes()
                .to_vec()
                .into(),
            passport: passport.clone().into(),
            approvals: Vec::new(),
            evidence: Vec::new().into(),
        };
        Ok(Offer {
            order,
            descriptor: b"{}".to_vec(),
            region_pages: vec![1024],
            streams: 1,
            digest_seed: 1,
            post_copy: PostCopyUse::No,
            credentials: credentials.to_bytes()?,
        })
    };
    // All gates let it pass; there is only no VM that could be started.
    let first = offer(1)?;
    let answer = impostor.offer(rig, &first)?;
    ensure!(codes(&answer)? == (false, vec!["descriptor"]), "{answer:?}");
    // The same bytes once more.
    let answer = impostor.offer(rig, &first)?;
    ensure!(
        codes(&answer)? == (true, vec!["order-replayed"]),
        "{answer:?}"
    );
    journaled(&rig.hosts[1], "migrateIn", "identity", "order-replayed")?;
    // Its signed order under another migration, and none.
    let mut altered = offer(2)?;
    altered.order.migration = MigrationId([3; 16]);
    let answer = impostor.offer(rig, &altered)?;
    let code = "identity:order-contradicts";
    ensure!(codes(&answer)? == (true, vec![code]), "{answer:?}");
    journaled(&rig.hosts[1], "migrateIn", "identity", "order-contradicts")?;
    let mut stolen = offer(4)?;
    stolen.credentials = first.credentials.clone();
    let answer = impostor.offer(rig, &stolen)?;
    ensure!(
        codes(&answer)? == (true, vec!["identity:order-replayed"]),
        "{answer:?}"
    );
    let mut bare = offer(5)?;
    bare.credentials.clear();
    let answer = impostor.offer(rig, &bare)?;
    ensure!(
        codes(&answer)? == (true, vec!["identity:order-missing"]),
        "{answer:?}"
    );
    let mut torn = offer(6)?;
    let middle = torn.credentials.len() / 4;
    torn.credentials[middle] ^= 1;
    let answer = impostor.offer(rig, &torn)?;
    let (by_gate, found) = codes(&answer)?;
    ensure!(
        by_gate && found.iter().all(|code| code.starts_with("identity:")),
        "{answer:?}"
    );
    ensure!(rig.hosts[1].vms()?.is_empty() && rig.hosts[1].qemus()?.is_empty());
    // What it repeats is counted, and fills no journal.
    let before = decisions(&rig.hosts[1])?;
    for _ in 0..20 {
        let answer = impostor.offer(rig, &first)?;
        ensure!(codes(&answer)?.1 == ["order-replayed"], "{answer:?}");
    }
    let after = decisions(&rig.hosts[1])?;
    ensure!(after.len() == before.len(), "{before:?} {after:?}");
    let brought = identity("host", "a");
    let counted = after.iter().find(|row| {
        row.times >= 21
            && row
                .reasons
                .iter()
                .any(|reason| reason.code == "order-replayed")
    });
    let counted = counted.with_context(|| format!("not counted: {after:?}"))?;
    ensure!(
        counted.peer == Some(brought) && counted.last_unix_s.is_some(),
        "{counted:?}"
    );
    Ok(())
}
