//! Prefill: a prompt's exact causal attention over 16-bit-rounded K and V, layer by layer (method.md, "The three
//! algorithms").
//!
//! Layer-major: all chunks of all sequences pass layer l before any passes layer l + 1. So the device needs the wide
//! pages of only two layers of each prompt: one that is computed, one that the copy stream sends to the host meanwhile.

use crate::context::Context;
use crate::device::Device;
use crate::device::order::Resource;
use crate::error::{Error, Result};
use crate::kv::PAGE;
use crate::kv::cache::Admission;
use crate::kv::host::WidePage;
use crate::kv::view::PrefillView;
use crate::ops::attn_prefill;
use crate::ops::linear::{self, Dense, Path};
use crate::session::{Buffers, Prompt};

/// Rows of a chunk: enough that widening a panel of weights costs below 1 % of the product with it.
const CHUNK: usize = 512;
/// Chunks shorter than this go row by row: a panel would cost more than it saves. Depends on the sequence alone, like
/// everything that decides a result's bits.
const PANEL_MIN: usize = 8;

/// Prefills all prompts, each behind what its session already holds. Returns the logits of each prompt's last row, or why
/// that sequence failed; one that fails does not disturb the others.
///
/// # Errors
/// Before anything has changed: a prompt that is empty or has ids beyond the vocabulary, a context that the model or a
/// memory budget does not allow. Between two chunks of a layer: [`crate::Error::Interrupted`], which leaves the sessions as
/// they were, though with room for the prompt.
pub fn prefill(context: &Context, prompts: &mut [Prompt], buffers: &mut Buffers) -> Result<Vec<Result<Vec<f32>>>> {
    for prompt in prompts.iter() {
        prompt.session.check_usable(context)?;
        context.check_tokens(prompt.tokens)?;
        context.check_context(prompt.end())?;
    }
    let needs = prompts.iter().map(|prompt| prompt.session.cache.prefill_needs(prompt.end()));
    let (device_bytes, host_pages) =
        needs.fold((0u64, 0usize), |sum, needs| (sum.0.saturating_add(needs.0), sum.1.saturating_add(needs.1)));
    let hidden = context.model.config.hidden_size;
    let stream_bytes = prompts.iter().map(|p| (p.tokens.len() * hidden * 4) as u64).fold(0, u64::saturating_add);
    let device_bytes = device_bytes.saturating_add(stream_bytes);
    // Held to the end: the residual streams, which nothing else meters, are a part of it.
    let mut admission = Admission::ask(&context.device, &context.slab, device_bytes, host_pages, "a prefill")?;
    context.device.begin_step();
    for prompt in prompts.iter_mut() {
        prompt.session.cache.begin_prefill(prompt.end(), &mut admission)?;
        prompt.session.begin_pass();
    }
    let mut streams: Vec<Vec<f32>> = Vec::new(); // the residual stream of every prompt, [tokens, hidden]
    for prompt in prompts.iter() {
        let mut x = vec![0.0; prompt.tokens.len() * hidden];
        linear::embed(&context.device, &context.model, prompt.tokens, &mut x);
        streams.push(x);
    }
    for layer in 0..context.model.config.n_layers {
        context.device.at_layer(Some(layer));
        for (i, x) in streams.iter_mut().enumerate() {
            if let Err(Stopped { pages, why }) = prefill_layer(context, &mut prompts[i], layer, x, buffers) {
                undo(context, prompts, layer, i, pages);
                return Err(why);
            }
        }
    }
    context.device.at_layer(None);
    Ok(prompts.iter_mut().zip(&streams).map(|(prompt, x)| finish(context, prompt, x, buffers)).collect())
}

/// A layer that was given up.
struct Stopped {
    /// Its device pages.
    pages: Vec<WidePage>,
    why: Error,
}

