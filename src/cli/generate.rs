//! `generate`: a prompt becomes a completion, token by token.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use specache::device::interrupt;
use specache::error::{Error, Result};
use specache::kv::{KvMode, KvOptions};
use specache::sampler::{Sampler, SamplingOptions};
use specache::tokenizer::{Stream, Tokenizer};
use specache::{Buffers, Engine, Next, Prompt, Session};

use super::args::GenerateArgs;
use super::input::{self, Source};
use super::output::{print, traced};
use super::progress::{Progress, prefilled, say};
use super::size;

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the arguments or the model, or stops the generation.
pub fn run(args: GenerateArgs) -> Result<()> {
    if args.n_predict == 0 {
        return Err(Error::Usage("-n 0: at least one token must be generated".into()));
    }
    let device = args.model.device.options()?;
    let trace = args.model.device.trace_file()?;
    let source = input::prompt(&args.prompt)?;
    let mut progress = Progress::new();
    progress.announce(format_args!("loading {}", args.model.model));
    let engine = Engine::load(&args.model.model, &device)?;
    let config = &engine.model().config;
    let tokenizer = input::tokenizer(&args.model.model, config.vocab_size)?;
    let prompt = prompt_ids(source, tokenizer.as_ref(), config.vocab_size)?;
    let sampling = SamplingOptions::from_layers(&args.sampling.overrides(), &engine.model().generation)?;
    args.sampling.warn_of_greed(&sampling);
    let sampler = Sampler::new(sampling)?;
    let room = capacity(&args, prompt.len())?;
    warn_of_long_context(&engine, prompt.len() + args.n_predict);
    progress.show(format_args!("making room for {room} tokens"));
    let session = engine.session(args.kv.options(), room)?;
    input::warn_of_damage(&args.model.model)?;

    let _ctrl_c = interrupt::forward(engine.interrupt_flag());
    let emitter = Emitter::new(tokenizer.as_ref(), &prompt, args.json);
    let mut run = Run { args: &args, engine: &engine, prompt, session, sampler, emitter, progress };
    let outcome = run.generate();
    run.progress.clear();
    let outcome = traced(trace, engine.device(), Vec::new(), outcome)?;
    run.report(&outcome)
}

/// The prompt's ids: those of a file as they are, those of a text with the special tokens of the tokenizer.
fn prompt_ids(source: Source, tokenizer: Option<&Tokenizer>, vocab_size: usize) -> Result<Vec<u32>> {
    match (source, tokenizer) {
        (Source::Ids(ids), _) => input::check_ids("--tokens", &ids, vocab_size).map(|()| ids),
        (Source::Text(text), Some(tokenizer)) => tokenizer.encode(&text, true),
        (Source::Text(_), None) => Err(Error::Usage(
            "this model has no tokenizer.json, so a text prompt cannot be used; give token ids with --tokens".into(),
        )),
    }
}

/// Tokens that the session must have room for.
fn capacity(args: &GenerateArgs, prompt: usize) -> Result<usize> {
    let n = args.n_predict;
    let needed = prompt.checked_add(n);
    let needed = needed.ok_or_else(|| Error::Usage(format!("-n {n}: too many tokens for any context")))?;
    match args.ctx_size {
        Some(size) if size < needed => {
            Err(Error::Usage(format!("--ctx-size {size}: the prompt of {prompt} tokens and -n {n} need {needed}")))
        }
        Some(size) => Ok(size),
        None => Ok(needed),
    }
}

fn warn_of_long_context(engine: &Engine, tokens: usize) {
    let most = engine.model().config.max_positions;
    if tokens > most {
        say(format_args!("warning: up to {tokens} tokens, but the model's max_position_embeddings is {most}"));
    }
}

/// One generation.
struct Run<'a> {
    args: &'a GenerateArgs,
    engine: &'a Engine,
    prompt: Vec<u32>,
    session: Session,
    sampler: Sampler,
    emitter: Emitter<'a>,
    progress: Progress,
}

/// How it went.
struct Outcome {
    tokens: Vec<u32>,
    ended_by_eos: bool,
    prefill: Duration,
    /// From the beginning of the prefill until the first token was shown.
    first_token: Duration,
    decode: Duration,
}

