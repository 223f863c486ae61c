//! The fused operations of the cache and of attention against the oracle, over one shared table of edge cases.

mod common;

use common::tiny::Random;
use common::{device, on_every_other_isa};
use proptest::prelude::*;
use specache::cpu::attn_decode::Scratch;
use specache::device::{Buffer, Device};
use specache::kv::host::WidePage;
use specache::kv::layout::{KvShape, PackedLayout};
use specache::kv::prefetch::Slots;
use specache::kv::view::{Far, KvView, PrefillView, Replaced, SeqRows};
use specache::kv::{Counters, KvMode, KvOptions, PAGE};
use specache::model::Dtype;
use specache::ops::kv::write_pairs;
use specache::ops::pack::pack_pages;
use specache::ops::select::{self, Selection};
use specache::ops::{attn_decode, attn_prefill};
use specache::reference::{self, Pair, Quantised};
use std::sync::Arc;

/// Device memory for a test.
fn alloc(device: &Device, len: usize) -> Buffer {
    device.grant(0, 0, "test").unwrap().device(len, "test").unwrap()
}

fn shape(n_kv_heads: usize, head_dim: usize, dtype: Dtype, bits: usize, group_size: usize) -> KvShape {
    KvShape { n_layers: 1, n_kv_heads, head_dim, dtype, packed: PackedLayout { head_dim, bits, group_size } }
}

/// K and V of a sequence: as numbers, in wide pages and in packed ones.
struct Cache {
    shape: KvShape,
    device: Device,
    /// `[kv head][n][D]`, rounded to 16 bits.
    k: Vec<Vec<Vec<f32>>>,
    v: Vec<Vec<Vec<f32>>>,
    /// The same, quantised and back.
    low_k: Vec<Vec<Vec<f32>>>,
    low_v: Vec<Vec<Vec<f32>>>,
    pages: Vec<WidePage>,
    packed: Buffer,
}

impl Cache {
    /// `value(random)` for each number; `n` tokens in whole pages.
    fn new(shape: KvShape, n: usize, mut value: impl FnMut() -> f32) -> Cache {
        assert_eq!(n % PAGE, 0);
        let device = device(2);
        let mut numbers = || -> Vec<Vec<Vec<f32>>> {
            let mut token = || (0..shape.head_dim).map(|_| reference::round_kv(value(), shape.dtype)).collect();
            (0..shape.n_kv_heads).map(|_| (0..n).map(|_| token()).collect()).collect()
        };
        let (k, v) = (numbers(), numbers());
        let mut pages = Vec::new();
        for page in 0..n / PAGE {
            let mut wide = alloc(&device, shape.wide_page_bytes());
            for token in 0..PAGE {
                let at = |x: &[Vec<Vec<f32>>]| {
                    x.iter().flat_map(|head| head[page * PAGE + token].clone()).collect::<Vec<_>>()
                };
                write_pairs(&device, &shape, wide.bytes_mut(), token, &at(&k), &at(&v));
            }
            pages.push(Arc::new(wide));
        }
        let mut packed = alloc(&device, n / PAGE * shape.packed_page_bytes());
        let (mut low_k, mut low_v) = (vec![vec![]; shape.n_kv_heads], vec![vec![]; shape.n_kv_heads]);
        if shape.dtype != Dtype::F32 && shape.head_dim.is_multiple_of(shape.packed.group_size) {
            pack_pages(&device, &shape, &pages, 0, &mut packed, None);
            for head in 0..shape.n_kv_heads {
                for (k, v) in k[head].chunks(PAGE).zip(v[head].chunks(PAGE)) {
                    let page = reference::quantise_page(k, v, shape.packed.bits, shape.packed.group_size);
                    let (k, v) = reference::dequantise_page(&page);
                    low_k[head].extend(k);
                    low_v[head].extend(v);
                }
            }
        }
        Cache { shape, device, k, v, low_k, low_v, pages, packed }
    }

    fn random(shape: KvShape, n: usize) -> Cache {
        let mut random = Random(5);
        // Scores of about +-3 with queries of the same size.
        let size = 1.7 / (shape.head_dim as f32).powf(0.25);
        Cache::new(shape, n, move || random.next() * size * 2.0)
    }

