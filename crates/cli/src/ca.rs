//! A small certificate authority in a directory: `ca.pem`, `ca.key`, and `issued.jsonl`, a line for each certificate.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use palanquin_api::config::{HOST_NAME_RULE, NAME_RULE, is_dns_name, is_host_name, is_name};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::failure::Failure;
use crate::files::{NewFiles, failed, make_dir};

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

fn new_key() -> Result<KeyPair, Failure> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|error| failed("cannot make a key", error))
}

fn valid_for(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    // Clocks of hosts may be a little behind.
    params.not_before = now - Duration::minutes(5);
    params.not_after = now + Duration::days(days);
    params.serial_number = Some(new_serial());
}

/// Random, positive, and of the same length always (RFC 5280, section 4.1.2.2): a first byte from 0x40 to 0x7f needs
/// neither a zero before it nor loses one, so that the index has what others print.
fn new_serial() -> SerialNumber {
    let mut bytes = *Uuid::new_v4().as_bytes();
    bytes[0] = (bytes[0] & 0x3f) | 0x40;
    SerialNumber::from_slice(&bytes)
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
    for file in ["ca.key", "ca.pem", "trust-domain", "issued.jsonl"] {
        if dir.join(file).symlink_metadata().is_ok() {
            let what = format!("there is an authority in {} already", dir.display());
            return Err(Failure::usage(what)
                .cause(format!("it holds {file}"))
                .hint("nothing is overwritten: choose another directory"));
        }
    }
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
    let mut files = NewFiles::default();
    files.write(&dir.join("ca.key"), key.serialize_pem(), 0o600)?;
    files.write(&dir.join("ca.pem"), certificate.pem(), 0o644)?;
    files.write(&dir.join("trust-domain"), trust_domain, 0o644)?;
    files.write(&dir.join("issued.jsonl"), "", 0o644)?;
    files.keep();
    Ok(())
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

/// A certificate that was issued: a line of `issued.jsonl`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Issued {
    /// Serial number, lowercase hex.
    pub(crate) serial: String,
    /// The one URI name.
    pub(crate) spiffe_id: String,
    /// Further addresses.
    pub(crate) addresses: Vec<String>,
    /// Beginning of its validity, seconds since 1970.
    pub(crate) not_before_unix_s: i64,
    /// End of its validity, seconds since 1970.
    pub(crate) not_after_unix_s: i64,
    /// Directory with `NAME.pem`, `NAME.key` and `ca.pem`.
    pub(crate) out: PathBuf,
}

/// Issues a certificate. It is noted before it is handed out, so that there is none which is not in the index.
pub(crate) fn issue(order: &Order<'_>) -> Result<Issued, Failure> {
    check_names(order)?;
    let name = order.name;
    let read = |file: &str| {
        let path = order.dir.join(file);
        fs::read_to_string(&path).map_err(|error| {
            let failure = Failure::usage(format!("cannot read {}", path.display())).cause(&error);
            match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    failure.hint("only the owner of the authority can issue certificates")
                }
                _ => failure.hint("`palanquin ca init DIR` makes an authority; --dir names it"),
            }
        })
    };
    let ca_pem = read("ca.pem")?;
    let ca_key = KeyPair::from_pem(&read("ca.key")?)
        .map_err(|error| failed("the authority's key is not usable", error))?;
    let domain = read("trust-domain")?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key)
        .map_err(|error| failed("the authority's certificate is not usable", error))?;
    let params = leaf(order, domain.trim())?;
    check_outlived(&ca_pem, &params)?;
    let key = new_key()?;
    let certificate: Certificate = params
        .signed_by(&key, &issuer)
        .map_err(|error| failed("cannot make the certificate", error))?;

    let default_out = order
        .dir
        .join("issued")
        .join(format!("{}-{name}", order.kind.word()));
    let out = order.out.unwrap_or(&default_out);
    make_dir(out)?;
    let mut files = NewFiles::default();
    files.write(&out.join(format!("{name}.key")), key.serialize_pem(), 0o600)?;
    files.write(&out.join(format!("{name}.pem")), certificate.pem(), 0o644)?;
    let copy = out.join("ca.pem");
    // Several hosts' files may go to one directory, with the same authority.
    if fs::read_to_string(&copy).ok().as_deref() != Some(&ca_pem) {
        files.write(&copy, &ca_pem, 0o644)?;
    }
    let serial = params.serial_number.as_ref();
    let issued = Issued {
        serial: serial.map_or_else(String::new, |serial| hex(&serial.to_bytes())),
        spiffe_id: spiffe_id(order, domain.trim()),
        addresses: order.addresses.to_vec(),
        not_before_unix_s: params.not_before.unix_timestamp(),
        not_after_unix_s: params.not_after.unix_timestamp(),
        out: out.to_owned(),
    };
    // Where this fails, the files go again.
    note(&order.dir.join("issued.jsonl"), &issued)?;
    files.keep();
    Ok(issued)
}

