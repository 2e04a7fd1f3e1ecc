//! Challenges: random bytes that the other side binds its evidence to.

use std::io;

use aws_lc_rs::rand;
use palanquin_engine::ids::Challenge32;

/// One that nobody has seen before.
///
/// # Errors
///
/// This host has no randomness.
pub fn fresh() -> io::Result<Challenge32> {
    let mut challenge = Challenge32([0; 32]);
    rand::fill(&mut challenge.0).map_err(|_| io::Error::other("this host has no randomness"))?;
    Ok(challenge)
}
