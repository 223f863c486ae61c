//! Causal attention of a chunk of prompt rows.

use crate::cpu;
use crate::device::Device;
use crate::device::order::Resource;
use crate::kv::options::PAGE;
use crate::kv::view::PrefillView;

/// Softmax attention of `rows` rows at `position ..`, each seeing everything up to itself, scaled by `1 / sqrt(D)`.
///
/// `q`, `out`: `[rows, n_heads, head_dim]`.
pub fn attend(
    device: &Device,
    n_heads: usize,
    view: &PrefillView,
    position: usize,
    rows: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let width = n_heads * view.shape.head_dim;
    assert_eq!((q.len(), out.len()), (rows * width, rows * width), "attend: q and out");
    assert!((view.first_page + view.pages.len()) * PAGE >= position + rows, "attend: pages");
    assert!(view.packed.len() >= view.first_page * view.shape.packed_page_bytes(), "attend: packed pages");
    let _attend = device.operation("attend", |uses| {
        uses.reads.extend((0..view.first_page).map(|page| Resource::PackedPage(view.packed.id(), page)));
        uses.reads.extend(view.pages.iter().map(|page| Resource::DevicePage(page.id())));
    });
    cpu::attn_prefill::attend(device.isa(), n_heads, view, position, rows, q, out);
}
