//! What a host says it has room for: a promise to one other host, for a while.
//!
//! The host that makes it measures its memory, holds that much for the host that it is addressed to, and signs. The host
//! that receives it makes [`Accepted`] of it, or says which rule it breaks, and finds out whether it was true when it asks
//! for a reservation: [`Accepted::is_broken_by_refusing`], [`Accepted::contradicts`].

use std::fmt;

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};
use palanquin_api::config::is_name;
use serde::Serialize;

use crate::cbor;
use crate::digest::Sha256;
use crate::identity::{Identity, Kind};
use crate::passport::date;
use crate::policy::Host;
use crate::signed::{CLOCK_SKEW_S, Document, FieldError, Verified, Window, WindowError};

/// Longest time for which an advertisement may hold, in seconds: an hour.
pub const ADVERTISEMENT_MAX_S: u64 = 3600;
/// Most groups in one.
pub const GROUPS_MAX: usize = 64;
/// Longest version of a hypervisor, in bytes.
pub const VERSION_MAX: usize = 128;
/// What a VM takes besides its guest RAM, in bytes: counted for each VM on both sides.
pub const VM_OVERHEAD_BYTES: u64 = 64 << 20;
/// One part in so many of what was promised is not audited: memory that a host's other processes take meanwhile.
pub const MARGIN: u64 = 8;
/// Longest [`Parcel`], in bytes.
pub const PARCEL_MAX: usize = 64 * 1024;
/// Most certificates in a [`Parcel`].
pub const CERTIFICATES_MAX: usize = 8;

/// What a host has measured of itself, and promises to one other host.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "kebab-case")]
#[cbor(map)]
pub struct Advertisement {
    /// Who promises; signs.
    #[n(0)]
    pub host: Identity,
    /// To whom. What is held for one host is not held for another.
    #[n(1)]
    pub audience: Identity,
    /// Grows with every advertisement of this host: an older one than is known is refused.
    #[n(2)]
    pub sequence: u64,
    /// When it was measured, seconds since 1970.
    #[n(3)]
    pub issued_unix_s: u64,
    /// When it is void, seconds since 1970; at most [`ADVERTISEMENT_MAX_S`] later.
    #[n(4)]
    pub expires_unix_s: u64,
    /// Memory of the host, in bytes.
    #[n(5)]
    pub memory_total_bytes: u64,
    /// What is held for VMs of the audience, each with [`VM_OVERHEAD_BYTES`], in bytes.
    #[n(6)]
    pub memory_free_bytes: u64,
    /// CPU threads that the host's agent may use.
    #[n(7)]
    pub cpu_threads: u32,
    /// Version of the hypervisor, as it says itself.
    #[n(8)]
    pub hypervisor_version: String,
    /// Digest of the hypervisor's binary; absent where it is a script, which starts another.
    #[n(9)]
    pub hypervisor_sha256: Option<Sha256>,
    /// Region of the host, by its own directory.
    #[n(10)]
    pub region: Option<String>,
    /// Groups of the host, by its own directory; in ascending order.
    #[n(11)]
    pub groups: Vec<String>,
}

impl Document for Advertisement {
    const CONTENT_TYPE: &'static str = "application/vnd.palanquin.advertisement+cbor";
    const WORD: &'static str = "advertisement";
    const SIGNER: Kind = Kind::Host;

    fn signer(&self) -> &Identity {
        &self.host
    }

    fn window(&self) -> Window {
        Window {
            not_before_unix_s: self.issued_unix_s,
            expires_unix_s: self.expires_unix_s,
        }
    }

