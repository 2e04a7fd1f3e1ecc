//! `palanquin config check`: everything that is wrong with an agent's configuration, at once.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use palanquin_api::config::{AgentConfig, LoadError, Violation};
use palanquin_api::trust::Trust;
use palanquin_host::tpm::sealed::is_sealed;
use palanquin_trust::{Identity, Keyring};
use palanquin_trust_files::{self as files, FilesError};
use rcgen::{KeyPair, PublicKeyData};
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;
use x509_parser::prelude::X509Certificate;

use crate::failure::Failure;

/// Checks a configuration and the files it names; tells every problem.
pub(crate) fn check(path: &Path) -> Result<(), Failure> {
    let unusable = || Failure::usage(format!("{} is not usable", path.display()));
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::usage(format!("cannot read {}", path.display())).cause(error))?;
    let config: AgentConfig =
        toml::from_str(&text).map_err(|error| unusable().load_error(LoadError::Syntax(error)))?;
    let mut found = config.validate();
    check_files(&config, &mut found);
    if found.is_empty() {
        return Ok(());
    }
    Err(unusable().load_error(LoadError::Rules(found)))
}

fn check_files(config: &AgentConfig, found: &mut Vec<Violation>) {
    let tls = &config.tls;
    if let Some(problem) = key_problem(&tls.key) {
        found.push(problem);
    }
    let mut read = |key: &str, path: &Path| match read_pem(path) {
        Ok(pem) => Some(pem),
        Err(problem) => {
            found.push(Violation::new(key, problem));
            None
        }
    };
    let (ca, leaf) = (
        read("tls.ca", &tls.ca),
        read("tls.certificate", &tls.certificate),
    );
    if let (Some(ca), Some(leaf)) = (ca, leaf) {
        check_certificates(config, &ca, &leaf, found);
    }
    let mut present = |key: String, path: &Path, right: bool, hint: &str| {
        if !right {
            let message = format!("there is no {}", path.display());
            found.push(Violation::new(key, message).hint(hint));
        }
    };
    let binary = &config.qemu.binary;
    let hint = "install QEMU, or name its binary";
    present("qemu.binary".to_owned(), binary, binary.is_file(), hint);
    for (index, path) in config.qemu.allowed_paths.iter().enumerate() {
        let key = format!("qemu.allowed-paths[{index}]");
        present(key, path, path.exists(), "make it, or leave it out");
    }
    if let Some(trust) = &config.trust {
        check_trust(trust, found);
    }
}

/// What is judged by: policies, keys and local users.
fn check_trust(trust: &Trust, found: &mut Vec<Violation>) {
    match files::policies(&trust.policies) {
        Ok(_) => {}
        Err(FilesError::Policies(_, error)) => {
            let each = error.0.into_iter();
            found.extend(each.map(|problem| Violation::new("trust.policies", problem.to_string())));
        }
        Err(error) => found.push(Violation::new("trust.policies", error.to_string())),
    }
    let mut ring = Keyring::default();
    for (table, entries) in [("owners", &trust.owners), ("approvers", &trust.approvers)] {
        for (identity, paths) in entries {
            let key = format!("trust.{table}.{identity}");
            // What is no identity is told already.
            let Ok(identity) = identity.parse::<Identity>() else {
                continue;
            };
            for path in paths {
                let taken = files::public_key(path, &identity)
                    .and_then(|public| Ok(ring.insert(identity.clone(), public)?));
                if let Err(error) = taken {
                    found.push(Violation::new(key.as_str(), error.to_string()));
                }
            }
        }
    }
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    for user in trust.operators.keys() {
        let is_there = user.parse::<u32>().is_ok()
            || users
                .lines()
                .any(|line| line.split(':').next() == Some(user));
        if !is_there {
            let key = format!("trust.operators.{user}");
            let hint = "the name or number of a local user";
            found.push(Violation::new(key, format!("there is no user {user:?}")).hint(hint));
        }
    }
}

