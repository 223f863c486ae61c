//! A decode pass on the GPU: its memory, what each group of sequences is told, and the launches.
//!
//! A **group** is up to eight neighbouring sequences of a batch with the same KV options: sixteen rows, which is what the
//! fused dense kernels take, and one launch per operation and layer. Which sequences share a group changes no number: no
//! row's sums depend on the rows beside it. Products by cuBLASLt are over the rows of all groups at once; there the order
//! of a sum may depend on how many rows there are.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, bytes_of, cast_slice};

use super::dense::{self, Between};
use super::dtype_code;
use super::rows::{Dense, MAX_ROWS, Rows};
use super::weights::GpuModel;
use crate::device::cuda::bindings::abi::{
    SPECACHE_ARGMAX_SLICE, SPECACHE_NONE, specache_argmax_merge_plan, specache_argmax_params,
    specache_argmax_slices_plan, specache_attn_combine_plan, specache_attn_params, specache_attn_part_bytes,
    specache_attn_plan, specache_choice, specache_embed_params, specache_embed_plan, specache_fetch,
    specache_fetch_params, specache_fetch_plan, specache_layer_cache, specache_select_merge_plan,
    specache_select_params, specache_select_plan, specache_select_scratch_bytes, specache_seq,
};
use crate::device::cuda::graph::{Exclusive, Graph};
use crate::device::cuda::{Gpu, PinnedMemory};
use crate::device::order::StreamId;
use crate::device::{Buffer, Device, Event};
use crate::error::Result;
use crate::kv::{KvMode, KvOptions, KvShape};
use crate::model::Config;

/// Sequences of a group: two rows each.
const GROUP: usize = MAX_ROWS / 2;

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
}

/// What decides the size of everything.
#[derive(Clone, Copy, Default, PartialEq)]
struct Sizes {
    rows: usize,
    /// Rows whose products cuBLASLt makes: all or none.
    cublas_rows: usize,
    seqs: usize,
    /// Tokens of the longest sequence, rounded up so that it changes rarely.
    capacity: usize,
    top_k: usize,
}

impl Sizes {
    fn covers(&self, other: &Sizes) -> bool {
        self.rows >= other.rows
            && self.seqs >= other.seqs
            && self.cublas_rows >= other.cublas_rows
            && self.capacity >= other.capacity
            && self.top_k >= other.top_k
    }

    fn max(&self, other: &Sizes) -> Sizes {
        Sizes {
            rows: self.rows.max(other.rows),
            seqs: self.seqs.max(other.seqs),
            cublas_rows: self.cublas_rows.max(other.cublas_rows),
            capacity: self.capacity.max(other.capacity),
            top_k: self.top_k.max(other.top_k),
        }
    }
}

/// The parts of a block of memory, one after the other at multiples of 256 bytes.
#[derive(Default)]
pub(super) struct Parts(usize);

impl Parts {
    pub(super) fn next(&mut self, bytes: usize) -> usize {
        let at = self.0;
        self.0 = (at + bytes).next_multiple_of(256);
        at
    }

    pub(super) fn bytes(&self) -> usize {
        self.0
    }
}

/// Offsets in the block of memory that a pass works in.
#[derive(Clone, Copy, Default)]
struct Scratch {
    x: usize,
    q: usize,
    k: usize,
    attn: usize,
    inner: usize,
    operand: usize,
    products: usize,
    rope: usize,
    append: usize,
    scores: usize,
    lse: usize,
    first_scores: usize,
    first_lse: usize,
    attn_parts: usize,
    candidates: usize,
    argmax: usize,
    fetches: usize,
    bytes: usize,
}

/// Offsets in what the host tells the GPU before a pass; the same on both sides.
#[derive(Clone, Copy, Default)]
struct Told {
    tokens: usize,
    seqs: usize,
    caches: usize,
    bytes: usize,
}

/// Offsets in what the GPU tells the host after a pass; the same on both sides.
#[derive(Clone, Copy, Default)]
struct Results {
    logits: usize,
    choices: usize,
    bad_layer: usize,
    fetch_counts: usize,
    select_counts: usize,
    hits: usize,
    selected: usize,
    bytes: usize,
}

/// Sequences, rows, mode, shape and top-k of a group.
type GroupKey = (Range<usize>, Range<usize>, KvMode, KvShape, u32);

