//! Who may move which VM where, and whether a host is what it says.
//!
//! Nothing here does I/O, reads a clock or draws randomness: bytes, keys and the time are arguments.
//!
//! What arrives is [`Signed`]: bounded bytes in the form of an envelope, whose contents cannot be used. Only
//! [`Signed::verify`] turns it into [`Verified`], and only what is verified is judged:
//!
//! ```text
//! Signed<Passport>  ──verify──▶ Verified<Passport> ─┐
//! Signed<Approval>  ──verify──▶ Verified<Approval> ─┼─▶ Policies::decide ─▶ Permit | Denied
//! Evidence          ──verify──▶ VerifiedClaims     ─┘
//! Signed<Order>     ──verify──▶ Verified<Order>    ───▶ redeem ─▶ Redeemed, once
//! Signed<Advertisement> ─verify▶ Verified<Advertisement> ─▶ accept ─▶ Accepted: may be audited
//! ```
//!
//! Identity (keys and names), attestation (claims) and authorisation (policies and the owner's passport) are separate
//! gates; a refusal says which one it was, see [`decision::Gate`].
//!
//! Documents are deterministic CBOR (RFC 8949, section 4.2.1) in a `COSE_Sign1` (RFC 9052, section 4.2): bytes that are
//! not exactly what this code would write for the same contents are refused, and with them fields it does not know. A
//! rule of an owner that is not understood must not be skipped.
#![forbid(unsafe_code)]

mod cbor;

pub mod advertisement;
pub mod approval;
pub mod decision;
pub mod digest;
pub mod enrolment;
pub mod evidence;
pub mod identity;
pub mod keys;
pub mod order;
pub mod passport;
pub mod policy;
pub mod signed;

pub use advertisement::Advertisement;
pub use approval::Approval;
pub use decision::{Action, Decision, Denied, Gate, Permit, Reason};
pub use digest::Sha256;
pub use evidence::{Evidence, VerifiedClaims};
pub use identity::{Identity, Kind};
pub use keys::{Keyring, PublicKey, Sign};
pub use order::Order;
pub use passport::Passport;
pub use policy::Policies;
pub use signed::{Signed, Verified};
