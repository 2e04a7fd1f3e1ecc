//! What each subcommand does.

use std::path::Path;

use palanquin_api::config::is_name;
use palanquin_api::control::{
    AbortAnswer, AdoptVm, DoctorReport, DoctorRequest, ErrorKind, GateDecision, GivePassport,
    HostInfo, MigrationInfo, ResolveMigration, RunVm, StartMigration, VmInfo,
};
use palanquin_api::hex::Hex;
use palanquin_api::size::Bandwidth;
use palanquin_api::vm_spec::VmSpec;
use palanquin_trust::signed::ENVELOPE_MAX;
use serde::Serialize;

use crate::arguments::{
    CaCommand, Cli, Command, ConfigCommand, DecisionCommand, Issue, Migrate, MigrationCommand,
    VmCommand,
};
use crate::client::Client;
use crate::failure::Failure;
use crate::files::read;
use crate::output::{say, say_line, to_json};
use crate::{advertisement, approval, attest, ca, check, migrate, passport, policy, render, watch};

/// Does what was typed.
pub(crate) async fn run(cli: Cli) -> Result<(), Failure> {
    let client = Client::new(&cli.socket);
    let json = cli.json;
    match cli.command {
        Command::Ca(command) => ca_command(&command, json),
        Command::Vm(command) => vm_command(&client, command, json).await,
        Command::Migrate(arguments) => start(&client, arguments, json).await,
        Command::Migration(command) => migration_command(&client, command, json).await,
        Command::Doctor { to, vm } => {
            let report: DoctorReport = client.post("/v1/doctor", &DoctorRequest { to, vm }).await?;
            doctor(&report, json)
        }
        Command::Host => {
            let host: HostInfo = client.get("/v1/host").await?;
            show(&host, render::host, json)
        }
        Command::Config(ConfigCommand::Check { file }) => {
            check::check(&file)?;
            let good = serde_json::json!({ "file": file.display().to_string(), "good": true });
            show(&good, |_| format!("{} is good.\n", file.display()), json)
        }
        Command::Policy(command) => policy::run(&command, json),
        Command::Passport(command) => passport::run(&command, json),
        Command::Approval(command) => approval::run(&command, json),
        Command::Decision(DecisionCommand::Ls) => {
            let decisions: Vec<GateDecision> = client.get("/v1/decisions").await?;
            show(&decisions, |decisions| render::decisions(decisions), json)
        }
        Command::Advertisement(command) => advertisement::run(&client, &command, json).await,
        Command::Attest(command) => attest::run(&command, json),
        Command::Watch(command) => watch::run(&command, json).await,
        Command::Completions { shell } => {
            let mut command = <Cli as clap::CommandFactory>::command();
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command, "palanquin", &mut script);
            say(&String::from_utf8_lossy(&script))
        }
    }
}

/// Prints a value, as JSON or as text.
pub(crate) fn show<T: Serialize>(
    value: &T,
    text: impl FnOnce(&T) -> String,
    json: bool,
) -> Result<(), Failure> {
    if json {
        say_line(&to_json(value))
    } else {
        say(&text(value))
    }
}

fn ca_command(command: &CaCommand, json: bool) -> Result<(), Failure> {
    match command {
        CaCommand::Init { dir, trust_domain } => {
            ca::init(dir, trust_domain)?;
            let dir = dir.display().to_string();
            let made = serde_json::json!({ "dir": dir, "trust_domain": trust_domain });
            let text = |_: &_| {
                format!("Made an authority for {trust_domain} in {dir}. Keep ca.key to yourself.\n")
            };
            show(&made, text, json)
        }
        CaCommand::Issue(issue) => {
            let (kind, arguments) = match issue {
                Issue::Host(arguments) => (ca::Kind::Host, arguments),
                Issue::Operator(arguments) => (ca::Kind::Operator, arguments),
            };
            let issued = ca::issue(&ca::Order {
                dir: &arguments.dir,
                kind,
                name: &arguments.name,
                out: arguments.out.as_deref(),
                days: arguments.days,
                addresses: &arguments.addresses,
            })?;
            let text = |issued: &ca::Issued| {
                let (name, out) = (&arguments.name, issued.out.display());
                format!("Wrote {name}.pem, {name}.key and ca.pem to {out}.\n")
            };
            show(&issued, text, json)
        }
    }
}

async fn vm_command(client: &Client, command: VmCommand, json: bool) -> Result<(), Failure> {
    let vm: VmInfo = match command {
        VmCommand::Ls => {
            let vms: Vec<VmInfo> = client.get("/v1/vms").await?;
            return show(&vms, |vms| render::vms(vms), json);
        }
        VmCommand::Run { spec, passport } => {
            let (spec, passport) = (read_spec(&spec)?, signed(passport.as_deref())?);
            client.post("/v1/vms", &RunVm { spec, passport }).await?
        }
        VmCommand::Adopt {
            name,
            pid,
            qmp,
            passport,
        } => {
            let absolute = std::path::absolute(&qmp).unwrap_or(qmp);
            let Some(qmp) = absolute.to_str().map(str::to_owned) else {
                let what = format!("{} is not UTF-8", absolute.display());
                return Err(Failure::usage(what));
            };
            let name = segment(&name)?.to_owned();
            let request = AdoptVm {
                name,
                pid,
                qmp,
                passport: signed(passport.as_deref())?,
            };
            client.post("/v1/vms/adopt", &request).await?
        }
        VmCommand::Passport { name, file } => {
            let path = format!("/v1/vms/{}/passport", segment(&name)?);
            let passport = Hex(read(&file, ENVELOPE_MAX)?);
            client.post(&path, &GivePassport { passport }).await?
        }
        VmCommand::Show { name } => client.get(&format!("/v1/vms/{}", segment(&name)?)).await?,
        VmCommand::Stop { name } => {
            let path = format!("/v1/vms/{}/stop", segment(&name)?);
            client.post(&path, &()).await?
        }
    };
    show(&vm, render::vm, json)
}

