//! A small certificate authority in a directory: `ca.pem`, `ca.key`, and `issued.jsonl`, a line for each certificate.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use palanquin_api::config::is_name;
use palanquin_api::control::ErrorKind;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::failure::Failure;

const CA_DAYS: i64 = 3650;

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An agent.
    Host,
    /// A person.
    Operator,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Operator => "operator",
        }
    }
}

fn failed(what: &str, cause: impl std::fmt::Display) -> Failure {
    Failure::new(ErrorKind::Internal, what.to_owned()).cause(cause)
}

/// Writes a new file; one that is there already is never overwritten.
fn write_new(path: &Path, contents: &str, mode: u32) -> Result<(), Failure> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path);
    let mut file = file.map_err(|error| {
        let what = format!("cannot make {}", path.display());
        Failure::usage(what)
            .cause(error)
            .hint("nothing is overwritten: choose another directory")
    })?;
    file.write_all(contents.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|error| failed(&format!("cannot write {}", path.display()), error))
}

fn make_dir(path: &Path) -> Result<(), Failure> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| failed(&format!("cannot make {}", path.display()), error))
}

fn new_key() -> Result<KeyPair, Failure> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|error| failed("cannot make a key", error))
}

fn valid_for(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    // Clocks of hosts may be a little behind.
    params.not_before = now - Duration::minutes(5);
    params.not_after = now + Duration::days(days);
    params.serial_number = Some(SerialNumber::from_slice(&Uuid::new_v4().as_bytes()[1..]));
}

/// Makes an authority.
pub(crate) fn init(dir: &Path, trust_domain: &str) -> Result<(), Failure> {
    let fits = !trust_domain.is_empty()
        && trust_domain.len() <= 200
        && trust_domain
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
    if !fits {
        let what = format!("{trust_domain:?} is no trust domain");
        return Err(Failure::usage(what)
            .hint("lowercase letters, digits, `.`, `_` and `-`, as in example.org"));
    }
    make_dir(dir)?;
    let key = new_key()?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(
        DnType::CommonName,
        format!("Palanquin CA of {trust_domain}"),
    );
    let domain = format!("spiffe://{trust_domain}");
    let uri = domain
        .clone()
        .try_into()
        .map_err(|error| failed("cannot write the name", error))?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    valid_for(&mut params, CA_DAYS);
    let certificate = params
        .self_signed(&key)
        .map_err(|error| failed("cannot make the certificate", error))?;
    write_new(&dir.join("ca.key"), &key.serialize_pem(), 0o600)?;
    write_new(&dir.join("ca.pem"), &certificate.pem(), 0o644)?;
    write_new(&dir.join("trust-domain"), trust_domain, 0o644)?;
    write_new(&dir.join("issued.jsonl"), "", 0o644)
}

/// What is issued.
pub(crate) struct Order<'a> {
    /// Directory of the authority.
    pub(crate) dir: &'a Path,
    /// For whom.
    pub(crate) kind: Kind,
    /// Name.
    pub(crate) name: &'a str,
    /// Where the files go.
    pub(crate) out: Option<&'a Path>,
    /// Days of validity.
    pub(crate) days: u16,
    /// Further addresses in the certificate.
    pub(crate) addresses: &'a [String],
}

