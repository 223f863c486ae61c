//! What a benchmark prints.

use serde_json::{Value, json};
use specache::error::Result;
use specache::kv::KvMode;

use super::{Machine, ModeResult, ModelResult};
use crate::cli::args::version;
use crate::cli::generate::tuning;
use crate::cli::output::{print, table};
use crate::cli::size;

const COLUMNS: [&str; 12] = [
    "mode",
    "bits/g/R/k",
    "decode tok/s",
    "GB/s",
    "prefill tok/s",
    "device KV",
    "host KV",
    "moved/step",
    "exposed us/step",
    "hit rate",
    "acceptance",
    "vs full",
];

/// More bytes of weights stay in no last-level cache, so their speed is that of memory.
const LARGEST_CACHE: u64 = 1 << 30;

/// Tables as they are measured, or JSON at the end.
pub struct Report {
    json: bool,
    machine: Machine,
    models: Vec<Value>,
}

impl Report {
    /// `format`: `md` or `json`.
    pub fn new(format: &str, machine: Machine) -> Report {
        Report { json: format == "json", machine, models: Vec::new() }
    }

    /// What is measured on what.
    pub fn begin(&self) -> Result<()> {
        if self.json {
            return Ok(());
        }
        let Machine { cpu, threads, device, is_gpu, read_gbps, .. } = &self.machine;
        let who = if *is_gpu { "the GPU reads".into() } else { format!("{threads} threads read") };
        let reads = match read_gbps {
            Some(gbps) => format!("{who} {gbps:.1} GB/s from memory (measured now)"),
            None => "not enough free memory to measure how fast it is read".into(),
        };
        print(&format!("specache-engine {} on {device}\n{cpu}; {reads}\n", version()))
    }

    /// A model is done.
    pub fn add(&mut self, result: ModelResult) -> Result<()> {
        if self.json {
            self.models.push(model_json(&result));
            return Ok(());
        }
        let repetitions = result.modes.first().map_or(0, |mode| mode.tok_s.len());
        let fill = if result.synthetic { "random pairs" } else { "prompt" };
        let ModelResult { model, depth, n, batch, modes, .. } = &result;
        let sequences = if *batch > 1 { format!(", {batch} sequences") } else { String::new() };
        let rows: Vec<_> = modes.iter().map(|mode| row(mode, &result)).collect();
        print(&format!(
            "\n## {model}: {depth} tokens in the cache ({fill}){sequences}, {repetitions} x {n} steps\n\n{}\n{}\n",
            table(&COLUMNS, &rows),
            self.weights_line(&result)
        ))
    }

    /// How close the fastest mode is to the limit of memory.
    fn weights_line(&self, result: &ModelResult) -> String {
        let Some(best) = result.modes.iter().max_by(|a, b| mean(&a.tok_s).total_cmp(&mean(&b.tok_s))) else {
            return String::new();
        };
        let (gbps, mb) = (gbps(best, result), |bytes: u64| bytes as f64 / 1e6);
        let mut line = format!(
            "`{}` reads {:.1} MB of weights and {:.1} MB of KV a step, at {gbps:.1} GB/s",
            best.kv.mode.name(),
            mb(result.weight_bytes),
            mb(best.kv_reads)
        );
        match self.machine.read_gbps {
            _ if result.weight_bytes < LARGEST_CACHE => line += "; so few weights may stay in caches",
            Some(limit) if gbps <= limit => line += &format!(", {:.0} % of what memory gives", 100.0 * gbps / limit),
            Some(_) => line += "; more than was measured above: the machine was busier then",
            None => {}
        }
        if result.synthetic {
            line += ".\nRandom weights: hit rate and acceptance mean nothing (n/a)";
        }
        line + "."
    }

