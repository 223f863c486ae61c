//! One token's whole story: pre-decode and the decode step of SpeCache, and of the modes beside it (method.md, "The
//! three algorithms").
//!
//! A step decodes the real token `T_t` (row 0, at position n) and in `specache` a speculative one `T'_{t+1}` (row 1, at
//! n + 1) over the same cache. Row 1's attention chooses the 16-bit pairs that the **next** step will need, and their
//! copy from the host begins at once, layer by layer: it has almost a whole step to hide in.

use std::time::{Duration, Instant};

use crate::context::Context;
use crate::cuda::{GpuModel, Place};
use crate::device::cuda::graph::Exclusive;
use crate::device::order::{Resource, StreamId, Uses};
use crate::device::trace::Visit;
use crate::device::{Device, Schedule};
use crate::error::{Error, Result};
use crate::kv::KvMode;
use crate::kv::fetch::FetchQueue;
use crate::kv::view::SeqRows;
use crate::model::Config;
use crate::ops::attn_decode;
use crate::ops::linear::{self, Dense, Path, Rows};
use crate::ops::select::{self, Selection};
use crate::sampler::argmax;
use crate::session::{Buffers, Member, Next, Session};

/// Feeds each session's token. A `specache` session that comes fresh from a prefill is pre-decoded first: its token
/// alone guesses what follows it and what the step will need.
///
/// # Errors
/// Before anything has changed: a token beyond the vocabulary, a session that is full or has failed. Between two
/// layers: [`Error::Interrupted`], which leaves every session as it was, so that the same call gives the same bits
/// later, and any other call those that it would have given before: a pre-decode of the same call is undone, as it
/// guessed for a token that was not fed. A GPU that fails: [`Error::Device`], and nobody knows what the caches of this
/// batch hold, so that its sessions have failed. A sequence that meets NaN fails alone: see [`Buffers::logits`].
pub fn decode(context: &Context, batch: &mut [Next], buffers: &mut Buffers) -> Result<()> {
    buffers.results.clear();
    batch.iter().try_for_each(|next| check(context, next))?;
    reserve_on_gpu(context, batch, buffers)?;
    for Next { session, .. } in batch.iter_mut() {
        session.cache.take_waited(); // by prefills, forks and truncations: not this step's
        session.begin_call(session.needs_pre_decode());
    }
    let _step = match passes(context, batch, buffers) {
        Ok(step) => step,
        Err(given_up) => {
            buffers.results.clear(); // a pre-decode's
            return Err(given_up);
        }
    };
    for next in batch.iter_mut() {
        next.session.stats.offloaded_bytes += next.session.cache.advance();
        next.session.stats.exposed += next.session.cache.take_waited();
        next.session.stats.steps += 1;
        next.session.stats.exposed_steps += u64::from(context.device.measures_waits());
    }
    Ok(())
}

/// The step, to which whatever the caches then launch belongs too.
fn passes(context: &Context, batch: &mut [Next], buffers: &mut Buffers) -> Result<Visit> {
    let fresh = |session: &Session| session.needs_pre_decode();
    if batch.iter().any(|next| fresh(next.session)) {
        drop(pass(context, batch, buffers, fresh, Pass::PreDecode)?);
        for Next { session, .. } in batch.iter_mut() {
            session.cache.take_waited(); // no step's either
        }
    }
    pass(context, batch, buffers, |_| true, Pass::Step)
}

/// Whether [`decode`] takes this token of this session.
///
/// # Errors
/// As there.
pub fn check(context: &Context, next: &Next) -> Result<()> {
    next.session.check_usable(context)?;
    context.check_tokens(&[next.token])?;
    check_room(next.session)
}

