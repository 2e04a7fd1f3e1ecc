//! What may be typed: subcommands, options and their help.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use palanquin_api::control::{Allow, Compress, OperatorAssertion, Strategy};
use palanquin_api::size::{Bandwidth, ByteSize, HumanDuration};
use palanquin_trust::{Identity, Sha256};
use uuid::Uuid;

/// Moves running VMs between hosts, encrypted, so that each lives exactly once
#[derive(Parser)]
#[command(name = "palanquin", version, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Control socket of this host's agent
    #[arg(
        long,
        global = true,
        env = "PALANQUIN_SOCKET",
        default_value = "/run/palanquin/control.sock"
    )]
    pub(crate) socket: PathBuf,
    /// Answer as JSON, for scripts
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
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
    /// Check a provider's policies, try them, and explain what they decide
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Write, show and verify what the owner of a VM allows
    #[command(subcommand)]
    Passport(PassportCommand),
    /// Sign and show a second person's word
    #[command(subcommand)]
    Approval(ApprovalCommand),
    /// Show what this host's gates have decided
    #[command(subcommand)]
    Decision(DecisionCommand),
    /// Promise memory of this host to another, and keep what others have promised
    #[command(subcommand)]
    Advertisement(AdvertisementCommand),
    /// Make hosts known by their TPMs, and seal keys to what a host has measured
    #[command(subcommand)]
    Attest(AttestCommand),
    /// Notice migrations, and name those that nobody ordered
    #[command(subcommand)]
    Watch(WatchCommand),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Subcommand)]
pub(crate) enum CaCommand {
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
pub(crate) enum Issue {
    /// For an agent
    Host(IssueArgs),
    /// For a person
    Operator(IssueArgs),
}

#[derive(Args)]
pub(crate) struct IssueArgs {
    /// Name; for a host the one in its agent's configuration
    pub(crate) name: String,
    /// Directory of the authority
    #[arg(long, default_value = ".")]
    pub(crate) dir: PathBuf,
    /// Directory for NAME.pem, NAME.key and ca.pem [default: DIR/issued/KIND-NAME]
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    /// Days of validity
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u16).range(1..=3650))]
    pub(crate) days: u16,
    /// Address or DNS name to add (can be repeated)
    #[arg(long = "address")]
    pub(crate) addresses: Vec<String>,
}

