//! What can be said on the command line, and in `SPECACHE_*` variables.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::builder::BoolishValueParser;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use specache::error::Error;
use specache::kv::KvMode;

use super::eval::args::EvalArgs;
use super::output::STDOUT;
use super::shared_args::{DeviceArgs, KvArgs, KvTuning, ModelArgs, PromptArgs, SamplingArgs, kv_mode};
use super::{count, places, precedence, size};

static VERSION: LazyLock<String> = LazyLock::new(|| match option_env!("SPECACHE_COMMIT") {
    Some(commit) => format!("{} ({commit})", env!("CARGO_PKG_VERSION")),
    None => env!("CARGO_PKG_VERSION").to_string(),
});

/// The version, and the commit where the build knows it.
pub fn version() -> &'static str {
    &VERSION
}

const ABOUT: &str = "LLM inference with SpeCache: all 16-bit KV pairs in host memory, a 1- or 2-bit copy on the device, \
speculative prefetch of the pairs that matter.";

const EXIT_CODES: &str = "\
Examples:
  specache-engine generate -m models/llama -p 'Once upon a time' -n 100
  specache-engine chat -m models/llama-instruct
  specache-engine plan -m models/llama --gpu a6000 -c 32768
  specache-engine eval kld -m models/llama -f book.txt --kv-bits 1,2
  specache-engine logits -m models/llama --tokens ids.json --prefill 300 -o logits.npy
  specache-engine --bench          the same as `specache-engine bench`
  specache-engine --list-devices   the same as `specache-engine devices`

Every option can also be set by the environment variable named beside it; the command
line wins. SPECACHE_CHECK_ORDER=1 checks that waits order all copies and computation, and
says at the end what it found; SPECACHE_ISA names the instruction set to use.

Exit codes: 0 success (also when the reader of stdout goes away), 1 failure, 2 usage,
3 invalid model, 4 out of memory, 5 a copy or the device failed, 130 interrupted.";

/// The whole command line.
#[derive(Parser)]
#[command(name = "specache-engine", about = ABOUT, version = version(), after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Continue a prompt; the completion streams to stdout.
    #[command(after_help = GENERATE_EXAMPLES)]
    Generate(GenerateArgs),
    /// Talk with a model: several turns on one growing cache.
    #[command(after_help = CHAT_EXAMPLES)]
    Chat(ChatArgs),
    /// Teacher forcing: the logits of given tokens, as an NPY file.
    #[command(after_help = LOGITS_EXAMPLES)]
    Logits(LogitsArgs),
    /// What a model and its caches take in each KV mode, what fits, and about how fast it is; loads nothing.
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(PlanArgs),
    /// Check this machine: what is in the engine's way, and what to change.
    #[command(after_help = DOCTOR_OUTPUT)]
    Doctor,
    /// List the devices of this machine, and why there is no GPU among them.
    #[command(alias = "list-devices")]
    Devices,
    /// Compare the KV modes side by side on this machine.
    #[command(after_help = BENCH_EXAMPLES)]
    Bench(BenchArgs),
    /// What a KV mode costs in quality: needles, perplexity, divergence, coverage, LongBench.
    #[command(after_help = super::eval::args::EXAMPLES)]
    Eval(EvalArgs),
    /// Print what makes a shell complete this command's arguments.
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions(CompletionsArgs),
    /// Print the manual page, or write the pages of all commands into a folder.
    #[command(after_help = MAN_EXAMPLES)]
    Man(ManArgs),
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  specache-engine generate -m models/llama -p 'Once upon a time' -n 100
  specache-engine generate -m models/llama -f book.txt -n 200 --kv-bits 1 --temp 0.7
  specache-engine generate -m synthetic:tiny --tokens ids.json -n 8 --kv full --json

Output: text, flushed piece by piece in whole UTF-8 characters; figures on stderr.
For a folder without a tokenizer the generated token ids are printed instead,
separated by spaces. An end-of-text token is among the tokens of --json but not in
the text.";

