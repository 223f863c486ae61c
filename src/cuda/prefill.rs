//! A prefill on the GPU: one prompt's residual stream, and the launches that take it through a layer chunk by chunk.

use std::ops::Range;

use bytemuck::{Pod, bytes_of, cast_slice, cast_slice_mut};

use super::GpuTarget;
use super::dense::{self, Between};
use super::dtype_code;
use super::parts::Parts;
use super::rows::{Dense, MAX_ROWS, Rows};
use super::weights::GpuModel;
use crate::device::cuda::bindings::abi::{
    SPECACHE_BF16, SPECACHE_NONE, specache_embed_params, specache_embed_plan, specache_layer_cache,
    specache_prefill_filled, specache_prefill_params, specache_prefill_plan, specache_seq,
};
use crate::device::cuda::{Gpu, PinnedMemory};
use crate::device::order::StreamId;
use crate::device::{Buffer, Device, Event, Grants, LinearPath};
use crate::error::Result;
use crate::kv::host::WidePage;
use crate::kv::{KvShape, PAGE};
use crate::model::Config;

/// Working rows of a chunk take at most so many bytes, or those of the fewest rows.
const CHUNK_BYTES: usize = 256 << 20;
const FEWEST_ROWS: usize = 512;
const MOST_ROWS: usize = 4096;
const ROWS_STEP: usize = 256;

/// Rows of a chunk. With 512 a product does 512 multiply-adds for each weight that it reads, beyond the 200 to 300 where
/// GPUs from A100 to H200 stop to wait for memory; more are better, and cost working memory, 172 KiB a row for
/// Llama-3-8B. Of what [`CHUNK_BYTES`] allows it is the number whose attention fills the GPU's last wave best: that model's
/// on 132 multiprocessors is 320 CTAs in 528 places with 1,280 rows, and 256 in 264 with 1,024. Behind a long history
/// they take about as long each, so most of what the other places could do is lost. The shapes of model and GPU alone decide,
/// so that a prompt's bits depend neither on free memory nor on the prompts beside it.
pub(super) fn chunk_rows(config: &Config, target: GpuTarget) -> usize {
    let numbers = 2 * config.n_heads * config.head_dim + Between::product_width(config);
    let row_bytes = numbers * 4 + Between::operand_width(config) * 2;
    let most = (CHUNK_BYTES / row_bytes / ROWS_STEP * ROWS_STEP).clamp(FEWEST_ROWS, MOST_ROWS);
    let rows = (FEWEST_ROWS..=most).step_by(ROWS_STEP);
    rows.max_by_key(|&rows| filled(config, target, rows)).expect("the fewest are among them") // of equals the last
}

/// Thousandths of the GPU's places for CTAs that attention of a chunk fills.
#[allow(unsafe_code)]
fn filled(config: &Config, target: GpuTarget, rows: usize) -> u32 {
    let params = specache_prefill_params {
        n_seqs: 1,
        n_rows: rows as u32,
        n_heads: config.n_heads as u32,
        n_kv_heads: config.n_kv_heads as u32,
        head_dim: config.head_dim as u32,
        shared_limit: target.shared_limit,
        // Whatever the cache's are.
        bits: 2,
        group_size: 64,
        dtype: SPECACHE_BF16,
        ..Default::default()
    };
    // SAFETY: arithmetic on a struct that lives as long as the call.
    unsafe { specache_prefill_filled(&params, target.n_sms) }
}

/// What the rows of a chunk are computed in. The prompts of a prefill take turns with it.
pub(crate) struct ChunkMemory {
    memory: Buffer,
    at: ChunkLayout,
}

/// Offsets in it.
#[derive(Clone, Copy, Default)]
struct ChunkLayout {
    q: usize,
    attn: usize,
    /// Of the fused kernels: a launch's rows.
    k: usize,
    inner: usize,
    /// Of cuBLASLt.
    operand: usize,
    products: usize,
    logits: usize,
    bytes: usize,
}

