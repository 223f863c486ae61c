//! What the lock of a slab guards: which pages are on the stack, fresh or cold, and how many are promised.
#![allow(unsafe_code)] // Pointers into the table, which stays as long as the state.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Inner, PageId};
use crate::device::arena::Arena;
use crate::gather::NodeId;

/// One page in the table.
pub(super) struct Entry {
    /// `PageRef`s that name it; 0 while it is free.
    pub refs: AtomicU32,
    pub id: PageId,
    /// `[stride]`, in the arena.
    pub bytes: NonNull<u8>,
    /// NUMA node that the arena is bound to.
    pub node: Option<NodeId>,
}

// SAFETY: `refs` is atomic and the rest never changes; who may use the bytes is for `PageRef` to say.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

/// An arena and the table of its pages.
pub(super) struct Region {
    pub arena: Arc<Arena>,
    /// `[pages]`. In an `Arc`, as pointers to its entries must stay valid while the region moves.
    entries: Arc<[Entry]>,
    /// Per chunk: whether its pages are not cold any more.
    published: Vec<bool>,
}

impl Region {
    /// The table of an arena whose first page is number `first` of the slab.
    pub fn new(arena: Arc<Arena>, first: usize) -> Region {
        let node = arena.node().map(|node| NodeId(node as u32));
        let entry = |i| Entry { refs: AtomicU32::new(0), id: PageId((first + i) as u32), bytes: arena.page(i), node };
        let entries = (0..arena.pages()).map(entry).collect();
        Region { entries, published: vec![false; arena.chunks().len()], arena }
    }
}

/// Pages of a prepared chunk that were never leased: `next..end` of a region.
struct Fresh {
    region: usize,
    next: usize,
    end: usize,
}

#[derive(Default)]
pub(super) struct State {
    pub regions: Vec<Region>,
    /// Freed pages, the hottest on top. Room for all pages, so that freeing allocates nothing.
    stack: Vec<NonNull<Entry>>,
    fresh: Vec<Fresh>,
    /// Pages in `fresh`.
    fresh_pages: usize,
    /// Pages of chunks that are not prepared.
    cold: usize,
    pub capacity: usize,
    pub leased: usize,
    pub reserved: usize,
    pub high_water: usize,
    /// The slab itself, while a page of it is leased.
    keep_alive: Option<Arc<Inner>>,
    /// `[capacity]`, for `check`.
    seen: Vec<bool>,
}

// SAFETY: the pointers are to entries of `regions`, which any thread may use.
unsafe impl Send for State {}

impl State {
    pub fn free(&self) -> usize {
        self.stack.len() + self.fresh_pages + self.cold
    }

    /// Free pages that nobody was promised.
    pub fn unreserved(&self) -> usize {
        self.free() - self.reserved
    }

    /// Pages without memory behind them that promising `n` pages more would bring into use, besides those that are
    /// promised already.
    pub fn untouched_of(&self, n: usize) -> usize {
        n.saturating_add(self.reserved).saturating_sub(self.stack.len() + self.fresh_pages)
    }

    /// Adds the pages of an arena, all of them cold.
    pub fn install(&mut self, region: Region) {
        let pages = region.entries.len();
        self.capacity += pages;
        self.cold += pages;
        self.stack.reserve(self.capacity - self.stack.len());
        self.seen.resize(self.capacity, false);
        self.fresh.reserve(region.published.len() + self.fresh.len());
        self.regions.push(region);
        self.debug_check();
    }

    /// A cold chunk for the caller to prepare, as region and chunk.
    pub fn claim(&self) -> Option<(usize, usize)> {
        self.regions.iter().enumerate().find_map(|(i, r)| Some((i, r.arena.claim()?)))
    }

    /// The pages of a prepared chunk are fresh.
    pub fn publish(&mut self, region: usize, chunk: usize) {
        let Region { arena, published, .. } = &mut self.regions[region];
        let pages = arena.chunks()[chunk];
        published[chunk] = true;
        self.cold -= pages.pages;
        self.fresh_pages += pages.pages;
        self.fresh.push(Fresh { region, next: pages.first_page, end: pages.first_page + pages.pages });
        self.debug_check();
    }

    /// Takes a reserved page for one `PageRef`; `None` if all free pages are cold.
    pub fn lease(&mut self, slab: &Arc<Inner>) -> Option<NonNull<Entry>> {
        let entry = match self.stack.pop() {
            Some(entry) => entry,
            None => self.pop_fresh()?,
        };
        // SAFETY: the table lives as long as the regions. Nobody else has the page, so nothing to order: whoever freed it
        // did so under this lock.
        unsafe { entry.as_ref() }.refs.store(1, Ordering::Relaxed);
        self.reserved -= 1;
        self.leased += 1;
        self.high_water = self.high_water.max(self.leased);
        if self.keep_alive.is_none() {
            self.keep_alive = Some(slab.clone());
        }
        Some(entry)
    }

    fn pop_fresh(&mut self) -> Option<NonNull<Entry>> {
        let range = self.fresh.last_mut()?;
        let entry = NonNull::from(&self.regions[range.region].entries[range.next]);
        range.next += 1;
        self.fresh_pages -= 1;
        if range.next == range.end {
            self.fresh.pop();
        }
        Some(entry)
    }

    /// Puts a page that no `PageRef` names any more on the stack.
    pub fn push(&mut self, entry: NonNull<Entry>) {
        self.stack.push(entry);
        self.leased -= 1;
    }

    /// After pages were freed: what keeps the slab, if none is leased any more. To be dropped without the lock.
    pub fn end_of_leases(&mut self) -> Option<Arc<Inner>> {
        if self.leased == 0 { self.keep_alive.take() } else { None }
    }

