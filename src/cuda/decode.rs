//! A decode pass on the GPU: its memory, what each group of sequences is told, and the launches.
//!
//! A **group** is neighbouring sequences of a batch with the same KV options, and one launch per operation and layer: all
//! of them where cuBLASLt makes the products, else up to eight, as the fused dense kernels take sixteen rows. Which
//! sequences share a group changes no number: no row's sums depend on the rows beside it. Products by cuBLASLt are over the
//! rows of all groups at once; there the order of a sum may depend on how many rows there are.

mod gather;
mod graphs;
pub(crate) mod layout;
mod memory;
mod results;

use std::ops::Range;
use std::sync::Arc;

use super::dense::{self, Between};
use super::rows::{Dense, MAX_ROWS, Rows};
use super::weights::GpuModel;
use crate::device::cuda::Gpu;
use crate::device::cuda::bindings::abi::{
    specache_argmax_merge_plan, specache_argmax_params, specache_argmax_slices_plan, specache_attn_combine_plan,
    specache_attn_plan, specache_choice, specache_embed_params, specache_embed_plan, specache_layer_cache,
    specache_select_merge_plan, specache_select_plan,
};
use crate::device::cuda::graph::Graph;
use crate::device::order::StreamId;
use crate::device::{Device, Event};
use crate::error::Result;
use crate::kv::{KvMode, KvOptions, KvShape};
use crate::model::Config;
use gather::Gatherer;
use graphs::{GroupKey, Key};
use layout::Sizes;
use memory::Memory;

/// Sequences of a group for the fused dense kernels: two rows each.
const FUSED_GROUP: usize = MAX_ROWS / 2;

/// One sequence of a pass, as the GPU must know it.
pub(crate) struct Place {
    /// Tokens in its cache: the position of its first row.
    pub n: usize,
    /// Positions that are read low-bit.
    pub nq: usize,
    /// Positions that may be selected.
    pub no: usize,
    /// Its tokens: the real one and the speculative one.
    pub tokens: [u32; 2],
    /// 1 or 2.
    pub n_rows: usize,
    /// Tokens that it has room for, speculative row included.
    pub room: usize,
    /// Slots of a KV head.
    pub top_k: usize,
    /// Shape of its pages.
    pub shape: KvShape,
    /// How its cache is kept.
    pub options: KvOptions,
    /// Whether there is a pair that it could select in this pass.
    pub selects: bool,
}

impl Place {
    fn shares_launches(&self, other: &Place) -> bool {
        let key = |p: &Place| (p.options.mode, p.top_k, p.shape);
        key(self) == key(other)
    }
}

/// Sequences that share launches, and where what they are told begins.
struct Group {
    seqs: Range<usize>,
    rows: Range<usize>,
    mode: KvMode,
    shape: KvShape,
    top_k: u32,
}

impl Group {
    fn n_seqs(&self) -> usize {
        self.seqs.len()
    }

    /// What decides its launches.
    fn key(&self) -> GroupKey {
        (self.seqs.clone(), self.rows.clone(), self.mode, self.shape, self.top_k)
    }
}

/// Memory of passes, kept between calls.
#[derive(Default)]
pub(crate) struct Workspace {
    /// The passes that were seen before, the latest last, and their graphs from the second time on.
    graphs: Vec<(Key, Option<Arc<Graph>>)>,
    memory: Option<Memory>,
    groups: Vec<Group>,
    /// First row of each sequence.
    real_rows: Vec<usize>,
    /// `[row]`: whether its logits have come to the host.
    logits_here: Vec<bool>,
    vocab: usize,
    /// Who gathers in this pass.
    gatherer: Gatherer,
}

impl Workspace {
    /// Plans a pass over these sequences and makes room for it.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Device`]; nothing has changed then that matters.
    pub(crate) fn reserve(
        &mut self,
        device: &Device,
        model: &GpuModel,
        config: &Config,
        places: &[Place],
    ) -> Result<()> {
        self.groups.clear();
        self.real_rows.clear();
        let n_rows = places.iter().map(|place| place.n_rows).sum();
        let by_cublas = model.cublas(n_rows).is_some();
        let most = if by_cublas { places.len() } else { FUSED_GROUP };
        let mut row = 0;
        for (i, place) in places.iter().enumerate() {
            let rows = row..row + place.n_rows;
            self.real_rows.push(row);
            row = rows.end;
            match self.groups.last_mut() {
                Some(group) if group.n_seqs() < most && places[group.seqs.start].shares_launches(place) => {
                    group.seqs.end += 1;
                    group.rows.end = rows.end;
                }
                _ => self.groups.push(Group {
                    seqs: i..i + 1,
                    rows,
                    mode: place.options.mode,
                    shape: place.shape,
                    top_k: place.top_k as u32,
                }),
            }
        }
        self.vocab = config.vocab_size;
        self.logits_here.clear();
        self.logits_here.resize(row, false);
        let of_all = |part: fn(&Place) -> usize| places.iter().map(part).max().unwrap_or(0);
        let (room, top_k) = (of_all(|p| p.room), of_all(|p| p.top_k));
        let needed = Sizes::new(row, places.len(), room, top_k, by_cublas);
        // Whose memory it is decides where it lies, and the model what the parts of it are.
        let own = self.memory.as_ref().filter(|memory| memory.device.is(device) && memory.config == *config);
        let own = own.filter(|memory| memory.post.as_ref().is_none_or(|post| !post.given_up));
        if own.is_some_and(|memory| memory.sizes.covers(&needed)) {
            return Ok(());
        }
        let sizes = own.map_or(needed, |memory| memory.sizes.max(&needed));
        self.graphs.clear(); // they know the memory by its address
        self.forget_trials();
        self.memory = None;
        self.memory = Some(Memory::new(device, config, sizes, model.host_gather.as_ref())?);
        Ok(())
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("reserved before the pass")
    }

