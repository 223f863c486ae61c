//! `eval`: what a KV mode costs in quality. Items are measured one by one; the file of `--output` keeps what is finished.

pub mod args;
mod longbench;
mod needle;
mod text;

use std::fmt::Display;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use specache::Engine;
use specache::chat::ChatTemplate;
use specache::device::interrupt;
use specache::error::{Error, Result};
use specache::eval;
use specache::eval::answer::At;
use specache::eval::journal::{Journal, check_place};
use specache::kv::{KvMode, KvOptions};
use specache::model::{Linear, Matrix, Weights, folder};
use specache::tokenizer::Tokenizer;

use super::args::version;
use super::input;
use super::output::{AtomicFile, print, traced};
use super::progress::{Progress, prefilled, say};
use super::shared_args::ModelArgs;
pub use args::Results;
use args::{EvalArgs, EvalCommand};

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the arguments, the model, the texts or the output files.
pub fn run(args: EvalArgs) -> Result<()> {
    match args.command {
        EvalCommand::Ppl(args) => text::perplexity(&args),
        EvalCommand::Kld(args) => text::divergence(&args),
        EvalCommand::Coverage(args) => text::coverage(&args),
        EvalCommand::Needle(args) => needle::run(&args),
        EvalCommand::Longbench(args) => longbench::run(&args),
    }
}

/// A model that can be judged.
struct Subject {
    folder: PathBuf,
    engine: Engine,
    tokenizer: Option<Tokenizer>,
    trace: Option<AtomicFile>,
}

impl Subject {
    /// Loads the model, and checks the variants against it; before, whether results can be kept.
    fn load(args: &ModelArgs, variants: &[KvOptions], results: &Results) -> Result<Subject> {
        results.output.as_deref().map_or(Ok(()), check_place)?;
        let device = args.device.options()?;
        let folder = folder(&args.model)?.ok_or_else(|| {
            let model = &args.model;
            Error::Usage(format!("{model}: random weights have no quality to measure; give a model folder"))
        })?;
        let trace = args.device.trace_file()?;
        let mut progress = Progress::new();
        progress.announce(format_args!("loading {}", args.model));
        let engine = Engine::load(&args.model, &device)?;
        let tokenizer = input::tokenizer(&args.model, engine.model().config.vocab_size)?;
        let config = &engine.model().config;
        variants.iter().try_for_each(|kv| kv.validate(config))?;
        if let Some(id) = config.eos_token_ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            let last = config.vocab_size - 1;
            say(format_args!(
                "warning: eos_token_id {id} is beyond the vocabulary, which ends at {last}: no answer ends by it"
            ));
        }
        Ok(Subject { folder, engine, tokenizer, trace })
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::Usage("this model has no tokenizer.json, so texts cannot be used; give token ids instead".into())
        })
    }

    /// Most tokens that the model was trained for; a warning for more.
    fn check_length(&self, tokens: usize) -> Result<()> {
        let most = self.engine.model().config.max_positions;
        if tokens > most {
            say(format_args!("warning: {tokens} tokens, but the model's max_position_embeddings is {most}"));
        }
        let full = KvOptions { mode: KvMode::Full, ..KvOptions::default() };
        // What cannot be at all, such as a length beyond dynamic RoPE scaling, is refused before anything runs.
        self.engine.plan(&full, tokens).map(|_| ())
    }

    /// What of the model and the device the results depend on, for the file of `--output`: weights, the folder's other files
    /// by their names, and with `chat` those that a chat template may come from.
    ///
    /// # Errors
    /// [`Error::Io`] for a file of the folder that cannot be read.
    fn identity(&self, chat: bool) -> Result<Value> {
        let model = self.engine.model();
        let mut identity = json!({
            "name": model.name,
            "device": if self.engine.device().is_gpu() { "cuda" } else { "cpu" },
            "weights": weights_hash(&model.weights),
            "eos": model.config.eos_token_ids,
        });
        let template = ["chat_template.jinja", "tokenizer_config.json"].into_iter().filter(|_| chat);
        for name in ["config.json", "generation_config.json", "tokenizer.json"].into_iter().chain(template) {
            identity[name] = json!(file_hash(&self.folder.join(name))?);
        }
        Ok(identity)
    }
}

