//! Gathering random rows out of 4 GiB against memcpy of large blocks out of the same memory.
//! `cargo bench --bench gather [-- SECTION..]`; a minute. `benches/rivals/index_select.py` prints PyTorch's figures.
//!
//! Figures are GB/s (10^9 bytes copied per second): the best and the median of rounds in which all variants take turns.

#![allow(unsafe_code)] // The section on limits reads without storing.

use std::arch::x86_64::*;
use std::hint::black_box;
use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;
use specache::cpu::Isa;
use specache::device::map::Bytes;
use specache::gather::delta::Delta;
use specache::gather::{Gather, GatherOptions, NodeId, Rows, Staging, Stores, Topology};

const SOURCE: usize = 4 << 30;
/// Bytes of the blocks that memcpy copies.
const LARGE: usize = 1 << 20;
/// Bytes that a variant copies per round: less than a millisecond, so that on a busy machine some rounds are not
/// interrupted.
const ROUND: usize = 2 << 20;
const ROUNDS: usize = 150;
/// Random numbers; after as many rows they repeat, and the rows have long left the caches.
const RANDOM: usize = 1 << 22;
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

use Stores::{NonTemporal, Temporal};

/// The memory that rows come from, and the order in which they are asked for.
struct Source {
    bytes: &'static [u8],
    random: Vec<u32>,
    /// Rows are taken from the first so many bytes, a power of two.
    span: usize,
}

impl Source {
    fn new() -> Source {
        let touch = |b: &mut [u8]| b.par_chunks_mut(LARGE).enumerate().for_each(|(i, b)| b.fill(i as u8));
        let bytes = &**Box::leak(Box::new(Bytes::filled(SOURCE, touch).expect("4 GiB")));
        let mut rng = Pcg64Mcg::seed_from_u64(1);
        let random = (0..RANDOM).map(|_| rng.random()).collect();
        Source { bytes, random, span: SOURCE }
    }

    /// The `i`-th random row of `row_bytes`, a power of two.
    #[inline(always)]
    fn row(&self, i: usize, row_bytes: usize) -> &[u8] {
        let start = (self.random[i % RANDOM] as usize * row_bytes) & (self.span - 1);
        &self.bytes[start..start + row_bytes]
    }
}

/// A staging block, in huge pages if there are any: random rows drive the translations of small ones out of the TLB.
struct Block {
    map: memmap2::MmapMut,
    start: usize,
    len: usize,
}

impl Block {
    fn new(len: usize, huge: bool) -> Block {
        let map = memmap2::MmapMut::map_anon(len.next_multiple_of(2 * MIB) + 2 * MIB).expect("memory");
        if huge {
            map.advise(memmap2::Advice::HugePage).expect("advice");
        }
        let start = map.as_ptr().align_offset(2 * MIB);
        let mut block = Block { map, start, len };
        block.bytes().fill(1);
        block
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }
}

fn gather(threads: usize, options: GatherOptions) -> Gather {
    let options = GatherOptions { threads: Some(threads), ..options };
    Gather::new(Topology::detect(), options).expect("threads")
}

/// One gather of as many rows as fill `to`, beginning with random row `first`.
fn gather_rows(gather: &Gather, source: &Source, first: usize, row_bytes: usize, to: &mut [u8], stores: Stores) {
    let rows = Rows {
        n_rows: to.len() / row_bytes,
        row_bytes,
        source: |i| source.row(first + i, row_bytes),
        node: |_| NodeId(0),
    };
    gather.gather(&rows, Staging { bytes: to, slot: |i| i }, stores);
}

type Run<'v> = Box<dyn FnMut(usize, &mut [u8]) + 'v>;

/// A way to fill a staging block with the rows from random row `first` on.
struct Variant<'v> {
    name: String,
    run: Run<'v>,
}

