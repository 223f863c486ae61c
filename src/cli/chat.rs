//! `chat`: a conversation on one cache, which each turn continues.

use std::io::{self, BufRead, IsTerminal, Write, stderr, stdin};
use std::time::{Duration, Instant};

use specache::chat::{ChatTemplate, Message};
use specache::device::interrupt;
use specache::error::{Error, Result};
use specache::kv::{KvMode, KvOptions};
use specache::sampler::{Sampler, SamplingOptions};
use specache::tokenizer::Tokenizer;
use specache::{Buffers, Engine, Next, Prompt, Session};

use super::args::ChatArgs;
use super::output::{print, traced};
use super::progress::{Progress, prefilled, say};
use super::{generate, input, size};

const HELP: &str = "\
/stats         tokens, speed, memory by kind, hit rate, acceptance
/system TEXT   another system message; without TEXT none
/reset         forget the conversation
/help          this
/quit          end, as the end of the input does
A message that begins with / is written with two. Ctrl-C stops an answer, and at the prompt the program.";

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the arguments or the model, and what no later turn could mend.
pub fn run(args: ChatArgs) -> Result<()> {
    if args.n_predict == Some(0) {
        return Err(Error::Usage("-n 0: at least one token must be generated".into()));
    }
    let device = args.model.device.options()?;
    let trace = args.model.device.trace_file()?;
    let template = if args.raw { None } else { Some(template(&args.model.model)?) };
    let mut progress = Progress::new();
    progress.announce(format_args!("loading {}", args.model.model));
    let engine = Engine::load(&args.model.model, &device)?;
    let config = &engine.model().config;
    let tokenizer = input::tokenizer(&args.model.model, config.vocab_size)?.ok_or_else(|| {
        Error::Usage("chat: this model has no tokenizer.json; use `generate` with --tokens and token ids".into())
    })?;
    let sampling = SamplingOptions::from_layers(&args.sampling.overrides(), &engine.model().generation)?;
    args.sampling.warn_of_greed(&sampling);
    let kv = args.kv.options();
    kv.validate(config)?;
    let limit = limit(&args, &engine)?;
    progress.clear();
    let mut chat = Chat {
        engine: &engine,
        tokenizer: &tokenizer,
        template,
        kv,
        limit,
        n_predict: args.n_predict.unwrap_or(usize::MAX),
        sampler: Sampler::new(sampling)?,
        system: args.system.filter(|text| !text.is_empty()),
        turns: Vec::new(),
        cache: Cached::default(),
        buffers: Buffers::default(),
        speed: Speed::default(),
        failed: Failed::default(),
    };
    let outcome = chat.converse().and_then(|()| chat.failed.outcome());
    traced(trace, engine.device(), Vec::new(), outcome)
}

fn template(model: &str) -> Result<ChatTemplate> {
    input::template(model)?.ok_or_else(|| {
        Error::Usage(format!(
            "{model} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): continue \
             texts with `generate`, or join the turns plainly with `chat --raw -n 100` (few such models end an answer \
             themselves)"
        ))
    })
}

/// Most tokens of a conversation.
fn limit(args: &ChatArgs, engine: &Engine) -> Result<usize> {
    let trained = engine.model().config.max_positions;
    match args.ctx_size {
        Some(0) => Err(Error::Usage("-c 0: at least one token is needed".into())),
        Some(size) if size > trained => {
            say(format_args!("warning: -c {size}, but the model's max_position_embeddings is {trained}"));
            engine.plan(&args.kv.options(), size).map(|_| size)
        }
        Some(size) => Ok(size),
        None => Ok(trained),
    }
}

/// A conversation.
struct Chat<'a> {
    engine: &'a Engine,
    tokenizer: &'a Tokenizer,
    /// `None`: turns are joined plainly.
    template: Option<ChatTemplate>,
    kv: KvOptions,
    limit: usize,
    n_predict: usize,
    sampler: Sampler,
    system: Option<String>,
    /// Messages of the user and answers, in turns.
    turns: Vec<String>,
    cache: Cached,
    buffers: Buffers,
    speed: Speed,
    failed: Failed,
}

