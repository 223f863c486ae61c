//! Prefill: a prompt's exact causal attention over 16-bit-rounded K and V, layer by layer (method.md, "The three
//! algorithms").
//!
//! Layer-major: all chunks of all sequences pass layer l before any passes layer l + 1. So the device needs the wide
//! pages of only two layers of each prompt: one that is computed, one that the copy stream sends to the host meanwhile.

use crate::context::Context;
use crate::cuda::{ChunkMemory, PromptStream};
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

/// Rows of a chunk on the CPU: enough that widening a panel of weights costs below 1 % of the product with it.
const CHUNK: usize = 512;
/// Chunks shorter than this go row by row: a panel would cost more than it saves. Depends on the sequence alone, like
/// everything that decides a result's bits.
const PANEL_MIN: usize = 8;

/// Prefills all prompts, each behind what its session already holds. Returns the logits of each prompt's last row, or why
/// that sequence failed; one that fails does not disturb the others.
///
/// # Errors
/// Before anything has changed: a prompt that is empty or has ids beyond the vocabulary, a context that the model or a
/// memory budget does not allow, or the system's memory (then sessions may have more room). Between two chunks of a
/// layer: [`crate::Error::Interrupted`], which leaves the sessions as they were, though with room for the prompt. A GPU
/// that fails: [`crate::Error::Device`], and all these sessions have failed.
///
/// `tell` hears after each chunk of a layer which share of the work is done, on the CPU device: a GPU is told everything at
/// once.
pub fn prefill(
    context: &Context,
    prompts: &mut [Prompt],
    buffers: &mut Buffers,
    tell: &mut dyn FnMut(f64),
) -> Result<Vec<Result<Vec<f32>>>> {
    for prompt in prompts.iter() {
        prompt.session.check_usable(context)?;
        context.check_tokens(prompt.tokens)?;
        context.check_context(prompt.end())?;
    }
    let needs = prompts.iter().map(|prompt| prompt.session.cache.prefill_needs(prompt.end()));
    let (device_bytes, host_pages) =
        needs.fold((0u64, 0usize), |sum, needs| (sum.0.saturating_add(needs.0), sum.1.saturating_add(needs.1)));
    let hidden = context.model.config.hidden_size;
    let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
    let stream_bytes = |p: &Prompt| match context.gpu {
        Some(ref gpu) => PromptStream::bytes(gpu, &context.model.config, p.tokens.len()),
        None => (p.tokens.len() * hidden * 4) as u64,
    };
    let chunk_bytes = context.gpu.as_ref().map_or(0, |gpu| ChunkMemory::bytes(gpu, &context.model.config, longest));
    let device_bytes =
        prompts.iter().map(stream_bytes).fold(device_bytes.saturating_add(chunk_bytes), u64::saturating_add);
    // Held to the end: the residual streams, which nothing else meters, are a part of it.
    let mut admission = Admission::ask(&context.device, &context.slab, device_bytes, host_pages, "a prefill")?;
    let _step = context.device.begin_step();
    let mut begin = |prompt: &mut Prompt| prompt.session.cache.begin_prefill(prompt.end(), &mut admission);
    if let Some(refused) = prompts.iter_mut().find_map(|prompt| begin(prompt).err()) {
        prompts.iter_mut().for_each(|prompt| prompt.session.cache.free_working_pages());
        return Err(refused);
    }
    prompts.iter_mut().for_each(|prompt| prompt.session.begin_call(false));
    let mut begin = || {
        let gpu = context.gpu.as_ref();
        let working = gpu.map(|gpu| ChunkMemory::new(admission.device(), gpu, &context.model.config, longest));
        let working = working.transpose()?;
        let streams = prompts.iter_mut().map(|prompt| Stream::new(context, prompt, &mut admission));
        Ok((working, streams.collect::<Result<Vec<Stream>>>()?))
    };
    let (working, mut streams) = match begin() {
        Ok(begun) => begun,
        Err(refused) => {
            prompts.iter_mut().for_each(|prompt| prompt.session.cache.free_working_pages());
            return Err(refused);
        }
    };
    let n_layers = context.model.config.n_layers;
    let rows: usize = prompts.iter().map(|prompt| prompt.tokens.len() * n_layers).sum();
    let mut done = 0;
    let mut passed = |chunk: usize| {
        done += chunk;
        tell(done as f64 / rows as f64);
    };
    for layer in 0..n_layers {
        context.device.at_layer(Some(layer));
        for (i, x) in streams.iter_mut().enumerate() {
            if let Err(Stopped { pages, why }) =
                prefill_layer(context, &mut prompts[i], layer, x, working.as_ref(), buffers, &mut passed)
            {
                context.device.finish_compute(); // it may still compute what is freed now
                undo(prompts, layer, i, Some(pages));
                return Err(why);
            }
        }
    }
    context.device.at_layer(None);
    let mut logits = Vec::with_capacity(prompts.len());
    for (prompt, stream) in prompts.iter_mut().zip(&streams) {
        logits.push(end(context, prompt, stream, working.as_ref(), buffers));
    }
    if let Err(failed) = context.device.sound() {
        undo(prompts, n_layers, 0, None);
        prompts.iter_mut().for_each(|prompt| prompt.session.fail_device(&failed));
        return Err(failed);
    }
    // A GPU is done with what is freed now.
    Ok(prompts.iter_mut().zip(logits).map(|(prompt, logits)| settle(prompt, logits)).collect())
}