fn variant<'v>(name: impl Into<String>, run: impl FnMut(usize, &mut [u8]) + 'v) -> Variant<'v> {
    Variant { name: name.into(), run: Box::new(run) }
}

/// GB/s of a variant.
#[derive(Clone, Copy)]
struct Speed {
    best: f64,
    median: f64,
}

/// The speed of each variant, from rounds in which they take turns. Each begins its turn with a call that is not timed:
/// it leaves the staging block in the caches or not, as this variant does, whichever ran before.
fn compare(staging_bytes: usize, row_bytes: usize, variants: &mut [Variant]) -> Vec<Speed> {
    let mut block = Block::new(staging_bytes, std::env::var_os("SMALL_PAGES").is_none());
    let to = block.bytes();
    let calls = (ROUND / staging_bytes).max(1);
    let rounds = if staging_bytes > ROUND { ROUNDS / 10 } else { ROUNDS };
    let mut gbps = vec![Vec::with_capacity(rounds); variants.len()];
    let mut first = 0;
    for _ in 0..rounds {
        for (v, gbps) in variants.iter_mut().zip(&mut gbps) {
            let mut call = || {
                (v.run)(first, to);
                first += staging_bytes / row_bytes;
            };
            call();
            let start = Instant::now();
            (0..calls).for_each(|_| call());
            let seconds = start.elapsed().as_secs_f64();
            black_box(&to);
            gbps.push((calls * staging_bytes) as f64 / seconds / 1e9);
        }
    }
    let speed = |mut gbps: Vec<f64>| {
        gbps.sort_by(f64::total_cmp);
        Speed { best: gbps[rounds - 1], median: gbps[rounds / 2] }
    };
    gbps.into_iter().map(speed).collect()
}

/// memcpy of random large blocks with as many threads, each copying its part of the staging block.
fn memcpy<'v>(source: &'v Source, pool: &'v rayon::ThreadPool) -> Variant<'v> {
    variant("memcpy", move |first, to| {
        let copy = |(i, to): (usize, &mut [u8])| {
            let from = source.row(first + i, LARGE);
            to.copy_from_slice(&from[..to.len()]);
        };
        match pool.current_num_threads() {
            1 => to.chunks_mut(LARGE).enumerate().for_each(copy),
            // Even a staging block smaller than a large block is shared.
            n => {
                let part = LARGE.min(to.len() / n);
                pool.install(|| to.par_chunks_mut(part).enumerate().for_each(copy));
            }
        }
    })
}

/// The same blocks by the copies of the gather: what they reach when rows are long.
fn blocks<'v>(source: &'v Source, gather: &'v Gather, stores: Stores) -> Variant<'v> {
    variant(format!("blocks {stores:?}"), move |first, to| {
        let row_bytes = LARGE.min(to.len() / gather.threads().next_power_of_two());
        gather_rows(gather, source, first, row_bytes, to, stores);
    })
}

fn rows<'v>(source: &'v Source, gather: &'v Gather, row_bytes: usize, stores: Stores) -> Variant<'v> {
    variant(format!("gather {stores:?}"), move |first, to| gather_rows(gather, source, first, row_bytes, to, stores))
}

/// What the engine did before: one thread, `copy_from_slice` per row.
fn naive(source: &Source, row_bytes: usize) -> Variant<'_> {
    variant("copy_from_slice per row", move |first, to| {
        for (i, to) in to.chunks_exact_mut(row_bytes).enumerate() {
            to.copy_from_slice(source.row(first + i, row_bytes));
        }
    })
}

