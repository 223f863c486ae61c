//! Arguments that several commands have: the model, the device, prompts, KV options, sampling.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use clap::builder::{BoolishValueParser, PossibleValuesParser, TypedValueParser};

use specache::device::link::LinkOptions;
use specache::device::pin::{Mlock, Pin};
use specache::device::{DeviceChoice, DeviceOptions, GatherWay, LinearPath, Schedule};
use specache::error::Error;
use specache::kv::{KvMode, KvOptions};
use specache::model::Dtype;
use specache::sampler::{SamplingOptions, SamplingOverrides};

use super::output::AtomicFile;
use super::progress::say;
use super::size;

/// Which model, on what.
#[derive(Args)]
pub struct ModelArgs {
    /// Model folder (Hugging Face layout), org/name of one in the Hugging Face cache, or synthetic:SHAPE for random weights
    #[arg(short, long, env = "SPECACHE_MODEL", value_name = "DIR")]
    pub model: String,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// The device.
#[derive(Args)]
pub struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, env = "SPECACHE_DEVICE", value_name = "DEVICE", default_value = "auto", value_parser = str::parse::<DeviceChoice>)]
    device: DeviceChoice,
    /// Compute threads [default: as many as the process may use]
    #[arg(short, long, env = "SPECACHE_THREADS", value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Most device memory, such as 4GiB, 512MiB, 1000000: for KV caches, on a GPU for weights and workspace too
    #[arg(long, env = "SPECACHE_VRAM_BUDGET", value_name = "SIZE", value_parser = size::parse)]
    vram_budget: Option<u64>,
    /// Most host memory for 16-bit KV copies
    #[arg(long, env = "SPECACHE_HOST_KV_BUDGET", value_name = "SIZE", value_parser = size::parse)]
    host_kv_budget: Option<u64>,
    /// How computation waits for copies: where they are issued; for all of them before each attention, as the paper has
    /// it; or for each layer's own event
    #[arg(long, env = "SPECACHE_PIPELINE", value_name = "SCHEDULE", default_value = "event",
          value_parser = one_of(Schedule::ALL, Schedule::name))]
    pipeline: Schedule,
    /// Who makes the matrix products on a GPU: our fused kernels, 16 rows at a time; cuBLASLt; or the fused kernels for
    /// up to 8 rows and cuBLASLt for more
    #[arg(long, env = "SPECACHE_LINEAR", value_name = "PATH", default_value = "auto", value_parser = one_of(LinearPath::ALL, LinearPath::name))]
    linear: LinearPath,
    /// How a GPU gets the pairs that it has selected: its own multiprocessors read them from host memory (gpu); threads of
    /// the host gather them (cpu); or the way that the first steps show to be faster (auto) [default: gpu]
    #[arg(long, env = "SPECACHE_GATHER", value_name = "WAY", value_parser = one_of(GatherWay::ALL, GatherWay::name))]
    gather: Option<GatherWay>,
    /// On a GPU: launch every kernel of a step by itself instead of all of them as a CUDA graph
    #[arg(long, env = "SPECACHE_NO_GRAPH", value_parser = BoolishValueParser::new())]
    no_graph: bool,
    /// Fetch all selected pairs at every step, not only those that were not selected by the step before
    #[arg(long, env = "SPECACHE_NO_DELTA", value_parser = BoolishValueParser::new())]
    no_delta: bool,
    /// Threads that gather pairs from host memory [default: a quarter of those that can run, 1 to 16]
    #[arg(long, env = "SPECACHE_GATHER_THREADS", value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=256))]
    gather_threads: Option<u16>,
    /// Slow the copies between host and device down to so many GB/s each way
    #[arg(long, env = "SPECACHE_SIM_PCIE_GBPS", value_name = "GB/S",
          value_parser = link_gbps)]
    sim_pcie_gbps: Option<f64>,
    /// Add so many microseconds to each of these copies
    #[arg(long, env = "SPECACHE_SIM_COPY_LATENCY_US", value_name = "US",
          value_parser = link_latency_us, default_value = "0")]
    sim_copy_latency_us: f64,
    /// Lock the 16-bit copies in host memory, so that they are never swapped out
    #[arg(long, env = "SPECACHE_MLOCK", value_parser = BoolishValueParser::new())]
    mlock: bool,
    /// Write what ran when as a Chrome trace, which Perfetto opens: a row per stream and per
    /// NUMA node that was gathered from, step and layer on every slice
    #[arg(long, env = "SPECACHE_TRACE", value_name = "OUT.json")]
    pub trace: Option<PathBuf>,
}

