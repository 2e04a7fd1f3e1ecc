//! Names in certificates: `spiffe://<trust-domain>/host/<name>` and `/operator/<name>`.
//!
//! Form of the URI: SPIFFE-ID specification, section 2; one URI per certificate: X.509-SVID, section 2.

use std::fmt;

use palanquin_engine::order::is_name;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// What a certificate's holder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An agent.
    Host,
    /// A person.
    Operator,
}

/// The name in a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Who issues names.
    pub trust_domain: String,
    /// Host or operator.
    pub kind: Kind,
    /// Name within the trust domain.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Host => "host",
            Kind::Operator => "operator",
        };
        write!(f, "spiffe://{}/{kind}/{}", self.trust_domain, self.name)
    }
}

/// Why a certificate gives no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not a certificate.
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    /// None or several.
    #[error("the certificate has {0} URI names, expected exactly one")]
    UriCount(usize),
    /// Another form.
    #[error("{0:?} is not spiffe://<trust-domain>/host/<name> or /operator/<name>")]
    Form(String),
}

impl Identity {
    /// Reads the name from a certificate that has been verified already.
    ///
    /// # Errors
    ///
    /// One of [`IdentityError`]'s rules is broken.
    pub fn of_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|extension| &extension.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        match uris[..] {
            [uri] => Self::parse(uri),
            _ => Err(IdentityError::UriCount(uris.len())),
        }
    }

    fn parse(uri: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(uri.chars().take(200).collect());
        let rest = uri.strip_prefix("spiffe://").ok_or_else(form)?;
        let mut parts = rest.split('/');
        let (Some(domain), Some(kind), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        let kind = match kind {
            "host" => Kind::Host,
            "operator" => Kind::Operator,
            _ => return Err(form()),
        };
        let domain_fits = !domain.is_empty()
            && domain.len() <= 255
            && domain
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
        if !domain_fits || !is_name(name) {
            return Err(form());
        }
        Ok(Self {
            trust_domain: domain.to_owned(),
            kind,
            name: name.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_operators_are_told_apart() {
        let host = Identity::parse("spiffe://example.org/host/a").unwrap();
        assert_eq!((host.kind, host.name.as_str()), (Kind::Host, "a"));
        let operator = Identity::parse("spiffe://example.org/operator/alice").unwrap();
        assert_eq!(operator.kind, Kind::Operator);
        assert_eq!(operator.to_string(), "spiffe://example.org/operator/alice");
    }

    #[test]
    fn other_forms_are_refused() {
        for uri in [
            "",
            "https://example.org/host/a",
            "spiffe:///host/a",
            "spiffe://EXAMPLE/host/a",
            "spiffe://example.org/host/",
            "spiffe://example.org/host/a/b",
            "spiffe://example.org/host/../a",
            "spiffe://example.org/vm/a",
            "spiffe://example.org/host/a b",
        ] {
            assert!(
                matches!(Identity::parse(uri), Err(IdentityError::Form(_))),
                "{uri}"
            );
        }
    }
}