/// The residual stream of a prompt.
enum Stream {
    /// `[tokens, hidden]`.
    Cpu(Vec<f32>),
    Gpu(Box<PromptStream>),
}

impl Stream {
    /// The prompt's tokens, embedded.
    fn new(context: &Context, prompt: &mut Prompt, admission: &mut Admission) -> Result<Stream> {
        let (device, model) = (&context.device, &context.model);
        let Some(gpu_model) = &context.gpu else {
            let mut x = vec![0.0; prompt.tokens.len() * model.config.hidden_size];
            linear::embed(device, model, prompt.tokens, &mut x);
            return Ok(Stream::Cpu(x));
        };
        let _embed = device.operation("embed", |_| {});
        let cache = &prompt.session.cache;
        Ok(Stream::Gpu(Box::new(PromptStream::new(
            device,
            admission.device(),
            gpu_model,
            &model.config,
            context.rope.attention_factor,
            cache.shape,
            (cache.counters.n, cache.prefill_first_page() * PAGE),
            prompt.tokens,
            |l| cache.places(l),
        )?)))
    }
}

/// A layer that was given up.
struct Stopped {
    /// Its device pages.
    pages: Vec<WidePage>,
    why: Error,
}

/// All sessions are as before, where prompt `i` has stopped in `layer`, with `pages`: those before it had passed it.
fn undo(prompts: &mut [Prompt], layer: usize, i: usize, mut pages: Option<Vec<WidePage>>) {
    for (j, prompt) in prompts.iter_mut().enumerate() {
        let (end, settled) = (prompt.end(), layer + usize::from(j < i));
        prompt.session.cache.undo_prefill(end, settled, if j == i { pages.take() } else { None });
        prompt.session.undo_call();
    }
}

/// One layer of one prompt, chunk by chunk: every chunk sees the K and V of those before it. Stops only when
/// interrupted. `passed` gets the rows of each chunk.
fn prefill_layer(
    context: &Context,
    prompt: &mut Prompt,
    l: usize,
    stream: &mut Stream,
    working: Option<&ChunkMemory>,
    buffers: &mut Buffers,
    passed: &mut dyn FnMut(usize),
) -> Result<(), Stopped> {
    let x = match (stream, working) {
        (Stream::Cpu(x), _) => x,
        (Stream::Gpu(stream), Some(working)) => return prefill_layer_on_gpu(context, prompt, l, stream, working),
        _ => unreachable!("a stream of another device"),
    };
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
        let dense = Dense { device, config, rope: &context.rope, path, gpu: None };
        dense.norm_qkv_rope(l, layer, rows, |row| position + row, not_finite, |_| {});
        write_chunk(device, &cache.shape, &mut pages, position - first_page * PAGE, rows);
        let view = PrefillView {
            shape: cache.shape,
            packed: &cache.layers[l].packed,
            pages: &pages,
            first_page,
            window: config.sliding_window,
        };
        attn_prefill::attend(device, config.n_heads, &view, position, rows.n, &rows.q, &mut rows.attn);
        dense.out_residual(l, layer, rows);
        dense.norm_gate_up(l, layer, rows);
        dense.down_residual(l, layer, rows);
        x.copy_from_slice(&rows.x);
        passed(rows.n);
    }
    prompt.session.stats.offloaded_bytes += cache.settle_prefill(l, end, pages);
    Ok(())
}