/// One of `all`, by its name.
fn one_of<T, const N: usize>(all: [T; N], name: fn(T) -> &'static str) -> impl TypedValueParser<Value = T>
where
    T: Copy + Send + Sync + 'static,
{
    let named = move |given: String| all.into_iter().find(|&one| name(one) == given).expect("a name from the list");
    PossibleValuesParser::new(all.map(name)).map(named)
}

/// A megabyte a second is slower than any link, and slow enough to wait for.
fn link_gbps(text: &str) -> Result<f64, String> {
    in_range(text, 0.001, 1e5)
}

fn link_latency_us(text: &str) -> Result<f64, String> {
    in_range(text, 0.0, 1e6)
}

fn in_range(text: &str, least: f64, most: f64) -> Result<f64, String> {
    let x = text.parse::<f64>().map_err(|e| e.to_string())?;
    if (least..=most).contains(&x) { Ok(x) } else { Err(format!("must be a number from {least} to {most}")) }
}

impl DeviceArgs {
    /// As the engine takes them.
    ///
    /// # Errors
    /// [`Error::Usage`] for a device that cannot be had.
    pub fn options(&self) -> Result<DeviceOptions, Error> {
        Ok(DeviceOptions {
            choice: self.device,
            threads: self.threads.map(usize::from),
            device_budget: self.vram_budget,
            host_budget: self.host_kv_budget,
            pipeline: self.pipeline,
            linear: self.linear,
            gather: self.gather,
            delta: !self.no_delta,
            graph: !self.no_graph,
            gather_threads: self.gather_threads.map(usize::from),
            link: LinkOptions { gbps: self.sim_pcie_gbps, latency_us: self.sim_copy_latency_us },
            pin: self.mlock.then(|| Arc::new(Mlock) as Arc<dyn Pin>),
            trace: self.trace.is_some(),
            ..DeviceOptions::default()
        })
    }

    /// Begins the trace's file, if one is wanted, so that a place where it cannot be is known before any work is done.
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn trace_file(&self) -> Result<Option<AtomicFile>, Error> {
        self.trace.as_deref().map(|file| AtomicFile::create("--trace", file)).transpose()
    }
}

/// The prompt, in one of three ways.
#[derive(Args)]
pub struct PromptArgs {
    /// Prompt text
    #[arg(short, long, env = "SPECACHE_PROMPT", value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// File with the prompt text, UTF-8, used as it is; -: standard input
    #[arg(short, long, env = "SPECACHE_FILE", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// File with the prompt's token ids: a JSON array; no first token is added
    #[arg(long, env = "SPECACHE_TOKENS", value_name = "IDS.json")]
    pub tokens: Option<PathBuf>,
}

/// How K and V are kept.
#[derive(Args)]
pub struct KvArgs {
    /// full: 16-bit on the device; kivi: low-bit; offload: whole layers come back from the host; fetch: low-bit and the
    /// pairs that the token asks for; specache: low-bit and pairs prefetched one step ahead
    #[arg(long, env = "SPECACHE_KV", value_name = "MODE", default_value = "specache", value_parser = kv_mode())]
    kv: KvMode,
    #[command(flatten)]
    tuning: KvTuning,
}

impl KvArgs {
    /// As the engine takes them.
    pub fn options(&self) -> KvOptions {
        self.tuning.options(self.kv)
    }
}

/// What all modes share.
#[derive(Args)]
pub struct KvTuning {
    /// Bits of a low-bit code: 1, 2 or 4
    #[arg(long, env = "SPECACHE_KV_BITS", value_name = "B", default_value_t = 2)]
    kv_bits: usize,
    /// Values that share a zero and a scale: 32 or 64, a divisor of the head's size
    #[arg(long, env = "SPECACHE_KV_GROUP", value_name = "G", default_value_t = 64)]
    kv_group: usize,
    /// Latest tokens that stay at 16 bits on the device, at least 32
    #[arg(long, env = "SPECACHE_KV_RESIDUAL", value_name = "R", default_value_t = 64)]
    kv_residual: usize,
    /// 16-bit pairs fetched per KV head
    #[arg(long, env = "SPECACHE_KV_TOP_K", value_name = "K", default_value_t = 64)]
    kv_top_k: usize,
    /// Number type of K and V; auto: the model's own, fp32 with --kv full only
    #[arg(long, env = "SPECACHE_KV_DTYPE", value_name = "TYPE", default_value = "auto",
          value_parser = ["auto", "bf16", "fp16", "fp32"])]
    kv_dtype: String,
}

