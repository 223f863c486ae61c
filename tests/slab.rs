//! The slab of KV pages: growth, budget, reservations, leases shared and dropped on many threads, against a model.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use specache::Error;
use specache::device::Meter;
use specache::device::arena::{ArenaOptions, HugePages, MemoryKind};
use specache::device::pin::Pin;
use specache::kv::slab::{PageRef, Slab, SlabOptions};

const MIB: usize = 1 << 20;

fn host(budget: Option<usize>) -> Meter {
    Meter::new("host", budget.map(|b| b as u64))
}

/// A slab whose budget is `pages` pages of 4 KiB, poisoned.
fn small(pages: usize) -> (Slab, Meter) {
    let meter = host(Some(pages * 4096));
    let arena = ArenaOptions { poison: true, ..Default::default() };
    let slab = Slab::new(SlabOptions { arena, ..SlabOptions::new(4096, &meter) }).unwrap();
    (slab, meter)
}

fn pages(slab: &Slab, n: usize) -> Vec<PageRef> {
    let mut pages = vec![];
    slab.alloc_batch(n, &mut pages).unwrap();
    pages
}

fn ids(pages: &[PageRef]) -> HashSet<usize> {
    pages.iter().map(|p| p.id().index()).collect()
}

#[test]
fn pages_are_distinct_aligned_and_counted() {
    for (page_bytes, align) in [(1, 64), (100, 64), (4096, 4096), (98_304, 4096), (262_144, 4096), (3 * MIB, 4096)] {
        let slab = Slab::new(SlabOptions { arena_bytes: MIB, ..SlabOptions::new(page_bytes, &host(None)) }).unwrap();
        let mut pages = pages(&slab, 33);
        for (i, page) in pages.iter_mut().enumerate() {
            assert_eq!(page.bytes().len(), page_bytes);
            assert!(page.bytes().as_ptr().addr().is_multiple_of(align), "{page_bytes}");
            page.get_mut().unwrap().fill(i as u8);
        }
        for (i, page) in pages.iter().enumerate() {
            assert!(page.bytes().iter().all(|&b| b == i as u8), "page {i} of {page_bytes} bytes is its own");
        }
        assert_eq!(ids(&pages).len(), 33);
        let stats = slab.stats();
        assert_eq!((stats.leased, stats.free, stats.high_water), (33, stats.capacity - 33, 33));
        slab.check().unwrap();
        slab.free_batch(pages.drain(..));
        assert_eq!((slab.stats().leased, slab.stats().high_water), (0, 33));
        slab.check().unwrap();
    }
}

#[test]
fn page_sizes_that_cannot_be_are_refused() {
    for bytes in [0, (1 << 30) + 1] {
        assert!(matches!(Slab::new(SlabOptions::new(bytes, &host(None))), Err(Error::Usage(_))), "{bytes}");
    }
}

#[test]
fn the_page_that_was_freed_last_is_used_first() {
    let (slab, _) = small(8);
    let mut pages = pages(&slab, 5);
    let last = pages.remove(2);
    let id = last.id();
    slab.free_batch(pages.drain(..));
    drop(last);
    assert_eq!(slab.alloc().unwrap().id(), id);
}

#[test]
fn only_a_page_with_one_reference_is_written() {
    let (slab, _) = small(4);
    let mut page = slab.alloc().unwrap();
    page.get_mut().unwrap()[0] = 7;
    let copy = page.clone();
    assert!(page.get_mut().is_none() && !page.is_unique() && !copy.is_unique());
    let mut page = page.try_into_unique().expect_err("shared");
    assert_eq!((copy.bytes()[0], copy.id()), (7, page.id()));
    drop(copy);
    assert!(page.is_unique() && page.get_mut().is_some());
    let mut unique = page.try_into_unique().expect("alone again");
    unique.bytes_mut()[1] = 8;
    unique.as_mut_slice::<u16>()[1] = 9;
    let page = unique.share();
    assert_eq!((&page.bytes()[..2], page.as_slice::<u16>()[1]), (&[7, 8][..], 9));
    slab.check().unwrap();
}

#[test]
fn a_page_in_flight_is_not_used_again() {
    let (slab, _) = small(4);
    let mut held = pages(&slab, 4);
    held[1].get_mut().unwrap().fill(42);
    let in_flight = held[1].clone();
    slab.free_batch(held.drain(..));
    assert_eq!(slab.stats().leased, 1);
    let others = pages(&slab, 3);
    assert!(!ids(&others).contains(&in_flight.id().index()));
    assert!(slab.alloc().is_err(), "the fourth page is still read");
    assert!(in_flight.bytes().iter().all(|&b| b == 42));
    drop(in_flight);
    assert!(slab.alloc().is_ok());
}