/// The same on a GPU, which is told everything and waited for at the end of the prefill.
fn prefill_layer_on_gpu(
    context: &Context,
    prompt: &mut Prompt,
    l: usize,
    stream: &mut PromptStream,
    working: &ChunkMemory,
) -> Result<(), Stopped> {
    let (device, config) = (&context.device, &context.model.config);
    let (gpu, model) = (device.gpu().expect("a prompt on a GPU"), context.gpu.as_ref().expect("a model on a GPU"));
    let (start, end) = (prompt.session.cache.counters.n, prompt.end());
    let cache = &mut prompt.session.cache;
    let pages = cache.prefill_pages(l, end);
    let first_page = cache.prefill_first_page();
    cache.list_pages(l, first_page, &pages);
    stream.begin_layer(device, l, &pages, first_page);
    for chunk in 0..stream.n_chunks() {
        if let Err(why) = context.check_interrupt() {
            return Err(Stopped { pages, why });
        }
        let rows = stream.rows_of_chunk(chunk);
        let (from, to) = (start + rows.start, start + rows.end);
        let dense = device.operation("norm_qkv_rope", |uses| {
            let written = &pages[from / PAGE - first_page..to.div_ceil(PAGE) - first_page];
            uses.writes.extend(written.iter().map(|page| Resource::DevicePage(page.id())));
        });
        stream.norm_qkv_rope(gpu, model, config, working, l, chunk);
        drop(dense);
        let attend = device.operation("attend", |uses| {
            let packed = cache.layers[l].packed.id();
            uses.reads.extend((0..first_page).map(|page| Resource::PackedPage(packed, page)));
            uses.reads.extend(pages.iter().map(|page| Resource::DevicePage(page.id())));
        });
        stream.attend(gpu, config, working, l, chunk);
        drop(attend);
        let _rest = device.operation("out_residual, norm_gate_up, down_residual", |_| {});
        stream.rest_of_layer(gpu, model, config, working, l, chunk);
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
        crate::ops::kv::write_pairs(device, shape, page.bytes_mut(), token, k, v);
    }
}

/// The logits of the last row, which the first token is taken from.
fn end(
    context: &Context,
    prompt: &mut Prompt,
    stream: &Stream,
    working: Option<&ChunkMemory>,
    buffers: &mut Buffers,
) -> Vec<f32> {
    let (config, device) = (&context.model.config, &context.device);
    match (stream, device.gpu(), &context.gpu, working) {
        (Stream::Gpu(stream), Some(gpu), Some(model), Some(working)) => {
            let operation = device.operation("norm_logits", |_| {});
            let (logits, bad_layer) = stream.end(gpu, model, config, working);
            drop(operation);
            device.end_step(); // how long a prefill waits for copies is no figure of decoding
            prompt.session.bad_layer = bad_layer;
            logits
        }
        (Stream::Cpu(x), ..) => {
            let last = &x[x.len() - config.hidden_size..];
            let mut logits = vec![0.0; config.vocab_size];
            linear::norm_logits(device, &context.model, last, 1, &mut buffers.rows.normed, &mut logits);
            logits
        }
        _ => unreachable!("a stream of another device"),
    }
}

/// The counters move.
fn settle(prompt: &mut Prompt, logits: Vec<f32>) -> Result<Vec<f32>> {
    let (end, session) = (prompt.end(), &mut *prompt.session);
    session.cache.end_prefill(end);
    session.speculative = None;
    session.check_finite(logits.iter().all(|x| x.is_finite()))?;
    Ok(logits)
}
