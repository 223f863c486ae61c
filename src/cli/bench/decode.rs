//! How fast each mode decodes, and how good it is: the modes side by side, in turns.

use std::time::Instant;

use specache::error::{Error, Result};
use specache::eval::divergence::from_full;
use specache::kv::cache::CacheBytes;
use specache::kv::{KvMode, KvOptions, KvShape};
use specache::sampler::argmax;
use specache::session::Stats;
use specache::{Buffers, Engine, Next, Session};

use super::models::{self, Fill};
use super::{SEED, prefill};
use crate::cli::args::BenchArgs;
use crate::cli::generate::Figures;
use crate::cli::progress::{Progress, say};

/// Steps before anything is timed: the first one holds the pre-decode, and both size the buffers.
const WARM_UP: usize = 2;
/// Tokens behind the prompt over which the KL divergence is taken.
const SCORED: usize = 32;

/// What was measured with one model, depth and batch.
pub struct ModelResult {
    pub model: String,
    pub synthetic: bool,
    /// Tokens in the cache when decoding begins.
    pub depth: usize,
    /// Decode steps of a repetition.
    pub n: usize,
    /// Sequences that are decoded together.
    pub batch: usize,
    /// They are forks of one, whose pages they share on the host.
    pub forks: bool,
    /// Bytes of weights that a step reads.
    pub weight_bytes: u64,
    pub modes: Vec<ModeResult>,
}

/// What was measured with one mode.
pub struct ModeResult {
    pub kv: KvOptions,
    /// Tokens of all sequences a second, in each repetition.
    pub tok_s: Vec<f64>,
    /// `None` where the cache was filled with random pairs.
    pub prefill_tok_s: Option<f64>,
    /// Seconds from the prompt to its first token; as above.
    pub first_token_s: Option<f64>,
    /// Mean KL divergence from `full`, nats; where weights are trained, and `full` is among the modes.
    pub kld: Option<f64>,
    /// Of all sequences.
    pub device_bytes: u64,
    /// Of all sequences; what forks share counts once.
    pub host_bytes: u64,
    /// Bytes of all caches that a step reads at least, from the device's memory.
    pub kv_reads: u64,
    pub fetched_bytes_per_step: Option<f64>,
    pub exposed_us_per_step: Option<f64>,
    pub hit_rate: Option<f64>,
    pub acceptance: Option<f64>,
}

/// All modes of one model at one depth and batch.
pub fn bench(
    args: &BenchArgs,
    engine: &Engine,
    model: &str,
    depth: Option<usize>,
    batch: usize,
    progress: &mut Progress,
) -> Result<ModelResult> {
    // The LM head has the embedding's size, and a step reads one of the two whole.
    let weight_bytes = engine.model().weights.bytes(true);
    let n = args.n_predict.unwrap_or(if weight_bytes < 1_000_000_000 { 64 } else { 6 });
    let fill = models::fill(engine, model, depth, SCORED)?;
    let waits = if engine.device().is_gpu() { n.div_ceil(8) } else { 0 };
    // Each repetition has a step that is not timed.
    let steps = n.checked_add(1 + waits).and_then(|n| n.checked_mul(args.repetitions));
    let steps = steps.and_then(|steps| steps.checked_add(WARM_UP.max(SCORED) + fill.depth()));
    let capacity = steps.ok_or_else(|| Error::Usage("-n, -d, -r: too many tokens for any context".into()))?;

    warn_beyond_training(engine, fill.depth());
    progress.announce(format_args!("{model}: {} tokens in the cache, batch {batch}", fill.depth()));
    let modes: Vec<KvOptions> = args.kv.iter().map(|&mode| args.tuning.options(mode)).collect();
    let forks = batch > 1 && (args.forks || matches!(fill, Fill::Prompt { .. }));
    check_room(engine, &modes, batch, capacity, forks)?;
    let mut buffers = Buffers::default();
    let mut cases = Vec::new();
    for kv in modes {
        progress.show(format_args!("{model}: {} tokens into the cache, {}", fill.depth(), kv.mode.name()));
        let (fresh, copies) = if forks { (1, batch - 1) } else { (batch, 0) };
        cases.push(Case::new(engine, kv, (fresh, copies), capacity, &fill, &mut buffers)?);
    }
    let kld = match &fill {
        Fill::Prompt { next, .. } if cases.iter().any(|case| case.kv().mode == KvMode::Full) => {
            progress.show(format_args!("{model}: KL divergence over {} tokens", next.len()));
            divergences(engine, &mut cases, next, &mut buffers)?
        }
        _ => vec![None; cases.len()],
    };
    for case in &mut cases {
        case.warm_up(engine, &mut buffers)?;
    }
    for repetition in 1..=args.repetitions {
        for case in &mut cases {
            let mode = case.kv().mode.name();
            progress.show(format_args!("{model}: repetition {repetition} of {}, {mode}", args.repetitions));
            case.repeat(engine, n, waits, &mut buffers)?;
        }
    }
    let modes = cases.into_iter().zip(kld).map(|(case, kld)| case.result(engine, fill.depth(), kld)).collect();
    let (model, synthetic) = (engine.model().name.clone(), engine.model().synthetic);
    Ok(ModelResult { model, synthetic, depth: fill.depth(), n, batch, forks, weight_bytes, modes })
}

