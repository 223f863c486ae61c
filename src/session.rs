//! One sequence: its cache, its speculative token, its figures; and what batches of them are made of.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::context::{Context, check_context};
use crate::cuda;
use crate::error::{Error, Result};
use crate::kv::cache::{Cache, CacheBytes};
use crate::kv::fetch::{FetchQueue, Fetched};
use crate::kv::view::SeqRows;
use crate::kv::{KvMode, KvOptions, KvShape};
use crate::model::Config;
use crate::ops::attn_decode::Scratch;
use crate::ops::linear::Rows;
use crate::sampler::{Sampler, argmax};

/// One sequence: its cache, its speculative token, its figures.
pub struct Session {
    pub(crate) cache: Cache,
    /// The model's own limit of the context.
    max_context: Option<usize>,
    /// The next step's second row; `None` until the pre-decode that follows a prefill.
    pub(crate) speculative: Option<u32>,
    /// Speculative tokens to use instead of the model's own, one a step.
    pub(crate) forced: Option<VecDeque<u32>>,
    /// What was selected, if it is to be kept.
    pub(crate) trace: Option<Trace>,
    /// What the last step attended to, layer by layer, if it is to be kept.
    attention: Option<Vec<Attention>>,
    pub(crate) stats: Stats,
    /// What it was before the call that is under way, which may be given up.
    before: Before,
    /// First layer whose input was not finite in this call.
    pub(crate) bad_layer: Option<usize>,
    /// The speculative token of the step before; this step's real token tells whether it was right.
    pub(crate) last_guess: Option<u32>,
    pub(crate) stop: Stop,
    failure: Option<Failure>,
}

/// What a call may have to give back, beside the cache.
struct Before {
    stats: Stats,
    /// The call begins with its pre-decode.
    fresh: bool,
    /// Speculative tokens that were still to be forced.
    forced: usize,
}

/// What stops the calls that a session takes part in.
#[derive(Default)]
pub(crate) struct Stop(Option<Arc<AtomicBool>>);

impl Stop {
    /// [`Error::Interrupted`] while the flag is set.
    pub(crate) fn check(&self) -> Result<()> {
        match &self.0 {
            Some(flag) if flag.load(Ordering::Relaxed) => Err(Error::Interrupted),
            _ => Ok(()),
        }
    }
}

/// Why a session cannot go on.
enum Failure {
    NotFinite(String),
    Copy(String),
}

impl Failure {
    fn error(&self) -> Error {
        match self {
            Failure::NotFinite(why) => Error::NotFinite(why.clone()),
            Failure::Copy(why) => Error::Device(why.clone()),
        }
    }
}

impl Session {
    /// See [`crate::Engine::session`].
    pub(crate) fn new(context: &Context, kv: KvOptions, max_tokens: usize) -> Result<Session> {
        kv.validate(&context.model.config)?;
        context.check_context(max_tokens)?;
        let shape = KvShape::new(&context.model.config, &kv);
        Ok(Session {
            max_context: context.model.config.max_context(),
            ..Session::around(Cache::new(&context.device, &context.slab, shape, kv, max_tokens)?)
        })
    }

    fn around(cache: Cache) -> Session {
        Session {
            stats: Stats::new(&cache),
            before: Before { stats: Stats::new(&cache), fresh: false, forced: 0 },
            cache,
            max_context: None,
            speculative: None,
            forced: None,
            trace: None,
            attention: None,
            bad_layer: None,
            last_guess: None,
            stop: Stop::default(),
            failure: None,
        }
    }

    /// A second session with the same tokens, and as much room, which goes its own way from here: for several answers to
    /// one prompt. Complete 16-bit pages on the host are shared, what lies on the device is copied. Figures begin anew.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], and [`Session::failure`]; nothing has changed then.
    pub fn fork(&mut self) -> Result<Session> {
        self.cache.come_to_rest();
        self.check_sound()?;
        Ok(Session {
            max_context: self.max_context,
            speculative: self.speculative,
            last_guess: self.last_guess,
            ..Session::around(self.cache.fork()?)
        })
    }

