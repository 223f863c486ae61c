//! Large read-only byte ranges: files mapped, or anonymous memory filled once.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};

use crate::error::{Error, Result};

/// A shared, read-only range of a mapping. Cloning it copies no bytes.
#[derive(Clone)]
pub struct Bytes {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl Bytes {
    /// Maps a whole file. The file must not shrink while it is mapped (a page that is gone raises SIGBUS, as everywhere).
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    #[allow(unsafe_code)]
    pub fn file(path: &Path) -> Result<Bytes> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the mapping is read-only and private to this value; writers that truncate a model file while it is
        // in use are outside what any reader of it can guard against (documented above).
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let range = 0..map.len();
        Ok(Bytes { map: Arc::new(map), range })
    }

    /// Anonymous memory of `len` bytes, with huge pages where the kernel has them, filled by `fill` and then frozen.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the mapping is refused.
    pub fn filled(len: usize, fill: impl FnOnce(&mut [u8])) -> Result<Bytes> {
        let refused = |_| Error::OutOfMemory {
            memory: "host",
            what: "an anonymous mapping".into(),
            needed: len as u64,
            available: 0,
            fix: "free memory or choose a smaller model".into(),
        };
        let mut map = MmapMut::map_anon(len.max(1)).map_err(refused)?;
        // Advice only: without transparent huge pages the mapping works all the same, with more TLB misses.
        let _ = map.advise(memmap2::Advice::HugePage);
        fill(&mut map[..len]);
        let map = map.make_read_only().map_err(refused)?;
        Ok(Bytes { map: Arc::new(map), range: 0..len })
    }

    /// A part of this range.
    ///
    /// # Panics
    /// If `range` is not inside.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.range.len(), "slice outside of its mapping");
        Bytes { map: self.map.clone(), range: self.range.start + range.start..self.range.start + range.end }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}
