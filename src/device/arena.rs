//! Large anonymous mappings for KV pages: huge pages, one NUMA node, touched and pinned chunk by chunk.
//!
//! An arena is mapped at once, which takes microseconds as no memory is behind it yet, and then **prepared** chunk by
//! chunk, by background threads or by whoever needs the next page: touched, so that memory is behind it, then pinned.
//! Its pages can be used from the first prepared chunk on. The first chunk is 2 MiB, so that this takes a millisecond;
//! each of the next is twice as large, so that there are few registrations.
//!
//! ```text
//! | 2 MiB | 4 MiB | 8 MiB | 16 MiB | ... | chunk_bytes | chunk_bytes | what is left |
//! ```
//!
//! Invariants, with `c` a chunk and `n` the next one:
//!
//! ```text
//! n.start = c.start + c.bytes                                chunks tile the arena
//! c.start = 0 (mod 2 MiB)                                    no huge page lies in two chunks
//! c.bytes = 0 (mod 4 KiB), c.bytes <= 64 GiB                 a chunk is one registration
//! c.pages * page_bytes <= c.bytes                            no KV page lies in two registrations
//! prepared chunks + chunks in preparation + cold chunks = chunks;  a chunk is claimed once
//! ```
#![allow(unsafe_code)] // mmap and its relatives.

mod mapping;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::buffer::Meter;
use super::pin::Pin;
use crate::error::{Error, Result};
use crate::notice;
pub(crate) use mapping::POISON;
use mapping::{HUGE_PAGE, Mapping, SYSTEM_PAGE, advise, bind, map_metered, mbind, mmap_at, populate, touch};
pub use mapping::{HugePages, MemoryKind, Placement};

/// The most bytes of one registration: CUDA refuses 512 GiB in one call.
const MAX_CHUNK: usize = 64 << 30;
/// Touched in one system call; an arena that is dropped waits at most this long (about 10 ms) for its threads.
const TOUCH_STEP: usize = 32 << 20;

/// How arenas are mapped and prepared.
#[derive(Clone)]
pub struct ArenaOptions {
    /// Which huge pages to try.
    pub huge_pages: HugePages,
    /// NUMA node to bind to, the one next to the device; `None`: no binding.
    pub node: Option<usize>,
    /// Most bytes of a chunk. What one thread touches at a time, and one registration: an allocation that finds all
    /// prepared pages taken waits for one chunk, about 0.1 s for the default of 256 MiB with 4-KiB pages.
    pub chunk_bytes: usize,
    /// What pins a chunk once it is touched; `None`: nothing.
    pub pin: Option<Arc<dyn Pin>>,
    /// Fill pages with 0xFF before they are handed out (tests).
    pub poison: bool,
}

impl Default for ArenaOptions {
    fn default() -> Self {
        let huge_pages = HugePages::default();
        ArenaOptions { huge_pages, node: None, chunk_bytes: 256 << 20, pin: None, poison: false }
    }
}

/// A part of an arena that is touched and pinned as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its first byte in the arena.
    pub start: usize,
    /// Its length.
    pub bytes: usize,
    /// Its first KV page in the arena.
    pub first_page: usize,
    /// Its KV pages, one after the other from `start` on.
    pub pages: usize,
}

/// The chunks of an arena that is yet to be mapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArenaPlan {
    page_bytes: usize,
    chunks: Vec<Chunk>,
}

impl ArenaPlan {
    /// Room for `pages` pages of `page_bytes` bytes, or for as many as `max_bytes` bytes hold.
    pub fn new(page_bytes: usize, pages: usize, chunk_bytes: usize, max_bytes: u64) -> ArenaPlan {
        let mut plan = ArenaPlan { page_bytes, chunks: Vec::new() };
        let whole_pages = page_bytes.next_multiple_of(HUGE_PAGE);
        let most = (chunk_bytes.min(MAX_CHUNK) / HUGE_PAGE * HUGE_PAGE).max(whole_pages);
        let mut size = HUGE_PAGE.max(whole_pages);
        while plan.pages() < pages {
            let left = max_bytes.saturating_sub(plan.bytes() as u64);
            let left = (left / SYSTEM_PAGE as u64 * SYSTEM_PAGE as u64).min(size as u64) as usize;
            let fit = (left / page_bytes).min(pages - plan.pages());
            if fit == 0 {
                break;
            }
            // Only the last chunk may end within a huge page.
            let whole = left == size && fit == size / page_bytes;
            let used = if whole { size } else { (fit * page_bytes).next_multiple_of(SYSTEM_PAGE) };
            plan.chunks.push(Chunk { start: plan.bytes(), bytes: used, first_page: plan.pages(), pages: fit });
            if !whole {
                break;
            }
            size = (2 * size).min(most);
        }
        plan
    }