    /// What a query of this KV head reads of `[0, end)`, in order.
    fn pairs(&self, head: usize, low_end: usize, replaced: &[u32], end: usize) -> Vec<Pair<'_>> {
        let pair = |position: usize| {
            let low = position < low_end && !replaced.contains(&(position as u32));
            let (k, v) = if low { (&self.low_k, &self.low_v) } else { (&self.k, &self.v) };
            Pair { position, k: &k[head][position], v: &v[head][position] }
        };
        (0..end).map(pair).collect()
    }

    /// The wide pages from `split` on as a step sees them: nothing but poison behind `end`.
    fn tail(&self, split: usize, end: usize) -> Vec<WidePage> {
        let mut tail: Vec<WidePage> = self.pages[split / PAGE..end.div_ceil(PAGE)].to_vec();
        if !end.is_multiple_of(PAGE) {
            let mut page = alloc(&self.device, self.shape.wide_page_bytes());
            for head in 0..self.shape.n_kv_heads {
                let filled = self.shape.pair(head, 0).start..self.shape.pair(head, end % PAGE - 1).end;
                page.bytes_mut()[filled.clone()].copy_from_slice(&self.pages[end / PAGE].bytes()[filled]);
            }
            *tail.last_mut().unwrap() = Arc::new(page);
        }
        tail
    }

    /// Slots with the 16-bit pairs of these positions in every KV head, and poison in one more.
    fn slots(&self, positions: &[u32]) -> Slots {
        let (heads, top_k) = (self.shape.n_kv_heads, positions.len() + 1);
        let pair_bytes = self.shape.pair_bytes();
        let mut slots = self.empty_slots(top_k);
        slots.count = positions.len();
        let mut taken = std::collections::HashSet::new();
        for head in 0..heads {
            for (slot, &position) in positions.iter().enumerate() {
                slots.positions.as_mut_slice::<u32>()[head * top_k + slot] = position;
                // As after some steps of delta prefetch: slots in another order than positions.
                let other = (slot * 7 + head) % top_k;
                let free = (0..top_k).map(|i| (other + i) % top_k).find(|i| !taken.contains(&(head, *i))).unwrap();
                taken.insert((head, free));
                slots.slot_of.as_mut_slice::<u32>()[head * top_k + slot] = free as u32;
                let at = head * top_k + free;
                let (page, token) = (position as usize / PAGE, position as usize % PAGE);
                let from = &self.pages[page].bytes()[self.shape.pair(head, token)];
                slots.pairs.bytes_mut()[at * pair_bytes..][..pair_bytes].copy_from_slice(from);
            }
        }
        slots
    }

    fn empty_slots(&self, top_k: usize) -> Slots {
        let bytes = Slots::bytes(&self.shape, top_k);
        let mut grants = self.device.grant(bytes, 0, "test").unwrap();
        Slots::new(&mut grants, &self.shape, top_k, 0).unwrap()
    }
}

/// Which of the positions below the split are read at 16 bits.
#[derive(Clone, Copy, Debug)]
enum Put {
    None,
    First,
    Last,
    /// Three in a row over a page border, and a neighbour of none.
    Adjacent,
    EveryThird,
    All,
}

impl Put {
    fn positions(self, split: usize) -> Vec<u32> {
        let all = 0..split as u32;
        match self {
            Put::None => vec![],
            Put::First => all.take(1).collect(),
            Put::Last => all.rev().take(1).collect(),
            Put::Adjacent => all.filter(|p| [20, 63, 64, 65].contains(p)).collect(),
            Put::EveryThird => all.step_by(3).collect(),
            Put::All => all.collect(),
        }
    }
}

/// One sequence of a step: the edge cases of every test here.
#[derive(Clone, Copy, Debug)]
struct Edge {
    split: usize,
    position: usize,
    window: Option<usize>,
    put: Put,
}