    /// Tells the GPU what the pass is about, and embeds its tokens. `cache(l, i)`: where layer l of sequence i lies.
    pub(crate) fn begin(
        &mut self,
        device: &Device,
        model: &GpuModel,
        config: &Config,
        attention_factor: f32,
        places: &[Place],
        cache: impl Fn(usize, usize) -> specache_layer_cache,
    ) {
        let Workspace { memory, groups, .. } = self;
        let gpu = device.gpu().expect("a GPU's workspace");
        let memory = memory.as_mut().expect("reserved before the pass");
        for group in groups.iter() {
            memory.tell(group, places, config.n_layers, &cache);
        }
        // The last gathers of the pass before may still read what they were told.
        memory.turn ^= 1;
        if let Some(event) = memory.told_read[memory.turn].take() {
            device.after(StreamId::Compute, event, "a gather has read its state before the state is overwritten");
        }
        gpu.send(StreamId::Compute, memory.told(), &memory.told_host, 0..memory.told_at.pass);
        for group in groups.iter() {
            let rows = memory.rows(config, 0, &group.rows);
            let params = specache_embed_params {
                table: model.embed.weight,
                tokens: memory.told() + (memory.told_at.tokens + group.rows.start * 4) as u64,
                seqs: memory.seqs(group),
                caches: memory.caches(config.n_layers, group, 0),
                inv_freq: model.inv_freq,
                x: rows.x,
                rope: rows.rope,
                append: rows.append,
                bad_layer: rows.bad_layer,
                n_rows: rows.n,
                n_seqs: group.n_seqs() as u32,
                hidden: config.hidden_size as u32,
                vocab: config.vocab_size as u32,
                n_layers: config.n_layers as u32,
                n_kv_heads: config.n_kv_heads as u32,
                head_dim: config.head_dim as u32,
                attention_factor,
                dtype: model.embed.dtype,
                append_stride: memory.sizes.rows as u32,
            };
            gpu.launch(specache_embed_plan, &params);
        }
    }

    /// RMS norm, q, k, v, RoPE; K and V go to the caches.
    pub(crate) fn norm_qkv_rope(&self, gpu: &Gpu, model: &GpuModel, config: &Config, l: usize) {
        let memory = self.memory();
        let Some((dense, all, between)) = self.by_cublas(gpu, model, config, l) else {
            return self
                .each_group(config, l, |rows, shape| Dense { gpu, model, config }.norm_qkv_rope(l, rows, shape));
        };
        dense.norm_qkv(l, &all, &between);
        for group in &self.groups {
            let first = group.rows.start * (config.n_heads + 2 * config.n_kv_heads) * config.head_dim * 4;
            let rows = memory.rows(config, l, &group.rows);
            dense.finish_qkv(l, &rows, between.products + first as u64, &group.shape);
        }
    }

    /// `x += W_o attn`.
    pub(crate) fn out_residual(&self, gpu: &Gpu, model: &GpuModel, config: &Config, l: usize) {
        match self.by_cublas(gpu, model, config, l) {
            Some((dense, all, between)) => dense.out_residual(l, &all, &between),
            None => self.each_group(config, l, |rows, _| Dense { gpu, model, config }.out_residual(l, rows)),
        }
    }

    /// RMS norm, then `silu(W_gate x) * W_up x`.
    pub(crate) fn norm_gate_up(&self, gpu: &Gpu, model: &GpuModel, config: &Config, l: usize) {
        match self.by_cublas(gpu, model, config, l) {
            Some((dense, all, between)) => dense.norm_gate_up(l, &all, &between),
            None => self.each_group(config, l, |rows, _| Dense { gpu, model, config }.norm_gate_up(l, rows)),
        }
    }

    /// `x += W_down inner`.
    pub(crate) fn down_residual(&self, gpu: &Gpu, model: &GpuModel, config: &Config, l: usize) {
        match self.by_cublas(gpu, model, config, l) {
            Some((dense, all, between)) => dense.down_residual(l, &all, &between),
            None => self.each_group(config, l, |rows, _| Dense { gpu, model, config }.down_residual(l, rows)),
        }
    }