impl ChunkLayout {
    /// `cublas`: whether cuBLASLt makes the products.
    fn new(config: &Config, rows: usize, cublas: bool) -> ChunkLayout {
        let (mut parts, heads) = (Parts::default(), config.n_heads * config.head_dim);
        let cublas_rows = if cublas { rows } else { 0 };
        ChunkLayout {
            q: parts.next(rows * heads * 4),
            attn: parts.next(rows * heads * 4),
            k: parts.next(MAX_ROWS * config.n_kv_heads * config.head_dim * 4),
            inner: parts.next(MAX_ROWS * config.intermediate_size * 4),
            operand: parts.next(cublas_rows * Between::operand_width(config) * 2),
            products: parts.next(cublas_rows * Between::product_width(config) * 4),
            logits: parts.next(config.vocab_size * 4),
            bytes: parts.bytes(),
        }
    }
}

impl ChunkMemory {
    /// Bytes on the device for prompts of at most `longest` tokens.
    pub(crate) fn bytes(model: &GpuModel, config: &Config, longest: usize) -> u64 {
        ChunkMemory::layout(model, config, longest).bytes as u64
    }

    /// Room for chunks of prompts of at most `longest` tokens.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Device`].
    pub(crate) fn new(grants: &mut Grants, model: &GpuModel, config: &Config, longest: usize) -> Result<ChunkMemory> {
        let at = ChunkMemory::layout(model, config, longest);
        let memory = grants.device(at.bytes, "the working rows of a prefill")?;
        Ok(ChunkMemory { memory, at })
    }

    fn layout(model: &GpuModel, config: &Config, longest: usize) -> ChunkLayout {
        let rows = longest.min(model.chunk_rows);
        ChunkLayout::new(config, rows, model.cublas(rows).is_some())
    }

    fn address(&self, part: usize) -> u64 {
        self.memory.address() + part as u64
    }

    fn between(&self) -> Between {
        Between { operand: self.address(self.at.operand), products: self.address(self.at.products) }
    }
}

/// Bytes on the device that a prompt of `n` tokens takes beside its cache while it is prefilled, with `--linear auto`, of a model
/// that need not be loaded. `has_cublas`: whether its weights are such that cuBLASLt makes products.
pub(crate) fn prefill_bytes(target: GpuTarget, config: &Config, n: usize, has_cublas: bool) -> u64 {
    let chunk = chunk_rows(config, target);
    let rows = n.min(chunk);
    let working = ChunkLayout::new(config, rows, has_cublas && rows > LinearPath::AUTO_ROWS);
    (working.bytes + Layout::new(config, n, chunk).bytes) as u64
}

/// A prompt on its way through the layers.
pub(crate) struct PromptStream {
    // Dropped before `host`: it waits for the copies out of that too.
    memory: Buffer,
    at: Layout,
    host: PinnedMemory,
    shape: KvShape,
    /// Position of the first token.
    start: usize,
    /// Tokens.
    n: usize,
    /// Rows of a chunk.
    chunk: usize,
    /// When the lists of places of the layers before may be overwritten, by layer mod 2.
    sent: [Option<Event>; 2],
}

/// Offsets on the device, and from `tokens` to the end on the host too, relative to `tokens`.
#[derive(Clone, Copy, Default)]
struct Layout {
    x: usize,
    rope: usize,
    bad_layer: usize,
    tokens: usize,
    seqs: usize,
    caches: usize,
    append: [usize; 2],
    bytes: usize,
}

impl Layout {
    fn new(config: &Config, n: usize, chunk: usize) -> Layout {
        let mut parts = Parts::default();
        Layout {
            x: parts.next(n * config.hidden_size * 4),
            rope: parts.next(n * config.head_dim * 4),
            bad_layer: parts.next(n * 4),
            tokens: parts.next(n * 4),
            seqs: parts.next(n.div_ceil(chunk) * size_of::<specache_seq>()),
            caches: parts.next(config.n_layers * size_of::<specache_layer_cache>()),
            append: [parts.next(n * 8), parts.next(n * 8)],
            bytes: parts.bytes(),
        }
    }

    /// Bytes that the host tells.
    fn told(&self) -> usize {
        self.bytes - self.tokens
    }
}

impl PromptStream {
    /// Bytes on the device that a prompt of `n` tokens takes beside its cache and the working rows.
    pub(crate) fn bytes(model: &GpuModel, config: &Config, n: usize) -> u64 {
        Layout::new(config, n, model.chunk_rows).bytes as u64
    }