#[test]
fn the_budget_is_hard_and_a_refusal_changes_nothing() {
    let (slab, meter) = small(10);
    let nine = pages(&slab, 9);
    assert_eq!(meter.used(), 40_960);
    let before = slab.stats();
    let mut out = vec![];
    let refused = slab.alloc_batch(2, &mut out).unwrap_err();
    let Error::OutOfMemory { memory, what, needed, available, fix } = refused else { panic!("{refused}") };
    assert_eq!((memory, what.as_str(), needed, available), ("host", "KV pages", 8192, 4096));
    assert!(fix.contains("--host-kv-budget"), "{fix}");
    assert_eq!((out.len(), slab.stats()), (0, before));
    assert!(slab.reserve(usize::MAX).is_err() && slab.alloc_batch(1 << 40, &mut out).is_err());
    let ten = slab.alloc().unwrap();
    slab.check().unwrap();
    drop((nine, ten));
    assert_eq!(meter.used(), 40_960, "arenas stay while the slab does");
    drop(slab);
    assert_eq!(meter.used(), 0);
}

#[test]
fn a_budget_below_one_page_is_refused() {
    let slab = Slab::new(SlabOptions::new(8192, &host(Some(8191)))).unwrap();
    let Err(Error::OutOfMemory { needed: 8192, available: 0, .. }) = slab.alloc() else { panic!("refused") };
    assert!(slab.reserve(0).is_ok(), "nothing is always there");
}

#[test]
fn slabs_share_a_budget() {
    let meter = host(Some(8 * MIB));
    let slab = |bytes| Slab::new(SlabOptions { arena_bytes: 2 * MIB, ..SlabOptions::new(bytes, &meter) }).unwrap();
    let (a, b) = (slab(4096), slab(65_536));
    let _a = [pages(&a, 300), pages(&a, 300)]; // 2 arenas of 512 pages
    assert_eq!(meter.used(), 4 * MIB as u64);
    assert!(b.reserve(4 * MIB / 65_536 + 1).is_err());
    let _b = pages(&b, 4 * MIB / 65_536);
    assert_eq!(meter.used(), 8 * MIB as u64);
    assert!(a.reserve(1024 - 600).is_ok() && a.reserve(1024 - 600 + 1).is_err());
}

#[test]
fn a_reservation_is_admission() {
    let (slab, _) = small(10);
    let mut first = slab.reserve(6).unwrap();
    let Err(Error::OutOfMemory { needed, available, .. }) = slab.reserve(5) else { panic!("6 + 5 > 10") };
    assert_eq!((needed, available), (5 * 4096, 4 * 4096));
    let others = pages(&slab, 4);
    assert!(slab.alloc().is_err(), "what is promised is not given to others");
    let mut drawn = vec![first.alloc()];
    first.alloc_batch(3, &mut drawn);
    assert_eq!((first.left(), slab.stats().reserved, slab.stats().leased), (2, 2, 8));
    assert!(first.extend(1).is_err());
    assert_eq!((first.left(), slab.stats().reserved), (2, 2), "a refusal leaves what was promised");
    drop(others);
    first.extend(4).unwrap();
    assert!(slab.alloc().is_err());
    slab.check().unwrap();
    drop(first);
    assert_eq!((slab.stats().reserved, slab.stats().free), (0, 6), "what was not drawn is given up");
    assert_eq!(pages(&slab, 6).len(), 6);
}

#[test]
#[should_panic(expected = "3 pages are drawn from a reservation of 2")]
fn more_than_was_promised_is_a_fault_of_the_caller() {
    small(10).0.reserve(2).unwrap().alloc_batch(3, &mut vec![]);
}

