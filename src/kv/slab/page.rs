//! Leases of pages.
#![allow(unsafe_code)] // Bytes of a page behind its reference count, as in `Arc`.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytemuck::Pod;

use super::Inner;
use super::state::Entry;
use crate::device::arena::POISON;
use crate::gather::NodeId;

/// The number of a page in its slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub(super) u32);

impl PageId {
    /// As an index: below the slab's capacity.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A lease of one page. Clones share the page, as clones of an `Arc` do; the last one to be dropped frees it, on any
/// thread. Whoever writes needs it alone. A lease that is never dropped (`mem::forget`) keeps its whole slab for ever.
pub struct PageRef {
    /// Alive: a slab keeps itself while one of its pages is leased.
    slab: NonNull<Inner>,
    /// In a table of `slab`.
    entry: NonNull<Entry>,
}

// SAFETY: as `Arc<[u8]>`: the count is atomic, and bytes are written only through `&mut` of the one reference there is.
unsafe impl Send for PageRef {}
// SAFETY: as above.
unsafe impl Sync for PageRef {}

impl PageRef {
    /// The first reference to a page.
    ///
    /// # Safety
    /// `entry` is of `slab`, counts as leased, has a reference count of 1, and no other `PageRef` names it.
    pub(super) unsafe fn lease(slab: &Arc<Inner>, entry: NonNull<Entry>) -> PageRef {
        // SAFETY: the pointer of an `Arc` is not null; from the `Arc` itself, so that `free_last` may count with it.
        let slab = unsafe { NonNull::new_unchecked(Arc::as_ptr(slab).cast_mut()) };
        PageRef { slab, entry }
    }

    fn slab(&self) -> &Inner {
        // SAFETY: a slab lives while one of its pages is leased.
        unsafe { self.slab.as_ref() }
    }

    fn entry(&self) -> &Entry {
        // SAFETY: a table lives as long as its slab.
        unsafe { self.entry.as_ref() }
    }

    /// Whether it is a page of this slab.
    pub(super) fn is_of(&self, slab: &Arc<Inner>) -> bool {
        std::ptr::eq(self.slab.as_ptr(), Arc::as_ptr(slab))
    }

    /// Ends this lease without freeing the page. The entry, if it was the last one: it still counts as leased.
    pub(super) fn release(self) -> Option<NonNull<Entry>> {
        let page = ManuallyDrop::new(self);
        page.count_down().then_some(page.entry)
    }

    /// Whether this was the last reference. Release: what this thread did with the bytes comes before the end of the
    /// lease. Acquire: all that the others did came before this one ends the last.
    fn count_down(&self) -> bool {
        self.entry().refs.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Its number.
    pub fn id(&self) -> PageId {
        self.entry().id
    }

    /// NUMA node that its memory is bound to; `None` where it lies anywhere.
    pub fn node(&self) -> Option<NodeId> {
        self.entry().node
    }

    /// Its bytes, aligned to 64, and to 4096 if the page size is a multiple of that.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the page is mapped and has been since its slab's arena was, with `page_bytes` of its own. It is written
        // only through `get_mut`, whose borrow of the only reference rules this one out.
        unsafe { NonNull::slice_from_raw_parts(self.entry().bytes, self.slab().page_bytes).as_ref() }
    }

    /// Its bytes as numbers.
    ///
    /// # Panics
    /// If the page size is not a multiple of the size of `T`.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self.bytes())
    }

    /// Whether this is the only reference. Acquire: what others did with the bytes came before they dropped theirs.
    pub fn is_unique(&self) -> bool {
        self.entry().refs.load(Ordering::Acquire) == 1
    }

    /// Its bytes, to write, if this is the only reference.
    pub fn get_mut(&mut self) -> Option<&mut [u8]> {
        if !self.is_unique() {
            return None;
        }
        // SAFETY: as in `bytes`. This is the only reference, and it stays so while it is borrowed mutably.
        Some(unsafe { NonNull::slice_from_raw_parts(self.entry().bytes, self.slab().page_bytes).as_mut() })
    }

    /// The page to write, if this is the only reference; else this reference back.
    pub fn try_into_unique(self) -> Result<UniquePage, PageRef> {
        if self.is_unique() { Ok(UniquePage(self)) } else { Err(self) }
    }
}

impl Clone for PageRef {
    fn clone(&self) -> PageRef {
        // Relaxed: whoever has a reference may make one more; nothing is handed over yet.
        let refs = self.entry().refs.fetch_add(1, Ordering::Relaxed);
        if refs > u32::MAX / 2 {
            // As `Arc` does: only leaked clones get there, and one step further the count would wrap.
            std::process::abort();
        }
        PageRef { slab: self.slab, entry: self.entry }
    }
}

impl Drop for PageRef {
    fn drop(&mut self) {
        if self.count_down() {
            // SAFETY: the entry is of that slab, and this was the last reference.
            unsafe { Inner::free_last(self.slab, self.entry) };
        }
    }
}

impl fmt::Debug for PageRef {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "page {}", self.id().0)
    }
}

/// A page with one reference, so that it can be written without asking.
#[derive(Debug)]
pub struct UniquePage(PageRef);

impl UniquePage {
    /// Its number.
    pub fn id(&self) -> PageId {
        self.0.id()
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.get_mut().expect("nobody can clone what is inside")
    }

    /// Its bytes as numbers.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        self.0.as_slice()
    }

    /// Its bytes as numbers, to write.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// The page to share: it is complete.
    pub fn share(self) -> PageRef {
        self.0
    }
}

/// Fills a free page with a pattern that reads as NaN.
///
/// # Safety
/// No `PageRef` names the page, and nobody else uses its `bytes` bytes.
pub(super) unsafe fn poison(entry: NonNull<Entry>, bytes: usize) {
    // SAFETY: the page is mapped with at least that many bytes; the caller has it alone.
    unsafe { entry.as_ref().bytes.write_bytes(POISON, bytes) };
}

/// Checks that nobody has written to a page since it was filled with the pattern.
///
/// # Safety
/// As [`poison`].
pub(super) unsafe fn assert_poisoned(entry: NonNull<Entry>, bytes: usize) {
    // SAFETY: as above.
    let (entry, bytes) =
        unsafe { (entry.as_ref(), NonNull::slice_from_raw_parts(entry.as_ref().bytes, bytes).as_ref()) };
    assert!(bytes.iter().all(|&b| b == POISON), "page {} was written after it was freed", entry.id.0);
}