/// The gather's copies on a rayon pool: `install`, then halves by `join`.
fn on_rayon<'v>(source: &'v Source, one: &'v Gather, pool: &'v rayon::ThreadPool, row_bytes: usize) -> Variant<'v> {
    fn halve(to: &mut [u8], first: usize, row_bytes: usize, copy: &(impl Fn(usize, &mut [u8]) + Sync)) {
        if to.len() <= 16 * KIB {
            return copy(first, to);
        }
        let half = to.len() / row_bytes / 2;
        let (left, right) = to.split_at_mut(half * row_bytes);
        rayon::join(|| halve(left, first, row_bytes, copy), || halve(right, first + half, row_bytes, copy));
    }
    variant("the same on a rayon pool", move |first, to| {
        let copy = |first: usize, to: &mut [u8]| gather_rows(one, source, first, row_bytes, to, Temporal);
        pool.install(|| halve(to, first, row_bytes, &copy));
    })
}

fn rayon_pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads")
}

fn size(bytes: usize) -> String {
    if bytes >= MIB { format!("{} MiB", bytes / MIB) } else { format!("{} KiB", bytes / KIB) }
}

/// `large`: how many of the first variants copy large blocks. The fastest of them is what all are measured against.
fn print(title: &str, variants: &[Variant], speeds: &[Speed], large: usize) {
    let of = |speed: fn(&Speed) -> f64| speeds[..large].iter().map(speed).fold(0.0, f64::max);
    let (best, median) = (of(|s| s.best), of(|s| s.median));
    for (v, s) in variants.iter().zip(speeds) {
        let ratios = format!("best {:4.2}, median {:4.2} of memcpy", s.best / best, s.median / median);
        println!("{title:<42} {:<28} {:6.2} {:6.2} GB/s  {ratios}", v.name, s.best, s.median);
    }
}

/// Rows of 512 bytes, and shorter and longer ones, against large blocks.
fn section_rows(source: &Source) {
    for threads in [1, 2] {
        let (g, pool) = (gather(threads, GatherOptions::default()), rayon_pool(threads));
        for staging_bytes in [256 * KIB, 2 * MIB, 32 * MIB] {
            for row_bytes in [256, 512, 1024] {
                let mut variants = vec![
                    memcpy(source, &pool),
                    blocks(source, &g, NonTemporal),
                    rows(source, &g, row_bytes, Temporal),
                    rows(source, &g, row_bytes, NonTemporal),
                    naive(source, row_bytes),
                ];
                let speeds = compare(staging_bytes, row_bytes, &mut variants);
                let title = format!("rows {row_bytes} B, to {}, {threads} threads", size(staging_bytes));
                print(&title, &variants, &speeds, 2);
            }
        }
    }
}

/// What no gather exceeds here: reading the rows without storing them, and only asking for their lines.
fn section_limit(source: &Source) {
    if !std::arch::is_x86_feature_detected!("avx512f") {
        return println!("no AVX-512: with narrower loads the core would be the limit");
    }
    let (g, pool) = (gather(1, Default::default()), rayon_pool(1));
    let read_blocks = |first: usize, to: &mut [u8]| {
        for (i, to) in to.chunks(LARGE).enumerate() {
            // SAFETY: AVX-512 is there.
            unsafe { read(&source.row(first + i, LARGE)[..to.len()]) }
        }
    };
    // SAFETY: AVX-512 is there.
    let read_rows = |first: usize, to: &mut [u8]| unsafe { read_rows(source, first, to.len() / 512) };
    let ask = |lines: usize| {
        move |first: usize, to: &mut [u8]| {
            for i in first..first + to.len() / 512 {
                ask(source.row(i, 512), lines);
            }
        }
    };
    for staging_bytes in [256 * KIB, 2 * MIB] {
        let mut variants = [
            memcpy(source, &pool),
            variant("large blocks, read only", read_blocks),
            rows(source, &g, 512, Temporal),
            variant("rows, read only", read_rows),
            variant("rows, asked for only", ask(8)),
            variant("rows, one line asked for", ask(1)),
        ];
        let speeds = compare(staging_bytes, 512, &mut variants);
        print(&format!("rows 512 B, {}, 1 thread", size(staging_bytes)), &variants, &speeds, 1);
    }
}

