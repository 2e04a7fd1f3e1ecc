//! What is computed from the readings of one target.

pub(crate) mod change;
pub(crate) mod clock;
pub(crate) mod loss;
pub(crate) mod ranks;
