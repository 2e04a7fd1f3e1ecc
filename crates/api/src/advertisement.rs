//! Advertisements of capacity, over the control interface.
//!
//! | method | path | request | answer |
//! |---|---|---|---|
//! | POST | `/v1/advertisements` | [`MakeAdvertisement`] | [`MadeAdvertisement`] |
//! | GET | `/v1/advertisements` | | [`Advertisements`] |
//! | POST | `/v1/advertisements/accept` | [`AcceptAdvertisement`] | [`AdvertisementInfo`] |
//! | POST | `/v1/advertisements/pardon` | [`PardonHost`] | [`QuarantineInfo`], as it was |

use serde::{Deserialize, Serialize};

use crate::hex::Hex;

/// `POST /v1/advertisements`: promise memory of this host to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MakeAdvertisement {
    /// Name of the host that it is for.
    #[serde(rename = "for")]
    pub audience: String,
    /// Most bytes to promise; all that this host has to give where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// How long the promise holds, in seconds: 1 to 3600.
    pub lifetime_s: u64,
}

/// An advertisement that was made: the promise is kept from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeAdvertisement {
    /// What is to be carried to the other host: signed, with the certificates of this one.
    pub parcel: Hex,
    /// What it says.
    pub says: AdvertisementInfo,
}

/// `POST /v1/advertisements/accept`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcceptAdvertisement {
    /// What the other host has made.
    pub parcel: Hex,
}

/// `POST /v1/advertisements/pardon`: end the quarantine of a host that had advertised falsely.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PardonHost {
    /// Its name.
    pub host: String,
}

/// What an advertisement says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdvertisementInfo {
    /// Who promises.
    pub host: String,
    /// To whom.
    pub audience: String,
    /// Grows with every advertisement of that host.
    pub sequence: u64,
    /// When it was measured, seconds since 1970.
    pub issued_unix_s: u64,
    /// Until when it holds, seconds since 1970.
    pub expires_unix_s: u64,
    /// Memory of the host.
    pub memory_total_bytes: u64,
    /// What is promised of it.
    pub memory_free_bytes: u64,
    /// What is left of that, less what was sent there since.
    pub memory_left_bytes: u64,
    /// CPU threads.
    pub cpu_threads: u32,
    /// Version of the hypervisor.
    pub hypervisor_version: String,
    /// Digest of the hypervisor.
    pub hypervisor_sha256: Option<String>,
    /// Region of the host.
    pub region: Option<String>,
    /// Groups of the host.
    pub groups: Vec<String>,
    /// Digest of the signed advertisement.
    pub sha256: String,
}

/// What this host has promised to another, as long as that holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromiseInfo {
    /// To whom.
    pub audience: String,
    /// What is left of it: VMs that came from there were taken off.
    pub left_bytes: u64,
    /// Until when, seconds since 1970.
    pub expires_unix_s: u64,
}

/// A host in quarantine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantineInfo {
    /// Who.
    pub host: String,
    /// Since when, seconds since 1970.
    pub since_unix_s: u64,
    /// Code of what was wrong: with `advertisement-false` nothing is sent there until somebody pardons it.
    pub code: String,
    /// What was wrong.
    pub message: String,
}

/// `GET /v1/advertisements`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advertisements {
    /// What other hosts have promised to this one, and holds now.
    pub accepted: Vec<AdvertisementInfo>,
    /// What this host has promised to others.
    pub promised: Vec<PromiseInfo>,
    /// Hosts in quarantine.
    pub quarantined: Vec<QuarantineInfo>,
}