    /// Forgets all tokens from `n_tokens` on: the session is as after a prefill of those that stay, with the figures of
    /// its whole life.
    ///
    /// # Errors
    /// [`Error::Usage`] for 0 tokens or more than there are, and in `kivi` for tokens whose 16-bit form is gone;
    /// [`Error::OutOfMemory`] if pages that a fork shares cannot be replaced. Nothing has changed then. [`Session::failure`],
    /// also if a copy fails that brings pages back.
    pub fn truncate(&mut self, n_tokens: usize) -> Result<()> {
        self.cache.come_to_rest();
        self.check_sound()?;
        let has = self.n_tokens();
        if n_tokens == 0 || n_tokens > has {
            return Err(Error::Usage(format!("truncate to {n_tokens} tokens: from 1 to the {has} that there are")));
        }
        self.cut(n_tokens)
    }

    /// Forgets all tokens from `n_tokens` on, of those that there are.
    fn cut(&mut self, n_tokens: usize) -> Result<()> {
        let cut = self.cache.truncate(n_tokens);
        self.check_sound().and(cut)?;
        (self.speculative, self.last_guess) = (None, None);
        Ok(())
    }

    /// Forgets all tokens, as [`Session::clear`], with the figures of the session's whole life.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn forget(&mut self) -> Result<()> {
        self.cache.come_to_rest();
        self.check_sound()?;
        self.cut(0)
    }

    /// Forgets everything: the session is as a new one with the same options and the same room, which it never gives
    /// away. Figures begin anew.
    ///
    /// # Errors
    /// [`Session::failure`]; [`Error::OutOfMemory`] if pages that a fork shares cannot be replaced. Nothing has changed then.
    pub fn clear(&mut self) -> Result<()> {
        self.forget()?;
        (self.forced, self.trace) = (None, None);
        self.stats = Stats::new(&self.cache);
        Ok(())
    }

    /// Why the session has failed, if it has, and can only be given up: [`Error::NotFinite`] or [`Error::Device`], which all
    /// calls that use its cache give from then on, in the same words.
    pub fn failure(&mut self) -> Option<Error> {
        self.check_sound().err()
    }

    /// Tokens in the cache.
    pub fn n_tokens(&self) -> usize {
        self.cache.counters.n
    }

    /// Makes room for at least `max_tokens` tokens: for a conversation that outgrows what it was begun with.
    ///
    /// # Errors
    /// [`Error::Usage`] beyond what the model supports, [`Error::OutOfMemory`], [`Session::failure`]; tokens and room are as
    /// before then.
    pub fn reserve(&mut self, max_tokens: usize) -> Result<()> {
        self.check_sound()?;
        check_context(max_tokens, self.max_context)?;
        self.cache.reserve(max_tokens)
    }

    /// Tokens that there is room for; decoding goes no further, a prefill makes more room.
    pub fn max_tokens(&self) -> usize {
        self.cache.capacity()
    }

    /// While `flag` is set, calls that this session takes part in stop as by [`crate::Engine::interrupt_flag`]: all of
    /// their sessions are as before. Forks have no such flag.
    pub fn stop_when(&mut self, flag: Arc<AtomicBool>) {
        self.stop = Stop(Some(flag));
    }

    /// The KV options.
    pub fn kv(&self) -> &KvOptions {
        &self.cache.options
    }

    /// Fills an empty session with `n_tokens` tokens of random K and V, as if they had been prefilled: for benchmarks of
    /// decoding on random weights only, where a real prefill would give numbers of as little meaning, later.
    ///
    /// # Errors
    /// [`Error::Usage`] if the session is not empty or `n_tokens` is 0; [`Error::OutOfMemory`] as a prefill.
    pub fn fill_synthetic(&mut self, n_tokens: usize, seed: u64) -> Result<()> {
        check_context(n_tokens, self.max_context)?;
        if self.n_tokens() > 0 || n_tokens == 0 {
            let has = self.n_tokens();
            return Err(Error::Usage(format!(
                "fill {n_tokens} random tokens: at least 1, into 0 and not {has} tokens"
            )));
        }
        self.stats.offloaded_bytes += self.cache.fill_synthetic(n_tokens, seed)?;
        Ok(())
    }

    /// Bytes that the cache holds.
    pub fn cache_bytes(&self) -> CacheBytes {
        self.cache.bytes()
    }

    /// What was measured since the session began.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Uses these speculative tokens, the first as T'_2, instead of the model's own: makes two implementations
    /// comparable step by step.
    pub fn force_speculative(&mut self, tokens: impl IntoIterator<Item = u32>) {
        self.forced = Some(tokens.into_iter().collect());
    }

    /// Keeps every selection from now on.
    pub fn keep_trace(&mut self) {
        self.trace = Some(Trace::default());
    }

    /// What was selected since [`Session::keep_trace`].
    pub fn trace(&self) -> Option<&Trace> {
        self.trace.as_ref()
    }

    /// Keeps what every step's real token attends to from now on: for evaluation ([`crate::eval::coverage`]). Costs
    /// `4 * n_heads * n_layers` bytes a token, which no budget counts, and the time to copy them.
    ///
    /// # Errors
    /// [`Error::Usage`] on a GPU, whose kernels keep no probabilities.
    pub fn keep_attention(&mut self) -> Result<()> {
        if self.cache.device().gpu().is_some() {
            return Err(Error::Usage("attention can be looked at on the CPU device only: use --device cpu".into()));
        }
        self.attention = Some(vec![Attention::default(); self.cache.shape.n_layers]);
        Ok(())
    }

    /// What the last step's real token attended to, by layer; `None` without [`Session::keep_attention`].
    pub fn attention(&self) -> Option<&[Attention]> {
        self.attention.as_deref()
    }

    /// Whether the session can be used, with this context. Of copies that have failed a call tells at its end, for this
    /// sequence alone.
    pub(crate) fn check_usable(&self, context: &Context) -> Result<()> {
        let shape = KvShape::new(&context.model.config, self.kv());
        if !self.cache.device().is(&context.device) || shape != self.cache.shape {
            return Err(Error::Usage("this session belongs to another engine: use the one that made it".into()));
        }
        self.failure.as_ref().map_or(Ok(()), |failure| Err(failure.error()))
    }

    /// Whether all has gone well so far, copies too. What has not is kept, so that every call says the same of it.
    fn check_sound(&mut self) -> Result<()> {
        if let (None, Some(why)) = (&self.failure, self.cache.failure()) {
            let why = format!("this session's 16-bit pairs are not complete: {why}");
            self.failure = Some(Failure::Copy(why));
        }
        self.failure.as_ref().map_or(Ok(()), |failure| Err(failure.error()))
    }

    /// A call begins, which may be given up. `fresh`: it begins with a pre-decode of this session.
    pub(crate) fn begin_call(&mut self, fresh: bool) {
        self.bad_layer = None;
        self.before.stats.copy_from(&self.stats);
        self.before.fresh = fresh;
        self.before.forced = self.n_forced();
    }

    /// Whether the call that is under way began with a pre-decode of this session.
    pub(crate) fn is_fresh(&self) -> bool {
        self.before.fresh
    }

    /// The call is given up: figures count what is complete, and a guess that it has made is forgotten.
    pub(crate) fn undo_call(&mut self) {
        self.bad_layer = None;
        self.failure = None; // a sound session was given; what the cache knows of failed copies stays
        self.stats.copy_from(&self.before.stats);
        if !self.before.fresh {
            return;
        }
        let guess = self.speculative.take();
        if self.n_forced() < self.before.forced {
            let forced = self.forced.as_mut().zip(guess);
            forced.into_iter().for_each(|(forced, guess)| forced.push_front(guess));
        }
        self.trace.iter_mut().for_each(|trace| trace.pre_decode.clear());
    }

    fn n_forced(&self) -> usize {
        self.forced.as_ref().map_or(0, VecDeque::len)
    }

    /// Checks this call's logits. A failure is final for the session: its cache holds what it should not.
    pub(crate) fn check_finite(&mut self, finite: bool) -> Result<()> {
        self.check_sound()?; // it may have failed earlier in the same call: in the pre-decode
        if finite && self.bad_layer.is_none() {
            return Ok(());
        }
        let place = match self.bad_layer {
            Some(0) => "the embedding gave".to_string(),
            Some(layer) => format!("layer {} gave", layer - 1),
            None => "the last layer or the LM head gave".to_string(),
        };
        let why = format!("{place} NaN or infinity; the weights may be damaged or too large for their number type");
        Err(self.failure.insert(Failure::NotFinite(why)).error())
    }
}

