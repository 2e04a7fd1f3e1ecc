//! Forms of fields in documents, and deterministic reading.

use minicbor::{Decode, Decoder, Encode};

/// Why bytes are no document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CborError {
    /// Not CBOR, or another kind of thing.
    #[error("{0}")]
    Malformed(String),
    /// Something follows, fields are unknown or twice, or numbers and lengths are written in another form.
    #[error(
        "the contents are not in the one form they may have, or have fields that are not known here"
    )]
    NotDeterministic,
}

/// Writes a value.
pub(crate) fn to_vec<T: Encode<()>>(value: &T) -> Vec<u8> {
    // A vector takes everything, and no encoder of this crate fails.
    minicbor::to_vec(value).unwrap_or_default()
}

/// Reads a value that must have been written exactly as we write it.
pub(crate) fn from_slice<'b, T: Encode<()> + Decode<'b, ()>>(
    bytes: &'b [u8],
) -> Result<T, CborError> {
    let value: T = Decoder::new(bytes)
        .decode()
        .map_err(|error| CborError::Malformed(error.to_string()))?;
    if to_vec(&value) == bytes {
        Ok(value)
    } else {
        Err(CborError::NotDeterministic)
    }
}

/// UUIDs as 16 bytes.
pub(crate) mod uuid {
    use minicbor::decode::Error as DecodeError;
    use minicbor::encode::{Error as EncodeError, Write};
    use minicbor::{Decoder, Encoder};
    use uuid::Uuid;

    pub(crate) fn encode<C, W: Write>(
        uuid: &Uuid,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), EncodeError<W::Error>> {
        e.bytes(uuid.as_bytes())?.ok()
    }

    pub(crate) fn decode<C>(d: &mut Decoder<'_>, _: &mut C) -> Result<Uuid, DecodeError> {
        Uuid::from_slice(d.bytes()?).map_err(|_| DecodeError::message("a UUID has another length"))
    }
}

/// Strategies as numbers that never change.
pub(crate) mod strategy {
    use minicbor::decode::Error as DecodeError;
    use minicbor::encode::{Error as EncodeError, Write};
    use minicbor::{Decoder, Encoder};
    use palanquin_api::control::Strategy;

    const NUMBERS: [(Strategy, u8); 6] = [
        (Strategy::Auto, 0),
        (Strategy::StopAndCopy, 1),
        (Strategy::PreCopy, 2),
        (Strategy::Improved, 3),
        (Strategy::PostCopy, 4),
        (Strategy::Hybrid, 5),
    ];

    pub(crate) fn encode<C, W: Write>(
        strategy: &Strategy,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), EncodeError<W::Error>> {
        let (_, number) = NUMBERS
            .into_iter()
            .find(|(known, _)| known == strategy)
            .ok_or_else(|| EncodeError::message("a strategy without a number"))?;
        e.u8(number)?.ok()
    }

    pub(crate) fn decode<C>(d: &mut Decoder<'_>, _: &mut C) -> Result<Strategy, DecodeError> {
        let number = d.u8()?;
        NUMBERS
            .into_iter()
            .find(|(_, known)| *known == number)
            .map(|(strategy, _)| strategy)
            .ok_or_else(|| DecodeError::message("an unknown strategy"))
    }
}

/// An optional list of strategies.
pub(crate) mod strategies {
    use minicbor::decode::Error as DecodeError;
    use minicbor::encode::{Error as EncodeError, Write};
    use minicbor::{Decoder, Encoder};
    use palanquin_api::control::Strategy;

    pub(crate) fn encode<C, W: Write>(
        list: &Option<Vec<Strategy>>,
        e: &mut Encoder<W>,
        context: &mut C,
    ) -> Result<(), EncodeError<W::Error>> {
        let Some(list) = list else {
            return e.null()?.ok();
        };
        e.array(list.len() as u64)?;
        list.iter()
            .try_for_each(|strategy| super::strategy::encode(strategy, e, context))
    }

    pub(crate) fn decode<C>(
        d: &mut Decoder<'_>,
        context: &mut C,
    ) -> Result<Option<Vec<Strategy>>, DecodeError> {
        let len = d
            .array()?
            .ok_or_else(|| DecodeError::message("a list without a length"))?;
        // Each has a byte at least, so that a false length ends with the input.
        let mut list = Vec::new();
        for _ in 0..len {
            list.push(super::strategy::decode(d, context)?);
        }
        Ok(Some(list))
    }

    #[expect(clippy::unnecessary_wraps, reason = "the form that the macro calls")]
    pub(crate) fn nil() -> Option<Option<Vec<Strategy>>> {
        Some(None)
    }

    pub(crate) fn is_nil(list: &Option<Vec<Strategy>>) -> bool {
        list.is_none()
    }
}
