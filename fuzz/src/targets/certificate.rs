//! Certificates: PEM files, and the name in a certificate.

use palanquin_agent::identity::{key_of_certificate, of_certificate};
use palanquin_engine::order::is_name;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::within;
use crate::entry::Target;

/// DER, or PEM with any number of certificates.
pub(crate) const CERTIFICATE: Target = Target::new("certificate", run, || {
    let mut seeds = vec![
        b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n".to_vec(),
        b"-----BEGIN CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\n".to_vec(),
        b"-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n".to_vec(),
        // A sequence longer than it is, of indefinite length, and nested.
        b"\x30\x84\xff\xff\xff\xff".to_vec(),
        b"\x30\x80\x00\x00".to_vec(),
        [0x30, 0x80].repeat(500),
        vec![],
    ];
    let uris: [&[&str]; 8] = [
        &["spiffe://example.org/host/a"],
        &["spiffe://example.org/operator/alice"],
        &["spiffe://example.org/host/a", "spiffe://example.org/host/b"],
        &["spiffe://example.org/host/*"],
        &["spiffe://example.org/host/a\0b"],
        &["spiffe://EXAMPLE.org/vm/a"],
        &["https://example.org"],
        &[],
    ];
    seeds.extend(uris.into_iter().map(certificate));
    seeds
});

/// An element of DER.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let contents = parts.concat();
    let len = contents.len();
    let mut bytes = vec![tag];
    if len < 0x80 {
        bytes.push(len as u8);
    } else {
        bytes.extend([0x82, (len >> 8) as u8, len as u8]);
    }
    bytes.extend(contents);
    bytes
}

/// A certificate (RFC 5280, section 4.1) that nobody has signed, with these URIs.
fn certificate(uris: &[&str]) -> Vec<u8> {
    const ECDSA_WITH_SHA256: &[u8] = b"\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02";
    const EC_KEY_P256: &[u8] =
        b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
    let algorithm = der(0x30, &[ECDSA_WITH_SHA256]);
    let name = der(
        0x30,
        &[&der(
            0x31,
            &[&der(0x30, &[b"\x06\x03\x55\x04\x03", &der(0x0c, &[b"a"])])],
        )],
    );
    let time = der(0x17, &[b"260101000000Z"]);
    let key = der(
        0x30,
        &[&der(0x30, &[EC_KEY_P256]), &der(0x03, &[&[0], &[4; 65]])],
    );
    let uris: Vec<_> = uris
        .iter()
        .map(|uri| der(0x86, &[uri.as_bytes()]))
        .collect();
    let names = der(0x04, &[&der(0x30, &[&uris.concat()])]);
    let extensions = der(
        0xa3,
        &[&der(
            0x30,
            &[&der(0x30, &[b"\x06\x03\x55\x1d\x11", &names])],
        )],
    );
    let body = der(
        0x30,
        &[
            b"\xa0\x03\x02\x01\x02",
            b"\x02\x01\x01",
            &algorithm,
            &name,
            &der(0x30, &[&time, &time]),
            &name,
            &key,
            &extensions,
        ],
    );
    der(
        0x30,
        &[
            &body,
            &algorithm,
            &der(0x03, &[&[0], b"\x30\x06\x02\x01\x01\x02\x01\x01"]),
        ],
    )
}

fn name_in(bytes: &[u8]) {
    let identity = within(bytes.len() * 64 + (64 << 10), || {
        let _ = key_of_certificate(bytes);
        of_certificate(bytes)
    });
    match identity {
        Ok(identity) => {
            assert!(is_name(identity.name()));
            let domain = identity.trust_domain().as_bytes();
            assert!(!domain.is_empty() && domain.is_ascii() && !domain.contains(&b'/'));
            // The certificate says this, and nothing else that could be taken for it.
            let uri = identity.to_string();
            assert!(bytes.windows(uri.len()).any(|part| part == uri.as_bytes()));
        }
        Err(error) => assert!(error.to_string().len() < 4096),
    }
}

fn run(data: &[u8]) {
    name_in(data);
    for certificate in CertificateDer::pem_slice_iter(data).flatten() {
        name_in(&certificate);
    }
    let _ = PrivateKeyDer::from_pem_slice(data);
}