fn check_room(session: &Session) -> Result<()> {
    let (n, capacity) = (session.n_tokens(), session.cache.capacity());
    match n {
        0 => Err(Error::Usage("decode: the session is empty; prefill a prompt first".into())),
        _ if n < capacity => Ok(()),
        _ => Err(Error::Usage(format!("decode: the session is full with {n} of {capacity} tokens"))),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    /// One row, which selects for itself; nothing is appended.
    PreDecode,
    /// The real row and, in `specache`, the speculative one.
    Step,
}

/// All layers for the rows of those sessions that take part. Stops between two layers when it is interrupted. The
/// calling thread is in the pass until what is returned is dropped.
fn pass(
    context: &Context,
    batch: &mut [Next],
    buffers: &mut Buffers,
    takes_part: impl Fn(&Session) -> bool,
    kind: Pass,
) -> Result<Visit> {
    let (model, device) = (&context.model, &context.device);
    let config = &model.config;
    let dense = Dense { device, config, rope: &context.rope, path: Path::Rows, gpu: context.gpu.as_ref() };
    plan_rows(batch, buffers, takes_part, kind);
    buffers.on_gpu = context.gpu.is_some();
    let step = device.begin_step();
    let Buffers { rows, attention, members, seqs, tokens, logits, fetches, results, .. } = buffers;
    let n_rows = seqs.iter().map(|s| s.n_rows).sum();
    rows.resize(config, n_rows);
    tokens.clear();
    tokens.extend(members.iter().zip(&*seqs).flat_map(|(m, s)| m.tokens.into_iter().take(s.n_rows)));
    for (m, s) in members.iter().zip(&*seqs) {
        let session = &mut *batch[m.index].session;
        session.cache.begin_rows(s.n_rows);
        begin_loads(session);
    }
    fetches.begin_pass(device);
    if let Err(stopped) = check_stop(context, batch, members) {
        undo(device, config, batch, members, 0, kind, rows, fetches);
        results.clear(); // a pre-decode's
        return Err(stopped);
    }
    let graph = match &context.gpu {
        Some(gpu_model) => begin_on_gpu(context, gpu_model, batch, members, seqs, rows, kind)?,
        None => {
            linear::embed(device, model, tokens, &mut rows.x);
            None
        }
    };
    let position = |row: usize| seqs.iter().find_map(|s| s.position_of(row)).expect("a row of the pass");

    for (l, layer) in model.weights.layers.iter().enumerate() {
        device.at_layer(Some(l));
        // A GPU is given a whole pass, which may be a graph, in less time than a layer takes the CPU.
        if l > 0
            && device.gpu().is_none()
            && let Err(stopped) = check_stop(context, batch, members)
        {
            undo(device, config, batch, members, l, kind, rows, fetches);
            return Err(stopped);
        }
        let written = |uses: &mut Uses| {
            let caches = members.iter().zip(&*seqs).map(|(m, s)| (&batch[m.index].session.cache, s));
            caches.for_each(|(cache, s)| cache.declare_rows(l, s.n_rows, uses));
        };
        let mut bad_rows = Vec::new();
        dense.norm_qkv_rope(l, layer, rows, position, |row| bad_rows.push(row), written);
        bad_rows.iter().for_each(|&row| mark_bad(batch, members, seqs, row, l));
        if device.gpu().is_none() {
            for (m, s) in members.iter().zip(&*seqs) {
                append(batch[m.index].session, l, s, rows);
            }
        }
        fetches.note_wait(arrive(device, batch, members, l, kind));
        if members.iter().any(|m| batch[m.index].session.kv().mode == KvMode::Fetch) {
            fetch_on_demand(context, batch, members, seqs, l, rows, attention, fetches);
        }
        let view = |i: usize| batch[members[i].index].session.cache.view(l, config.sliding_window);
        attn_decode::attend_rows(device, config, l, seqs, view, rows, attention, None);
        for (i, (m, s)) in members.iter().zip(&*seqs).enumerate() {
            let session = &mut *batch[m.index].session;
            if kind == Pass::Step {
                session.note_attention(config, l, i, s, attention);
            }
            match session.kv().mode {
                KvMode::SpeCache => select_ahead(context, session, l, i, s, attention, kind),
                KvMode::Offload => load_ahead(session, l),
                KvMode::Full | KvMode::Kivi | KvMode::Fetch => {}
            }
        }
        select_on_gpu(device, config, batch, members, l, rows, KvMode::SpeCache);
        fetch(device, config, batch, members, l, KvMode::SpeCache, kind, rows, fetches);
        dense.out_residual(l, layer, rows);
        dense.norm_gate_up(l, layer, rows);
        dense.down_residual(l, layer, rows);
    }

    fetches.end_pass(config.n_layers);
    device.at_layer(None);
    match &context.gpu {
        Some(gpu_model) => end_on_gpu(context, gpu_model, graph, batch, members, kind, rows)?,
        None => {
            logits.resize(n_rows * config.vocab_size, 0.0);
            linear::norm_logits(device, model, &rows.x, n_rows, &mut rows.normed, logits);
        }
    }
    finish(batch, buffers, config.vocab_size, kind);
    Ok(step)
}

/// Whether somebody has asked to stop this call.
fn check_stop(context: &Context, batch: &[Next], members: &[Member]) -> Result<()> {
    context.check_interrupt()?;
    members.iter().try_for_each(|m| batch[m.index].session.stop.check())
}

/// A pass is given up before `layer`: every session is as before the call. Of what has changed, two things would reach
/// the next pass. The rest lies behind the counters: K and V at position n and n + 1, which whoever goes on overwrites.
///
/// - `specache` has replaced the selections of the layers so far, by ones that are for the step after this one. The old
///   ones come back, and their pairs from the host: all of them are there, as only offloaded positions are selected.
///   Another selection would be as good to go on with, but not the same bits. A sequence that this call has
///   pre-decoded had selected nothing: it guessed for a token that is not fed now.
/// - The figures and the trace.
#[allow(clippy::too_many_arguments)] // One call site, which names them all.
fn undo(
    device: &Device,
    config: &Config,
    batch: &mut [Next],
    members: &[Member],
    layer: usize,
    kind: Pass,
    rows: &mut Rows,
    fetches: &mut FetchQueue,
) {
    for m in members {
        let session = &mut *batch[m.index].session;
        session.cache.come_to_rest();
        if session.kv().mode != KvMode::SpeCache {
            continue;
        }
        let (fresh, layers) = (session.is_fresh(), &mut session.cache.layers);
        match fresh {
            true => layers.iter_mut().for_each(|l| l.prefetch.slots_mut().clear(false)),
            false => layers[..layer].iter_mut().for_each(|l| l.prefetch.slots_mut().restore()),
        }
    }
    for l in 0..layer {
        device.at_layer(Some(l));
        fetch(device, config, batch, members, l, KvMode::SpeCache, kind, rows, fetches);
    }
    device.at_layer(None);
    for m in members {
        let session = &mut *batch[m.index].session;
        if let (Pass::Step, Some(trace)) = (kind, &mut session.trace) {
            trace.steps.pop();
            trace.speculative.truncate(trace.speculative.len() - usize::from(session.speculative.is_some()));
        }
        session.undo_call();
    }
}

/// Which sessions take part, with which rows and tokens.
fn plan_rows(batch: &mut [Next], buffers: &mut Buffers, takes_part: impl Fn(&Session) -> bool, kind: Pass) {
    buffers.members.clear();
    buffers.seqs.clear();
    let mut first_row = 0;
    for (index, Next { session, token }) in batch.iter_mut().enumerate().filter(|(_, n)| takes_part(n.session)) {
        session.bad_layer = None;
        if kind == Pass::PreDecode {
            session.last_guess = None;
            session.trace.iter_mut().for_each(|trace| trace.pre_decode.clear());
        }
        let speculative = match kind {
            Pass::PreDecode => None,
            Pass::Step => session.speculative,
        };
        if let (Pass::Step, Some(trace)) = (kind, &mut session.trace) {
            trace.speculative.extend(speculative);
            trace.steps.push(Vec::new());
        }
        let n_rows = 1 + usize::from(speculative.is_some());
        buffers.members.push(Member { index, tokens: [*token, speculative.unwrap_or(0)] });
        let (position, room) = (session.n_tokens(), session.cache.capacity() + n_rows);
        buffers.seqs.push(SeqRows { position, first_row, n_rows, room });
        first_row += n_rows;
    }
}

/// Notes the layer at which a row of some sequence stopped being a number.
fn mark_bad(batch: &mut [Next], members: &[Member], seqs: &[SeqRows], row: usize, layer: usize) {
    for (m, s) in members.iter().zip(seqs).filter(|(_, s)| s.position_of(row).is_some()) {
        // A bad speculative row costs a guess, not the sequence.
        if row == s.first_row {
            let bad = &mut batch[m.index].session.bad_layer;
            *bad = bad.or(Some(layer));
        }
    }
}

/// K and V of every row, rounded to 16 bits, at its position. What row 1 writes, the next step's row 0 overwrites; what a
/// pre-decode writes, its step does.
fn append(session: &mut Session, layer: usize, seq: &SeqRows, rows: &Rows) {
    let width = rows.k.len() / rows.n;
    for r in 0..seq.n_rows {
        let row = (seq.first_row + r) * width..(seq.first_row + r + 1) * width;
        session.cache.write(layer, seq.position + r, &rows.k[row.clone()], &rows.v[row]);
    }
}

/// Waits for what an earlier step or layer has asked the host for: each sequence for its own, or, in the paper's schedule,
/// all of them for everything that the copy stream has been given. Returns how long that took.
fn arrive(device: &Device, batch: &mut [Next], members: &[Member], layer: usize, kind: Pass) -> Duration {
    let mut waited = Duration::ZERO;
    let for_all = device.pipeline() == Schedule::Stream;
    if for_all {
        waited += device.wait(device.record(StreamId::CopyIn), "all copies arrive before attention");
    }
    for m in members {
        batch[m.index].session.cache.arrive(layer, for_all, &mut waited);
    }
    if kind == Pass::Step {
        // Whoever's copy it was, all of them waited.
        members.iter().for_each(|m| batch[m.index].session.stats.exposed += waited);
    }
    waited
}

/// `specache`: the last row's attention selects what the next step will read at 16 bits.
fn select_ahead(
    context: &Context,
    session: &mut Session,
    layer: usize,
    seq: usize,
    rows: &SeqRows,
    attention: &attn_decode::Scratch,
    kind: Pass,
) {
    let config = &context.model.config;
    let (group_heads, n_kv_heads) = (config.group_heads(), config.n_kv_heads);
    let row = rows.n_rows - 1;
    if kind == Pass::Step {
        // How good the last selection was: row 0's own top-k among what is read low-bit or prefetched.
        let seen = session.candidates(rows.position, session.cache.counters.nq, config.sliding_window);
        let slots = session.cache.layers[layer].prefetch.slots();
        let (hits, of) = select::hits(&context.device, group_heads, n_kv_heads, attention, seq, seen, slots);
        let sum = &mut session.stats.hits[layer];
        *sum = (sum.0 + hits, sum.1 + of);
    }
    let candidates = session.candidates(rows.position + row, session.cache.counters.no, config.sliding_window);
    let slots = session.cache.layers[layer].prefetch.slots_mut();
    if context.gpu.is_none() {
        slots.keep();
    }
    let selection = Selection { seq, row, candidates, slots };
    select::select(&context.device, group_heads, n_kv_heads, attention, selection);
}

/// On a GPU: the selections of all sequences of one mode.
fn select_on_gpu(
    device: &Device,
    config: &Config,
    batch: &[Next],
    members: &[Member],
    layer: usize,
    rows: &mut Rows,
    mode: KvMode,
) {
    let sessions = || members.iter().map(|m| &*batch[m.index].session).filter(|session| session.kv().mode == mode);
    if sessions().next().is_some() {
        select::launch(device, config, layer, rows, mode, |uses| {
            let slots = sessions().map(|session| session.cache.layers[layer].prefetch.slots());
            uses.writes.extend(slots.map(|slots| Resource::Selection(slots.positions.id())));
        });
    }
}

/// `fetch`: the real row scores the low-bit cache, and waits while what it needs comes from the host.
#[allow(clippy::too_many_arguments)] // One call site, which names them all.
fn fetch_on_demand(
    context: &Context,
    batch: &mut [Next],
    members: &[Member],
    seqs: &[SeqRows],
    layer: usize,
    rows: &mut Rows,
    attention: &mut attn_decode::Scratch,
    fetches: &mut FetchQueue,
) {
    let (device, config) = (&context.device, &context.model.config);
    for m in members {
        let session = &mut *batch[m.index].session;
        if session.kv().mode == KvMode::Fetch {
            session.cache.layers[layer].prefetch.slots_mut().hide();
        }
    }
    let view = |i: usize| batch[members[i].index].session.cache.view(layer, config.sliding_window);
    attn_decode::attend_rows(device, config, layer, seqs, view, rows, attention, Some(KvMode::Fetch));
    for (seq, (m, s)) in members.iter().zip(seqs).enumerate() {
        let session = &mut *batch[m.index].session;
        if session.kv().mode != KvMode::Fetch {
            continue;
        }
        let candidates = session.candidates(s.position, session.cache.counters.nq, config.sliding_window);
        let slots = session.cache.layers[layer].prefetch.slots_mut();
        let selection = Selection { seq, row: 0, candidates, slots };
        select::select(device, config.group_heads(), config.n_kv_heads, attention, selection);
    }
    select_on_gpu(device, config, batch, members, layer, rows, KvMode::Fetch);
    // Nothing overlaps with these copies: all of their time is exposed, whoever's thread it runs on. A GPU's queue waits for
    // all of it too, and says so at the end of the step.
    let start = Instant::now();
    fetch(device, config, batch, members, layer, KvMode::Fetch, Pass::Step, rows, fetches);
    for m in members {
        let session = &mut *batch[m.index].session;
        if session.kv().mode == KvMode::Fetch {
            session.cache.arrive(layer, false, &mut Duration::default());
        }
    }
    if device.gpu().is_none() {
        let exposed = start.elapsed();
        fetches.note_wait(exposed);
        members.iter().for_each(|m| batch[m.index].session.stats.exposed += exposed);
    }
}

/// Begins to fetch what the sequences of one mode have selected in a layer: all of them at once, or one by one in the
/// paper's schedule. Only `serial` waits.
#[allow(clippy::too_many_arguments)] // Three call sites, which name them all.
fn fetch(
    device: &Device,
    config: &Config,
    batch: &mut [Next],
    members: &[Member],
    layer: usize,
    mode: KvMode,
    kind: Pass,
    rows: &mut Rows,
    fetches: &mut FetchQueue,
) {
    let schedule = device.pipeline();
    let from = select::stream(device, mode);
    for m in members {
        let session = &mut *batch[m.index].session;
        if session.kv().mode != mode {
            continue;
        }
        if device.gpu().is_none() {
            session.note_selection(layer, kind == Pass::PreDecode);
        }
        let fetched = fetches.add(device, &mut session.cache, layer);
        session.note_fetch(layer, fetched, kind == Pass::PreDecode);
        // The paper's copies are one sequence's each. A GPU's kernels serve all sequences that share their launches.
        if schedule == Schedule::Stream && device.gpu().is_none() {
            fetches.launch(device, layer, from);
        }
    }
    match device.is_gpu() {
        true => {
            let reads = if rows.gpu.gathers_on_host() { from } else { StreamId::CopyIn };
            let pages = |i: usize| batch[members[i].index].session.cache.host(layer).clone();
            let gather = || rows.gpu.gather(device, config, layer, mode, from, pages);
            fetches.launch_on_gpu(device, from, reads, gather);
        }
        false => fetches.launch(device, layer, from),
    }
    if schedule == Schedule::Serial && mode == KvMode::SpeCache {
        fetches.note_wait(arrive(device, batch, members, layer, kind));
    }
}

/// `offload`: the first two layers begin to come back, unless the step before has begun with that.
fn begin_loads(session: &mut Session) {
    if session.kv().mode == KvMode::Offload {
        for layer in 0..session.cache.layers.len().min(2) {
            session.stats.fetched_bytes += session.cache.begin_load(layer);
        }
    }
}

/// `offload`: the pages of this layer are free for the one after the next, and behind the last two layers for those of
/// the next step that come back into the same pages.
fn load_ahead(session: &mut Session, layer: usize) {
    if layer + 2 < session.cache.layers.len() {
        session.stats.fetched_bytes += session.cache.begin_load(layer + 2);
    } else {
        session.cache.begin_next_load(layer % 2);
    }
}

/// On a GPU: memory for the passes of this call, before anything has changed.
fn reserve_on_gpu(context: &Context, batch: &[Next], buffers: &mut Buffers) -> Result<()> {
    let Some(model) = &context.gpu else { return Ok(()) };
    let window = context.model.config.sliding_window;
    let places: Vec<Place> = batch.iter().map(|next| place(next.session, [next.token, 0], 2, window)).collect();
    buffers.rows.gpu.reserve(&context.device, model, &context.model.config, &places)
}

/// What a GPU must know of a session for a pass.
fn place(session: &Session, tokens: [u32; 2], n_rows: usize, window: Option<usize>) -> Place {
    let (counters, options, shape) = (&session.cache.counters, *session.kv(), session.cache.shape);
    let (low_bit, fetches) = (options.mode.low_bit(), options.mode.fetches());
    let no = if options.mode == KvMode::Fetch { counters.nq } else { counters.no };
    let last = if options.mode == KvMode::Fetch { counters.n } else { counters.n + n_rows - 1 };
    Place {
        n: counters.n,
        nq: if low_bit { counters.nq } else { 0 },
        no,
        tokens,
        n_rows,
        room: session.cache.capacity() + 2,
        top_k: if fetches { session.cache.top_k() } else { 0 },
        shape,
        options,
        selects: fetches && !session.candidates(last, no, window).is_empty(),
    }
}

/// On a GPU: tells it what the pass is about, and embeds the tokens. The pass may be one that becomes a graph, or is one.
fn begin_on_gpu<'a>(
    context: &'a Context,
    model: &GpuModel,
    batch: &mut [Next],
    members: &[Member],
    seqs: &[SeqRows],
    rows: &mut Rows,
    kind: Pass,
) -> Result<Option<Exclusive<'a>>> {
    let config = &context.model.config;
    let window = config.sliding_window;
    let places = members.iter().zip(seqs).map(|(m, s)| place(batch[m.index].session, m.tokens, s.n_rows, window));
    let places: Vec<Place> = places.collect();
    rows.gpu.reserve(&context.device, model, config, &places)?;
    members.iter().for_each(|m| batch[m.index].session.cache.refresh_tables());
    let (traced, is_step) = (is_traced(batch, members), kind == Pass::Step);
    let graph = rows.gpu.begin_graph(&context.device, model, &places, traced, is_step)?;
    let _embed = context.device.operation("embed", |_| {});
    let cache = |l: usize, i: usize| batch[members[i].index].session.cache.places(l);
    rows.gpu.begin(&context.device, model, config, context.rope.attention_factor, &places, cache);
    Ok(graph)
}

