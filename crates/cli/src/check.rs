//! `palanquin config check`: everything that is wrong with an agent's configuration, at once.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use palanquin_api::config::{AgentConfig, LoadError, Violation};
use palanquin_api::control::ErrorKind;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;
use x509_parser::prelude::X509Certificate;

use crate::failure::Failure;

/// Checks a configuration and the files it names; prints every problem.
pub(crate) fn check(path: &Path) -> Result<(), Failure> {
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::usage(format!("cannot read {}", path.display())).cause(error))?;
    let (config, mut found) = match AgentConfig::from_toml(&text) {
        Ok(config) => (Some(config), Vec::new()),
        Err(LoadError::Syntax(error)) => {
            return Err(Failure::usage(format!("{} is not usable", path.display())).cause(error));
        }
        Err(LoadError::Rules(found)) => (toml::from_str(&text).ok(), found),
    };
    if let Some(config) = &config {
        files(config, &mut found);
    }
    if found.is_empty() {
        crate::render::say_line(&format!("{} is good.", path.display()));
        return Ok(());
    }
    let mut failure = Failure::new(
        ErrorKind::Usage,
        format!("{} is not usable", path.display()),
    );
    for violation in found {
        failure = failure.cause(violation);
    }
    Err(failure)
}

fn files(config: &AgentConfig, found: &mut Vec<Violation>) {
    let mut rule = |key: &str, problem: Option<String>| {
        found.extend(problem.map(|problem| Violation::new(key, problem)));
    };
    let tls = &config.tls;
    rule("tls.key", key_problem(&tls.key));
    let ca = read_pem(&tls.ca);
    let leaf = read_pem(&tls.certificate);
    rule("tls.ca", ca.as_ref().err().cloned());
    rule("tls.certificate", leaf.as_ref().err().cloned());
    if let (Ok(ca), Ok(leaf)) = (&ca, &leaf) {
        rule(
            "tls.certificate",
            certificate_problem(ca, leaf, &config.name),
        );
    }
    let missing = |path: &Path| (!path.exists()).then(|| format!("there is no {}", path.display()));
    rule("qemu.binary", missing(&config.qemu.binary));
    for path in &config.qemu.allowed_paths {
        rule("qemu.allowed-paths", missing(path));
    }
}

fn key_problem(path: &Path) -> Option<String> {
    match fs::metadata(path) {
        Err(error) => Some(format!("{}: {error}", path.display())),
        Ok(meta) if meta.permissions().mode() & 0o077 != 0 => Some(format!(
            "{} is open to others than its owner: chmod 600 it",
            path.display()
        )),
        Ok(_) => None,
    }
}

fn read_pem(path: &Path) -> Result<Pem, String> {
    let text = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    match Pem::iter_from_buffer(&text).next() {
        Some(Ok(pem)) => Ok(pem),
        Some(Err(error)) => Err(format!("{}: {error}", path.display())),
        None => Err(format!("{}: no certificate in it", path.display())),
    }
}

fn certificate_problem(ca: &Pem, leaf: &Pem, name: &str) -> Option<String> {
    let (Ok(ca), Ok(leaf)) = (ca.parse_x509(), leaf.parse_x509()) else {
        return Some("a certificate cannot be read".to_owned());
    };
    if leaf.verify_signature(Some(ca.public_key())).is_err() {
        return Some("it was not issued by the authority in `tls.ca`".to_owned());
    }
    if !leaf.validity().is_valid() {
        return Some(format!("it is valid from {}", validity(&leaf)));
    }
    let uris: Vec<&str> = leaf
        .subject_alternative_name()
        .ok()
        .flatten()
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let is_ours = |uri: &&str| {
        uri.strip_prefix("spiffe://")
            .and_then(|rest| rest.split_once('/'))
            .map(|(_, path)| path)
            == Some(&format!("host/{name}"))
    };
    let fits = matches!(uris[..], [uri] if is_ours(&uri));
    (!fits).then(|| format!("it names {uris:?}, the configuration says host {name:?}"))
}

fn validity(certificate: &X509Certificate<'_>) -> String {
    let validity = certificate.validity();
    format!("{} to {}", validity.not_before, validity.not_after)
}