    /// All is done.
    pub fn end(&self) -> Result<()> {
        if !self.json {
            return Ok(());
        }
        let Machine { cpu, threads, isa, device, is_gpu, read_gbps } = &self.machine;
        let all = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "commit": option_env!("SPECACHE_COMMIT"),
            "hardware": {"cpu": cpu, "threads": threads, "isa": isa, "device": device, "gpu": is_gpu, "read_gb_s": read_gbps},
            "models": self.models,
        });
        print(&format!("{all:#}\n"))
    }
}

fn row(mode: &ModeResult, result: &ModelResult) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    // Only this mode has them, and only with trained weights they mean something.
    let quality = |value: Option<f64>| match (value, mode.kv.mode) {
        (Some(value), _) => format!("{value:.3}"),
        (None, KvMode::SpeCache) => "n/a".into(),
        (None, _) => "-".into(),
    };
    let speed = match mode.tok_s.len() {
        1 => format!("{:.2}", mode.tok_s[0]),
        _ => format!("{:.2} ± {:.2}", mean(&mode.tok_s), deviation(&mode.tok_s)),
    };
    vec![
        mode.kv.mode.name().into(),
        tuning(&mode.kv),
        speed,
        format!("{:.1}", gbps(mode, result)),
        mode.prefill_tok_s.map_or("n/a".into(), |x| format!("{x:.0}")),
        size::show(mode.device_bytes),
        size::show(mode.host_bytes),
        or_dash(mode.fetched_bytes_per_step.map(|bytes| size::show(bytes as u64))),
        match mode.exposed_us_per_step {
            Some(us) => format!("{us:.1}"),
            None => if mode.kv.mode.on_host() { "n/a" } else { "-" }.into(),
        },
        quality(mode.hit_rate),
        quality(mode.acceptance),
        ratio_to_full(mode, result).map_or("n/a".into(), |x| format!("{x:.2}x")),
    ]
}

fn model_json(result: &ModelResult) -> Value {
    let mode = |mode: &ModeResult| {
        json!({
            "mode": mode.kv.mode.name(),
            "bits": mode.kv.bits,
            "group": mode.kv.group_size,
            "residual": mode.kv.residual_len,
            "top_k": mode.kv.top_k,
            "decode_tok_s": {"mean": mean(&mode.tok_s), "sd": deviation(&mode.tok_s), "repetitions": mode.tok_s},
            "prefill_tok_s": mode.prefill_tok_s,
            "device_bytes": mode.device_bytes,
            "host_bytes": mode.host_bytes,
            "fetched_bytes_per_step": mode.fetched_bytes_per_step,
            "exposed_us_per_step": mode.exposed_us_per_step,
            "hit_rate": mode.hit_rate,
            "acceptance": mode.acceptance,
            "ratio_to_full": ratio_to_full(mode, result),
            "kv_bytes_read_per_step": mode.kv_reads,
            "read_gb_s": gbps(mode, result),
        })
    };
    json!({
        "model": result.model,
        "synthetic": result.synthetic,
        "depth": result.depth,
        "n_predict": result.n,
        "batch": result.batch,
        "weight_bytes_per_step": result.weight_bytes,
        "modes": result.modes.iter().map(mode).collect::<Vec<_>>(),
    })
}

fn ratio_to_full(mode: &ModeResult, result: &ModelResult) -> Option<f64> {
    let full = result.modes.iter().find(|m| m.kv.mode == KvMode::Full)?;
    Some(mean(&mode.tok_s) / mean(&full.tok_s))
}

/// Weights and KV that are read a second.
fn gbps(mode: &ModeResult, result: &ModelResult) -> f64 {
    (result.weight_bytes + mode.kv_reads) as f64 * mean(&mode.tok_s) / result.batch as f64 / 1e9
}

fn mean(xs: &[f64]) -> f64 {
    xs.iter().sum::<f64>() / xs.len() as f64
}

/// Standard deviation of a sample; 0 for a single number.
fn deviation(xs: &[f64]) -> f64 {
    let mean = mean(xs);
    let squares: f64 = xs.iter().map(|x| (x - mean).powi(2)).sum();
    (squares / (xs.len().max(2) - 1) as f64).sqrt()
}
