//! A disk in memory that outlives its ledger, and can fail, fill up, stand still and be looked at as a crash would leave it.

use std::io::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use redb::{Builder, StorageBackend};

use super::support::SETTINGS;
use super::{Clock, EmbeddedLedger, OpenError, Path};

/// How many calls had been answered, and what a crash would have left.
type Image = (usize, Vec<u8>);

#[derive(Debug, Clone, Default)]
pub struct Disk {
    bytes: Arc<Mutex<Bytes>>,
    /// Writes fail.
    pub full: Arc<AtomicBool>,
    /// Reads fail.
    pub unreadable: Arc<AtomicBool>,
    /// Whether a ledger opened from now on keeps nothing of the file in memory.
    pub uncached: Arc<AtomicBool>,
    /// Flushes so far, those under way included.
    pub syncs: Arc<AtomicUsize>,
    held: Arc<(Mutex<bool>, Condvar)>,
    /// Whether crash images are taken.
    pub record: Arc<AtomicBool>,
    /// How many calls had been answered.
    pub answered: Arc<AtomicUsize>,
    /// What a crash would have left, at every write: with the page cache (a killed process), and without (a lost machine).
    pub images: Arc<Mutex<Vec<Image>>>,
}

#[derive(Debug, Default)]
struct Bytes {
    written: Vec<u8>,
    flushed: Vec<u8>,
}

/// See [`Disk::hold`].
pub struct Held(Arc<(Mutex<bool>, Condvar)>);

impl Drop for Held {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap() = false;
        self.0.1.notify_all();
    }
}

impl Disk {
    pub fn of(image: Vec<u8>) -> Self {
        let disk = Self::default();
        disk.bytes.lock().unwrap().written = image;
        disk
    }

    pub fn open(&self, clock: Clock) -> std::result::Result<EmbeddedLedger, OpenError> {
        let disk = self.clone();
        let opener = Box::new(move || {
            let cache = if disk.uncached.load(Ordering::SeqCst) { 0 } else { 1 << 20 };
            Builder::new().set_cache_size(cache).create_with_backend(disk.clone())
        });
        EmbeddedLedger::start(Path::new("(disk)"), opener, SETTINGS, clock)
    }

    /// Until it is dropped, every flush waits.
    pub fn hold(&self) -> Held {
        *self.held.0.lock().unwrap() = true;
        Held(self.held.clone())
    }

    fn change(&self, change: impl FnOnce(&mut Bytes)) -> Result<()> {
        if self.full.load(Ordering::SeqCst) {
            return Err(Error::from(ErrorKind::StorageFull));
        }
        let mut bytes = self.bytes.lock().unwrap();
        change(&mut bytes);
        if self.record.load(Ordering::SeqCst) {
            let answered = self.answered.load(Ordering::SeqCst);
            let mut images = self.images.lock().unwrap();
            for image in [(answered, &bytes.written), (answered, &bytes.flushed)] {
                if !images.iter().rev().take(4).any(|(known, bytes)| (*known, bytes) == image) {
                    images.push((image.0, image.1.clone()));
                }
            }
        }
        Ok(())
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64> {
        Ok(self.bytes.lock().unwrap().written.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        if self.unreadable.load(Ordering::SeqCst) {
            return Err(Error::other("a bad sector"));
        }
        let offset = usize::try_from(offset).unwrap();
        out.copy_from_slice(&self.bytes.lock().unwrap().written[offset..offset + out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(|bytes| bytes.written.resize(usize::try_from(len).unwrap(), 0))
    }

    fn sync_data(&self) -> Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        drop(self.held.1.wait_while(self.held.0.lock().unwrap(), |held| *held).unwrap());
        self.change(|bytes| bytes.flushed = bytes.written.clone())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let offset = usize::try_from(offset).unwrap();
        self.change(|bytes| bytes.written[offset..offset + data.len()].copy_from_slice(data))
    }
}