    /// A prompt of `tokens` behind `start` tokens that are there, embedded. `nq`: positions that are read low-bit;
    /// `cache(l)`: where layer l of its cache lies.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Device`].
    #[allow(clippy::too_many_arguments)] // One call site, which names them all.
    pub(crate) fn new(
        device: &Device,
        grants: &mut Grants,
        model: &GpuModel,
        config: &Config,
        attention_factor: f32,
        shape: KvShape,
        (start, nq): (usize, usize),
        tokens: &[u32],
        cache: impl Fn(usize) -> specache_layer_cache,
    ) -> Result<PromptStream> {
        let gpu = device.gpu().expect("a prompt on a GPU");
        let (n, chunk) = (tokens.len(), model.chunk_rows);
        let at = Layout::new(config, n, chunk);
        let memory = grants.device(at.bytes, "the rows of a prompt")?;
        let mut host = PinnedMemory::new(gpu.driver(), at.told())?;
        let told = host.bytes_mut();
        told[..n * 4].copy_from_slice(cast_slice(tokens));
        for i in 0..n.div_ceil(chunk) {
            let seq = specache_seq {
                n: (start + i * chunk) as u32,
                nq: nq as u32,
                no: nq as u32,
                n_rows: chunk.min(n - i * chunk) as u32,
                first_row: 0,
                reserved: [0; 3],
            };
            put(told, at.seqs - at.tokens, i, &seq);
        }
        (0..config.n_layers).for_each(|l| put(told, at.caches - at.tokens, l, &cache(l)));
        let stream = PromptStream { memory, at, host, shape, start, n, chunk, sent: [None; 2] };
        let address = |part: usize| stream.memory.address() + part as u64;
        // The lists of places follow layer by layer.
        gpu.send(StreamId::Compute, address(at.tokens), &stream.host, 0..at.append[0] - at.tokens);
        // One sequence as long as the prompt, and nowhere to append to: each layer has pages of its own.
        let params = specache_embed_params {
            table: model.embed.weight,
            tokens: address(at.tokens),
            seqs: address(at.seqs),
            caches: address(at.caches),
            inv_freq: model.inv_freq,
            x: address(at.x),
            rope: address(at.rope),
            append: address(at.append[0]),
            bad_layer: address(at.bad_layer),
            n_rows: 0,
            n_seqs: 1,
            hidden: config.hidden_size as u32,
            vocab: config.vocab_size as u32,
            n_layers: 0,
            n_kv_heads: config.n_kv_heads as u32,
            head_dim: config.head_dim as u32,
            attention_factor,
            dtype: model.embed.dtype,
            append_stride: chunk as u32,
        };
        for (i, first) in (0..n).step_by(chunk).enumerate() {
            let of_rows = |part: u64, width: usize| part + (first * width * 4) as u64;
            gpu.launch(
                specache_embed_plan,
                &specache_embed_params {
                    tokens: of_rows(params.tokens, 1),
                    seqs: params.seqs + (i * size_of::<specache_seq>()) as u64,
                    x: of_rows(params.x, config.hidden_size),
                    rope: of_rows(params.rope, config.head_dim),
                    bad_layer: of_rows(params.bad_layer, 1),
                    n_rows: chunk.min(n - first) as u32,
                    ..params
                },
            );
        }
        Ok(stream)
    }

    /// Rows of chunk `i` among the prompt's.
    pub(crate) fn rows_of_chunk(&self, i: usize) -> Range<usize> {
        i * self.chunk..self.n.min((i + 1) * self.chunk)
    }

    /// Chunks of the prompt.
    pub(crate) fn n_chunks(&self) -> usize {
        self.n.div_ceil(self.chunk)
    }