#[test]
fn it_grows_arena_by_arena_and_pages_stay_where_they_are() {
    let meter = host(Some(9 * MIB));
    let slab = Slab::new(SlabOptions { arena_bytes: 2 * MIB, ..SlabOptions::new(65_536, &meter) }).unwrap();
    let mut held: Vec<(PageRef, *const u8)> = vec![];
    for i in 0..144 {
        let mut page = slab.alloc().unwrap();
        page.get_mut().unwrap().fill(i as u8);
        held.push((page.clone(), page.bytes().as_ptr()));
    }
    let stats = slab.stats();
    assert_eq!((stats.arenas.len(), stats.capacity, stats.bytes), (5, 144, 9 * MIB as u64), "4 of 2 MiB, one of 1");
    assert!(slab.alloc().is_err());
    for (i, (page, at)) in held.iter().enumerate() {
        assert_eq!(page.bytes().as_ptr(), *at);
        assert!(page.bytes().iter().all(|&b| b == i as u8));
    }
    slab.check().unwrap();
    let large = Slab::new(SlabOptions { arena_bytes: 2 * MIB, ..SlabOptions::new(65_536, &host(None)) }).unwrap();
    let _reservation = large.reserve(1000).unwrap();
    assert_eq!(large.stats().arenas.len(), 1, "a reservation that needs more maps one arena for it");
}

#[test]
fn poison_is_read_before_the_first_write_and_after_the_last() {
    let (slab, _) = small(2);
    for _ in 0..3 {
        let mut page = slab.alloc().unwrap();
        assert!(page.as_slice::<f32>().iter().all(|x| x.is_nan()));
        page.get_mut().unwrap().fill(0);
    }
    let mut both = pages(&slab, 2);
    both.iter_mut().for_each(|p| p.get_mut().unwrap().fill(1));
    slab.free_batch(both.drain(..));
    assert!(pages(&slab, 2).iter().all(|p| p.as_slice::<u32>().iter().all(|&x| x == u32::MAX)));
}

#[test]
fn a_slab_outlives_its_handle_while_a_page_is_leased() {
    let (slab, meter) = small(4);
    let mut page = slab.alloc().unwrap();
    let shared = page.clone();
    drop(slab);
    assert!(page.get_mut().is_none());
    drop(shared);
    page.get_mut().unwrap().fill(3);
    assert!(page.bytes().iter().all(|&b| b == 3) && meter.used() > 0);
    std::thread::spawn(move || drop(page)).join().unwrap();
    assert_eq!(meter.used(), 0, "the last page takes the arenas with it");
}

#[test]
fn drop_order_does_not_matter() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let (slab, meter) = small(8);
        let reservation = slab.reserve(3).unwrap();
        let pages = pages(&slab, 4);
        let mut held: [Option<Box<dyn Send>>; 3] =
            [Some(Box::new(slab)), Some(Box::new(reservation)), Some(Box::new(pages))];
        for i in order {
            assert!(meter.used() > 0);
            drop(held[i].take());
        }
        assert_eq!(meter.used(), 0, "{order:?}");
    }
}

#[test]
fn pages_of_two_slabs_may_be_freed_together() {
    let ((a, _), (b, _)) = (small(4), small(4));
    let mut mixed = pages(&a, 2);
    b.alloc_batch(2, &mut mixed).unwrap();
    a.free_batch(mixed.drain(..));
    assert_eq!((a.stats().leased, b.stats().leased), (0, 0));
    a.check().and(b.check()).unwrap();
}

/// Counts pins, and is slow, so that allocation overtakes it.
#[derive(Default)]
struct SlowPin {
    pinned: AtomicUsize,
    threads: Mutex<HashSet<String>>,
}

impl Pin for SlowPin {
    fn pin(&self, _: std::ptr::NonNull<u8>, bytes: usize) -> Result<(), String> {
        std::thread::sleep(Duration::from_millis(20));
        self.pinned.fetch_add(bytes, Ordering::Relaxed);
        self.threads.lock().unwrap().insert(std::thread::current().name().unwrap_or("").to_string());
        Ok(())
    }
    fn unpin(&self, _: std::ptr::NonNull<u8>, bytes: usize) {
        self.pinned.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[test]
fn pages_are_handed_out_while_the_arena_is_still_being_prepared() {
    let pin = Arc::new(SlowPin::default());
    let arena = ArenaOptions { chunk_bytes: 4 * MIB, pin: Some(pin.clone()), ..Default::default() };
    let meter = host(Some(64 * MIB));
    let options = SlabOptions { arena, touch_threads: 2, ..SlabOptions::new(65_536, &meter) };
    let slab = Slab::new(options).unwrap();
    let mut held = pages(&slab, 1);
    let early = slab.stats().arenas[0].prepared_bytes;
    assert!(early < 64 * MIB as u64, "the first page does not wait for the whole arena");
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| pages(&slab, 255))).collect();
        all.into_iter().for_each(|t| held.extend(t.join().unwrap()));
    });
    assert_eq!(ids(&held).len(), 1021);
    held.extend(pages(&slab, 3));
    slab.check().unwrap();
    let stats = slab.stats();
    assert_eq!(
        (stats.arenas[0].pinned_bytes, stats.free),
        (64 * MIB as u64, 0),
        "all of it was needed: {}",
        stats.arenas[0]
    );
    assert!(pin.threads.lock().unwrap().iter().any(|t| t.starts_with("touch-")));
    drop(held);
    drop(slab);
    while meter.used() > 0 {
        std::thread::yield_now(); // a background thread may hold the arena a moment longer
    }
    assert_eq!(pin.pinned.load(Ordering::Relaxed), 0);
}