/// Everything that a pass's launches depend on, apart from what it is told: passes with equal keys have equal graphs.
#[derive(Clone, PartialEq)]
struct Key {
    model: usize,
    turn: usize,
    with_selections: bool,
    groups: Vec<GroupKey>,
    /// Of the two modes that fetch: whether there is anything to select.
    selects: [bool; 2],
}

/// Graphs that are kept: for both turns of a step and a pre-decode, of some sizes of a batch.
const GRAPHS: usize = 16;

/// Memory of passes, kept between calls.
#[derive(Default)]
pub(crate) struct Workspace {
    /// The passes that were seen before, the latest last, and their graphs from the second time on.
    graphs: Vec<(Key, Option<Arc<Graph>>)>,
    memory: Option<Memory>,
    groups: Vec<Group>,
    /// First row of each sequence.
    real_rows: Vec<usize>,
    vocab: usize,
}

struct Memory {
    device: Device,
    config: Config,
    sizes: Sizes,
    scratch: Buffer,
    scratch_at: Scratch,
    /// Twice: for this pass, and for the one before, whose last gathers may still read it.
    told: Buffer,
    told_host: PinnedMemory,
    told_at: Told,
    /// Which of the two is this pass's.
    turn: usize,
    /// When gathers have read the two.
    told_read: [Option<Event>; 2],
    /// `[layer]`: when the last gather is done.
    gathered: Vec<Option<Event>>,
    results: Buffer,
    results_host: PinnedMemory,
    results_at: Results,
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
        let mut row = 0;
        for (i, place) in places.iter().enumerate() {
            let rows = row..row + place.n_rows;
            self.real_rows.push(row);
            row = rows.end;
            match self.groups.last_mut() {
                Some(group) if group.n_seqs() < GROUP && places[group.seqs.start].shares_launches(place) => {
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
        let needed = Sizes {
            rows: row,
            seqs: places.len(),
            cublas_rows: model.cublas(row).map_or(0, |_| row),
            capacity: places.iter().map(|p| p.room).max().unwrap_or(0).next_multiple_of(1024),
            top_k: places.iter().map(|p| p.top_k).max().unwrap_or(0),
        };
        // Whose memory it is decides where it lies, and the model what the parts of it are.
        let own = self.memory.as_ref().filter(|memory| memory.device.is(device) && memory.config == *config);
        if own.is_some_and(|memory| memory.sizes.covers(&needed)) {
            return Ok(());
        }
        let sizes = own.map_or(needed, |memory| memory.sizes.max(&needed));
        self.graphs.clear(); // they know the memory by its address
        self.memory = None;
        self.memory = Some(Memory::new(device, config, sizes)?);
        Ok(())
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("reserved before the pass")
    }

    /// Begins a pass that was seen before as a graph: it becomes one the second time, and is replayed from then on. `None`:
    /// the pass goes to the driver call by call. `with_selections` as in [`Workspace::end`].
    ///
    /// Not where somebody wants to know when each operation runs, nor in `offload`, whose copies come from other pages when the
    /// sequence has grown, nor with drivers that cannot capture launches which overlap (before CUDA 12.3).
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn begin_graph<'a>(
        &mut self,
        device: &'a Device,
        model: &GpuModel,
        places: &[Place],
        with_selections: bool,
    ) -> Result<Option<Exclusive<'a>>> {
        let gpu = device.gpu().expect("a GPU's workspace");
        let offload = self.groups.iter().any(|group| group.mode == KvMode::Offload);
        let timed = device.measures_waits() || device.trace().is_some();
        if offload || timed || !device.options().graph || gpu.facts().gpu.driver < 12_030 {
            return Ok(None);
        }
        let selects = |mode| places.iter().any(|place| place.options.mode == mode && place.selects);
        let group = |g: &Group| (g.seqs.clone(), g.rows.clone(), g.mode, g.shape, g.top_k);
        let key = Key {
            model: std::ptr::from_ref(model).addr(),
            turn: self.memory().turn ^ 1,
            with_selections,
            groups: self.groups.iter().map(group).collect(),
            selects: [selects(KvMode::SpeCache), selects(KvMode::Fetch)],
        };
        let seen = self.graphs.iter().position(|(seen, _)| *seen == key);
        let graph = seen.map(|i| self.graphs.remove(i).1);
        // The first time loads kernels and permits them their shared memory.
        let pass = graph.clone().map(|graph| Exclusive::begin(gpu.queues(), graph)).transpose()?;
        self.graphs.push((key, graph.flatten()));
        if self.graphs.len() > GRAPHS {
            self.graphs.remove(0); // its last pass is over: every call waits for its own
        }
        Ok(pass)
    }