/// Asks for the first lines of a row.
#[inline(always)]
fn ask(row: &[u8], lines: usize) {
    for i in 0..lines {
        // SAFETY: SSE is part of x86-64, and a prefetch of an invalid address is ignored.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(row.as_ptr().wrapping_add(64 * i).cast()) }
    }
}

/// Reads rows of 512 bytes and asks for them as the gather does.
#[target_feature(enable = "avx512f")]
fn read_rows(source: &Source, first: usize, n_rows: usize) {
    let mut any = [_mm512_setzero_si512(); 8];
    for i in (first..first + n_rows).step_by(2) {
        for i in [i + 24, i + 25, i + 8, i + 9] {
            ask(source.row(i, 512), 8);
        }
        or_lines(&mut any, source.row(i, 512));
        or_lines(&mut any, source.row(i + 1, 512));
    }
    black_box(any);
}

/// Reads `bytes`, of which there are whole rows.
#[target_feature(enable = "avx512f")]
fn read(bytes: &[u8]) {
    let mut any = [_mm512_setzero_si512(); 8];
    for row in bytes.chunks_exact(512) {
        or_lines(&mut any, row);
    }
    black_box(any);
}

#[inline]
#[target_feature(enable = "avx512f")]
fn or_lines(any: &mut [__m512i; 8], row: &[u8]) {
    assert!(row.len() == 512);
    for (i, any) in any.iter_mut().enumerate() {
        // SAFETY: the row has eight lines.
        *any = _mm512_or_si512(*any, unsafe { _mm512_loadu_si512(row.as_ptr().add(64 * i).cast()) });
    }
}

/// What page walks cost: the same rows out of less memory. On a virtual machine a walk goes through two tables.
fn section_span(source: &Source) {
    let (g, pool) = (gather(1, Default::default()), rayon_pool(1));
    for span in [64 * MIB, 256 * MIB, 1 << 30, SOURCE] {
        let source = Source { bytes: source.bytes, random: source.random.clone(), span };
        let mut variants = [memcpy(&source, &pool), rows(&source, &g, 512, Temporal)];
        let speeds = compare(2 * MIB, 512, &mut variants);
        print(&format!("rows 512 B of {}, to 2 MiB, 1 thread", size(span)), &variants, &speeds, 1);
    }
}

/// How far ahead to ask.
fn section_ahead(source: &Source) {
    let pool = rayon_pool(1);
    for row_bytes in [256, 512, 1024] {
        for stores in [Temporal, NonTemporal] {
            let ahead = [0, 1, 2, 4, 8, 12, 16, 24, 32];
            let gathers = ahead.map(|n| gather(1, GatherOptions { ahead: n * row_bytes, ..Default::default() }));
            let mut variants = vec![memcpy(source, &pool)];
            for (g, n) in gathers.iter().zip(ahead) {
                let v = rows(source, g, row_bytes, stores);
                variants.push(Variant { name: format!("{} ahead {n} rows", v.name), run: v.run });
            }
            let speeds = compare(2 * MIB, row_bytes, &mut variants);
            print(&format!("rows {row_bytes} B, to 2 MiB, 1 thread"), &variants, &speeds, 1);
        }
    }
}

fn section_isa(source: &Source) {
    let pool = rayon_pool(1);
    let isas = Isa::available();
    let gathers: Vec<Gather> = isas.iter().map(|&isa| gather(1, GatherOptions { isa, ..Default::default() })).collect();
    let mut variants = vec![memcpy(source, &pool)];
    for (g, isa) in gathers.iter().zip(&isas) {
        for stores in [Temporal, NonTemporal] {
            let v = rows(source, g, 512, stores);
            variants.push(Variant { name: format!("{} {isa}", v.name), run: v.run });
        }
    }
    let speeds = compare(2 * MIB, 512, &mut variants);
    print("rows 512 B, to 2 MiB, 1 thread", &variants, &speeds, 1);
}

