//! A deterministic simulation of a decode step's pipeline: the schedules of [`crate::kv::prefetch`] with given operation
//! costs, for planning on cards that are not there and for holding the schedules against their bound.
//!
//! Three resources work beside each other: the compute stream, whoever gathers, and the link from the host. A layer's
//! prefetch is issued when its attention has been computed and is needed by the same layer's attention one step later.
//! Gather and link are joined by the staging blocks of [`crate::kv::fetch`].

use std::time::Duration;

pub use crate::device::Schedule;
use crate::kv::cache::CacheBytes;
use crate::kv::fetch::staging_depth;
use crate::kv::options::{KvMode, KvOptions, PAGE};
use crate::kv::{Counters, KvShape};
use crate::model::Config;

/// Costs of a decode step, microseconds and bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// L.
    pub n_layers: usize,
    /// Norm, QKV, attention and selection of a layer.
    pub attention_us: f64,
    /// Output projection and MLP of a layer.
    pub rest_us: f64,
    /// Embedding, final norm, LM head.
    pub head_us: f64,
    /// Bytes that a layer fetches for the whole batch.
    pub fetch_bytes: f64,
    /// Sequences: copies that `stream` makes per layer.
    pub sequences: usize,
    /// Start-up time of a copy, the gather's included.
    pub copy_latency_us: f64,
    /// Bytes per microsecond that are gathered; infinite where copies gather by themselves.
    pub gather_bytes_per_us: f64,
    /// Bytes per microsecond of the link; with the gather, where copies gather by themselves.
    pub link_bytes_per_us: f64,
}

/// One layer of one step on the time line, microseconds from the step's begin.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerTimes {
    /// The compute stream is ready for this layer's attention.
    pub ready_us: f64,
    /// Attention begins: later than `ready_us` by the exposed time.
    pub begin_us: f64,
    /// The layer is done.
    pub end_us: f64,
    /// The gather of this layer's prefetch for the next step begins.
    pub gather_begin_us: f64,
    /// Its last gather is done.
    pub gather_end_us: f64,
    /// The link begins with its first copy.
    pub copy_begin_us: f64,
    /// The link is done with it. May lie in the next step.
    pub copy_end_us: f64,
}

/// A step in the steady state.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Length of the step.
    pub step_us: f64,
    /// Part of it that computation waited.
    pub exposed_us: f64,
    /// Every layer.
    pub layers: Vec<LayerTimes>,
}

impl Costs {
    /// A step without any wait.
    pub fn compute_us(&self) -> f64 {
        self.n_layers as f64 * (self.attention_us + self.rest_us) + self.head_us
    }

    /// What the link is busy for in a step, if each layer is one copy.
    pub fn copy_us(&self) -> f64 {
        self.n_layers as f64 * self.part_copy_us(1)
    }

    /// What the gather is busy for in a step.
    pub fn gather_us(&self) -> f64 {
        self.n_layers as f64 * self.part_gather_us(1)
    }

    /// No schedule can be faster: compute, gather and link are never idle while another is the narrowest.
    pub fn bound_us(&self) -> f64 {
        self.compute_us().max(self.copy_us()).max(self.gather_us())
    }

    /// The copy of one of `parts` equal parts of a layer's fetch.
    fn part_copy_us(&self, parts: usize) -> f64 {
        if self.fetch_bytes == 0.0 {
            return 0.0;
        }
        self.copy_latency_us + self.fetch_bytes / parts as f64 / self.link_bytes_per_us
    }

    /// The gather of one of `parts` equal parts.
    fn part_gather_us(&self, parts: usize) -> f64 {
        if self.fetch_bytes == 0.0 {
            return 0.0; // at whatever rate, that of nothing in some time included
        }
        self.fetch_bytes / parts as f64 / self.gather_bytes_per_us
    }

    /// Staging blocks, as [`crate::kv::fetch`] chooses them.
    fn depth(&self, schedule: Schedule) -> usize {
        let time = |us: f64| Duration::from_secs_f64(us / 1e6);
        match schedule {
            Schedule::Serial => 1,
            Schedule::Stream => 2,
            Schedule::Event => {
                let layer = time(self.compute_us() / self.n_layers as f64);
                staging_depth(time(self.part_gather_us(1)), time(self.part_copy_us(1)), layer)
            }
        }
    }