    /// The end of a pass that [`Workspace::begin_graph`] began: the GPU is given its graph.
    ///
    /// # Errors
    /// [`crate::Error::Device`]; nothing of the pass has run then.
    pub(crate) fn end_graph(&mut self, pass: Exclusive<'_>) -> Result<()> {
        let graph = pass.end()?;
        self.graphs.last_mut().expect("this pass's").1 = Some(graph);
        Ok(())
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
        gpu.send(StreamId::Compute, memory.told(), &memory.told_host, 0..memory.told_at.bytes);
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
    pub(crate) fn attend(&self, gpu: &Gpu, config: &Config, l: usize, low_bit_only: Option<KvMode>) {
        for group in &self.groups {
            if low_bit_only.is_some_and(|mode| mode != group.mode) {
                continue;
            }
            let params = self.memory().attention(gpu, config, group, l, low_bit_only.is_none());
            gpu.launch(specache_attn_plan, &params);
            gpu.launch(specache_attn_combine_plan, &params);
        }
    }

    /// Selection of the sequences of one mode, by their last rows' attention just computed, and the slots for it.
    pub(crate) fn select(&self, device: &Device, config: &Config, l: usize, mode: KvMode) {
        let gpu = device.gpu().expect("a GPU's workspace");
        // Other sequences may have had this layer's lists of fetches before, and nobody may have waited for theirs yet.
        if let Some(event) = self.memory().gathered[l] {
            device.after(StreamId::Compute, event, "a gather has read its list before the next selection");
        }
        for group in self.groups.iter().filter(|g| g.mode == mode && g.top_k > 0) {
            let params = self.memory().selection(gpu, config, group, l);
            gpu.launch(specache_select_plan, &params);
            gpu.launch(specache_select_merge_plan, &params);
        }
    }

    /// The selected pairs of the sequences of one mode begin to come from the host. Returns when they are there.
    pub(crate) fn gather(&mut self, device: &Device, config: &Config, l: usize, mode: KvMode) -> Event {
        let gpu = device.gpu().expect("a GPU's workspace");
        for group in self.groups.iter().filter(|g| g.mode == mode && g.top_k > 0) {
            let memory = self.memory();
            let (fetches, fetch_counts) = memory.fetches(config, group, l);
            let params = specache_fetch_params {
                seqs: memory.seqs(group),
                caches: memory.caches(config.n_layers, group, l),
                fetches,
                fetch_counts,
                fetched: 0,
                n_seqs: group.n_seqs() as u32,
                n_kv_heads: config.n_kv_heads as u32,
                head_dim: config.head_dim as u32,
                top_k: group.top_k,
                n_ctas: 0,
                reserved: 0,
            };
            gpu.launch_on(StreamId::CopyIn, specache_fetch_plan, &params);
        }
        let event = device.record(StreamId::CopyIn);
        let memory = self.memory.as_mut().expect("reserved before the pass");
        memory.gathered[l] = Some(event);
        memory.told_read[memory.turn] = Some(event);
        event
    }

    /// Logits and their argmax; then everything that the host asks for is on its way there: the logits of real rows, and
    /// what was selected if that is wanted.
    pub(crate) fn end(&mut self, gpu: &Gpu, model: &GpuModel, config: &Config, with_selections: bool) {
        let memory = self.memory();
        let logits = |row: usize| memory.result(memory.results_at.logits, row * config.vocab_size * 4);
        match self.by_cublas(gpu, model, config, 0) {
            Some((dense, all, between)) => dense.norm_logits(all.n, all.x, &between, logits(0)),
            None => self.groups.iter().for_each(|group| {
                let rows = memory.rows(config, 0, &group.rows);
                Dense { gpu, model, config }.norm_logits(rows.n, rows.x, logits(group.rows.start));
            }),
        }
        for group in &self.groups {
            let params = specache_argmax_params {
                logits: logits(group.rows.start),
                scratch: memory.scratch.address() + memory.scratch_at.argmax as u64,
                choices: memory.result(memory.results_at.choices, group.rows.start * size_of::<specache_choice>()),
                tokens: 0,
                n_rows: group.rows.len() as u32,
                vocab: config.vocab_size as u32,
            };
            gpu.launch(specache_argmax_slices_plan, &params);
            gpu.launch(specache_argmax_merge_plan, &params);
        }
        let Memory { results, results_host, results_at, .. } = self.memory.as_mut().expect("reserved before the pass");
        let mut fetch = |part: Range<usize>| {
            let from = results.address() + part.start as u64;
            gpu.fetch(StreamId::Compute, results_host, part.start, from, part.len());
        };
        let row_bytes = config.vocab_size * 4;
        for &row in &self.real_rows {
            let at = results_at.logits + row * row_bytes;
            fetch(at..at + row_bytes);
        }
        fetch(results_at.choices..results_at.selected);
        if with_selections {
            fetch(results_at.selected..results_at.bytes);
        }
    }

    /// Logits `[vocab]` of a row, once the pass is over.
    pub(crate) fn logits(&self, row: usize) -> &[f32] {
        &self.memory().told_back(|r| r.logits)[row * self.vocab..][..self.vocab]
    }

    /// The token of a row's highest logit, once the pass is over.
    pub(crate) fn argmax(&self, row: usize) -> u32 {
        self.choice(row).token
    }

    /// Whether all logits of a row are numbers, once the pass is over.
    pub(crate) fn is_finite(&self, row: usize) -> bool {
        let choice = self.choice(row);
        choice.first_bad == SPECACHE_NONE && choice.logit.is_finite()
    }

    fn choice(&self, row: usize) -> specache_choice {
        self.memory().told_back(|r| r.choices)[row]
    }

    /// First layer whose input was not finite in the real row of sequence `seq`, once the pass is over.
    pub(crate) fn bad_layer(&self, seq: usize) -> Option<usize> {
        let row = self.real_rows[seq];
        let layer: u32 = self.memory().told_back(|r| r.bad_layer)[row];
        (layer != SPECACHE_NONE).then_some(layer as usize)
    }

    /// Pairs that sequence `seq` fetched in layer `l`, once the pass is over.
    pub(crate) fn fetched(&self, config: &Config, l: usize, seq: usize) -> u64 {
        self.sum_of_heads(config, l, seq, |r| r.fetch_counts)
    }

    /// Pairs of row 0's own top-k that sequence `seq` had prefetched in layer `l`, once a `specache` step is over.
    pub(crate) fn hits(&self, config: &Config, l: usize, seq: usize) -> u64 {
        self.sum_of_heads(config, l, seq, |r| r.hits)
    }

    fn group_of(&self, seq: usize) -> &Group {
        self.groups.iter().find(|group| group.seqs.contains(&seq)).expect("a sequence of the pass")
    }

    fn sum_of_heads(&self, config: &Config, l: usize, seq: usize, part: impl FnOnce(&Results) -> usize) -> u64 {
        let (memory, heads) = (self.memory(), config.n_kv_heads);
        if self.group_of(seq).top_k == 0 {
            // A sequence so short that it selects nothing: no kernel has counted.
            return 0;
        }
        let counts: &[u32] = memory.told_back(part);
        counts[(l * memory.sizes.seqs + seq) * heads..][..heads].iter().map(|&n| u64::from(n)).sum()
    }

    /// Positions that sequence `seq` selected for a KV head in layer `l`, once the pass is over.
    pub(crate) fn selected(&self, config: &Config, l: usize, seq: usize, head: usize) -> &[u32] {
        let (memory, group) = (self.memory(), self.group_of(seq));
        if group.top_k == 0 {
            return &[];
        }
        let at = (l * memory.sizes.seqs + seq) * config.n_kv_heads + head;
        let count: u32 = memory.told_back(|r| r.select_counts)[at];
        // Lists of a group are as long as its own top-k.
        let first = memory.first_list(config, l, group.seqs.start);
        let list = first + ((seq - group.seqs.start) * config.n_kv_heads + head) * group.top_k as usize;
        &memory.told_back(|r| r.selected)[list..][..count as usize]
    }
}

impl Drop for Memory {
    /// Sessions wait for their own pairs, and may outlive what the gathers read here.
    fn drop(&mut self) {
        self.device.enter();
        self.gathered.iter().flatten().for_each(|&event| self.device.finish(event));
        self.device.finish_compute(); // a pass may have been given up
    }
}

impl Memory {
    fn new(device: &Device, config: &Config, sizes: Sizes) -> Result<Memory> {
        let gpu = device.gpu().expect("a GPU's workspace");
        let scratch_at = Scratch::new(gpu, config, &sizes);
        let (told_at, results_at) = (Told::new(config, &sizes), Results::new(config, &sizes));
        let total = scratch_at.bytes + 2 * told_at.bytes + results_at.bytes;
        let mut grants = device.grant(total as u64, 0, "the workspace of decode steps")?;
        Ok(Memory {
            device: device.clone(),
            config: config.clone(),
            sizes,
            scratch: grants.device(scratch_at.bytes, "the workspace of decode steps")?,
            scratch_at,
            told: grants.device(2 * told_at.bytes, "the state of decode steps")?,
            told_host: PinnedMemory::new(gpu.driver(), told_at.bytes)?,
            told_at,
            turn: 0,
            told_read: [None; 2],
            gathered: vec![None; config.n_layers],
            results: grants.device(results_at.bytes, "the results of decode steps")?,
            results_host: PinnedMemory::new(gpu.driver(), results_at.bytes)?,
            results_at,
        })
    }