impl Run<'_> {
    /// Prefill, then a token from each step.
    fn generate(&mut self) -> Result<Outcome> {
        let mut buffers = Buffers::default();
        let mut history = self.prompt.clone();
        let (n, progress) = (self.prompt.len(), &mut self.progress);
        progress.show(prefilled(n, 0.0));
        let start = Instant::now();
        let prompt = Prompt { session: &mut self.session, tokens: &self.prompt };
        let mut tell = |share| progress.show(prefilled(n, share));
        let logits = self.engine.prefill_telling(&mut [prompt], &mut buffers, &mut tell)?.remove(0)?;
        let prefill = start.elapsed();
        self.progress.clear();
        let token = self.sampler.sample(&logits, &history)?;
        let mut ended_by_eos = self.take(token, &mut history)?;
        let first_token = start.elapsed();
        while !ended_by_eos && self.generated(&history) < self.args.n_predict {
            let token = *history.last().expect("a token was taken");
            self.engine.decode(&mut [Next { session: &mut self.session, token }], &mut buffers)?;
            let token = buffers.sample(0, &mut self.sampler, &history)?;
            ended_by_eos = self.take(token, &mut history)?;
        }
        self.emitter.finish()?;
        let decode = start.elapsed() - first_token;
        Ok(Outcome { tokens: history.split_off(self.prompt.len()), ended_by_eos, prefill, first_token, decode })
    }

    fn generated(&self, history: &[u32]) -> usize {
        history.len() - self.prompt.len()
    }

    /// Takes the chosen token and shows it. Returns whether it ends the text.
    fn take(&mut self, token: u32, history: &mut Vec<u32>) -> Result<bool> {
        history.push(token);
        let eos = !self.args.ignore_eos && self.engine.model().config.eos_token_ids.contains(&token);
        self.emitter.emit(token, eos)?;
        if self.args.json {
            let n = self.generated(history);
            self.progress.show(format_args!("token {n} of {}", self.args.n_predict));
        }
        Ok(eos)
    }

    fn report(&self, outcome: &Outcome) -> Result<()> {
        if self.args.json {
            return print(&format!("{}\n", self.json(outcome)));
        }
        let Outcome { tokens, prefill, first_token, decode, .. } = outcome;
        let rate = |r: Option<f64>| r.map_or("n/a".to_string(), |r| format!("{r:.1} tok/s"));
        say(format_args!("{}, {}", self.engine.model().name, self.engine.device().describe()));
        say(format_args!(
            "prompt: {} tokens in {:.1} ms, {}; first token after {:.1} ms",
            self.prompt.len(),
            ms(*prefill),
            rate(per_second(self.prompt.len(), *prefill)),
            ms(*first_token)
        ));
        say(format_args!(
            "generated: {} tokens, stopped by {}; decode {:.1} ms, {}",
            tokens.len(),
            outcome.stop_reason(),
            ms(*decode),
            rate(per_second(tokens.len() - 1, *decode))
        ));
        say_cache(self.engine, &self.session);
        Ok(())
    }

    fn json(&self, outcome: &Outcome) -> Value {
        let bytes = self.session.cache_bytes();
        let Outcome { tokens, prefill, first_token, decode, .. } = outcome;
        let kv = self.session.kv();
        json!({
            "model": self.engine.model().name,
            "kv": kv.mode.name(),
            "bits_group_residual_top_k": tuning(kv),
            "prompt_tokens": self.prompt.len(),
            "tokens": tokens,
            "text": self.emitter.text(),
            "stop_reason": outcome.stop_reason(),
            "timings": {
                "time_to_first_token_ms": ms(*first_token),
                "prefill_ms": ms(*prefill),
                "decode_ms": ms(*decode),
                "prefill_tok_s": per_second(self.prompt.len(), *prefill),
                "decode_tok_s": per_second(tokens.len() - 1, *decode),
            },
            "cache": { "device_bytes": bytes.device(), "host_bytes": bytes.host },
            "specache": Figures::of(self.engine, &self.session).json(),
        })
    }
}

impl Outcome {
    fn stop_reason(&self) -> &'static str {
        if self.ended_by_eos { "eos" } else { "length" }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// `None` where nothing was counted.
fn per_second(n: usize, time: Duration) -> Option<f64> {
    (n > 0).then(|| n as f64 / time.as_secs_f64().max(1e-9))
}

/// Shows tokens as they come: their text, or their ids where there is no tokenizer. With `--json` it only keeps the text.
struct Emitter<'a> {
    stream: Option<Stream<'a>>,
    json: bool,
    text: String,
    any: bool,
}

impl<'a> Emitter<'a> {
    fn new(tokenizer: Option<&'a Tokenizer>, prompt: &[u32], json: bool) -> Self {
        Emitter { stream: tokenizer.map(|t| t.stream(prompt)), json, text: String::new(), any: false }
    }

