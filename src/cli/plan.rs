//! `plan`: what a model and its caches take in each KV mode, what fits, and about how fast it would be; loads nothing.

use std::fmt::Write;

use serde_json::{Value, json};
use specache::context::{MAX_BATCH, MAX_CONTEXT};
use specache::device::choice::gpus;
use specache::device::cuda::probe;
use specache::device::ram;
use specache::engine::{self, GpuBytes, GpuTarget};
use specache::error::{Error, Result};
use specache::kv::cache::CacheBytes;
use specache::kv::{KvMode, KvOptions, KvShape};
use specache::model::{Config, Dtype, config_of};
use specache::sim::{Gpu, Schedule};

use super::args::PlanArgs;
use super::output::{print, table};
use super::progress::say;
use super::size;

/// Tokens of a context where none is given.
const CONTEXT: usize = 32 << 10;

/// Runs the command.
///
/// # Errors
/// [`Error::Model`] for a configuration that cannot be read, [`Error::Usage`] for options that fit no mode.
pub fn run(args: &PlanArgs) -> Result<()> {
    if args.batch == 0 {
        return Err(Error::Usage("-b 0: at least one sequence is needed".into()));
    }
    if args.batch > MAX_BATCH {
        return Err(Error::Usage(format!("-b {}: at most {MAX_BATCH} sequences are supported", args.batch)));
    }
    if args.ctx_size == Some(0) {
        return Err(Error::Usage("-c 0: at least one token is needed".into()));
    }
    for (option, bytes) in [("--vram", args.vram), ("--host", args.host)] {
        if let Some(bytes) = bytes.filter(|&bytes| bytes < 1 << 20) {
            say(format_args!("warning: {option} {bytes} is {bytes} bytes; did you mean {bytes}GiB?"));
        }
    }
    let plan = Plan::new(args)?;
    let modes = plan.modes(args)?;
    let trained = plan.config.max_positions;
    if plan.context > trained {
        say(format_args!("warning: {} tokens, but the model's max_position_embeddings is {trained}", plan.context));
    }
    modes.iter().filter_map(|mode| plan.shortage(mode)).for_each(|what| say(format_args!("note: {what}")));
    match args.output.as_str() {
        "json" => print(&format!("{:#}\n", plan.json(&modes))),
        _ => print(&plan.markdown(&modes)),
    }
}

/// What is asked.
struct Plan {
    model: String,
    config: Config,
    context: usize,
    batch: usize,
    gpu: Option<Gpu>,
    /// The GPU that computes: the named one, or this machine's.
    target: Option<GpuTarget>,
    device: Memory,
    host: Memory,
    /// Both are the same RAM: what one takes the other lacks.
    shared: bool,
    /// Of a weight, in the type that the model's config names.
    number_bytes: u64,
    /// Of all matrices.
    weight_bytes: u64,
}

/// Room, and where its size comes from.
struct Memory {
    bytes: u64,
    source: String,
}

/// What one mode takes.
struct Mode {
    kv: KvOptions,
    need: Need,
    largest_batch: u64,
    largest_context: Option<usize>,
    /// Microseconds a step, for the whole batch.
    step_us: Option<f64>,
}

/// Bytes of a context.
#[derive(Clone, Copy)]
struct Need {
    kv: KvOptions,
    context: usize,
    /// Of one sequence.
    cache: CacheBytes,
    /// While one prompt is prefilled.
    workspace: u64,
}

impl Plan {
    fn new(args: &PlanArgs) -> Result<Plan> {
        let config = config_of(&args.model)?;
        let gpu = args.gpu.as_deref().map(|name| Gpu::named(name).expect("the command line knows the same names"));
        let here = first_gpu();
        let given = |bytes: Option<u64>, option: &str| bytes.map(|bytes| Memory { bytes, source: option.into() });
        let number_bytes = if config.dtype == Some(Dtype::F32) { 4 } else { 2 };
        Ok(Plan {
            model: args.model.clone(),
            context: args.ctx_size.unwrap_or(CONTEXT.min(config.max_positions)),
            batch: args.batch,
            target: gpu
                .map(|gpu| (gpu.n_sms, gpu.arch))
                .or(here.as_ref().map(|gpu| (gpu.n_sms, gpu.arch)))
                .map(|(n_sms, arch)| GpuTarget::of(n_sms, arch)),
            shared: gpu.is_none() && here.is_none() && args.vram.is_none() && args.host.is_none(),
            device: given(args.vram, "--vram").map_or_else(|| device_memory(gpu.as_ref(), here), Ok)?,
            host: given(args.host, "--host").map_or_else(host_memory, Ok)?,
            number_bytes,
            weight_bytes: config.n_weights().saturating_mul(number_bytes),
            config,
            gpu,
        })
    }

