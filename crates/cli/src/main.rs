//! `palanquin`: what an operator types.
#![forbid(unsafe_code)]

mod ca;
mod check;
mod client;
mod failure;
mod migrate;
mod render;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use palanquin_api::config::LoadError;
use palanquin_api::control::{
    AbortAnswer, AdoptVm, DoctorReport, DoctorRequest, ErrorKind, HostInfo, MigrationInfo,
    OperatorAssertion, ResolveMigration, RunVm, Side, StartMigration, Strategy, VmInfo,
};
use palanquin_api::size::{Bandwidth, HumanDuration};
use palanquin_api::vm_spec::VmSpec;

use crate::client::Client;
use crate::failure::Failure;
use crate::migrate::to_json;

/// Moves running VMs between hosts, encrypted, so that each lives exactly once
#[derive(Parser)]
#[command(name = "palanquin", version, arg_required_else_help = true)]
struct Cli {
    /// Control socket of this host's agent
    #[arg(
        long,
        global = true,
        env = "PALANQUIN_SOCKET",
        default_value = "/run/palanquin/control.sock"
    )]
    socket: PathBuf,
    /// Answer as JSON, for scripts
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make an authority and issue certificates
    #[command(subcommand)]
    Ca(CaCommand),
    /// Run, adopt, list and stop VMs
    #[command(subcommand)]
    Vm(VmCommand),
    /// Move a VM to another host
    Migrate(Migrate),
    /// Look at migrations, abort and resolve them
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// Find everything that stands in the way of a migration
    Doctor {
        /// Destination to check against
        #[arg(long, value_name = "HOST")]
        to: Option<String>,
        /// VM to check
        #[arg(long, value_name = "NAME")]
        vm: Option<String>,
    },
    /// Show this host
    Host,
    /// Check an agent's configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Subcommand)]
enum CaCommand {
    /// Make an authority in a new directory
    Init {
        /// Directory
        dir: PathBuf,
        /// Names are spiffe://TRUST-DOMAIN/host/NAME
        #[arg(long, default_value = "palanquin.internal")]
        trust_domain: String,
    },
    /// Issue a certificate
    #[command(subcommand)]
    Issue(Issue),
}

#[derive(Subcommand)]
enum Issue {
    /// For an agent
    Host(IssueArgs),
    /// For a person
    Operator(IssueArgs),
}

#[derive(Args)]
struct IssueArgs {
    /// Name; for a host the one in its agent's configuration
    name: String,
    /// Directory of the authority
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Directory for NAME.pem, NAME.key and ca.pem [default: DIR/issued/KIND-NAME]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Days of validity
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u16).range(1..=3650))]
    days: u16,
    /// Address or DNS name to add (can be repeated)
    #[arg(long = "address")]
    addresses: Vec<String>,
}

#[derive(Subcommand)]
enum VmCommand {
    /// Start a VM
    Run {
        /// Specification (TOML)
        spec: PathBuf,
    },
    /// Take over a running QEMU
    Adopt {
        /// Name for the VM
        name: String,
        /// Its process ID
        #[arg(long)]
        pid: u32,
        /// A QMP socket of it that nobody else uses
        #[arg(long)]
        qmp: PathBuf,
    },
    /// List the VMs of this host
    Ls,
    /// Show a VM
    Show {
        /// Its name
        name: String,
    },
    /// End a VM and remove what is left of it
    Stop {
        /// Its name
        name: String,
    },
}