    /// KV pages.
    pub fn pages(&self) -> usize {
        self.chunks.last().map_or(0, |c| c.first_page + c.pages)
    }

    /// Bytes that will be mapped.
    pub fn bytes(&self) -> usize {
        self.chunks.last().map_or(0, |c| c.start + c.bytes)
    }
}

/// How far a chunk is; the values of [`Arena::stages`].
const COLD: u8 = 0;
const PAGEABLE: u8 = 1;
const PINNED: u8 = 2;

/// An anonymous mapping, cut into chunks. Unmapped on drop.
pub struct Arena {
    mapping: Mapping,
    placement: Placement,
    plan: ArenaPlan,
    options: ArenaOptions,
    meter: Meter,
    /// The next chunk that nobody has claimed.
    next: AtomicUsize,
    /// Chunks that had to be pinned and could not: cold, to be claimed again.
    given_back: Mutex<Vec<usize>>,
    stages: Vec<AtomicU8>,
    abandoned: AtomicBool,
    /// Bytes of reserved huge pages that were refused when they were touched.
    replaced: AtomicUsize,
    not_pinned: OnceLock<String>,
}

impl Arena {
    /// Maps what was planned; no memory is behind it yet.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the meter or the system refuses.
    pub fn map(plan: ArenaPlan, options: &ArenaOptions, meter: &Meter, what: &str) -> Result<Arena> {
        let mapping = map_metered(plan.bytes(), options.huge_pages, meter, what)?;
        Ok(Arena {
            placement: bind(&mapping, options.node),
            mapping,
            stages: plan.chunks.iter().map(|_| AtomicU8::new(COLD)).collect(),
            plan,
            options: options.clone(),
            meter: meter.clone(),
            next: AtomicUsize::new(0),
            given_back: Mutex::default(),
            abandoned: AtomicBool::new(false),
            replaced: AtomicUsize::new(0),
            not_pinned: OnceLock::new(),
        })
    }

    /// The node that its memory is bound to.
    pub fn node(&self) -> Option<usize> {
        match self.placement {
            Placement::Node(node) => Some(node),
            Placement::Anywhere(_) => None,
        }
    }

    /// The chunks.
    pub fn chunks(&self) -> &[Chunk] {
        &self.plan.chunks
    }

    /// KV pages.
    pub fn pages(&self) -> usize {
        self.plan.pages()
    }