    fn check(&self) -> Result<(), FieldError> {
        for (field, host) in [("host", &self.host), ("audience", &self.audience)] {
            if host.kind() != Kind::Host {
                return Err(FieldError::new(field, format!("{host} is no host")));
            }
        }
        if self.host == self.audience {
            return Err(FieldError::new("audience", "the host itself"));
        }
        if !matches!(
            self.expires_unix_s.checked_sub(self.issued_unix_s),
            Some(1..=ADVERTISEMENT_MAX_S)
        ) {
            let what = "not within an hour after it was measured";
            return Err(FieldError::new("expires", what));
        }
        // They are kept in a database that has signed numbers.
        let numbers = [
            ("sequence", self.sequence),
            ("expires", self.expires_unix_s),
            ("memory-total", self.memory_total_bytes),
        ];
        for (field, number) in numbers {
            if i64::try_from(number).is_err() {
                return Err(FieldError::new(field, "too large a number"));
            }
        }
        if self.memory_free_bytes > self.memory_total_bytes {
            return Err(FieldError::new("memory-free", "more than there is"));
        }
        if self.cpu_threads == 0 {
            return Err(FieldError::new("cpu-threads", "none"));
        }
        let version = &self.hypervisor_version;
        let is_printable = |b: u8| b == b' ' || b.is_ascii_graphic();
        if !(1..=VERSION_MAX).contains(&version.len()) || !version.bytes().all(is_printable) {
            let what = format!("not 1 to {VERSION_MAX} printable characters");
            return Err(FieldError::new("hypervisor-version", what));
        }
        if self.region.as_ref().is_some_and(|region| !is_name(region)) {
            return Err(FieldError::new("region", "no name"));
        }
        if self.groups.len() > GROUPS_MAX || !self.groups.iter().all(|group| is_name(group)) {
            let what = format!("more than {GROUPS_MAX}, or no name");
            return Err(FieldError::new("groups", what));
        }
        if !self.groups.is_sorted_by(|a, b| a < b) {
            return Err(FieldError::new("groups", "not in ascending order"));
        }
        Ok(())
    }
}

impl fmt::Display for Advertisement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        let (free, total) = (mib(self.memory_free_bytes), mib(self.memory_total_bytes));
        let (from, to) = (date(self.issued_unix_s), date(self.expires_unix_s));
        writeln!(f, "host         {}", self.host)?;
        writeln!(f, "promises to  {}", self.audience)?;
        writeln!(f, "sequence     {}", self.sequence)?;
        writeln!(f, "holds        {from} to {to}")?;
        writeln!(f, "memory       {free} MiB of {total} MiB")?;
        writeln!(f, "CPU threads  {}", self.cpu_threads)?;
        writeln!(f, "hypervisor   {}", self.hypervisor_version)?;
        if let Some(sha256) = &self.hypervisor_sha256 {
            writeln!(f, "             {sha256}")?;
        }
        if let Some(region) = &self.region {
            writeln!(f, "region       {region}")?;
        }
        if !self.groups.is_empty() {
            writeln!(f, "groups       {}", self.groups.join(", "))?;
        }
        Ok(())
    }
}

/// What the receiver knows when it is to accept an advertisement.
#[derive(Clone, Debug)]
pub struct Receiver<'a> {
    /// This host.
    pub host: &'a Identity,
    /// Seconds since 1970.
    pub now_unix_s: u64,
    /// Sequence and digest of the newest one of that host that was accepted.
    pub newest: Option<(u64, Sha256)>,
    /// The other host in this host's directory.
    pub listed: Option<&'a Host>,
    /// Why the other host is in quarantine, if it is.
    pub quarantined: Option<&'a str>,
}

/// Why an advertisement is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdvertisementError {
    /// Addressed to another host.
    #[error("it is a promise to {0}")]
    OtherAudience(Identity),
    /// Too old, or not yet.
    #[error("it does not hold now: {0}")]
    Window(#[from] WindowError),
    /// Older than one that is known, or another of the same number.
    #[error("it has sequence {given}, and one of sequence {known} is known")]
    NotNewest {
        /// In the advertisement.
        given: u64,
        /// Known here.
        known: u64,
    },
    /// The host failed its last check.
    #[error("the host is in quarantine: {0}")]
    Quarantined(String),
    /// Nobody has entered the host.
    #[error("{0} is not in the directory")]
    Unlisted(Identity),
    /// The directory says otherwise.
    #[error("it says another {0} than the directory")]
    OtherPlace(&'static str),
}

impl AdvertisementError {
    /// Stable code for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::OtherAudience(_) => "advertisement-other-audience",
            Self::Window(_) => "advertisement-expired",
            Self::NotNewest { .. } => "advertisement-not-newest",
            Self::Quarantined(_) => "host-quarantined",
            Self::Unlisted(_) => "host-unknown",
            Self::OtherPlace(_) => "advertisement-other-place",
        }
    }
}