    /// Writes what the GPU must know of a group.
    fn tell(
        &mut self,
        group: &Group,
        places: &[Place],
        n_layers: usize,
        cache: &impl Fn(usize, usize) -> specache_layer_cache,
    ) {
        let Told { tokens, seqs, caches, .. } = self.told_at;
        let told = self.told_host.bytes_mut();
        let mut row = group.rows.start;
        for i in group.seqs.clone() {
            let Place { n, nq, no, n_rows, .. } = places[i];
            let seq = specache_seq {
                n: n as u32,
                nq: nq as u32,
                no: no as u32,
                n_rows: n_rows as u32,
                first_row: (row - group.rows.start) as u32,
                reserved: [0; 3],
            };
            put(told, seqs + i * size_of::<specache_seq>(), &seq);
            told[tokens + row * 4..][..n_rows * 4].copy_from_slice(cast_slice(&places[i].tokens[..n_rows]));
            row += n_rows;
            for l in 0..n_layers {
                let entry = group.seqs.start * n_layers + l * group.n_seqs() + i - group.seqs.start;
                put(told, caches + entry * size_of::<specache_layer_cache>(), &cache(l, i));
            }
        }
    }

    /// What this pass is told.
    fn told(&self) -> u64 {
        self.told.address() + (self.turn * self.told_at.bytes) as u64
    }

