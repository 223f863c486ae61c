//! The 16-bit copy of a sequence on the host: one list of wide pages per layer.

use std::sync::{Arc, RwLock, RwLockReadGuard};

use super::layout::KvShape;
use super::options::PAGE;
use crate::device::{Buffer, Device, Grants, InFlight};
use crate::error::Result;

/// A wide page on the device. Shared with the copy stream while a copy reads it; whoever writes needs it alone.
pub type WidePage = Arc<Buffer>;

/// The host pages of one layer. Written by page-out and read by page-in and gather, all on the copy stream and so in
/// order; the lock is there for everybody else (snapshots, tests) and is never contended in a step.
#[derive(Default)]
pub struct HostLayer {
    pages: RwLock<Vec<Buffer>>,
}

impl HostLayer {
    /// Grows to at least `n_pages` pages.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] if that is more than was granted.
    pub fn reserve(&self, grants: &mut Grants, shape: &KvShape, n_pages: usize) -> Result<()> {
        let mut pages = self.pages.write().unwrap_or_else(|e| e.into_inner());
        while pages.len() < n_pages {
            pages.push(grants.host(shape.wide_page_bytes(), "the 16-bit KV copy")?);
        }
        Ok(())
    }

    /// The pages, to read.
    pub fn pages(&self) -> RwLockReadGuard<'_, Vec<Buffer>> {
        self.pages.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Bytes that the pages take.
    pub fn bytes(&self) -> u64 {
        self.pages().iter().map(Buffer::metered_bytes).sum()
    }
}

/// Copies complete device pages to the host, beginning with page `first`, while the caller goes on.
pub fn page_out(device: &Device, host: &Arc<HostLayer>, first: usize, pages: Vec<WidePage>) {
    let host = host.clone();
    // Nobody waits for this by itself: the stream's order puts it before every gather that may read the page, and the
    // pages' reference counts keep them from being written meanwhile.
    device.copy_stream().launch_detached(move || {
        let mut to = host.pages.write().unwrap_or_else(|e| e.into_inner());
        for (i, page) in pages.into_iter().enumerate() {
            to[first + i].bytes_mut().copy_from_slice(page.bytes());
        }
    });
}

/// Copies the first `n_tokens / 64` host pages into `pages`, which must be held alone, while the caller goes on.
pub fn page_in(
    device: &Device,
    host: &Arc<HostLayer>,
    n_tokens: usize,
    pages: Vec<WidePage>,
) -> InFlight<Vec<WidePage>> {
    let host = host.clone();
    device.copy_stream().launch(pages, move |pages| {
        for (page, from) in pages.iter_mut().zip(host.pages().iter()).take(n_tokens / PAGE) {
            let page = Arc::get_mut(page).expect("a page that is loaded has one owner");
            page.bytes_mut().copy_from_slice(from.bytes());
        }
    })
}