impl Verified<Advertisement> {
    /// Accepts it, as the host that it is addressed to.
    ///
    /// # Errors
    ///
    /// The first rule it breaks.
    pub fn accept(self, receiver: &Receiver<'_>) -> Result<Accepted, AdvertisementError> {
        if self.audience != *receiver.host {
            return Err(AdvertisementError::OtherAudience(self.audience.clone()));
        }
        self.window().check(receiver.now_unix_s)?;
        if let Some((known, sha256)) = receiver.newest
            && (self.sequence < known || (self.sequence == known && self.sha256() != sha256))
        {
            let given = self.sequence;
            return Err(AdvertisementError::NotNewest { given, known });
        }
        if let Some(why) = receiver.quarantined {
            return Err(AdvertisementError::Quarantined(why.to_owned()));
        }
        let listed = receiver
            .listed
            .ok_or_else(|| AdvertisementError::Unlisted(self.host.clone()))?;
        if self.region != listed.region {
            return Err(AdvertisementError::OtherPlace("region"));
        }
        if !self.groups.iter().eq(&listed.groups) {
            return Err(AdvertisementError::OtherPlace("set of groups"));
        }
        Ok(Accepted(self))
    }
}

/// An advertisement that was verified, is fresh, is the newest, and is by a host that passed its last check.
#[derive(Clone, Debug)]
pub struct Accepted(Verified<Advertisement>);

impl Accepted {
    /// What it says.
    pub fn advertisement(&self) -> &Advertisement {
        &self.0
    }

    /// Digest of its envelope.
    pub fn sha256(&self) -> Sha256 {
        self.0.sha256()
    }

    /// What is left of the promise where VMs that need so many bytes ([`needed_bytes`]) were sent since it was measured.
    pub fn left_bytes(&self, sent_since_bytes: u64) -> u64 {
        self.0.memory_free_bytes.saturating_sub(sent_since_bytes)
    }

    /// From when on what was sent counts against the promise, seconds since 1970: earlier than it was measured, because
    /// clocks differ, and what was on its way then may have got its reservation later.
    pub fn counts_from_unix_s(&self) -> u64 {
        self.0.issued_unix_s.saturating_sub(2 * CLOCK_SKEW_S)
    }

    /// Whether the host breaks its promise by refusing a VM of that much guest RAM for want of memory now. Not where the
    /// promise is about to end, by either clock, or where the VM needs more than what is left of it less the margin.
    pub fn is_broken_by_refusing(
        &self,
        ram_bytes: u64,
        sent_since_bytes: u64,
        now_unix_s: u64,
    ) -> bool {
        let audited = self.0.memory_free_bytes - self.0.memory_free_bytes / MARGIN;
        self.holds_surely(now_unix_s)
            && needed_bytes(ram_bytes) <= audited.saturating_sub(sent_since_bytes)
    }

    /// Whether the host has proven to run another hypervisor than it says.
    pub fn contradicts(&self, proven: Option<&Sha256>, now_unix_s: u64) -> bool {
        match (&self.0.hypervisor_sha256, proven) {
            (Some(says), Some(proven)) => self.holds_surely(now_unix_s) && says != proven,
            _ => false,
        }
    }

    /// Whether it holds by every clock that may be ours or the other host's.
    fn holds_surely(&self, now_unix_s: u64) -> bool {
        let window = self.0.window();
        window.check(now_unix_s).is_ok()
            && now_unix_s.saturating_add(CLOCK_SKEW_S) <= window.expires_unix_s
    }
}

/// What a VM of that much guest RAM takes, in bytes.
pub fn needed_bytes(ram_bytes: u64) -> u64 {
    ram_bytes.saturating_add(VM_OVERHEAD_BYTES)
}

/// An advertisement as it is carried from one host to the other: with the certificates of the host that signed it, its own
/// first. Nothing in it is verified.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Parcel {
    /// The envelope.
    #[n(0)]
    pub envelope: ByteVec,
    /// DER (RFC 5280); 1 to [`CERTIFICATES_MAX`].
    #[n(1)]
    pub certificates: Vec<ByteVec>,
}

