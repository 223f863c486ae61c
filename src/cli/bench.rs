//! `bench`: the KV modes side by side, in turns, on one machine.

mod models;
mod overlap;
mod report;
mod simulate;
mod timeline;

use std::time::Instant;

use specache::context::MAX_CONTEXT;
use specache::device::{Device, interrupt};
use specache::error::{Error, Result};
use specache::kv::cache::CacheBytes;
use specache::kv::{KvMode, KvOptions, KvShape};
use specache::sampler::argmax;
use specache::session::Stats;
use specache::{Buffers, Engine, Next, Prompt, Session};

use self::models::Fill;
use self::report::Report;
use super::args::BenchArgs;
use super::generate::Figures;
use super::progress::{Progress, say};

/// Steps before anything is timed: the first one holds the pre-decode, and both size the buffers.
const WARM_UP: usize = 2;
/// Seed of the random pairs.
const SEED: u64 = 1;

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the arguments or a model.
pub fn run(args: BenchArgs) -> Result<()> {
    check(&args)?;
    check_combination(&args)?;
    if args.simulate {
        return simulate::run(&args);
    }
    if args.overlap {
        return overlap::run(&args);
    }
    let start = Instant::now();
    let mut progress = Progress::new();
    progress.announce("measuring how fast this device reads its memory");
    let mut report = Report::new(&args.output, machine(&args)?);
    let models = models::chosen(&args.model);
    progress.clear();
    report.begin()?;
    for model in models {
        let result = bench(&args, &model, &mut progress)?;
        progress.clear();
        report.add(result)?;
    }
    report.end()?;
    say(format_args!("took {:.1} s", start.elapsed().as_secs_f64()));
    Ok(())
}

/// What would have no effect is refused.
fn check_combination(args: &BenchArgs) -> Result<()> {
    let usage = |what: &str| Err(Error::Usage(what.into()));
    match (args.overlap, args.simulate) {
        (false, _) if args.device.trace.is_some() => usage("--trace: bench writes one with --overlap only"),
        (false, _) if args.plot.is_some() => usage("--plot: bench draws with --overlap only"),
        (false, true) if args.batch > 1 => usage("--batch: --simulate has batches of its own; leave it out"),
        (false, false) => Ok(()),
        _ if args.output != "md" => usage("-o: --overlap and --simulate print tables only"),
        _ if args.kv != KvMode::ALL => usage("--kv: --overlap and --simulate are about specache; leave it out"),
        _ => Ok(()),
    }
}

fn check(args: &BenchArgs) -> Result<()> {
    let zero = |option: &str| Err(Error::Usage(format!("{option} 0: at least one is needed")));
    match (args.n_predict, args.depth, args.repetitions) {
        (Some(0), ..) => zero("-n"),
        (_, Some(0), _) => zero("-d"),
        (_, Some(depth), _) if depth > MAX_CONTEXT => {
            Err(Error::Usage(format!("-d {depth}: at most {MAX_CONTEXT} tokens are supported")))
        }
        (.., 0) => zero("-r"),
        _ if args.batch == 0 => zero("-b"),
        _ => Ok(()),
    }
}

/// What the benchmark runs on.
pub struct Machine {
    /// Model name of the CPU.
    pub cpu: String,
    /// Threads that compute on the CPU device.
    pub threads: usize,
    pub isa: String,
    /// The device, and why this one.
    pub device: String,
    /// Whether it is a GPU: then the CPU only launches.
    pub is_gpu: bool,
    /// Gigabytes per second that the device reads from its memory; `None` where memory is too short to measure it.
    pub read_gbps: Option<f64>,
}

fn machine(args: &BenchArgs) -> Result<Machine> {
    let device = Device::open(&args.device.options()?)?;
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    Ok(Machine {
        cpu: cpu.map_or("unknown CPU", |(_, name)| name).to_string(),
        threads: device.threads(),
        isa: device.isa().to_string(),
        device: device.why_no_gpu().map_or(device.describe(), |why| format!("{}; {why}", device.describe())),
        is_gpu: device.is_gpu(),
        read_gbps: device.read_gbps()?,
    })
}

/// What was measured with one model.
pub struct ModelResult {
    pub model: String,
    pub synthetic: bool,
    /// Tokens in the cache when decoding begins.
    pub depth: usize,
    /// Decode steps of a repetition.
    pub n: usize,
    /// Sequences that are decoded together.
    pub batch: usize,
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
    /// Of all sequences.
    pub device_bytes: u64,
    /// Of all sequences.
    pub host_bytes: u64,
    /// Bytes of all caches that a step reads at least, from the device's memory.
    pub kv_reads: u64,
    pub fetched_bytes_per_step: Option<f64>,
    pub exposed_us_per_step: Option<f64>,
    pub hit_rate: Option<f64>,
    pub acceptance: Option<f64>,
}