    /// The last of many steps: where the link is just too slow, it falls behind by a little each step, and it takes a
    /// while until the slack of a whole step is used up.
    pub fn simulate(&self, schedule: Schedule) -> Step {
        const STEPS: usize = 4096;
        let mut link = Link::new(self, schedule);
        let mut now = 0.0f64;
        let mut arrived = vec![0.0f64; self.n_layers];
        let mut step = Step { step_us: 0.0, exposed_us: 0.0, layers: Vec::new() };
        for _ in 0..STEPS {
            let begin = now;
            step = Step { step_us: 0.0, exposed_us: 0.0, layers: Vec::with_capacity(self.n_layers) };
            for arrival in &mut arrived {
                let ready = now;
                let needed = match schedule {
                    Schedule::Serial => now,
                    Schedule::Stream => link.free,
                    Schedule::Event => *arrival,
                };
                let start = ready.max(needed);
                step.exposed_us += start - ready;
                now = start + self.attention_us;
                let mut layer = link.fetch(now);
                *arrival = layer.copy_end_us;
                if schedule == Schedule::Serial {
                    step.exposed_us += layer.copy_end_us - now;
                    now = layer.copy_end_us;
                }
                now += self.rest_us;
                (layer.ready_us, layer.begin_us, layer.end_us) = (ready, start, now);
                step.layers.push(layer.since(begin));
            }
            now += self.head_us;
            step.step_us = now - begin;
        }
        step
    }
}

impl LayerTimes {
    fn since(self, begin: f64) -> LayerTimes {
        LayerTimes {
            ready_us: self.ready_us - begin,
            begin_us: self.begin_us - begin,
            end_us: self.end_us - begin,
            gather_begin_us: self.gather_begin_us - begin,
            gather_end_us: self.gather_end_us - begin,
            copy_begin_us: self.copy_begin_us - begin,
            copy_end_us: self.copy_end_us - begin,
        }
    }
}

/// Gather, staging blocks and link, and when each is free.
struct Link {
    parts: usize,
    gather_us: f64,
    copy_us: f64,
    gather_free: f64,
    free: f64,
    blocks: Vec<f64>,
    turn: usize,
}

impl Link {
    fn new(costs: &Costs, schedule: Schedule) -> Link {
        let parts = if schedule == Schedule::Stream { costs.sequences } else { 1 };
        Link {
            parts,
            gather_us: costs.part_gather_us(parts),
            copy_us: costs.part_copy_us(parts),
            gather_free: 0.0,
            free: 0.0,
            blocks: vec![0.0; costs.depth(schedule)],
            turn: 0,
        }
    }

    /// A layer's fetch, which is issued at `now`: all its parts.
    fn fetch(&mut self, now: f64) -> LayerTimes {
        let mut times =
            LayerTimes { gather_begin_us: f64::INFINITY, copy_begin_us: f64::INFINITY, ..Default::default() };
        for _ in 0..self.parts {
            let block = self.turn % self.blocks.len();
            self.turn += 1;
            let gather_begin = now.max(self.gather_free).max(self.blocks[block]);
            self.gather_free = gather_begin + self.gather_us;
            let copy_begin = self.gather_free.max(self.free);
            self.free = copy_begin + self.copy_us;
            self.blocks[block] = self.free;
            times.gather_begin_us = times.gather_begin_us.min(gather_begin);
            times.copy_begin_us = times.copy_begin_us.min(copy_begin);
        }
        (times.gather_end_us, times.copy_end_us) = (self.gather_free, self.free);
        times
    }
}