/// Positions at 0, 1 and around page borders, around the border of a chunk of 1,024 tokens, splits at every distance; with
/// windows that end in the tail, in the packed part, at page borders, and that hide a whole chunk.
fn edges() -> Vec<Edge> {
    let places = [
        (0, 0),
        (0, 1),
        (0, 62),
        (0, 63),
        (0, 64),
        (0, 65),
        (64, 64),
        (64, 65),
        (64, 126),
        (64, 127),
        (64, 128),
        (128, 191),
        (192, 300),
        (960, 1022),
        (1024, 1023 + 64),
        (1024, 1100),
        (1088, 1151),
        (2048, 2110),
        (0, 1500),
    ];
    let mut edges = vec![];
    for (i, (split, position)) in places.into_iter().enumerate() {
        for (j, window) in [None, Some(1), Some(40), Some(64), Some(150), Some(1030)].into_iter().enumerate() {
            let puts = [Put::None, Put::First, Put::Last, Put::Adjacent, Put::EveryThird, Put::All];
            // Every place with every window, and with every kind of replacement once.
            edges.push(Edge { split, position, window, put: puts[(i + j) % puts.len()] });
        }
    }
    edges
}

/// Of outputs below 3 in size: sums of up to 2,112 terms in another order, and zeros and scales that are multiplied out of
/// the sums. Less than 2e-6 was seen.
const OUT_DIFFERENCE: f32 = 1e-5;
/// Of mean probabilities, for the same reasons. No selection out of the oracle's order was seen, so this is room for
/// other machines: ten roundings of a number below 1.
const PROBABILITY_DIFFERENCE: f32 = 1e-6;

/// All edges on one cache; then selections and hits from the same attention.
fn check_decode(cache: &Cache, group_heads: usize, far_wide: bool) {
    let (shape, device) = (cache.shape, &cache.device);
    let n_heads = shape.n_kv_heads * group_heads;
    let width = n_heads * shape.head_dim;
    let mut random = Random(9);
    let size = 1.7 * (shape.head_dim as f32).powf(0.25);
    let mut scratch = Scratch::default();
    for edge in edges() {
        // f32 caches have no packed pages.
        let Edge { split, position, window, put } = edge;
        let put = if far_wide { Put::None } else { put };
        for n_rows in [1, 2] {
            let end = position + n_rows;
            let replaced = put.positions(split);
            let (tail, slots) = (cache.tail(split, end), cache.slots(&replaced));
            let view = |_| KvView {
                shape,
                split,
                far: match far_wide {
                    _ if split == 0 => Far::None,
                    true => Far::Wide(&cache.pages),
                    false => Far::Packed(&cache.packed),
                },
                tail: &tail,
                replaced: (!replaced.is_empty()).then_some(Replaced {
                    count: slots.count,
                    stride: slots.top_k,
                    positions: &slots.positions,
                    slot_of: &slots.slot_of,
                    pairs: &slots.pairs,
                }),
                window,
            };
            let q: Vec<f32> = (0..n_rows * width).map(|_| random.next() * size).collect();
            let mut out = vec![f32::NAN; q.len()];
            let seqs = [SeqRows { position, first_row: 0, n_rows, room: 0 }];
            attn_decode::attend(device, n_heads, &seqs, view, &q, &mut out, &mut scratch);

            let mut means = vec![];
            for row in 0..n_rows {
                for head in 0..shape.n_kv_heads {
                    let pairs = cache.pairs(head, if far_wide { 0 } else { split }, &replaced, end);
                    let heads: Vec<_> = (0..group_heads)
                        .map(|g| {
                            let at = row * width + (head * group_heads + g) * shape.head_dim;
                            let q = &q[at..at + shape.head_dim];
                            let (expected, p) = reference::attention(q, position + row, &pairs, window);
                            let ours = &out[at..at + shape.head_dim];
                            let d = common::max_difference(ours, &expected);
                            assert!(
                                d < OUT_DIFFERENCE,
                                "{edge:?}, {shape:?}, row {row} of {n_rows}, head {head}.{g}: {d}"
                            );
                            p
                        })
                        .collect();
                    means.push(reference::mean_probabilities(&heads));
                }
            }
            check_selection(cache, &edge, n_rows, group_heads, &scratch, &means);
        }
    }
}