fn note(index: &Path, issued: &Issued) -> Result<(), Failure> {
    let line = crate::output::to_json(issued) + "\n";
    OpenOptions::new()
        .append(true)
        .open(index)
        // One write, so that two commands at once do not mix their lines.
        .and_then(|mut file| {
            file.write_all(line.as_bytes())?;
            file.sync_all()
        })
        .map_err(|error| {
            failed(
                &format!("cannot note the certificate in {}", index.display()),
                error,
            )
        })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check_names(order: &Order<'_>) -> Result<(), Failure> {
    let (fits, rule) = match order.kind {
        Kind::Host => (is_host_name(order.name), HOST_NAME_RULE),
        Kind::Operator => (is_name(order.name), NAME_RULE),
    };
    if !fits {
        let what = format!("{:?} is no name for a {}", order.name, order.kind.word());
        return Err(Failure::usage(what).hint(rule));
    }
    let is_address = |address: &&String| is_dns_name(address) || address.parse::<IpAddr>().is_ok();
    if let Some(odd) = order.addresses.iter().find(|address| !is_address(address)) {
        let what = format!("{odd:?} is neither an IP address nor a DNS name");
        return Err(Failure::usage(what));
    }
    if order.kind == Kind::Operator && !order.addresses.is_empty() {
        return Err(Failure::usage("an operator has no address"));
    }
    Ok(())
}

/// A certificate that outlives its authority would stop working before its time, and without a word.
fn check_outlived(ca_pem: &str, params: &CertificateParams) -> Result<(), Failure> {
    let unusable = "the authority's certificate is not usable";
    let (_, pem) = x509_parser::pem::parse_x509_pem(ca_pem.as_bytes())
        .map_err(|error| failed(unusable, error))?;
    let ca = pem.parse_x509().map_err(|error| failed(unusable, error))?;
    let end = ca.validity().not_after;
    if params.not_after.unix_timestamp() <= end.timestamp() {
        return Ok(());
    }
    let what = format!("the authority itself ends at {end}");
    Err(Failure::usage(what).hint("fewer --days, or a new authority"))
}

fn spiffe_id(order: &Order<'_>, domain: &str) -> String {
    format!("spiffe://{domain}/{}/{}", order.kind.word(), order.name)
}

fn leaf(order: &Order<'_>, domain: &str) -> Result<CertificateParams, Failure> {
    let odd = |error: rcgen::Error| failed("cannot write the names", error);
    let mut params = CertificateParams::default();
    let uri = spiffe_id(order, domain);
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
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
    use rustls::server::WebPkiClientVerifier;
    use x509_parser::extensions::GeneralName;
    use x509_parser::prelude::{FromDer, X509Certificate};

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

    fn certificate(path: PathBuf) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(path).unwrap()
    }

    fn roots(authority: &Path) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(certificate(authority.join("ca.pem"))).unwrap();
        Arc::new(roots)
    }

    fn provider() -> Arc<rustls::crypto::CryptoProvider> {
        Arc::new(rustls::crypto::aws_lc_rs::default_provider())
    }

    fn good_client(authority: &Path, leaf: &CertificateDer<'_>) -> bool {
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots(authority), provider()).build();
        let now = UnixTime::now();
        verifier.unwrap().verify_client_cert(leaf, &[], now).is_ok()
    }

    fn good_server(authority: &Path, leaf: &CertificateDer<'_>, name: &str) -> bool {
        let verifier = WebPkiServerVerifier::builder_with_provider(roots(authority), provider())
            .build()
            .unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let now = UnixTime::now();
        verifier
            .verify_server_cert(leaf, &[], &name, &[], now)
            .is_ok()
    }

    #[test]
    fn a_host_verifies_as_client_and_server_under_its_name_and_its_authority_only() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        init(&one, "example.org").unwrap();
        init(&other, "example.org").unwrap();
        let out = issue(&order(&one, Kind::Host, "a")).unwrap().out;
        let leaf = certificate(out.join("a.pem"));
        assert!(good_client(&one, &leaf) && good_server(&one, &leaf, "a"));
        assert!(!good_server(&one, &leaf, "b"));
        assert!(!good_client(&other, &leaf) && !good_server(&other, &leaf, "a"));
    }

    #[test]
    fn an_operator_is_a_client_and_never_a_server() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.org").unwrap();
        let out = issue(&order(dir.path(), Kind::Operator, "alice"))
            .unwrap()
            .out;
        let leaf = certificate(out.join("alice.pem"));
        assert!(good_client(dir.path(), &leaf) && !good_server(dir.path(), &leaf, "alice"));
    }

    #[test]
    fn a_leaf_issues_nothing_and_an_authority_issues_leaves_only() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.org").unwrap();
        let out = issue(&order(dir.path(), Kind::Host, "a")).unwrap().out;
        let (ca, leaf) = (
            certificate(dir.path().join("ca.pem")),
            certificate(out.join("a.pem")),
        );
        let (_, ca) = X509Certificate::from_der(&ca).unwrap();
        let constraints = ca.basic_constraints().unwrap().unwrap().value;
        assert!(constraints.ca && constraints.path_len_constraint == Some(0));
        assert!(!X509Certificate::from_der(&leaf).unwrap().1.is_ca());
    }

    #[test]
    fn the_names_are_one_uri_the_host_and_its_addresses() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.org").unwrap();
        let addresses = ["192.0.2.1".to_owned(), "a.example.org".to_owned()];
        let mut order = order(dir.path(), Kind::Host, "a");
        order.addresses = &addresses;
        let out = issue(&order).unwrap().out;
        let leaf = certificate(out.join("a.pem"));
        let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert_eq!(
            names.value.general_names,
            [
                GeneralName::URI("spiffe://example.org/host/a"),
                GeneralName::DNSName("a"),
                GeneralName::IPAddress(&[192, 0, 2, 1]),
                GeneralName::DNSName("a.example.org"),
            ]
        );
    }

    #[test]
    fn keys_are_their_owners_alone_and_usable() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.org").unwrap();
        let out = issue(&order(dir.path(), Kind::Host, "a")).unwrap().out;
        for key in [out.join("a.key"), dir.path().join("ca.key")] {
            let mode = fs::metadata(&key).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            PrivateKeyDer::from_pem_file(key).unwrap();
        }
    }

    #[test]
    fn every_certificate_is_in_the_index() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.org").unwrap();
        let issued = [
            issue(&order(dir.path(), Kind::Host, "a")).unwrap(),
            issue(&order(dir.path(), Kind::Operator, "alice")).unwrap(),
        ];
        let index = fs::read_to_string(dir.path().join("issued.jsonl")).unwrap();
        let noted: Vec<Issued> = index
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(noted, issued);
        let leaf = certificate(issued[0].out.join("a.pem"));
        let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
        assert_eq!(hex(leaf.raw_serial()), issued[0].serial);
        for _ in 0..64 {
            let serial = new_serial().to_bytes();
            assert!(serial.len() == 16 && (0x40..0x80).contains(&serial[0]));
        }
        let days = (issued[0].not_after_unix_s - issued[0].not_before_unix_s) / 86_400;
        assert_eq!(days, 90);
    }

    #[test]
    fn a_certificate_that_cannot_be_noted_is_not_handed_out() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.org").unwrap();
        fs::remove_file(dir.path().join("issued.jsonl")).unwrap();
        assert!(issue(&order(dir.path(), Kind::Host, "a")).is_err());
        let out = dir.path().join("issued/host-a");
        assert_eq!(fs::read_dir(out).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.org").unwrap();
        let key = fs::read(dir.path().join("ca.key")).unwrap();
        assert!(init(dir.path(), "example.org").is_err());
        assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), key);
        let out = issue(&order(dir.path(), Kind::Host, "a")).unwrap().out;
        let key = fs::read(out.join("a.key")).unwrap();
        assert!(issue(&order(dir.path(), Kind::Host, "a")).is_err());
        assert_eq!(fs::read(out.join("a.key")).unwrap(), key);
    }

    #[test]
    fn no_certificate_outlives_its_authority() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.org").unwrap();
        let mut order = order(dir.path(), Kind::Host, "a");
        order.days = 3651;
        assert!(issue(&order).is_err());
    }

    #[test]
    fn odd_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for domain in ["", "Example.org", "example.org/host", "a b"] {
            assert!(init(&dir.path().join("odd"), domain).is_err(), "{domain}");
        }
        init(dir.path(), "example.org").unwrap();
        for name in ["", "../a", "a/b", "10.0.0.1", "a b", "a..b", "a-"] {
            let order = order(dir.path(), Kind::Host, name);
            assert!(issue(&order).is_err(), "{name}");
        }
        for address in ["", "a b", "*.example.org", "http://a"] {
            let addresses = [address.to_owned()];
            let mut order = order(dir.path(), Kind::Host, "a");
            order.addresses = &addresses;
            assert!(issue(&order).is_err(), "{address}");
        }
    }

    #[test]
    fn every_name_that_is_accepted_for_a_host_is_one_that_tls_can_look_for() {
        for name in ["a", "A1.example.org", "a_b", "1a", "4.x", "a", "1.2.x-y"] {
            assert!(is_host_name(name));
            assert!(matches!(
                ServerName::try_from(name).unwrap(),
                ServerName::DnsName(_)
            ));
        }
    }
}