/// Whether somebody wants to know what was selected.
fn is_traced(batch: &[Next], members: &[Member]) -> bool {
    members.iter().any(|m| batch[m.index].session.trace.is_some())
}

/// On a GPU: the logits, and the end of the pass. What the pass has selected and fetched is known now.
fn end_on_gpu(
    context: &Context,
    model: &GpuModel,
    graph: Option<Exclusive<'_>>,
    batch: &mut [Next],
    members: &[Member],
    kind: Pass,
    rows: &mut Rows,
) -> Result<()> {
    let (config, device) = (&context.model.config, &context.device);
    let logits = device.operation("norm_logits", |_| {});
    rows.gpu.end(device, model, config, is_traced(batch, members));
    drop(logits);
    let launched = graph.map_or(Ok(()), |graph| rows.gpu.end_graph(graph));
    device.finish(device.record(StreamId::Compute));
    let sound = launched.and_then(|()| device.sound());
    let gathers = members.iter().filter_map(|m| batch[m.index].session.cache.gather_failure.clone());
    if let Err(failed) = sound.and_then(|()| rows.gpu.end_pass(gathers)) {
        rows.gpu.give_up();
        members.iter().for_each(|m| batch[m.index].session.fail_device(&failed));
        return Err(failed);
    }
    for (i, m) in members.iter().enumerate() {
        let session = &mut *batch[m.index].session;
        session.note_pass(config, i, &rows.gpu, kind == Pass::PreDecode);
        session.cache.gather_failure = rows.gpu.gather_failure();
    }
    device.tell_fetched(|l| {
        let bytes = |(i, m): (usize, &Member)| {
            let session = &*batch[m.index].session;
            if session.kv().mode.fetches() { rows.gpu.fetched(config, l, i) * session.pair_bytes() } else { 0 }
        };
        members.iter().enumerate().map(bytes).sum()
    });
    if let (Some(waited), Pass::Step) = (device.end_step(), kind) {
        members.iter().for_each(|m| batch[m.index].session.stats.exposed += waited);
    }
    Ok(())
}

/// Row 0's logits are the result; the last row's argmax is the next speculative token.
fn finish(batch: &mut [Next], buffers: &mut Buffers, vocab: usize, kind: Pass) {
    let Buffers { members, seqs, logits, results, rows, .. } = buffers;
    buffers.vocab = vocab;
    results.clear();
    let on_gpu = buffers.on_gpu;
    for (m, s) in members.iter().zip(seqs) {
        let Next { session, token } = &mut batch[m.index];
        let row = |r: usize| &logits[(s.first_row + r) * vocab..][..vocab];
        let finite = if on_gpu { rows.gpu.is_finite(s.first_row) } else { row(0).iter().all(|x| x.is_finite()) };
        results.push(session.check_finite(finite).map(|()| s.first_row));
        if session.kv().mode != KvMode::SpeCache {
            continue;
        }
        if kind == Pass::Step {
            session.stats.compare(session.last_guess.replace(m.tokens[1]), *token);
        }
        let last = s.n_rows - 1;
        let own = if on_gpu { rows.gpu.argmax(s.first_row + last) } else { argmax(row(last)) };
        session.speculative = Some(session.forced.as_mut().and_then(|f| f.pop_front()).unwrap_or(own));
    }
}
