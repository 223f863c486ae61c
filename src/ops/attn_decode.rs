//! Attention of a decode step: one or two rows a sequence over the mixed cache.

use crate::cpu;
pub use crate::cpu::attn_decode::Scratch;
use crate::device::Device;
use crate::device::order::{Resource, Uses};
use crate::kv::options::{KvMode, PAGE};
use crate::kv::view::{Far, KvView, SeqRows};
use crate::model::Config;
use crate::ops::linear::Rows;

/// Softmax attention of all rows of a pass over layer `l`, from q of `rows` to its `attn`: on the device's own form. `view`
/// and `scratch` as in [`attend`].
///
/// `scoring`: the sequences of this mode attend to choose what they fetch, without what they fetched before. (A GPU leaves
/// the others out; on the CPU device they attend too, and again when the result counts.)
#[allow(clippy::too_many_arguments)] // Two call sites, which name them all.
pub fn attend_rows<'a>(
    device: &Device,
    config: &Config,
    l: usize,
    seqs: &[SeqRows],
    view: impl Fn(usize) -> KvView<'a> + Sync,
    rows: &mut Rows,
    scratch: &mut Scratch,
    scoring: Option<KvMode>,
) {
    if device.gpu().is_none() {
        return attend(device, config.n_heads, seqs, view, &rows.q, &mut rows.attn, scratch);
    }
    rows.gpu.order_attention(device);
    let _attend = device.operation("attend", |uses| (0..seqs.len()).for_each(|i| declare(&view(i), uses)));
    rows.gpu.attend(device, config, l, scoring);
}

/// Softmax attention of all rows, scaled by `1 / sqrt(D)`, on the CPU device.
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
    scratch: &mut Scratch,
) {
    let n_rows: usize = seqs.iter().map(|s| s.n_rows).sum();
    assert_eq!(q.len(), out.len(), "attend: q and out");
    for (i, s) in seqs.iter().enumerate() {
        let v = view(i);
        let width = n_heads * v.shape.head_dim;
        assert_eq!(q.len(), n_rows * width, "attend: rows of q");
        assert!(n_heads.is_multiple_of(v.shape.n_kv_heads), "attend: heads");
        assert!(v.split.is_multiple_of(PAGE) && v.split <= s.position, "attend: split {} at {}", v.split, s.position);
        assert!(v.tail.len() >= (s.padded_tokens() - v.split) / PAGE, "attend: pages of the tail");
        let far_pages = match v.far {
            Far::None => 0,
            Far::Packed(pages) => pages.len() / v.shape.packed_page_bytes(),
            Far::Wide(pages) => pages.len(),
        };
        assert!(far_pages >= v.split / PAGE, "attend: {far_pages} far pages for a split at {}", v.split);
    }
    let _attend = device.operation("attend", |uses| (0..seqs.len()).for_each(|i| declare(&view(i), uses)));
    cpu::attn_decode::attend(device.isa(), n_heads, seqs, view, q, out, scratch);
}

/// What attention reads of one sequence.
fn declare(view: &KvView, uses: &mut Uses) {
    match view.far {
        Far::None => {}
        Far::Packed(pages) => {
            uses.reads.extend((0..view.split / PAGE).map(|page| Resource::PackedPage(pages.id(), page)));
        }
        Far::Wide(pages) => {
            uses.reads.extend(pages[..view.split / PAGE].iter().map(|page| Resource::DevicePage(page.id())));
        }
    }
    uses.reads.extend(view.tail.iter().map(|page| Resource::DevicePage(page.id())));
    if let Some(replaced) = &view.replaced {
        uses.reads.push(Resource::Selection(replaced.positions.id()));
        uses.reads.push(Resource::Slots(replaced.pairs.id()));
    }
}
