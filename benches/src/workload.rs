//! What the guests of a comparison do, and over which link they move.

use std::time::Duration;

use clap::ValueEnum;
use palanquin_lab::guest::GuestSpec;

/// Name of the VM.
pub(crate) const VM: &str = "bench";
/// MiB of files that the guest of `linux` and `gbit` holds.
pub(crate) const FILES_MIB: u64 = 440;
/// MiB that the guest of `hot` rewrites over and over.
const HOT_MIB: u64 = 256;
/// How fast it does so, in MiB/s.
const HOT_RATE: u64 = 128;
/// The link of `hot` in Mbit/s: 60 MiB/s, less than half of what is rewritten.
const HOT_LINK: u32 = 500;

/// What the guest does, and over which link it moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// 1.5 GiB with 1 GiB of incompressible bytes that nobody writes
    Idle,
    /// 1 GiB with a tree of real programs, libraries and texts in the page cache
    Linux,
    /// 512 MiB, of which 256 MiB are rewritten twice as fast as the link carries
    Hot,
    /// As linux, over a link of 1 Gbit/s
    Gbit,
}

impl Workload {
    /// All, in the order of the tables.
    pub(crate) const ALL: [Self; 4] = [Self::Idle, Self::Linux, Self::Hot, Self::Gbit];

    /// As on the command line and in the tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Linux => "linux",
            Self::Hot => "hot",
            Self::Gbit => "gbit",
        }
    }

    /// What each host may send, in Mbit/s.
    pub(crate) fn link_mbit_s(self) -> Option<u32> {
        match self {
            Self::Idle | Self::Linux => None,
            Self::Hot => Some(HOT_LINK),
            Self::Gbit => Some(1000),
        }
    }

    /// Whether the guest gets a tree of files first.
    pub(crate) fn has_files(self) -> bool {
        matches!(self, Self::Linux | Self::Gbit)
    }

    /// How long a migration may take; one that takes longer is given up and counts as not completed.
    pub(crate) fn deadline(self, hot: Duration) -> Duration {
        match self {
            Self::Hot => hot,
            _ => Duration::from_secs(120),
        }
    }

    /// The guest; `files` is the URL of the archive with its files.
    pub(crate) fn guest(self, files: &str) -> GuestSpec {
        let mut guest = GuestSpec::small(VM).on_network();
        match self {
            Self::Idle => {
                guest.memory_mib = vec![1536];
                guest.fill_mib = 1024;
                guest.dirty_mib_s = 0;
            }
            Self::Linux | Self::Gbit => {
                // The files go into a tmpfs, which takes at most half of it.
                guest.memory_mib = vec![1024];
                // Something is always written in a machine that works: 4 MiB each second, incompressible.
                guest.files = Some(files.to_owned());
            }
            Self::Hot => {
                guest.memory_mib = vec![512];
                guest.buffer_mib = HOT_MIB;
                guest.dirty_mib_s = HOT_RATE;
            }
        }
        guest
    }
}
