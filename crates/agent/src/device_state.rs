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
    /// What has arrived, may be taken and was not.
    bytes: Vec<u8>,
    /// What has arrived and waits for the release.
    held: Vec<u8>,
    released: bool,
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

    /// A piece has arrived; one that is early may be read at once, the others when they are released.
    ///
    /// # Errors
    ///
    /// It is too much.
    pub fn push(&self, piece: &[u8], early: bool) -> Result<(), DeviceStateError> {
        let mut inner = self.inner();
        inner.arrived += piece.len() as u64;
        if inner.arrived > self.limit_bytes {
            return Err(DeviceStateError::Size(self.limit_bytes));
        }
        if inner.released || (early && inner.held.is_empty()) {
            inner.bytes.extend_from_slice(piece);
            self.changed.notify_all();
        } else {
            inner.held.extend_from_slice(piece);
        }
        Ok(())
    }

    /// All of it may be read.
    pub fn release(&self) {
        let mut inner = self.inner();
        let held = std::mem::take(&mut inner.held);
        inner.bytes.extend_from_slice(&held);
        inner.released = true;
        self.changed.notify_all();
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

    /// Reads it to its end, which is there only where it is what was sealed. Waits for the release until it is given up, then
    /// does what is to be done before anything is read that was not early, and from then on waits for each piece at most
    /// `patience`.
    pub fn reader<'a>(
        &'a self,
        patience: Duration,
        released: impl FnOnce() -> io::Result<()> + 'a,
    ) -> Reader<'a> {
        Reader {
            state: self,
            patience,
            released: Some(Box::new(released)),
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
    /// Until it was done.
    released: Option<Box<dyn FnOnce() -> io::Result<()> + 'a>>,
    piece: Vec<u8>,
    /// How much of the piece was given out.
    taken: usize,
    /// How much was given out in all, the piece included.
    passed: u64,
    /// Until it was compared.
    sha256: Option<Sha256Of>,
}

impl Reader<'_> {
    /// Takes what has arrived and may be read; false at the end.
    fn next_piece(&mut self) -> io::Result<bool> {
        let state = self.state;
        let mut deadline = Instant::now() + self.patience;
        let mut inner = state.inner();
        loop {
            if inner.cancelled {
                return Err(io::Error::other(DeviceStateError::Cancelled));
            }
            if inner.released
                && let Some(released) = self.released.take()
            {
                drop(inner);
                released()?;
                deadline = Instant::now() + self.patience;
                inner = state.inner();
                continue;
            }
            if !inner.bytes.is_empty() {
                break;
            }
            if !inner.released {
                let woken = state.changed.wait(inner);
                inner = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if let Some(seal) = &inner.seal
                && self.passed >= seal.device_state_bytes
            {
                let is_it = self.passed == seal.device_state_bytes
                    && self
                        .sha256
                        .take()
                        .is_none_or(|found| found.finish() == seal.device_state_sha256);
                return match is_it {
                    true => Ok(false),
                    false => Err(io::Error::other(DeviceStateError::Mismatch)),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::other(DeviceStateError::Timeout));
            }
            let woken = state.changed.wait_timeout(inner, left);
            inner = woken.map_or_else(|poisoned| poisoned.into_inner().0, |(inner, _)| inner);
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
        if self.taken == self.piece.len() && !self.next_piece()? {
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
    use std::sync::atomic::{AtomicUsize, Ordering};

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
            early in 0..20_usize,
            released_after in 0..20_usize,
            sealed_before in any::<bool>(),
        ) {
            let whole = pieces.concat();
            let early_bytes = pieces.iter().take(early).map(Vec::len).sum();
            let state = DeviceState::new(1 << 20);
            let mut read = Vec::new();
            let asked = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                let reading = scope.spawn(|| {
                    let passed = AtomicUsize::new(0);
                    let mut reader = state.reader(SOON, || {
                        asked.fetch_add(1, Ordering::Relaxed);
                        assert!(passed.load(Ordering::Relaxed) <= early_bytes, "read before it was released");
                        Ok(())
                    });
                    let mut piece = [0; 700];
                    loop {
                        let count = reader.read(&mut piece)?;
                        passed.fetch_add(count, Ordering::Relaxed);
                        read.extend_from_slice(&piece[..count]);
                        if count == 0 {
                            return io::Result::Ok(());
                        }
                    }
                });
                if sealed_before {
                    state.seal(seal(&whole));
                }
                for (nth, piece) in pieces.iter().enumerate() {
                    if nth == released_after {
                        state.release();
                    }
                    state.push(piece, nth < early).unwrap();
                }
                state.release();
                if !sealed_before {
                    state.seal(seal(&whole));
                }
                reading.join().unwrap().unwrap();
            });
            prop_assert_eq!(read, whole);
            prop_assert_eq!(asked.into_inner(), 1);
        }
    }

    #[test]
    fn a_state_that_is_not_what_was_sealed_has_no_end() {
        for sealed in [&b"hello"[..], b"hell", b"hallo"] {
            let state = DeviceState::new(100);
            state.push(b"hallo!"[..5].as_ref(), true).unwrap();
            state.release();
            state.seal(seal(sealed));
            let end = state.reader(SOON, || Ok(())).read_to_end(&mut Vec::new());
            match sealed {
                b"hallo" => assert_eq!(end.unwrap(), 5),
                _ => assert_eq!(error(end), DeviceStateError::Mismatch),
            }
        }
    }

    #[test]
    fn what_fails_before_the_release_is_read_ends_the_reader() {
        let state = DeviceState::new(8);
        state.push(b"ab", true).unwrap();
        state.push(b"c", false).unwrap();
        let mut reader = state.reader(SOON, || Err(io::Error::other("no")));
        assert_eq!(reader.read(&mut [0; 9]).unwrap(), 2);
        state.release();
        assert_eq!(reader.read(&mut [0; 9]).unwrap_err().to_string(), "no");
    }

    #[test]
    fn more_than_is_accepted_is_refused_before_it_is_kept() {
        let state = DeviceState::new(8);
        state.push(&[1; 4], true).unwrap();
        state.push(&[1; 4], false).unwrap();
        assert_eq!(state.push(&[1], true), Err(DeviceStateError::Size(8)));
    }

    #[test]
    fn a_reader_ends_when_the_state_is_given_up_or_does_not_come() {
        let state = DeviceState::new(8);
        state.release();
        let mut reader = state.reader(Duration::from_millis(1), || Ok(()));
        assert_eq!(error(reader.read(&mut [0; 9])), DeviceStateError::Timeout);
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| state.reader(SOON, || Ok(())).read(&mut [0; 9]));
            state.cancel();
            assert_eq!(error(reading.join().unwrap()), DeviceStateError::Cancelled);
        });
    }
}
