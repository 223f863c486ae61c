//! What a benchmark prints.

use serde_json::{Value, json};
use specache::error::Result;
use specache::kv::{KvMode, KvOptions};

use super::Machine;
use super::decode::{ModeResult, ModelResult};
use super::prompts::{PromptMode, PromptResult};
use crate::cli::args::version;
use crate::cli::generate::tuning;
use crate::cli::output::{print, table};
use crate::cli::size;

const COLUMNS: [&str; 14] = [
    "mode",
    "bits/g/R/k",
    "decode tok/s",
    "GB/s",
    "prefill tok/s",
    "first token ms",
    "device KV",
    "host KV",
    "moved/step",
    "exposed us/step",
    "hit rate",
    "acceptance",
    "KLD",
    "vs full",
];

const PROMPT_COLUMNS: [&str; 5] = ["mode", "bits/g/R/k", "prefill tok/s", "first token ms", "vs full"];

/// Of both kinds of measurement; what a line does not have is empty.
const CSV: &str = "test,model,tokens,batch,mode,bits,group,residual,top_k,tok_s,tok_s_sd,first_token_ms,prefill_tok_s,\
read_gb_s,device_bytes,host_bytes,fetched_bytes_per_step,exposed_us_per_step,hit_rate,acceptance,kld,ratio_to_full,device,\
device_read_gb_s,version";

/// More bytes of weights stay in no last-level cache, so their speed is that of memory.
const LARGEST_CACHE: u64 = 1 << 30;

/// How results are written.
#[derive(Clone, Copy, PartialEq)]
enum Format {
    /// Tables, as they are measured.
    Tables,
    /// A line for each mode, as it is measured.
    Csv,
    /// One object at the end.
    Json,
    /// An object for each model, depth and batch, as it is measured.
    JsonLines,
}

/// What is measured, as it is printed.
pub struct Report {
    format: Format,
    machine: Machine,
    models: Vec<Value>,
    prompts: Vec<Value>,
    decoded: Vec<ModelResult>,
}

impl Report {
    /// `format`: `md`, `csv`, `json` or `jsonl`.
    pub fn new(format: &str, machine: Machine) -> Report {
        let format = match format {
            "csv" => Format::Csv,
            "json" => Format::Json,
            "jsonl" => Format::JsonLines,
            _ => Format::Tables,
        };
        Report { format, machine, models: Vec::new(), prompts: Vec::new(), decoded: Vec::new() }
    }

    /// What is measured on what.
    pub fn begin(&self) -> Result<()> {
        match self.format {
            Format::Json | Format::JsonLines => return Ok(()),
            Format::Csv => return print(&format!("{CSV}\n")),
            Format::Tables => {}
        }
        let Machine { cpu, threads, device, why_no_gpu, is_gpu, read_gbps, .. } = &self.machine;
        let why = why_no_gpu.as_ref().map_or(String::new(), |why| format!("; {why}"));
        let who = if *is_gpu { "the GPU reads".into() } else { format!("{threads} threads read") };
        let reads = match read_gbps {
            Some(gbps) => format!("{who} {gbps:.1} GB/s from memory (measured now)"),
            None => "not enough free memory to measure how fast it is read".into(),
        };
        print(&format!("specache-engine {} on {device}{why}\n{cpu}; {reads}\n", version()))
    }

    /// The decoding that has been measured.
    pub fn decoded(&self) -> &[ModelResult] {
        &self.decoded
    }

    /// A model is done, at one depth and batch.
    pub fn add(&mut self, result: ModelResult) -> Result<()> {
        match self.format {
            Format::Json => self.models.push(model_json(&result)),
            Format::JsonLines => self.print_line("decode", model_json(&result))?,
            Format::Csv => result.modes.iter().try_for_each(|mode| self.print_cells(cells(mode, &result)))?,
            Format::Tables => self.print_table(&result)?,
        }
        self.decoded.push(result);
        Ok(())
    }

