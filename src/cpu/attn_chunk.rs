//! One chunk of pages of one KV head: walks the pages, each through the kernel that its format asks for.

use super::attn_kernels::{Temp, Wide, mix_packed, mix_wide, score_packed, score_wide, softmax};
use super::simd::Isa;
use crate::device::Buffer;
use crate::kv::options::PAGE;
use crate::kv::view::{Far, KvView, Replaced, SeqRows};

/// Pages of a chunk: 1,024 tokens are enough work to hide the cost of a task, and a context of 8k still makes eight
/// tasks of every KV head.
pub(crate) const CHUNK_PAGES: usize = 16;

/// One chunk of one KV head of one sequence.
pub(crate) struct Task<'a> {
    pub(crate) view: &'a KvView<'a>,
    pub(crate) rows: SeqRows,
    pub(crate) group_heads: usize,
    pub(crate) n_heads: usize,
    pub(crate) head: usize,
    pub(crate) chunk: usize,
    /// `[rows, n_heads, head_dim]`.
    pub(crate) q: &'a [f32],
}

/// What a chunk leaves behind.
pub(crate) struct Outputs<'a> {
    /// `[queries][tokens of the chunk]`.
    pub(crate) probs: &'a mut [f32],
    /// `[queries][D]`.
    pub(crate) partial: &'a mut [f32],
    /// `[queries]`.
    pub(crate) max: &'a mut [f32],
    /// `[queries]`.
    pub(crate) sum: &'a mut [f32],
}

/// One KV head of one page.
enum Page<'a> {
    Packed(&'a [u8]),
    Wide(&'a [u8]),
}

fn page<'a>(view: &KvView<'a>, head: usize, page: usize) -> Page<'a> {
    let shape = &view.shape;
    let wide_head = head * shape.wide_head_bytes()..(head + 1) * shape.wide_head_bytes();
    match (page.checked_sub(view.split / PAGE), view.far) {
        (Some(in_tail), _) => Page::Wide(&view.tail[in_tail].bytes()[wide_head]),
        (None, Far::Packed(pages)) => Page::Packed(&pages.bytes()[shape.packed_head(page, head)]),
        (None, Far::Wide(pages)) => Page::Wide(&pages[page].bytes()[wide_head]),
        (None, Far::None) => unreachable!("the split is 0 without far pages"),
    }
}

/// The replaced positions that lie in one page: where they stand there, and their pairs.
fn replaced_in<'a>(view: &KvView<'a>, head: usize, page: usize) -> impl Iterator<Item = (usize, &'a [u8])> {
    view.replaced.into_iter().flat_map(move |Replaced { count, stride, positions, slot_of, pairs }| {
        let of_head = |numbers: &'a Buffer| &numbers.as_slice::<u32>()[head * stride..][..count];
        let (positions, slot_of) = (of_head(positions), of_head(slot_of));
        let pair = view.shape.pair_bytes();
        let pairs = &pairs.bytes()[head * stride * pair..];
        let first = positions.partition_point(|&p| (p as usize) < page * PAGE);
        let here = positions[first..].iter().map(|&p| p as usize).take_while(move |&p| p < (page + 1) * PAGE);
        here.zip(&slot_of[first..]).map(move |(p, &slot)| (p % PAGE, &pairs[slot as usize * pair..][..pair]))
    })
}

/// Scores, softmax and values of one chunk. The instruction set is dispatched per page and not per chunk: a page is a
/// thousand times the dispatch, and the kernels are compiled once per set and number type, not once per combination.
///
/// The shapes are as [`crate::ops::attn_decode::attend`] checks them.
pub(crate) fn attend_chunk(isa: Isa, task: &Task, mut out: Outputs, temp: &mut Temp) {
    let Task { view, rows, group_heads, .. } = *task;
    temp.lay_out(rows.n_rows * group_heads, view.shape.head_dim);
    scale_queries(task, &mut temp.q);
    let walk = Walk::new(isa, task);
    walk.score(&mut out, temp);
    walk.normalise(&mut out);
    walk.mix(&mut out, temp);
}

/// The pages of a chunk that any row sees.
struct Walk<'a> {
    isa: Isa,
    task: &'a Task<'a>,
    /// First page of the chunk.
    first: usize,
    /// First page that the first row's window reaches. Pages wholly behind it lie behind the second row's too.
    begin: usize,
    /// One behind the last page.
    end: usize,
    /// Query rows, rows x G.
    queries: usize,
    /// Tokens of the chunk: the stride of `probs`.
    tokens: usize,
}

