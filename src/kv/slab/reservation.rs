//! Admission: pages that are promised before a request starts, so that it cannot run out half way.

use super::{PageRef, Slab, lock};
use crate::error::Result;

/// A promise of pages. What was not drawn is given up on drop.
pub struct Reservation {
    slab: Slab,
    /// Pages promised and not yet drawn; part of the slab's `reserved`.
    left: usize,
}

impl Reservation {
    pub(super) fn none(slab: &Slab) -> Reservation {
        Reservation { slab: slab.clone(), left: 0 }
    }

    /// Pages that can still be drawn.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Leases one of the promised pages. Waits at most for the chunk that the page is in to be touched and pinned.
    ///
    /// # Panics
    /// If none is left: a caller that draws more than it asked for has counted wrong.
    pub fn alloc(&mut self) -> PageRef {
        self.count_off(1);
        let slab = &self.slab.0;
        slab.draw_one(lock(&slab.state)).1
    }

    /// Leases `n` of the promised pages under one lock and appends them to `out`.
    ///
    /// # Panics
    /// If fewer are left.
    pub fn alloc_batch(&mut self, n: usize, out: &mut Vec<PageRef>) {
        self.count_off(n);
        let slab = &self.slab.0;
        slab.draw(lock(&slab.state), n, out);
    }

    fn count_off(&mut self, n: usize) {
        assert!(n <= self.left, "{n} pages are drawn from a reservation of {}", self.left);
        self.left -= n;
    }

    /// Takes over the promise of `n` pages.
    ///
    /// # Panics
    /// If the other has promised fewer.
    pub fn take_from(&mut self, other: &mut Reservation, n: usize) {
        other.count_off(n);
        self.left += n;
    }

    /// Gives up the promise of `n` pages.
    ///
    /// # Panics
    /// If fewer are left.
    pub fn give_up(&mut self, n: usize) {
        self.count_off(n);
        let mut state = lock(&self.slab.0.state);
        state.reserved -= n;
        state.debug_check();
    }

    /// Promises `n` pages more.
    ///
    /// # Errors
    /// As [`Slab::reserve`]; what was promised before still is.
    pub fn extend(&mut self, n: usize) -> Result<()> {
        self.slab.0.admit(n)?.debug_check();
        self.left += n;
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.give_up(self.left);
    }
}