    /// A model's prompts are done, of one length and batch.
    pub fn add_prompts(&mut self, result: &PromptResult) -> Result<()> {
        match self.format {
            Format::Json => self.prompts.push(prompts_json(result)),
            Format::JsonLines => self.print_line("prompt", prompts_json(result))?,
            Format::Csv => result.modes.iter().try_for_each(|mode| self.print_cells(prompt_cells(mode, result)))?,
            Format::Tables => {
                let repetitions = result.modes.first().map_or(0, |mode| mode.seconds.len());
                let PromptResult { model, tokens, batch, modes } = result;
                let prompts = if *batch > 1 { format!("{batch} prompts together, each") } else { "a prompt".into() };
                let rows: Vec<_> = modes.iter().map(|mode| prompt_row(mode, result)).collect();
                print(&format!(
                    "\n## {model}: {prompts} of {tokens} tokens, {repetitions} times\n\n{}",
                    table(&PROMPT_COLUMNS, &rows)
                ))?;
            }
        }
        Ok(())
    }

    fn print_table(&self, result: &ModelResult) -> Result<()> {
        let repetitions = result.modes.first().map_or(0, |mode| mode.tok_s.len());
        let fill = if result.synthetic { "random pairs" } else { "prompt" };
        let ModelResult { model, depth, n, batch, forks, modes, .. } = result;
        let sequences = match (*batch, *forks) {
            (1, _) => String::new(),
            (_, false) => format!(", {batch} sequences"),
            (_, true) => format!(", {batch} forks of one sequence, with its host pages in common"),
        };
        let rows: Vec<_> = modes.iter().map(|mode| row(mode, result)).collect();
        print(&format!(
            "\n## {model}: {depth} tokens in the cache ({fill}){sequences}, {repetitions} x {n} steps\n\n{}\n{}\n",
            table(&COLUMNS, &rows),
            self.weights_line(result)
        ))
    }

    /// An object with what it was measured on.
    fn print_line(&self, test: &str, mut result: Value) -> Result<()> {
        result["test"] = json!(test);
        result["hardware"] = self.hardware();
        (result["version"], result["commit"]) =
            (json!(env!("CARGO_PKG_VERSION")), json!(option_env!("SPECACHE_COMMIT")));
        print(&format!("{result}\n"))
    }

    /// A line of CSV, and what it was measured on.
    fn print_cells(&self, mut cells: Vec<String>) -> Result<()> {
        cells.extend([self.machine.device.clone(), optional(self.machine.read_gbps), version().into()]);
        print(&(cells.iter().map(|cell| quoted(cell)).collect::<Vec<_>>().join(",") + "\n"))
    }

    fn hardware(&self) -> Value {
        let Machine { cpu, threads, isa, device, why_no_gpu, is_gpu, read_gbps } = &self.machine;
        json!({
            "cpu": cpu, "threads": threads, "isa": isa, "device": device, "why_no_gpu": why_no_gpu, "gpu": is_gpu,
            "read_gb_s": read_gbps,
        })
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
            _ if result.weight_bytes < LARGEST_CACHE => {
                let whose = if self.machine.is_gpu { "GPU" } else { "CPU" };
                line += &format!("; so few weights may stay in the {whose}'s caches");
            }
            Some(limit) if gbps <= limit => line += &format!(", {:.0} % of what memory gives", 100.0 * gbps / limit),
            Some(_) => line += "; more than was measured above: the machine was busier then",
            None => {}
        }
        if result.synthetic {
            line += ".\nRandom weights: hit rate, acceptance and KLD mean nothing (n/a)";
        }
        line + "."
    }

    /// All is done.
    pub fn end(&self) -> Result<()> {
        if self.format != Format::Json {
            return Ok(());
        }
        let all = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "commit": option_env!("SPECACHE_COMMIT"),
            "hardware": self.hardware(),
            "models": self.models,
            "prompts": self.prompts,
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
    vec![
        mode.kv.mode.name().into(),
        tuning(&mode.kv),
        spread(&mode.tok_s),
        format!("{:.1}", gbps(mode, result)),
        mode.prefill_tok_s.map_or("n/a".into(), |x| format!("{x:.0}")),
        mode.first_token_s.map_or("n/a".into(), |x| format!("{:.1}", 1e3 * x)),
        size::show(mode.device_bytes),
        size::show(mode.host_bytes),
        or_dash(mode.fetched_bytes_per_step.map(|bytes| size::show(bytes as u64))),
        match mode.exposed_us_per_step {
            Some(us) => format!("{us:.1}"),
            None => if mode.kv.mode.on_host() { "n/a" } else { "-" }.into(),
        },
        quality(mode.hit_rate),
        quality(mode.acceptance),
        mode.kld.map_or("n/a".into(), |nats| if nats < 1e-3 { format!("{nats:.1e}") } else { format!("{nats:.4}") }),
        ratio_to_full(mode, result).map_or("n/a".into(), |x| format!("{x:.2}x")),
    ]
}