#[derive(Args)]
struct Migrate {
    /// Name of the VM
    vm: String,
    /// Destination host
    #[arg(long, value_name = "HOST")]
    to: String,
    /// How the pages are moved
    #[arg(long, value_enum, default_value = "auto")]
    strategy: StrategyArg,
    /// Longest pause aimed at
    #[arg(long, default_value = "300ms")]
    max_downtime: HumanDuration,
    /// Longest time before the migration is aborted
    #[arg(long, default_value = "10min")]
    deadline: HumanDuration,
    /// Limit of what goes onto the wire, as in 1gbit or 100MiB/s
    #[arg(long)]
    bandwidth: Option<Bandwidth>,
    /// Data streams
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16))]
    streams: Option<u16>,
    /// Wire reduction; auto means off for now
    #[arg(long, value_enum, default_value = "auto")]
    compress: Compress,
    /// Return once it has started
    #[arg(long)]
    detach: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum StrategyArg {
    Auto,
    StopAndCopy,
    PreCopy,
    Improved,
    PostCopy,
    Hybrid,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compress {
    Auto,
    Off,
    Lz4,
    Zstd,
}

#[derive(Subcommand)]
enum MigrationCommand {
    /// List migrations
    Ls,
    /// Show a migration
    Show {
        /// Its identity, or the beginning of it
        id: String,
    },
    /// Follow a migration to its end
    Watch {
        /// Its identity, or the beginning of it
        id: String,
    },
    /// End a migration; says exactly what became of the VM
    Abort {
        /// Its identity, or the beginning of it
        id: String,
    },
    /// Ask the destination again about a migration in doubt
    Resolve {
        /// Its identity, or the beginning of it
        id: String,
        /// What you have verified at the destination yourself, where its agent cannot answer any more
        #[arg(long, value_enum)]
        assert: Option<Assertion>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Assertion {
    /// The VM does not run there and never will
    DestinationLostIt,
    /// The VM runs there
    DestinationRunsIt,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Name everything that is wrong with a configuration and the files it names
    Check {
        /// The file
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    // A reader that went away is no reason to panic.
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(2)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let json = cli.json;
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            return Failure::new(ErrorKind::Internal, "no runtime")
                .cause(error)
                .tell(json);
        }
    };
    match runtime.block_on(run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(json),
    }
}

async fn run(cli: Cli) -> Result<(), Failure> {
    let client = Client::new(&cli.socket);
    let json = cli.json;
    match cli.command {
        Command::Ca(command) => ca_command(&command),
        Command::Vm(command) => vm_command(&client, command, json).await,
        Command::Migrate(arguments) => start(&client, &arguments, json).await,
        Command::Migration(command) => migration_command(&client, command, json).await,
        Command::Doctor { to, vm } => {
            let report: DoctorReport = client.post("/v1/doctor", &DoctorRequest { to, vm }).await?;
            doctor(&report, json)
        }
        Command::Host => {
            let host: HostInfo = client.get("/v1/host").await?;
            show(&host, render::host, json);
            Ok(())
        }
        Command::Config(ConfigCommand::Check { file }) => check::check(&file),
        Command::Completions { shell } => {
            let mut command = <Cli as clap::CommandFactory>::command();
            clap_complete::generate(shell, &mut command, "palanquin", &mut std::io::stdout());
            Ok(())
        }
    }
}

fn show<T: serde::Serialize>(value: &T, text: impl FnOnce(&T) -> String, json: bool) {
    if json {
        render::say_line(&to_json(value));
    } else {
        render::say(&text(value));
    }
}

fn ca_command(command: &CaCommand) -> Result<(), Failure> {
    match command {
        CaCommand::Init { dir, trust_domain } => {
            ca::init(dir, trust_domain)?;
            render::say_line(&format!(
                "Made an authority for {trust_domain} in {}. Keep ca.key to yourself.",
                dir.display()
            ));
        }
        CaCommand::Issue(issue) => {
            let (kind, arguments) = match issue {
                Issue::Host(arguments) => (ca::Kind::Host, arguments),
                Issue::Operator(arguments) => (ca::Kind::Operator, arguments),
            };
            let out = ca::issue(&ca::Order {
                dir: &arguments.dir,
                kind,
                name: &arguments.name,
                out: arguments.out.as_deref(),
                days: arguments.days,
                addresses: &arguments.addresses,
            })?;
            let name = &arguments.name;
            render::say_line(&format!(
                "Wrote {name}.pem, {name}.key and ca.pem to {}.",
                out.display()
            ));
        }
    }
    Ok(())
}

async fn vm_command(client: &Client, command: VmCommand, json: bool) -> Result<(), Failure> {
    let vm: VmInfo = match command {
        VmCommand::Ls => {
            let vms: Vec<VmInfo> = client.get("/v1/vms").await?;
            show(&vms, |vms| render::vms(vms), json);
            return Ok(());
        }
        VmCommand::Run { spec } => {
            let request = RunVm {
                spec: read_spec(&spec)?,
            };
            client.post("/v1/vms", &request).await?
        }
        VmCommand::Adopt { name, pid, qmp } => {
            let qmp = std::path::absolute(&qmp)
                .unwrap_or(qmp)
                .display()
                .to_string();
            client
                .post("/v1/vms/adopt", &AdoptVm { name, pid, qmp })
                .await?
        }
        VmCommand::Show { name } => client.get(&format!("/v1/vms/{}", segment(&name)?)).await?,
        VmCommand::Stop { name } => {
            client
                .post(&format!("/v1/vms/{}/stop", segment(&name)?), &())
                .await?
        }
    };
    show(&vm, render::vm, json);
    Ok(())
}

/// A name that is part of a path.
fn segment(name: &str) -> Result<&str, Failure> {
    if palanquin_api::config::is_name(name) {
        Ok(name)
    } else {
        Err(Failure::usage(format!("{name:?} is no name for a VM")))
    }
}

fn read_spec(path: &std::path::Path) -> Result<VmSpec, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::usage(format!("cannot read {}", path.display())).cause(error))?;
    VmSpec::from_toml(&text).map_err(|error| {
        let failure = Failure::usage(format!("{} is no usable specification", path.display()));
        match error {
            LoadError::Rules(found) => found.into_iter().fold(failure, Failure::cause),
            other => failure.cause(other),
        }
    })
}