/// All sessions are as before, where prompt `i` has stopped in `layer`: those before it had passed it.
fn undo(context: &Context, prompts: &mut [Prompt], layer: usize, i: usize, pages: Vec<WidePage>) {
    let mut pages = Some(pages);
    for (j, prompt) in prompts.iter_mut().enumerate() {
        let (end, settled) = (prompt.end(), layer + usize::from(j < i));
        prompt.session.cache.undo_prefill(end, settled, if j == i { pages.take() } else { None });
        prompt.session.undo_figures();
    }
    context.device.at_layer(None);
}

/// One layer of one prompt, chunk by chunk: every chunk sees the K and V of those before it. Stops only when interrupted.
fn prefill_layer(
    context: &Context,
    prompt: &mut Prompt,
    l: usize,
    x: &mut [f32],
    buffers: &mut Buffers,
) -> Result<(), Stopped> {
    let (device, config) = (&context.device, &context.model.config);
    let layer = &context.model.weights.layers[l];
    let (start, end, hidden) = (prompt.session.cache.counters.n, prompt.end(), config.hidden_size);
    let cache = &mut prompt.session.cache;
    let mut pages = cache.prefill_pages(l, end);
    let first_page = cache.prefill_first_page();
    for (chunk, x) in x.chunks_mut(CHUNK * hidden).enumerate() {
        if let Err(why) = context.check_interrupt().and_then(|()| prompt.session.stop.check()) {
            return Err(Stopped { pages, why });
        }
        let rows = &mut buffers.rows;
        rows.resize(config, x.len() / hidden);
        rows.x.copy_from_slice(x);
        let path = if rows.n < PANEL_MIN { Path::Rows } else { Path::Panel };
        let position = start + chunk * CHUNK;
        let bad = &mut prompt.session.bad_layer;
        let not_finite = |_| *bad = bad.or(Some(l));
        let dense = Dense { device, config, rope: &context.rope, path };
        dense.norm_qkv_rope(layer, rows, |row| position + row, not_finite);
        write_chunk(device, &cache.shape, &mut pages, position - first_page * PAGE, rows);
        let view = PrefillView {
            shape: cache.shape,
            packed: &cache.layers[l].packed,
            pages: &pages,
            first_page,
            window: config.sliding_window,
        };
        attn_prefill::attend(device, config.n_heads, &view, position, rows.n, &rows.q, &mut rows.attn);
        dense.out_residual(layer, rows);
        dense.norm_gate_up(layer, rows);
        dense.down_residual(layer, rows);
        x.copy_from_slice(&rows.x);
    }
    prompt.session.stats.offloaded_bytes += cache.settle_prefill(l, end, pages);
    Ok(())
}

/// K and V of a chunk, rounded, into the pages; `at` is the first row's place in them.
fn write_chunk(device: &Device, shape: &crate::kv::KvShape, pages: &mut [WidePage], at: usize, rows: &linear::Rows) {
    let width = shape.n_kv_heads * shape.head_dim;
    let end = at + rows.k.len() / width;
    let _append = device.operation("append", |uses| {
        let written = &pages[at / PAGE..end.div_ceil(PAGE)];
        uses.writes.extend(written.iter().map(|page| Resource::DevicePage(page.id())));
    });
    for (row, (k, v)) in rows.k.chunks_exact(width).zip(rows.v.chunks_exact(width)).enumerate() {
        let (page, token) = ((at + row) / PAGE, (at + row) % PAGE);
        let page = WidePage::get_mut(&mut pages[page]).expect("a page that is filled has one owner");
        crate::ops::kv::write_pairs(device, shape, page, token, k, v);
    }
}

/// The counters move, and the last row's logits are what the first token is taken from.
fn finish(context: &Context, prompt: &mut Prompt, x: &[f32], buffers: &mut Buffers) -> Result<Vec<f32>> {
    let config = &context.model.config;
    let (end, session) = (prompt.end(), &mut *prompt.session);
    session.cache.end_prefill(end);
    session.speculative = None;
    let last = &x[x.len() - config.hidden_size..];
    let mut logits = vec![0.0; config.vocab_size];
    linear::norm_logits(&context.device, &context.model, last, 1, &mut buffers.rows.normed, &mut logits);
    session.check_finite(&logits)?;
    Ok(logits)
}