fn key_problem(path: &Path) -> Option<Violation> {
    let problem = |message: String| Some(Violation::new("tls.key", message));
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => return problem(format!("{}: {error}", path.display())),
    };
    // Whether a sealed key opens, only its host's TPM knows.
    if !text.contains("PRIVATE KEY-----") && !is_sealed(text.as_bytes()) {
        return problem(format!("{}: no private key in it", path.display()));
    }
    let mode = fs::metadata(path).map_or(0, |meta| meta.permissions().mode());
    if mode & 0o077 != 0 {
        let message = format!("{} is open to others than its owner", path.display());
        let hint = format!("chmod 600 {}", path.display());
        return Some(Violation::new("tls.key", message).hint(hint));
    }
    None
}

fn read_pem(path: &Path) -> Result<Pem, String> {
    let text = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    match Pem::iter_from_buffer(&text).next() {
        Some(Ok(pem)) => Ok(pem),
        Some(Err(error)) => Err(format!("{}: {error}", path.display())),
        None => Err(format!("{}: no certificate in it", path.display())),
    }
}

/// What the agent and its peers will ask of the certificate.
fn check_certificates(config: &AgentConfig, ca: &Pem, leaf: &Pem, found: &mut Vec<Violation>) {
    let mut problem = |key: &str, message: String, hint: &str| {
        found.push(Violation::new(key, message).hint(hint));
    };
    let (ca, leaf) = match (ca.parse_x509(), leaf.parse_x509()) {
        (Ok(ca), Ok(leaf)) => (ca, leaf),
        (ca, leaf) => {
            for (key, parsed) in [("tls.ca", ca), ("tls.certificate", leaf)] {
                if let Err(error) = parsed {
                    let hint = "a certificate in PEM form";
                    problem(key, format!("it cannot be read: {error}"), hint);
                }
            }
            return;
        }
    };
    let anew = "issue a new one with `palanquin ca issue host`";
    if !ca.is_ca() {
        let hint = "the `ca.pem` of the authority";
        problem("tls.ca", "it is not an authority's".to_owned(), hint);
    } else if leaf.verify_signature(Some(ca.public_key())).is_err() {
        let message = "it was not issued by the authority in `tls.ca`".to_owned();
        problem("tls.certificate", message, anew);
    }
    for (key, certificate, hint) in [
        ("tls.ca", &ca, "a new authority, and new certificates"),
        ("tls.certificate", &leaf, anew),
    ] {
        if !certificate.validity().is_valid() {
            let message = format!("it is valid from {}", validity(certificate));
            problem(key, message, hint);
        }
    }
    let usage = leaf.extended_key_usage().ok().flatten();
    if !usage.is_some_and(|usage| usage.value.client_auth && usage.value.server_auth) {
        let message = "it is not for both ends of a connection, as a host's is".to_owned();
        problem("tls.certificate", message, anew);
    }
    let uris = names(&leaf, |name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let name = &config.name;
    let is_ours = |uri: &str| {
        uri.strip_prefix("spiffe://")
            .and_then(|rest| rest.split_once('/'))
            .is_some_and(|(_, path)| path == format!("host/{name}"))
    };
    if !matches!(uris[..], [uri] if is_ours(uri)) {
        let message = format!("it names {uris:?}, and `name` says {name:?}");
        problem("tls.certificate", message, anew);
    }
    let dns = names(&leaf, |name| match name {
        GeneralName::DNSName(name) => Some(*name),
        _ => None,
    });
    if !dns.iter().any(|dns| dns.eq_ignore_ascii_case(name)) {
        let message = format!("it has no DNS name {name:?}, which other hosts look for");
        problem("tls.certificate", message, anew);
    }
    // A key in a form that only the agent's library reads is left to the agent.
    let key = fs::read_to_string(&config.tls.key)
        .ok()
        .and_then(|text| KeyPair::from_pem(&text).ok());
    if key.is_some_and(|key| key.subject_public_key_info() != leaf.public_key().raw) {
        let message = "it is not the key of `tls.certificate`".to_owned();
        problem("tls.key", message, "the key made with the certificate");
    }
}

fn names<'a>(
    certificate: &'a X509Certificate<'_>,
    pick: impl Fn(&'a GeneralName<'a>) -> Option<&'a str>,
) -> Vec<&'a str> {
    let extension = certificate.subject_alternative_name().ok().flatten();
    extension
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(pick)
        .collect()
}

fn validity(certificate: &X509Certificate<'_>) -> String {
    let validity = certificate.validity();
    format!("{} to {}", validity.not_before, validity.not_after)
}
