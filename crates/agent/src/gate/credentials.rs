//! What travels with an offer and speaks for it: the signed order, the VM's passport, approvals, and evidence of the
//! source. CBOR (RFC 8949); the documents in it are verified one by one.

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};
use palanquin_api::control::APPROVALS_MAX;

/// Longest encoding, in bytes: what the protocol carries.
pub const CREDENTIALS_MAX: usize = 64 * 1024;

/// Credentials, none of them verified.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Credentials {
    /// The order, signed by the source.
    #[n(0)]
    pub order: ByteVec,
    /// The passport, signed by the VM's owner.
    #[n(1)]
    pub passport: ByteVec,
    /// Approvals, signed by operators; at most 16.
    #[n(2)]
    pub approvals: Vec<ByteVec>,
    /// What the source says about itself; empty where it has nothing to say.
    #[n(3)]
    pub evidence: ByteVec,
}

/// Bytes that are no credentials.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// More than [`CREDENTIALS_MAX`].
    #[error("credentials of {0} bytes, at most {CREDENTIALS_MAX} are allowed")]
    TooLong(usize),
    /// Not CBOR of this form.
    #[error("the credentials cannot be read: {0}")]
    Malformed(String),
    /// More approvals than may be.
    #[error("{0} approvals, at most {APPROVALS_MAX} are allowed")]
    Approvals(usize),
}

impl Credentials {
    /// As they travel.
    ///
    /// # Errors
    ///
    /// They are too long.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CredentialsError> {
        let bytes = minicbor::to_vec(self)
            .map_err(|error| CredentialsError::Malformed(error.to_string()))?;
        if bytes.len() > CREDENTIALS_MAX {
            return Err(CredentialsError::TooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// As they came.
    ///
    /// # Errors
    ///
    /// They are too long, or none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CredentialsError> {
        if bytes.len() > CREDENTIALS_MAX {
            return Err(CredentialsError::TooLong(bytes.len()));
        }
        let malformed = |error: String| CredentialsError::Malformed(error);
        let mut decoder = minicbor::Decoder::new(bytes);
        let credentials: Self = decoder
            .decode()
            .map_err(|error| malformed(error.to_string()))?;
        if decoder.position() != bytes.len() {
            return Err(malformed("something comes after them".to_owned()));
        }
        match credentials.approvals.len() {
            0..=APPROVALS_MAX => Ok(credentials),
            count => Err(CredentialsError::Approvals(count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(approvals: usize) -> Credentials {
        Credentials {
            order: vec![1; 300].into(),
            passport: vec![2; 200].into(),
            approvals: vec![vec![3; 100].into(); approvals],
            evidence: Vec::new().into(),
        }
    }

    #[test]
    fn credentials_come_back_as_they_were_and_nothing_else_is_taken_for_some() {
        let bytes = credentials(2).to_bytes().unwrap();
        assert_eq!(Credentials::from_bytes(&bytes), Ok(credentials(2)));
        for len in 0..bytes.len() {
            assert!(Credentials::from_bytes(&bytes[..len]).is_err());
        }
        let longer = [&bytes[..], b"\0"].concat();
        assert!(Credentials::from_bytes(&longer).is_err());
        let many = credentials(17).to_bytes().unwrap();
        assert_eq!(
            Credentials::from_bytes(&many),
            Err(CredentialsError::Approvals(17))
        );
        let long = Credentials {
            evidence: vec![0; CREDENTIALS_MAX].into(),
            ..credentials(0)
        };
        assert!(matches!(long.to_bytes(), Err(CredentialsError::TooLong(_))));
        let zeros = vec![0; CREDENTIALS_MAX + 1];
        let error = Credentials::from_bytes(&zeros);
        assert_eq!(error, Err(CredentialsError::TooLong(CREDENTIALS_MAX + 1)));
    }
}
