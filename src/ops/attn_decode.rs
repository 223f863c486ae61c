//! Attention of a decode step: one or two rows a sequence over the mixed cache.

use crate::cpu;
use crate::device::Device;
use crate::kv::host::WidePage;
use crate::kv::layout::KvShape;
use crate::kv::options::PAGE;

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
    Packed(&'a [u8]),
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
    /// `[n_kv_heads, stride]`, ascending within `count`.
    pub positions: &'a [u32],
    /// `[n_kv_heads, stride]` pairs, K | V.
    pub pairs: &'a [u8],
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
}

impl SeqRows {
    /// Position of row `row` of the pass, if it is one of these.
    pub fn position_of(&self, row: usize) -> Option<usize> {
        (self.first_row..self.first_row + self.n_rows).contains(&row).then(|| self.position + row - self.first_row)
    }

    /// Tokens that any row sees or hides, in whole pages.
    pub fn padded_tokens(&self) -> usize {
        (self.position + self.n_rows).next_multiple_of(PAGE)
    }
}

/// Softmax attention of all rows, scaled by `1 / sqrt(D)`.
///
/// `q`: `[rows, n_heads, head_dim]` after RoPE; `out`: same shape. `view(i)` is what sequence `i` reads; its cache must
/// hold the pairs of all its rows. `scratch` keeps the probabilities for [`super::select`].
pub fn attend<'a>(
    device: &Device,
    n_heads: usize,
    seqs: &[SeqRows],
    view: impl Fn(usize) -> KvView<'a> + Sync,
    q: &[f32],
    out: &mut [f32],
    scratch: &mut cpu::attn_decode::Scratch,
) {
    let rows: usize = seqs.iter().map(|s| s.n_rows).sum();
    assert_eq!(q.len(), out.len(), "attend: q and out");
    for (i, s) in seqs.iter().enumerate() {
        let v = view(i);
        let width = n_heads * v.shape.head_dim;
        assert_eq!(q.len(), rows * width, "attend: rows of q");
        assert!(n_heads.is_multiple_of(v.shape.n_kv_heads), "attend: heads");
        assert!(v.split.is_multiple_of(PAGE) && v.split <= s.position, "attend: split {} at {}", v.split, s.position);
        assert!(v.tail.len() >= (s.padded_tokens() - v.split) / PAGE, "attend: pages of the tail");
        let far_pages = match v.far {
            Far::None => 0,
            Far::Packed(bytes) => bytes.len() / v.shape.packed_page_bytes(),
            Far::Wide(pages) => pages.len(),
        };
        assert!(far_pages >= v.split / PAGE, "attend: {far_pages} far pages for a split at {}", v.split);
    }
    cpu::attn_decode::attend(device.isa(), n_heads, seqs, view, q, out, scratch);
}