/// A mode with its options, and what was measured with it.
fn mode_json(kv: &KvOptions, figures: Value) -> Value {
    let [bits, group, residual, top_k] = options(kv);
    let mut all = json!({"mode": kv.mode.name(), "bits": bits, "group": group, "residual": residual, "top_k": top_k});
    if let (Value::Object(all), Value::Object(figures)) = (&mut all, figures) {
        all.extend(figures);
    }
    all
}

fn model_json(result: &ModelResult) -> Value {
    let mode = |mode: &ModeResult| {
        let figures = json!({
            "decode_tok_s": {"mean": mean(&mode.tok_s), "sd": deviation(&mode.tok_s), "repetitions": mode.tok_s},
            "prefill_tok_s": mode.prefill_tok_s,
            "first_token_s": mode.first_token_s,
            "device_bytes": mode.device_bytes,
            "host_bytes": mode.host_bytes,
            "fetched_bytes_per_step": mode.fetched_bytes_per_step,
            "exposed_us_per_step": mode.exposed_us_per_step,
            "hit_rate": mode.hit_rate,
            "acceptance": mode.acceptance,
            "kld": mode.kld,
            "ratio_to_full": ratio_to_full(mode, result),
            "kv_bytes_read_per_step": mode.kv_reads,
            "read_gb_s": gbps(mode, result),
        });
        mode_json(&mode.kv, figures)
    };
    json!({
        "model": result.model,
        "synthetic": result.synthetic,
        "depth": result.depth,
        "n_predict": result.n,
        "batch": result.batch,
        "forks": result.forks,
        "weight_bytes_per_step": result.weight_bytes,
        "modes": result.modes.iter().map(mode).collect::<Vec<_>>(),
    })
}

/// A mode as cells of [`CSV`], without the machine's.
fn cells(mode: &ModeResult, result: &ModelResult) -> Vec<String> {
    let kv = &mode.kv;
    let mut cells = vec!["decode".into(), result.model.clone()];
    cells.extend([result.depth, result.batch].map(|x| x.to_string()));
    cells.push(kv.mode.name().into());
    cells.extend(options(kv).map(|x| x.map_or(String::new(), |x| x.to_string())));
    cells.extend([mean(&mode.tok_s), deviation(&mode.tok_s)].map(|x| x.to_string()));
    cells.extend([mode.first_token_s.map(|s| 1e3 * s), mode.prefill_tok_s].map(optional));
    cells.push(gbps(mode, result).to_string());
    cells.extend([mode.device_bytes, mode.host_bytes].map(|x| x.to_string()));
    let rest = [mode.fetched_bytes_per_step, mode.exposed_us_per_step, mode.hit_rate, mode.acceptance, mode.kld];
    cells.extend(rest.map(optional));
    cells.push(optional(ratio_to_full(mode, result)));
    cells
}