    /// Places of a group's sequences.
    fn seqs(&self, group: &Group) -> u64 {
        self.told() + (self.told_at.seqs + group.seqs.start * size_of::<specache_seq>()) as u64
    }

    /// Caches of a group's sequences in layer `l`.
    fn caches(&self, n_layers: usize, group: &Group, l: usize) -> u64 {
        let entry = group.seqs.start * n_layers + l * group.n_seqs();
        self.told() + (self.told_at.caches + entry * size_of::<specache_layer_cache>()) as u64
    }

    /// Some of the pass's rows in layer `l`.
    fn rows(&self, config: &Config, l: usize, rows: &Range<usize>) -> Rows {
        let first = rows.start;
        let at = |part: usize, width: usize| self.scratch.address() + (part + first * width * 4) as u64;
        let (at_, heads) = (self.scratch_at, config.n_heads * config.head_dim);
        Rows {
            n: rows.len() as u32,
            x: at(at_.x, config.hidden_size),
            q: at(at_.q, heads),
            k: at(at_.k, config.n_kv_heads * config.head_dim),
            attn: at(at_.attn, heads),
            inner: at(at_.inner, config.intermediate_size),
            rope: at(at_.rope, config.head_dim),
            append: self.scratch.address() + (at_.append + (l * self.sizes.rows + first) * 8) as u64,
            bad_layer: self.result(self.results_at.bad_layer, first * 4),
        }
    }

    fn result(&self, part: usize, at: usize) -> u64 {
        self.results.address() + (part + at) as u64
    }