/// A prompt and the session that it goes to.
pub struct Prompt<'a> {
    /// Where it goes, behind what is there already.
    pub session: &'a mut Session,
    /// At least one token.
    pub tokens: &'a [u32],
}

impl Prompt<'_> {
    /// Tokens of the session after the prompt.
    pub(crate) fn end(&self) -> usize {
        self.session.n_tokens() + self.tokens.len()
    }
}

/// The next token of a session.
pub struct Next<'a> {
    /// Which sequence.
    pub session: &'a mut Session,
    /// The real token T_t.
    pub token: u32,
}

/// Memory of prefill and decode calls, kept between them: it grows with the context and is not allocated anew.
#[derive(Default)]
pub struct Buffers {
    pub(crate) rows: Rows,
    pub(crate) attention: Scratch,
    /// Batch index, rows and tokens of each sequence that takes part in a pass.
    pub(crate) members: Vec<Member>,
    pub(crate) seqs: Vec<SeqRows>,
    pub(crate) tokens: Vec<u32>,
    /// `[rows, vocab]`.
    pub(crate) logits: Vec<f32>,
    /// Logits row of each sequence of the batch, or why it failed.
    pub(crate) results: Vec<Result<usize>>,
    /// Pairs on their way from the host.
    pub(crate) fetches: FetchQueue,
    pub(crate) vocab: usize,
    /// The last pass was a GPU's: its logits are in `rows`.
    pub(crate) on_gpu: bool,
}

