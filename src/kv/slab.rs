//! The slab: KV pages of one size, leased from arenas.
//!
//! A page is leased by the [`PageRef`]s that name it, and free again when the last of them is dropped, on any thread: a
//! sequence and the copies that are in flight share a page by holding one each. Reference counts lie in a table beside
//! the arenas, so leasing, sharing and freeing allocate nothing.
//!
//! A page is in one of three places: **cold**, in a chunk that is not yet touched and pinned; **fresh**, in a prepared
//! chunk and never leased; on the **stack** of freed pages, which is used first and from the top, as a page that was
//! just freed is likely still in a processor's cache. One mutex guards all three. It is held for about 5 ns a page, and
//! a sequence needs a page per layer every 64 steps: nothing that is lock-free would be noticed.
//!
//! Invariants, whenever the lock is free ([`Slab::check`]; after every change in debug builds):
//!
//! ```text
//! capacity = sum of pages over arenas
//! free     = |stack| + |fresh| + |cold|
//! capacity = leased + free
//! reserved <= free                                  a reservation never fails: growing is its first step
//! high_water >= leased
//! p on the stack  =>  refs(p) = 0, p not fresh, not cold, and on the stack once
//! p fresh or cold =>  refs(p) = 0
//! refs(p) = r > 0 =>  p is leased, and r PageRefs name it
//! leased > 0     <=>  the slab holds a reference to itself (`keep_alive`)
//! metered bytes   = sum of bytes over arenas <= budget
//! ```
//!
//! From these follows what makes the bytes safe to use: `refs(p)` leaves 0 only under the lock, when `p` leaves the stack
//! or the fresh pages for one `PageRef`; so while a `PageRef` names `p` nobody else is given it, and its memory and its
//! entry in the table stay, because the slab keeps itself.
#![allow(unsafe_code)] // Pages are raw memory; the equations above say whose.

mod page;
mod reservation;
mod state;

use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::vec::Drain;

pub use page::{PageId, PageRef, UniquePage};
pub use reservation::Reservation;
use state::{Entry, Region, State};

use crate::device::Meter;
use crate::device::arena::{Arena, ArenaOptions, ArenaPlan, ArenaStats};
use crate::device::buffer::unique_id;
use crate::device::fault::{Fault, Faults};
use crate::error::{Error, Result};

/// What a slab is to be like.
#[derive(Clone)]
pub struct SlabOptions {
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Counts the arenas, and bounds them by its budget.
    pub meter: Meter,
    /// What its pages are, for refusals.
    pub what: &'static str,
    /// Bytes to map at a time, where the budget has that many. More if a reservation needs more.
    pub arena_bytes: usize,
    /// Threads that prepare an arena in the background. With none, whoever finds no prepared page prepares a chunk.
    pub touch_threads: usize,
    /// How arenas are mapped and prepared.
    pub arena: ArenaOptions,
    /// NUMA nodes that arenas are bound to, one after the other in turns; none: as `arena` says.
    pub nodes: Vec<usize>,
    /// A lease that is to fail (tests).
    pub faults: Option<Arc<Faults>>,
}

impl SlabOptions {
    /// Pages of `page_bytes` bytes on `meter`, mapped 1 GiB at a time and prepared when they are needed.
    pub fn new(page_bytes: usize, meter: &Meter) -> SlabOptions {
        SlabOptions {
            page_bytes,
            meter: meter.clone(),
            what: "KV pages",
            arena_bytes: 1 << 30,
            touch_threads: 0,
            arena: ArenaOptions::default(),
            nodes: Vec::new(),
            faults: None,
        }
    }
}

/// A slab in figures. Counts are of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlabStats {
    /// Bytes from one page to the next.
    pub page_bytes: usize,
    /// All.
    pub capacity: usize,
    /// Named by at least one [`PageRef`].
    pub leased: usize,
    /// Not leased: `capacity - leased`.
    pub free: usize,
    /// Free, and promised to reservations.
    pub reserved: usize,
    /// The most that were ever leased at once.
    pub high_water: usize,
    /// Bytes mapped, over all arenas.
    pub bytes: u64,
    /// Each arena.
    pub arenas: Vec<ArenaStats>,
}