    /// A part of what the GPU told, as numbers.
    fn told_back<T: Pod>(&self, part: impl FnOnce(&Results) -> usize) -> &[T] {
        let bytes = &self.results_host.bytes()[part(&self.results_at)..];
        cast_slice(&bytes[..bytes.len() / size_of::<T>() * size_of::<T>()])
    }

    fn attention(&self, gpu: &Gpu, config: &Config, group: &Group, l: usize, replace: bool) -> specache_attn_params {
        let (rows, at) = (self.rows(config, l, &group.rows), |part: usize| self.scratch.address() + part as u64);
        let selects = group.top_k > 0;
        // Each sequence's own: all groups attend before the first of them selects.
        let heads = group.seqs.start * config.n_heads;
        let scores_at = |part: usize| at(part + heads * self.sizes.capacity * 4);
        specache_attn_params {
            seqs: self.seqs(group),
            caches: self.caches(config.n_layers, group, l),
            q: rows.q,
            out: rows.attn,
            scores: if selects { scores_at(self.scratch_at.scores) } else { 0 },
            lse: at(self.scratch_at.lse + heads * 4),
            first_scores: if selects && group.mode == KvMode::SpeCache {
                scores_at(self.scratch_at.first_scores)
            } else {
                0
            },
            first_lse: at(self.scratch_at.first_lse + heads * 4),
            parts: at(self.scratch_at.attn_parts),
            top_k: if replace { group.top_k } else { 0 },
            ..attention_shape(gpu, config, &group.shape, group.n_seqs(), self.sizes.capacity)
        }
    }

    fn selection(&self, gpu: &Gpu, config: &Config, group: &Group, l: usize) -> specache_select_params {
        let attention = self.attention(gpu, config, group, l, true);
        let (fetches, fetch_counts) = self.fetches(config, group, l);
        let lists = (l * self.sizes.seqs + group.seqs.start) * config.n_kv_heads;
        specache_select_params {
            seqs: attention.seqs,
            caches: attention.caches,
            scores: attention.scores,
            lse: attention.lse,
            selected: self.result(self.results_at.selected, self.first_list(config, l, group.seqs.start) * 4),
            fetches,
            fetch_counts,
            select_counts: self.result(self.results_at.select_counts, lists * 4),
            hits: if attention.first_scores == 0 { 0 } else { self.result(self.results_at.hits, lists * 4) },
            first_scores: attention.first_scores,
            first_lse: attention.first_lse,
            candidates: self.scratch.address() + self.scratch_at.candidates as u64,
            score_stride: attention.score_stride,
            n_seqs: attention.n_seqs,
            n_heads: attention.n_heads,
            n_kv_heads: attention.n_kv_heads,
            top_k: group.top_k,
            window: attention.window,
            capacity: attention.capacity,
            forget: u32::from(!self.device.options().delta),
            reserved: 0,
        }
    }

    /// Of a layer and the sequences from `seq` on: where their lists of positions begin, in numbers.
    fn first_list(&self, config: &Config, l: usize, seq: usize) -> usize {
        (l * self.sizes.seqs + seq) * config.n_kv_heads * self.sizes.top_k
    }

