//! False advertisements, with the true key of a host: its agent makes none.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use palanquin_agent::gate::HostSigner;
use palanquin_agent::identity::key_of_certificate;
use palanquin_agent::tls::Material;
use palanquin_lab::trust::identity;
use palanquin_trust::advertisement::Parcel;
use palanquin_trust::{Advertisement, Signed};

/// Somebody who has the key of a host, and signs with it what he likes.
pub(crate) struct Forger {
    signer: HostSigner,
    certificates: Vec<Vec<u8>>,
}

impl Forger {
    /// With what lies in a host's own directory.
    ///
    /// # Errors
    ///
    /// If there is no key there that signs.
    pub(crate) fn new(dir: &Path, name: &str) -> Result<Self> {
        let file = |end: &str| dir.join(end);
        let (own, key) = (format!("{name}.pem"), format!("{name}.key"));
        let material = Material::load(&file("ca.pem"), &file(&own), &file(&key), name)?;
        let public = key_of_certificate(&material.chain[0])?;
        Ok(Self {
            signer: HostSigner::new(Arc::clone(&material.key), public),
            certificates: material.chain.iter().map(|der| der.to_vec()).collect(),
        })
    }

    /// The second host promises the first a tebibyte for ten minutes, but for the changes.
    ///
    /// # Errors
    ///
    /// If it says what can't be signed.
    pub(crate) fn parcel(&self, change: impl FnOnce(&mut Advertisement)) -> Result<Parcel> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let mut says = Advertisement {
            host: identity("host", "b").parse()?,
            audience: identity("host", "a").parse()?,
            // A host's own are numbered by its clock.
            sequence: now - 100,
            issued_unix_s: now,
            expires_unix_s: now + 600,
            memory_total_bytes: 2 << 40,
            memory_free_bytes: 1 << 40,
            cpu_threads: 512,
            hypervisor_version: "8.2.2".to_owned(),
            hypervisor_sha256: None,
            region: None,
            groups: Vec::new(),
        };
        change(&mut says);
        let signed = Signed::sign(&says, &self.signer)?;
        Ok(Parcel {
            envelope: signed.as_bytes().to_vec().into(),
            certificates: self.certificates.iter().cloned().map(Into::into).collect(),
        })
    }
}