    /// The first byte of page `index`, aligned to 64 bytes, and to 4 KiB if the page size is a multiple of that. Valid
    /// for the length of a page while the arena lives; who may use it is the caller's to say.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn page(&self, index: usize) -> NonNull<u8> {
        let chunk = self.plan.chunks[self.plan.chunks.partition_point(|c| c.first_page + c.pages <= index)];
        let offset = chunk.start + (index - chunk.first_page) * self.plan.page_bytes;
        // SAFETY: the page lies in its chunk and the chunk in the mapping (invariants of the module).
        unsafe { self.mapping.base.add(offset) }
    }

    /// The next cold chunk, for the caller alone to prepare; `None` when there is none.
    pub fn claim(&self) -> Option<usize> {
        let next = |n: usize| (n < self.plan.chunks.len()).then_some(n + 1);
        let fresh = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok();
        fresh.or_else(|| self.given_back().pop())
    }

    fn given_back(&self) -> MutexGuard<'_, Vec<usize>> {
        self.given_back.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Touches and pins a chunk that the caller has claimed. Memory that cannot be pinned stays pageable, with one
    /// warning per process.
    ///
    /// # Errors
    /// [`Error::Device`] if it had to be pinned and could not: it is cold again.
    ///
    /// # Panics
    /// If the chunk was prepared before: its pages may be in use.
    pub fn prepare(&self, chunk: usize) -> Result<()> {
        assert_eq!(self.stages[chunk].load(Ordering::Relaxed), COLD, "a chunk is prepared once");
        let Chunk { start, bytes, .. } = self.plan.chunks[chunk];
        // SAFETY: the chunk lies in the mapping.
        let base = unsafe { self.mapping.base.add(start) };
        for offset in (0..bytes).step_by(TOUCH_STEP) {
            if self.abandoned.load(Ordering::Relaxed) {
                return Ok(());
            }
            let step = TOUCH_STEP.min(bytes - offset);
            // SAFETY: the step lies in the chunk, which nobody else uses before it is prepared.
            unsafe {
                if self.mapping.kind == MemoryKind::HugeTlb && populate(base.add(offset), step).is_err() {
                    self.replace(start + offset, step);
                }
                touch(base.add(offset), step, self.options.poison);
            }
        }
        let stage = match self.pin(base, bytes) {
            Ok(true) => PINNED,
            Ok(false) => PAGEABLE,
            Err(why) => {
                self.given_back().push(chunk);
                return Err(why);
            }
        };
        self.stages[chunk].store(stage, Ordering::Release);
        Ok(())
    }

    /// Puts ordinary memory in the place of reserved huge pages. They were there when they were mapped, but a control group
    /// of the process may have a limit of its own (`hugetlb.2MB.max`), and touching them would then end the process.
    ///
    /// # Safety
    /// Nobody uses the range, which begins at a multiple of 2 MiB.
    unsafe fn replace(&self, start: usize, bytes: usize) {
        // The arena's last chunk may end within a huge page, of which nobody uses the rest.
        let bytes = bytes.next_multiple_of(HUGE_PAGE);
        // SAFETY: the range lies in the mapping, and is the caller's.
        unsafe {
            let base = self.mapping.base.add(start);
            // If there is neither kind of memory, the system ends the process as where any memory that it has promised
            // is missing.
            if mmap_at(base.as_ptr(), bytes, libc::MAP_FIXED).is_err() {
                return;
            }
            advise(base, bytes, self.options.huge_pages);
            if let Placement::Node(node) = self.placement {
                // A preference, which held for the range before.
                let _ = mbind(base, bytes, node);
            }
        }
        self.replaced.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Prepares all that is cold on `threads` threads of their own. `ready` hears of each prepared chunk, on the thread
    /// that prepared it. Fewer threads than wanted, or none, only means that more is prepared on demand. So does a chunk that
    /// cannot be: `ready` hears of an error then, and the thread ends.
    pub fn prepare_in_background(
        self: &Arc<Self>,
        threads: usize,
        ready: impl Fn(Result<usize>) + Clone + Send + 'static,
    ) {
        for i in 0..threads.min(self.plan.chunks.len()) {
            let (arena, ready) = (self.clone(), ready.clone());
            let work = move || {
                while let Some(chunk) = arena.claim() {
                    let prepared = arena.prepare(chunk).map(|()| chunk);
                    let failed = prepared.is_err();
                    ready(prepared);
                    if failed {
                        return;
                    }
                }
            };
            if std::thread::Builder::new().name(format!("touch-{i}")).spawn(work).is_err() {
                return;
            }
        }
    }

    /// Nobody will use this arena any more: background threads stop within [`TOUCH_STEP`] bytes.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
        self.next.store(self.plan.chunks.len(), Ordering::Relaxed);
        self.given_back().clear();
    }

    /// Pins a range if there is a hook for it and the hook can; says why not once.
    ///
    /// # Errors
    /// [`Error::Device`] if it cannot and must.
    fn pin(&self, start: NonNull<u8>, bytes: usize) -> Result<bool> {
        static WARNED: AtomicBool = AtomicBool::new(false);
        let Some(pin) = &self.options.pin else { return Ok(false) };
        // Whoever waits for this chunk would wait for ever if a hook's panic went further.
        let pinned = catch_unwind(AssertUnwindSafe(|| pin.pin(start, bytes)));
        match pinned.unwrap_or_else(|_| Err("the pin hook panicked".into())) {
            Ok(()) => Ok(true),
            Err(why) if pin.is_required() => Err(Error::Device(why)),
            Err(why) => {
                if !WARNED.swap(true, Ordering::Relaxed) {
                    notice::warn(format_args!("KV pages in host memory stay pageable: {why}"));
                }
                let _first_reason_wins = self.not_pinned.set(why);
                Ok(false)
            }
        }
    }

    /// What it is and how far it is.
    pub fn stats(&self) -> ArenaStats {
        let bytes_at = |least: u8| {
            let stages = self.stages.iter().map(|s| s.load(Ordering::Acquire));
            self.chunks().iter().zip(stages).filter(|(_, s)| *s >= least).map(|(c, _)| c.bytes as u64).sum()
        };
        let pinned_bytes = bytes_at(PINNED); // first: they are prepared too
        ArenaStats {
            bytes: self.mapping.bytes as u64,
            pages: self.pages(),
            kind: self.mapping.kind,
            replaced_bytes: self.replaced.load(Ordering::Relaxed) as u64,
            placement: self.placement.clone(),
            prepared_bytes: bytes_at(PAGEABLE),
            pinned_bytes,
            not_pinned: self.not_pinned.get().cloned(),
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        for (chunk, stage) in self.plan.chunks.iter().zip(&mut self.stages) {
            if let (PINNED, Some(pin)) = (*stage.get_mut(), &self.options.pin) {
                // SAFETY: the chunk lies in the mapping.
                pin.unpin(unsafe { self.mapping.base.add(chunk.start) }, chunk.bytes);
            }
        }
        self.mapping.unmap();
        self.meter.give_back(self.mapping.bytes as u64);
    }
}