/// Whether the caches of all modes have room together, before any of them is made: what one has been granted shows in free memory
/// only when it is written.
fn check_room(engine: &Engine, modes: &[KvOptions], batch: usize, capacity: usize, forks: bool) -> Result<()> {
    let all = |bytes: u64| bytes.saturating_mul(batch as u64);
    let (mut device, mut host) = (0u64, 0u64);
    for kv in modes {
        let one = engine.plan(kv, capacity)?;
        device = device.saturating_add(all(one.device()));
        host = host.saturating_add(if forks { one.host } else { all(one.host) });
    }
    let what =
        format!("{} KV modes with a batch of {batch} caches of {capacity} tokens each (--kv, -b, -d)", modes.len());
    engine.device().grant(device, host, &what).map(drop)
}

/// Speed does not depend on it, but what comes out of a model does.
pub fn warn_beyond_training(engine: &Engine, tokens: usize) {
    let config = &engine.model().config;
    if tokens > config.max_positions && !engine.model().synthetic {
        say(format_args!(
            "warning: {tokens} tokens, but the model's max_position_embeddings is {}",
            config.max_positions
        ));
    }
}

/// The mean KL divergence of each case from `full`, nats, while forks of all of them are fed the same tokens.
fn divergences(engine: &Engine, cases: &mut [Case], tokens: &[u32], buffers: &mut Buffers) -> Result<Vec<Option<f64>>> {
    let fork = |case: &mut Case| engine.device().run(|| case.sessions[0].fork());
    let mut forks = match cases.iter_mut().map(fork).collect::<Result<Vec<Session>>>() {
        Ok(forks) => forks,
        Err(why @ Error::OutOfMemory { .. }) => {
            say(format_args!("no KL divergence: {why}"));
            return Ok(vec![None; cases.len()]);
        }
        Err(why) => return Err(why),
    };
    let full = cases.iter().position(|case| case.kv().mode == KvMode::Full).expect("looked for before");
    let mut sums = vec![0.0; forks.len()];
    for &token in tokens {
        let mut batch: Vec<Next> = forks.iter_mut().map(|session| Next { session, token }).collect();
        engine.decode(&mut batch, buffers)?;
        (0..sums.len()).try_for_each(|i| buffers.logits(i).map(drop))?;
        let exact = buffers.logits_on_host(full)?;
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum += from_full(exact, buffers.logits_on_host(i)?);
        }
    }
    Ok(sums.into_iter().map(|sum| Some(sum / tokens.len() as f64)).collect())
}

/// One mode under measurement.
struct Case {
    sessions: Vec<Session>,
    tokens: Vec<u32>,
    /// Of all sequences, what they share once.
    host_bytes: u64,
    /// Tokens and seconds of the prompt.
    prefill: Option<(usize, f64)>,
    /// Figures after the warm-up.
    before: Stats,
    tok_s: Vec<f64>,
}