/// The same of a prompt: it has no cache to speak of.
fn prompt_cells(mode: &PromptMode, result: &PromptResult) -> Vec<String> {
    let (kv, rates) = (&mode.kv, rates(mode, result));
    let mut cells = vec!["prompt".into(), result.model.clone()];
    cells.extend([result.tokens, result.batch].map(|x| x.to_string()));
    cells.push(kv.mode.name().into());
    cells.extend(options(kv).map(|x| x.map_or(String::new(), |x| x.to_string())));
    cells.extend([mean(&rates), deviation(&rates), 1e3 * mean(&mode.seconds), mean(&rates)].map(|x| x.to_string()));
    cells.extend(vec![String::new(); 8]);
    cells.push(optional(prompt_ratio(mode, result)));
    cells
}

/// Bits, group, residual and top-k, as far as a mode has them.
fn options(kv: &KvOptions) -> [Option<usize>; 4] {
    let codes = kv.mode.low_bit();
    [
        codes.then_some(kv.bits),
        codes.then_some(kv.group_size),
        (kv.mode != KvMode::Full).then_some(kv.residual_len),
        kv.mode.fetches().then_some(kv.top_k),
    ]
}

fn optional(x: Option<f64>) -> String {
    x.map_or(String::new(), |x| x.to_string())
}

/// A cell of CSV (RFC 4180).
fn quoted(cell: &str) -> String {
    match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.into(),
    }
}

/// Tokens of all prompts a second, in each repetition.
fn rates(mode: &PromptMode, result: &PromptResult) -> Vec<f64> {
    mode.seconds.iter().map(|seconds| (result.tokens * result.batch) as f64 / seconds).collect()
}

fn prompt_ratio(mode: &PromptMode, result: &PromptResult) -> Option<f64> {
    let full = result.modes.iter().find(|m| m.kv.mode == KvMode::Full)?;
    Some(mean(&full.seconds) / mean(&mode.seconds))
}

fn prompt_row(mode: &PromptMode, result: &PromptResult) -> Vec<String> {
    vec![
        mode.kv.mode.name().into(),
        tuning(&mode.kv),
        spread(&rates(mode, result)),
        spread(&mode.seconds.iter().map(|s| 1e3 * s).collect::<Vec<_>>()),
        prompt_ratio(mode, result).map_or("n/a".into(), |x| format!("{x:.2}x")),
    ]
}

fn prompts_json(result: &PromptResult) -> Value {
    let mode = |mode: &PromptMode| {
        let rates = rates(mode, result);
        let figures = json!({
            "prefill_tok_s": {"mean": mean(&rates), "sd": deviation(&rates), "repetitions": rates},
            "first_token_s": mean(&mode.seconds),
            "ratio_to_full": prompt_ratio(mode, result),
        });
        mode_json(&mode.kv, figures)
    };
    json!({
        "model": result.model,
        "tokens": result.tokens,
        "batch": result.batch,
        "modes": result.modes.iter().map(mode).collect::<Vec<_>>(),
    })
}

/// Mean and standard deviation, where there is one.
fn spread(xs: &[f64]) -> String {
    match xs {
        [x] => format!("{x:.2}"),
        _ => format!("{:.2} ± {:.2}", mean(xs), deviation(xs)),
    }
}

fn ratio_to_full(mode: &ModeResult, result: &ModelResult) -> Option<f64> {
    let full = result.modes.iter().find(|m| m.kv.mode == KvMode::Full)?;
    Some(mean(&mode.tok_s) / mean(&full.tok_s))
}

/// Weights and KV that are read a second.
fn gbps(mode: &ModeResult, result: &ModelResult) -> f64 {
    (result.weight_bytes + mode.kv_reads) as f64 * mean(&mode.tok_s) / result.batch as f64 / 1e9
}

/// The mean of some numbers.
pub fn mean(xs: &[f64]) -> f64 {
    xs.iter().sum::<f64>() / xs.len() as f64
}

/// Standard deviation of a sample; 0 for a single number.
fn deviation(xs: &[f64]) -> f64 {
    let mean = mean(xs);
    let squares: f64 = xs.iter().map(|x| (x - mean).powi(2)).sum();
    (squares / (xs.len().max(2) - 1) as f64).sqrt()
}
