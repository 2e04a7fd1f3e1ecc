//! Whether the manufacturer of a TPM says that an endorsement key is its.
//!
//! Certificates of endorsement keys have critical extensions that browsers' verifiers do not know, so the chain is followed
//! here: signatures, names, times, and which certificates may issue others.

use std::path::Path;

use palanquin_api::control::ErrorKind;
use palanquin_trust::enrolment::CERTIFICATES_MAX;
use x509_parser::certificate::X509Certificate;
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

use crate::failure::Failure;
use crate::files::read;

/// Longest file with certificates, in bytes.
const PEM_MAX: usize = 256 * 1024;
/// Most certificates of a file.
const ANCHORS_MAX: usize = 256;

/// Without what lies behind it; nothing if it is no certificate.
pub(super) fn trimmed(der: &[u8]) -> Option<Vec<u8>> {
    let (rest, _) = X509Certificate::from_der(der).ok()?;
    Some(der[..der.len() - rest.len()].to_vec())
}

/// Certificates of a file, as DER.
pub(super) fn read_pem(path: &Path) -> Result<Vec<Vec<u8>>, Failure> {
    let text = read(path, PEM_MAX)?;
    let unusable = || {
        Failure::usage(format!(
            "{} has no certificates that are of use",
            path.display()
        ))
    };
    let mut list = Vec::new();
    for pem in Pem::iter_from_buffer(&text) {
        let pem = pem.map_err(|error| unusable().cause(error))?;
        if pem.label != "CERTIFICATE" || list.len() >= ANCHORS_MAX {
            return Err(unusable().cause("something else is in it, or too much"));
        }
        list.push(pem.contents);
    }
    if list.is_empty() {
        return Err(unusable().cause("there is no PEM block in it"));
    }
    Ok(list)
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, String> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err("something follows a certificate".to_owned()),
        Err(error) => Err(format!("a certificate cannot be read: {error}")),
    }
}

/// Follows the chain of an endorsement key's certificate (the first) to one of a file, which is believed.
pub(super) fn verify(chain: &[&[u8]], spki: &[u8], ca: &Path) -> Result<(), Failure> {
    let anchors = read_pem(ca)?;
    follow(chain, spki, &anchors, ASN1Time::now()).map_err(|why| {
        let what = "the endorsement key is not certified by that manufacturer";
        Failure::new(ErrorKind::Refused, what).cause(why).hint(
            "where the TPM has no certificate, compare its fingerprint at the host: --fingerprint",
        )
    })
}

fn follow(chain: &[&[u8]], spki: &[u8], anchors: &[Vec<u8>], now: ASN1Time) -> Result<(), String> {
    let (leaf, between) = chain
        .split_first()
        .ok_or("the request has no certificate")?;
    let leaf = parse(leaf)?;
    if leaf.public_key().raw != spki {
        return Err("the certificate is that of another key".to_owned());
    }
    if leaf.is_ca() {
        return Err("it is the certificate of an authority, not of a TPM".to_owned());
    }
    let between: Vec<X509Certificate<'_>> = between
        .iter()
        .map(|der| parse(der))
        .collect::<Result<_, _>>()?;
    let anchors: Vec<X509Certificate<'_>> = anchors
        .iter()
        .map(|der| parse(der))
        .collect::<Result<_, _>>()?;
    let mut current = &leaf;
    for _ in 0..=CERTIFICATES_MAX {
        if !current.validity().is_valid_at(now) {
            return Err(format!(
                "the certificate of {} does not hold now",
                current.subject()
            ));
        }
        let issues = |issuer: &&X509Certificate<'_>| {
            issuer.is_ca()
                && issuer.subject() == current.issuer()
                && current.verify_signature(Some(issuer.public_key())).is_ok()
        };
        if let Some(anchor) = anchors.iter().find(issues) {
            if anchor.validity().is_valid_at(now) {
                return Ok(());
            }
            return Err(format!(
                "the certificate of {} does not hold now",
                anchor.subject()
            ));
        }
        let next = between.iter().find(issues);
        current = next.ok_or_else(|| {
            format!(
                "nobody who is believed has signed the certificate by {}",
                current.issuer()
            )
        })?;
    }
    Err("the chain of certificates is too long".to_owned())
}