    /// Every mode that these options suit. One that they do not suit is left out, with the reason on stderr.
    fn modes(&self, args: &PlanArgs) -> Result<Vec<Mode>> {
        let modes = KvMode::ALL.map(|mode| self.mode(args.tuning.options(mode)));
        if modes.iter().all(Result::is_err) {
            return Err(modes.into_iter().find_map(Result::err).expect("there are five"));
        }
        let said = |(mode, planned): (KvMode, Result<Mode>)| match planned {
            Ok(mode) => Some(mode),
            Err(why) => {
                say(format_args!("note: --kv {} is left out: {why}", mode.name()));
                None
            }
        };
        Ok(KvMode::ALL.into_iter().zip(modes).filter_map(said).collect())
    }

    fn mode(&self, kv: KvOptions) -> Result<Mode> {
        let need = self.need(&kv, self.context)?;
        Ok(Mode {
            kv,
            need,
            largest_batch: self.largest_batch(&need),
            largest_context: self.largest_context(&kv),
            step_us: self.gpu.map(|gpu| step_us(&gpu, &self.config, &kv, self.context, self.batch)),
        })
    }

    /// What the engine asks for: a cache, and while a prompt is prefilled two layers of it at 16 bits and its residual
    /// stream in f32; on a GPU also what is known of each token, and the rows of a chunk.
    fn need(&self, kv: &KvOptions, context: usize) -> Result<Need> {
        let cache = engine::plan(&self.config, kv, context)?;
        let pages = CacheBytes::prefill_scratch(&KvShape::new(&self.config, kv), kv, context);
        let rows = match self.target {
            Some(_) => self.on_gpu(kv, context, 1).prefill,
            None => (context as u64).saturating_mul(self.config.hidden_size as u64 * 4),
        };
        Ok(Need { kv: *kv, context, cache, workspace: pages.saturating_add(rows) })
    }

    /// What a GPU takes besides for `batch` sequences; nothing on the CPU.
    fn on_gpu(&self, kv: &KvOptions, context: usize, batch: u64) -> GpuBytes {
        let Some(target) = self.target else { return GpuBytes::default() };
        engine::plan_on_gpu(&self.config, kv, context, batch as usize, target, self.number_bytes)
    }

    /// Device and host bytes of `batch` sequences, of which one is prefilled at a time.
    fn total(&self, need: &Need, batch: u64) -> (u64, u64) {
        let GpuBytes { tables, workspace, .. } = self.on_gpu(&need.kv, need.context, batch);
        let caches = need.cache.device().saturating_add(tables).saturating_mul(batch);
        let device = caches.saturating_add(need.workspace).saturating_add(workspace);
        (device.saturating_add(self.weight_bytes), need.cache.host.saturating_mul(batch))
    }

    fn fits(&self, need: &Need, batch: u64) -> bool {
        let (device, host) = self.total(need, batch);
        match self.shared {
            true => device.saturating_add(host) <= self.device.bytes,
            false => device <= self.device.bytes && host <= self.host.bytes,
        }
    }

    fn largest_batch(&self, need: &Need) -> u64 {
        largest(MAX_BATCH, |n| self.fits(need, n as u64)) as u64
    }

    /// Whether it is host memory that lets no larger batch fit.
    fn is_bound_by_host(&self, mode: &Mode) -> bool {
        let (device, host) = self.total(&mode.need, mode.largest_batch + 1);
        !self.shared && device <= self.device.bytes && host > self.host.bytes
    }

    /// The most tokens that this batch can have each, up to what the model and the engine support; `None` if not even
    /// one fits.
    fn largest_context(&self, kv: &KvOptions) -> Option<usize> {
        let fits = |n: usize| self.need(kv, n).is_ok_and(|need| self.fits(&need, self.batch as u64));
        let fitting = largest(self.config.max_context().unwrap_or(MAX_CONTEXT).min(MAX_CONTEXT), fits);
        (fitting > 0).then_some(fitting)
    }