#[derive(Subcommand)]
pub(crate) enum VmCommand {
    /// Start a VM
    Run {
        /// Specification (TOML)
        spec: PathBuf,
        /// Its owner's passport, signed; needed where policies decide. The VM gets the UUID named in it
        #[arg(long, value_name = "FILE")]
        passport: Option<PathBuf>,
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
        /// Its owner's passport, signed; needed where policies decide. The VM gets the UUID named in it
        #[arg(long, value_name = "FILE")]
        passport: Option<PathBuf>,
    },
    /// Give a VM its owner's newest passport
    Passport {
        /// Its name
        name: String,
        /// The passport, signed
        file: PathBuf,
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
pub(crate) struct Migrate {
    /// Name of the VM
    pub(crate) vm: String,
    /// Destination host
    #[arg(long, value_name = "HOST")]
    pub(crate) to: String,
    /// How the pages are moved; auto is pre-copy that spares pages which are written all the time, and then what --allow
    /// names
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) strategy: StrategyArg,
    /// What auto may do where it does not converge: slow the VM down, or run it before all of its pages are there
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHAT")]
    pub(crate) allow: Vec<AllowArg>,
    /// Longest pause aimed at, 1ms to 1h
    #[arg(long, default_value = "300ms")]
    pub(crate) max_downtime: HumanDuration,
    /// Longest time before the migration is aborted, 1s to 7days
    #[arg(long, default_value = "10min")]
    pub(crate) deadline: HumanDuration,
    /// Limit of what goes onto the wire, as in 1gbit or 100MiB/s
    #[arg(long)]
    pub(crate) bandwidth: Option<Bandwidth>,
    /// Data streams, 1 to 16 [default: one for each CPU, 2 to 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) streams: Option<u16>,
    /// How pages are made shorter; auto measures whether the link or the CPU is the bottleneck
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) compress: CompressArg,
    /// Another operator's approval, signed (can be repeated)
    #[arg(long = "approval", value_name = "FILE")]
    pub(crate) approvals: Vec<PathBuf>,
    /// Return once it has started
    #[arg(long)]
    pub(crate) detach: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum StrategyArg {
    Auto,
    StopAndCopy,
    PreCopy,
    Improved,
    PostCopy,
    Hybrid,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum AllowArg {
    Throttle,
    PostCopy,
}

impl From<AllowArg> for Allow {
    fn from(arg: AllowArg) -> Self {
        match arg {
            AllowArg::Throttle => Self::Throttle,
            AllowArg::PostCopy => Self::PostCopy,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum CompressArg {
    Auto,
    Off,
    Lz4,
    Zstd,
}

#[derive(Subcommand)]
pub(crate) enum MigrationCommand {
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
pub(crate) enum Assertion {
    /// The VM does not run there and never will
    DestinationLostIt,
    /// The VM runs there
    DestinationRunsIt,
}

#[derive(Subcommand)]
pub(crate) enum ConfigCommand {
    /// Name everything that is wrong with a configuration and the files it names
    Check {
        /// The file
        file: PathBuf,
    },
}

#[derive(Subcommand)]
pub(crate) enum WatchCommand {
    /// Say what the detector makes of recorded observations
    Replay(ReplayArgs),
    /// Watch targets, and say what is found as it is found
    Run(RunArgs),
    /// Write what probes see to a file that can be replayed
    Record(RecordArgs),
    /// In a guest: say what it looks like from inside, and when it was paused or goes on elsewhere
    Inside(InsideArgs),
}

#[derive(Args)]
pub(crate) struct InsideArgs {
    /// Interval and neighbours (TOML)
    pub(crate) config: Option<PathBuf>,
    /// Time between two looks, 1s to 1h [default: 5s]
    #[arg(long, value_name = "DURATION")]
    pub(crate) every: Option<HumanDuration>,
    /// A machine near by that answers pings, by its IP address (can be repeated)
    #[arg(long = "neighbour", value_name = "NAME=ADDRESS", value_parser = neighbour)]
    pub(crate) neighbours: Vec<(String, IpAddr)>,
    /// Say what this machine looks like, and end
    #[arg(long, conflicts_with_all = ["seconds", "samples"])]
    pub(crate) once: bool,
    /// End after so many seconds [default: when it is interrupted]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub(crate) seconds: Option<u64>,
    /// Print also every sample, as calibrating reads it; needs --json
    #[arg(long)]
    pub(crate) samples: bool,
}

fn neighbour(text: &str) -> Result<(String, IpAddr), String> {
    let (name, address) = text.split_once('=').ok_or("it is NAME=ADDRESS")?;
    let address = address
        .parse()
        .map_err(|_| format!("{address:?} is no IP address"))?;
    Ok((name.to_owned(), address))
}

#[derive(Args)]
#[cfg_attr(
    not(feature = "watch-probes"),
    expect(dead_code, reason = "without probes it is only refused")
)]
pub(crate) struct RunArgs {
    /// Targets, and where the page is served (TOML)
    pub(crate) config: PathBuf,
    /// Draw on the terminal instead of printing lines
    #[arg(long, conflicts_with = "json")]
    pub(crate) tui: bool,
}

#[derive(Args)]
#[cfg_attr(
    not(feature = "watch-probes"),
    expect(dead_code, reason = "without probes it is only refused")
)]
pub(crate) struct RecordArgs {
    /// Targets (TOML), as for `watch run`
    pub(crate) config: PathBuf,
    /// File to make (CSV), as `watch replay` reads it
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// How long [default: until it is interrupted]
    #[arg(long = "for", value_name = "DURATION")]
    pub(crate) duration: Option<HumanDuration>,
}

#[derive(Args)]
pub(crate) struct ReplayArgs {
    /// Observations (CSV): time_s,target,kind,value with kinds rtt_ms, lost, offset_ms, icmp_offset_ms, ntp_held_ms, ttl, announced
    pub(crate) file: PathBuf,
    /// Target that is a hypervisor host; all others are VMs (can be repeated)
    #[arg(long = "host", value_name = "NAME")]
    pub(crate) hosts: Vec<String>,
    /// Migrations that somebody ordered (JSON): a list of id, vm, source, destination, from_s, to_s
    #[arg(long, value_name = "FILE")]
    pub(crate) records: Option<PathBuf>,
    /// Say also when the heuristics of 2013 would have raised an alarm
    #[arg(long)]
    pub(crate) baseline: bool,
}

#[derive(Subcommand)]
pub(crate) enum PolicyCommand {
    /// Name everything that is wrong with policies and their directory
    Check {
        /// Directory with *.cedar and directory.toml
        dir: PathBuf,
    },
    /// Run the tests of policies, DIR/tests.toml
    Test {
        /// Directory with *.cedar, directory.toml, passports/*.toml and tests.toml
        dir: PathBuf,
    },
    /// Say what is decided on a case and why, condition by condition; grants nothing
    Explain(ExplainArgs),
    /// Print the schema: what policies may speak of
    Schema,
}

#[derive(Args)]
pub(crate) struct ExplainArgs {
    /// Directory with *.cedar and directory.toml
    pub(crate) dir: PathBuf,
    /// Name of the case [default: the only one]
    pub(crate) name: Option<String>,
    /// File with the case, in the form of tests [default: DIR/tests.toml]
    #[arg(long, value_name = "FILE")]
    pub(crate) cases: Option<PathBuf>,
    /// A signed passport, in place of the one that the case names
    #[arg(long, value_name = "FILE", requires = "owner", requires = "key")]
    pub(crate) passport: Option<PathBuf>,
    /// Whose passport it must be, as in spiffe://example.org/owner/acme
    #[arg(long, value_name = "IDENTITY", requires = "passport")]
    pub(crate) owner: Option<Identity>,
    /// The owner's public key
    #[arg(long, value_name = "FILE", requires = "passport")]
    pub(crate) key: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum PassportCommand {
    /// Make an owner's key: NAME.key, to be kept secret, and NAME.pub, to be given to hosts
    Keygen {
        /// Whose it is, as in spiffe://example.org/owner/NAME
        owner: Identity,
        /// Directory for the files
        #[arg(long, default_value = ".")]
        out: PathBuf,
    },
    /// Sign a passport
    Sign {
        /// What the owner allows (TOML)
        spec: PathBuf,
        /// The owner's private key
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// File for the passport
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// The VM's passport up to now: the new one must be the same owner's and have a higher version
        #[arg(long, value_name = "FILE")]
        replaces: Option<PathBuf>,
    },
    /// Show what a passport says, without asking who signed it
    Show {
        /// The passport
        file: PathBuf,
    },
    /// Check that a passport was signed by its owner and holds now
    Verify {
        /// The passport
        file: PathBuf,
        /// Whose it must be, as in spiffe://example.org/owner/NAME
        #[arg(long, value_name = "IDENTITY")]
        owner: Identity,
        /// The owner's public key
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// The VM it must be for
        #[arg(long, value_name = "UUID")]
        vm: Option<Uuid>,
        /// The newest passport known of this VM: this one must be the same or newer
        #[arg(long, value_name = "FILE")]
        known: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
pub(crate) enum ApprovalCommand {
    /// Agree, as an operator, to what another operator asks for
    Sign(Box<ApprovalArgs>),
    /// Show what an approval says, without asking who signed it
    Show {
        /// The approval
        file: PathBuf,
    },
}

#[derive(Args)]
pub(crate) struct ApprovalArgs {
    /// Who agrees, as in spiffe://example.org/operator/NAME
    #[arg(long, value_name = "IDENTITY")]
    pub(crate) operator: Identity,
    /// The operator's private key, as `palanquin ca issue operator` makes it
    #[arg(long, value_name = "FILE")]
    pub(crate) key: PathBuf,
    /// To what; a move is agreed to for both of its hosts
    #[arg(long, value_enum, default_value = "migrate")]
    pub(crate) action: ApprovedAction,
    /// The VM
    #[arg(long, value_name = "UUID")]
    pub(crate) vm: Uuid,
    /// The host where the VM is, as in spiffe://example.org/host/NAME
    #[arg(long, value_name = "IDENTITY")]
    pub(crate) from: Identity,
    /// The host where it will be [default: where it is]
    #[arg(long, value_name = "IDENTITY")]
    pub(crate) to: Option<Identity>,
    /// How long the approval holds, from now on; at most 7days
    #[arg(long, default_value = "1h")]
    pub(crate) hold: HumanDuration,
    /// File for the approval
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum ApprovedAction {
    /// The VM moves from one host to the other
    Migrate,
    /// The host takes over a VM that runs on it
    Adopt,
    /// A migration ends before its commit
    Abort,
    /// What is left of the VM is removed
    Erase,
}

#[derive(Subcommand)]
pub(crate) enum DecisionCommand {
    /// List the last decisions, oldest first
    Ls,
}

#[derive(Subcommand)]
pub(crate) enum AdvertisementCommand {
    /// Measure what this host has, hold it for VMs of another, and sign that
    Make {
        /// The host that it is for, by its name
        #[arg(long = "for", value_name = "HOST")]
        audience: String,
        /// Most memory to promise, for example 8GiB [default: all that can be given]
        #[arg(long, value_name = "SIZE")]
        memory: Option<ByteSize>,
        /// How long the promise holds, at most 1h
        #[arg(long, default_value = "10min")]
        hold: HumanDuration,
        /// File for the advertisement
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Show what an advertisement says, without asking who signed it
    Show {
        /// The advertisement
        file: PathBuf,
    },
    /// Accept what another host has promised to this one: refusals are compared with it
    Accept {
        /// The advertisement
        file: PathBuf,
    },
    /// List what was promised to this host and by it, and which hosts are in quarantine
    Ls,
    /// End the quarantine of a host that had advertised falsely
    Pardon {
        /// The host, by its name
        host: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum AttestCommand {
    /// On a host: make the key that signs quotes, and ask to be enrolled
    Request(AttestRequest),
    /// At the provider: ask a question that only this host's TPM can answer
    Challenge(AttestChallenge),
    /// On the host: let the TPM answer
    Answer(AttestAnswer),
    /// At the provider: judge the answer, and write the enrolment for other hosts
    Accept {
        /// What `challenge` kept
        pending: PathBuf,
        /// What the host has answered
        answer: PathBuf,
        /// Values that registers may have (TOML) [default: those that they have now]
        #[arg(long, value_name = "FILE")]
        registers: Option<PathBuf>,
        /// File for the enrolment, to be put into other hosts' `trust.attestation.enrolled`
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// On a host: encrypt a file so that this host can read it only while its registers hold what they do now
    Seal {
        /// The file, as the agent's private key
        file: PathBuf,
        #[command(flatten)]
        tpm: TpmArgs,
        /// Registers, 0 to 23
        #[arg(long, value_delimiter = ',', default_value = "0,2,4,7", value_parser = clap::value_parser!(u8).range(0..24))]
        registers: Vec<u8>,
        /// Directory of policies that must be in force as they are now
        #[arg(long, value_name = "DIR")]
        policies: Option<PathBuf>,
        /// File for the result
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

#[derive(Args)]
pub(crate) struct TpmArgs {
    /// This host's TPM; a virtual one is swtpm:host=HOST,port=PORT
    #[arg(long, value_name = "TPM", default_value = "device:/dev/tpmrm0")]
    pub(crate) tpm: String,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum EndorsementArg {
    Rsa,
    Ecc,
}

#[derive(Args)]
pub(crate) struct AttestRequest {
    /// This host, as in spiffe://example.org/host/NAME
    #[arg(long, value_name = "IDENTITY")]
    pub(crate) host: Identity,
    #[command(flatten)]
    pub(crate) tpm: TpmArgs,
    /// The key that signs quotes; made if it is not there
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/var/lib/palanquin/attestation-key"
    )]
    pub(crate) key: PathBuf,
    /// Registers that the agent will quote, 0 to 23
    #[arg(long, value_delimiter = ',', default_value = "0,2,4,7", value_parser = clap::value_parser!(u8).range(0..24))]
    pub(crate) registers: Vec<u8>,
    /// By which endorsement key the TPM is told from others
    #[arg(long, value_enum, default_value = "rsa")]
    pub(crate) endorsement: EndorsementArg,
    /// Certificates between the TPM's own and its manufacturer's (PEM)
    #[arg(long, value_name = "FILE")]
    pub(crate) certificates: Option<PathBuf>,
    /// File for the request
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Args)]
#[command(group = clap::ArgGroup::new("whose").required(true).args(["ca", "fingerprint"]))]
pub(crate) struct AttestChallenge {
    /// The host's request
    pub(crate) request: PathBuf,
    /// Who it must be from, as in spiffe://example.org/host/NAME
    #[arg(long, value_name = "IDENTITY")]
    pub(crate) host: Identity,
    /// Certificates of the TPM's manufacturer (PEM)
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// Fingerprint of the endorsement key, as read at the host itself
    #[arg(long, value_name = "SHA256")]
    pub(crate) fingerprint: Option<Sha256>,
    /// File for the question, for the host
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// File for what is kept until the answer comes; it holds a secret
    #[arg(long, value_name = "FILE")]
    pub(crate) pending: PathBuf,
}

#[derive(Args)]
pub(crate) struct AttestAnswer {
    /// The provider's question
    pub(crate) challenge: PathBuf,
    /// The request that this host has made
    #[arg(long, value_name = "FILE")]
    pub(crate) request: PathBuf,
    #[command(flatten)]
    pub(crate) tpm: TpmArgs,
    /// The key that signs quotes
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/var/lib/palanquin/attestation-key"
    )]
    pub(crate) key: PathBuf,
    /// Log of what firmware measured; one that is not there is left out
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/sys/kernel/security/tpm0/binary_bios_measurements"
    )]
    pub(crate) event_log: PathBuf,
    /// File for the answer
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

impl From<StrategyArg> for Strategy {
    fn from(argument: StrategyArg) -> Self {
        match argument {
            StrategyArg::Auto => Self::Auto,
            StrategyArg::StopAndCopy => Self::StopAndCopy,
            StrategyArg::PreCopy => Self::PreCopy,
            StrategyArg::Improved => Self::Improved,
            StrategyArg::PostCopy => Self::PostCopy,
            StrategyArg::Hybrid => Self::Hybrid,
        }
    }
}

impl From<CompressArg> for Compress {
    fn from(argument: CompressArg) -> Self {
        match argument {
            CompressArg::Auto => Self::Auto,
            CompressArg::Off => Self::Off,
            CompressArg::Lz4 => Self::Lz4,
            CompressArg::Zstd => Self::Zstd,
        }
    }
}

impl From<Assertion> for OperatorAssertion {
    fn from(argument: Assertion) -> Self {
        match argument {
            Assertion::DestinationLostIt => Self::DestinationLostIt,
            Assertion::DestinationRunsIt => Self::DestinationRunsIt,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_arguments_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