/// `generate`.
#[derive(Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// Most tokens to generate
    #[arg(short, long, env = "SPECACHE_N_PREDICT", value_name = "N")]
    pub n_predict: usize,
    #[command(flatten)]
    pub kv: KvArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Go on after an end-of-text token
    #[arg(long, env = "SPECACHE_IGNORE_EOS", value_parser = BoolishValueParser::new())]
    pub ignore_eos: bool,
    /// Print one JSON object at the end instead of streaming
    #[arg(long, env = "SPECACHE_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
    /// Room of the context in tokens; prompt and -n must fit [default: as many as they need]
    #[arg(short, long, env = "SPECACHE_CTX_SIZE", value_name = "TOKENS")]
    pub ctx_size: Option<usize>,
}

const CHAT_EXAMPLES: &str = "\
Examples:
  specache-engine chat -m models/llama-instruct
  specache-engine chat -m models/llama-instruct --system 'Be brief.' -c 32768 --kv-bits 1
  printf 'Hello\\n/stats\\n' | specache-engine chat -m models/llama-instruct
  specache-engine chat -m models/llama-base --raw -n 40

Each line of stdin is a message, or a command: /stats, /system TEXT, /reset, /help,
/quit. Answers go to stdout, each ended by a newline, all else to stderr. Ctrl-C stops an
answer, and ends the program (130) where none is being written. Only what is new in a turn
is prefilled; where a template rewrites earlier turns, what changed is prefilled again.
A line that fails is told, and the conversation goes on; where stdin is no terminal, the exit
code at its end is then that of the first failure.";

/// `chat`.
#[derive(Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// System message
    #[arg(long, env = "SPECACHE_SYSTEM", value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Use no chat template: an answer continues its message, the next message begins a line
    #[arg(long, env = "SPECACHE_RAW", value_parser = BoolishValueParser::new())]
    pub raw: bool,
    /// Most tokens of an answer [default: until the model ends it or the context is full]
    #[arg(short, long, env = "SPECACHE_N_PREDICT", value_name = "N")]
    pub n_predict: Option<usize>,
    /// Most tokens of the conversation; the cache grows with it [default: what the model was trained for]
    #[arg(short, long, env = "SPECACHE_CTX_SIZE", value_name = "TOKENS")]
    pub ctx_size: Option<usize>,
    #[command(flatten)]
    pub kv: KvArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

const PLAN_EXAMPLES: &str = "\
Examples:
  specache-engine plan -m models/llama --gpu a6000
  specache-engine plan -m synthetic:llama-3-8b --gpu h200 -c 131072 -b 16 --kv-bits 1
  specache-engine plan -m models/llama --vram 24GiB --host 64GiB -o json

Only config.json is read. The bytes are those that the engine asks for; a GPU's working rows
are counted with their most, 256 MiB. Every mode is a column; for those in which the batch
does not fit, stderr says what is short and what fits.";

/// `plan`.
#[derive(Args)]
pub struct PlanArgs {
    /// Model folder (only its config.json is read), org/name of one in the Hugging Face cache, or synthetic:SHAPE
    #[arg(short, long, env = "SPECACHE_MODEL", value_name = "DIR")]
    pub model: String,
    /// Device memory, such as 48GiB [default: that of --gpu, else of the first GPU, else what this machine has free]
    #[arg(long, env = "SPECACHE_PLAN_VRAM", value_name = "SIZE", value_parser = size::parse)]
    pub vram: Option<u64>,
    /// Host memory for 16-bit KV copies [default: what this machine has free]
    #[arg(long, env = "SPECACHE_PLAN_HOST", value_name = "SIZE", value_parser = size::parse)]
    pub host: Option<u64>,
    /// Tokens of a sequence [default: 32768, or what the model was trained for if that is less]
    #[arg(short, long, env = "SPECACHE_CTX_SIZE", value_name = "TOKENS")]
    pub ctx_size: Option<usize>,
    /// Sequences that are decoded together
    #[arg(short, long, env = "SPECACHE_BATCH", value_name = "B", default_value_t = 1)]
    pub batch: usize,
    /// Estimate steps on this card, from its bandwidths
    #[arg(long, env = "SPECACHE_GPU", value_name = "GPU", value_parser = ["a6000", "4090", "h100", "h200"])]
    pub gpu: Option<String>,
    #[command(flatten)]
    pub tuning: KvTuning,
    /// A table for people, or JSON
    #[arg(short, long, env = "SPECACHE_PLAN_OUTPUT", value_name = "FORMAT", default_value = "md",
          value_parser = ["md", "json"])]
    pub output: String,
}