/// An arena in figures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaStats {
    /// Bytes mapped: with reserved huge pages whole ones.
    pub bytes: u64,
    /// KV pages.
    pub pages: usize,
    /// Which memory it got.
    pub kind: MemoryKind,
    /// Bytes that are ordinary memory although reserved huge pages were mapped, as those were refused later.
    pub replaced_bytes: u64,
    /// Where it lies.
    pub placement: Placement,
    /// Bytes that have been touched.
    pub prepared_bytes: u64,
    /// Bytes that are pinned.
    pub pinned_bytes: u64,
    /// Why prepared bytes are not pinned, if one was refused.
    pub not_pinned: Option<String>,
}

impl fmt::Display for ArenaStats {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        let ArenaStats { kind, placement, .. } = self;
        let (prepared, pinned) = (mib(self.prepared_bytes), mib(self.pinned_bytes));
        write!(f, "{:.1} MiB ({prepared:.1} touched, {pinned:.1} pinned), {kind}", mib(self.bytes))?;
        if self.replaced_bytes > 0 {
            write!(f, " (refused for {:.1} MiB)", mib(self.replaced_bytes))?;
        }
        write!(f, ", {placement}")
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::mapping::{can_populate, online_nodes, parse_list};
    use super::*;
    use std::sync::Mutex;

    const MIB: usize = 1 << 20;

    fn check_plan(plan: &ArenaPlan, chunk_bytes: usize) {
        let (mut start, mut page) = (0, 0);
        for (i, c) in plan.chunks.iter().enumerate() {
            assert_eq!((c.start, c.first_page), (start, page), "chunk {i} of {plan:?}");
            assert!(c.start.is_multiple_of(HUGE_PAGE) && c.bytes.is_multiple_of(SYSTEM_PAGE), "{plan:?}");
            assert!(c.pages > 0 && c.pages * plan.page_bytes <= c.bytes, "{plan:?}");
            assert!(c.bytes - c.pages * plan.page_bytes < plan.page_bytes.max(SYSTEM_PAGE), "{plan:?}");
            assert!(c.bytes <= chunk_bytes.max(HUGE_PAGE).max(plan.page_bytes.next_multiple_of(HUGE_PAGE)), "{plan:?}");
            (start, page) = (start + c.bytes, page + c.pages);
        }
    }