    /// Tells the GPU where layer `l` has its K and V: `pages` begin with page number `first_page`.
    pub(crate) fn begin_layer(&mut self, device: &Device, l: usize, pages: &[WidePage], first_page: usize) {
        let gpu = device.gpu().expect("a prompt on a GPU");
        // The layer before the last has read its list.
        self.sent[l % 2].take().into_iter().for_each(|event| device.finish(event));
        let part = self.at.append[l % 2] - self.at.tokens;
        let list: &mut [u64] = cast_slice_mut(&mut self.host.bytes_mut()[part..part + self.n * 8]);
        for (row, place) in list.iter_mut().enumerate() {
            let position = self.start + row;
            let offset = position % PAGE * self.shape.pair_bytes();
            *place = pages[position / PAGE - first_page].address() + offset as u64;
        }
        let to = self.memory.address() + self.at.append[l % 2] as u64;
        gpu.send(StreamId::Compute, to, &self.host, part..part + self.n * 8);
        self.sent[l % 2] = Some(device.record(StreamId::Compute));
    }

    /// Some rows of the prompt, the `in_chunk`-th of their chunk and those behind it.
    fn rows(&self, config: &Config, memory: &ChunkMemory, l: usize, rows: Range<usize>, in_chunk: usize) -> Rows {
        let own = |part: usize, width: usize| self.memory.address() + (part + rows.start * width * 4) as u64;
        let heads = config.n_heads * config.head_dim;
        let in_chunk = |part: usize, width: usize| memory.address(part + in_chunk * width * 4);
        Rows {
            n: rows.len() as u32,
            x: own(self.at.x, config.hidden_size),
            q: in_chunk(memory.at.q, heads),
            k: memory.address(memory.at.k),
            attn: in_chunk(memory.at.attn, heads),
            inner: memory.address(memory.at.inner),
            rope: own(self.at.rope, config.head_dim),
            append: own(self.at.append[l % 2], 2),
            bad_layer: own(self.at.bad_layer, 1),
        }
    }

    /// Rows of a chunk as the fused kernels take them.
    fn each_rows(
        &self,
        config: &Config,
        memory: &ChunkMemory,
        l: usize,
        chunk: Range<usize>,
        mut launch: impl FnMut(&Rows),
    ) {
        for first in chunk.clone().step_by(MAX_ROWS) {
            let rows = first..chunk.end.min(first + MAX_ROWS);
            launch(&self.rows(config, memory, l, rows, first - chunk.start));
        }
    }