/// What the last row selects: at least as probable, but for rounding, as everything that it leaves.
fn check_selection(
    cache: &Cache,
    edge: &Edge,
    n_rows: usize,
    group_heads: usize,
    scratch: &Scratch,
    means: &[Vec<f32>],
) {
    let n_kv_heads = cache.shape.n_kv_heads;
    let (row, last) = (n_rows - 1, edge.position + n_rows - 1);
    let first = edge.window.map_or(0, |w| (last + 1).saturating_sub(w)).min(edge.split);
    for top_k in [0, 1, 7, 64, edge.split + 1] {
        let mut slots = cache.empty_slots(top_k);
        let candidates = first..edge.split;
        let selection = Selection { seq: 0, row, candidates: candidates.clone(), slots: &mut slots };
        select::select(&cache.device, group_heads, n_kv_heads, scratch, selection);
        assert_eq!(slots.count, top_k.min(candidates.len()), "{edge:?}");
        let mut hits = 0;
        for head in 0..n_kv_heads {
            let selected = slots.selected(head);
            assert!(selected.is_sorted_by(|a, b| a < b), "{edge:?}: {selected:?}");
            assert!(selected.iter().all(|&p| candidates.contains(&(p as usize))), "{edge:?}: {selected:?}");
            let mean = &means[row * n_kv_heads + head];
            let left = candidates.clone().filter(|&p| !selected.contains(&(p as u32)));
            let most_left = left.map(|p| mean[p]).fold(0.0, f32::max);
            let least = selected.iter().map(|&p| mean[p as usize]).fold(f32::INFINITY, f32::min);
            assert!(least >= most_left - PROBABILITY_DIFFERENCE, "{edge:?}, k = {top_k}: {least} {most_left}");
            // Hits are counted with row 0's own top-k.
            let own = reference::top_k(&means[head][candidates.clone()], slots.count);
            hits += own.iter().filter(|&&p| selected.contains(&(p + first as u32))).count() as u64;
        }
        let of = (n_kv_heads * slots.count) as u64;
        let counted = select::hits(&cache.device, group_heads, n_kv_heads, scratch, 0, candidates, &slots);
        assert_eq!(counted.1, of);
        // A near tie may count one more or less in each head; row 0 against itself hits always.
        assert!(counted.0.abs_diff(hits) <= n_kv_heads as u64, "{edge:?}: {counted:?}, not {hits}");
        assert!(n_rows == 2 || counted.0 == of, "{edge:?}: {counted:?}");
    }
}

#[test]
fn decode_attention_over_packed_pages() {
    for (i, dtype) in [Dtype::Bf16, Dtype::F16].into_iter().enumerate() {
        for (j, bits) in [1, 2, 4].into_iter().enumerate() {
            let (head_dim, group_size, group_heads) =
                [(32, 32, 3), (64, 64, 1), (96, 32, 2), (64, 32, 4), (128, 64, 8), (32, 32, 8)][i * 3 + j];
            let heads = if head_dim == 128 { 1 } else { 2 };
            check_decode(&Cache::random(shape(heads, head_dim, dtype, bits, group_size), 2176), group_heads, false);
        }
    }
}

#[test]
fn decode_attention_over_wide_pages() {
    for (dtype, head_dim, group_heads) in
        [(Dtype::Bf16, 32, 3), (Dtype::F16, 80, 2), (Dtype::F32, 24, 5), (Dtype::F32, 64, 1)]
    {
        check_decode(&Cache::random(shape(2, head_dim, dtype, 2, 32), 2176), group_heads, true);
    }
}

/// Queries of zeros see all positions alike: every tie goes to the lower position, across chunks and behind a window.
#[test]
fn select_ties_go_to_the_lower_position() {
    let cache = Cache::random(shape(2, 32, Dtype::Bf16, 2, 32), 2176);
    for (position, candidates) in
        [(2100, 0..2048), (2100, 1000..2048), (100, 0..64), (100, 37..64), (100, 64..64), (70, 5..6)]
    {
        let tail = cache.tail(0, position + 1);
        let (window, q) = (Some(position + 1 - candidates.start.min(position)), vec![0.0; 2 * 3 * 32]);
        let view = |_| KvView { shape: cache.shape, split: 0, far: Far::None, tail: &tail, replaced: None, window };
        let (mut out, mut scratch) = (vec![f32::NAN; q.len()], Scratch::default());
        let seqs = [SeqRows { position, first_row: 0, n_rows: 1, room: 0 }];
        attn_decode::attend(&cache.device, 6, &seqs, view, &q, &mut out, &mut scratch);
        for top_k in [0, 1, 2, 63, 64, 65, 1025, 2048, 3000] {
            let mut slots = cache.empty_slots(top_k);
            let selection = Selection { seq: 0, row: 0, candidates: candidates.clone(), slots: &mut slots };
            select::select(&cache.device, 3, 2, &scratch, selection);
            let expected: Vec<u32> = candidates.clone().take(top_k).map(|p| p as u32).collect();
            for head in 0..2 {
                assert_eq!(slots.selected(head), expected, "{candidates:?}, k = {top_k}");
            }
        }
    }
}