impl SlabStats {
    /// Pages that somebody has or was promised.
    pub fn promised(&self) -> usize {
        self.leased + self.reserved
    }
}

/// A slab of pages. Cheap to clone; clones are the same slab. It lives until the last page is freed.
#[derive(Clone)]
pub struct Slab(Arc<Inner>);

struct Inner {
    /// No other slab has it, before or after.
    id: u64,
    /// Bytes that a page shows.
    page_bytes: usize,
    /// Bytes from one page to the next: `page_bytes` in whole cache lines.
    stride: usize,
    options: SlabOptions,
    state: Mutex<State>,
    /// A chunk was prepared.
    prepared: Condvar,
    /// Held while an arena is mapped, so that two who need one do not both map it.
    growth: Mutex<()>,
}

/// The lock. Nothing panics while it holds a state that breaks an equation, so a poisoned one is as good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Slab {
    /// A slab without pages; the first reservation or lease maps an arena.
    ///
    /// # Errors
    /// [`Error::Usage`] for a page size of 0, or one above 1 GiB.
    pub fn new(options: SlabOptions) -> Result<Slab> {
        let page_bytes = options.page_bytes;
        if page_bytes == 0 || page_bytes > 1 << 30 {
            return Err(Error::Usage(format!("KV pages of {page_bytes} bytes: from 1 byte to 1 GiB is possible")));
        }
        Ok(Slab(Arc::new(Inner {
            id: unique_id(),
            page_bytes,
            stride: page_bytes.next_multiple_of(64),
            options,
            state: Mutex::default(),
            prepared: Condvar::new(),
            growth: Mutex::new(()),
        })))
    }

    /// Its number: no other slab has it, before or after.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.0.page_bytes
    }

    /// Leases one page that is not reserved. Its content is that of its last use (poison if that is on).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if all pages are leased or reserved and the budget has no room for more; [`Error::Device`] if
    /// pages must be pinned and cannot be.
    pub fn alloc(&self) -> Result<PageRef> {
        let state = self.0.admit(1)?;
        Ok(self.0.draw_one(state).1)
    }

    /// Leases `n` pages and appends them to `out`: all or none.
    ///
    /// # Errors
    /// As [`Slab::alloc`].
    pub fn alloc_batch(&self, n: usize, out: &mut Vec<PageRef>) -> Result<()> {
        let state = self.0.admit(n)?;
        self.0.draw(state, n, out);
        Ok(())
    }

    /// Drops many leases under one lock: `slab.free_batch(pages.drain(..))`.
    pub fn free_batch(&self, pages: Drain<'_, PageRef>) {
        // A page of another slab is freed under that one's lock, which must not be taken under this one's.
        if pages.as_slice().iter().all(|p| p.is_of(&self.0)) {
            self.0.free(pages);
        }
    }

    /// Promises `n` pages: maps arenas until that many are free and not promised to anybody else.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the bytes needed and available, [`Error::Device`] as [`Slab::alloc`]; nothing has changed
    /// then.
    pub fn reserve(&self, n: usize) -> Result<Reservation> {
        let mut reservation = Reservation::none(self);
        if n > 0 {
            reservation.extend(n)?;
        }
        Ok(reservation)
    }

    /// A promise of no pages, to be extended.
    pub fn nothing_reserved(&self) -> Reservation {
        Reservation::none(self)
    }

    /// Bytes of memory that the system must still give for `n` pages more and for all that are promised already.
    pub fn missing_bytes(&self, n: usize) -> u64 {
        let state = lock(&self.0.state);
        (state.untouched_of(n) as u64).saturating_mul(self.0.stride as u64)
    }

    /// Figures of this moment.
    pub fn stats(&self) -> SlabStats {
        let state = lock(&self.0.state);
        let arenas: Vec<_> = state.regions.iter().map(|r| r.arena.stats()).collect();
        SlabStats {
            page_bytes: self.0.stride,
            capacity: state.capacity,
            leased: state.leased,
            free: state.free(),
            reserved: state.reserved,
            high_water: state.high_water,
            bytes: arenas.iter().map(|a| a.bytes).sum(),
            arenas,
        }
    }

    /// Checks the equations of the module.
    ///
    /// # Errors
    /// Which one does not hold.
    pub fn check(&self) -> Result<(), String> {
        lock(&self.0.state).check()
    }
}