/// A signed document, where a file with one is named.
fn signed(file: Option<&Path>) -> Result<Option<Hex>, Failure> {
    let bytes = file.map(|file| read(file, ENVELOPE_MAX)).transpose()?;
    Ok(bytes.map(Hex))
}

/// A name that is part of a path.
fn segment(name: &str) -> Result<&str, Failure> {
    if is_name(name) {
        Ok(name)
    } else {
        let what = format!("{name:?} is no name for a VM");
        Err(Failure::usage(what).hint(palanquin_api::config::NAME_RULE))
    }
}

fn read_spec(path: &Path) -> Result<VmSpec, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::usage(format!("cannot read {}", path.display())).cause(error))?;
    VmSpec::from_toml(&text).map_err(|error| {
        let what = format!("{} is no usable specification", path.display());
        Failure::usage(what).load_error(error)
    })
}

async fn start(client: &Client, arguments: Migrate, json: bool) -> Result<(), Failure> {
    let approvals = arguments.approvals.iter();
    let approvals = approvals.map(|file| read(file, ENVELOPE_MAX).map(Hex));
    let request = StartMigration {
        vm: arguments.vm,
        to: arguments.to,
        strategy: arguments.strategy.into(),
        allow: arguments.allow.into_iter().map(Into::into).collect(),
        max_downtime_ms: Some(arguments.max_downtime.as_millis()),
        deadline_ms: Some(arguments.deadline.as_millis()),
        bandwidth_bytes_per_s: arguments.bandwidth.map(Bandwidth::bytes_per_s),
        streams: arguments.streams,
        compress: arguments.compress.into(),
        approvals: approvals.collect::<Result<_, _>>()?,
    };
    let violations = request.validate();
    if !violations.is_empty() {
        let failure = Failure::usage("this migration makes no sense");
        return Err(violations.into_iter().fold(failure, Failure::cause));
    }
    migrate::migrate(client, &request, arguments.detach, json).await
}

/// The one migration whose identity begins so.
async fn find(client: &Client, id: &str) -> Result<MigrationInfo, Failure> {
    let id = id.to_ascii_lowercase();
    let is_prefix = |c: char| c.is_ascii_hexdigit() || c == '-';
    if id.is_empty() || !id.chars().all(is_prefix) {
        let failure = Failure::usage(format!("{id:?} is no identity of a migration"));
        return Err(failure.hint("`palanquin migration ls` lists them"));
    }
    let infos: Vec<MigrationInfo> = client.get("/v1/migrations").await?;
    let mut found = infos
        .into_iter()
        .filter(|info| info.id.to_string().starts_with(&id));
    match (found.next(), found.next()) {
        (Some(info), None) => Ok(info),
        (None, _) => {
            let what = format!("there is no migration {id:?} on this host");
            let failure = Failure::new(ErrorKind::NotFound, what);
            Err(failure.hint("`palanquin migration ls` lists them"))
        }
        (Some(_), Some(_)) => {
            let what = format!("several migrations begin with {id:?}");
            Err(Failure::usage(what).hint("write more of it"))
        }
    }
}

async fn migration_command(
    client: &Client,
    command: MigrationCommand,
    json: bool,
) -> Result<(), Failure> {
    match command {
        MigrationCommand::Ls => {
            let infos: Vec<MigrationInfo> = client.get("/v1/migrations").await?;
            show(&infos, |infos| render::migrations(infos), json)
        }
        MigrationCommand::Show { id } => show(&find(client, &id).await?, render::migration, json),
        MigrationCommand::Watch { id } => {
            let info = find(client, &id).await?;
            migrate::watch(client, info, json).await
        }
        MigrationCommand::Abort { id } => {
            let id = find(client, &id).await?.id;
            let path = format!("/v1/migrations/{id}/abort");
            let answer: AbortAnswer = client.post(&path, &()).await.map_err(|error| {
                error.leaves_in_doubt(
                    "whether the migration was aborted is not known",
                    &format!("`palanquin migration show {id}` tells, once the agent is back"),
                )
            })?;
            show(&answer, |answer| render::abort(answer) + "\n", json)?;
            migrate::judge_abort(&answer)
        }
        MigrationCommand::Resolve { id, assert } => {
            let id = find(client, &id).await?.id;
            let assert = assert.map(Into::into);
            let path = format!("/v1/migrations/{id}/resolve");
            let answer = client.post(&path, &ResolveMigration { assert }).await;
            let info: MigrationInfo = answer.map_err(|error| {
                error.leaves_in_doubt(
                    "whether the migration was resolved is not known",
                    &format!("`palanquin migration show {id}` tells, once the agent is back"),
                )
            })?;
            migrate::ended(&info, json)
        }
    }
}

fn doctor(report: &DoctorReport, json: bool) -> Result<(), Failure> {
    show(report, render::doctor, json)?;
    match report.blockers.len() {
        0 => Ok(()),
        1 => Err(Failure::new(
            ErrorKind::Blocked,
            "one thing stands in the way",
        )),
        count => Err(Failure::new(
            ErrorKind::Blocked,
            format!("{count} things stand in the way"),
        )),
    }
}