    /// [`State::check`] where debug assertions are on, after every change of a table of up to 8,192 pages. Larger ones are
    /// checked now and then: the check takes time in proportion.
    pub fn debug_check(&mut self) {
        const EVERY_TIME: usize = 8192;
        let now_and_then = self.capacity.div_ceil(EVERY_TIME).max(1);
        if cfg!(debug_assertions) && self.leased.is_multiple_of(now_and_then) {
            self.check().expect("an equation of the slab holds");
        }
    }

    /// The equations of [`super`].
    pub fn check(&mut self) -> Result<(), String> {
        let State { capacity, leased, reserved, high_water, .. } = *self;
        let pages: usize = self.regions.iter().map(|r| r.entries.len()).sum();
        let fresh: usize = self.fresh.iter().map(|f| f.end - f.next).sum();
        holds(capacity == pages, "capacity = sum of pages", (capacity, pages))?;
        holds(self.fresh_pages == fresh, "pages in fresh ranges", (self.fresh_pages, fresh))?;
        holds(leased + self.free() == capacity, "leased + free = capacity", (leased, self.free()))?;
        holds(reserved <= self.free(), "reserved <= free", (reserved, self.free()))?;
        holds(leased <= high_water, "leased <= high_water", (leased, high_water))?;
        holds((leased > 0) == self.keep_alive.is_some(), "leased > 0 <=> the slab keeps itself", leased)?;
        self.seen.fill(false);
        self.see_stack()?;
        self.see_never_leased()?;
        let free = self.seen.iter().filter(|&&seen| seen).count();
        holds(free == self.free(), "free pages are distinct", (free, self.free()))?;
        // A page whose last lease is just being dropped counts as leased until its thread has the lock.
        let entries = self.regions.iter().flat_map(|r| r.entries.iter());
        let named = entries.filter(|e| e.refs.load(Ordering::Relaxed) > 0).count();
        holds(named <= leased, "named pages are leased", (named, leased))
    }

    fn see_stack(&mut self) -> Result<(), String> {
        for &entry in &self.stack {
            // SAFETY: the table lives as long as the regions.
            see(&mut self.seen, unsafe { entry.as_ref() })?;
        }
        Ok(())
    }

    fn see_never_leased(&mut self) -> Result<(), String> {
        for Fresh { region, next, end } in &self.fresh {
            self.regions[*region].entries[*next..*end].iter().try_for_each(|e| see(&mut self.seen, e))?;
        }
        let mut cold = 0;
        for Region { arena, entries, published } in &self.regions {
            for (chunk, _) in arena.chunks().iter().zip(published).filter(|(_, published)| !**published) {
                let pages = &entries[chunk.first_page..][..chunk.pages];
                pages.iter().try_for_each(|e| see(&mut self.seen, e))?;
                cold += pages.len();
            }
        }
        holds(cold == self.cold, "pages in cold chunks", (cold, self.cold))
    }
}

/// Notes a free page: named by nobody, and seen for the first time.
fn see(seen: &mut [bool], entry: &Entry) -> Result<(), String> {
    let refs = entry.refs.load(Ordering::Relaxed);
    holds(refs == 0, "a free page is named by nobody", (entry.id, refs))?;
    let twice = std::mem::replace(&mut seen[entry.id.index()], true);
    holds(!twice, "a free page is in one place", entry.id)
}

fn holds(condition: bool, equation: &str, values: impl std::fmt::Debug) -> Result<(), String> {
    if condition { Ok(()) } else { Err(format!("{equation}: {values:?}")) }
}

#[cfg(test)]
mod tests {
    use super::super::{Slab, SlabOptions, lock};
    use super::*;
    use crate::device::Meter;

    /// Each equation, broken by hand, is reported.
    #[test]
    fn check_finds_every_broken_equation() {
        type Break = fn(&mut State);
        let cases: [(&str, Break); 8] = [
            ("leased + free", |s| s.leased += 1),
            ("reserved <= free", |s| s.reserved = s.capacity + 1),
            ("leased <= high_water", |s| s.high_water = 0),
            ("keeps itself", |s| s.keep_alive = None),
            ("in one place", |s| s.stack[0] = s.stack[1]),
            ("named by nobody", |s| {
                // SAFETY: the table lives as long as the regions.
                unsafe { s.stack[0].as_ref() }.refs.store(1, Ordering::Relaxed)
            }),
            ("pages in cold chunks", |s| (s.cold, s.leased) = (s.cold + 1, s.leased - 1)),
            ("pages in fresh ranges", |s| s.fresh_pages += 1),
        ];
        for (equation, break_it) in cases {
            let slab = Slab::new(SlabOptions::new(4096, &Meter::new("host", Some(4 << 20)))).unwrap();
            let mut pages = vec![];
            slab.alloc_batch(5, &mut pages).unwrap();
            slab.free_batch(pages.drain(2..));
            slab.check().unwrap();
            {
                let mut state = lock(&slab.0.state);
                let State { stack, cold, fresh_pages, leased, reserved, high_water, keep_alive, .. } = &*state;
                let counts = (*cold, *fresh_pages, *leased, *reserved, *high_water);
                let (stack, keep_alive) = (stack.clone(), keep_alive.clone());
                break_it(&mut state);
                let found = state.check().unwrap_err();
                assert!(found.contains(equation), "{equation}: {found}");
                // SAFETY: the table lives as long as the regions.
                unsafe { stack[0].as_ref() }.refs.store(0, Ordering::Relaxed);
                (state.stack, state.keep_alive) = (stack, keep_alive);
                (state.cold, state.fresh_pages, state.leased, state.reserved, state.high_water) = counts;
            }
            slab.check().unwrap();
        }
    }
}
