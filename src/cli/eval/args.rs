//! The options of `eval`.

use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{Args, Subcommand};

use specache::error::{Error, Result};
use specache::eval;
use specache::kv::{KvMode, KvOptions};

use crate::cli::shared_args::{KvTuning, ModelArgs, kv_mode};

pub const EXAMPLES: &str = "\
Examples:
  specache-engine eval ppl -m models/llama -f book.txt -c 4096 --kv full,kivi --kv-bits 1,2
  specache-engine eval kld -m models/llama -f book.txt --kv-bits 1 --kv-top-k 16,64 --plot kld.svg
  specache-engine eval needle -m models/llama --haystack book.txt --lengths 4000,8000
  specache-engine eval coverage -m models/llama -f book.txt --device cpu
  specache-engine eval longbench -m models/llama --data LongBench/data --output lb.jsonl

--kv, --kv-bits, --kv-residual and --kv-top-k are lists; every combination that a mode knows
is measured. With --output FILE.jsonl each finished item is a line of that file, and the same
command continues it after an interruption. What each number means: docs/evaluation.md.";

/// What is measured.
#[derive(Subcommand)]
pub enum EvalCommand {
    /// Is a planted fact found again? Over lengths and depths, as a heat map
    Needle(NeedleArgs),
    /// How well is a text predicted? Perplexity by KV mode
    Ppl(PplArgs),
    /// How far are the predictions from those of `full`? KL divergence and agreement
    Kld(KldArgs),
    /// How few keys hold 90 % of the attention, and were the right pairs fetched? On the CPU device
    Coverage(CoverageArgs),
    /// The English tasks of LongBench, from its published data files
    Longbench(LongbenchArgs),
}

/// `eval`.
#[derive(Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    pub command: EvalCommand,
}

/// KV modes side by side.
#[derive(Args)]
pub struct Variants {
    /// Modes, separated by commas [default: full,kivi,specache; kld: kivi,specache; coverage: specache]
    #[arg(long, env = "SPECACHE_KV_MODES", value_name = "MODE,...", value_delimiter = ',', value_parser = kv_mode())]
    kv: Vec<KvMode>,
    /// Bits of a low-bit code, separated by commas: 1, 2, 4
    #[arg(long, env = "SPECACHE_KV_BITS", value_name = "B,...", value_delimiter = ',', default_value = "2")]
    kv_bits: Vec<usize>,
    /// Values that share a zero and a scale: 32 or 64, a divisor of the head's size
    #[arg(long, env = "SPECACHE_KV_GROUP", value_name = "G", default_value_t = 64)]
    kv_group: usize,
    /// Latest tokens that stay at 16 bits on the device, at least 32; separated by commas
    #[arg(long, env = "SPECACHE_KV_RESIDUAL", value_name = "R,...", value_delimiter = ',', default_value = "64")]
    kv_residual: Vec<usize>,
    /// 16-bit pairs fetched per KV head, separated by commas
    #[arg(long, env = "SPECACHE_KV_TOP_K", value_name = "K,...", value_delimiter = ',', default_value = "64")]
    kv_top_k: Vec<usize>,
    /// Number type of K and V; auto: the model's own
    #[arg(long, env = "SPECACHE_KV_DTYPE", value_name = "TYPE", default_value = "auto",
          value_parser = ["auto", "bf16", "fp16", "fp32"])]
    kv_dtype: String,
}

impl Variants {
    /// Every combination that differs, in the order of the lists.
    ///
    /// # Errors
    /// [`Error::Usage`] for an empty list.
    pub fn options(&self, default: &[KvMode]) -> Result<Vec<KvOptions>> {
        let modes = if self.kv.is_empty() { default } else { &self.kv };
        let mut all: Vec<KvOptions> = Vec::new();
        for &mode in modes {
            for &bits in &self.kv_bits {
                for &residual_len in &self.kv_residual {
                    for &top_k in &self.kv_top_k {
                        let dtype = KvTuning::dtype(&self.kv_dtype);
                        let kv = KvOptions { mode, bits, group_size: self.kv_group, residual_len, top_k, dtype };
                        // What a mode does not use makes no difference.
                        if all.iter().all(|other| eval::name(other) != eval::name(&kv)) {
                            all.push(kv);
                        }
                    }
                }
            }
        }
        if all.is_empty() {
            return Err(Error::Usage("--kv-bits, --kv-residual and --kv-top-k need a value each".into()));
        }
        Ok(all)
    }
}

/// What becomes of the results.
#[derive(Args)]
pub struct Results {
    /// Print one JSON object at the end instead of a table
    #[arg(long, env = "SPECACHE_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
    /// Keep finished items in this file, a line each; the same command continues it
    #[arg(long, env = "SPECACHE_EVAL_OUTPUT", value_name = "FILE.jsonl")]
    pub output: Option<PathBuf>,
}