const DOCTOR_OUTPUT: &str = "\
A line for each thing: ok; note, where something would be better otherwise; problem, where
something does not work. Behind -> is what to change. The exit code is 0 unless the engine
cannot run at all.";

const LOGITS_EXAMPLES: &str = "\
Examples:
  specache-engine logits -m models/llama --tokens ids.json --prefill 300 --kv full \\
      -o full.npy
  specache-engine logits -m models/llama --tokens ids.json --prefill 300 --kv-bits 1 \\
      --spec-tokens spec.json --trace-selections selections.json -o specache.npy

Row 0 comes from the prompt's last position, one more row from each token that is
fed; the last token is never fed. Output files appear when they are complete, or not
at all. Selections are null where nothing is offloaded yet.";

/// `logits`.
#[derive(Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// All tokens, prompt first: a JSON array of ids; none is added
    #[arg(long, env = "SPECACHE_TOKENS", value_name = "IDS.json")]
    pub tokens: PathBuf,
    /// Tokens of the prompt: at least 1, fewer than there are
    #[arg(long, env = "SPECACHE_PREFILL", value_name = "P")]
    pub prefill: usize,
    #[command(flatten)]
    pub kv: KvArgs,
    /// Speculative tokens to use instead of the model's own, T'_2 first: a JSON array of ids, one for each decode step
    #[arg(long, env = "SPECACHE_SPEC_TOKENS", value_name = "IDS.json")]
    pub spec_tokens: Option<PathBuf>,
    /// Write which positions were prefetched: `speculative`, `pre_decode` and `steps`, by layer and KV head
    #[arg(long, env = "SPECACHE_TRACE_SELECTIONS", value_name = "OUT.json")]
    pub trace_selections: Option<PathBuf>,
    /// Where the logits go: NPY, float32, [tokens - P, vocabulary]
    #[arg(short, long, env = "SPECACHE_OUTPUT", value_name = "OUT.npy")]
    pub output: PathBuf,
}

const BENCH_EXAMPLES: &str = "\
Examples:
  specache-engine --bench
  specache-engine bench -m synthetic:llama-3.2-1b -d 4096 --kv full,specache --kv-bits 1
  specache-engine bench -m models/llama -d 2000,8000 -b 1,4 -o csv > bench.csv
  specache-engine bench -m synthetic:llama-3.2-1b -p 512,2048 -n 0 --kv full,specache
  specache-engine bench -d 500,1000,2000 -m synthetic:tinyllama-1.1b --plot speed.svg
  specache-engine bench --overlap -d 4000 -b 2 --sim-pcie-gbps 0.04 --plot steps.svg
  specache-engine bench --simulate --gpu a6000 -m synthetic:llama-3-8b --kv-bits 1

Real weights get a real prompt, prefilled once per mode. Random weights
(synthetic:SHAPE) get a cache of random pairs: they have a prefill speed with -p only, and
their hit rate, acceptance and KL divergence would mean nothing. The modes take turns within
each repetition, so that all of them meet the same moods of the machine; a mode's cache
grows from one repetition to the next.

Columns: bits/g/R/k are --kv-bits, --kv-group, --kv-residual and --kv-top-k; behind ± is the
standard deviation over the repetitions; GB/s: weights and KV that are read; moved: KV that
comes from the host; exposed: how long computation waits for it; hit rate: the share of the
pairs that the real token wanted and that were there; acceptance: the share of speculative
tokens that were right; KLD: mean KL divergence from full, in nats, over 32 tokens behind the
prompt.";