    /// Why a mode does not fit, and what would.
    fn shortage(&self, mode: &Mode) -> Option<String> {
        if self.fits(&mode.need, self.batch as u64) {
            return None;
        }
        let (device, host) = self.total(&mode.need, self.batch as u64);
        let short = |memory: &str, needed: u64, has: &Memory| {
            let (needed_text, bytes) = (size::show(needed), size::show(has.bytes));
            (needed > has.bytes).then(|| format!("{memory} {needed_text} of {bytes} ({})", has.source))
        };
        let parts = match self.shared {
            true => [short("device and host", device.saturating_add(host), &self.device), None],
            false => [short("device", device, &self.device), short("host", host, &self.host)],
        };
        let fix = match (mode.largest_context, mode.largest_batch) {
            _ if self.weight_bytes > self.device.bytes => "the weights alone are more".to_string(),
            (None, 0) => "no context fits".to_string(),
            (Some(tokens), 0) => format!("-b {} fits up to -c {tokens}", self.batch),
            (None, batch) => format!("-c {} fits up to -b {batch}", self.context),
            (Some(tokens), batch) => {
                format!("-b {} fits up to -c {tokens}, -c {} up to -b {batch}", self.batch, self.context)
            }
        };
        Some(format!(
            "--kv {}: {} x {} tokens do not fit: {}; {fix}",
            mode.kv.mode.name(),
            self.batch,
            self.context,
            parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
        ))
    }

    fn markdown(&self, modes: &[Mode]) -> String {
        let Plan { model, context, batch, device, host, .. } = self;
        let room =
            |name: &str, memory: &Memory| format!("{name} memory {} ({})", size::show(memory.bytes), memory.source);
        let rooms = match self.shared {
            true => room("device and host", device),
            false => format!("{}, {}", room("device", device), room("host", host)),
        };
        let mut text = format!("{model}: {batch} x {context} tokens; {rooms}\n\n");
        let header: Vec<&str> = ["bytes"].into_iter().chain(modes.iter().map(|mode| mode.kv.mode.name())).collect();
        text.push_str(&table(&header, &self.rows(modes)));
        let _ = writeln!(
            text,
            "\nWeights: all matrices (on the CPU device they are mapped files, and take memory only as they are read). \
             Workspace: one prompt at a time. The residual of `full` is all pairs."
        );
        let bound = modes.iter().filter(|mode| self.is_bound_by_host(mode)).map(|mode| mode.kv.mode.name());
        let bound: Vec<&str> = bound.collect();
        if !bound.is_empty() {
            let _ = writeln!(
                text,
                "The largest batch of {} is bound by host memory, {} ({}): see --host.",
                bound.join(", "),
                size::show(host.bytes),
                host.source
            );
        }
        if let Some(gpu) = &self.gpu {
            let _ = writeln!(
                text,
                "Steps are estimated, not measured: bytes over bandwidth on {}, {:.0} GB/s of memory of which kernels \
                 read {:.0} %, {:.1} GB/s over the link (scattered rows), {} us until a copy begins; {} us a layer for starts \
                 and ends, {} more where pairs are fetched, {} us of a multiprocessor for a packed page and KV head (fitted \
                 to an H200, which is within 8 % of this with 1 to 4 sequences); weights are read once for the batch, every \
                 selected pair is fetched; fetch waits for each layer's copy, specache hides what its event schedule hides, \
                 offload is the slower of link and computation. Batches of 8 and more are bound by arithmetic too, which \
                 this does not count: an H200 took up to 1.8 times as long.",
                gpu.name,
                gpu.memory_gbps,
                100.0 * gpu.read_share,
                gpu.gather_gbps,
                gpu.copy_latency_us,
                gpu.layer_us,
                gpu.fetch_layer_us,
                gpu.packed_page_us
            );
        } else {
            text.push_str("Name a card with --gpu for an estimate of step times.\n");
        }
        text
    }

    fn rows(&self, modes: &[Mode]) -> Vec<Vec<String>> {
        let row = |name: &str, cell: &dyn Fn(&Mode) -> String| {
            [name.to_string()].into_iter().chain(modes.iter().map(cell)).collect::<Vec<String>>()
        };
        let bytes = |n: u64| if n == 0 { "-".to_string() } else { size::show(n) };
        let batch = self.batch as u64;
        let mut rows = vec![
            row("weights", &|_| bytes(self.weight_bytes)),
            row("low-bit KV", &|m| bytes(m.need.cache.packed)),
            row("residual, 16 bits", &|m| bytes(m.need.cache.wide)),
            row("prefetch slots", &|m| bytes(m.need.cache.slots)),
            row("loaded layers", &|m| bytes(m.need.cache.loads)),
            row("lists of pages", &|m| bytes(self.on_gpu(&m.need.kv, m.need.context, 1).tables)),
            row("KV on the device, a sequence", &|m| {
                bytes(m.need.cache.device().saturating_add(self.on_gpu(&m.need.kv, m.need.context, 1).tables))
            }),
            row("KV on the host, a sequence", &|m| bytes(m.need.cache.host)),
            row("workspace of a prefill", &|m| bytes(m.need.workspace)),
            row("workspace of decode steps", &|m| bytes(self.on_gpu(&m.need.kv, m.need.context, batch).workspace)),
            row("device, all", &|m| bytes(self.total(&m.need, batch).0)),
            row("host, all", &|m| bytes(self.total(&m.need, batch).1)),
            row("fits", &|m| if self.fits(&m.need, batch) { "yes".into() } else { "no".into() }),
            row(&format!("largest batch of {} tokens", self.context), &|m| m.largest_batch.to_string()),
            row(&format!("largest context, batch of {batch}"), &|m| {
                m.largest_context.map_or("none".into(), |n| n.to_string())
            }),
        ];
        if self.gpu.is_some() {
            rows.push(row("ms a step", &|m| m.step_us.map_or("-".into(), |us| format!("{:.2}", us / 1e3))));
            rows.push(row("tokens/s", &|m| self.tokens_per_second(m).map_or("-".into(), |rate| format!("{rate:.0}"))));
        }
        rows
    }

