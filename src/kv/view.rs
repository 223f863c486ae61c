//! What attention reads of a cache: borrowed, and known to nobody but the cache and the kernels.

use super::host::WidePage;
use super::layout::KvShape;
use super::options::PAGE;
use crate::device::Buffer;

/// What attention reads of one layer of one sequence: `[0, split)` from `far`, `[split, ..)` from `tail`.
pub struct KvView<'a> {
    /// Shape of the pages.
    pub shape: KvShape,
    /// First position that the tail holds, `nq`; a multiple of 64.
    pub split: usize,
    /// Positions before `split`.
    pub far: Far<'a>,
    /// Wide pages from `split` on.
    pub tail: &'a [WidePage],
    /// Positions before `split` whose 16-bit pairs are read in place of the low-bit ones.
    pub replaced: Option<Replaced<'a>>,
    /// Position i sees j > i - w.
    pub window: Option<usize>,
}

/// Positions before the split.
#[derive(Clone, Copy)]
pub enum Far<'a> {
    /// There are none.
    None,
    /// Packed pages one after the other.
    Packed(&'a Buffer),
    /// Wide pages.
    Wide(&'a [WidePage]),
}

/// Prefetched pairs, as [`crate::kv::prefetch::Slots`] holds them.
#[derive(Clone, Copy)]
pub struct Replaced<'a> {
    /// Valid pairs per KV head.
    pub count: usize,
    /// Pairs per KV head that there is room for.
    pub stride: usize,
    /// `[n_kv_heads, stride]` u32, ascending within `count`.
    pub positions: &'a Buffer,
    /// `[n_kv_heads, stride]` u32: where among the pairs of its KV head the pair of each position is.
    pub slot_of: &'a Buffer,
    /// `[n_kv_heads, stride]` pairs, K | V.
    pub pairs: &'a Buffer,
}

/// The rows of one sequence: row r stands at `position + r` and sees everything up to itself.
#[derive(Clone, Copy, Debug)]
pub struct SeqRows {
    /// Position of the first row.
    pub position: usize,
    /// Index of the first row in q and out.
    pub first_row: usize,
    /// 1 or 2.
    pub n_rows: usize,
    /// Tokens that the sequence has room for: scratch memory is made for as many, so that no step has to make more.
    pub room: usize,
}

impl SeqRows {
    /// Position of row `row` of the pass, if it is one of these.
    pub fn position_of(&self, row: usize) -> Option<usize> {
        (self.first_row..self.first_row + self.n_rows).contains(&row).then(|| self.position + row - self.first_row)
    }

    /// Tokens for which scratch memory is made, in whole pages.
    pub(crate) fn padded_room(&self) -> usize {
        self.room.max(self.position + self.n_rows).next_multiple_of(PAGE)
    }

    /// Tokens that any row sees or hides, in whole pages.
    pub fn padded_tokens(&self) -> usize {
        (self.position + self.n_rows).next_multiple_of(PAGE)
    }
}

/// What a chunk of prompt rows reads of one layer of one sequence.
pub struct PrefillView<'a> {
    /// Shape of the pages.
    pub shape: KvShape,
    /// Packed pages before the wide ones; empty unless a `kivi` cache is continued.
    pub packed: &'a Buffer,
    /// Wide pages from page `first_page` on, the chunk's own pairs included.
    pub pages: &'a [WidePage],
    /// Pages that are read packed.
    pub first_page: usize,
    /// Position i sees j > i - w.
    pub window: Option<usize>,
}
