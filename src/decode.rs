//! One token's whole story: pre-decode and the decode step of SpeCache, and of the modes beside it (method.md, "The
//! three algorithms").
//!
//! A step decodes the real token `T_t` (row 0, at position n) and in `specache` a speculative one `T'_{t+1}` (row 1, at
//! n + 1) over the same cache. Row 1's attention chooses the 16-bit pairs that the **next** step will need, and their
//! copy from the host begins at once, layer by layer: it has almost a whole step to hide in.

use std::time::{Duration, Instant};

use crate::context::Context;
use crate::device::order::StreamId;
use crate::device::{Device, Schedule};
use crate::error::{Error, Result};
use crate::kv::KvMode;
use crate::kv::fetch::FetchQueue;
use crate::kv::view::SeqRows;
use crate::ops::attn_decode;
use crate::ops::linear::{self, Dense, Path};
use crate::ops::select::{self, Selection};
use crate::sampler::argmax;
use crate::session::{Buffers, Member, Next, Session};

/// Feeds each session's token. A `specache` session that comes fresh from a prefill is pre-decoded first: its token
/// alone guesses what follows it and what the step will need.
///
/// # Errors
/// Before anything has changed: a token beyond the vocabulary, a session that is full or has failed. Between two layers:
/// [`Error::Interrupted`], which leaves every session as it was, so that the same call gives the same bits later. A
/// pre-decode that was complete stays, as it is no part of the step. A sequence that meets NaN fails alone: see
/// [`Buffers::logits`].
pub fn decode(context: &Context, batch: &mut [Next], buffers: &mut Buffers) -> Result<()> {
    buffers.results.clear();
    batch.iter().try_for_each(|next| check(context, next))?;
    for Next { session, .. } in batch.iter_mut() {
        session.cache.take_waited(); // by prefills, forks and truncations: not this step's
    }
    let fresh = |session: &Session| session.needs_pre_decode();
    if batch.iter().any(|next| fresh(next.session)) {
        pass(context, batch, buffers, fresh, Pass::PreDecode)?;
    }
    pass(context, batch, buffers, |_| true, Pass::Step)?;
    for next in batch.iter_mut() {
        next.session.stats.offloaded_bytes += next.session.cache.advance();
        next.session.stats.exposed += next.session.cache.take_waited();
        next.session.stats.steps += 1;
    }
    Ok(())
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

/// All layers for the rows of those sessions that take part. Stops between two layers when it is interrupted.
fn pass(
    context: &Context,
    batch: &mut [Next],
    buffers: &mut Buffers,
    takes_part: impl Fn(&Session) -> bool,
    kind: Pass,
) -> Result<()> {
    let (model, device) = (&context.model, &context.device);
    let config = &model.config;
    let dense = Dense { device, config, rope: &context.rope, path: Path::Rows };
    plan_rows(batch, buffers, takes_part, kind);
    device.begin_step();
    let Buffers { rows, attention, members, seqs, tokens, logits, fetches, .. } = buffers;
    fetches.begin_pass(device);
    let n_rows = seqs.iter().map(|s| s.n_rows).sum();
    rows.resize(config, n_rows);
    tokens.clear();
    tokens.extend(members.iter().zip(&*seqs).flat_map(|(m, s)| m.tokens.into_iter().take(s.n_rows)));
    linear::embed(device, model, tokens, &mut rows.x);
    let position = |row: usize| seqs.iter().find_map(|s| s.position_of(row)).expect("a row of the pass");
    for m in members.iter() {
        begin_loads(batch[m.index].session);
    }

    for (l, layer) in model.weights.layers.iter().enumerate() {
        device.at_layer(Some(l));
        let stopped = || members.iter().try_for_each(|m| batch[m.index].session.stop.check());
        if let Err(interrupted) = context.check_interrupt().and_then(|()| stopped()) {
            undo(device, batch, members, l, kind, fetches);
            buffers.results.clear(); // a pre-decode's
            return Err(interrupted);
        }
        let not_finite = |row| mark_bad(batch, members, seqs, row, l);
        dense.norm_qkv_rope(layer, rows, position, not_finite);
        for (m, s) in members.iter().zip(&*seqs) {
            append(batch[m.index].session, l, s, rows);
        }
        arrive(device, batch, members, l);
        if members.iter().any(|m| batch[m.index].session.kv().mode == KvMode::Fetch) {
            fetch_on_demand(context, batch, members, seqs, l, rows, attention, fetches);
        }
        let view = |i: usize| batch[members[i].index].session.cache.view(l, config.sliding_window);
        attn_decode::attend(device, config.n_heads, seqs, view, &rows.q, &mut rows.attn, attention);
        for (i, (m, s)) in members.iter().zip(&*seqs).enumerate() {
            let session = &mut *batch[m.index].session;
            match session.kv().mode {
                KvMode::SpeCache => select_ahead(context, session, l, i, s, attention, kind),
                KvMode::Offload => load_ahead(session, l),
                KvMode::Full | KvMode::Kivi | KvMode::Fetch => {}
            }
        }
        fetch(device, batch, members, l, KvMode::SpeCache, kind, fetches);
        dense.out_residual(layer, rows);
        dense.norm_gate_up(layer, rows);
        dense.down_residual(layer, rows);
    }

    fetches.end_pass(config.n_layers);
    device.at_layer(None);
    logits.resize(n_rows * config.vocab_size, 0.0);
    linear::norm_logits(device, model, &rows.x, n_rows, &mut rows.normed, logits);
    finish(batch, buffers, config.vocab_size, kind);
    Ok(())
}

/// A pass is given up before `layer`: every session is as before it. Of what the layers so far have changed, two things would
/// reach the next pass. The rest lies behind the counters: K and V at position n and n + 1, which whoever goes on overwrites.
///
/// - `specache` has replaced their selections, by ones that are for the step after this one. The old ones come back, and
///   their pairs from the host: all of them are there, as only offloaded positions are selected. Another selection would be
///   as good to go on with, but not the same bits.
/// - The figures and the trace.
fn undo(device: &Device, batch: &mut [Next], members: &[Member], layer: usize, kind: Pass, fetches: &mut FetchQueue) {
    for m in members {
        let session = &mut *batch[m.index].session;
        session.cache.come_to_rest();
        if session.kv().mode == KvMode::SpeCache {
            session.cache.layers[..layer].iter_mut().for_each(|l| l.prefetch.slots_mut().restore());
        }
    }
    for l in 0..layer {
        device.at_layer(Some(l));
        fetch(device, batch, members, l, KvMode::SpeCache, kind, fetches);
    }
    device.at_layer(None);
    for m in members {
        let session = &mut *batch[m.index].session;
        session.undo_figures();
        if let (Pass::Step, Some(trace)) = (kind, &mut session.trace) {
            trace.steps.pop();
            trace.speculative.truncate(trace.speculative.len() - usize::from(session.speculative.is_some()));
        }
    }
}

/// Which sessions take part, with which rows and tokens.
fn plan_rows(batch: &mut [Next], buffers: &mut Buffers, takes_part: impl Fn(&Session) -> bool, kind: Pass) {
    buffers.members.clear();
    buffers.seqs.clear();
    let mut first_row = 0;
    for (index, Next { session, token }) in batch.iter_mut().enumerate().filter(|(_, n)| takes_part(n.session)) {
        session.begin_pass();
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
fn append(session: &mut Session, layer: usize, seq: &SeqRows, rows: &linear::Rows) {
    let width = rows.k.len() / rows.n;
    for r in 0..seq.n_rows {
        let row = (seq.first_row + r) * width..(seq.first_row + r + 1) * width;
        session.cache.write(layer, seq.position + r, &rows.k[row.clone()], &rows.v[row]);
    }
}

/// Waits for what an earlier step or layer has asked the host for: each sequence for its own, or, in the paper's schedule,
/// all of them for everything that the copy stream has been given.
fn arrive(device: &Device, batch: &mut [Next], members: &[Member], layer: usize) {
    let mut waited = Duration::ZERO;
    let for_all = device.pipeline() == Schedule::Stream;
    if for_all {
        waited += device.wait(device.record(StreamId::CopyIn), "all copies arrive before attention");
    }
    for m in members {
        batch[m.index].session.cache.arrive(layer, for_all, &mut waited);
    }
    // Whoever's copy it was, all of them waited.
    members.iter().for_each(|m| batch[m.index].session.stats.exposed += waited);
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
    slots.keep();
    let selection = Selection { seq, row, candidates, slots };
    select::select(&context.device, group_heads, n_kv_heads, attention, selection);
}

/// `fetch`: the real row scores the low-bit cache, and waits while what it needs comes from the host.
#[allow(clippy::too_many_arguments)] // One call site, which names them all.
fn fetch_on_demand(
    context: &Context,
    batch: &mut [Next],
    members: &[Member],
    seqs: &[SeqRows],
    layer: usize,
    rows: &mut linear::Rows,
    attention: &mut attn_decode::Scratch,
    fetches: &mut FetchQueue,
) {
    let (device, config) = (&context.device, &context.model.config);
    for m in members {
        let session = &mut *batch[m.index].session;
        if session.kv().mode == KvMode::Fetch {
            session.cache.layers[layer].prefetch.slots_mut().clear(false);
        }
    }
    let view = |i: usize| batch[members[i].index].session.cache.view(layer, config.sliding_window);
    attn_decode::attend(device, config.n_heads, seqs, view, &rows.q, &mut rows.attn, attention);
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
    // Nothing overlaps with these copies: all of their time is exposed, whoever's thread it runs on.
    let start = Instant::now();
    fetch(device, batch, members, layer, KvMode::Fetch, Pass::Step, fetches);
    for m in members {
        let session = &mut *batch[m.index].session;
        if session.kv().mode == KvMode::Fetch {
            session.cache.arrive(layer, false, &mut Duration::default());
        }
    }
    let exposed = start.elapsed();
    members.iter().for_each(|m| batch[m.index].session.stats.exposed += exposed);
}

/// Begins to fetch what the sequences of one mode have selected in a layer: all of them at once, or one by one in the
/// paper's schedule. Only `serial` waits.
fn fetch(
    device: &Device,
    batch: &mut [Next],
    members: &[Member],
    layer: usize,
    mode: KvMode,
    kind: Pass,
    fetches: &mut FetchQueue,
) {
    let schedule = device.pipeline();
    let mut part = 0;
    for m in members {
        let session = &mut *batch[m.index].session;
        if session.kv().mode != mode {
            continue;
        }
        session.note_selection(layer, kind == Pass::PreDecode);
        let fetched = fetches.add(device, &mut session.cache, layer, part);
        session.note_fetch(layer, fetched, kind == Pass::PreDecode);
        if schedule == Schedule::Stream {
            fetches.launch(device, layer, part);
            part += 1;
        }
    }
    fetches.launch(device, layer, part);
    if schedule == Schedule::Serial && mode == KvMode::SpeCache {
        arrive(device, batch, members, layer);
    }
}

/// `offload`: the first two layers begin to come back.
fn begin_loads(session: &mut Session) {
    if session.kv().mode == KvMode::Offload {
        for layer in 0..session.cache.layers.len().min(2) {
            session.stats.fetched_bytes += session.cache.begin_load(layer);
        }
    }
}

/// `offload`: the pages of this layer are free for the one after the next.
fn load_ahead(session: &mut Session, layer: usize) {
    if layer + 2 < session.cache.layers.len() {
        session.stats.fetched_bytes += session.cache.begin_load(layer + 2);
    }
}

/// Row 0's logits are the result; the last row's argmax is the next speculative token.
fn finish(batch: &mut [Next], buffers: &mut Buffers, vocab: usize, kind: Pass) {
    let Buffers { members, seqs, logits, results, .. } = buffers;
    buffers.vocab = vocab;
    results.clear();
    for (m, s) in members.iter().zip(seqs) {
        let Next { session, token } = &mut batch[m.index];
        let row = |r: usize| &logits[(s.first_row + r) * vocab..][..vocab];
        results.push(session.check_finite(row(0)).map(|()| s.first_row));
        if session.kv().mode != KvMode::SpeCache {
            continue;
        }
        if kind == Pass::Step {
            session.stats.compare(session.last_guess.replace(m.tokens[1]), *token);
        }
        let own = argmax(row(s.n_rows - 1));
        session.speculative = Some(session.forced.as_mut().and_then(|f| f.pop_front()).unwrap_or(own));
    }
}
