//! What pages of the slab cost, and what the start of a large arena costs.
//!
//! ```text
//! cargo bench --bench slab            # 4 GiB; `-- 1` for 1 GiB
//! ```
//!
//! Prints Markdown tables. Takes about 40 s on 2 cores. Each figure is the best of several repetitions, as
//! whatever else runs on the machine only adds.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use specache::device::Meter;
use specache::device::arena::{Arena, ArenaOptions, ArenaPlan, HugePages};
use specache::device::pin::Mlock;
use specache::kv::slab::{Slab, SlabOptions};

/// 64 tokens, 8 KV heads, D = 128 at 16 bits.
const PAGE_BYTES: usize = 262_144;
/// A page of each layer of an 8B model.
const LAYER_BATCH: usize = 32;
const GIB: usize = 1 << 30;

fn host() -> Meter {
    Meter::new("host", None)
}

/// Best nanoseconds of `repetitions` runs of `rounds` rounds on each of `threads` threads, per page and thread.
fn per_page_ns(threads: usize, repetitions: usize, rounds: usize, round: impl Fn(&mut State) + Sync) -> f64 {
    let run = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut state = State::default();
                    (0..rounds).for_each(|_| round(&mut state));
                });
            }
        });
        start.elapsed()
    };
    let best = (0..repetitions).map(|_| run()).min().expect("at least one");
    best.as_nanos() as f64 / (threads * rounds * LAYER_BATCH) as f64
}

/// What a thread keeps between rounds.
#[derive(Default)]
struct State {
    pages: Vec<specache::kv::slab::PageRef>,
    shared: Vec<specache::kv::slab::PageRef>,
    vecs: Vec<Vec<u8>>,
}

/// Writes one byte per 4 KiB, so that memory must be behind the page.
fn write(bytes: &mut [u8]) {
    bytes.iter_mut().step_by(4096).for_each(|b| *b = 1);
}

fn leases() {
    let slab = Slab::new(SlabOptions { arena_bytes: GIB / 4, ..SlabOptions::new(PAGE_BYTES, &host()) }).unwrap();
    let mut warm = vec![];
    slab.alloc_batch(8 * LAYER_BATCH, &mut warm).unwrap();
    warm.iter_mut().for_each(|p| write(p.get_mut().unwrap()));
    slab.free_batch(warm.drain(..));

    let batch = |s: &mut State| {
        slab.alloc_batch(LAYER_BATCH, &mut s.pages).unwrap();
        black_box(&s.pages);
        slab.free_batch(s.pages.drain(..));
    };
    let single = |s: &mut State| {
        (0..LAYER_BATCH).for_each(|_| s.pages.push(slab.alloc().unwrap()));
        black_box(&s.pages);
        s.pages.clear();
    };
    let share = |s: &mut State| {
        if s.pages.is_empty() {
            slab.alloc_batch(LAYER_BATCH, &mut s.pages).unwrap();
        }
        s.shared.extend(s.pages.iter().cloned());
        black_box(&s.shared);
        s.shared.clear();
    };
    let batch_write = |s: &mut State| {
        slab.alloc_batch(LAYER_BATCH, &mut s.pages).unwrap();
        s.pages.iter_mut().for_each(|p| write(p.get_mut().unwrap()));
        slab.free_batch(s.pages.drain(..));
    };
    let malloc = |s: &mut State| {
        (0..LAYER_BATCH).for_each(|_| s.vecs.push(Vec::with_capacity(PAGE_BYTES)));
        black_box(&s.vecs);
        s.vecs.clear();
    };
    let malloc_write = |s: &mut State| {
        (0..LAYER_BATCH).for_each(|_| s.vecs.push(vec![0; PAGE_BYTES]));
        s.vecs.iter_mut().for_each(|v| write(v));
        s.vecs.clear();
    };

    println!("| allocate + free, {LAYER_BATCH} pages of 256 KiB | 1 thread, ns a page | 8 threads, ns a page |");
    println!("|---|---:|---:|");
    let row = |name: &str, rounds: usize, round: &(dyn Fn(&mut State) + Sync)| {
        let (one, eight) = (per_page_ns(1, 7, rounds, round), per_page_ns(8, 5, rounds / 4, round));
        println!("| {name} | {one:.1} | {eight:.1} |");
    };
    row("slab, a batch under one lock", 20_000, &batch);
    row("slab, page by page", 20_000, &single);
    row("slab, clone and drop of leased pages", 20_000, &share);
    row("malloc (`Vec::with_capacity`), not written", 2_000, &malloc);
    row("slab, a batch, a byte per 4 KiB written", 400, &batch_write);
    row("malloc (zeroed `Vec`), a byte per 4 KiB written", 60, &malloc_write);
    println!();
}

/// How a range becomes memory.
enum Touch {
    /// One thread, one page fault per 4 KiB: what happens without an arena.
    Faults,
    /// As the arena does it, on so many threads.
    Prepare(usize),
}

/// Time to map, until the first page can be used, and until all can; best of 2.
fn start(bytes: usize, options: &ArenaOptions, touch: &Touch) -> [Duration; 3] {
    let once = || {
        let begin = Instant::now();
        let plan = ArenaPlan::new(PAGE_BYTES, bytes / PAGE_BYTES, options.chunk_bytes, u64::MAX);
        let arena = Arc::new(Arena::map(plan, options, &host(), "the bench").expect("enough memory"));
        let mapped = begin.elapsed();
        let first = match touch {
            Touch::Faults => fault(&arena, begin),
            Touch::Prepare(threads) => prepare(&arena, *threads, begin),
        };
        [mapped, first, begin.elapsed()]
    };
    (0..2).map(|_| once()).min_by_key(|times| times[2]).expect("two")
}

