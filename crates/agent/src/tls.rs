//! TLS 1.3 with certificates on both sides, and the names found in them.
//!
//! X25519MLKEM768 comes first in the key agreement, so that what is recorded today stays unreadable to a
//! quantum computer; AES-128-GCM comes first among the ciphers, because it is the fastest with hardware support.

use std::fs;
use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use palanquin_trust::{Identity, Kind, PublicKey, Sha256};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, Connection, DigitallySignedStruct,
    DistinguishedName, RootCertStore, ServerConfig, SignatureScheme, version,
};
use tracing::debug;

use crate::attest::sealed;
use crate::identity::{self, IdentityError};

/// ALPN name of a control connection.
pub const ALPN_CONTROL: &[u8] = b"palanquin-control/1";
/// ALPN name of a data stream.
pub const ALPN_DATA: &[u8] = b"palanquin-data/1";
/// Longest time from the first byte to an authenticated connection.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Why there is no authenticated connection.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of the configuration.
    #[error("{path}: {problem}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The library refuses the configuration.
    #[error("these certificates and keys cannot be used")]
    Config(#[source] rustls::Error),
    /// This host's certificate.
    #[error("this host's certificate is not a host's certificate")]
    OwnIdentity(#[source] IdentityError),
    /// This host's certificate has another name.
    #[error("this host's certificate names {found}, the configuration says host {expected:?}")]
    OwnName {
        /// In the certificate.
        found: Identity,
        /// In the configuration.
        expected: String,
    },
    /// The connection broke during the handshake.
    #[error("the connection broke during the TLS handshake")]
    Io(#[source] io::Error),
    /// Certificates or protocol.
    #[error("the TLS handshake failed")]
    Handshake(#[source] rustls::Error),
    /// No answer in time.
    #[error("the TLS handshake took longer than {} s", HANDSHAKE_DEADLINE.as_secs())]
    Timeout,
    /// The other end has no name.
    #[error("the other end's certificate gives no name")]
    PeerIdentity(#[source] IdentityError),
    /// The other end is not a host.
    #[error("the other end is {0}, not a host of this trust domain")]
    NotAHost(Identity),
    /// Somebody else than a host of this trust domain wants to come in, and was told so.
    #[error("the certificate is not that of a host of this trust domain")]
    Stranger,
    /// The other end is another host.
    #[error("the other end is host {found:?}, expected {expected:?}")]
    OtherHost {
        /// In the certificate.
        found: String,
        /// Wanted.
        expected: String,
    },
}

impl TlsError {
    /// Whether identities are to blame, rather than the network or a file.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::PeerIdentity(_) | Self::NotAHost(_) | Self::Stranger | Self::OtherHost { .. } => {
                true
            }
            Self::Handshake(error) => is_refusal(error),
            _ => false,
        }
    }
}

/// Whether this error of TLS is about identities: ours, as the other end says, or its own. Records that were changed on
/// the way are not.
pub fn is_refusal(error: &rustls::Error) -> bool {
    match error {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => true,
        // RFC 8446, section 6.2.
        rustls::Error::AlertReceived(alert) => matches!(
            alert,
            AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateRequired
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied
                | AlertDescription::DecryptError
        ),
        _ => false,
    }
}

/// What lies in the files of the configuration.
pub struct Material {
    /// Certificates of authorities.
    pub roots: Vec<CertificateDer<'static>>,
    /// This host's certificate and what lies between it and an authority.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: Arc<dyn SigningKey>,
    /// This host.
    pub identity: Identity,
    /// Digest of the policies that have to be in force where the key is used; only where it was sealed with some.
    pub sealed_policies: Option<Sha256>,
}

/// This host's identity and whom it trusts.
pub struct Tls {
    /// This host.
    pub identity: Identity,
    client: Arc<ClientConfig>,
    client_data: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

/// An authenticated connection.
pub struct Authenticated {
    /// The socket.
    pub tcp: TcpStream,
    /// The TLS state.
    pub connection: Connection,
    /// The other end: always a host of our trust domain.
    pub peer: Identity,
}

impl Authenticated {
    /// Name of the cipher suite.
    pub fn cipher(&self) -> String {
        let suite = self.connection.negotiated_cipher_suite();
        suite.map_or_else(String::new, |suite| format!("{:?}", suite.suite()))
    }

    /// Name of the key agreement.
    pub fn key_exchange(&self) -> String {
        let group = self.connection.negotiated_key_exchange_group();
        group.map_or_else(String::new, |group| format!("{:?}", group.name()))
    }

    /// Whether this is a data stream rather than a control connection.
    pub fn is_data(&self) -> bool {
        self.connection.alpn_protocol() == Some(ALPN_DATA)
    }

    /// The certificates that the other end has shown, its own first, DER.
    pub fn certificates(&self) -> Vec<Vec<u8>> {
        let shown = self.connection.peer_certificates().unwrap_or_default();
        shown.iter().map(|der| der.as_ref().to_vec()).collect()
    }

    /// Keying material of this connection alone (RFC 8446, section 7.5), to which evidence is bound: a quote that was
    /// made for one connection is of no use on another.
    ///
    /// # Errors
    ///
    /// The handshake is not complete.
    pub fn attestation_exporter(&self) -> Result<[u8; 32], rustls::Error> {
        self.connection
            .export_keying_material([0; 32], b"EXPORTER-palanquin-attestation", None)
    }

    /// Keying material of this connection alone (RFC 8446, section 7.5), for its data stream.
    ///
    /// # Errors
    ///
    /// The handshake is not complete.
    pub fn exporter(&self, context: &[u8]) -> Result<[u8; 32], rustls::Error> {
        self.connection.export_keying_material(
            [0; 32],
            b"EXPORTER-palanquin-data-stream",
            Some(context),
        )
    }
}

fn provider() -> CryptoProvider {
    CryptoProvider {
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
        ],
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    }
}

impl Material {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// A file is missing, unreadable or not what it should be; the certificate names another host.
    pub fn load(ca: &Path, certificate: &Path, key: &Path, name: &str) -> Result<Self, TlsError> {
        let file = |path: &Path, problem: String| TlsError::File {
            path: path.to_owned(),
            problem,
        };
        let read = |path: &Path| fs::read(path).map_err(|error| file(path, error.to_string()));
        let certificates = |path: &Path| -> Result<Vec<CertificateDer<'static>>, TlsError> {
            let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
            match list {
                Ok(list) if !list.is_empty() => Ok(list),
                Ok(_) => Err(file(path, "no certificate in it".to_owned())),
                Err(error) => Err(file(path, error.to_string())),
            }
        };
        let roots = certificates(ca)?;
        let chain = certificates(certificate)?;
        let identity = own_identity(&chain)?;
        if identity.name() != name {
            return Err(TlsError::OwnName {
                found: identity,
                expected: name.to_owned(),
            });
        }
        let contents = read(key)?;
        let mut sealed_policies = None;
        let contents = if sealed::is_sealed(&contents) {
            let unsealed = sealed::unseal(&contents);
            let unsealed = unsealed.map_err(|error| file(key, error.to_string()))?;
            sealed_policies = unsealed.policies.map(Sha256);
            unsealed.contents
        } else {
            contents
        };
        let key_der = PrivateKeyDer::from_pem_slice(&contents)
            .map_err(|error| file(key, error.to_string()))?;
        let certified = CertifiedKey::from_der(chain, key_der, &provider());
        let certified = certified.map_err(TlsError::Config)?;
        Ok(Self {
            roots,
            chain: certified.cert,
            key: certified.key,
            identity,
            sealed_policies,
        })
    }
}