/// FNV-1a, 64 bits, as hexadecimal digits. Each part goes in behind its length, so that what moves from one to the next is
/// another hash.
fn hash<P: AsRef<[u8]>>(parts: impl IntoIterator<Item = P>) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for part in parts {
        let part = part.as_ref();
        for byte in (part.len() as u64).to_le_bytes().iter().chain(part) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

/// The hash of a file; `None` where there is none.
fn file_hash(file: &Path) -> Result<Option<String>> {
    if file.exists() { Ok(Some(hash([input::read(file)?]))) } else { Ok(None) }
}

fn ids_hash(ids: &[u32]) -> String {
    hash([bytemuck::cast_slice::<_, u8>(ids)])
}

/// Tells models apart, though not with certainty: the beginning of every matrix, all norms, and the biases.
fn weights_hash(weights: &Weights) -> String {
    const BEGINNING: usize = 4096;
    fn linear(linear: &Linear) -> [&[u8]; 2] {
        [beginning(&linear.weight), bytemuck::cast_slice(linear.bias.as_deref().unwrap_or_default())]
    }
    fn beginning(matrix: &Matrix) -> &[u8] {
        let bytes = matrix.bytes();
        &bytes[..bytes.len().min(BEGINNING)]
    }
    let ends = [beginning(&weights.embed), bytemuck::cast_slice(&weights.final_norm)];
    let layers = weights.layers.iter().flat_map(|l| {
        let norms = [Some(&l.input_norm), Some(&l.post_norm), l.q_norm.as_ref(), l.k_norm.as_ref()];
        let norms = norms.map(|norm| bytemuck::cast_slice(norm.map_or(&[][..], |norm| norm)));
        [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down].into_iter().flat_map(linear).chain(norms)
    });
    hash(ends.into_iter().chain(linear(&weights.lm_head)).chain(layers))
}

/// `--plot`, begun before any work is done.
fn plot_file(plot: Option<&PathBuf>) -> Result<Option<AtomicFile>> {
    plot.map(|file| AtomicFile::create("--plot", file)).transpose()
}

/// Longest silence where nobody watches a terminal.
const QUIET: Duration = Duration::from_secs(10);

/// Shows how far an item is.
type Show<'a> = &'a mut (dyn FnMut(&dyn Display) + Send);

/// Items, one after the other.
struct Items<'a> {
    journal: Journal,
    output: Option<&'a Path>,
    total: usize,
    done: usize,
    shown: Shown,
}

/// What goes on: a line that is replaced, on a terminal; elsewhere one now and then.
struct Shown {
    progress: Progress,
    last_line: Instant,
}

impl Shown {
    fn show(&mut self, what: std::fmt::Arguments) {
        self.progress.show(what);
        if !std::io::stderr().is_terminal() && self.last_line.elapsed() > QUIET {
            say(what);
            self.last_line = Instant::now();
        }
    }
}