/// Lines of the input that came to nothing.
#[derive(Default)]
struct Failed {
    lines: usize,
    first: Option<Error>,
}

/// What the session holds.
#[derive(Default)]
struct Cached {
    /// `None` before the first turn.
    session: Option<Session>,
    tokens: Vec<u32>,
    /// The last token of an answer that was cut off: it was shown, and no step has put it into the cache.
    pending: Option<u32>,
    /// The text of all these tokens, if it is known.
    text: Option<String>,
}

/// Tokens and time of all turns.
#[derive(Default)]
struct Speed {
    prompt: (usize, Duration),
    decode: (usize, Duration),
}

impl Chat<'_> {
    /// Reads lines until their end.
    fn converse(&mut self) -> Result<()> {
        let on_terminal = stdin().is_terminal() && stderr().is_terminal();
        if on_terminal {
            say(format_args!(
                "{}, {}; /help lists commands",
                self.engine.model().name,
                self.engine.device().describe()
            ));
        }
        loop {
            if on_terminal {
                let _ = write!(stderr(), "> ");
            }
            let Some(line) = read_line()? else { return Ok(()) };
            let line = match String::from_utf8(line) {
                Ok(line) => line,
                Err(e) => {
                    let at = e.utf8_error().valid_up_to();
                    self.failed
                        .note(Error::Usage(format!("byte {at} of this line is not valid UTF-8; the line is ignored")));
                    continue;
                }
            };
            match line.trim_end_matches(['\n', '\r']) {
                "" => {}
                message if message.starts_with("//") => self.turn(message[1..].to_string())?,
                "/quit" => return Ok(()),
                command if command.starts_with('/') => self.command(command),
                message => self.turn(message.to_string())?,
            }
        }
    }

    fn command(&mut self, line: &str) {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "/help" => say(format_args!("{HELP}")),
            "/stats" => self.say_stats(),
            "/reset" => {
                self.turns.clear();
                self.cache = Cached::default();
                say(format_args!("the conversation begins anew"));
            }
            "/system" => self.system = Some(rest.trim().to_string()).filter(|text| !text.is_empty()),
            _ => self.failed.note(Error::Usage(format!("{command} is no command; /help lists them"))),
        }
    }

    /// A message and its answer. A turn that cannot be is told and taken back; the conversation goes on.
    fn turn(&mut self, message: String) -> Result<()> {
        let flag = self.engine.interrupt_flag();
        let ctrl_c = interrupt::forward(flag.clone());
        let before = self.turns.len();
        self.turns.push(message);
        let outcome = self.answer();
        drop(ctrl_c);
        if self.turns.len() == before + 1 {
            self.turns.pop();
        }
        match outcome {
            Err(Error::Interrupted) if !interrupt::is_ending() => {
                flag.store(false, std::sync::atomic::Ordering::SeqCst);
                say(format_args!("(stopped)"));
                Ok(())
            }
            Err(why @ (Error::Usage(_) | Error::OutOfMemory { .. })) => {
                self.failed.note(why);
                Ok(())
            }
            outcome => outcome,
        }
    }

    fn answer(&mut self) -> Result<()> {
        let logits = self.prefill()?;
        let mut answer = String::new();
        let outcome = self.generate(logits, &mut answer);
        // What was shown is a part of the conversation, however it ended.
        if let Some(text) = &mut self.cache.text {
            text.push_str(&answer);
        }
        self.turns.push(answer);
        print("\n").and(outcome)
    }

    /// Brings the conversation into the cache, as far as it is not there, and returns the logits behind it.
    fn prefill(&mut self) -> Result<Vec<f32>> {
        let text = self.render()?;
        let ids = self.tokenizer.encode(&text, self.template.is_none())?;
        let (keep, rest) = self.split(&text, &ids)?;
        if keep + rest.len() >= self.limit {
            return Err(Error::Usage(format!(
                "the context of {} tokens is full: this conversation has {}, and an answer needs room; /reset begins \
                 anew, a larger -c has more room",
                self.limit,
                keep + rest.len()
            )));
        }
        let mut progress = Progress::new();
        progress.show(prefilled(rest.len(), 0.0));
        let start = Instant::now();
        let session = self.cache.cut(keep, self.engine, self.kv, rest.len())?;
        let prompts = &mut [Prompt { session, tokens: &rest }];
        let mut tell = |share| progress.show(prefilled(rest.len(), share));
        let logits = self.engine.prefill_telling(prompts, &mut self.buffers, &mut tell)?.remove(0)?;
        self.speed.add_prompt(rest.len(), start);
        self.cache.tokens.extend(rest);
        (self.cache.pending, self.cache.text) = (None, Some(text));
        Ok(logits)
    }

    /// The conversation as the model is to read it.
    fn render(&self) -> Result<String> {
        let Some(template) = &self.template else {
            let parts: Vec<&str> = self.system.iter().chain(&self.turns).map(String::as_str).collect();
            return Ok(self.join_plainly(&parts));
        };
        let system = self.system.iter().map(|content| Message { role: "system", content });
        let turns = self.turns.iter().enumerate();
        let turns = turns.map(|(i, content)| Message { role: if i % 2 == 0 { "user" } else { "assistant" }, content });
        template.render(&system.chain(turns).collect::<Vec<_>>(), true)
    }

    /// An answer follows its message at once, as a continuation does; anything else begins a line.
    fn join_plainly(&self, parts: &[&str]) -> String {
        let first_turn = usize::from(self.system.is_some());
        let mut text = String::new();
        for (i, part) in parts.iter().enumerate() {
            let is_answer = i >= first_turn && (i - first_turn) % 2 == 1;
            if i > 0 && !is_answer {
                text.push('\n');
            }
            text.push_str(part);
        }
        text
    }

    /// How many cached tokens stay, and what comes behind them. Usually all stay: the ids begin with them, or, where
    /// the tokenizer would have cut an answer differently than the model wrote it, the text begins with theirs. Where a
    /// template rewrites what was said, the common beginning stays; `kivi` cannot go back and begins anew.
    fn split(&self, text: &str, ids: &[u32]) -> Result<(usize, Vec<u32>)> {
        let Cached { tokens, pending, text: cached, .. } = &self.cache;
        let n = tokens.len();
        if ids.len() > n && ids.starts_with(tokens) && pending.is_none_or(|token| ids[n] == token) {
            return Ok((n, ids[n..].to_vec()));
        }
        let rest = cached.as_deref().and_then(|cached| text.strip_prefix(cached));
        if let Some(rest) = rest.filter(|rest| !rest.is_empty()) {
            let rest = self.tokenizer.encode(rest, false)?;
            return Ok((n, pending.iter().copied().chain(rest).collect()));
        }
        let common = tokens.iter().zip(ids).take_while(|(a, b)| a == b).count().min(ids.len().saturating_sub(1));
        let keep = if self.kv.mode == KvMode::Kivi { 0 } else { common };
        Ok((keep, ids[keep..].to_vec()))
    }

    /// Tokens until the model, the context or somebody ends them.
    fn generate(&mut self, logits: Vec<f32>, answer: &mut String) -> Result<()> {
        let tokenizer = self.tokenizer;
        let mut stream = tokenizer.stream(&self.cache.tokens);
        let mut show = |piece: String| {
            answer.push_str(&piece);
            if piece.is_empty() { Ok(()) } else { print(&piece) }
        };
        let start = Instant::now();
        let mut steps = 0;
        let mut token = self.sampler.sample(&logits, &self.cache.tokens);
        let outcome = loop {
            let chosen = match token {
                Ok(chosen) => chosen,
                Err(why) => break Err(why),
            };
            if self.engine.model().config.eos_token_ids.contains(&chosen) {
                break Ok(());
            }
            self.cache.pending = Some(chosen);
            show(stream.push(chosen)?)?;
            if steps + 1 >= self.n_predict {
                break Ok(());
            }
            if self.cache.tokens.len() + 1 >= self.limit {
                let limit = self.limit;
                break Err(Error::Usage(format!(
                    "the context of {limit} tokens is full: the answer ends here; /reset begins anew, a larger -c has \
                     more room"
                )));
            }
            if let Err(why) = self.step(chosen) {
                break Err(why);
            }
            steps += 1;
            token = self.buffers.sample(0, &mut self.sampler, &self.cache.tokens);
        };
        show(stream.flush()?)?;
        self.speed.add_decode(steps, start);
        outcome
    }

    /// Puts a token into the cache, which grows by half where it is full.
    fn step(&mut self, token: u32) -> Result<()> {
        let session = self.cache.session.as_mut().expect("a prompt was prefilled");
        let n = session.n_tokens();
        if n == session.max_tokens() {
            session.reserve((n + n / 2 + 64).min(self.limit))?;
        }
        self.engine.decode(&mut [Next { session, token }], &mut self.buffers)?;
        self.cache.tokens.push(token);
        self.cache.pending = None;
        Ok(())
    }

    fn say_stats(&self) {
        let rate = |(n, time): (usize, Duration)| match n {
            0 => "n/a".to_string(),
            n => format!("{n} tokens, {:.1} tok/s", n as f64 / time.as_secs_f64().max(1e-9)),
        };
        say(format_args!("context: {} of {} tokens", self.cache.tokens.len(), self.limit));
        say(format_args!("prefill: {}; decode: {}", rate(self.speed.prompt), rate(self.speed.decode)));
        let Some(session) = &self.cache.session else { return };
        let bytes = session.cache_bytes();
        say(format_args!(
            "memory: low-bit KV {}, residual {}, prefetch slots {}, loaded layers {}, host KV {}",
            size::show(bytes.packed),
            size::show(bytes.wide),
            size::show(bytes.slots),
            size::show(bytes.loads),
            size::show(bytes.host)
        ));
        generate::say_cache(self.engine, session);
    }
}