async fn start(client: &Client, arguments: &Migrate, json: bool) -> Result<(), Failure> {
    if matches!(arguments.compress, Compress::Lz4 | Compress::Zstd) {
        return Err(Failure::usage("compression is not there yet").hint("--compress auto or off"));
    }
    let request = StartMigration {
        vm: arguments.vm.clone(),
        to: arguments.to.clone(),
        strategy: match arguments.strategy {
            StrategyArg::Auto => Strategy::Auto,
            StrategyArg::StopAndCopy => Strategy::StopAndCopy,
            StrategyArg::PreCopy => Strategy::PreCopy,
            StrategyArg::Improved => Strategy::Improved,
            StrategyArg::PostCopy => Strategy::PostCopy,
            StrategyArg::Hybrid => Strategy::Hybrid,
        },
        max_downtime_ms: Some(arguments.max_downtime.as_millis()),
        deadline_ms: Some(arguments.deadline.as_millis()),
        bandwidth_bytes_per_s: arguments.bandwidth.map(Bandwidth::bytes_per_s),
        streams: arguments.streams,
    };
    migrate::migrate(client, &request, arguments.detach, json).await
}

/// The one migration whose identity begins so.
async fn find(client: &Client, id: &str) -> Result<MigrationInfo, Failure> {
    let infos: Vec<MigrationInfo> = client.get("/v1/migrations").await?;
    let id = id.to_ascii_lowercase();
    let mut found = infos
        .into_iter()
        .filter(|info| info.id.to_string().starts_with(&id));
    match (found.next(), found.next()) {
        (Some(info), None) => Ok(info),
        (None, _) => Err(Failure::new(
            ErrorKind::NotFound,
            format!("there is no migration {id:?}"),
        )
        .hint("`palanquin migration ls` lists them")),
        (Some(_), Some(_)) => Err(
            Failure::usage(format!("several migrations begin with {id:?}"))
                .hint("write more of it"),
        ),
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
            show(&infos, |infos| render::migrations(infos), json);
            Ok(())
        }
        MigrationCommand::Show { id } => {
            show(&find(client, &id).await?, render::migration, json);
            Ok(())
        }
        MigrationCommand::Watch { id } => {
            let info = find(client, &id).await?;
            migrate::follow(client, info, json, false).await
        }
        MigrationCommand::Abort { id } => {
            let info = find(client, &id).await?;
            let path = format!("/v1/migrations/{}/abort", info.id);
            let answer: AbortAnswer = client.post(&path, &()).await?;
            show(&answer, |answer| migrate::abort_text(answer) + "\n", json);
            Ok(())
        }
        MigrationCommand::Resolve { id, assert } => {
            let info = find(client, &id).await?;
            let assert = assert.map(|assertion| match assertion {
                Assertion::DestinationLostIt => OperatorAssertion::DestinationLostIt,
                Assertion::DestinationRunsIt => OperatorAssertion::DestinationRunsIt,
            });
            let path = format!("/v1/migrations/{}/resolve", info.id);
            let info: MigrationInfo = client.post(&path, &ResolveMigration { assert }).await?;
            migrate::ended(&info, json)
        }
    }
}

fn doctor(report: &DoctorReport, json: bool) -> Result<(), Failure> {
    if json {
        render::say_line(&to_json(report));
    } else {
        for passed in &report.passed {
            render::say_line(&format!("ok    {passed}"));
        }
        for blocker in &report.blockers {
            let side = match blocker.side {
                Side::Source => "source",
                Side::Destination => "destination",
            };
            render::say_line(&format!(
                "STOP  {} ({side}, {})\n      {}",
                blocker.message, blocker.code, blocker.remedy
            ));
        }
    }
    if report.blockers.is_empty() {
        return Ok(());
    }
    let count = report.blockers.len();
    let what = if count == 1 {
        "one thing stands in the way".to_owned()
    } else {
        format!("{count} things stand in the way")
    };
    Err(Failure::new(ErrorKind::Blocked, what))
}