#[allow(unsafe_code)]
fn fault(arena: &Arena, begin: Instant) -> Duration {
    let mut first = None;
    for page in 0..arena.pages() {
        for offset in (0..PAGE_BYTES).step_by(4096) {
            // SAFETY: the page is mapped with that many bytes, and nobody else knows the arena.
            unsafe { arena.page(page).add(offset).write_volatile(1) };
        }
        first.get_or_insert_with(|| begin.elapsed());
    }
    first.expect("at least one page")
}

fn prepare(arena: &Arc<Arena>, threads: usize, begin: Instant) -> Duration {
    let chunks = arena.chunks().len();
    let (ready, done) = std::sync::mpsc::channel();
    arena.prepare_in_background(threads, move |chunk| {
        ready.send((chunk.expect("pages may stay pageable"), begin.elapsed())).expect("the bench listens")
    });
    let times: Vec<_> = done.iter().take(chunks).collect();
    times[0].1
}

/// Milliseconds per GiB.
fn ms_per_gib(time: Duration, bytes: usize) -> f64 {
    time.as_secs_f64() * 1e3 * GIB as f64 / bytes as f64
}

fn arenas(gib: usize) {
    let bytes = gib * GIB;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    println!(
        "| start of an arena of {gib} GiB, {cores} cores | memory | mapped, µs | first page, ms | all, ms | GiB/s |"
    );
    println!("|---|---|---:|---:|---:|---:|");
    for huge_pages in [HugePages::Never, HugePages::Auto] {
        let ways = [("one thread, page faults", Touch::Faults), ("1 thread, prepared", Touch::Prepare(1))];
        for (name, touch) in ways.into_iter().chain([("all cores, prepared", Touch::Prepare(cores))]) {
            let options = ArenaOptions { huge_pages, ..Default::default() };
            let kind = Arena::map(ArenaPlan::new(PAGE_BYTES, 8, 0, u64::MAX), &options, &host(), "the bench");
            let kind = kind.expect("2 MiB").stats().kind;
            let [mapped, first, all] = start(bytes, &options, &touch);
            let (mapped, first) = (mapped.as_secs_f64() * 1e6, first.as_secs_f64() * 1e3);
            let (ms, rate) = (all.as_secs_f64() * 1e3, gib as f64 / all.as_secs_f64());
            println!("| {name} | {kind} | {mapped:.0} | {first:.2} | {ms:.0} | {rate:.2} |");
        }
    }
    println!();
}

/// What `mlock` adds to touching, and the first page of a slab that is prepared in the background while it is used.
fn pinning(gib: usize) {
    let bytes = gib * GIB;
    println!("| mlock of {gib} GiB | touched, ms a GiB | touched and locked, ms a GiB | locked |");
    println!("|---|---:|---:|---:|");
    for (name, huge_pages) in [("4-KiB pages", HugePages::Never), ("huge pages", HugePages::Auto)] {
        let touched = ArenaOptions { huge_pages, ..Default::default() };
        let locked = ArenaOptions { pin: Some(Arc::new(Mlock)), ..touched.clone() };
        let plan = ArenaPlan::new(PAGE_BYTES, bytes / PAGE_BYTES, locked.chunk_bytes, u64::MAX);
        let arena = Arena::map(plan, &locked, &host(), "the bench").expect("enough memory");
        while let Some(chunk) = arena.claim() {
            arena.prepare(chunk).expect("pages may stay pageable");
        }
        let share = arena.stats().pinned_bytes * 100 / bytes as u64;
        drop(arena);
        let [touch, lock] = [&touched, &locked].map(|o| ms_per_gib(start(bytes, o, &Touch::Prepare(1))[2], bytes));
        println!("| {name} | {touch:.0} | {lock:.0} | {share} % |");
    }
    println!();
}

/// A slab at its start: 1 GiB of pages drawn, with background threads ahead of the draw.
fn first_pages() {
    println!("| 1 GiB of pages from a new slab, one by one | first page, ms | slowest, ms | all, ms |");
    println!("|---|---:|---:|---:|");
    for threads in [0, 2] {
        let slab = Slab::new(SlabOptions { touch_threads: threads, ..SlabOptions::new(PAGE_BYTES, &host()) }).unwrap();
        let (begin, mut slowest, mut first) = (Instant::now(), Duration::ZERO, None);
        let pages: Vec<_> = (0..GIB / PAGE_BYTES)
            .map(|_| {
                let start = Instant::now();
                let page = slab.alloc().unwrap();
                slowest = slowest.max(start.elapsed());
                first.get_or_insert_with(|| begin.elapsed());
                page
            })
            .collect();
        let (all, first) = (begin.elapsed().as_secs_f64() * 1e3, first.unwrap().as_secs_f64() * 1e3);
        println!("| {threads} threads | {first:.2} | {:.1} | {all:.0} |", slowest.as_secs_f64() * 1e3);
        drop(pages);
    }
}

fn main() {
    // cargo passes `--bench` and the like.
    let gib = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(4);
    leases();
    arenas(gib);
    pinning(gib.min(2));
    first_pages();
}