impl<'a> Items<'a> {
    /// Opens the file of `--output` and says what is about to be done. `options`: all that the results depend on, beside
    /// this program's version.
    fn begin(command: &str, mut options: Value, results: &'a Results, total: usize, what: &str) -> Result<Items<'a>> {
        let output = results.output.as_deref();
        options["version"] = json!(version());
        let journal = Journal::open(output, command, &options)?;
        if let (torn @ 1.., Some(file)) = (journal.torn(), output) {
            say(format_args!("{}: the last line was torn; its {torn} bytes were removed", file.display()));
        }
        if let (finished @ 1.., Some(file)) = (journal.len(), output) {
            say(format_args!("{}: {finished} of {total} items are finished already", file.display()));
        }
        say(format_args!("eval {command}: {what}"));
        let shown = Shown { progress: Progress::new(), last_line: Instant::now() };
        Ok(Items { journal, output, total, done: 0, shown })
    }

    /// The result of an item: that of the file, or a new one. `work` gets a function that shows how far it is.
    fn item(&mut self, name: &str, work: impl FnOnce(Show) -> Result<Value>) -> Result<Value> {
        self.done += 1;
        if let Some(result) = self.journal.get(name) {
            return Ok(result.clone());
        }
        let (done, total, shown) = (self.done, self.total, &mut self.shown);
        shown.show(format_args!("{done} of {total}: {name}"));
        let result = work(&mut |at| shown.show(format_args!("{done} of {total}: {name}, {at}")))?;
        check_figures(name, &result)?;
        let result = self.journal.add(name, &result)?;
        shown.show(format_args!("{done} of {total}: {name} is finished"));
        Ok(result)
    }

    /// Removes the line of progress; after an interruption, says how to go on.
    fn end<T>(mut self, outcome: Result<T>) -> Result<T> {
        self.shown.progress.clear();
        if let Err(Error::Interrupted) = &outcome {
            let (finished, total) = (self.journal.len(), self.total);
            match self.output {
                Some(file) => say(format_args!(
                    "{finished} of {total} items are in {}; the same command goes on from there",
                    file.display()
                )),
                None => say(format_args!("nothing was kept: --output FILE.jsonl makes runs that can be continued")),
            }
        }
        outcome
    }
}

/// Runs all items of a command, with Ctrl-C left to the engine, and writes the trace.
fn measure<T>(
    mut subject: Subject,
    mut items: Items,
    work: impl FnOnce(&Subject, &mut Items) -> Result<T>,
) -> Result<(Subject, T)> {
    let trace = subject.trace.take();
    let outcome = {
        let _ctrl_c = interrupt::forward(subject.engine.interrupt_flag());
        work(&subject, &mut items)
    };
    let outcome = items.end(outcome);
    let outcome = traced(trace, subject.engine.device(), Vec::new(), outcome)?;
    Ok((subject, outcome))
}

/// One JSON object, or text for people.
fn report(results: &Results, json: &Value, text: &str) -> Result<()> {
    if results.json { print(&format!("{json}\n")) } else { print(text) }
}

/// As [`report`], with a picture. Each comes also where the other fails: a disk may be full, a reader may have gone away.
fn report_drawn(
    results: &Results,
    json: &Value,
    text: &str,
    plot: Option<AtomicFile>,
    svg: impl FnOnce() -> String,
) -> Result<()> {
    let told = report(results, json, text);
    let Some(mut file) = plot else { return told };
    file.write(svg().as_bytes())?;
    file.commit().and(told)
}

/// Shows how far an answer to a prompt of so many tokens is.
fn show_answer(show: Show, prompt: usize, at: At) {
    match at {
        At::Prefill(share) => show(&prefilled(prompt, share)),
        At::Token(n) => show(&format_args!("token {n} of the answer")),
    }
}

/// A variant in JSON.
fn variant(kv: &KvOptions) -> Value {
    json!({
        "name": eval::name(kv),
        "kv": kv.mode.name(),
        "bits": kv.mode.low_bit().then_some(kv.bits),
        "group": kv.mode.low_bit().then_some(kv.group_size),
        "residual": kv.mode.low_bit().then_some(kv.residual_len),
        "top_k": kv.mode.fetches().then_some(kv.top_k),
    })
}

/// All that the results of these variants depend on.
fn variants_key(variants: &[KvOptions]) -> Value {
    let dtype = |kv: &KvOptions| kv.dtype.map_or("auto".into(), |dtype| format!("{dtype:?}"));
    let key = |kv: &KvOptions| format!("{} g={} {}", eval::name(kv), kv.group_size, dtype(kv));
    json!(variants.iter().map(key).collect::<Vec<_>>())
}

/// Names of variants, for a line that says what is done.
fn names(variants: &[KvOptions]) -> String {
    variants.iter().map(eval::name).collect::<Vec<_>>().join(", ")
}

/// The chat template for `--chat`, if it is wanted.
fn template(chat: bool, model: &str) -> Result<Option<ChatTemplate>> {
    if !chat {
        return Ok(None);
    }
    let none = || Error::Usage(format!("--chat: {model} has no chat template; leave --chat out"));
    input::template(model)?.ok_or_else(none).map(Some)
}

/// `1 window`, `2 windows`.
fn some(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// JSON has no infinity and no NaN, and an item has nothing else that would become null.
fn check_figures(item: &str, result: &Value) -> Result<()> {
    match result {
        Value::Null => {
            Err(Error::NotFinite(format!("{item}: a figure is infinite or not a number, so it cannot be kept")))
        }
        Value::Array(all) => all.iter().try_for_each(|value| check_figures(item, value)),
        Value::Object(all) => all.values().try_for_each(|value| check_figures(item, value)),
        _ => Ok(()),
    }
}

/// A line of the file of `--output` that this version cannot read: a result that was just measured can be, as
/// [`check_figures`] looks at it.
fn unreadable(item: &str) -> Error {
    Error::Usage(format!("--output: the result of {item:?} is not what `eval` writes; remove its line"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_json_has_not_are_told_of_their_item() {
        assert!(check_figures("window 3", &json!({ "full": { "nll": 1.5, "guesses": [0, 0] }, "pred": "" })).is_ok());
        for x in [f64::NAN, f64::INFINITY] {
            let error = check_figures("window 3", &json!({ "full": { "kl": [0.0, x] } })).unwrap_err();
            assert!(error.exit_code() == 1 && error.to_string().starts_with("window 3: "), "{error}");
            assert!(!error.to_string().contains("--output"), "{error}");
        }
    }
}
