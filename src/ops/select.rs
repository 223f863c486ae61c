//! Which pairs the next step needs: top-k of the mean attention over a KV head's query heads (method.md, decode 3).

use std::ops::Range;

use crate::cpu;
use crate::device::Device;
use crate::device::order::{Resource, StreamId, Uses};
use crate::kv::KvMode;
use crate::kv::prefetch::Slots;
use crate::model::Config;
use crate::ops::linear::Rows;

/// One sequence's part of a selection.
pub struct Selection<'a> {
    /// Index of the sequence in the attention before.
    pub seq: usize,
    /// Row of the sequence whose attention decides.
    pub row: usize,
    /// Positions that may be selected.
    pub candidates: Range<usize>,
    /// Where the selected positions go.
    pub slots: &'a mut Slots,
}

/// Selects `min(k, candidates)` positions per KV head, ties to the lower position, ascending.
pub fn select(
    device: &Device,
    group_heads: usize,
    n_kv_heads: usize,
    scratch: &cpu::attn_decode::Scratch,
    selection: Selection,
) {
    let Selection { seq, row, candidates, slots } = selection;
    if device.gpu().is_some() {
        // For all sequences at once: `launch`.
        return slots.select_on_gpu(slots.top_k.min(candidates.len()));
    }
    let _select = device.operation("select", |uses| uses.writes.push(Resource::Selection(slots.positions.id())));
    slots.count = slots.top_k.min(candidates.len());
    let (top_k, count) = (slots.top_k, slots.count);
    if count == 0 {
        return;
    }
    let positions = &mut slots.positions.as_mut_slice::<u32>()[..n_kv_heads * top_k];
    assert_eq!(positions.len(), n_kv_heads * top_k, "select: room for the positions");
    let queries = row * group_heads..(row + 1) * group_heads;
    cpu::select::select(device.isa(), scratch, seq, queries, candidates, positions, top_k, count);
}

/// Where selections run. `specache` does not need its own before the next step, so a GPU makes them beside the rest of the
/// layer; `fetch` waits for them, and goes on where it is.
pub(crate) fn stream(device: &Device, mode: KvMode) -> StreamId {
    match (device.gpu(), mode) {
        (Some(_), KvMode::SpeCache) => StreamId::Gather,
        _ => StreamId::Compute,
    }
}

/// On a GPU: begins the selections of all sequences of one mode, which [`select`] has prepared. `uses`: what they write.
pub(crate) fn launch(
    device: &Device,
    config: &Config,
    l: usize,
    rows: &mut Rows,
    mode: KvMode,
    uses: impl FnOnce(&mut Uses),
) {
    if device.gpu().is_none() {
        return;
    }
    let stream = stream(device, mode);
    if stream != StreamId::Compute {
        device.after(stream, device.record(StreamId::Compute), "attention has scored before its selection");
    }
    rows.gpu.order_selections(device, l, stream);
    {
        let _select = device.operation_on(stream, "select", 0, uses);
        rows.gpu.select(device, config, l, mode, stream);
    }
    rows.gpu.selections_end_at(device.record(stream));
}

/// How many of a row's own top-k among `candidates` are in `slots`, and how many there are, over all KV heads: the live
/// hit rate (method.md, "Quantities to report").
pub fn hits(
    device: &Device,
    group_heads: usize,
    n_kv_heads: usize,
    scratch: &cpu::attn_decode::Scratch,
    seq: usize,
    candidates: Range<usize>,
    slots: &Slots,
) -> (u64, u64) {
    let count = slots.top_k.min(candidates.len());
    if count == 0 || device.gpu().is_some() {
        return (0, 0); // a GPU tells at the end of the pass
    }
    let _hits = device.operation("hit rate", |uses| uses.reads.push(Resource::Selection(slots.positions.id())));
    let selected = |head: usize| slots.selected(head);
    let hits = cpu::select::hits(scratch, seq, 0..group_heads, candidates, count, n_kv_heads, selected);
    (hits, (n_kv_heads * count) as u64)
}
