//! Names of things that cross the wire.

use std::fmt;

use minicbor::{Decode, Decoder, Encode, Encoder, decode, encode};

macro_rules! fixed_bytes {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl<C> Encode<C> for $name {
            fn encode<W: encode::Write>(
                &self,
                e: &mut Encoder<W>,
                _: &mut C,
            ) -> Result<(), encode::Error<W::Error>> {
                e.bytes(&self.0)?.ok()
            }
        }

        impl<'b, C> Decode<'b, C> for $name {
            fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
                let bytes = d.bytes()?;
                <[u8; $len]>::try_from(bytes)
                    .map(Self)
                    .map_err(|_| decode::Error::message(concat!(stringify!($name), " has another length")))
            }
        }
    };
}

fixed_bytes! {
    /// One attempt to move one VM: a UUID, used once.
    MigrationId, 16
}
fixed_bytes! {
    /// Identity of a VM over all hosts: its UUID.
    VmId, 16
}
fixed_bytes! {
    /// Root over the digests of all pages of a VM.
    Root, 32
}
fixed_bytes! {
    /// Secret of one migration, from which the proofs that open its data streams are made.
    StreamSecret, 32
}
fixed_bytes! {
    /// SHA-256 of a byte string.
    Sha256, 32
}
fixed_bytes! {
    /// Fresh random bytes that the other side binds its evidence to, so that it cannot be an older one.
    Challenge32, 32
}

/// Counts the owners that a VM has had. A host acts on a VM only with the newest epoch it knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct Epoch(#[n(0)] pub u64);

impl Epoch {
    /// The epoch of the next owner; saturates, and a saturated epoch is refused by [`crate::order`].
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