impl Cached {
    /// The session with its first `keep` tokens, a new one if none are kept, with room for `more` behind them.
    fn cut(&mut self, keep: usize, engine: &Engine, kv: KvOptions, more: usize) -> Result<&mut Session> {
        if keep == 0 {
            // First, as both might not fit.
            *self = Cached::default();
            return Ok(self.session.insert(engine.session(kv, more)?));
        }
        let session = self.session.as_mut().expect("tokens are kept");
        if keep < self.tokens.len() {
            session.truncate(keep)?;
            self.tokens.truncate(keep);
            (self.pending, self.text) = (None, None);
        }
        Ok(session)
    }
}

impl Failed {
    /// Tells it. The conversation goes on.
    fn note(&mut self, why: Error) {
        say(format_args!("error: {why}"));
        self.lines += 1;
        self.first.get_or_insert(why);
    }

    /// A person has seen what failed and gone on from there. A script has written its lines and looks at the exit code, which is
    /// that of the first failure.
    fn outcome(&mut self) -> Result<()> {
        match self.first.take() {
            Some(why) if !stdin().is_terminal() => {
                match self.lines {
                    1 => say(format_args!("one line of the input failed:")),
                    lines => say(format_args!("{lines} lines of the input failed, the first by")),
                }
                Err(why)
            }
            _ => Ok(()),
        }
    }
}

impl Speed {
    fn add_prompt(&mut self, n: usize, start: Instant) {
        self.prompt = (self.prompt.0 + n, self.prompt.1 + start.elapsed());
    }

    fn add_decode(&mut self, n: usize, start: Instant) {
        self.decode = (self.decode.0 + n, self.decode.1 + start.elapsed());
    }
}

/// A line of stdin with its end; `None` where there are no more.
fn read_line() -> Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let read = io::stdin().lock().read_until(b'\n', &mut line).map_err(|e| Error::io("standard input", e))?;
    Ok((read > 0).then_some(line))
}