/// All modes of one model.
fn bench(args: &BenchArgs, model: &str, progress: &mut Progress) -> Result<ModelResult> {
    progress.announce(format_args!("loading {model}"));
    let engine = Engine::load(model, &args.device.options()?)?;
    let _ctrl_c = interrupt::forward(engine.interrupt_flag());
    // The LM head has the embedding's size, and a step reads one of the two whole.
    let weight_bytes = engine.model().weights.bytes(true);
    let n = args.n_predict.unwrap_or(if weight_bytes < 1_000_000_000 { 64 } else { 6 });
    let fill = models::fill(&engine, model, args.depth)?;
    let waits = if engine.device().is_gpu() { n.div_ceil(8) } else { 0 };
    // Each repetition has a step that is not timed.
    let steps = n.checked_add(1 + waits).and_then(|n| n.checked_mul(args.repetitions));
    let steps = steps.and_then(|steps| steps.checked_add(WARM_UP + fill.depth()));
    let capacity = steps.ok_or_else(|| Error::Usage("-n, -d, -r: too many tokens for any context".into()))?;

    let mut buffers = Buffers::default();
    let mut cases = Vec::new();
    for kv in args.kv.iter().map(|&mode| args.tuning.options(mode)) {
        progress.show(format_args!("{model}: {} tokens into the cache, {}", fill.depth(), kv.mode.name()));
        cases.push(Case::new(&engine, kv, args.batch, capacity, &fill, &mut buffers)?);
    }
    for repetition in 1..=args.repetitions {
        for case in &mut cases {
            let mode = case.kv().mode.name();
            progress.show(format_args!("{model}: repetition {repetition} of {}, {mode}", args.repetitions));
            case.repeat(&engine, n, waits, &mut buffers)?;
        }
    }
    let modes = cases.into_iter().map(|case| case.result(&engine, fill.depth())).collect();
    let (model, synthetic) = (engine.model().name.clone(), engine.model().synthetic);
    Ok(ModelResult { model, synthetic, depth: fill.depth(), n, batch: args.batch, weight_bytes, modes })
}

/// One mode under measurement.
struct Case {
    sessions: Vec<Session>,
    tokens: Vec<u32>,
    prefill_tok_s: Option<f64>,
    /// Figures after the warm-up.
    before: Stats,
    tok_s: Vec<f64>,
}

impl Case {
    /// Sequences of random pairs of their own; or forks of one prompt.
    fn new(
        engine: &Engine,
        kv: KvOptions,
        batch: usize,
        capacity: usize,
        fill: &Fill,
        buffers: &mut Buffers,
    ) -> Result<Case> {
        let (mut sessions, mut prefill_tok_s) = (vec![engine.session(kv, capacity)?], None);
        let first_token;
        match fill {
            Fill::Random { tokens, first } => {
                first_token = *first;
                while sessions.len() < batch {
                    sessions.push(engine.session(kv, capacity)?);
                }
                for (i, session) in sessions.iter_mut().enumerate() {
                    engine.device().run(|| session.fill_synthetic(*tokens, SEED + i as u64))?;
                }
            }
            Fill::Prompt(tokens) => {
                let (logits, tok_s) = prefill(engine, &mut sessions[0], tokens, buffers)?;
                (first_token, prefill_tok_s) = (argmax(&logits), Some(tok_s));
                while sessions.len() < batch {
                    let fork = engine.device().run(|| sessions[0].fork())?;
                    sessions.push(fork);
                }
            }
        }
        let tokens = vec![first_token; batch];
        let mut case = Case { sessions, tokens, prefill_tok_s, before: Stats::default(), tok_s: Vec::new() };
        for _ in 0..WARM_UP {
            case.step(engine, buffers)?;
        }
        case.before = case.sessions[0].stats().clone();
        Ok(case)
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
        self.tok_s.push((n * self.sessions.len()) as f64 / start.elapsed().as_secs_f64());
        engine.device().measure_waits(true);
        let measured = (0..waits).try_for_each(|_| self.step(engine, buffers));
        engine.device().measure_waits(false);
        measured
    }

    fn step(&mut self, engine: &Engine, buffers: &mut Buffers) -> Result<()> {
        let next = self.sessions.iter_mut().zip(&self.tokens).map(|(session, &token)| Next { session, token });
        engine.decode(&mut next.collect::<Vec<_>>(), buffers)?;
        for (i, token) in self.tokens.iter_mut().enumerate() {
            *token = argmax(buffers.logits(i)?);
        }
        Ok(())
    }

    fn result(self, engine: &Engine, depth: usize) -> ModeResult {
        let (kv, batch) = (*self.kv(), self.sessions.len() as u64);
        // Waits are the same for all sequences of a batch; what they fetch is much the same.
        let (figures, stats, before) = (Figures::of(engine, &self.sessions[0]), self.sessions[0].stats(), &self.before);
        let copies = |per_step: f64| kv.mode.on_host().then_some(per_step);
        let fetched = (stats.fetched_bytes - before.fetched_bytes) as f64 / (stats.steps - before.steps) as f64;
        let measured = (stats.exposed_steps - before.exposed_steps) as f64;
        let exposed_us = (stats.exposed - before.exposed).as_secs_f64() * 1e6;
        let shape = KvShape::new(&engine.model().config, &kv);
        let sum = |of: fn(&CacheBytes) -> u64| self.sessions.iter().map(|session| of(&session.cache_bytes())).sum();
        ModeResult {
            kv,
            device_bytes: sum(CacheBytes::device),
            host_bytes: sum(|bytes| bytes.host),
            kv_reads: batch * CacheBytes::step_reads(&shape, &kv, depth),
            prefill_tok_s: self.prefill_tok_s,
            fetched_bytes_per_step: copies(fetched * batch as f64),
            exposed_us_per_step: copies(exposed_us / measured).filter(|us| us.is_finite()),
            hit_rate: figures.hit_rate,
            acceptance: figures.acceptance,
            tok_s: self.tok_s,
        }
    }
}

/// Logits of the last row, and tokens per second. A short prefill of another session goes before it, untimed, and sizes
/// the buffers.
fn prefill(engine: &Engine, session: &mut Session, tokens: &[u32], buffers: &mut Buffers) -> Result<(Vec<f32>, f64)> {
    let first = &tokens[..tokens.len().min(32)];
    let mut warm_up = engine.session(*session.kv(), first.len())?;
    engine.prefill(&mut [Prompt { session: &mut warm_up, tokens: first }], buffers)?;
    let start = Instant::now();
    let logits = engine.prefill(&mut [Prompt { session, tokens }], buffers)?.remove(0)?;
    Ok((logits, tokens.len() as f64 / start.elapsed().as_secs_f64()))
}
