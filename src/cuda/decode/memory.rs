//! The memory of a decode pass, and the parameters of kernels that work in it.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, bytes_of, cast_slice};

use super::layout::{GpuTarget, Results, Scratch, Sizes, Told, attention_shape, mailbox_size};
use super::{Group, Place};
use crate::cuda::host_gather::HostGather;
use crate::cuda::rows::Rows;
use crate::device::cuda::PinnedMemory;
use crate::device::cuda::bindings::abi::{
    specache_attn_params, specache_fetch, specache_layer_cache, specache_select_params, specache_seq,
};
use crate::device::cuda::mailbox::Mailbox;
use crate::device::order::StreamId;
use crate::device::{Buffer, Device, Event};
use crate::error::Result;
use crate::kv::KvMode;
use crate::model::Config;

pub(super) struct Memory {
    pub(super) device: Device,
    pub(super) config: Config,
    pub(super) sizes: Sizes,
    pub(super) scratch: Buffer,
    pub(super) scratch_at: Scratch,
    /// Twice: for this pass, and for the one before, whose last gathers may still read it.
    pub(super) told: Buffer,
    pub(super) told_host: PinnedMemory,
    pub(super) told_at: Told,
    /// Which of the two is this pass's.
    pub(super) turn: usize,
    /// When gathers have read the two.
    pub(super) told_read: [Option<Event>; 2],
    /// `[layer]`: when the last gather is done.
    pub(super) gathered: Vec<Option<Event>>,
    /// When the last selections are done, which read what all layers' attention writes.
    pub(super) selected: Option<Event>,
    pub(super) results: Buffer,
    pub(super) results_host: PinnedMemory,
    pub(super) results_at: Results,
    /// What the host's threads are told, where they may gather.
    pub(super) post: Option<Post>,
}

/// The way to the host's threads.
pub(super) struct Post {
    pub(super) gather: Arc<HostGather>,
    pub(super) mailbox: Arc<Mailbox>,
    /// Letters of this pass so far: they take the staging blocks by turns.
    pub(super) sent: usize,
    /// A pass was given up: nobody knows which letters are still on their way.
    pub(super) given_up: bool,
}

impl Drop for Post {
    fn drop(&mut self) {
        self.gather.forget(&self.mailbox);
    }
}

impl Drop for Memory {
    /// Sessions wait for their own pairs, and may outlive what the gathers read here.
    fn drop(&mut self) {
        self.device.enter();
        self.device.finish(self.device.record(StreamId::CopyIn)); // also what a pass that was given up has left there
        self.gathered.iter().chain([&self.selected]).flatten().for_each(|&event| self.device.finish(event));
        self.device.finish_compute(); // a pass may have been given up
    }
}

impl Memory {
    pub(super) fn new(
        device: &Device,
        config: &Config,
        sizes: Sizes,
        gather: Option<&Arc<HostGather>>,
    ) -> Result<Memory> {
        let gpu = device.gpu().expect("a GPU's workspace");
        let scratch_at = Scratch::new(GpuTarget::here(device), config, &sizes);
        let (told_at, results_at) = (Told::new(config, &sizes), Results::new(config, &sizes));
        let total = scratch_at.bytes + 2 * told_at.bytes + results_at.bytes;
        let mut grants = device.grant(total as u64, 0, "the workspace of decode steps")?;
        let post = |gather: &Arc<HostGather>| -> Result<Post> {
            let mailbox = Arc::new(Mailbox::new(gpu.driver(), mailbox_size(config, &sizes))?);
            Ok(Post { gather: gather.clone(), mailbox, sent: 0, given_up: false })
        };
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
            selected: None,
            results: grants.device(results_at.bytes, "the results of decode steps")?,
            results_host: PinnedMemory::new(gpu.driver(), results_at.bytes)?,
            results_at,
            post: gather.filter(|_| sizes.top_k > 0).map(post).transpose()?,
        })
    }

    /// Writes what the GPU must know of a group.
    pub(super) fn tell(
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
    pub(super) fn told(&self) -> u64 {
        self.told.address() + (self.turn * self.told_at.bytes) as u64
    }

    /// Places of a group's sequences.
    pub(super) fn seqs(&self, group: &Group) -> u64 {
        self.told() + (self.told_at.seqs + group.seqs.start * size_of::<specache_seq>()) as u64
    }

    /// Caches of a group's sequences in layer `l`.
    pub(super) fn caches(&self, n_layers: usize, group: &Group, l: usize) -> u64 {
        let entry = group.seqs.start * n_layers + l * group.n_seqs();
        self.told() + (self.told_at.caches + entry * size_of::<specache_layer_cache>()) as u64
    }

    /// Some of the pass's rows in layer `l`.
    pub(super) fn rows(&self, config: &Config, l: usize, rows: &Range<usize>) -> Rows {
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

    pub(super) fn result(&self, part: usize, at: usize) -> u64 {
        self.results.address() + (part + at) as u64
    }

    /// A part of what the GPU told, as numbers.
    pub(super) fn told_back<T: Pod>(&self, part: impl FnOnce(&Results) -> usize) -> &[T] {
        let bytes = &self.results_host.bytes()[part(&self.results_at)..];
        cast_slice(&bytes[..bytes.len() / size_of::<T>() * size_of::<T>()])
    }

    pub(super) fn attention(&self, config: &Config, group: &Group, l: usize, replace: bool) -> specache_attn_params {
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
            ..attention_shape(GpuTarget::here(&self.device), config, &group.shape, group.n_seqs(), self.sizes.capacity)
        }
    }

    pub(super) fn selection(&self, config: &Config, group: &Group, l: usize) -> specache_select_params {
        let attention = self.attention(config, group, l, true);
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
    pub(super) fn first_list(&self, config: &Config, l: usize, seq: usize) -> usize {
        (l * self.sizes.seqs + seq) * config.n_kv_heads * self.sizes.top_k
    }

    /// A group's fetches of a layer, and their counts: a layer's own, because its gather reads them while the next one
    /// selects.
    pub(super) fn fetches(&self, config: &Config, group: &Group, l: usize) -> (u64, u64) {
        let list = self.first_list(config, l, group.seqs.start) * size_of::<specache_fetch>();
        let counts = (l * self.sizes.seqs + group.seqs.start) * config.n_kv_heads * 4;
        let fetches = self.scratch.address() + (self.scratch_at.fetches + list) as u64;
        (fetches, self.result(self.results_at.fetch_counts, counts))
    }
}

/// Sets the bits of the tokens of a history, and clears all others. Tokens beyond the vocabulary have none.
pub(super) fn mark_seen(bits: &mut [u8], history: &[u32], vocab: usize) {
    bits.fill(0);
    for &token in history.iter().filter(|&&token| (token as usize) < vocab) {
        bits[token as usize / 8] |= 1 << (token % 8);
    }
}

/// Writes a struct of the kernels into bytes.
pub(super) fn put<T: Pod>(to: &mut [u8], at: usize, value: &T) {
    to[at..at + size_of::<T>()].copy_from_slice(bytes_of(value));
}