/// One sequence of a pass.
#[derive(Clone, Copy)]
pub(crate) struct Member {
    /// Index in the batch.
    pub(crate) index: usize,
    /// Row 0 is real, row 1 speculative.
    pub(crate) tokens: [u32; 2],
}

impl Buffers {
    /// Logits `[vocab]` of sequence `i` of the last decode call, from its real row. A GPU copies them to the host when they are
    /// asked for the first time (0.5 MB for Llama 3); [`Buffers::argmax`] and [`Buffers::sample`] do without.
    ///
    /// # Errors
    /// [`Error::NotFinite`] or [`Error::Device`] if that sequence failed; [`Error::Usage`] if there was none or the call was refused.
    pub fn logits(&mut self, i: usize) -> Result<&[f32]> {
        let row = self.row(i)?;
        if self.on_gpu {
            self.rows.gpu.fetch_logits(row)?;
        }
        self.logits_on_host(i)
    }

    /// The same for logits that [`Buffers::logits`] has been asked for since the call, so that several rows can be looked at
    /// together.
    ///
    /// # Errors
    /// As [`Buffers::logits`], and [`Error::Usage`] if a GPU still has them.
    pub fn logits_on_host(&self, i: usize) -> Result<&[f32]> {
        let row = self.row(i)?;
        if !self.on_gpu {
            return Ok(&self.logits[row * self.vocab..][..self.vocab]);
        }
        let missing = || Error::Usage(format!("logits of sequence {i}: on the GPU; ask for them with `logits` first"));
        self.rows.gpu.logits(row).ok_or_else(missing)
    }