/// Bytes that are no parcel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParcelError {
    /// More than [`PARCEL_MAX`].
    #[error("{0} bytes, at most {PARCEL_MAX} are allowed")]
    TooLong(usize),
    /// Not CBOR of the one form.
    #[error("not an advertisement with certificates: {0}")]
    Malformed(String),
    /// None, or more than may be.
    #[error("{0} certificates, 1 to {CERTIFICATES_MAX} are allowed")]
    Certificates(usize),
}

impl Parcel {
    /// As it is carried.
    ///
    /// # Errors
    ///
    /// It is too long, or has no certificates or too many.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ParcelError> {
        let bytes = cbor::to_vec(self);
        self.bounded(bytes.len())?;
        Ok(bytes)
    }

    /// As it came.
    ///
    /// # Errors
    ///
    /// It is too long, or none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ParcelError> {
        if bytes.len() > PARCEL_MAX {
            return Err(ParcelError::TooLong(bytes.len()));
        }
        let parcel: Self =
            cbor::from_slice(bytes).map_err(|error| ParcelError::Malformed(error.to_string()))?;
        parcel.bounded(bytes.len())?;
        Ok(parcel)
    }

    fn bounded(&self, len: usize) -> Result<(), ParcelError> {
        match self.certificates.len() {
            1..=CERTIFICATES_MAX if len <= PARCEL_MAX => Ok(()),
            1..=CERTIFICATES_MAX => Err(ParcelError::TooLong(len)),
            count => Err(ParcelError::Certificates(count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::keys::tests::P256;
    use crate::{Keyring, Sign, Signed};

    const GIB: u64 = 1 << 30;

    fn advertisement() -> Advertisement {
        Advertisement {
            host: "spiffe://example.org/host/beta".parse().unwrap(),
            audience: "spiffe://example.org/host/alpha".parse().unwrap(),
            sequence: 7,
            issued_unix_s: 1_800_000_000,
            expires_unix_s: 1_800_000_600,
            memory_total_bytes: 64 * GIB,
            memory_free_bytes: 16 * GIB,
            cpu_threads: 8,
            hypervisor_version: "8.2.2".to_owned(),
            hypervisor_sha256: Some(Sha256([1; 32])),
            region: Some("de".to_owned()),
            groups: vec!["bronze".to_owned(), "gold".to_owned()],
        }
    }

    fn listed() -> Host {
        Host {
            groups: ["gold", "bronze"].map(str::to_owned).into(),
            region: Some("de".to_owned()),
            quarantined: false,
        }
    }

    fn verified(advertisement: &Advertisement) -> Verified<Advertisement> {
        let key = P256::new();
        let mut ring = Keyring::default();
        ring.insert(advertisement.host.clone(), key.public_key())
            .unwrap();
        let signed = Signed::sign(advertisement, &key).unwrap();
        signed.verify(&ring, advertisement.issued_unix_s).unwrap()
    }

    fn accepted() -> Accepted {
        let (advertisement, listed) = (advertisement(), listed());
        let receiver = Receiver {
            host: &advertisement.audience,
            now_unix_s: advertisement.issued_unix_s + 10,
            newest: None,
            listed: Some(&listed),
            quarantined: None,
        };
        verified(&advertisement).accept(&receiver).unwrap()
    }

    #[test]
    fn each_rule_that_the_receiver_finds_broken_has_its_name() {
        let (advertisement, listed) = (advertisement(), listed());
        let verified = verified(&advertisement);
        let good = Receiver {
            host: &advertisement.audience,
            now_unix_s: advertisement.issued_unix_s + 10,
            newest: Some((7, verified.sha256())),
            listed: Some(&listed),
            quarantined: None,
        };
        assert!(verified.clone().accept(&good).is_ok());
        let elsewhere = Host {
            region: None,
            ..listed.clone()
        };
        let grouped = Host {
            groups: ["gold".to_owned()].into(),
            ..listed.clone()
        };
        let of = |change: &dyn Fn(&mut Receiver<'_>)| {
            let mut receiver = good.clone();
            change(&mut receiver);
            verified.clone().accept(&receiver).unwrap_err().code()
        };
        assert_eq!(
            verified
                .clone()
                .accept(&Receiver {
                    host: &advertisement.host,
                    ..good.clone()
                })
                .unwrap_err()
                .code(),
            "advertisement-other-audience"
        );
        assert_eq!(of(&|r| r.now_unix_s += 591), "advertisement-expired");
        assert_eq!(of(&|r| r.now_unix_s -= 71), "advertisement-expired");
        let newer = Some((8, Sha256([0; 32])));
        assert_eq!(of(&|r| r.newest = newer), "advertisement-not-newest");
        let other = Some((7, Sha256([0; 32])));
        assert_eq!(of(&|r| r.newest = other), "advertisement-not-newest");
        assert_eq!(of(&|r| r.quarantined = Some("lied")), "host-quarantined");
        assert_eq!(of(&|r| r.listed = None), "host-unknown");
        for place in [&elsewhere, &grouped] {
            let refused = verified.clone().accept(&Receiver {
                listed: Some(place),
                ..good.clone()
            });
            assert_eq!(refused.unwrap_err().code(), "advertisement-other-place");
        }
    }

    #[test]
    fn a_refusal_within_what_is_promised_breaks_the_promise_and_no_other_does() {
        let (accepted, now) = (accepted(), 1_800_000_010);
        // An eighth is margin: 14 GiB of 16 are audited, and each VM takes more than its guest RAM.
        let most = 14 * GIB - VM_OVERHEAD_BYTES;
        assert!(accepted.is_broken_by_refusing(most, 0, now));
        assert!(!accepted.is_broken_by_refusing(most + 1, 0, now));
        assert!(!accepted.is_broken_by_refusing(u64::MAX, 0, now));
        // What was sent there already counts.
        let sent = needed_bytes(10 * GIB);
        assert!(accepted.is_broken_by_refusing(3 * GIB, sent, now));
        assert!(!accepted.is_broken_by_refusing(4 * GIB, sent, now));
        assert!(!accepted.is_broken_by_refusing(GIB, u64::MAX, now));
        assert_eq!(accepted.left_bytes(sent), 6 * GIB - VM_OVERHEAD_BYTES);
        // The other host's clock may be ahead: it may think that the promise has ended.
        let last = 1_800_000_600 - CLOCK_SKEW_S;
        assert!(accepted.is_broken_by_refusing(GIB, 0, last));
        assert!(!accepted.is_broken_by_refusing(GIB, 0, last + 1));
    }

    #[test]
    fn another_hypervisor_contradicts_only_what_was_said_and_proven() {
        let (accepted, now) = (accepted(), 1_800_000_010);
        assert!(accepted.contradicts(Some(&Sha256([2; 32])), now));
        assert!(!accepted.contradicts(Some(&Sha256([1; 32])), now));
        assert!(!accepted.contradicts(None, now));
        assert!(!accepted.contradicts(Some(&Sha256([2; 32])), now + 600));
    }

    #[test]
    fn every_rule_for_a_field_is_checked() {
        assert_eq!(advertisement().check(), Ok(()));
        let odd = |field: &str, change: &dyn Fn(&mut Advertisement)| {
            let mut odd = advertisement();
            change(&mut odd);
            let error = odd.check().unwrap_err();
            assert_eq!(error.field, field, "{error}");
        };
        let owner = "spiffe://example.org/owner/acme".parse::<Identity>();
        let owner = owner.unwrap();
        odd("host", &|a| a.host = owner.clone());
        odd("audience", &|a| a.audience = owner.clone());
        odd("audience", &|a| a.audience = a.host.clone());
        odd("expires", &|a| a.expires_unix_s = a.issued_unix_s);
        odd("expires", &|a| a.expires_unix_s += ADVERTISEMENT_MAX_S);
        odd("expires", &|a| a.expires_unix_s = 0);
        odd("expires", &|a| {
            (a.issued_unix_s, a.expires_unix_s) = (u64::MAX - 1, u64::MAX);
        });
        odd("sequence", &|a| a.sequence = u64::MAX);
        odd("memory-total", &|a| a.memory_total_bytes = u64::MAX);
        odd("memory-free", &|a| a.memory_free_bytes = 65 * GIB);
        odd("cpu-threads", &|a| a.cpu_threads = 0);
        let versions = [
            String::new(),
            "8\n".to_owned(),
            "\u{e4}".to_owned(),
            "8".repeat(129),
        ];
        for version in versions {
            odd("hypervisor-version", &|a| {
                a.hypervisor_version.clone_from(&version);
            });
        }
        odd("region", &|a| a.region = Some("d e".to_owned()));
        odd("groups", &|a| a.groups = vec![String::new()]);
        odd("groups", &|a| a.groups = vec!["a".to_owned(); 65]);
        odd("groups", &|a| a.groups = vec!["a".to_owned(); 2]);
        odd("groups", &|a| a.groups.reverse());
    }

    #[test]
    fn a_parcel_has_certificates_and_an_end() {
        let parcel = |certificates: usize, len: usize| Parcel {
            envelope: vec![1; len].into(),
            certificates: vec![vec![2; 9].into(); certificates],
        };
        let good = parcel(CERTIFICATES_MAX, 100);
        let bytes = good.to_bytes().unwrap();
        assert_eq!(Parcel::from_bytes(&bytes), Ok(good));
        for count in [0, CERTIFICATES_MAX + 1] {
            let error = ParcelError::Certificates(count);
            assert_eq!(parcel(count, 1).to_bytes(), Err(error.clone()));
            let bytes = cbor::to_vec(&parcel(count, 1));
            assert_eq!(Parcel::from_bytes(&bytes), Err(error));
        }
        let long = parcel(1, PARCEL_MAX);
        assert!(matches!(long.to_bytes(), Err(ParcelError::TooLong(_))));
        let bytes = cbor::to_vec(&long);
        assert!(matches!(
            Parcel::from_bytes(&bytes),
            Err(ParcelError::TooLong(_))
        ));
        let trailing = [&bytes[..20], b"\0"].concat();
        assert!(matches!(
            Parcel::from_bytes(&trailing),
            Err(ParcelError::Malformed(_))
        ));
    }

    proptest! {
        #[test]
        fn an_advertisement_is_read_as_it_was_written(
            (sequence, issued_unix_s) in (0..u64::MAX / 4, 0..u64::MAX / 4),
            length in 1..=ADVERTISEMENT_MAX_S,
            (total, share) in (0..u64::MAX / 4, 0..=100_u64),
            cpu_threads in 1..u32::MAX,
            hypervisor_version in "[ -~]{1,128}",
            digest in any::<Option<[u8; 32]>>(),
            region in prop::option::of("[a-z][a-z0-9-]{0,10}"),
            groups in prop::collection::btree_set("[a-z][a-z0-9]{0,4}", 0..9),
        ) {
            let advertisement = Advertisement {
                sequence,
                issued_unix_s,
                expires_unix_s: issued_unix_s + length,
                memory_total_bytes: total,
                memory_free_bytes: total / 100 * share,
                cpu_threads,
                hypervisor_version,
                hypervisor_sha256: digest.map(Sha256),
                region,
                groups: groups.into_iter().collect(),
                ..advertisement()
            };
            prop_assert_eq!(advertisement.check(), Ok(()));
            let bytes = cbor::to_vec(&advertisement);
            prop_assert_eq!(cbor::from_slice::<Advertisement>(&bytes), Ok(advertisement.clone()));
            let verified = verified(&advertisement);
            prop_assert_eq!(&*verified, &advertisement);
        }

        #[test]
        fn any_altered_byte_of_an_advertisement_is_noticed(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let key = P256::new();
            let mut ring = Keyring::default();
            ring.insert(advertisement().host, key.public_key()).unwrap();
            let mut bytes = Signed::sign(&advertisement(), &key).unwrap().as_bytes().to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(altered) = Signed::<Advertisement>::from_bytes(&bytes) {
                prop_assert!(altered.verify(&ring, 1_800_000_010).is_err());
            }
        }

        #[test]
        fn a_promise_is_never_broken_by_refusing_more_than_is_left(
            (ram, sent) in (any::<u64>(), any::<u64>()),
            now in 1_799_999_900..1_800_000_700_u64,
        ) {
            let accepted = accepted();
            if accepted.is_broken_by_refusing(ram, sent, now) {
                prop_assert!(needed_bytes(ram) <= accepted.left_bytes(sent));
                prop_assert!(now <= 1_800_000_600);
            }
        }

        #[test]
        fn arbitrary_bytes_are_no_parcel_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(parcel) = Parcel::from_bytes(&bytes) {
                prop_assert_eq!(parcel.to_bytes(), Ok(bytes));
            }
        }
    }
}