impl Material {
    /// Checks what only its use would show.
    ///
    /// # Errors
    ///
    /// A certificate is not usable.
    pub fn check(&self) -> Result<(), TlsError> {
        let (roots, chain) = (self.roots.clone(), self.chain.clone());
        Tls::new(roots, chain, Arc::clone(&self.key)).map(drop)
    }
}

fn own_identity(chain: &[CertificateDer<'_>]) -> Result<Identity, TlsError> {
    let own = chain.first().map_or(&[][..], |leaf| leaf.as_ref());
    let identity = identity::of_certificate(own).map_err(TlsError::OwnIdentity)?;
    match identity.kind() {
        Kind::Host => Ok(identity),
        Kind::Operator | Kind::Owner => Err(TlsError::NotAHost(identity)),
    }
}

/// A host at the other end of a connection, as its certificate says.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Who it is.
    pub identity: Identity,
    /// The key in its certificate; absent where that is of a kind that signs no documents.
    pub key: Option<PublicKey>,
}

/// Verifies the certificates of other hosts once more where it matters who they are: what does the handshakes reads from
/// the network, and is not believed.
#[derive(Debug)]
pub struct Peers {
    verifier: Arc<dyn ClientCertVerifier>,
    trust_domain: String,
}

impl Peers {
    /// Believes the authorities of this host, and hosts of its trust domain.
    ///
    /// # Errors
    ///
    /// A certificate is not usable.
    pub fn new(material: &Material) -> Result<Self, TlsError> {
        Ok(Self {
            verifier: verifier(&material.roots)?,
            trust_domain: material.identity.trust_domain().to_owned(),
        })
    }