/// What a card can do, for estimates. Figures of its data sheet unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// The name on the command line.
    pub name: &'static str,
    /// Multiprocessors.
    pub n_sms: u32,
    /// Compute capability.
    pub arch: (u32, u32),
    /// Device memory, GiB.
    pub memory_gib: f64,
    /// Memory bandwidth, GB/s.
    pub memory_gbps: f64,
    /// Share of it that a good kernel reads: 81 % was measured on an H200 (3.9 of 4.8 TB/s).
    pub read_share: f64,
    /// Scattered 512-byte rows from pinned host memory, GB/s: 31 were measured on an H200 with PCIe 5 (others report 35 to 37:
    /// nvbandwidth on H100, ESS); half of that is assumed for PCIe 4.
    pub gather_gbps: f64,
    /// From the end of a selection to the first byte of its copy, microseconds: a launch and a PCIe round trip.
    pub copy_latency_us: f64,
    /// What attention over a packed page takes a multiprocessor, microseconds for one KV head of 128 channels: it is bound by
    /// instructions and not by memory. Fitted to an H200's steps (docs/measurements/2026-11-26-h200-second.md), and taken
    /// for the same on other cards, whose clocks are within a quarter of its 1.98 GHz.
    pub packed_page_us: f64,
    /// Starts and ends of a layer's kernels, when not all of memory's bandwidth is used, microseconds; fitted like that.
    pub layer_us: f64,
    /// What forks and joins of queues cost a layer more where pairs are fetched, microseconds: measured on an H200.
    pub fetch_layer_us: f64,
}

impl Gpu {
    /// The cards that are known.
    pub const ALL: [Gpu; 4] = [
        Gpu::new("a6000", (84, (8, 6)), 48.0, 768.0, 15.5),
        Gpu::new("4090", (128, (8, 9)), 24.0, 1008.0, 15.5),
        Gpu::new("h100", (132, (9, 0)), 80.0, 3350.0, 31.0),
        Gpu::new("h200", (132, (9, 0)), 141.0, 4800.0, 31.0),
    ];

    const fn new(
        name: &'static str,
        (n_sms, arch): (u32, (u32, u32)),
        memory_gib: f64,
        memory_gbps: f64,
        gather_gbps: f64,
    ) -> Gpu {
        Gpu {
            name,
            n_sms,
            arch,
            memory_gib,
            memory_gbps,
            read_share: 0.81,
            gather_gbps,
            copy_latency_us: 8.0,
            packed_page_us: 0.52,
            layer_us: 20.0,
            fetch_layer_us: 12.0,
        }
    }

    /// The card of this name.
    pub fn named(name: &str) -> Option<Gpu> {
        Gpu::ALL.into_iter().find(|gpu| gpu.name == name)
    }

    /// Sequences of `context` tokens that memory has room for while they decode: 16-bit weights and the device's part
    /// of their caches, nothing else.
    pub fn largest_batch(&self, config: &Config, kv: &KvOptions, context: usize) -> usize {
        let cache = CacheBytes::plan(&KvShape::new(config, kv), kv, context + 1).device();
        let free = self.memory_gib * (1u64 << 30) as f64 - weight_bytes(config);
        (free / cache as f64).max(0.0) as usize
    }

    /// Costs of a decode step from bytes over bandwidth, packed pages from the time that they take: weights are read once for
    /// all rows, every sequence reads its own KV. Of an H200's measured steps this is within 8 % with one to four sequences;
    /// eight and more are bound by arithmetic, and by multiprocessors that gathers take, and up to 1.8 times as long.
    ///
    /// `fetched_share` is the share of the k pairs that are not there already (1 without delta prefetch).
    pub fn costs(&self, config: &Config, kv: &KvOptions, context: usize, batch: usize, fetched_share: f64) -> Costs {
        let shape = KvShape::new(config, kv);
        let us = |bytes: f64| bytes / (self.memory_gbps * self.read_share * 1e3);
        let (h, d, hkv) = (config.n_heads as f64, config.head_dim as f64, config.n_kv_heads as f64);
        let hidden = config.hidden_size as f64;
        let qkv = 2.0 * hidden * d * (h + 2.0 * hkv);
        let rest = 2.0 * hidden * (d * h + 3.0 * config.intermediate_size as f64);
        let head = 2.0 * hidden * config.vocab_size as f64;

        let mut counters = Counters::new(kv);
        counters.after_prefill(context);
        let low = if kv.mode.low_bit() { counters.nq } else { 0 };
        let wide = (context - low) as f64 * hkv * shape.pair_bytes() as f64;
        let pages = batch as f64 * (low / PAGE) as f64;
        let page_us = self.packed_page_us * hkv * d / 128.0 / f64::from(self.n_sms);
        let packed_us = pages * page_us.max(us(shape.packed_page_bytes() as f64));
        let pairs = if kv.mode.fetches() { kv.top_k.min(counters.no) as f64 } else { 0.0 };
        let slots = pairs * hkv * shape.pair_bytes() as f64;
        let wide_us = us(qkv + batch as f64 * (wide + slots));
        let around_us = self.layer_us + if kv.mode.fetches() { self.fetch_layer_us } else { 0.0 };
        let fetch_bytes = match kv.mode {
            KvMode::Offload => counters.nq as f64 * hkv * shape.pair_bytes() as f64,
            _ => slots * fetched_share,
        };
        Costs {
            n_layers: config.n_layers,
            attention_us: wide_us + packed_us + around_us / 2.0,
            rest_us: us(rest) + around_us / 2.0,
            head_us: us(head),
            fetch_bytes: batch as f64 * fetch_bytes,
            sequences: batch,
            copy_latency_us: self.copy_latency_us,
            gather_bytes_per_us: f64::INFINITY,
            link_bytes_per_us: self.gather_gbps * 1e3,
        }
    }
}

