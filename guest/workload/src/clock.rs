//! The guest's clock: shown by NTP, set on demand.
//!
//! Nobody disciplines it, so that a pause shows in it until somebody sets it, and its answers say so: leap indicator 3 and
//! stratum 16, "unsynchronised" (RFC 5905, section 7.3).

use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::wait;

const NTP_PORT: u16 = 123;
/// Bytes of a packet without extensions.
const PACKET: usize = 48;
/// Seconds from 1900, where NTP's era begins, to 1970.
const ERA: u64 = 2_208_988_800;
/// Largest step, in milliseconds, since the only means is to set whole seconds.
const STEP_MAX_MS: i64 = 900;

/// Answers questions for the time in the background.
pub(crate) fn serve() -> Result<(), String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, NTP_PORT))
        .map_err(|why| format!("port {NTP_PORT} can't be opened: {why}"))?;
    let answers = move || {
        loop {
            let mut packet = [0; 128];
            let Ok((length, from)) = socket.recv_from(&mut packet) else {
                // Out of memory, or a peer that is gone: both pass.
                wait::until(Instant::now() + Duration::from_millis(10));
                continue;
            };
            let received = timestamp();
            if let Some(answer) = answer(&packet[..length], received, timestamp) {
                let _ = socket.send_to(&answer, from);
            }
        }
    };
    thread::Builder::new()
        .name("ntp".into())
        .spawn(answers)
        .map(drop)
        .map_err(|why| format!("no thread for NTP: {why}"))
}

/// The answer to a client's packet; nothing to anything else.
fn answer(question: &[u8], received: u64, now: impl Fn() -> u64) -> Option<[u8; PACKET]> {
    const CLIENT: u8 = 3;
    const SERVER: u8 = 4;
    let (mode, version) = (question.first()? & 7, question[0] >> 3 & 7);
    if question.len() < PACKET || mode != CLIENT || !(3..=4).contains(&version) {
        return None;
    }
    let mut answer = [0; PACKET];
    answer[0] = 3 << 6 | version << 3 | SERVER;
    answer[1] = 16;
    answer[2] = question[2];
    // A microsecond.
    answer[3] = 0_u8.wrapping_sub(20);
    answer[12..16].copy_from_slice(b"LOCL");
    answer[24..32].copy_from_slice(&question[40..48]);
    answer[32..40].copy_from_slice(&received.to_be_bytes());
    answer[40..48].copy_from_slice(&now().to_be_bytes());
    Some(answer)
}

/// Seconds since 1900 and 32 bits of a fraction.
fn timestamp() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let fraction = (u64::from(now.subsec_nanos()) << 32) / 1_000_000_000;
    (now.as_secs() + ERA) << 32 | fraction
}

/// Sets the clock ahead, or back if negative; says by how many milliseconds it was set.
///
/// Only whole seconds can be set without a system call of our own: it waits for the moment at which the next whole second
/// (or the last one) is as far away as the step.
pub(crate) fn step(ms: i64) -> Result<f64, String> {
    if ms == 0 || ms.abs() > STEP_MAX_MS {
        return Err(format!("a step is 1 to {STEP_MAX_MS} ms, ahead or back"));
    }
    let into_second = Duration::from_millis((-ms).rem_euclid(1000).unsigned_abs());
    let now = unix();
    let into_now = Duration::from_nanos(now.subsec_nanos().into());
    let mut left = into_second + Duration::from_secs(1) - into_now;
    if left >= Duration::from_secs(1) {
        left -= Duration::from_secs(1);
    }
    wait::until(Instant::now() + left);
    let second = unix().as_secs() + u64::from(ms > 0);
    let (before, began) = (unix(), Instant::now());
    let status = Command::new("date")
        .args(["-s", &format!("@{second}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|why| format!("date can't be run: {why}"))?;
    if !status.success() {
        return Err(format!("date ended with {status}"));
    }
    let expected = before + began.elapsed();
    Ok((unix().as_secs_f64() - expected.as_secs_f64()) * 1e3)
}

fn unix() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_answered_with_its_own_time_and_the_word_unsynchronised() {
        let mut question = [0; PACKET];
        question[0] = 4 << 3 | 3;
        question[40..48].copy_from_slice(&7_u64.to_be_bytes());
        let answer = answer(&question, 8, || 9).unwrap();
        assert_eq!((answer[0] >> 6, answer[0] & 7, answer[1]), (3, 4, 16));
        let part = |at: usize| u64::from_be_bytes(answer[at..at + 8].try_into().unwrap());
        assert_eq!((part(24), part(32), part(40)), (7, 8, 9));
    }

    #[test]
    fn what_is_no_question_gets_no_answer() {
        let mut server = [0; PACKET];
        server[0] = 4 << 3 | 4;
        for packet in [&server[..], &[0x23; 47], &[]] {
            assert!(answer(packet, 0, || 0).is_none());
        }
    }

    #[test]
    fn a_step_has_bounds() {
        assert!(step(0).is_err() && step(901).is_err() && step(-901).is_err());
    }
}