impl<'a> Walk<'a> {
    fn new(isa: Isa, task: &'a Task<'a>) -> Walk<'a> {
        let rows = task.rows;
        let first = task.chunk * CHUNK_PAGES;
        let end = (first + CHUNK_PAGES).min(rows.padded_tokens() / PAGE);
        let hidden = task.view.window.map_or(0, |w| (rows.position + 1).saturating_sub(w));
        let begin = first.max(hidden / PAGE).min(end);
        Walk { isa, task, first, begin, end, queries: rows.n_rows * task.group_heads, tokens: (end - first) * PAGE }
    }

    /// Pairs of a page that lie before `position`.
    fn before(&self, page: usize, position: usize) -> usize {
        position.saturating_sub(page * PAGE).min(PAGE)
    }

    fn wide<'b>(&self, bytes: &'b [u8], tokens: usize) -> Wide<'b> {
        let shape = &self.task.view.shape;
        Wide { bytes, tokens, d: shape.head_dim, dtype: shape.dtype }
    }

    /// Scores of all queries into `out.probs`.
    fn score(&self, out: &mut Outputs, temp: &mut Temp) {
        let Walk { isa, task: &Task { view, rows, head, .. }, queries, tokens, .. } = *self;
        for index in self.begin..self.end {
            let scores = &mut out.probs[(index - self.first) * PAGE..];
            match page(view, head, index) {
                Page::Packed(bytes) => {
                    score_packed(isa, &view.shape.packed, bytes, queries, temp, scores, tokens);
                    for (token, pair) in replaced_in(view, head, index) {
                        score_wide(isa, self.wide(pair, 1), queries, &temp.q, &mut scores[token..], tokens);
                    }
                }
                Page::Wide(bytes) => {
                    let valid = self.before(index, rows.position + rows.n_rows);
                    score_wide(isa, self.wide(bytes, valid), queries, &temp.q, scores, tokens);
                }
            }
        }
    }

    /// Scores to unnormalised probabilities: each row sees up to itself and back to its window.
    fn normalise(&self, out: &mut Outputs) {
        let Task { view, rows, group_heads, .. } = *self.task;
        for query in 0..self.queries {
            let scores = &mut out.probs[query * self.tokens..][(self.begin - self.first) * PAGE..self.tokens];
            let position = rows.position + query / group_heads;
            let hidden = view.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let local = |p: usize| p.saturating_sub(self.begin * PAGE).min(scores.len());
            let visible = local(hidden)..local(position + 1);
            (out.max[query], out.sum[query]) = softmax(self.isa, scores, visible);
        }
    }

    /// Values of all pages, weighted, into `out.partial`.
    fn mix(&self, out: &mut Outputs, temp: &mut Temp) {
        let Walk { isa, task: &Task { view, rows, group_heads, head, .. }, queries, tokens, .. } = *self;
        out.partial.fill(0.0);
        for index in self.begin..self.end {
            let probs = &out.probs[(index - self.first) * PAGE..];
            match page(view, head, index) {
                Page::Packed(bytes) => {
                    for query in 0..queries {
                        temp.p[query * PAGE..][..PAGE].copy_from_slice(&probs[query * tokens..][..PAGE]);
                    }
                    for (token, pair) in replaced_in(view, head, index) {
                        mix_wide(isa, self.wide(pair, 1), queries, &probs[token..], tokens, out.partial);
                        (0..queries).for_each(|query| temp.p[query * PAGE + token] = 0.0);
                    }
                    mix_packed(isa, &view.shape.packed, bytes, queries, temp, out.partial);
                }
                Page::Wide(bytes) => {
                    // Row 1's own pair apart: it may be NaN, and row 0's zero probability would not keep that out.
                    let both = self.before(index, rows.position + 1);
                    let all = self.before(index, rows.position + rows.n_rows);
                    mix_wide(isa, self.wide(bytes, both), queries, probs, tokens, out.partial);
                    if all > both {
                        let own = self.wide(&bytes[both * view.shape.pair_bytes()..], all - both);
                        let (probs, d) = (&probs[group_heads * tokens + both..], view.shape.head_dim);
                        mix_wide(isa, own, group_heads, probs, tokens, &mut out.partial[group_heads * d..]);
                    }
                }
            }
        }
    }
}

/// `q / sqrt(D)` of all query rows of a KV head: row r, head h of the group at `[r * G + h]`.
fn scale_queries(task: &Task, q: &mut [f32]) {
    let d = task.view.shape.head_dim;
    let scale = 1.0 / (d as f32).sqrt();
    for (query, to) in q.chunks_exact_mut(d).enumerate() {
        let row = task.rows.first_row + query / task.group_heads;
        let head = task.head * task.group_heads + query % task.group_heads;
        let from = &task.q[(row * task.n_heads + head) * d..][..d];
        to.iter_mut().zip(from).for_each(|(t, f)| *t = f * scale);
    }
}