impl Inner {
    /// Reserves `n` pages, growing if it must, and returns the lock.
    fn admit(self: &Arc<Inner>, n: usize) -> Result<MutexGuard<'_, State>> {
        if self.options.faults.as_ref().is_some_and(|faults| faults.strikes(Fault::Lease)) {
            return Err(self.options.meter.refusal(n as u64 * self.stride as u64, 0, self.options.what));
        }
        loop {
            let mut state = lock(&self.state);
            if state.unreserved() >= n {
                state.reserved += n;
                return self.prepare_promised(state, n);
            }
            drop(state);
            self.grow(n)?;
        }
    }

    /// Where pages are of no use unless they are pinned: prepares as many as are promised, now, as a request that has begun
    /// could not be told that one of them cannot be. Takes the last promise, of `n`, back if one cannot.
    fn prepare_promised<'a>(&'a self, mut state: MutexGuard<'a, State>, n: usize) -> Result<MutexGuard<'a, State>> {
        let must_pin = self.options.arena.pin.as_ref().is_some_and(|pin| pin.is_required());
        while must_pin && state.untouched_of(0) > 0 {
            state = self.prepare(state).inspect_err(|_| lock(&self.state).reserved -= n)?;
        }
        Ok(state)
    }

    /// Leases `n` reserved pages.
    fn draw<'a>(self: &'a Arc<Inner>, mut state: MutexGuard<'a, State>, n: usize, out: &mut Vec<PageRef>) {
        out.reserve(n);
        for _ in 0..n {
            let page;
            (state, page) = self.draw_one(state);
            out.push(page);
        }
    }

    /// Leases a reserved page.
    fn draw_one<'a>(self: &'a Arc<Inner>, mut state: MutexGuard<'a, State>) -> (MutexGuard<'a, State>, PageRef) {
        loop {
            if let Some(entry) = state.lease(self) {
                state.debug_check();
                // SAFETY: the entry was free, and the lock makes this thread the only one to be given it.
                let page = unsafe {
                    if self.options.arena.poison {
                        page::assert_poisoned(entry, self.page_bytes);
                    }
                    PageRef::lease(self, entry)
                };
                return (state, page);
            }
            state = self.prepare(state).expect("what must be pinned was prepared when it was promised");
        }
    }

    /// Drops leases of pages of this slab under one lock.
    fn free(&self, pages: impl Iterator<Item = PageRef>) {
        let mut state = lock(&self.state);
        for page in pages {
            if let Some(entry) = page.release() {
                self.push(&mut state, entry);
            }
        }
        let last = state.end_of_leases();
        state.debug_check();
        drop(state);
        drop(last); // not under the lock, which is gone with the slab if this was its last reference
    }

    /// Frees the page whose last lease was dropped.
    ///
    /// # Safety
    /// `slab` is the slab of `entry`, which counts as leased and which no `PageRef` names.
    unsafe fn free_last(slab: NonNull<Inner>, entry: NonNull<Entry>) {
        // SAFETY: a slab with a leased page keeps itself, and `entry` counts as leased until it is pushed below. From
        // then on another thread may end the last lease, so this one needs a reference of its own until it has unlocked.
        let slab = unsafe {
            Arc::increment_strong_count(slab.as_ptr());
            Arc::from_raw(slab.as_ptr())
        };
        let mut state = lock(&slab.state);
        slab.push(&mut state, entry);
        let last = state.end_of_leases();
        state.debug_check();
        drop(state);
        drop(last);
    }

    /// Puts a page that nobody names any more on the stack.
    fn push(&self, state: &mut State, entry: NonNull<Entry>) {
        if self.options.arena.poison {
            // SAFETY: nobody names the page, and it is given to nobody before the lock is free.
            unsafe { page::poison(entry, self.page_bytes) };
        }
        state.push(entry);
    }

    /// All prepared pages are leased: prepares a cold chunk, or waits for one that another thread is at. Waits for one
    /// chunk at most unless others take its pages first, and never for nothing: a page is reserved for the caller, so
    /// when no page is on the stack or fresh, one is cold.
    ///
    /// # Errors
    /// As [`Arena::prepare`].
    fn prepare<'a>(&'a self, state: MutexGuard<'a, State>) -> Result<MutexGuard<'a, State>> {
        let Some((region, chunk)) = state.claim() else {
            return Ok(self.prepared.wait(state).unwrap_or_else(|e| e.into_inner()));
        };
        let arena = state.regions[region].arena.clone();
        drop(state);
        let prepared = arena.prepare(chunk);
        self.ready(region, prepared.as_ref().map(|()| chunk).ok());
        prepared.map(|()| lock(&self.state))
    }

    /// A chunk's pages are fresh from now on, or somebody else must prepare it.
    fn ready(&self, region: usize, chunk: Option<usize>) {
        match chunk {
            Some(chunk) => self.publish(region, chunk),
            None => {
                // Whoever holds the lock has found nothing to claim, and is not waiting yet.
                drop(lock(&self.state));
                self.prepared.notify_all();
            }
        }
    }

    /// The pages of a prepared chunk are fresh from now on.
    fn publish(&self, region: usize, chunk: usize) {
        let mut state = lock(&self.state);
        state.publish(region, chunk);
        state.debug_check();
        drop(state);
        self.prepared.notify_all();
    }

    /// Maps an arena, unless `n` pages can be reserved already.
    fn grow(self: &Arc<Inner>, n: usize) -> Result<()> {
        let _growing = lock(&self.growth);
        let (missing, capacity, region) = {
            let state = lock(&self.state);
            (n.saturating_sub(state.unreserved()), state.capacity, state.regions.len())
        };
        if missing == 0 {
            return Ok(());
        }
        let arena = Arc::new(self.map(n, missing, region)?);
        let table = Region::new(arena.clone(), capacity); // outside of the lock: it takes 5 ns a page
        lock(&self.state).install(table);
        let slab = Arc::downgrade(self);
        arena.prepare_in_background(self.options.touch_threads, move |chunk| {
            if let Some(slab) = slab.upgrade() {
                slab.ready(region, chunk.ok());
            }
        });
        Ok(())
    }

    /// An arena with at least `missing` of the `n` pages that are wanted: of the usual size, or, if the system refuses
    /// that, of the size that is needed.
    fn map(&self, n: usize, missing: usize, region: usize) -> Result<Arena> {
        let SlabOptions { meter, what, arena_bytes, arena, nodes, .. } = &self.options;
        let node = if nodes.is_empty() { arena.node } else { Some(nodes[region % nodes.len()]) };
        let arena = &ArenaOptions { node, ..arena.clone() };
        let most = u32::MAX as usize - lock(&self.state).capacity;
        let attempt = |pages: usize| {
            let plan = ArenaPlan::new(self.stride, pages.min(most), arena.chunk_bytes, meter.available());
            if plan.pages() < missing {
                let bytes = |pages: usize| (pages as u64).saturating_mul(self.stride as u64);
                return Err(meter.refusal(bytes(n), bytes(n - missing + plan.pages()), what));
            }
            Arena::map(plan, arena, meter, what)
        };
        attempt(missing.max(arena_bytes / self.stride)).or_else(|_| attempt(missing))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(|e| e.into_inner());
        state.regions.iter().for_each(|r| r.arena.abandon());
    }
}