    #[test]
    fn plans_keep_the_invariants() {
        for page_bytes in [64, 192, 4096, 12_288, 98_304, 262_144, 3 * MIB, 2 * MIB] {
            for pages in [1, 2, 7, 1000, 4096] {
                for chunk_bytes in [0, 2 * MIB, 6 * MIB, 256 * MIB] {
                    let plan = ArenaPlan::new(page_bytes, pages, chunk_bytes, u64::MAX);
                    assert_eq!(plan.pages(), pages);
                    check_plan(&plan, chunk_bytes);
                    let exact = ArenaPlan::new(page_bytes, pages, chunk_bytes, plan.bytes() as u64);
                    assert_eq!(exact, plan, "a plan fits in its own bytes");
                    let less = ArenaPlan::new(page_bytes, pages, chunk_bytes, plan.bytes() as u64 - 1);
                    check_plan(&less, chunk_bytes);
                    assert!(less.bytes() < plan.bytes());
                    // What is left of a whole last chunk behind its last page need not be had.
                    let tight = plan.chunks.last().is_some_and(|c| c.bytes - c.pages * page_bytes < SYSTEM_PAGE);
                    assert!(less.pages() < pages || !tight, "{plan:?}");
                }
            }
        }
        assert_eq!(ArenaPlan::new(4096, 10, MIB, 4095).pages(), 0);
    }

    #[test]
    fn large_arenas_are_registered_in_few_chunks_of_at_most_64_gib() {
        let plan = ArenaPlan::new(262_144, (2 << 40) / 262_144, usize::MAX, u64::MAX);
        assert!(plan.chunks.iter().all(|c| c.bytes <= 64 << 30));
        assert_eq!((plan.bytes(), plan.chunks[0].bytes), (2 << 40, 2 * MIB));
        assert!(plan.chunks.len() < 64, "{}", plan.chunks.len());
    }

    /// Notes what is pinned, and refuses what is larger than `most`.
    struct Noted {
        most: usize,
        held: Mutex<Vec<(usize, usize)>>,
    }

    impl Pin for Noted {
        fn pin(&self, start: NonNull<u8>, bytes: usize) -> Result<(), String> {
            if bytes > self.most {
                return Err("expected in this test".into());
            }
            self.held.lock().unwrap().push((start.addr().get(), bytes));
            Ok(())
        }
        fn unpin(&self, start: NonNull<u8>, bytes: usize) {
            let mut held = self.held.lock().unwrap();
            let i = held.iter().position(|&h| h == (start.addr().get(), bytes)).expect("unpinned as it was pinned");
            held.swap_remove(i);
        }
    }

    #[test]
    fn chunks_are_pinned_whole_and_unpinned_before_the_end() {
        let pin = Arc::new(Noted { most: 4 * MIB, held: Mutex::default() });
        let options = ArenaOptions { pin: Some(pin.clone()), ..Default::default() };
        let meter = Meter::new("host", None);
        let plan = ArenaPlan::new(4096, 14 * MIB / 4096, 256 * MIB, u64::MAX);
        let arena = Arena::map(plan, &options, &meter, "a test").unwrap();
        assert_eq!(meter.used(), 14 * MIB as u64);
        while let Some(chunk) = arena.claim() {
            arena.prepare(chunk).unwrap();
        }
        let stats = arena.stats();
        assert_eq!((stats.prepared_bytes, stats.pinned_bytes), (14 * MIB as u64, 6 * MIB as u64), "2 + 4 of 2 + 4 + 8");
        assert_eq!(stats.not_pinned.as_deref(), Some("expected in this test"));
        assert_eq!(pin.held.lock().unwrap().len(), 2);
        drop(arena);
        assert_eq!((pin.held.lock().unwrap().len(), meter.used()), (0, 0));
    }