#[test]
fn a_slab_dropped_while_it_is_prepared_stops() {
    let meter = host(None);
    let options = SlabOptions { touch_threads: 2, arena_bytes: 1 << 30, ..SlabOptions::new(262_144, &meter) };
    let slab = Slab::new(options).unwrap();
    drop(slab.reserve(1).unwrap());
    drop(slab);
    while meter.used() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn memory_is_what_was_asked_for_or_says_so() {
    for huge_pages in [HugePages::Auto, HugePages::Transparent, HugePages::Never] {
        let arena = ArenaOptions { huge_pages, node: Some(0), ..Default::default() };
        let slab =
            Slab::new(SlabOptions { arena, arena_bytes: 4 * MIB, ..SlabOptions::new(4096, &host(None)) }).unwrap();
        let _page = slab.alloc().unwrap();
        let arena = &slab.stats().arenas[0];
        assert!(huge_pages != HugePages::Never || arena.kind == MemoryKind::Plain);
        let text = arena.to_string();
        assert!(text.starts_with("4.0 MiB (2.0 touched, 0.0 pinned), ") && text.contains("NUMA"), "{text}");
    }
}

/// Node 900 has no memory, here or anywhere: the arenas that were meant for it lie elsewhere and say so, and their
/// pages are as good as others.
#[test]
fn arenas_for_a_node_without_memory_lie_elsewhere() {
    let nodes = vec![0, 900];
    let slab = Slab::new(SlabOptions { nodes, arena_bytes: 2 * MIB, ..SlabOptions::new(65_536, &host(None)) }).unwrap();
    let mut pages: Vec<PageRef> = (0..128).map(|_| slab.alloc().unwrap()).collect();
    for (i, page) in pages.iter_mut().enumerate() {
        page.get_mut().unwrap().fill(i as u8);
    }
    assert!(pages.iter().enumerate().all(|(i, page)| page.bytes().iter().all(|&b| b == i as u8)));
    let arenas = slab.stats().arenas;
    assert_eq!(arenas.len(), 4, "in turns");
    for arena in arenas.iter().skip(1).step_by(2) {
        let placement = arena.placement.to_string();
        let why = ["the kernel has no NUMA", "the machine has one NUMA node", "mbind to node 900"];
        assert!(why.iter().any(|why| placement.starts_with(&format!("no NUMA binding: {why}"))), "{placement}");
    }
    assert!(pages.iter().all(|page| page.node().is_none_or(|node| node.0 == 0)));
}

/// Operations of the model test; numbers choose among what is held.
#[derive(Clone, Debug)]
enum Op {
    Alloc(usize),
    Share(usize),
    Drop(usize),
    DropMany(usize),
    Write(usize, u8),
    Reserve(usize),
    Extend(usize, usize),
    Draw(usize, usize),
    Unreserve(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let any = any::<usize>;
    prop_oneof![
        4 => (0usize..9).prop_map(Op::Alloc),
        3 => any().prop_map(Op::Share),
        4 => any().prop_map(Op::Drop),
        1 => any().prop_map(Op::DropMany),
        3 => (any(), 0u8..255).prop_map(|(i, b)| Op::Write(i, b)),
        2 => (0usize..20).prop_map(Op::Reserve),
        1 => (any(), 0usize..9).prop_map(|(i, n)| Op::Extend(i, n)),
        3 => (any(), 0usize..9).prop_map(|(i, n)| Op::Draw(i, n)),
        1 => any().prop_map(Op::Unreserve),
    ]
}

/// A slab, and what it must be like: a map from page to references and content, and a sum of promises.
struct Model {
    slab: Slab,
    held: Vec<PageRef>,
    reservations: Vec<specache::kv::slab::Reservation>,
    refs: HashMap<usize, (usize, u8)>,
    promised: usize,
}

const MODEL_PAGES: usize = 48;

impl Model {
    fn new() -> Model {
        let meter = host(Some(MODEL_PAGES * 4096));
        let arena = ArenaOptions { poison: true, huge_pages: HugePages::Never, ..Default::default() };
        let slab = Slab::new(SlabOptions { arena, arena_bytes: 16 * 4096, ..SlabOptions::new(4096, &meter) }).unwrap();
        Model { slab, held: vec![], reservations: vec![], refs: HashMap::new(), promised: 0 }
    }

    fn room(&self) -> usize {
        MODEL_PAGES - self.refs.len() - self.promised
    }

    fn leased(&mut self, from: usize) {
        for page in &self.held[from..] {
            assert!(self.refs.insert(page.id().index(), (1, 0xFF)).is_none(), "{page:?} was leased already");
        }
    }

    fn dropped(&mut self, id: usize) {
        let entry = self.refs.get_mut(&id).unwrap();
        entry.0 -= 1;
        if entry.0 == 0 {
            self.refs.remove(&id);
        }
    }

    fn apply(&mut self, op: Op) {
        let (n_held, n_reservations) = (self.held.len(), self.reservations.len());
        match op {
            Op::Alloc(n) => {
                let fits = n <= self.room();
                assert_eq!(self.slab.alloc_batch(n, &mut self.held).is_ok(), fits, "{n} of {}", self.room());
                self.leased(n_held);
            }
            Op::Share(i) if n_held > 0 => {
                let page = self.held[i % n_held].clone();
                self.refs.get_mut(&page.id().index()).unwrap().0 += 1;
                self.held.push(page);
            }
            Op::Drop(i) if n_held > 0 => {
                let page = self.held.swap_remove(i % n_held);
                self.dropped(page.id().index());
            }
            Op::DropMany(i) if n_held > 0 => {
                let from = i % n_held;
                self.held[from..]
                    .iter()
                    .map(|p| p.id().index())
                    .collect::<Vec<_>>()
                    .into_iter()
                    .for_each(|p| self.dropped(p));
                self.slab.free_batch(self.held.drain(from..));
            }
            Op::Write(i, byte) if n_held > 0 => {
                let page = &mut self.held[i % n_held];
                let (refs, content) = self.refs.get_mut(&page.id().index()).unwrap();
                assert_eq!(page.get_mut().map(|b| b.fill(byte)).is_some(), *refs == 1);
                *content = if *refs == 1 { byte } else { *content };
            }
            Op::Reserve(n) => {
                let fits = n <= self.room();
                let reservation = self.slab.reserve(n);
                assert_eq!(reservation.is_ok(), fits);
                self.promised += if fits { n } else { 0 };
                self.reservations.extend(reservation);
            }
            Op::Extend(i, n) if n_reservations > 0 => {
                let fits = n <= self.room();
                assert_eq!(self.reservations[i % n_reservations].extend(n).is_ok(), fits);
                self.promised += if fits { n } else { 0 };
            }
            Op::Draw(i, n) if n_reservations > 0 => {
                let reservation = &mut self.reservations[i % n_reservations];
                let n = n.min(reservation.left());
                reservation.alloc_batch(n, &mut self.held);
                self.promised -= n;
                self.leased(n_held);
            }
            Op::Unreserve(i) if n_reservations > 0 => {
                self.promised -= self.reservations.swap_remove(i % n_reservations).left();
            }
            _ => {}
        }
        self.compare();
    }

    fn compare(&self) {
        self.slab.check().unwrap();
        let stats = self.slab.stats();
        assert_eq!((stats.leased, stats.reserved), (self.refs.len(), self.promised));
        for page in &self.held {
            let (refs, content) = self.refs[&page.id().index()];
            assert_eq!(page.is_unique(), refs == 1);
            assert!(page.bytes().iter().all(|&b| b == content), "{page:?} holds what was written to it");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn it_does_what_a_set_of_pages_would(ops in prop::collection::vec(op(), 1..150)) {
        let mut model = Model::new();
        ops.into_iter().for_each(|op| model.apply(op));
    }
}

/// What a thread of the random run does, one operation after the other; what it holds it may pass on to any thread.
struct Worker {
    slab: Slab,
    rng: Pcg64Mcg,
    held: Vec<PageRef>,
    inbox: Receiver<PageRef>,
    peers: Vec<Sender<PageRef>>,
    /// Per page: the stamp in its bytes while it is leased, so that a page with two owners shows.
    stamps: Arc<Vec<AtomicU64>>,
}

impl Worker {
    fn run(mut self, operations: usize) {
        let mut fresh = vec![];
        for _ in 0..operations {
            match self.rng.random_range(0..16) {
                0..=3 => fresh.extend(self.slab.alloc().ok()),
                4 => drop(self.slab.alloc_batch(self.rng.random_range(1..16), &mut fresh)),
                5 => self.reserve(&mut fresh),
                6 | 7 => self.share(),
                8 | 9 => self.send(),
                10 => self.held.extend(self.inbox.try_iter()),
                11 => self.free_many(),
                _ => drop(self.pick()),
            }
            self.stamp(&mut fresh);
        }
    }

    /// A held page, taken out, with its content checked.
    fn pick(&mut self) -> Option<PageRef> {
        if self.held.is_empty() {
            return None;
        }
        let page = self.held.swap_remove(self.rng.random_range(0..self.held.len()));
        let stamp = self.stamps[page.id().index()].load(Ordering::Relaxed);
        assert_eq!(page.as_slice::<u64>(), [stamp; 8], "{page:?} has one content while it is leased");
        Some(page)
    }

    fn stamp(&mut self, fresh: &mut Vec<PageRef>) {
        for mut page in fresh.drain(..) {
            let stamp = self.rng.random::<u64>();
            let bytes = page.get_mut().expect("a page has one reference at first");
            bytemuck::cast_slice_mut::<_, u64>(bytes).fill(stamp);
            self.stamps[page.id().index()].store(stamp, Ordering::Relaxed);
            self.held.push(page);
        }
    }

    fn reserve(&mut self, fresh: &mut Vec<PageRef>) {
        let Ok(mut reservation) = self.slab.reserve(self.rng.random_range(0..16)) else { return };
        reservation.alloc_batch(reservation.left() / 2, fresh);
        let _may_be_refused = reservation.extend(3);
        for _ in 0..reservation.left() / 2 {
            fresh.push(reservation.alloc());
        }
    }

    fn share(&mut self) {
        if let Some(page) = self.pick() {
            self.held.extend([page.clone(), page]);
        }
    }

    fn send(&mut self) {
        let to = self.rng.random_range(0..self.peers.len());
        if let Some(page) = self.pick() {
            let _ended_early = self.peers[to].send(page);
        }
    }

    fn free_many(&mut self) {
        let keep = self.held.len() - self.held.len().min(24);
        self.slab.free_batch(self.held.drain(keep..));
    }
}

/// 10 million operations on 8 threads. Debug builds check all equations after each, sanitizers slow each down.
#[test]
fn random_operations_on_many_threads_end_balanced() {
    const THREADS: usize = 8;
    let operations = std::env::var("SLAB_TEST_OPERATIONS").map_or(10_000_000, |n| n.parse().unwrap());
    let operations = if cfg!(debug_assertions) { operations / 200 } else { operations };
    let meter = host(Some(1024 * 64));
    let arena = ArenaOptions { poison: true, ..Default::default() };
    let slab = Slab::new(SlabOptions { arena, arena_bytes: 16 << 10, ..SlabOptions::new(64, &meter) }).unwrap();
    let stamps: Arc<Vec<_>> = Arc::new((0..1024).map(|_| AtomicU64::new(0)).collect());
    let (peers, inboxes): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| channel()).unzip();
    let workers = inboxes.into_iter().enumerate().map(|(i, inbox)| Worker {
        slab: slab.clone(),
        rng: Pcg64Mcg::seed_from_u64(i as u64),
        held: vec![],
        inbox,
        peers: peers.clone(),
        stamps: stamps.clone(),
    });
    let threads: Vec<_> = workers.map(|w| std::thread::spawn(move || w.run(operations / THREADS))).collect();
    drop(peers);
    while !threads.iter().all(|t| t.is_finished()) {
        slab.check().unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    threads.into_iter().for_each(|t| t.join().unwrap());
    slab.check().unwrap();
    let stats = slab.stats();
    assert_eq!((stats.leased, stats.reserved, stats.free), (0, 0, stats.capacity));
    let enough = operations < 1_000_000 || (stats.high_water > 50 && stats.arenas.len() > 1);
    assert!(enough, "a run that fills nothing shows nothing: {stats:?}");
    drop(slab);
    assert_eq!(meter.used(), 0);
}