/// Prompts whose rows end around the borders of tiles and chunks; behind other prompts; over packed pages (`kivi`).
#[test]
fn prefill_attention() {
    for (dtype, bits, head_dim, group_heads) in
        [(Dtype::Bf16, 2, 32, 2), (Dtype::F16, 1, 32, 3), (Dtype::F32, 2, 24, 1), (Dtype::Bf16, 4, 96, 1)]
    {
        let cache = Cache::random(shape(2, head_dim, dtype, bits, 32), 768);
        let width = 2 * group_heads * head_dim;
        let mut random = Random(3);
        let size = 1.7 * (head_dim as f32).powf(0.25);
        for (position, rows, packed) in [
            (0, 1, 0),
            (0, 63, 0),
            (0, 64, 0),
            (0, 65, 0),
            (0, 511, 0),
            (0, 512, 0),
            (0, 513, 0),
            (1, 1, 0),
            (100, 129, 0),
            (64, 64, 64),
            (130, 1, 128),
            (200, 300, 192),
            (512, 200, 256),
        ] {
            if packed > 0 && dtype == Dtype::F32 {
                continue;
            }
            for window in [None, Some(1), Some(40), Some(256), Some(300)] {
                let tail = cache.tail(packed, position + rows);
                let first_page = packed / PAGE;
                let view = PrefillView { shape: cache.shape, packed: &cache.packed, pages: &tail, first_page, window };
                let q: Vec<f32> = (0..rows * width).map(|_| random.next() * size).collect();
                let mut out = vec![f32::NAN; q.len()];
                let attend =
                    || attn_prefill::attend(&cache.device, 2 * group_heads, &view, position, rows, &q, &mut out);
                cache.device.clone().run(attend);
                let pairs = [0, 1].map(|head| cache.pairs(head, packed, &[], position + rows));
                // All rows near borders, and every seventh.
                for row in (0..rows).filter(|r| r % 7 == 0 || (r + 1) % 64 < 2 || *r == rows - 1) {
                    for h in 0..2 * group_heads {
                        let at = row * width + h * head_dim;
                        let visible = &pairs[h / group_heads][..=position + row];
                        let (expected, _) =
                            reference::attention(&q[at..at + head_dim], position + row, visible, window);
                        let d = common::max_difference(&out[at..at + head_dim], &expected);
                        assert!(d < OUT_DIFFERENCE, "{rows} rows at {position}, row {row}, head {h}, {window:?}: {d}");
                    }
                }
            }
        }
    }
}

/// Zeros, scales and codes of a packed head, read as docs/design.md draws the bytes; `(k, v)` in the oracle's order.
fn read_packed(l: &PackedLayout, bytes: &[u8]) -> reference::QuantisedPage {
    let number = |part: &[u8], i: usize| half::f16::from_le_bytes([part[2 * i], part[2 * i + 1]]).to_f32();
    let code = |part: &[u8], block: usize, v: usize| {
        let block = &part[block * 4 * l.bits..][..4 * l.bits];
        // 1 bit: bit v of a u32. 2 and 4 bits: unit v % 8, from bit b * (v / 8) on.
        let bit = if l.bits == 1 { v } else { (v % 8) * 4 * l.bits + v / 8 * l.bits };
        block[bit / 8] >> (bit % 8) & ((1 << l.bits) - 1)
    };
    let (d, g) = (l.head_dim, l.group_size);
    let (codes, params) = (&bytes[l.k_codes()], &bytes[l.k_params()]);
    let k = |group: usize, channel: usize| Quantised {
        codes: (group * g..(group + 1) * g).map(|token| code(codes, 2 * channel + token / 32, token % 32)).collect(),
        zero: number(params, 2 * group * d + channel),
        scale: number(params, (2 * group + 1) * d + channel),
    };
    let k = (0..PAGE / g).map(|group| (0..d).map(|c| k(group, c)).collect()).collect();
    let (codes, params) = (&bytes[l.v_codes()], &bytes[l.v_params()]);
    let v = |token: usize, group: usize| Quantised {
        codes: (group * g..(group + 1) * g).map(|c| code(codes, token * d / 32 + c / 32, c % 32)).collect(),
        zero: number(params, 2 * group * PAGE + token),
        scale: number(params, (2 * group + 1) * PAGE + token),
    };
    let v = (0..PAGE).map(|token| (0..d / g).map(|group| v(token, group)).collect()).collect();
    reference::QuantisedPage { k, v }
}