    /// The token that ends a text is no part of it.
    fn emit(&mut self, token: u32, eos: bool) -> Result<()> {
        match &mut self.stream {
            Some(stream) if !eos => {
                let piece = stream.push(token)?;
                self.show(piece)
            }
            Some(_) => Ok(()),
            None => {
                let space = if std::mem::replace(&mut self.any, true) { " " } else { "" };
                self.show(format!("{space}{token}"))
            }
        }
    }

    /// What was held back, and the end of a line where one is wanted.
    fn finish(&mut self) -> Result<()> {
        let rest = self.stream.as_mut().map_or(Ok(String::new()), Stream::flush)?;
        self.show(rest)?;
        let line = self.stream.is_none() || std::io::stdout().is_terminal();
        if line && !self.json { print("\n") } else { Ok(()) }
    }

    fn show(&mut self, piece: String) -> Result<()> {
        if self.json {
            self.text.push_str(&piece);
        } else if !piece.is_empty() {
            print(&piece)?;
        }
        Ok(())
    }

    /// The whole text, with `--json`.
    fn text(&self) -> Option<&str> {
        self.stream.is_some().then_some(&self.text)
    }
}

/// What a session has measured, without what does not apply: copies in modes that have none, quality on random weights.
pub struct Figures {
    pub hit_rate: Option<f64>,
    pub hit_rate_per_layer: Option<Vec<Option<f64>>>,
    pub acceptance: Option<f64>,
    /// Share of the selected pairs that were in their slots already.
    pub delta_saved_per_layer: Option<Vec<Option<f64>>>,
    pub fetched_bytes_per_step: Option<f64>,
    pub exposed_us_per_step: Option<f64>,
}

impl Figures {
    /// The figures of `session`.
    pub fn of(engine: &Engine, session: &Session) -> Figures {
        let stats = session.stats();
        let copies = session.kv().mode.on_host();
        let quality = session.kv().mode == KvMode::SpeCache && !engine.model().synthetic;
        let layers = 0..engine.model().config.n_layers;
        Figures {
            hit_rate: stats.hit_rate().filter(|_| quality),
            hit_rate_per_layer: quality.then(|| layers.clone().map(|l| stats.layer_hit_rate(l)).collect()),
            acceptance: stats.acceptance().filter(|_| quality),
            delta_saved_per_layer: session
                .kv()
                .mode
                .fetches()
                .then(|| layers.clone().map(|l| stats.layer_saved(l)).collect()),
            fetched_bytes_per_step: stats.fetched_bytes_per_step().filter(|_| copies),
            exposed_us_per_step: stats.exposed_us_per_step().filter(|_| copies),
        }
    }

    fn json(&self) -> Value {
        json!({
            "hit_rate": self.hit_rate,
            "hit_rate_per_layer": self.hit_rate_per_layer,
            "acceptance": self.acceptance,
            "delta_saved_per_layer": self.delta_saved_per_layer,
            "fetched_bytes_per_step": self.fetched_bytes_per_step,
            "exposed_us_per_step": self.exposed_us_per_step,
        })
    }
}

/// The options of a mode that matter, in short: `2/64/64/64` is bits, group, residual, top-k.
pub fn tuning(kv: &KvOptions) -> String {
    let dash = |applies: bool, value: usize| if applies { value.to_string() } else { "-".into() };
    let (low_bit, mode) = (kv.mode.low_bit(), kv.mode);
    let parts = [
        dash(low_bit, kv.bits),
        dash(low_bit, kv.group_size),
        dash(mode != KvMode::Full, kv.residual_len),
        dash(mode.fetches(), kv.top_k),
    ];
    parts.join("/")
}

/// A few lines about the cache on stderr.
pub fn say_cache(engine: &Engine, session: &Session) {
    let (kv, bytes) = (session.kv(), session.cache_bytes());
    say(format_args!(
        "KV cache: {} (bits/group/residual/top-k {}), {} on the device, {} on the host",
        kv.mode.name(),
        tuning(kv),
        size::show(bytes.device()),
        size::show(bytes.host)
    ));
    let figures = Figures::of(engine, session);
    if let Some(bytes) = figures.fetched_bytes_per_step {
        let waited = figures.exposed_us_per_step.map_or("n/a (--trace measures it)".into(), |us| format!("{us:.1} us"));
        say(format_args!("per step: {} from the host, waited for them: {waited}", size::show(bytes as u64)));
    }
    if kv.mode == KvMode::SpeCache {
        let share = |x: Option<f64>| x.map_or("n/a".to_string(), |x| format!("{x:.3}"));
        say(format_args!("hit rate {}, acceptance {}", share(figures.hit_rate), share(figures.acceptance)));
    }
}