    /// Whether sequence `i` of the last decode call has its logits.
    ///
    /// # Errors
    /// As [`Buffers::logits`].
    pub fn check(&self, i: usize) -> Result<()> {
        self.row(i).map(drop)
    }

    /// The token of the highest logit of sequence `i` of the last decode call, the lowest of equal ones.
    ///
    /// # Errors
    /// As [`Buffers::logits`].
    pub fn argmax(&self, i: usize) -> Result<u32> {
        let row = self.row(i)?;
        if self.on_gpu {
            return Ok(self.rows.gpu.argmax(row));
        }
        Ok(argmax(&self.logits[row * self.vocab..][..self.vocab]))
    }

    /// The token that `sampler` chooses for sequence `i` of the last decode call, as [`Sampler::sample`] does. A GPU draws by
    /// itself, with weights of fp32 where the CPU's are fp64 (csrc/draw.cu): the token is another only where the random
    /// number falls within about 1e-6 of a border between two.
    ///
    /// # Errors
    /// As [`Buffers::logits`] and [`Sampler::sample`].
    pub fn sample(&mut self, i: usize, sampler: &mut Sampler, history: &[u32]) -> Result<u32> {
        let row = self.row(i)?;
        if !self.on_gpu {
            return sampler.sample(self.logits(i)?, history);
        }
        if sampler.is_argmax() {
            return Ok(self.rows.gpu.argmax(row));
        }
        let random = sampler.next_random();
        self.rows.gpu.draw(row, sampler.options(), random, history)
    }

    /// Row of the logits of sequence `i`.
    fn row(&self, i: usize) -> Result<usize> {
        match self.results.get(i) {
            Some(Ok(row)) => Ok(*row),
            Some(Err(Error::Device(why))) => Err(Error::Device(why.clone())),
            Some(Err(e)) => Err(Error::NotFinite(e.to_string())),
            None => {
                Err(Error::Usage(format!("logits of sequence {i}: the last decode call gave {}", self.results.len())))
            }
        }
    }
}

/// What a session has measured (method.md, "Quantities to report").
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Decode steps.
    pub steps: u64,
    /// Steps whose speculative token was the real one of the next step.
    pub accepted: u64,
    /// Steps whose speculative token could be compared.
    pub compared: u64,
    /// Per layer: pairs of row 0's own top-k that had been prefetched, and pairs of that top-k.
    pub hits: Vec<(u64, u64)>,
    /// Per layer, decode steps only: pairs that were fetched, and pairs that were selected. Fewer are fetched than selected
    /// where delta prefetch finds them in their slots.
    pub fetched: Vec<(u64, u64)>,
    /// Bytes from host to device that decode steps have used or, where they select for the next one, asked for.
    pub fetched_bytes: u64,
    /// Bytes from host to device in pre-decodes, once per prefill.
    pub pre_decode_bytes: u64,
    /// Bytes from device to host, prefill included.
    pub offloaded_bytes: u64,
    /// Time that decode steps waited for copies, as far as that was measured. As their bytes, what a pre-decode waited is not
    /// counted here.
    pub exposed: Duration,
    /// Decode steps in which it was: all of them on the CPU, and on a GPU where somebody asked
    /// ([`crate::device::Device::measure_waits`]).
    pub exposed_steps: u64,
}

impl Stats {
    /// Compares a step's real token with what was guessed for it, if anything was.
    pub(crate) fn compare(&mut self, guess: Option<u32>, token: u32) {
        if let Some(guess) = guess {
            self.compared += 1;
            self.accepted += u64::from(guess == token);
        }
    }

