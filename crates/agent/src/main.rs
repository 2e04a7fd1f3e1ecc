//! `palanquind`: the agent of a host.
#![forbid(unsafe_code)]

use std::alloc::System;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use clap::Parser;
use palanquin_agent::agent::Agent;
use palanquin_agent::attest::sealed::check_policies;
use palanquin_agent::chain::chain;
use palanquin_agent::gate::{Gatekeeper, HostSigner};
use palanquin_agent::identity::key_of_certificate;
use palanquin_agent::net::process::{self, ARGUMENT};
use palanquin_agent::network::{Network, Settings};
use palanquin_agent::store::Store;
use palanquin_agent::tls::Material;
use palanquin_agent::{http, listener, recovery};
use palanquin_api::config::{AgentConfig, Privileges};
use palanquin_host::measure::Meter;
use palanquin_host::qemu::{Confinement, Qemu};
use palanquin_host::users::User;
use palanquin_host::vm::Hypervisor;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use zeroizing_alloc::ZeroAlloc;

/// Overwrites what is freed: pages of guests and keys pass through buffers, and none of them is to stay in the memory of
/// a host that a VM has left.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

/// User as whom the network process runs, where there is one.
const NETWORK_USER: &str = "palanquin-net";
/// User that hypervisors become, where there is one.
const QEMU_USER: &str = "palanquin-qemu";

/// Agent that moves VMs between this host and others
#[derive(Parser)]
#[command(name = "palanquind", version)]
struct Arguments {
    /// Configuration file; `palanquin config check` explains what is wrong with one
    #[arg(long, value_name = "FILE", default_value = "/etc/palanquin/agent.toml")]
    config: PathBuf,
    /// Log as JSON, one object a line
    #[arg(long)]
    log_json: bool,
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    match words.next().as_deref() {
        Some(ARGUMENT) => return network_process(&words.collect::<Vec<_>>()),
        #[cfg(feature = "fail-points")]
        Some(palanquin_agent::net::attempt::ARGUMENT) => {
            let words: Vec<String> = words.collect();
            return match palanquin_agent::net::attempt::attempt(&words) {
                Ok(text) => {
                    println!("{text}");
                    ExitCode::SUCCESS
                }
                Err(problem) => {
                    eprintln!("{problem}");
                    ExitCode::from(1)
                }
            };
        }
        _ => {}
    }
    let arguments = Arguments::parse();
    start_log(arguments.log_json);
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: palanquind cannot start: {problem}");
            for cause in problem.chain().skip(1) {
                eprintln!("  cause: {cause}");
            }
            eprintln!(
                "  hint: palanquin config check {}",
                arguments.config.display()
            );
            ExitCode::from(1)
        }
    }
}

/// The process that talks to other hosts, started by the agent and by nobody else.
fn network_process(words: &[String]) -> ExitCode {
    let (numbers, options) = words.split_at(words.len().min(3));
    start_log(options.iter().any(|word| word == "--log-json"));
    match process::run(numbers) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            tracing::error!(problem = chain(&problem), "the network process ends");
            ExitCode::from(1)
        }
    }
}

fn start_log(json: bool) {
    let filter =
        EnvFilter::try_from_env("PALANQUIN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    if json {
        log.json().init();
    } else {
        log.init();
    }
}

fn directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

/// Most files that this agent asks to open at the same time: some for each of the connections that its limits allow.
const OPEN_FILES: u64 = 65_536;

/// Takes as many file descriptors as this process may have: the customary 1024 would be used up by connections first.
fn allow_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(OPEN_FILES).min(OPEN_FILES);
    if limit.current.is_some_and(|current| current < most) {
        limit.current = Some(most);
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "the number of open files stays as it is");
        }
    }
}

/// What hypervisors may not do.
fn confinement(config: &AgentConfig) -> Result<Confinement> {
    let user = match &config.qemu.user {
        Some(name) => Some(
            User::find(name).with_context(|| format!("`qemu.user`: there is no user {name:?}"))?,
        ),
        None => User::find(QEMU_USER),
    };
    Ok(Confinement {
        user,
        no_sandbox: !config.qemu.sandbox,
    })
}

/// As whom the network process runs.
fn network_settings(config: &AgentConfig, log_json: bool) -> Result<Settings> {
    let Privileges {
        network_user,
        require,
    } = &config.privileges;
    let user = match network_user {
        Some(name) => User::find(name)
            .with_context(|| format!("`privileges.network-user`: there is no user {name:?}"))?,
        None => User::find(NETWORK_USER).unwrap_or_else(|| {
            tracing::info!(
                "there is no user {NETWORK_USER}; the network process runs as the user `nobody`"
            );
            User::nobody()
        }),
    };
    Ok(Settings {
        user: user.uid,
        group: user.gid,
        log_json,
        require: *require,
    })
}

