//! Names of hosts, operators and owners: `spiffe://<trust-domain>/<kind>/<name>`.
//!
//! Form of the URI: SPIFFE-ID specification, section 2.

use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Decoder, Encode, Encoder, decode, encode};
use palanquin_api::config::is_name;
use serde::{Deserialize, Serialize};

/// Longest identity as text, in bytes: SPIFFE-ID, section 2.3, allows 2048; the parts allow fewer.
pub const IDENTITY_MAX: usize = "spiffe://".len() + DOMAIN_MAX + "/operator/".len() + 64;
/// Longest trust domain in bytes: SPIFFE-ID, section 2.3.
const DOMAIN_MAX: usize = 255;

/// What somebody is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// An agent.
    Host,
    /// A person who runs hosts.
    Operator,
    /// Whom VMs belong to.
    Owner,
}

impl Kind {
    /// The word in the URI.
    pub fn word(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Operator => "operator",
            Self::Owner => "owner",
        }
    }
}

/// A name that is unique in the world, as far as trust domains are.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identity {
    trust_domain: String,
    kind: Kind,
    name: String,
}

/// A text that is no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not spiffe://<trust-domain>/host/<name>, /operator/<name> or /owner/<name>")]
pub struct IdentityError(String);

impl Identity {
    /// With these parts.
    ///
    /// # Errors
    ///
    /// They make no identity.
    pub fn new(trust_domain: &str, kind: Kind, name: &str) -> Result<Self, IdentityError> {
        format!("spiffe://{trust_domain}/{}/{name}", kind.word()).parse()
    }

    /// Who issues names.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Host, operator or owner.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Name within the trust domain and kind.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError(uri.chars().take(200).collect());
        let rest = uri.strip_prefix("spiffe://").ok_or_else(form)?;
        let mut parts = rest.split('/');
        let (Some(domain), Some(kind), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        let kind = [Kind::Host, Kind::Operator, Kind::Owner]
            .into_iter()
            .find(|known| known.word() == kind)
            .ok_or_else(form)?;
        let domain_fits = (1..=DOMAIN_MAX).contains(&domain.len())
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

impl TryFrom<String> for Identity {
    type Error = IdentityError;

    fn try_from(uri: String) -> Result<Self, IdentityError> {
        uri.parse()
    }
}

impl From<Identity> for String {
    fn from(identity: Identity) -> Self {
        identity.to_string()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (domain, kind, name) = (&self.trust_domain, self.kind.word(), &self.name);
        write!(f, "spiffe://{domain}/{kind}/{name}")
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<C> Encode<C> for Identity {
    fn encode<W: encode::Write>(
        &self,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), encode::Error<W::Error>> {
        e.str(&self.to_string())?.ok()
    }
}

impl<'b, C> Decode<'b, C> for Identity {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
        d.str()?
            .parse()
            .map_err(|_| decode::Error::message("a name is no identity"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_written_as_it_was_read() {
        for (uri, kind) in [
            ("spiffe://example.org/host/a", Kind::Host),
            ("spiffe://example.org/operator/alice", Kind::Operator),
            ("spiffe://x-1.example_y/owner/acme.A-1", Kind::Owner),
        ] {
            let identity: Identity = uri.parse().unwrap();
            assert_eq!(
                (identity.kind(), identity.to_string().as_str()),
                (kind, uri)
            );
        }
    }

    #[test]
    fn other_forms_are_refused() {
        let long = format!("spiffe://{}/host/a", "d".repeat(DOMAIN_MAX + 1));
        for uri in [
            "",
            "spiffe://",
            "https://example.org/host/a",
            "spiffe:///host/a",
            "spiffe://EXAMPLE.org/host/a",
            "spiffe://example.org/host/",
            "spiffe://example.org/host/a/",
            "spiffe://example.org/host/../a",
            "spiffe://example.org/vm/a",
            "spiffe://example.org/host/a b",
            "spiffe://example.org/host/\u{430}",
            "spiffe://example.org/host/*",
            "spiffe://user@example.org/host/a",
            &long,
        ] {
            assert!(uri.parse::<Identity>().is_err(), "{uri}");
        }
    }

    #[test]
    fn the_longest_identity_has_the_length_named() {
        let domain = "d".repeat(DOMAIN_MAX);
        let uri = format!("spiffe://{domain}/operator/{}", "n".repeat(64));
        assert_eq!(uri.len(), IDENTITY_MAX);
        assert!(uri.parse::<Identity>().is_ok());
    }
}