    /// As `*self = from.clone()`, without allocating.
    fn copy_from(&mut self, from: &Stats) {
        let Stats { mut hits, mut fetched, .. } = std::mem::take(self);
        hits.clone_from(&from.hits);
        fetched.clone_from(&from.fetched);
        *self = Stats { hits, fetched, ..*from };
    }

    fn new(cache: &Cache) -> Stats {
        let per_layer = vec![(0, 0); cache.shape.n_layers];
        Stats { hits: per_layer.clone(), fetched: per_layer, ..Stats::default() }
    }

    /// Share of the selected pairs of one layer that were in their slots already; `None` before anything was selected.
    pub fn layer_saved(&self, layer: usize) -> Option<f64> {
        let (fetched, of) = self.fetched[layer];
        (of > 0).then(|| 1.0 - fetched as f64 / of as f64)
    }

    /// Share of the selected pairs that were in their slots already, over all layers.
    pub fn saved(&self) -> Option<f64> {
        let (fetched, of) = self.fetched.iter().fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        (of > 0).then(|| 1.0 - fetched as f64 / of as f64)
    }

    /// Share of hits of one layer; `None` before anything could be hit.
    pub fn layer_hit_rate(&self, layer: usize) -> Option<f64> {
        let (hits, of) = self.hits[layer];
        (of > 0).then(|| hits as f64 / of as f64)
    }

    /// Share of hits over all layers.
    pub fn hit_rate(&self) -> Option<f64> {
        let (hits, of) = self.hits.iter().fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        (of > 0).then(|| hits as f64 / of as f64)
    }

    /// Share of steps whose speculative token was right.
    pub fn acceptance(&self) -> Option<f64> {
        (self.compared > 0).then(|| self.accepted as f64 / self.compared as f64)
    }

    /// Bytes per step from host to device.
    pub fn fetched_bytes_per_step(&self) -> Option<f64> {
        (self.steps > 0).then(|| self.fetched_bytes as f64 / self.steps as f64)
    }

    /// Waiting time per step, microseconds; `None` where it was not measured.
    pub fn exposed_us_per_step(&self) -> Option<f64> {
        (self.exposed_steps > 0).then(|| self.exposed.as_secs_f64() * 1e6 / self.exposed_steps as f64)
    }
}

/// Selected positions, `[layer][kv head]` ascending.
pub type Selections = Vec<Vec<Vec<u32>>>;

/// What a session selected, step by step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Speculative token of each step, T'_2 first (`specache`).
    pub speculative: Vec<u32>,
    /// The last pre-decode's selection, for the step after it (`specache`).
    pub pre_decode: Selections,
    /// Each step's selection: for the next step (`specache`), or the one that it used itself (`fetch`).
    pub steps: Vec<Selections>,
}

/// What the real token of a decode step attended to in one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attention {
    /// Positions that it saw: its own is the last.
    pub seen: Range<usize>,
    /// Those among them that were read low-bit, but for the prefetched ones.
    pub low_bit: Range<usize>,
    /// `[n_heads][seen]`: softmax probabilities.
    pub probabilities: Vec<f32>,
    /// `[n_kv_heads]`: positions read at 16 bits instead of low-bit, ascending; empty in modes that fetch nothing.
    pub fetched: Vec<Vec<u32>>,
}

impl Session {
    /// Keeps what row 0 of a step attends to in a layer, if that is wanted. `seq`: its index in `scratch`.
    pub(crate) fn note_attention(
        &mut self,
        config: &Config,
        layer: usize,
        seq: usize,
        rows: &SeqRows,
        scratch: &Scratch,
    ) {
        let Some(mut kept) = self.attention.take() else { return };
        let (low_bit, counters) = (self.kv().mode.low_bit(), self.cache.counters);
        let to = &mut kept[layer];
        to.seen = self.candidates(rows.position, rows.position + 1, config.sliding_window);
        to.low_bit = self.candidates(rows.position, if low_bit { counters.nq } else { 0 }, config.sliding_window);
        to.probabilities.clear();
        to.probabilities.resize(config.n_heads * to.seen.len(), 0.0);
        for (head, out) in to.probabilities.chunks_exact_mut(to.seen.len()).enumerate() {
            let (kv_head, query) = (head / config.group_heads(), head % config.group_heads());
            scratch.head_probs(seq, kv_head).add_to(query..query + 1, to.seen.clone(), out);
        }
        to.fetched.clear();
        if self.kv().mode.fetches() {
            let slots = self.cache.layers[layer].prefetch.slots();
            to.fetched.extend((0..config.n_kv_heads).map(|head| slots.selected(head).to_vec()));
        }
        self.attention = Some(kept);
    }

