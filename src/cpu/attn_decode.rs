//! Decode attention on the CPU: flash decoding over chunks of pages, reading low-bit pages packed.
//!
//! A task is one chunk of 16 pages of one KV head of one sequence, for all its query rows (rows x G) at once: each K and
//! V is unpacked or widened once and used by all of them. Chunks are cut by position alone, and their results are
//! combined in order, so a sequence's result depends neither on the batch that it is in nor on the thread count.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::attn_chunk::{CHUNK_PAGES, Outputs, Task, attend_chunk};
use super::attn_kernels::{MAX_QUERIES, Temp};
use super::disjoint::Disjoint;
use super::simd::Isa;
use crate::kv::options::PAGE;
use crate::kv::view::{KvView, SeqRows};

const CHUNK_TOKENS: usize = CHUNK_PAGES * PAGE;

/// Tokens of chunk `chunk` of a sequence of `tokens`.
fn chunk_len(tokens: usize, chunk: usize) -> usize {
    (tokens - chunk * CHUNK_TOKENS).min(CHUNK_TOKENS)
}

/// What a step's attention leaves behind for the selection, layer after layer in the same memory.
#[derive(Default)]
pub struct Scratch {
    /// Per sequence and KV head, chunk after chunk `[queries][tokens of the chunk]`: `e^(s - max of the chunk)`.
    probs: Vec<f32>,
    /// Per sequence `[n_kv_heads][chunks][queries][D]`: unnormalised output of a chunk.
    partial: Vec<f32>,
    /// Per sequence `[n_kv_heads][chunks][queries]`: a chunk's maximum; after the combine, the factor that turns its
    /// `probs` into probabilities.
    weight: Vec<f32>,
    /// As `weight`: a chunk's sum of `probs`.
    sum: Vec<f32>,
    parts: Vec<SeqPart>,
    tasks: Vec<(usize, usize, usize)>,
}

/// Where a sequence's part of the scratch begins.
#[derive(Clone, Copy)]
struct SeqPart {
    probs: usize,
    partial: usize,
    weight: usize,
    queries: usize,
    tokens: usize,
    chunks: usize,
    /// Tokens that it may have in steps to come.
    room: usize,
}

impl SeqPart {
    fn probs(&self, head: usize, chunk: usize) -> Range<usize> {
        let start = self.probs + self.queries * (head * self.tokens + chunk * CHUNK_TOKENS);
        start..start + self.queries * chunk_len(self.tokens, chunk)
    }

    fn partial(&self, head: usize, chunk: usize, head_dim: usize) -> Range<usize> {
        let len = self.queries * head_dim;
        let start = self.partial + (head * self.chunks + chunk) * len;
        start..start + len
    }

    fn weight(&self, head: usize, chunk: usize) -> Range<usize> {
        let start = self.weight + (head * self.chunks + chunk) * self.queries;
        start..start + self.queries
    }
}

/// The probabilities of one KV head of one sequence, as the selection reads them.
pub(crate) struct HeadProbs<'a> {
    probs: &'a [f32],
    weight: &'a [f32],
    queries: usize,
    tokens: usize,
    /// Tokens that there may be in steps to come.
    pub(crate) room: usize,
}

impl HeadProbs<'_> {
    /// Adds the probabilities of the queries `queries` at `positions` to `out`.
    pub(crate) fn add_to(&self, queries: Range<usize>, positions: Range<usize>, out: &mut [f32]) {
        for query in queries {
            let mut at = positions.start;
            while at < positions.end {
                let chunk = at / CHUNK_TOKENS;
                let (first, len) = (chunk * CHUNK_TOKENS, chunk_len(self.tokens, chunk));
                let end = positions.end.min(first + len);
                let weight = self.weight[chunk * self.queries + query];
                let probs = &self.probs[self.queries * first + query * len..][at - first..end - first];
                for (o, p) in out[at - positions.start..end - positions.start].iter_mut().zip(probs) {
                    *o += weight * p;
                }
                at = end;
            }
        }
    }
}

impl Scratch {
    /// The probabilities that the last [`attend`] left for one KV head of sequence `seq`.
    pub(crate) fn head_probs(&self, seq: usize, head: usize) -> HeadProbs<'_> {
        let part = self.parts[seq];
        let weight = part.weight(head, 0).start..part.weight(head, part.chunks - 1).end;
        let probs = part.probs(head, 0).start..part.probs(head, part.chunks - 1).end;
        HeadProbs {
            probs: &self.probs[probs],
            weight: &self.weight[weight],
            queries: part.queries,
            tokens: part.tokens,
            room: part.room,
        }
    }

    /// Lays the scratch out for these sequences. Allocates only where sequences have more room than any before.
    fn lay_out(&mut self, seqs: &[SeqRows], group_heads: usize, n_kv_heads: usize, head_dim: usize) {
        let (mut probs, mut partial, mut weight) = (0, 0, 0);
        let (mut room, mut chunks_of_room, mut tasks_of_room) = (0, 0, 0);
        self.parts.clear();
        self.tasks.clear();
        for (i, s) in seqs.iter().enumerate() {
            let (queries, tokens) = (s.n_rows * group_heads, s.padded_tokens());
            let chunks = tokens.div_ceil(CHUNK_TOKENS);
            self.parts.push(SeqPart { probs, partial, weight, queries, tokens, chunks, room: s.padded_room() });
            probs += n_kv_heads * queries * tokens;
            partial += n_kv_heads * chunks * queries * head_dim;
            weight += n_kv_heads * chunks * queries;
            room += n_kv_heads * queries * s.padded_room();
            tasks_of_room += n_kv_heads * s.padded_room().div_ceil(CHUNK_TOKENS);
            chunks_of_room += n_kv_heads * queries * s.padded_room().div_ceil(CHUNK_TOKENS);
            self.tasks.extend((0..n_kv_heads).flat_map(|h| (0..chunks).map(move |c| (i, h, c))));
        }
        self.tasks.reserve(tasks_of_room.saturating_sub(self.tasks.len()));
        for (buffer, len) in [
            (&mut self.probs, room),
            (&mut self.partial, chunks_of_room * head_dim),
            (&mut self.weight, chunks_of_room),
            (&mut self.sum, chunks_of_room),
        ] {
            buffer.resize(len.max(buffer.len()), 0.0);
        }
    }
}