/// Who judges, by what the configuration names.
fn gatekeeper(config: &AgentConfig, material: &Material, meter: Arc<Meter>) -> Result<Gatekeeper> {
    let leaf = material.chain.first().map_or(&[][..], |leaf| leaf.as_ref());
    let public = key_of_certificate(leaf).ok();
    let signer = public.map(|public| HostSigner::new(Arc::clone(&material.key), public));
    let gate = Gatekeeper::new(config, material.identity.clone(), signer, meter)
        .context("`[trust]` is not usable")?;
    if material.sealed_policies.is_some() {
        let books = gate
            .books()
            .context("this host's key was sealed with policies, and `[trust]` is not configured")?;
        check_policies(material.sealed_policies, books.policies.sha256())?;
    }
    match gate.info() {
        Some(trust) => tracing::info!(
            version = trust.policy_version,
            sha256 = trust.policy_sha256,
            "policies decide who may move what"
        ),
        None => tracing::warn!(
            "`[trust]` is not configured: nothing is judged, and every host of this trust domain may bring VMs"
        ),
    }
    Ok(gate)
}

fn run(arguments: &Arguments) -> Result<()> {
    // Also for the network process, which inherits it.
    allow_open_files();
    let path = &arguments.config;
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = AgentConfig::from_toml(&text)
        .with_context(|| format!("{} is not usable", path.display()))?;
    // The first random bytes of a process take tens of milliseconds of CPU: better now than during a migration.
    aws_lc_rs::rand::fill(&mut [0; 1]).context("this host has no randomness")?;
    let key = fs::metadata(&config.tls.key)
        .with_context(|| format!("cannot read {}", config.tls.key.display()))?;
    if key.permissions().mode() & 0o077 != 0 {
        bail!(
            "{} is open to others than its owner: chmod 600 it",
            config.tls.key.display()
        );
    }
    let tls = &config.tls;
    let material = Material::load(&tls.ca, &tls.certificate, &tls.key, &config.name)
        .context("the identity of this host is not usable")?;
    material
        .check()
        .context("the identity of this host is not usable")?;
    directory(&config.state_dir)?;
    directory(&config.runtime_dir)?;
    let state = config.state_dir.join("palanquin.db");
    let store = Store::open(&state).with_context(|| format!("cannot use {}", state.display()))?;
    fs::set_permissions(&state, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", state.display()))?;
    let address = config.listen.migration;
    let socket =
        TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
    // What hypervisors are started from and what is shown of them is measured once.
    let meter = Arc::new(Meter::default());
    let qemu = Qemu::new(
        config.qemu.binary.clone(),
        config.qemu.allowed_paths.clone(),
    )
    .confined(confinement(&config)?)
    .measured_by(Arc::clone(&meter));
    tracing::info!(identity = %material.identity, %address, "starting");
    for lack in qemu.unconfined() {
        if config.privileges.require {
            bail!("`privileges.require` is set, and this host lacks: {lack}");
        }
        tracing::warn!(
            lack,
            "hypervisors have privileges that they should not have"
        );
    }
    let gate = gatekeeper(&config, &material, meter)?;
    let settings = network_settings(&config, arguments.log_json)?;
    let network =
        Network::start(settings, material).context("there is no process to talk to other hosts")?;
    let agent = Agent::new(config, network, store, Arc::new(qemu), gate);
    agent.remember_checks();
    // What had to be remedied may have needed a new start.
    agent.check_itself_beside();
    recovery::recover(&agent).context("the state of this host cannot be recovered")?;
    listener::start(&agent, socket);
    let warming = Arc::clone(&agent);
    thread::Builder::new()
        .name("evidence".to_owned())
        .spawn(move || warming.gate.warm())
        .context("no thread for the TPM")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("no threads for the sockets")?;
    runtime
        .block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut hangup = signal(SignalKind::hangup())?;
            let reloading = Arc::clone(&agent);
            tokio::spawn(async move {
                while hangup.recv().await.is_some() {
                    let agent = Arc::clone(&reloading);
                    // It reads files; a panic in it is logged by whoever joins nothing.
                    let _ = tokio::task::spawn_blocking(move || {
                        agent.gate.reload();
                        agent.check_itself_beside();
                    })
                    .await;
                }
            });
            let stop = async {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            http::serve(&agent, stop).await
        })
        .context("cannot serve the control and observe sockets")?;
    // VMs go on without us; migrations under way are recovered at the next start.
    tracing::info!("ending");
    runtime.shutdown_background();
    Ok(())
}