impl KvTuning {
    /// The options of one mode.
    pub fn options(&self, mode: KvMode) -> KvOptions {
        KvOptions {
            mode,
            bits: self.kv_bits,
            group_size: self.kv_group,
            residual_len: self.kv_residual,
            top_k: self.kv_top_k,
            dtype: KvTuning::dtype(&self.kv_dtype),
        }
    }

    /// The type of a name; `None` for auto.
    pub fn dtype(name: &str) -> Option<Dtype> {
        match name {
            "bf16" => Some(Dtype::Bf16),
            "fp16" => Some(Dtype::F16),
            "fp32" => Some(Dtype::F32),
            _ => None,
        }
    }
}

pub fn kv_mode() -> impl TypedValueParser<Value = KvMode> {
    one_of(KvMode::ALL, KvMode::name)
}

/// How tokens are chosen. What is not given comes from generation_config.json, or is off.
#[derive(Args)]
pub struct SamplingArgs {
    /// Temperature; 0 takes the most likely token. Sampling options that are not given come from the model's
    /// generation_config.json if it says do_sample, else the default is 0
    #[arg(long, env = "SPECACHE_TEMP", value_name = "T")]
    temp: Option<f32>,
    /// Keep the k most likely tokens; 0 keeps all
    #[arg(long, env = "SPECACHE_TOP_K", value_name = "K")]
    top_k: Option<usize>,
    /// Keep the most likely tokens that reach this probability together
    #[arg(long, env = "SPECACHE_TOP_P", value_name = "P")]
    top_p: Option<f32>,
    /// Drop tokens below this share of the most likely one's probability
    #[arg(long, env = "SPECACHE_MIN_P", value_name = "P")]
    min_p: Option<f32>,
    /// Weaken tokens that have occurred; 1 is off
    #[arg(long, env = "SPECACHE_REPEAT_PENALTY", value_name = "X")]
    repeat_penalty: Option<f32>,
    /// The same seed draws the same tokens [default: 0]
    #[arg(short, long, env = "SPECACHE_SEED", value_name = "SEED")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// As the sampler takes them.
    pub fn overrides(&self) -> SamplingOverrides {
        SamplingOverrides {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed,
        }
    }

    /// A warning where the most likely token is taken, so that what else is asked for has no effect.
    pub fn warn_of_greed(&self, chosen: &SamplingOptions) {
        let asked =
            [("--top-k", self.top_k.is_some()), ("--top-p", self.top_p.is_some()), ("--min-p", self.min_p.is_some())];
        let idle = asked.iter().find(|(_, asked)| *asked).filter(|_| chosen.temperature == 0.0);
        if let Some((option, _)) = idle {
            say(format_args!(
                "warning: {option} has no effect: at temperature 0 the most likely token is taken; give --temp, such as 0.7"
            ));
        }
    }
}