/// See [`crate::ops::attn_decode::attend`], which has checked the shapes.
pub(crate) fn attend<'a>(
    isa: Isa,
    n_heads: usize,
    seqs: &[SeqRows],
    view: impl Fn(usize) -> KvView<'a> + Sync,
    q: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    if seqs.is_empty() {
        return;
    }
    let shape = view(0).shape;
    let (n_kv_heads, head_dim) = (shape.n_kv_heads, shape.head_dim);
    let group_heads = n_heads / n_kv_heads;
    assert!(seqs.iter().all(|s| s.n_rows * group_heads <= MAX_QUERIES), "at most 16 query heads per KV head");
    scratch.lay_out(seqs, group_heads, n_kv_heads, head_dim);
    run_chunks(isa, n_heads, seqs, &view, q, scratch);

    let Scratch { partial, weight, sum, parts, .. } = scratch;
    for (seq, part) in parts.iter().enumerate() {
        for (head, query) in (0..n_kv_heads).flat_map(|h| (0..part.queries).map(move |q| (h, q))) {
            let row = seqs[seq].first_row + query / group_heads;
            let to = (row * n_heads + head * group_heads + query % group_heads) * head_dim;
            let at = |chunk| part.weight(head, chunk).start + query;
            let partial = |chunk| &partial[part.partial(head, chunk, head_dim)][query * head_dim..][..head_dim];
            combine(part.chunks, at, weight, sum, partial, &mut out[to..to + head_dim]);
        }
    }
}

/// All chunks of all heads of all sequences.
fn run_chunks<'a>(
    isa: Isa,
    n_heads: usize,
    seqs: &[SeqRows],
    view: &(impl Fn(usize) -> KvView<'a> + Sync),
    q: &[f32],
    scratch: &mut Scratch,
) {
    let Scratch { probs, partial, weight, sum, parts, tasks } = scratch;
    let (probs, partial) = (Disjoint::new(probs), Disjoint::new(partial));
    let (weight, sum) = (Disjoint::new(weight), Disjoint::new(sum));
    let shape = view(0).shape;
    let group_heads = n_heads / shape.n_kv_heads;
    let one = |&(seq, head, chunk): &(usize, usize, usize)| {
        let part = parts[seq];
        // SAFETY: (sequence, head, chunk) names the part of each array, and no two tasks share all three.
        let (partial, max, sum, probs) = unsafe {
            (
                partial.part(part.partial(head, chunk, shape.head_dim)),
                weight.part(part.weight(head, chunk)),
                sum.part(part.weight(head, chunk)),
                probs.part(part.probs(head, chunk)),
            )
        };
        let task = Task { view: &view(seq), rows: seqs[seq], group_heads, n_heads, head, chunk, q };
        TEMP.with_borrow_mut(|temp| attend_chunk(isa, &task, Outputs { probs, partial, max, sum }, temp));
    };
    // Below about this many multiply-adds a task costs less than waking a thread for it.
    let work: usize = parts.iter().map(|p| p.queries * p.tokens).sum::<usize>() * shape.n_kv_heads * shape.head_dim;
    if work < 1 << 18 { tasks.iter().for_each(one) } else { tasks.par_iter().for_each(one) }
}

/// Joins the chunks of one query in order: `out = sum of chunks weighted by e^(max - overall max) / overall sum`.
fn combine<'a>(
    chunks: usize,
    at: impl Fn(usize) -> usize,
    weight: &mut [f32],
    sum: &[f32],
    partial: impl Fn(usize) -> &'a [f32],
    out: &mut [f32],
) {
    let max = (0..chunks).map(|c| weight[at(c)]).fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for c in 0..chunks {
        weight[at(c)] = (weight[at(c)] - max).exp();
        total += weight[at(c)] * sum[at(c)];
    }
    out.fill(0.0);
    for c in 0..chunks {
        weight[at(c)] /= total;
        for (o, p) in out.iter_mut().zip(partial(c)) {
            *o += weight[at(c)] * p;
        }
    }
}

thread_local! {
    /// Scaled queries and a page's temporaries; a task never calls into rayon while it holds them.
    static TEMP: RefCell<Temp> = RefCell::default();
}