    /// Who has shown these certificates, its own first.
    ///
    /// # Errors
    ///
    /// No authority of ours vouches for it now, or it is no host of our trust domain.
    pub fn identify(&self, certificates: &[&[u8]]) -> Result<Peer, TlsError> {
        let mut ders = certificates.iter().map(|der| CertificateDer::from(*der));
        let none = TlsError::PeerIdentity(IdentityError::UriCount(0));
        let leaf = ders.next().ok_or(none)?;
        let between: Vec<_> = ders.collect();
        self.verifier
            .verify_client_cert(&leaf, &between, UnixTime::now())
            .map_err(TlsError::Handshake)?;
        let identity = identity::of_certificate(&leaf).map_err(TlsError::PeerIdentity)?;
        if !is_host(&identity, &self.trust_domain) {
            return Err(TlsError::NotAHost(identity));
        }
        let key = identity::key_of_certificate(&leaf).ok();
        Ok(Peer { identity, key })
    }
}

/// Lets in hosts of one trust domain, and tells others so within the handshake (alert `access_denied`). That somebody is a
/// host is looked at again where it counts.
#[derive(Debug)]
struct HostsAlone {
    vouched: Arc<dyn ClientCertVerifier>,
    trust_domain: String,
}

impl ClientCertVerifier for HostsAlone {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.vouched.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.vouched.verify_client_cert(leaf, between, now)?;
        match identity::of_certificate(leaf) {
            Ok(identity) if is_host(&identity, &self.trust_domain) => Ok(verified),
            shown => {
                debug!(?shown, "a certificate that is no host's was refused");
                let no_host = CertificateError::ApplicationVerificationFailure;
                Err(rustls::Error::InvalidCertificate(no_host))
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.vouched.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.vouched.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.vouched.supported_verify_schemes()
    }
}

fn is_host(identity: &Identity, trust_domain: &str) -> bool {
    identity.kind() == Kind::Host && identity.trust_domain() == trust_domain
}

/// Believes certificates by these authorities, whoever they name.
fn verifier(roots: &[CertificateDer<'static>]) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let roots = Arc::new(store(roots)?);
    WebPkiClientVerifier::builder_with_provider(roots, Arc::new(provider()))
        .build()
        .map_err(|error| TlsError::Config(rustls::Error::General(error.to_string())))
}

fn store(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).map_err(TlsError::Config)?;
    }
    Ok(store)
}

