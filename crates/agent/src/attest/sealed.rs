//! Files of the agent that only this host's TPM opens, and only while its measured state is what it was.

use palanquin_host::tpm::Tpm;
use palanquin_host::tpm::sealed::{SealError, SealedFile, Unsealed};
use palanquin_trust::Sha256;

pub use palanquin_host::tpm::sealed::is_sealed;

/// The policies in force are not those that were sealed with the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the key was sealed with the policies {sealed}, and those in force are {found}")]
pub struct OtherPolicies {
    /// Digest at sealing.
    pub sealed: Sha256,
    /// Digest now.
    pub found: Sha256,
}

/// Opens a sealed file with the TPM that it names.
///
/// # Errors
///
/// The TPM does not answer, it is another one, or registers have changed: they are named.
pub fn unseal(file: &[u8]) -> Result<Unsealed, SealError> {
    let sealed = SealedFile::read(file)?;
    let tpm = Tpm::open(sealed.tpm())?;
    sealed.unseal(&tpm)
}

/// Whether the policies in force are those that were sealed with the key, where any were.
///
/// # Errors
///
/// Others are in force.
pub fn check_policies(sealed: Option<Sha256>, found: Sha256) -> Result<(), OtherPolicies> {
    match sealed {
        Some(sealed) if sealed != found => Err(OtherPolicies { sealed, found }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_other_than_those_sealed_are_noticed() {
        let with = |policies| check_policies(policies, Sha256([1; 32])).is_ok();
        let sealed = |byte| Some(Sha256([byte; 32]));
        assert!(with(None) && with(sealed(1)) && !with(sealed(2)));
    }
}