    /// Where cuBLASLt makes the products of this pass: all of its rows.
    fn by_cublas<'a>(
        &self,
        gpu: &'a Gpu,
        model: &'a GpuModel,
        config: &'a Config,
        l: usize,
    ) -> Option<(dense::Dense<'a>, Rows, Between)> {
        let n = self.groups.last().map_or(0, |group| group.rows.end);
        let cublas = model.cublas(n)?;
        let memory = self.memory();
        let at = |part: usize| memory.scratch.address() + part as u64;
        let between = Between { operand: at(memory.scratch_at.operand), products: at(memory.scratch_at.products) };
        Some((dense::Dense { gpu, cublas, model, config }, memory.rows(config, l, &(0..n)), between))
    }

    fn each_group(&self, config: &Config, l: usize, mut launch: impl FnMut(&Rows, &KvShape)) {
        let memory = self.memory();
        self.groups.iter().for_each(|group| launch(&memory.rows(config, l, &group.rows), &group.shape));
    }

    /// Attention of all sequences over layer `l`; or only of those of one mode, without their prefetched pairs.
    pub(crate) fn attend(&self, device: &Device, config: &Config, l: usize, low_bit_only: Option<KvMode>) {
        let gpu = device.gpu().expect("a GPU's workspace");
        for group in &self.groups {
            if low_bit_only.is_some_and(|mode| mode != group.mode) {
                continue;
            }
            let params = self.memory().attention(config, group, l, low_bit_only.is_none());
            gpu.launch(specache_attn_plan, &params);
            gpu.launch(specache_attn_combine_plan, &params);
        }
    }

    /// Before attention: selections that may still read what the layer before has scored.
    pub(crate) fn order_attention(&self, device: &Device) {
        if let Some(event) = self.memory().selected {
            device.after(StreamId::Compute, event, "a selection has read the scores before the next attention");
        }
    }

    /// Before the selections of layer `l` on `stream`: other sequences may have had the layer's lists of fetches before, and
    /// nobody may have waited for theirs yet.
    pub(crate) fn order_selections(&self, device: &Device, l: usize, stream: StreamId) {
        if let Some(event) = self.memory().gathered[l] {
            device.after(stream, event, "a gather has read its list before the next selection");
        }
    }

    /// The selections given so far are done at this point.
    pub(crate) fn selections_end_at(&mut self, event: Event) {
        self.memory.as_mut().expect("reserved before the pass").selected = Some(event);
    }

    /// Selection of the sequences of one mode, by their last rows' attention just computed, and the slots for it.
    pub(crate) fn select(&self, device: &Device, config: &Config, l: usize, mode: KvMode, stream: StreamId) {
        let gpu = device.gpu().expect("a GPU's workspace");
        for group in self.groups.iter().filter(|g| g.mode == mode && g.top_k > 0) {
            let params = self.memory().selection(config, group, l);
            gpu.launch_on(stream, specache_select_plan, &params);
            gpu.launch_on(stream, specache_select_merge_plan, &params);
        }
    }

    /// Logits and their argmax; then what the host must know is on its way there: choices and counts, and what was selected if
    /// that is wanted. Logits stay until somebody asks for them.
    pub(crate) fn end(&mut self, device: &Device, model: &GpuModel, config: &Config, with_selections: bool) {
        let gpu = device.gpu().expect("a GPU's workspace");
        let memory = self.memory();
        let logits = |row: usize| memory.result(memory.results_at.logits, row * config.vocab_size * 4);
        match self.by_cublas(gpu, model, config, 0) {
            Some((dense, all, between)) => dense.norm_logits(all.n, all.x, &between, logits(0)),
            None => self.groups.iter().for_each(|group| {
                let rows = memory.rows(config, 0, &group.rows);
                Dense { gpu, model, config }.norm_logits(rows.n, rows.x, logits(group.rows.start));
            }),
        }
        let n_rows = self.groups.last().map_or(0, |group| group.rows.end);
        for first in (0..n_rows).step_by(MAX_ROWS) {
            let params = specache_argmax_params {
                logits: logits(first),
                scratch: memory.scratch.address() + memory.scratch_at.argmax as u64,
                choices: memory.result(memory.results_at.choices, first * size_of::<specache_choice>()),
                tokens: 0,
                n_rows: MAX_ROWS.min(n_rows - first) as u32,
                vocab: config.vocab_size as u32,
            };
            gpu.launch(specache_argmax_slices_plan, &params);
            gpu.launch(specache_argmax_merge_plan, &params);
        }
        if let Some(event) = memory.selected {
            device.after(StreamId::Compute, event, "selections are complete before the host reads them");
        }
        let Memory { results, results_host, results_at, .. } = self.memory.as_mut().expect("reserved before the pass");
        let mut fetch = |part: Range<usize>| {
            let from = results.address() + part.start as u64;
            gpu.fetch(StreamId::Compute, results_host, part.start, from, part.len());
        };
        fetch(results_at.choices..results_at.selected);
        if with_selections {
            fetch(results_at.selected..results_at.bytes);
        }
    }
}