impl Tls {
    /// With these certificates, and a key that may lie elsewhere.
    ///
    /// # Errors
    ///
    /// A certificate is not usable.
    pub fn new(
        roots: Vec<CertificateDer<'static>>,
        chain: Vec<CertificateDer<'static>>,
        key: Arc<dyn SigningKey>,
    ) -> Result<Self, TlsError> {
        let identity = own_identity(&chain)?;
        let verifier = Arc::new(HostsAlone {
            vouched: verifier(&roots)?,
            trust_domain: identity.trust_domain().to_owned(),
        });
        let roots = Arc::new(store(&roots)?);
        let own = Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)));
        let provider = Arc::new(provider());
        let versions = &[&version::TLS13];
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(TlsError::Config)?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::clone(&own) as _);
        // Every connection authenticates itself anew.
        client.resumption = rustls::client::Resumption::disabled();
        client.alpn_protocols = vec![ALPN_CONTROL.to_vec()];
        let mut client_data = client.clone();
        client_data.alpn_protocols = vec![ALPN_DATA.to_vec()];

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(TlsError::Config)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(own);
        server.alpn_protocols = vec![ALPN_CONTROL.to_vec(), ALPN_DATA.to_vec()];
        // No tickets: nobody resumes, and unread bytes would turn a close into a reset.
        server.send_tls13_tickets = 0;
        Ok(Self {
            identity,
            client: Arc::new(client),
            client_data: Arc::new(client_data),
            server: Arc::new(server),
        })
    }

    /// Authenticates a connection that this host opened to the host of that name.
    ///
    /// # Errors
    ///
    /// No handshake in time, or the other end is not that host.
    pub fn connect(
        &self,
        tcp: TcpStream,
        host: &str,
        data: bool,
    ) -> Result<Authenticated, TlsError> {
        let config = if data {
            &self.client_data
        } else {
            &self.client
        };
        let name = ServerName::try_from(host.to_owned()).map_err(|_| TlsError::OtherHost {
            found: String::new(),
            expected: host.to_owned(),
        })?;
        let connection =
            rustls::ClientConnection::new(Arc::clone(config), name).map_err(TlsError::Handshake)?;
        let authenticated = self.handshake(tcp, connection.into())?;
        if authenticated.peer.name() == host {
            Ok(authenticated)
        } else {
            let found = authenticated.peer.name().to_owned();
            Err(TlsError::OtherHost {
                found,
                expected: host.to_owned(),
            })
        }
    }

    /// Authenticates a connection that another host opened.
    ///
    /// # Errors
    ///
    /// No handshake in time, or the other end is not a host.
    pub fn accept(&self, tcp: TcpStream) -> Result<Authenticated, TlsError> {
        let connection =
            rustls::ServerConnection::new(Arc::clone(&self.server)).map_err(TlsError::Handshake)?;
        self.handshake(tcp, connection.into())
    }

    fn handshake(&self, tcp: TcpStream, connection: Connection) -> Result<Authenticated, TlsError> {
        let mut connection = connection;
        let mut socket = &tcp;
        let deadline = Instant::now() + HANDSHAKE_DEADLINE;
        // A server answers the client's last flight with nothing, so a client that was refused only learns it
        // from its first read: both sides count as connected when their own part is done.
        while connection.is_handshaking() || connection.wants_write() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TlsError::Timeout);
            }
            tcp.set_read_timeout(Some(left)).map_err(TlsError::Io)?;
            tcp.set_write_timeout(Some(left)).map_err(TlsError::Io)?;
            let step = if connection.wants_write() {
                connection.write_tls(&mut socket).map(|_| ())
            } else {
                read_step(&mut connection, &mut socket)?
            };
            match step {
                Ok(()) => {}
                Err(error) if is_timeout(&error) => return Err(TlsError::Timeout),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TlsError::Io(error)),
            }
        }
        tcp.set_read_timeout(None).map_err(TlsError::Io)?;
        tcp.set_write_timeout(None).map_err(TlsError::Io)?;
        let leaf = connection.peer_certificates().and_then(<[_]>::first);
        let peer = leaf.map_or(Err(IdentityError::UriCount(0)), |leaf| {
            identity::of_certificate(leaf)
        });
        let peer = peer.map_err(TlsError::PeerIdentity)?;
        if !is_host(&peer, self.identity.trust_domain()) {
            return Err(TlsError::NotAHost(peer));
        }
        Ok(Authenticated {
            tcp,
            connection,
            peer,
        })
    }
}

/// One read from the socket. Errors of TLS are told to the other end before they are returned.
fn read_step(
    connection: &mut Connection,
    socket: &mut &TcpStream,
) -> Result<io::Result<()>, TlsError> {
    match connection.read_tls(socket) {
        Ok(0) => Ok(Err(io::ErrorKind::UnexpectedEof.into())),
        Ok(_) => match connection.process_new_packets() {
            Ok(_) => Ok(Ok(())),
            Err(error) => {
                // Best effort: the alert tells the other end why.
                let _ = connection.write_tls(socket);
                let no_host = CertificateError::ApplicationVerificationFailure;
                if error == rustls::Error::InvalidCertificate(no_host) {
                    return Err(TlsError::Stranger);
                }
                Err(TlsError::Handshake(error))
            }
        },
        Err(error) => Ok(Err(error)),
    }
}

/// Whether a socket's deadline has passed.
pub fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_about_a_certificate_is_a_refusal_and_one_about_a_record_is_not() {
        let alert = |alert| is_refusal(&rustls::Error::AlertReceived(alert));
        assert!(alert(AlertDescription::UnknownCA));
        assert!(alert(AlertDescription::CertificateExpired));
        for other in [
            AlertDescription::BadRecordMac,
            AlertDescription::DecodeError,
            AlertDescription::UnexpectedMessage,
            AlertDescription::IllegalParameter,
        ] {
            assert!(!alert(other), "{other:?}");
        }
    }
}