/// Bytes of all matrices at 16 bits.
fn weight_bytes(config: &Config) -> f64 {
    let (hidden, d) = (config.hidden_size as f64, config.head_dim as f64);
    let attention = 2.0 * d * hidden * (config.n_heads + config.n_kv_heads) as f64;
    let mlp = 3.0 * hidden * config.intermediate_size as f64;
    let vocab = hidden * config.vocab_size as f64 * if config.tie_word_embeddings { 1.0 } else { 2.0 };
    2.0 * (config.n_layers as f64 * (attention + mlp) + vocab)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(fetch_us: f64, latency: f64, sequences: usize) -> Costs {
        Costs {
            n_layers: 32,
            attention_us: 30.0,
            rest_us: 70.0,
            head_us: 200.0,
            fetch_bytes: fetch_us,
            sequences,
            copy_latency_us: latency,
            gather_bytes_per_us: f64::INFINITY,
            link_bytes_per_us: 1.0,
        }
    }

    /// Gather and copy of 60 us each: one staging block lets them take turns, two let them overlap.
    #[test]
    fn gather_and_copy_overlap() {
        let apart = Costs { gather_bytes_per_us: 1.0, copy_latency_us: 0.0, ..costs(60.0, 0.0, 1) };
        assert_eq!(apart.depth(Schedule::Event), 2);
        let (event, serial) = (apart.simulate(Schedule::Event), apart.simulate(Schedule::Serial));
        assert_eq!((event.step_us, event.exposed_us), (3400.0, 0.0));
        assert_eq!(serial.exposed_us, 32.0 * 120.0);
        // Layers of 100 us need no overlap for 40 + 40.
        let short = Costs { fetch_bytes: 40.0, ..apart };
        assert_eq!(short.depth(Schedule::Event), 1);
        assert_eq!(short.simulate(Schedule::Event).exposed_us, 0.0);
        // Both the narrowest: never more than the bound.
        let narrow = Costs { fetch_bytes: 150.0, ..apart };
        assert!(narrow.simulate(Schedule::Event).step_us <= narrow.bound_us() * 1.01);
    }

    /// A step in which every pair was in its slot already: gathering nothing took some time, so the rates are 0.
    #[test]
    fn nothing_to_fetch_takes_no_time() {
        let none = Costs { gather_bytes_per_us: 0.0, link_bytes_per_us: 0.0, ..costs(0.0, 5.0, 2) };
        for schedule in Schedule::ALL {
            let step = none.simulate(schedule);
            assert_eq!((step.step_us, step.exposed_us), (3400.0, 0.0), "{schedule:?}");
        }
    }

    /// Worked by hand: 32 layers of 100 us and a head of 200 us; a fetch of 50 us.
    #[test]
    fn a_step_worked_by_hand() {
        let c = costs(45.0, 5.0, 1);
        assert_eq!((c.compute_us(), c.copy_us(), c.bound_us()), (3400.0, 1600.0, 3400.0));
        let serial = c.simulate(Schedule::Serial);
        assert_eq!((serial.step_us, serial.exposed_us), (3400.0 + 32.0 * 50.0, 32.0 * 50.0));
        // The copy of the layer before is done 20 us before the next layer is ready.
        let stream = c.simulate(Schedule::Stream);
        assert_eq!((stream.step_us, stream.exposed_us), (3400.0, 0.0));
        let event = c.simulate(Schedule::Event);
        assert_eq!((event.step_us, event.exposed_us), (3400.0, 0.0));
    }

    /// A fetch that is longer than the rest of its layer, but not than the layer: only `event` hides it.
    #[test]
    fn only_events_hide_what_outlasts_the_layer() {
        let c = costs(90.0, 5.0, 1);
        let stream = c.simulate(Schedule::Stream);
        // 25 us at each layer but the first, which has the head's time behind it.
        assert!((stream.exposed_us - 31.0 * 25.0).abs() < 1e-6, "{}", stream.exposed_us);
        assert_eq!(c.simulate(Schedule::Event).exposed_us, 0.0);
    }

    /// Where the link is the narrower, `event` runs at the link's pace, never below the bound.
    #[test]
    fn events_reach_the_bound_on_both_sides_of_it() {
        for fetch_us in [0.0, 1.0, 50.0, 99.0, 105.0, 106.0, 110.0, 200.0, 1000.0] {
            for sequences in [1, 8, 24] {
                let c = costs(fetch_us, 2.0, sequences);
                let steps = Schedule::ALL.map(|s| c.simulate(s).step_us);
                assert!(steps[2] <= c.bound_us() * 1.01, "{fetch_us}: {} over {}", steps[2], c.bound_us());
                assert!(steps.iter().all(|&s| s >= c.bound_us() - 1e-6), "{fetch_us}: {steps:?}");
                assert!(steps[2] <= steps[1] && steps[1] <= steps[0] + 1e-6, "{fetch_us}: {steps:?}");
            }
        }
    }

    /// Llama-3-8B on two cards, from one sequence to as many as memory holds, with copies that gather by themselves and
    /// with a pool that is faster or slower than the link: exposed time is at most 1 % of the step where link and
    /// gather can follow; where they cannot, `event` is within 3 % of their pace. No other schedule is faster.
    #[test]
    fn events_hide_what_can_be_hidden() {
        let config = crate::model::synthetic::config("llama-3-8b").unwrap();
        let (mut hidden, mut bound_by_link, mut bound_by_gather) = (0, 0, 0);
        for gpu in ["h200", "a6000"].map(|name| Gpu::named(name).unwrap()) {
            for bits in [1, 2] {
                let kv = KvOptions { bits, ..KvOptions::default() };
                for context in [8 << 10, 32 << 10, 128 << 10] {
                    let largest = gpu.largest_batch(&config, &kv, context);
                    assert!(largest > 4, "{}, {bits} bits, {context} tokens: {largest}", gpu.name);
                    for (batch, gather_gbps) in [1, 4, largest / 2, largest].into_iter().flat_map(|batch| {
                        [f64::INFINITY, 1.5 * gpu.gather_gbps, 0.3 * gpu.gather_gbps].map(|g| (batch, g))
                    }) {
                        let costs = gpu.costs(&config, &kv, context, batch, 1.0);
                        let costs = Costs { gather_bytes_per_us: gather_gbps * 1e3, ..costs };
                        let [serial, event] = [Schedule::Serial, Schedule::Event].map(|s| costs.simulate(s));
                        let what = format!(
                            "{}, {bits} bits, {context} tokens, batch {batch}, gather {gather_gbps} GB/s: {} us exposed of {}, \
                             bound {}",
                            gpu.name,
                            event.exposed_us,
                            event.step_us,
                            costs.bound_us()
                        );
                        assert!(event.step_us <= serial.step_us, "{what}");
                        // A copy for each sequence: hundreds take long to simulate, and are no faster than few.
                        if batch <= 64 {
                            assert!(event.step_us <= costs.simulate(Schedule::Stream).step_us, "{what}");
                        }
                        if costs.bound_us() <= costs.compute_us() {
                            hidden += 1;
                            assert!(event.exposed_us <= 0.01 * event.step_us, "{what}");
                        } else {
                            let by_link = costs.copy_us() >= costs.gather_us();
                            *(if by_link { &mut bound_by_link } else { &mut bound_by_gather }) += 1;
                            assert!(event.step_us <= 1.03 * costs.bound_us(), "{what}");
                        }
                    }
                }
            }
        }
        let cases = [hidden, bound_by_link, bound_by_gather];
        assert!(cases.iter().all(|&n| n > 10), "{cases:?}: all three are there");
    }

    /// 16 GB of weights and 80 bytes a token, layer and KV head beside the residual.
    #[test]
    fn the_largest_batch_is_what_memory_holds() {
        let config = crate::model::synthetic::config("llama-3-8b").unwrap();
        let batch = |name: &str, mode: KvMode| {
            let kv = KvOptions { mode, ..KvOptions::default() };
            Gpu::named(name).unwrap().largest_batch(&config, &kv, 32 << 10)
        };
        // 48 GiB less 16.06 GB are 35.5 GB; a full cache of 32k tokens is 4.3 GB, a 2-bit one 0.67 GB and its 16-bit
        // parts.
        assert_eq!(batch("a6000", KvMode::Full), 8);
        assert!((45..53).contains(&batch("a6000", KvMode::SpeCache)), "{}", batch("a6000", KvMode::SpeCache));
        let small = Gpu { memory_gib: 14.0, ..Gpu::named("4090").unwrap() };
        assert_eq!(small.largest_batch(&config, &KvOptions::default(), 1 << 10), 0, "the weights alone are more");
    }

    /// Tokens a second of an H200 (docs/measurements/2026-11-26-h200-second.md).
    #[test]
    fn estimates_are_near_what_was_measured() {
        let config = crate::model::synthetic::config("llama-3.1-8b").unwrap();
        for (context, batch, mode, measured) in [
            (8, 1, KvMode::Full, 209.1),
            (8, 1, KvMode::Kivi, 216.8),
            (8, 1, KvMode::SpeCache, 206.2),
            (32, 1, KvMode::Full, 181.7),
            (32, 1, KvMode::Kivi, 206.6),
            (32, 1, KvMode::SpeCache, 191.7),
            (128, 1, KvMode::Full, 119.1),
            (128, 1, KvMode::SpeCache, 149.7),
            (128, 4, KvMode::Full, 195.8),
            (128, 4, KvMode::SpeCache, 306.4),
        ] {
            let kv = KvOptions { mode, ..KvOptions::default() };
            let costs = Gpu::named("h200").unwrap().costs(&config, &kv, context << 10, batch, 1.0);
            let estimated = batch as f64 * 1e6 / costs.simulate(Schedule::Event).step_us;
            let ratio = estimated / measured;
            assert!((0.92..1.08).contains(&ratio), "{context}k, {batch}, {mode:?}: {estimated:.1} for {measured}");
        }
    }

    #[test]
    fn estimates_of_a_known_card() {
        let config = crate::model::synthetic::config("llama-3-8b").unwrap();
        let kv = KvOptions::default();
        let gpu = Gpu::named("h200").unwrap();
        let c = gpu.costs(&config, &kv, 32_768, 1, 1.0);
        // k pairs of 512 bytes for 8 KV heads: 262,144 bytes a layer, 8.4 MB a step, 271 us at 31 GB/s.
        assert_eq!(c.fetch_bytes, 262_144.0);
        assert!((c.copy_us() - 32.0 * c.copy_latency_us - 270.6).abs() < 1.0, "{}", c.copy_us());
        // 15 GB of weights at 3.9 TB/s are 3.9 ms; 512 packed pages of 8 heads and 32 layers, 0.5 ms; 32 us a layer, 1.0 ms.
        assert!((5300.0..5500.0).contains(&c.compute_us()), "{}", c.compute_us());
        assert_eq!(c.simulate(Schedule::Event).exposed_us, 0.0);
        assert!(Gpu::named("voodoo").is_none());
    }
}
