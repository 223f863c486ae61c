//! Properties of layout, quantisation and caches, on anything that they may be given. (tests/ops.rs compares packing with the
//! oracle bit for bit; here is what both must hold.)

mod common;

use std::sync::Arc;

use common::device;
use common::tiny::Random;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use specache::device::Device;
use specache::kv::cache::{Admission, Cache};
use specache::kv::host::WidePage;
use specache::kv::layout::{KvShape, PackedLayout};
use specache::kv::slab::{Slab, SlabOptions};
use specache::kv::view::Far;
use specache::kv::{CacheBytes, Counters, KvMode, KvOptions, PAGE};
use specache::model::Dtype;
use specache::ops::kv::write_pairs;
use specache::reference::{self, dequantise, quantise_group};

fn cases(n: u32) -> ProptestConfig {
    ProptestConfig { cases: n, failure_persistence: None, ..ProptestConfig::default() }
}

// Layout.

/// Any head size that its groups divide, any bits.
fn shapes() -> impl Strategy<Value = KvShape> {
    let bits = prop::sample::select(vec![1usize, 2, 4]);
    let dtype = prop::sample::select(vec![Dtype::Bf16, Dtype::F16]);
    (1..40usize, 1..20usize, 1..17usize, prop::sample::select(vec![32usize, 64]), bits, dtype).prop_map(
        |(n_layers, n_kv_heads, groups, group_size, bits, dtype)| {
            let head_dim = groups * group_size;
            KvShape { n_layers, n_kv_heads, head_dim, dtype, packed: PackedLayout { head_dim, bits, group_size } }
        },
    )
}

proptest! {
    #![proptest_config(cases(300))]

    /// Sizes are the formulas of docs/design.md; parts, heads and pairs tile their page.
    #[test]
    fn every_byte_of_a_page_has_one_owner(shape in shapes()) {
        let (d, h, PackedLayout { bits: b, group_size: g, .. }) = (shape.head_dim, shape.n_kv_heads, shape.packed);
        prop_assert_eq!(shape.pair_bytes(), 4 * d);
        prop_assert_eq!(shape.wide_page_bytes(), 256 * d * h);
        // Codes of b bits for K and V of 64 tokens, and 4 bytes for each of their groups.
        prop_assert_eq!(shape.packed.head_bytes(), 2 * (8 * b * d + 256 * d / g));
        prop_assert_eq!(shape.packed_page_bytes(), h * shape.packed.head_bytes());
        let l = shape.packed;
        let parts = [l.k_codes(), l.k_params(), l.v_codes(), l.v_params()];
        prop_assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), l.head_bytes());
        // Each at the end of the one before, and where a vector of its numbers may be read.
        let mut end = 0;
        for part in parts {
            prop_assert!(part.start == end && part.start.is_multiple_of(4));
            end = part.end;
        }
        let mut end = 0;
        for (head, token) in (0..h).flat_map(|head| (0..PAGE).map(move |token| (head, token))) {
            let pair = shape.pair(head, token);
            prop_assert_eq!((pair.start, pair.len()), (end, shape.pair_bytes()));
            end = pair.end;
        }
        prop_assert_eq!(end, shape.wide_page_bytes());
        let mut end = 0;
        for (page, head) in (0..3).flat_map(|page| (0..h).map(move |head| (page, head))) {
            let bytes = shape.packed_head(page, head);
            prop_assert_eq!((bytes.start, bytes.len()), (end, l.head_bytes()));
            end = bytes.end;
        }
    }

    /// A plan is the sum of what its tokens take, by the words of docs/design.md, and never falls as a context grows.
    #[test]
    fn plans_are_the_formulas(
        shape in shapes(), residual_len in 32usize..300, top_k in 0usize..500, capacity in 1usize..5000, mode in modes(),
    ) {
        let options = KvOptions { mode, residual_len, top_k, group_size: shape.packed.group_size, bits: shape.packed.bits, dtype: None };
        let plan = |capacity| CacheBytes::plan(&shape, &options, capacity);
        let bytes = plan(capacity);
        let offloadable = capacity.saturating_sub(residual_len) / PAGE;
        let line = |bytes: usize| bytes.next_multiple_of(64) as u64;
        let layers = shape.n_layers as u64;
        let packed = if mode.low_bit() { layers * line(offloadable * shape.packed_page_bytes()) } else { 0 };
        prop_assert_eq!(bytes.packed, packed);
        let host = if mode.on_host() { layers * (offloadable * shape.wide_page_bytes()) as u64 } else { 0 };
        prop_assert_eq!(bytes.host, host);
        prop_assert_eq!(bytes.loads, if mode == KvMode::Offload { (2 * offloadable * shape.wide_page_bytes()) as u64 } else { 0 });
        prop_assert_eq!(bytes.slots == 0, !mode.fetches() || top_k.min(offloadable) == 0);
        let more = plan(capacity + 64);
        prop_assert!(more.device() >= bytes.device() && more.host >= bytes.host);
    }
}

