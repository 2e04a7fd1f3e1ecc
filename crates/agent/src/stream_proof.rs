//! How a data stream shows that it belongs to a migration.
//!
//! The destination hands the source a secret over the control channel. A stream opens with the migration, its
//! index and an HMAC-SHA256 under that secret over both and the exporter (RFC 8446, section 7.5) of this very TLS
//! connection: it cannot be opened without the secret, nor relayed over another connection, nor opened as
//! another stream; the destination accepts every index once.

use aws_lc_rs::hmac;
use palanquin_engine::MigrationId;
use palanquin_engine::ids::StreamSecret;

/// Bytes that open a stream.
pub const OPENING_BYTES: usize = 16 + 2 + 32;

/// What a stream says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// The migration.
    pub migration: MigrationId,
    /// Index of the stream, from 0.
    pub index: u16,
    proof: [u8; 32],
}

/// Context for the exporter of the connection.
pub fn exporter_context(migration: MigrationId, index: u16) -> [u8; 18] {
    let mut context = [0; 18];
    context[..16].copy_from_slice(&migration.0);
    context[16..].copy_from_slice(&index.to_le_bytes());
    context
}

fn message(migration: MigrationId, index: u16, exporter: &[u8; 32]) -> Vec<u8> {
    let mut message = b"palanquin data stream from source v1".to_vec();
    message.extend_from_slice(&exporter_context(migration, index));
    message.extend_from_slice(exporter);
    message
}

impl Opening {
    /// Makes the proof.
    pub fn new(
        secret: &StreamSecret,
        migration: MigrationId,
        index: u16,
        exporter: &[u8; 32],
    ) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret.0);
        let tag = hmac::sign(&key, &message(migration, index, exporter));
        let mut proof = [0; 32];
        proof.copy_from_slice(tag.as_ref());
        Self {
            migration,
            index,
            proof,
        }
    }

    /// As it goes onto the wire.
    pub fn encode(&self) -> [u8; OPENING_BYTES] {
        let mut bytes = [0; OPENING_BYTES];
        bytes[..18].copy_from_slice(&exporter_context(self.migration, self.index));
        bytes[18..].copy_from_slice(&self.proof);
        bytes
    }

    /// Reads it; nothing is believed yet.
    pub fn decode(bytes: &[u8; OPENING_BYTES]) -> Self {
        let mut migration = [0; 16];
        migration.copy_from_slice(&bytes[..16]);
        let mut proof = [0; 32];
        proof.copy_from_slice(&bytes[18..]);
        let index = u16::from_le_bytes([bytes[16], bytes[17]]);
        Self {
            migration: MigrationId(migration),
            index,
            proof,
        }
    }

    /// Whether the proof holds on the connection with this exporter; takes the same time either way.
    pub fn holds(&self, secret: &StreamSecret, exporter: &[u8; 32]) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret.0);
        hmac::verify(
            &key,
            &message(self.migration, self.index, exporter),
            &self.proof,
        )
        .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_stream_on_its_connection_only() {
        let (secret, migration) = (StreamSecret([1; 32]), MigrationId([2; 16]));
        let opening = Opening::new(&secret, migration, 3, &[4; 32]);
        let opening = Opening::decode(&opening.encode());
        assert!(opening.holds(&secret, &[4; 32]));
        assert!(!opening.holds(&secret, &[5; 32]), "another connection");
        assert!(
            !opening.holds(&StreamSecret([9; 32]), &[4; 32]),
            "another secret"
        );
        assert!(
            !Opening {
                index: 2,
                ..opening
            }
            .holds(&secret, &[4; 32]),
            "another index"
        );
        let other = MigrationId([7; 16]);
        assert!(
            !Opening {
                migration: other,
                ..opening
            }
            .holds(&secret, &[4; 32])
        );
    }
}
