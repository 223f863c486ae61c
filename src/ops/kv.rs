//! New pairs on their way into the cache.

use crate::cpu::Isa;
use crate::cpu::round::round_into;
use crate::device::Device;
use crate::kv::layout::KvShape;

/// Rounds K (after RoPE) and V of one token to the cache's number type and writes them as `token` of a wide page in the
/// CPU's memory.
///
/// `k`, `v`: `[n_kv_heads, head_dim]`.
pub fn write_pairs(device: &Device, shape: &KvShape, page: &mut [u8], token: usize, k: &[f32], v: &[f32]) {
    round_pairs(device.isa(), shape, page, token, k, v);
}

/// As [`write_pairs`], into the bytes of a page.
pub(crate) fn round_pairs(isa: Isa, shape: &KvShape, page: &mut [u8], token: usize, k: &[f32], v: &[f32]) {
    assert_eq!((k.len(), v.len()), (shape.n_kv_heads * shape.head_dim, k.len()), "write_pairs: k and v");
    let heads = k.chunks_exact(shape.head_dim).zip(v.chunks_exact(shape.head_dim));
    for (head, (k, v)) in heads.enumerate() {
        let pair = &mut page[shape.pair(head, token)];
        let (to_k, to_v) = pair.split_at_mut(pair.len() / 2);
        round_into(isa, shape.dtype, k, to_k);
        round_into(isa, shape.dtype, v, to_v);
    }
}