fn modes() -> impl Strategy<Value = KvMode> {
    prop::sample::select(KvMode::ALL.to_vec())
}

// Quantisation.

/// Values of every size that a number type has, with groups that are constant, nearly constant, and far from zero.
fn groups() -> impl Strategy<Value = (Vec<f32>, Dtype)> {
    let dtype = prop::sample::select(vec![Dtype::Bf16, Dtype::F16]);
    let len = prop::sample::select(vec![32usize, 64]);
    let kinds = (any::<u64>(), len, -30i32..17, prop::sample::select(vec![0.0f32, 1.0, -300.0, 40_000.0]), 0..4u32);
    (kinds, dtype).prop_map(|((seed, len, exponent, offset, kind), dtype)| {
        let mut random = Random(seed);
        let mut value = |i: usize| match kind {
            0 => random.next(),
            1 => 0.7,                                           // constant
            2 => [0.0, 1.0][usize::from(i == 5)],               // one that differs
            _ => random.next() * 2f32.powi(-((i % 12) as i32)), // of many sizes
        };
        let values = (0..len).map(|i| reference::round_kv(value(i) * 2f32.powi(exponent) + offset, dtype)).collect();
        (values, dtype)
    })
}

/// Half the distance between two neighbours of fp16 at `x`.
fn half_ulp(x: f32) -> f32 {
    let x = half::f16::from_f32(x.abs());
    let next = half::f16::from_bits(x.to_bits() + 1);
    (next.to_f32() - x.to_f32()) / 2.0
}

proptest! {
    #![proptest_config(cases(2000))]

    /// Every value comes back within half a step, and what the rounding of zero and scale to fp16 adds.
    #[test]
    fn quantisation_errs_by_half_a_step((values, _) in groups(), bits in prop::sample::select(vec![1usize, 2, 4])) {
        let group = quantise_group(&values, bits);
        let back = dequantise(&group);
        let (min, max) = values.iter().fold((f32::MAX, f32::MIN), |(lo, hi), &x| (lo.min(x), hi.max(x)));
        let top = ((1u32 << bits) - 1) as f32;
        prop_assert!(group.codes.iter().all(|&code| f32::from(code) <= top));
        if !(group.zero.is_finite() && group.scale.is_finite()) {
            // Beyond fp16 there are no levels (the engine makes NaN of them: tests/ops.rs); within its range there always are.
            prop_assert!(max > 60_000.0 || min < -60_000.0, "{values:?}");
            prop_assert!(back.iter().all(|x| !x.is_finite()));
            return Ok(());
        }
        // 1 bit: levels at a quarter and three quarters of the range (method.md), so that its ends err by a quarter.
        let step = if bits == 1 { (max - min) / 2.0 } else { (max - min) / top };
        let rounding = half_ulp(group.zero) + top * half_ulp(step);
        // The sums themselves are in f32.
        let arithmetic = 4.0 * f32::EPSILON * (min.abs().max(max.abs()));
        let most = step / 2.0 + rounding + arithmetic;
        for (x, y) in values.iter().zip(&back) {
            prop_assert!((x - y).abs() <= most, "{x} became {y}: more than {most}; {bits} bits, {min} to {max}");
        }
        if min == max {
            prop_assert!(group.scale == 0.0 && group.codes.iter().all(|&code| code == 0));
            prop_assert!(back.iter().all(|&y| y == half::f16::from_f32(min).to_f32()));
        }
        // Order is kept: a larger value never gets a smaller level.
        for (i, j) in (0..values.len()).zip(1..values.len()) {
            if values[i] <= values[j] {
                prop_assert!(back[i] <= back[j], "{} and {} became {} and {}", values[i], values[j], back[i], back[j]);
            }
        }
    }
}