/// From which size on helpers pay, and what waking rayon's threads would cost instead.
fn section_small(source: &Source) {
    let (one, two) = (gather(1, Default::default()), gather(2, GatherOptions { alone_below: 0, ..Default::default() }));
    let pool = rayon_pool(2);
    for kib in [4, 8, 16, 32, 64, 128, 256, 512, 2048] {
        let mut variants =
            [rows(source, &one, 512, Temporal), rows(source, &two, 512, Temporal), on_rayon(source, &one, &pool, 512)];
        let speeds = compare(kib * KIB, 512, &mut variants);
        let us = speeds.iter().map(|s| (kib * KIB) as f64 / s.best / 1e3).collect::<Vec<_>>();
        println!(
            "{kib:5} KiB: alone {:7.2} us, with a helper {:7.2} us ({:4.2}x), rayon {:7.2} us ({:4.2}x)",
            us[0],
            us[1],
            us[0] / us[1],
            us[2],
            us[0] / us[2]
        );
    }
}

/// The CPU device: the block is read by the same cores right after the gather.
fn section_reader(source: &Source) {
    let g = gather(2, Default::default());
    let read = |to: &[u8]| black_box(bytemuck::cast_slice::<u8, u64>(to).iter().fold(0u64, |a, b| a.wrapping_add(*b)));
    for staging_bytes in [256 * KIB, 2 * MIB, 32 * MIB] {
        let with_read = |stores| {
            let mut v = rows(source, &g, 512, stores);
            v.run = Box::new({
                let mut gather = v.run;
                move |first, to| {
                    gather(first, to);
                    read(to);
                }
            });
            v
        };
        let mut variants = [with_read(Temporal), with_read(NonTemporal)];
        let speeds = compare(staging_bytes, 512, &mut variants);
        println!(
            "to {:<8} gather and read: temporal {:6.2} GB/s, non-temporal {:6.2} GB/s ({:4.2}x)",
            size(staging_bytes),
            speeds[0].best,
            speeds[1].best,
            speeds[1].best / speeds[0].best
        );
    }
}

/// What planning a delta costs.
fn section_delta(_: &Source) {
    let mut rng = Pcg64Mcg::seed_from_u64(2);
    for k in [16, 64, 128] {
        // A third of the positions changes from step to step.
        let mut pool: Vec<u32> = (0..32_768).collect();
        let mut selections = Vec::new();
        for _ in 0..1000 {
            for i in 0..k {
                if rng.random_range(0..3) == 0 {
                    let other = rng.random_range(k..pool.len());
                    pool.swap(i, other);
                }
            }
            let mut selection = pool[..k].to_vec();
            selection.sort_unstable();
            selections.push(selection);
        }
        let (mut delta, mut table) = (Delta::new(k), vec![specache::gather::delta::EMPTY; k]);
        let mut slot_of = vec![0; k];
        let mut best = f64::INFINITY;
        let mut misses = 0;
        for _ in 0..ROUNDS {
            let start = Instant::now();
            misses = selections.iter().map(|s| delta.plan(&mut table, s, &mut slot_of[..s.len()]).len()).sum::<usize>();
            best = best.min(start.elapsed().as_secs_f64() / selections.len() as f64);
        }
        println!("delta of k = {k}: {:.0} ns, {:.0} % misses", best * 1e9, misses as f64 / k as f64 / 10.0);
    }
}

type Section = fn(&Source);

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    println!("{}", gather(2, Default::default()).describe());
    let source = Source::new();
    let sections: [(&str, Section); 8] = [
        ("rows", section_rows),
        ("limit", section_limit),
        ("span", section_span),
        ("ahead", section_ahead),
        ("isa", section_isa),
        ("small", section_small),
        ("reader", section_reader),
        ("delta", section_delta),
    ];
    for (name, section) in sections {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            println!("\n{name}");
            section(&source);
        }
    }
}