/// Packed pages hold what the oracle's quantisation gives, number for number.
fn check_packed(cache: &Cache) {
    let shape = cache.shape;
    for page in 0..cache.pages.len() {
        for head in 0..shape.n_kv_heads {
            let tokens = page * PAGE..(page + 1) * PAGE;
            let (k, v) = (&cache.k[head][tokens.clone()], &cache.v[head][tokens]);
            let expected = reference::quantise_page(k, v, shape.packed.bits, shape.packed.group_size);
            let ours = read_packed(&shape.packed, &cache.packed.bytes()[shape.packed_head(page, head)]);
            assert!(ours == expected, "{shape:?}, page {page}, head {head}");
        }
    }
}

/// (shape of every kind) x (values of every kind).
#[test]
fn pack_is_the_oracle() {
    let special: [fn(&mut Random, usize) -> f32; 7] = [
        |random, _| random.next(),
        // Constant, so that the scale is 0; both zeros; values between two levels and in the middle of them.
        |_, _| 0.3,
        |_, i| [0.0, -0.0][i % 2],
        |_, i| [0.0, 3.0, 0.5, 1.5, 2.5, -0.0, 1.0][i % 7],
        // The largest that fp16 holds, scales that round to 0 and that are subnormal, and a mixture of sizes.
        |random, _| random.next() * 32_000.0,
        |random, _| random.next() * 1e-6,
        |random, i| random.next() * [1e-7, 1e-3, 1.0, 300.0][i % 4],
    ];
    for (kind, value) in special.into_iter().enumerate() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            for bits in [1, 2, 4] {
                for (head_dim, group_size) in [(32, 32), (64, 32), (64, 64), (96, 32), (128, 64)] {
                    let (mut random, mut i) = (Random(kind as u64), 0);
                    let next = || {
                        i += 1;
                        value(&mut random, i)
                    };
                    let cache = Cache::new(shape(3, head_dim, dtype, bits, group_size), 2 * PAGE, next);
                    check_packed(&cache);
                }
            }
        }
    }
}

/// A range that fp16 cannot hold must not become an infinite level: a score of minus infinity would hide the token without
/// a word. It gives NaN, in every row that reads the page, and so an error that names the layer.
#[test]
fn what_fp16_cannot_hold_is_heard() {
    for bits in [1, 2, 4] {
        for (low, high) in [(-1e5, 0.0), (0.0, 1e5), (-1e5, -0.9e5), (-1e6, 1e6), (0.0, 3e38)] {
            for outlier_is_k in [true, false] {
                let (mut random, mut i) = (Random(1), 0);
                let (d, n) = (32, PAGE);
                let next = || {
                    i += 1;
                    // One channel of K, or one token of V.
                    let in_k = i <= d * n;
                    let outlier = if outlier_is_k { in_k && i % d == 3 } else { !in_k && (i - 1) / d % n == 3 };
                    if outlier { if i % 2 == (i / d) % 2 { low } else { high } } else { random.next() }
                };
                let cache = Cache::new(shape(1, d, Dtype::Bf16, bits, 32), n, next);
                let own = cache.tail(0, 1);
                let far = Far::Packed(&cache.packed);
                let view = |_| KvView { shape: cache.shape, split: 64, far, tail: &own, replaced: None, window: None };
                let seqs = [SeqRows { position: 64, first_row: 0, n_rows: 1, room: 0 }];
                let (q, mut out) = (vec![0.5; d], vec![0.0; d]);
                attn_decode::attend(&cache.device, 1, &seqs, view, &q, &mut out, &mut Scratch::default());
                let what = format!("{bits} bits, {low} to {high}, K {outlier_is_k}: {out:?}");
                let level_fits = |x: f32| half::f16::from_f32(x).is_finite();
                let (zero, scale) = match bits {
                    1 => ((3.0 * low + high) / 4.0, (high - low) / 2.0),
                    _ => (low, (high - low) / ((1 << bits) - 1) as f32),
                };
                let fits = level_fits(zero) && level_fits(scale);
                // V's outlier is in one group of channels only, and there is one group here.
                assert_eq!(out.iter().all(|x| x.is_finite()), fits, "{what}");
                assert!(fits || out.iter().all(|x| x.is_nan()), "{what}");
            }
        }
    }
}