/// `bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// Model folders, org/name or synthetic:SHAPE, separated by commas [default: the recall model and synthetic:llama-3.2-1b; with
    /// --overlap the latter only, with --simulate synthetic:llama-3-8b]
    #[arg(short, long, env = "SPECACHE_MODEL", value_name = "DIR,...", value_delimiter = ',')]
    pub model: Vec<String>,
    /// Prompts of so many tokens are prefilled in every mode: tokens per second, and the time to the first token
    #[arg(short, long, env = "SPECACHE_BENCH_PROMPT", value_name = "TOKENS,...", value_delimiter = ',')]
    pub prompt: Vec<usize>,
    /// Decode steps of a repetition; 0: none, with -p [default: 6, or 64 for models below 1 GB]
    #[arg(short, long, env = "SPECACHE_BENCH_N_PREDICT", value_name = "N")]
    pub n_predict: Option<usize>,
    /// Tokens in the cache when decoding begins [default: 1024; the recall model: one of its prompts; with --simulate
    /// 8192, 32768 and 131072]
    #[arg(short, long, env = "SPECACHE_BENCH_DEPTH", value_name = "TOKENS,...", value_delimiter = ',')]
    pub depth: Vec<usize>,
    /// Repetitions; the spread over them is shown
    #[arg(short, long, env = "SPECACHE_BENCH_REPETITIONS", value_name = "R", default_value_t = 3)]
    pub repetitions: usize,
    /// Modes, separated by commas
    #[arg(long, env = "SPECACHE_KV_MODES", value_name = "MODE,...", value_delimiter = ',',
          default_value = "full,kivi,offload,fetch,specache", value_parser = kv_mode())]
    pub kv: Vec<KvMode>,
    #[command(flatten)]
    pub tuning: KvTuning,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Run nothing: simulate the pipeline of a decode step on a card, from bytes over bandwidth, under each schedule
    #[arg(long, env = "SPECACHE_BENCH_SIMULATE", value_parser = BoolishValueParser::new())]
    pub simulate: bool,
    /// Run one model under each schedule in turns, and show layer by layer what of its copies is hidden
    #[arg(long, env = "SPECACHE_BENCH_OVERLAP", value_parser = BoolishValueParser::new(), conflicts_with = "simulate")]
    pub overlap: bool,
    /// Sequences that are decoded together; of a real prompt they are forks, which share its pages on the host
    #[arg(short, long, env = "SPECACHE_BATCH", value_name = "B,...", value_delimiter = ',', default_value = "1")]
    pub batch: Vec<usize>,
    /// Sequences of random pairs are forks of one, too: a batch takes its host memory once, whatever its size
    #[arg(long, env = "SPECACHE_BENCH_FORKS", value_parser = BoolishValueParser::new())]
    pub forks: bool,
    /// Draw how fast each mode decodes; with --overlap, one step of each schedule as a time line
    #[arg(long, env = "SPECACHE_PLOT", value_name = "OUT.svg")]
    pub plot: Option<PathBuf>,
    /// The card to simulate, with --simulate
    #[arg(long, env = "SPECACHE_GPU", value_name = "GPU", default_value = "h200",
          value_parser = ["a6000", "4090", "h100", "h200"])]
    pub gpu: String,
    /// Tables for people; a line of CSV for each mode; JSON with every repetition at the end, or a line of it for each model,
    /// depth and batch as soon as it is measured
    #[arg(short, long, env = "SPECACHE_BENCH_OUTPUT", value_name = "FORMAT", default_value = "md",
          value_parser = ["md", "csv", "json", "jsonl"])]
    pub output: String,
    /// The options that are on the command line, as `--name`.
    #[arg(skip)]
    pub typed: Vec<String>,
}

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  source <(specache-engine completions bash)
  specache-engine completions zsh > ~/.zfunc/_specache-engine
  specache-engine completions fish > ~/.config/fish/completions/specache-engine.fish

tools/install.sh puts them where bash, zsh and fish look.";

/// `completions`.
#[derive(Args)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

const MAN_EXAMPLES: &str = "\
Examples:
  specache-engine man | man -l -
  specache-engine man -o ~/.local/share/man/man1";

/// `man`.
#[derive(Args)]
pub struct ManArgs {
    /// Folder for the pages of all commands: specache-engine.1, specache-engine-generate.1, ...
    #[arg(short, long, env = "SPECACHE_MAN_OUTPUT", value_name = "FOLDER")]
    pub output: Option<PathBuf>,
}

/// Prints a usage error, help or the version, and ends the process.
///
/// # Errors
/// [`Error::Io`] where stdout takes no help.
fn end<T>(what: &clap::Error) -> Result<T, Error> {
    let printed = what.print().and_then(|()| std::io::stdout().flush());
    match printed {
        Err(why) if !what.use_stderr() => Err(Error::io(STDOUT, why)),
        _ => std::process::exit(what.exit_code()),
    }
}