// Caches: a random life, against a plain list of all pairs.

const LAYERS: usize = 2;
const SHAPE: KvShape = KvShape {
    n_layers: LAYERS,
    n_kv_heads: 2,
    head_dim: 32,
    dtype: Dtype::F16,
    packed: PackedLayout { head_dim: 32, bits: 2, group_size: 32 },
};

/// K and V of all heads of one token in one layer, rounded: made from a number.
fn pair(token: u64, layer: usize) -> (Vec<f32>, Vec<f32>) {
    let mut random = Random(token.wrapping_mul(31) + layer as u64);
    let mut half =
        || (0..SHAPE.n_kv_heads * SHAPE.head_dim).map(|_| reference::round_kv(random.next(), SHAPE.dtype)).collect();
    (half(), half())
}

/// What a sequence should hold: the number of each of its tokens.
#[derive(Clone)]
struct Plain {
    tokens: Vec<u64>,
    counters: Counters,
}

#[derive(Clone, Debug)]
enum Event {
    Prefill(usize),
    /// Given up in its layer number `.1`, before or after that layer is settled.
    GiveUp(usize, usize, bool),
    Decode(usize),
    Truncate(usize),
    Fork,
    Drop,
}

fn events() -> impl Strategy<Value = Vec<(usize, Event)>> {
    let event = prop_oneof![
        3 => (1..200usize).prop_map(Event::Prefill),
        1 => (1..200usize, 0..LAYERS, any::<bool>()).prop_map(|(n, layer, settled)| Event::GiveUp(n, layer, settled)),
        4 => (1..90usize).prop_map(Event::Decode),
        2 => (0..400usize).prop_map(Event::Truncate),
        2 => Just(Event::Fork),
        1 => Just(Event::Drop),
    ];
    prop::collection::vec((any::<prop::sample::Index>().prop_map(|i| i.index(1 << 20)), event), 1..14)
}

/// Writes new tokens into the pages of a prefill, whose earlier ones are the model's.
fn fill(
    device: &Device,
    pages: &mut [WidePage],
    first: usize,
    old: usize,
    tokens: &[u64],
    layer: usize,
) -> Result<(), TestCaseError> {
    for (position, &token) in tokens.iter().enumerate().skip(first * PAGE) {
        let page = &mut pages[position / PAGE - first];
        let (k, v) = pair(token, layer);
        if position < old {
            check_wide(page.bytes(), position, token, layer)?;
        } else {
            let page = Arc::get_mut(page).expect("what is written has one owner");
            write_pairs(device, &SHAPE, page.bytes_mut(), position % PAGE, &k, &v);
        }
    }
    Ok(())
}

/// The pair of `position` in its wide page.
fn check_wide(page: &[u8], position: usize, token: u64, layer: usize) -> Result<(), TestCaseError> {
    let (k, v) = pair(token, layer);
    for head in 0..SHAPE.n_kv_heads {
        let d = SHAPE.head_dim;
        let numbers = page[SHAPE.pair(head, position % PAGE)].chunks_exact(2);
        let numbers = numbers.map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32());
        let expected = k[head * d..][..d].iter().chain(&v[head * d..][..d]).copied();
        prop_assert!(numbers.eq(expected), "position {}, layer {}, head {}", position, layer, head);
    }
    Ok(())
}