    /// Positions below `limit` that a row at `position` sees: what may be selected.
    pub(crate) fn candidates(&self, position: usize, limit: usize, window: Option<usize>) -> Range<usize> {
        let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
        first.min(limit)..limit
    }

    /// Keeps what a layer has selected, if that is traced.
    pub(crate) fn note_selection(&mut self, layer: usize, pre_decode: bool) {
        let Some(trace) = &mut self.trace else { return };
        let slots = self.cache.layers[layer].prefetch.slots();
        let selected = (0..self.cache.shape.n_kv_heads).map(|head| slots.selected(head).to_vec()).collect();
        let selections = if pre_decode { Some(&mut trace.pre_decode) } else { trace.steps.last_mut() };
        selections.expect("a step has begun").push(selected);
    }

    /// On a GPU, at the end of a pass in which this was sequence `seq`: what it met, selected and fetched.
    pub(crate) fn note_pass(&mut self, config: &Config, seq: usize, pass: &cuda::Workspace, pre_decode: bool) {
        self.bad_layer = pass.bad_layer(seq);
        if !self.kv().mode.fetches() {
            return;
        }
        let (counters, shape) = (&self.cache.counters, &self.cache.shape);
        let seen = self.candidates(counters.n, counters.nq, config.sliding_window).len();
        let of = (shape.n_kv_heads * self.cache.top_k().min(seen)) as u64;
        let is_step = self.kv().mode == KvMode::SpeCache && !pre_decode;
        for layer in 0..config.n_layers {
            if is_step {
                let sum = &mut self.stats.hits[layer];
                *sum = (sum.0 + pass.hits(config, layer, seq), sum.1 + of);
            }
            let fetched = pass.fetched(config, layer, seq);
            self.note_fetch(layer, Fetched { fetched, selected: 0 }, pre_decode);
            let Some(trace) = &mut self.trace else { continue };
            let selected = |head| pass.selected(config, layer, seq, head).to_vec();
            let selections = if pre_decode { Some(&mut trace.pre_decode) } else { trace.steps.last_mut() };
            selections.expect("a step has begun").push((0..config.n_kv_heads).map(selected).collect());
        }
    }

    /// The device has failed in the middle of a pass: nobody knows what the cache holds.
    pub(crate) fn fail_device(&mut self, why: &Error) {
        self.failure.get_or_insert(Failure::Copy(why.to_string()));
    }

    /// Bytes of K and V of one token and KV head at 16 bits.
    pub(crate) fn pair_bytes(&self) -> u64 {
        self.cache.shape.pair_bytes() as u64
    }

    /// Counts a fetch of so many pairs.
    pub(crate) fn note_fetch(&mut self, layer: usize, pairs: Fetched, pre_decode: bool) {
        let bytes = pairs.fetched * self.pair_bytes();
        if pre_decode {
            self.stats.pre_decode_bytes += bytes;
            return;
        }
        self.stats.fetched_bytes += bytes;
        let sum = &mut self.stats.fetched[layer];
        *sum = (sum.0 + pairs.fetched, sum.1 + pairs.selected);
    }

    /// Whether the next decode call begins with a pre-decode.
    pub(crate) fn needs_pre_decode(&self) -> bool {
        self.kv().mode == KvMode::SpeCache && self.speculative.is_none()
    }
}
