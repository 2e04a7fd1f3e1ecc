//! Who may have what done to a VM.

mod signer;

pub use self::signer::HostSigner;