/// A cache holds what the plain list says, wherever it has it.
fn check(device: &Device, cache: &mut Cache, plain: &Plain, mode: KvMode) -> Result<(), TestCaseError> {
    let Counters { n, no, nq, .. } = plain.counters;
    prop_assert_eq!(n, plain.tokens.len());
    for layer in 0..LAYERS {
        if mode.fetches() {
            let (_, host, completion) = cache.fetching(layer);
            for event in (0..no / PAGE).filter_map(|i| completion.of(i)) {
                device.wait(event, "a test looks at host pages");
            }
            // Copies put their page into the table when they are done.
            prop_assert_eq!(host.pages().count(), no / PAGE);
            for (i, page) in host.pages().enumerate() {
                for at in i * PAGE..(i + 1) * PAGE {
                    check_wide(page.bytes(), at, plain.tokens[at], layer)?;
                }
            }
        }
        if mode == KvMode::Offload {
            cache.begin_load(layer);
            cache.arrive(layer, false, &mut Default::default());
        }
        let view = cache.view(layer, None);
        prop_assert_eq!(view.split, nq);
        for position in nq..n {
            check_wide(view.tail[(position - nq) / PAGE].bytes(), position, plain.tokens[position], layer)?;
        }
        match view.far {
            Far::None => prop_assert_eq!(nq, 0),
            Far::Wide(pages) => {
                for position in 0..nq {
                    check_wide(pages[position / PAGE].bytes(), position, plain.tokens[position], layer)?;
                }
            }
            Far::Packed(packed) => {
                for page in 0..no / PAGE {
                    check_packed(packed.bytes(), page, &plain.tokens[page * PAGE..][..PAGE], layer)?;
                }
            }
        }
    }
    Ok(())
}

/// The zeros and scales of a packed page are those of its tokens: codes are compared in tests/ops.rs, and would differ with
/// them.
fn check_packed(packed: &[u8], page: usize, tokens: &[u64], layer: usize) -> Result<(), TestCaseError> {
    let d = SHAPE.head_dim;
    let pairs: Vec<_> = tokens.iter().map(|&token| pair(token, layer)).collect();
    for head in 0..SHAPE.n_kv_heads {
        let of_head = |x: &[f32]| x[head * d..][..d].to_vec();
        let k: Vec<_> = pairs.iter().map(|(k, _)| of_head(k)).collect();
        let v: Vec<_> = pairs.iter().map(|(_, v)| of_head(v)).collect();
        let expected = reference::quantise_page(&k, &v, SHAPE.packed.bits, SHAPE.packed.group_size);
        let bytes = &packed[SHAPE.packed_head(page, head)];
        let number = |at: usize| half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        for (group, channels) in expected.k.iter().enumerate() {
            for (channel, e) in channels.iter().enumerate() {
                let at = SHAPE.packed.k_params().start + 2 * (2 * group * d + channel);
                prop_assert_eq!((number(at), number(at + 2 * d)), (e.zero, e.scale));
            }
        }
        for (token, groups) in expected.v.iter().enumerate() {
            for (group, e) in groups.iter().enumerate() {
                let at = SHAPE.packed.v_params().start + 2 * (2 * group * PAGE + token);
                prop_assert_eq!((number(at), number(at + 2 * PAGE)), (e.zero, e.scale));
            }
        }
    }
    Ok(())
}

/// All sequences of one slab; `next` numbers the tokens, so that no two are alike.
struct World {
    device: Device,
    slab: Slab,
    options: KvOptions,
    sequences: Vec<(Cache, Plain)>,
    next: u64,
}

impl World {
    fn new(mode: KvMode, residual_len: usize) -> World {
        let device = device(1);
        let slab = Slab::new(SlabOptions {
            arena_bytes: 1 << 20,
            ..SlabOptions::new(SHAPE.wide_page_bytes(), device.host_memory())
        });
        let options = KvOptions { mode, residual_len, top_k: 3, bits: 2, group_size: 32, dtype: None };
        let mut world = World { device, slab: slab.unwrap(), options, sequences: vec![], next: 1 };
        world.add();
        world
    }

    /// An empty sequence.
    fn add(&mut self) {
        let cache = Cache::new(&self.device, &self.slab, SHAPE, self.options, 100).unwrap();
        let plain = Plain { tokens: vec![], counters: Counters::new(&self.options) };
        self.sequences.push((cache, plain));
    }