/// Issues a certificate; gives the directory with `NAME.pem`, `NAME.key` and `ca.pem`.
pub(crate) fn issue(order: &Order<'_>) -> Result<PathBuf, Failure> {
    let name = order.name;
    if !is_name(name) || name.parse::<IpAddr>().is_ok() {
        let what = format!("{name:?} is no name for a host or operator");
        let hint = "1 to 64 letters, digits, `.`, `_` or `-`, starting with a letter or digit; no IP address";
        return Err(Failure::usage(what).hint(hint));
    }
    let read = |file: &str| {
        fs::read_to_string(order.dir.join(file)).map_err(|error| {
            let what = format!("cannot read {}", order.dir.join(file).display());
            Failure::usage(what)
                .cause(error)
                .hint("`palanquin ca init DIR` makes an authority")
        })
    };
    let ca_pem = read("ca.pem")?;
    let ca_key = KeyPair::from_pem(&read("ca.key")?)
        .map_err(|error| failed("the authority's key is not usable", error))?;
    let domain = read("trust-domain")?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key)
        .map_err(|error| failed("the authority's certificate is not usable", error))?;
    let key = new_key()?;
    let params = leaf(order, domain.trim())?;
    let certificate: Certificate = params
        .signed_by(&key, &issuer)
        .map_err(|error| failed("cannot make the certificate", error))?;
    let default_out = order
        .dir
        .join("issued")
        .join(format!("{}-{name}", order.kind.word()));
    let out = order.out.unwrap_or(&default_out);
    make_dir(out)?;
    write_new(
        &out.join(format!("{name}.key")),
        &key.serialize_pem(),
        0o600,
    )?;
    write_new(&out.join(format!("{name}.pem")), &certificate.pem(), 0o644)?;
    let copy = out.join("ca.pem");
    // Several hosts' files may go to one directory, with the same authority.
    if fs::read_to_string(&copy).ok().as_deref() != Some(&ca_pem) {
        write_new(&copy, &ca_pem, 0o644)?;
    }
    let line = serde_json::json!({
        "kind": order.kind.word(),
        "name": name,
        "not_after": params.not_after.unix_timestamp(),
    });
    let mut log = OpenOptions::new()
        .append(true)
        .open(order.dir.join("issued.jsonl"))
        .map_err(|error| failed("cannot note the certificate", error))?;
    writeln!(log, "{line}").map_err(|error| failed("cannot note the certificate", error))?;
    Ok(out.to_owned())
}

fn leaf(order: &Order<'_>, domain: &str) -> Result<CertificateParams, Failure> {
    let odd = |error: rcgen::Error| failed("cannot write the names", error);
    let mut params = CertificateParams::default();
    let uri = format!("spiffe://{domain}/{}/{}", order.kind.word(), order.name);
    params
        .distinguished_name
        .push(DnType::CommonName, order.name);
    params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(odd)?)];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    if order.kind == Kind::Host {
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ServerAuth);
        let name = order.name.to_owned();
        params
            .subject_alt_names
            .push(SanType::DnsName(name.try_into().map_err(odd)?));
    }
    for address in order.addresses {
        params
            .subject_alt_names
            .push(match address.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(address.clone().try_into().map_err(odd)?),
            });
    }
    valid_for(&mut params, order.days.into());
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    use rustls::RootCertStore;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, UnixTime};
    use rustls::server::WebPkiClientVerifier;

    use super::*;

    fn order<'a>(dir: &'a Path, kind: Kind, name: &'a str) -> Order<'a> {
        Order {
            dir,
            kind,
            name,
            out: None,
            days: 90,
            addresses: &[],
        }
    }

    #[test]
    fn a_certificate_verifies_against_its_authority_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        init(&one, "example.org").unwrap();
        init(&other, "example.org").unwrap();
        let out = issue(&order(&one, Kind::Host, "a")).unwrap();
        let leaf = CertificateDer::from_pem_file(out.join("a.pem")).unwrap();
        for (authority, good) in [(&one, true), (&other, false)] {
            let mut roots = RootCertStore::empty();
            roots
                .add(CertificateDer::from_pem_file(authority.join("ca.pem")).unwrap())
                .unwrap();
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .unwrap();
            let verified = verifier.verify_client_cert(&leaf, &[], UnixTime::now());
            assert_eq!(verified.is_ok(), good);
        }
        let mode = fs::metadata(out.join("a.key"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.org").unwrap();
        assert!(init(dir.path(), "example.org").is_err());
        issue(&order(dir.path(), Kind::Operator, "alice")).unwrap();
        assert!(issue(&order(dir.path(), Kind::Operator, "alice")).is_err());
    }

    #[test]
    fn odd_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(init(dir.path(), "Example/org").is_err());
        init(dir.path(), "example.org").unwrap();
        for name in ["", "../a", "a/b", "10.0.0.1", "a b"] {
            assert!(
                issue(&order(dir.path(), Kind::Host, name)).is_err(),
                "{name}"
            );
        }
    }
}