    /// Where cuBLASLt makes the products of a chunk: all of its rows.
    fn by_cublas<'a>(
        &self,
        gpu: &'a Gpu,
        model: &'a GpuModel,
        config: &'a Config,
        memory: &ChunkMemory,
        l: usize,
        chunk: &Range<usize>,
    ) -> Option<(dense::Dense<'a>, Rows, Between)> {
        let cublas = model.cublas(chunk.len())?;
        let rows = self.rows(config, memory, l, chunk.clone(), 0);
        Some((dense::Dense { gpu, cublas, model, config }, rows, memory.between()))
    }

    /// RMS norm, q, k, v, RoPE of a chunk; K and V go to the pages.
    pub(crate) fn norm_qkv_rope(
        &self,
        gpu: &Gpu,
        model: &GpuModel,
        config: &Config,
        memory: &ChunkMemory,
        l: usize,
        chunk: usize,
    ) {
        let chunk = self.rows_of_chunk(chunk);
        let Some((dense, rows, between)) = self.by_cublas(gpu, model, config, memory, l, &chunk) else {
            let dense = Dense { gpu, model, config };
            return self.each_rows(config, memory, l, chunk, |rows| dense.norm_qkv_rope(l, rows, &self.shape));
        };
        dense.norm_qkv(l, &rows, &between);
        dense.finish_qkv(l, &rows, between.products, &self.shape);
    }

    /// Causal attention of a chunk.
    pub(crate) fn attend(&self, gpu: &Gpu, config: &Config, memory: &ChunkMemory, l: usize, chunk: usize) {
        let at = |part: usize| self.memory.address() + part as u64;
        let params = specache_prefill_params {
            seqs: at(self.at.seqs + chunk * size_of::<specache_seq>()),
            caches: at(self.at.caches + l * size_of::<specache_layer_cache>()),
            q: memory.address(memory.at.q),
            out: memory.address(memory.at.attn),
            n_seqs: 1,
            n_rows: self.rows_of_chunk(chunk).len() as u32,
            n_heads: config.n_heads as u32,
            n_kv_heads: config.n_kv_heads as u32,
            head_dim: config.head_dim as u32,
            bits: self.shape.packed.bits as u32,
            group_size: self.shape.packed.group_size as u32,
            dtype: dtype_code(self.shape.dtype),
            window: config.sliding_window.unwrap_or(0) as u32,
            shared_limit: gpu.facts().shared_limit,
        };
        gpu.launch(specache_prefill_plan, &params);
    }

    /// Output projection and MLP of a chunk.
    pub(crate) fn rest_of_layer(
        &self,
        gpu: &Gpu,
        model: &GpuModel,
        config: &Config,
        memory: &ChunkMemory,
        l: usize,
        chunk: usize,
    ) {
        let chunk = self.rows_of_chunk(chunk);
        let Some((dense, rows, between)) = self.by_cublas(gpu, model, config, memory, l, &chunk) else {
            let dense = Dense { gpu, model, config };
            return self.each_rows(config, memory, l, chunk, |rows| {
                dense.out_residual(l, rows);
                dense.norm_gate_up(l, rows);
                dense.down_residual(l, rows);
            });
        };
        dense.out_residual(l, &rows, &between);
        dense.norm_gate_up(l, &rows, &between);
        dense.down_residual(l, &rows, &between);
    }

    /// The logits of the last row, and the first layer whose input was not finite in some row. Waits for them.
    pub(crate) fn end(
        &self,
        gpu: &Gpu,
        model: &GpuModel,
        config: &Config,
        memory: &ChunkMemory,
    ) -> (Vec<f32>, Option<usize>) {
        let last = self.memory.address() + (self.at.x + (self.n - 1) * config.hidden_size * 4) as u64;
        let to = memory.address(memory.at.logits);
        match model.cublas(1) {
            Some(cublas) => dense::Dense { gpu, cublas, model, config }.norm_logits(1, last, &memory.between(), to),
            None => Dense { gpu, model, config }.norm_logits(1, last, to),
        }
        let mut logits = vec![0.0; config.vocab_size];
        memory.memory.read(memory.at.logits, cast_slice_mut(&mut logits));
        let mut bad_layers = vec![SPECACHE_NONE; self.n];
        self.memory.read(self.at.bad_layer, cast_slice_mut(&mut bad_layers));
        let first = bad_layers.into_iter().min().filter(|&layer| layer != SPECACHE_NONE);
        (logits, first.map(|layer| layer as usize))
    }
}

/// Writes entry `i` of a list of the kernels' structs that begins at `list`.
fn put<T: Pod>(to: &mut [u8], list: usize, i: usize, value: &T) {
    to[list + i * size_of::<T>()..][..size_of::<T>()].copy_from_slice(bytes_of(value));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config_of;

    /// Worked by hand: CTAs have 128 queries where two find room on a multiprocessor, else 256.
    #[test]
    fn chunks_fill_the_last_wave() {
        let llama = config_of("synthetic:llama-3.1-8b").unwrap();
        let rows = |config: &Config, n_sms, arch| chunk_rows(config, GpuTarget::of(n_sms, arch));
        assert_eq!(rows(&llama, 132, (9, 0)), 1024); // H200: 256 CTAs in 264 places
        assert_eq!(rows(&llama, 108, (8, 0)), 768); // A100: 192 in 216; 1,280 are 320 in 432
        assert_eq!(rows(&llama, 84, (8, 6)), 1280); // A6000: 160 in 168
        assert_eq!(rows(&llama, 128, (8, 9)), 1024); // 4090: 128 in 128
        let without_groups = Config { n_kv_heads: 32, ..llama.clone() }; // a CTA for 128 rows of each head
        assert_eq!(rows(&without_groups, 132, (9, 0)), 1024);
        let one = Config { n_kv_heads: 1, n_heads: 16, ..llama.clone() }; // 1,536 rows at most: 192 CTAs in 264 places
        assert_eq!(rows(&one, 132, (9, 0)), 1536);
        let small = config_of("synthetic:llama-3.2-1b").unwrap(); // D = 64, three CTAs each: 384 in 396 places
        assert_eq!(rows(&small, 132, (9, 0)), 1536);
        // A shape that no kernel has is refused before; nothing fills, and of equals the most rows are taken.
        let other = Config { head_dim: 96, ..llama };
        assert_eq!(rows(&other, 132, (9, 0)), 1536);
    }
}
