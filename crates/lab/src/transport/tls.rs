//! Certificates under the file names that QEMU's `tls-creds-x509` expects.

use std::fs;
use std::path::Path;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};

/// Makes an authority, a server and a client in `dir`; the server has the address.
///
/// # Errors
///
/// If a file cannot be written.
pub fn make(dir: &Path, server: std::net::IpAddr) -> Result<()> {
    fs::create_dir_all(dir)?;
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name
        .push(DnType::CommonName, "lab authority");
    fs::write(dir.join("ca-cert.pem"), ca.self_signed(&ca_key)?.pem())?;
    let issuer = Issuer::new(ca, ca_key);
    let roles = [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ];
    for (role, usage) in roles {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, role);
        params.subject_alt_names = vec![SanType::IpAddress(server)];
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &issuer)?;
        fs::write(dir.join(format!("{role}-cert.pem")), certificate.pem())?;
        fs::write(dir.join(format!("{role}-key.pem")), key.serialize_pem())?;
    }
    Ok(())
}
