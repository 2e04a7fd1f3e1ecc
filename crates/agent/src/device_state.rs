//! The device state on its way through the destination's agent: taken by the hypervisor while it arrives.

use std::io::{self, Read};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use palanquin_engine::message::Seal;

use crate::digest::Sha256Of;

/// Why a device state is not to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceStateError {
    /// More of it than this host accepts.
    #[error("the device state is larger than the {0} bytes that this host accepts")]
    Size(u64),
    /// It did not come.
    #[error("the device state did not arrive in time")]
    Timeout,
    /// It is not what was sealed.
    #[error("the device state is not the one that was sealed")]
    Mismatch,
    /// The migration was given up.
    #[error("the migration was given up while its device state was loaded")]
    Cancelled,
}

/// The device state as it arrives.
#[derive(Debug)]
pub struct DeviceState {
    limit_bytes: u64,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// What has arrived and was not taken.
    bytes: Vec<u8>,
    /// How much has arrived in all.
    arrived: u64,
    seal: Option<Seal>,
    cancelled: bool,
}

impl DeviceState {
    /// None of it is here; at most `limit_bytes` will be taken.
    pub fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            inner: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece has arrived.
    ///
    /// # Errors
    ///
    /// It is too much.
    pub fn push(&self, piece: &[u8]) -> Result<(), DeviceStateError> {
        let mut inner = self.inner();
        inner.arrived += piece.len() as u64;
        if inner.arrived > self.limit_bytes {
            return Err(DeviceStateError::Size(self.limit_bytes));
        }
        inner.bytes.extend_from_slice(piece);
        self.changed.notify_all();
        Ok(())
    }

    /// All of it was sent, and this is what it has to be.
    pub fn seal(&self, seal: Seal) {
        self.inner().seal = Some(seal);
        self.changed.notify_all();
    }

    /// Nobody wants it any more: who reads it gets an error.
    pub fn cancel(&self) {
        self.inner().cancelled = true;
        self.changed.notify_all();
    }

    /// Reads it to its end, which is there only where it is what was sealed. Waits for each piece at most `patience`.
    pub fn reader(&self, patience: Duration) -> Reader<'_> {
        Reader {
            state: self,
            patience,
            piece: Vec::new(),
            taken: 0,
            passed: 0,
            sha256: Some(Sha256Of::default()),
        }
    }
}

/// Reads a [`DeviceState`]. Its errors have a [`DeviceStateError`] inside.
pub struct Reader<'a> {
    state: &'a DeviceState,
    patience: Duration,
    piece: Vec<u8>,
    /// How much of the piece was given out.
    taken: usize,
    /// How much was given out in all, the piece included.
    passed: u64,
    /// Until it was compared.
    sha256: Option<Sha256Of>,
}

impl Reader<'_> {
    /// Takes what has arrived; false at the end.
    fn next_piece(&mut self) -> Result<bool, DeviceStateError> {
        let deadline = Instant::now() + self.patience;
        let mut inner = self.state.inner();
        while inner.bytes.is_empty() {
            if inner.cancelled {
                return Err(DeviceStateError::Cancelled);
            }
            if let Some(seal) = &inner.seal
                && self.passed >= seal.device_state_bytes
            {
                if self.passed > seal.device_state_bytes {
                    return Err(DeviceStateError::Mismatch);
                }
                let sealed = seal.device_state_sha256;
                let found = self.sha256.take().map(Sha256Of::finish);
                return match found {
                    Some(found) if found != sealed => Err(DeviceStateError::Mismatch),
                    _ => Ok(false),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(DeviceStateError::Timeout);
            }
            let woken = self.state.changed.wait_timeout(inner, left);
            inner = woken.map_or_else(|poisoned| poisoned.into_inner().0, |(inner, _)| inner);
        }
        if inner.cancelled {
            return Err(DeviceStateError::Cancelled);
        }
        self.piece.clear();
        std::mem::swap(&mut self.piece, &mut inner.bytes);
        drop(inner);
        self.taken = 0;
        self.passed += self.piece.len() as u64;
        if let Some(sha256) = &mut self.sha256 {
            sha256.update(&self.piece);
        }
        Ok(true)
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.piece.len() && !self.next_piece().map_err(io::Error::other)? {
            return Ok(0);
        }
        let rest = &self.piece[self.taken..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn seal(bytes: &[u8]) -> Seal {
        let mut sha256 = Sha256Of::default();
        sha256.update(bytes);
        Seal {
            rounds: 1,
            device_state_bytes: bytes.len() as u64,
            device_state_sha256: sha256.finish(),
            post_copy: false,
        }
    }

    fn error(result: io::Result<usize>) -> DeviceStateError {
        let error = result.unwrap_err().into_inner().unwrap();
        *error.downcast().unwrap()
    }

    proptest! {
        #[test]
        fn what_is_pushed_in_any_pieces_is_read_while_it_arrives(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..2000), 1..20),
            sealed_before in any::<bool>(),
        ) {
            let whole = pieces.concat();
            let state = DeviceState::new(1 << 20);
            let mut read = Vec::new();
            std::thread::scope(|scope| {
                let reading = scope.spawn(|| state.reader(SOON).read_to_end(&mut read));
                if sealed_before {
                    state.seal(seal(&whole));
                }
                for piece in &pieces {
                    state.push(piece).unwrap();
                }
                if !sealed_before {
                    state.seal(seal(&whole));
                }
                reading.join().unwrap().unwrap();
            });
            prop_assert_eq!(read, whole);
        }
    }

    #[test]
    fn a_state_that_is_not_what_was_sealed_has_no_end() {
        for sealed in [&b"hello"[..], b"hell", b"hallo"] {
            let state = DeviceState::new(100);
            state.push(b"hallo!"[..5].as_ref()).unwrap();
            state.seal(seal(sealed));
            let end = state.reader(SOON).read_to_end(&mut Vec::new());
            match sealed {
                b"hallo" => assert_eq!(end.unwrap(), 5),
                _ => assert_eq!(error(end), DeviceStateError::Mismatch),
            }
        }
    }

    #[test]
    fn more_than_is_accepted_is_refused_before_it_is_kept() {
        let state = DeviceState::new(8);
        state.push(&[1; 8]).unwrap();
        assert_eq!(state.push(&[1]), Err(DeviceStateError::Size(8)));
    }

    #[test]
    fn a_reader_ends_when_the_state_is_given_up_or_does_not_come() {
        let state = DeviceState::new(8);
        let mut reader = state.reader(Duration::from_millis(1));
        assert_eq!(error(reader.read(&mut [0; 9])), DeviceStateError::Timeout);
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| state.reader(SOON).read(&mut [0; 9]));
            state.cancel();
            assert_eq!(error(reading.join().unwrap()), DeviceStateError::Cancelled);
        });
    }
}