impl Case {
    /// So many sequences that are filled, and so many forks of the first.
    fn new(
        engine: &Engine,
        kv: KvOptions,
        (fresh, forks): (usize, usize),
        capacity: usize,
        fill: &Fill,
        buffers: &mut Buffers,
    ) -> Result<Case> {
        let pages_before = engine.host_pages().promised();
        let sessions = (0..fresh).map(|_| engine.session(kv, capacity));
        let (mut sessions, mut prefilled) = (sessions.collect::<Result<Vec<Session>>>()?, None);
        let first = match fill {
            Fill::Random { tokens, first } => {
                for (i, session) in sessions.iter_mut().enumerate() {
                    engine.device().run(|| session.fill_synthetic(*tokens, SEED + i as u64))?;
                }
                *first
            }
            Fill::Prompt { tokens, .. } => {
                let (logits, seconds) = prefill(engine, &mut sessions[0], tokens, buffers)?;
                prefilled = Some((tokens.len(), seconds));
                argmax(&logits)
            }
        };
        for _ in 0..forks {
            let fork = engine.device().run(|| sessions[0].fork())?;
            sessions.push(fork);
        }
        // Forks with the same next token would want the same pairs at every step, and find them in the host's caches.
        let vocab = engine.model().config.vocab_size as u32;
        let token = |i: usize| if engine.model().synthetic && forks > 0 { (first + i as u32) % vocab } else { first };
        let tokens = (0..sessions.len()).map(token).collect();
        let pages = engine.host_pages();
        let host_bytes = (pages.promised() - pages_before) as u64 * pages.page_bytes as u64;
        Ok(Case { sessions, tokens, host_bytes, prefill: prefilled, before: Stats::default(), tok_s: Vec::new() })
    }

    fn warm_up(&mut self, engine: &Engine, buffers: &mut Buffers) -> Result<()> {
        (0..WARM_UP).try_for_each(|_| self.step(engine, buffers))?;
        self.before = self.sessions[0].stats().clone();
        Ok(())
    }

    fn kv(&self) -> &KvOptions {
        self.sessions[0].kv()
    }

    /// A step that is not timed, as another mode has just had the caches, `n` that are, and `waits` in which a GPU measures how
    /// long it waits for copies: the events for that would cost the others some percent.
    fn repeat(&mut self, engine: &Engine, n: usize, waits: usize, buffers: &mut Buffers) -> Result<()> {
        self.step(engine, buffers)?;
        let start = Instant::now();
        for _ in 0..n {
            self.step(engine, buffers)?;
        }
        self.tok_s.push((n * self.sessions.len()) as f64 / start.elapsed().as_secs_f64().max(1e-9));
        engine.device().measure_waits(true);
        let measured = (0..waits).try_for_each(|_| self.step(engine, buffers));
        engine.device().measure_waits(false);
        measured
    }

    fn step(&mut self, engine: &Engine, buffers: &mut Buffers) -> Result<()> {
        let next = self.sessions.iter_mut().zip(&self.tokens).map(|(session, &token)| Next { session, token });
        engine.decode(&mut next.collect::<Vec<_>>(), buffers)?;
        for (i, token) in self.tokens.iter_mut().enumerate() {
            *token = buffers.argmax(i)?;
        }
        Ok(())
    }

    fn result(self, engine: &Engine, depth: usize, kld: Option<f64>) -> ModeResult {
        let (kv, batch) = (*self.kv(), self.sessions.len() as u64);
        // Waits are the same for all sequences of a batch; what they fetch is much the same.
        let (figures, stats, before) = (Figures::of(engine, &self.sessions[0]), self.sessions[0].stats(), &self.before);
        let copies = |per_step: f64| kv.mode.on_host().then_some(per_step);
        let fetched = (stats.fetched_bytes - before.fetched_bytes) as f64 / (stats.steps - before.steps) as f64;
        let measured = (stats.exposed_steps - before.exposed_steps) as f64;
        let exposed_us = (stats.exposed - before.exposed).as_secs_f64() * 1e6;
        let shape = KvShape::new(&engine.model().config, &kv);
        ModeResult {
            kv,
            device_bytes: self.sessions.iter().map(|session| session.cache_bytes().device()).sum(),
            host_bytes: self.host_bytes,
            kv_reads: batch * CacheBytes::step_reads(&shape, &kv, depth),
            prefill_tok_s: self.prefill.map(|(tokens, seconds)| tokens as f64 / seconds),
            first_token_s: self.prefill.map(|(_, seconds)| seconds),
            kld,
            fetched_bytes_per_step: copies(fetched * batch as f64),
            exposed_us_per_step: copies(exposed_us / measured).filter(|us| us.is_finite()),
            hit_rate: figures.hit_rate,
            acceptance: figures.acceptance,
            tok_s: self.tok_s,
        }
    }
}