    #[test]
    fn kinds_of_memory_can_be_written_and_begin_at_a_huge_page() {
        for huge_pages in [HugePages::Auto, HugePages::Transparent, HugePages::Never] {
            for bytes in [4096, 2 * MIB, 5 * MIB] {
                let meter = Meter::new("host", None);
                let mut mapping = map_metered(bytes, huge_pages, &meter, "a test").unwrap();
                assert_eq!(meter.used(), mapping.bytes as u64);
                assert!(mapping.base.addr().get().is_multiple_of(HUGE_PAGE));
                assert!(huge_pages != HugePages::Never || mapping.kind == MemoryKind::Plain);
                // SAFETY: just mapped, this test's alone.
                unsafe {
                    touch(mapping.base, bytes, false);
                    assert_eq!(*mapping.base.add(bytes - 1).as_ref(), 0);
                    touch(mapping.base, bytes, true);
                    assert_eq!(*mapping.base.add(bytes - 1).as_ref(), POISON);
                }
                mapping.unmap();
            }
        }
    }

    #[test]
    fn nodes_are_bound_or_a_reason_is_given() {
        assert_eq!(parse_list("0-3,8"), [0, 1, 2, 3, 8]);
        assert_eq!(parse_list(""), [0usize; 0]);
        let mut mapping = Mapping::ordinary(4096, HugePages::Never).unwrap();
        let mbind = |mapping: &Mapping, node| mbind(mapping.base, mapping.bytes, node);
        assert_eq!(bind(&mapping, None), Placement::Anywhere("no node was asked for".into()));
        if let Some(&node) = online_nodes().first() {
            let allowed = mbind(&mapping, node);
            let no_syscall = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM));
            assert!(allowed.as_ref().err().is_none_or(no_syscall), "{allowed:?}");
            // None has memory: one that this machine has not, and one beyond the kernel's numbers.
            assert!(mbind(&mapping, 900).is_err() && mbind(&mapping, 5000).is_err());
        }
        mapping.unmap();
    }

    #[test]
    fn a_mapping_that_the_system_refuses_takes_nothing_from_the_budget() {
        let meter = Meter::new("host", Some(u64::MAX - 1));
        // More than there are addresses, so that no setting of the system's allows it.
        let plan = ArenaPlan::new(1 << 40, 1 << 9, 64 << 30, u64::MAX);
        let refused = Arena::map(plan, &ArenaOptions::default(), &meter, "512 TiB").err().unwrap();
        let text = refused.to_string();
        assert!(text.contains("512 TiB") && text.contains("ulimit -v") && !text.contains("--host-kv-budget"), "{text}");
        assert_eq!(meter.used(), 0);
    }

    /// Reserved huge pages that a control group refuses when they are touched; memory that must not be written stands for
    /// them here, as few machines have any.
    #[test]
    fn refused_huge_pages_become_ordinary_ones() {
        let meter = Meter::new("host", None);
        let plan = ArenaPlan::new(4096, 6 * MIB / 4096, 256 * MIB, u64::MAX);
        let options = ArenaOptions { huge_pages: HugePages::Transparent, ..Default::default() };
        let mut arena = Arena::map(plan, &options, &meter, "a test").unwrap();
        if !can_populate() {
            return; // then none are mapped
        }
        arena.mapping.kind = MemoryKind::HugeTlb;
        arena.prepare(arena.claim().unwrap()).unwrap();
        assert_eq!(arena.stats().replaced_bytes, 0);
        // SAFETY: the rest of this test's mapping, which nobody has written.
        let refused = unsafe { libc::mprotect(arena.page(512).as_ptr().cast(), 4 * MIB, libc::PROT_READ) };
        assert_eq!(refused, 0);
        arena.prepare(arena.claim().unwrap()).unwrap();
        let stats = arena.stats();
        assert_eq!((stats.prepared_bytes, stats.replaced_bytes), (6 * MIB as u64, 4 * MIB as u64));
        assert!(stats.to_string().contains("refused for 4.0 MiB"), "{stats}");
        for page in 0..arena.pages() {
            // SAFETY: this test's alone.
            unsafe { arena.page(page).write_bytes(1, 4096) };
        }
    }
}