    fn tokens_per_second(&self, mode: &Mode) -> Option<f64> {
        mode.step_us.map(|us| self.batch as f64 * 1e6 / us)
    }

    fn json(&self, modes: &[Mode]) -> Value {
        let mode = |mode: &Mode| {
            let Need { cache, workspace, .. } = mode.need;
            let GpuBytes { tables, workspace: decode_workspace, .. } =
                self.on_gpu(&mode.kv, mode.need.context, self.batch as u64);
            let (device, host) = self.total(&mode.need, self.batch as u64);
            json!({
                "kv": mode.kv.mode.name(),
                "packed_bytes": cache.packed,
                "residual_bytes": cache.wide,
                "slot_bytes": cache.slots,
                "load_bytes": cache.loads,
                "kv_device_bytes": cache.device(),
                "kv_host_bytes": cache.host,
                "table_bytes": tables,
                "workspace_bytes": workspace,
                "decode_workspace_bytes": decode_workspace,
                "device_bytes": device,
                "host_bytes": host,
                "fits": self.fits(&mode.need, self.batch as u64),
                "largest_batch": mode.largest_batch,
                "largest_context": mode.largest_context,
                "step_ms": mode.step_us.map(|us| us / 1e3),
                "tokens_per_s": self.tokens_per_second(mode),
            })
        };
        json!({
            "model": self.model,
            "context": self.context,
            "batch": self.batch,
            "gpu": self.gpu.map(|gpu| gpu.name),
            "vram_bytes": self.device.bytes,
            "host_bytes": self.host.bytes,
            "shared": self.shared,
            "weight_bytes": self.weight_bytes,
            "modes": modes.iter().map(mode).collect::<Vec<_>>(),
        })
    }
}

/// The largest number up to `most` that fits: with more, more is taken.
fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut fitting, mut too_many) = (0, most + 1);
    while too_many - fitting > 1 {
        let middle = fitting + (too_many - fitting) / 2;
        if fits(middle) { fitting = middle } else { too_many = middle }
    }
    fitting
}

/// A step by its costs.
fn step_us(gpu: &Gpu, config: &Config, kv: &KvOptions, context: usize, batch: usize) -> f64 {
    let costs = gpu.costs(config, kv, context, batch, 1.0);
    match kv.mode {
        KvMode::Full | KvMode::Kivi => costs.compute_us(),
        KvMode::Offload => costs.bound_us(),
        KvMode::Fetch => costs.compute_us() + costs.copy_us(),
        KvMode::SpeCache => costs.simulate(Schedule::Event).step_us,
    }
}

/// The GPU that `--device auto` would take.
fn first_gpu() -> Option<probe::Gpu> {
    gpus().ok().and_then(|gpus| gpus.into_iter().next()).filter(probe::Gpu::is_supported)
}

/// The named card's memory, else that of this machine's GPU, less what the engine leaves to the driver; else the
/// machine's.
fn device_memory(named: Option<&Gpu>, here: Option<probe::Gpu>) -> Result<Memory> {
    let named = named.map(|gpu| ((gpu.memory_gib * (1u64 << 30) as f64) as u64, gpu.name.to_string()));
    match named.or_else(|| here.map(|gpu| (gpu.memory, gpu.name))) {
        Some((bytes, name)) => {
            Ok(Memory { bytes: bytes - bytes / 32, source: format!("{name}, less 1/32 for its driver") })
        }
        None => available("--vram", "no GPU: what this machine has free"),
    }
}

fn host_memory() -> Result<Memory> {
    available("--host", "what this machine has free")
}

fn available(option: &str, source: &str) -> Result<Memory> {
    let unknown = || Error::Usage(format!("this system does not say how much memory is free: give {option}"));
    Ok(Memory { bytes: ram::available().ok_or_else(unknown)?, source: source.into() })
}
