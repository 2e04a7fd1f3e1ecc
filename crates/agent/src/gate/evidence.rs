//! What the other host has proven about itself. Nothing makes or verifies evidence yet: what arrives is not looked at, the
//! claims are absent, and so a passport or policy that demands evidence refuses.

use palanquin_trust::VerifiedClaims;

use super::Gatekeeper;

impl Gatekeeper {
    /// What the other host has proven with these bytes.
    pub(super) fn claims(&self, _evidence: &[u8]) -> Option<VerifiedClaims> {
        None
    }

    /// What this host says about itself.
    pub fn evidence(&self) -> Vec<u8> {
        Vec::new()
    }
}