/// As above for the 16-bit pairs themselves: 65,504 is the last number that fp16 has.
#[test]
fn a_pair_that_fp16_cannot_hold_is_heard() {
    for (x, fits) in [(65_504.0, true), (-65_504.0, true), (65_520.0, false), (-1e6, false), (f32::NAN, false)] {
        let shape = shape(1, 32, Dtype::F16, 2, 32);
        let device = device(1);
        let mut page = alloc(&device, shape.wide_page_bytes());
        let mut k = vec![0.5; 32];
        k[7] = x;
        write_pairs(&device, &shape, page.bytes_mut(), 3, &k, &[0.25; 32]);
        let pair = &page.as_slice::<half::f16>()[3 * 64..][..64];
        let expected = if fits { half::f16::from_f32(x) } else { half::f16::NAN };
        assert_eq!(pair[7].to_bits(), expected.to_bits(), "{x}");
        let others = pair.iter().enumerate().filter(|(i, _)| *i != 7);
        assert!(others.into_iter().all(|(i, x)| x.to_f32() == if i < 32 { 0.5 } else { 0.25 }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any values within fp16's range, any layout: the oracle's numbers.
    #[test]
    fn pack_of_anything_is_the_oracle(
        seed in any::<u64>(),
        exponent in -12i32..12,
        offset in -100f32..100.0,
        bits in prop::sample::select(vec![1usize, 2, 4]),
        dims in prop::sample::select(vec![(32usize, 32usize), (64, 32), (64, 64), (96, 32), (128, 32)]),
        f16 in any::<bool>(),
    ) {
        let mut random = Random(seed);
        let dtype = if f16 { Dtype::F16 } else { Dtype::Bf16 };
        let cache = Cache::new(shape(1, dims.0, dtype, bits, dims.1), PAGE, || random.next() * 2f32.powi(exponent) + offset);
        check_packed(&cache);
    }

    /// The counters against the method's words, over any sequence of prefills and steps.
    #[test]
    fn counters_follow_the_method(
        residual_len in 32usize..300,
        events in prop::collection::vec((1usize..400, 0usize..200), 1..5),
    ) {
        let mut counters = Counters::new(&KvOptions { mode: KvMode::SpeCache, residual_len, ..KvOptions::default() });
        let (mut n, mut no) = (0usize, 0usize);
        for (prompt, steps) in events {
            n += prompt;
            no = no.max(if n > residual_len { (n - residual_len) / PAGE * PAGE } else { 0 });
            let mut nq = no;
            counters.after_prefill(n);
            prop_assert_eq!((counters.n, counters.no, counters.nq), (n, no, nq));
            for _ in 0..steps {
                nq = no;
                n += 1;
                let offloads = n - no >= residual_len + PAGE;
                no += if offloads { PAGE } else { 0 };
                let page = counters.advance();
                prop_assert_eq!((counters.n, counters.no, counters.nq), (n, no, nq));
                prop_assert_eq!(page, offloads.then(|| no / PAGE - 1));
                // Rows at n and n + 1 fit into the pages that are set aside from nq on.
                prop_assert!((n + 2).div_ceil(PAGE) - nq / PAGE <= counters.tail_pages(usize::MAX - 1));
            }
        }
    }
}

#[test]
fn on_every_isa() {
    for filter in ["attention", "select", "pack", "fp16"] {
        on_every_other_isa(filter);
    }
}