/// Reads the command line and the environment. Ends the process where there is nothing to run: usage errors (2), help
/// and version (0).
///
/// # Errors
/// As [`places::check`]; [`Error::Io`] where stdout takes no help.
pub fn parse() -> Result<Cli, Error> {
    let args = std::env::args_os().enumerate();
    let args = args.map(|(i, arg)| match arg.to_str() {
        Some("--bench") if i == 1 => "bench".into(),
        Some("--list-devices") if i == 1 => "devices".into(),
        _ => arg,
    });
    let args: Vec<OsString> = args.collect();
    let command = precedence::each_arg(Cli::command(), &count::explained);
    let settled = precedence::settle(command, &args);
    let matches = settled.clone().try_get_matches_from(&args);
    let matches = match matches {
        Ok(matches) => matches,
        Err(why) => end(&precedence::blame(why, settled, &args))?,
    };
    places::check(&matches)?;
    let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    if let Command::Bench(args) = &mut cli.command {
        args.typed = precedence::typed(&Cli::command(), &matches, "bench");
    }
    Ok(cli)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    use clap::ArgAction;
    use clap::builder::ValueParser;

    /// Commands, options and variables, each option once for each command.
    fn variables() -> Vec<(String, String, String)> {
        fn of(command: &clap::Command, path: &str) -> Vec<(String, String, String)> {
            let own = command.get_arguments().filter_map(|arg| {
                let variable = arg.get_env()?.to_str().unwrap().to_string();
                Some((path.trim().to_string(), arg.get_long()?.to_string(), variable))
            });
            let below = |command: &clap::Command| of(command, &format!("{path} {}", command.get_name()));
            own.chain(command.get_subcommands().flat_map(below)).collect()
        }
        of(&Cli::command(), "")
    }

    /// docs/environment.md has a row for each variable, with its option and its commands, and no other.
    #[test]
    fn variables_are_documented() {
        let mut rows: Vec<(String, String, Vec<String>)> = Vec::new();
        for (command, option, variable) in variables() {
            match rows.iter_mut().find(|row| row.0 == variable) {
                Some(row) => {
                    assert_eq!(row.1, option, "{variable} is two options");
                    row.2.push(command);
                }
                None => rows.push((variable, option, vec![command])),
            }
        }
        let row = |(variable, option, commands): &(String, String, Vec<String>)| {
            let all_of_eval = "eval needle, eval ppl, eval kld, eval coverage, eval longbench";
            format!("| `{variable}` | `--{option}` | {} |", commands.join(", ").replace(all_of_eval, "eval"))
        };
        let expected: Vec<String> = rows.iter().map(row).collect();
        let page = include_str!("../../docs/environment.md");
        let written: Vec<&str> = page.lines().filter(|line| line.starts_with("| `SPECACHE_")).collect();
        assert_eq!(written, expected, "docs/environment.md should have\n{}", expected.join("\n"));
    }

    /// An option has one variable in all commands, but for those that mean another thing by command.
    #[test]
    fn an_option_has_one_variable() {
        let mut names = BTreeMap::<String, BTreeSet<String>>::new();
        for (_, option, variable) in variables() {
            names.entry(option).or_default().insert(variable);
        }
        let several = names.iter().filter(|(_, names)| names.len() > 1).map(|(option, names)| (&**option, names.len()));
        assert_eq!(several.collect::<Vec<_>>(), [("kv", 2), ("n-predict", 2), ("output", 5), ("prompt", 2)]);
    }

    /// `SPECACHE_X=0`, `=no`, `=yes`: for every flag of every command, as README and help promise it for all options.
    #[test]
    fn every_flag_can_be_a_variable_that_says_yes_or_no() {
        fn flags(command: &clap::Command) -> Vec<String> {
            let own = command.get_arguments().filter(|arg| matches!(arg.get_action(), ArgAction::SetTrue)).map(|arg| {
                let name = format!("{} --{}", command.get_name(), arg.get_id());
                assert!(arg.get_env().is_some(), "{name} has no variable");
                let (parser, strict) = (arg.get_value_parser(), ValueParser::bool());
                assert_ne!(format!("{parser:?}"), format!("{strict:?}"), "{name} takes `true` and `false` only");
                name
            });
            own.chain(command.get_subcommands().flat_map(flags)).collect()
        }
        let all = flags(&Cli::command());
        for name in ["bench --simulate", "bench --overlap", "needle --chat", "generate --json"] {
            assert!(all.iter().any(|flag| flag == name), "no {name} in {all:?}");
        }
    }
}