    /// A group's fetches of a layer, and their counts: a layer's own, because its gather reads them while the next one
    /// selects.
    fn fetches(&self, config: &Config, group: &Group, l: usize) -> (u64, u64) {
        let list = self.first_list(config, l, group.seqs.start) * size_of::<specache_fetch>();
        let counts = (l * self.sizes.seqs + group.seqs.start) * config.n_kv_heads * 4;
        let fetches = self.scratch.address() + (self.scratch_at.fetches + list) as u64;
        (fetches, self.result(self.results_at.fetch_counts, counts))
    }
}

/// The parts of the attention's parameters that say how large everything is.
fn attention_shape(
    gpu: &Gpu,
    config: &Config,
    shape: &KvShape,
    n_seqs: usize,
    capacity: usize,
) -> specache_attn_params {
    specache_attn_params {
        score_stride: capacity as u64,
        n_seqs: n_seqs as u32,
        n_heads: config.n_heads as u32,
        n_kv_heads: config.n_kv_heads as u32,
        head_dim: config.head_dim as u32,
        bits: shape.packed.bits as u32,
        group_size: shape.packed.group_size as u32,
        dtype: dtype_code(shape.dtype),
        window: config.sliding_window.unwrap_or(0) as u32,
        capacity: capacity as u32,
        n_sms: gpu.facts().gpu.n_sms,
        shared_limit: gpu.facts().shared_limit,
        ..Default::default()
    }
}

impl Scratch {
    fn new(gpu: &Gpu, config: &Config, sizes: &Sizes) -> Scratch {
        let (mut parts, rows) = (Parts::default(), sizes.rows);
        let (heads, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
        let group = sizes.seqs.min(GROUP);
        let shape = KvShape::new(config, &KvOptions::default());
        let attention = specache_attn_params {
            top_k: sizes.top_k as u32,
            ..attention_shape(gpu, config, &shape, group, sizes.capacity)
        };
        let selection = specache_select_params {
            n_seqs: group as u32,
            n_heads: attention.n_heads,
            n_kv_heads: attention.n_kv_heads,
            top_k: attention.top_k,
            capacity: attention.capacity,
            // Counting them takes twice the room; any address will do.
            hits: 1,
            ..Default::default()
        };
        let lists = config.n_layers * sizes.seqs * config.n_kv_heads * sizes.top_k;
        let slices = config.vocab_size.div_ceil(SPECACHE_ARGMAX_SLICE as usize);
        let score_rows = sizes.seqs * config.n_heads;
        let scores = if sizes.top_k > 0 { score_rows * sizes.capacity * 4 } else { 0 };
        Scratch {
            x: parts.next(rows * config.hidden_size * 4),
            q: parts.next(rows * heads * 4),
            k: parts.next(rows * kv * 4),
            attn: parts.next(rows * heads * 4),
            inner: parts.next(rows * config.intermediate_size * 4),
            operand: parts.next(sizes.cublas_rows * Between::operand_width(config) * 2),
            products: parts.next(sizes.cublas_rows * Between::product_width(config) * 4),
            rope: parts.next(rows * config.head_dim * 4),
            append: parts.next(config.n_layers * rows * 8),
            scores: parts.next(scores),
            lse: parts.next(score_rows * 4),
            first_scores: parts.next(scores),
            first_lse: parts.next(score_rows * 4),
            attn_parts: parts.next(part_bytes(&attention)),
            candidates: parts.next(candidate_bytes(&selection)),
            argmax: parts.next(MAX_ROWS * slices * size_of::<specache_choice>()),
            fetches: parts.next(lists * size_of::<specache_fetch>()),
            bytes: parts.bytes(),
        }
    }
}

#[allow(unsafe_code)]
fn part_bytes(params: &specache_attn_params) -> usize {
    // SAFETY: reads the struct.
    unsafe { specache_attn_part_bytes(params) as usize }
}

#[allow(unsafe_code)]
fn candidate_bytes(params: &specache_select_params) -> usize {
    // SAFETY: reads the struct.
    unsafe { specache_select_scratch_bytes(params) as usize }
}

impl Told {
    fn new(config: &Config, sizes: &Sizes) -> Told {
        let mut parts = Parts::default();
        Told {
            tokens: parts.next(sizes.rows * 4),
            seqs: parts.next(sizes.seqs * size_of::<specache_seq>()),
            caches: parts.next(sizes.seqs * config.n_layers * size_of::<specache_layer_cache>()),
            bytes: parts.bytes(),
        }
    }
}

impl Results {
    fn new(config: &Config, sizes: &Sizes) -> Results {
        let mut parts = Parts::default();
        let lists = config.n_layers * sizes.seqs * config.n_kv_heads;
        Results {
            logits: parts.next(sizes.rows * config.vocab_size * 4),
            choices: parts.next(sizes.rows * size_of::<specache_choice>()),
            bad_layer: parts.next(sizes.rows * 4),
            fetch_counts: parts.next(lists * 4),
            select_counts: parts.next(lists * 4),
            hits: parts.next(lists * 4),
            selected: parts.next(lists * sizes.top_k * 4),
            bytes: parts.bytes(),
        }
    }
}

/// Writes a struct of the kernels into bytes.
fn put<T: Pod>(to: &mut [u8], at: usize, value: &T) {
    to[at..at + size_of::<T>()].copy_from_slice(bytes_of(value));
}