/// A text, cut into windows.
#[derive(Args)]
pub struct TextArgs {
    /// File with the text, UTF-8
    #[arg(short, long, env = "SPECACHE_FILE", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// File with the text's token ids: a JSON array; none is added
    #[arg(long, env = "SPECACHE_TOKENS", value_name = "IDS.json")]
    pub tokens: Option<PathBuf>,
    /// Tokens of a window [default: 2048, or the model's limit if that is less]
    #[arg(short, long, env = "SPECACHE_CTX_SIZE", value_name = "TOKENS")]
    pub ctx_size: Option<usize>,
    /// Tokens of a window that are prefilled; those behind it, but for the first, are scored [default: half the window]
    #[arg(long, env = "SPECACHE_PREFILL", value_name = "P")]
    pub prefill: Option<usize>,
    /// Most windows, from the beginning of the text
    #[arg(long, env = "SPECACHE_EVAL_WINDOWS", value_name = "N", default_value_t = 8)]
    pub windows: usize,
}

/// `eval ppl`, and what `kld` and `coverage` share with it.
#[derive(Args)]
pub struct PplArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub text: TextArgs,
    #[command(flatten)]
    pub variants: Variants,
    #[command(flatten)]
    pub results: Results,
}

/// `eval kld`.
#[derive(Args)]
pub struct KldArgs {
    #[command(flatten)]
    pub on: PplArgs,
    /// Draw mean and 99th percentile
    #[arg(long, env = "SPECACHE_PLOT", value_name = "OUT.svg")]
    pub plot: Option<PathBuf>,
}

/// `eval coverage`.
#[derive(Args)]
pub struct CoverageArgs {
    #[command(flatten)]
    pub on: PplArgs,
    /// Draw hit rates by layer
    #[arg(long, env = "SPECACHE_PLOT", value_name = "OUT.svg")]
    pub plot: Option<PathBuf>,
}

/// `eval needle`.
#[derive(Args)]
pub struct NeedleArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to hide the needle in, UTF-8; it begins again where it is too short
    #[arg(short = 'f', long, env = "SPECACHE_EVAL_HAYSTACK", value_name = "FILE", required_unless_present = "prompts")]
    pub haystack: Option<PathBuf>,
    /// Tokens of the prompts, separated by commas [default: 1000,2000,4000, as far as the model goes]
    #[arg(long, env = "SPECACHE_EVAL_LENGTHS", value_name = "TOKENS,...", value_delimiter = ',')]
    pub lengths: Vec<usize>,
    /// Where the needle is, in percent from the beginning, separated by commas
    #[arg(
        long,
        env = "SPECACHE_EVAL_DEPTHS",
        value_name = "PERCENT,...",
        value_delimiter = ',',
        default_value = "0,25,50,75,100"
    )]
    pub depths: Vec<f64>,
    /// The sentence that is planted
    #[arg(long, env = "SPECACHE_EVAL_NEEDLE", value_name = "TEXT", requires = "question", requires = "answer")]
    pub needle: Option<String>,
    /// What is asked behind the haystack
    #[arg(long, env = "SPECACHE_EVAL_QUESTION", value_name = "TEXT", requires = "needle")]
    pub question: Option<String>,
    /// What is expected; the score is the share of its words that are found, in order
    #[arg(long, env = "SPECACHE_EVAL_ANSWER", value_name = "TEXT", requires = "needle")]
    pub answer: Option<String>,
    /// Ready prompts instead: a JSON array of objects with length, ids, answer (ids) and depth (percent) or index, as
    /// tools/recall/prompts.py writes it
    #[arg(long, env = "SPECACHE_EVAL_PROMPTS", value_name = "FILE.json",
          conflicts_with_all = ["haystack", "lengths", "depths", "needle", "chat"])]
    pub prompts: Option<PathBuf>,
    /// Ask by the model's chat template
    #[arg(long, env = "SPECACHE_EVAL_CHAT", value_parser = BoolishValueParser::new())]
    pub chat: bool,
    /// Most tokens of an answer [default: those of the expected one and, of texts, 16 more]
    #[arg(short, long, env = "SPECACHE_N_PREDICT", value_name = "N")]
    pub n_predict: Option<usize>,
    #[command(flatten)]
    pub variants: Variants,
    #[command(flatten)]
    pub results: Results,
    /// Draw the heat maps
    #[arg(long, env = "SPECACHE_PLOT", value_name = "OUT.svg")]
    pub plot: Option<PathBuf>,
}

/// `eval longbench`.
#[derive(Args)]
pub struct LongbenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Folder of the dataset's files, such as qasper.jsonl or qasper_e.jsonl
    #[arg(long, env = "SPECACHE_EVAL_DATA", value_name = "DIR")]
    pub data: PathBuf,
    /// Tasks, separated by commas [default: all whose files are there]
    #[arg(long, env = "SPECACHE_EVAL_TASKS", value_name = "TASK,...", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Most items of a task, from the beginning of its file [default: all]
    #[arg(long, env = "SPECACHE_EVAL_LIMIT", value_name = "N")]
    pub limit: Option<usize>,
    /// Most tokens of a prompt; longer ones lose their middle [default: 3500 for a model of 4,096 positions, 31500 for
    /// 32,768, and so on]
    #[arg(long, env = "SPECACHE_EVAL_MAX_LENGTH", value_name = "TOKENS")]
    pub max_length: Option<usize>,
    /// Ask by the model's chat template, but for the tasks with examples or code
    #[arg(long, env = "SPECACHE_EVAL_CHAT", value_parser = BoolishValueParser::new())]
    pub chat: bool,
    #[command(flatten)]
    pub variants: Variants,
    #[command(flatten)]
    pub results: Results,
}