    fn event(&mut self, which: usize, event: &Event) -> Result<(), TestCaseError> {
        let which = which % self.sequences.len();
        match *event {
            Event::Prefill(n) => self.prefill(which, n, None)?,
            Event::GiveUp(n, layer, settled) => self.prefill(which, n, Some((layer, settled)))?,
            Event::Decode(steps) => self.decode(which, steps),
            Event::Truncate(n) => self.truncate(which, n)?,
            Event::Fork if self.sequences.len() < 4 => {
                let (cache, plain) = &mut self.sequences[which];
                let fork = (cache.fork().unwrap(), plain.clone());
                self.sequences.push(fork);
            }
            Event::Fork => {}
            Event::Drop => {
                self.sequences.swap_remove(which);
                if self.sequences.is_empty() {
                    self.add();
                }
            }
        }
        let mode = self.options.mode;
        let World { device, sequences, .. } = self;
        sequences.iter_mut().try_for_each(|(cache, plain)| check(device, cache, plain, mode))
    }

    /// As src/prefill.rs does it.
    fn prefill(&mut self, which: usize, n: usize, give_up: Option<(usize, bool)>) -> Result<(), TestCaseError> {
        let World { device, slab, sequences, next, .. } = self;
        let (cache, plain) = &mut sequences[which];
        let (old, end) = (plain.tokens.len(), plain.tokens.len() + n);
        let tokens: Vec<u64> = plain.tokens.iter().copied().chain(*next..*next + n as u64).collect();
        *next += n as u64;
        let (bytes, pages) = cache.prefill_needs(end);
        let mut admission = Admission::ask(device, slab, bytes, pages, "a prompt").unwrap();
        cache.begin_prefill(end, &mut admission).unwrap();
        for layer in 0..LAYERS {
            let mut pages = cache.prefill_pages(layer, end);
            fill(device, &mut pages, cache.prefill_first_page(), old, &tokens, layer)?;
            match give_up {
                Some((at, false)) if at == layer => {
                    cache.undo_prefill(end, layer, Some(pages));
                    return Ok(());
                }
                _ => drop(cache.settle_prefill(layer, end, pages)),
            }
            if give_up == Some((layer, true)) {
                cache.undo_prefill(end, layer + 1, None);
                return Ok(());
            }
        }
        cache.end_prefill(end);
        plain.tokens = tokens;
        plain.counters.after_prefill(end);
        Ok(())
    }

    /// As src/decode.rs does it, with a speculative row in each step, which is overwritten by the next.
    fn decode(&mut self, which: usize, steps: usize) {
        let (cache, plain) = &mut self.sequences[which];
        if plain.tokens.is_empty() {
            return;
        }
        cache.reserve(plain.tokens.len() + steps + 1).unwrap();
        for _ in 0..steps {
            let at = plain.tokens.len();
            cache.begin_rows(2);
            for layer in 0..LAYERS {
                for (row, token) in [(at, self.next), (at + 1, u64::MAX)] {
                    let (k, v) = pair(token, layer);
                    cache.write(layer, row, &k, &v);
                }
            }
            cache.advance();
            plain.tokens.push(self.next);
            plain.counters.advance();
            self.next += 1;
        }
    }

    fn truncate(&mut self, which: usize, n: usize) -> Result<(), TestCaseError> {
        let (cache, plain) = &mut self.sequences[which];
        if plain.tokens.is_empty() {
            return Ok(());
        }
        let n = 1 + n % plain.tokens.len();
        let mut counters = Counters::new(&self.options);
        counters.after_prefill(n);
        // Where the 16-bit pairs are gone, it says so and changes nothing.
        let gone = !self.options.mode.on_host() && counters.nq < plain.counters.nq;
        prop_assert_eq!(cache.truncate(n).is_err(), gone);
        if !gone {
            plain.tokens.truncate(n);
            plain.counters = counters;
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(cases(100))]

    /// Prompts, prompts that are given up, steps, truncations and forks in any order, in every mode: each sequence holds its
    /// own tokens and nobody else's, on the device and on the host; in the end nothing is held.
    #[test]
    fn a_cache_holds_what_it_was_given(mode in modes(), residual_len in 32usize..140, events in events()) {
        let mut world = World::new(mode, residual_len);
        let device = world.device.clone();
        device.run(|| events.iter().try_for_each(|(which, event)| world.event(*which, event)))?;
        let slab = world.slab.clone();
        drop(world);
        let stats = slab.stats();
        prop_assert_eq!((stats.leased, stats.reserved, device.device_memory().used()), (0, 0, 0));
    }
}
