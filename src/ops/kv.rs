//! New pairs on their way into the cache.

use half::slice::HalfFloatSliceExt;

use crate::device::Buffer;
use crate::kv::layout::KvShape;
use crate::model::Dtype;

/// Rounds K (after RoPE) and V of one token to the cache's number type and writes them as `token` of a wide page.
///
/// `k`, `v`: `[n_kv_heads, head_dim]`.
pub fn write_pairs(shape: &KvShape, page: &mut Buffer, token: usize, k: &[f32], v: &[f32]) {
    assert_eq!((k.len(), v.len()), (shape.n_kv_heads * shape.head_dim, k.len()), "write_pairs: k and v");
    let heads = k.chunks_exact(shape.head_dim).zip(v.chunks_exact(shape.head_dim));
    for (head, (k, v)) in heads.enumerate() {
        let pair = &mut page.bytes_mut()[shape.pair(head, token)];
        let (to_k, to_v) = pair.split_at_mut(pair.len() / 2);
        round_into(shape.dtype, k, to_k);
        round_into(shape.dtype, v, to_v);
    }
}

/// Rounds to nearest, ties to even. What fp16 cannot hold becomes NaN, which fails the request with the layer's name: a
/// score of minus infinity would hide the token without a word.
fn round_into(dtype: Dtype, from: &[f32], to: &mut [u8]) {
    match dtype {
        Dtype::Bf16 => bytemuck::cast_slice_mut::<_, half::bf16>(to).convert_from_f32_slice(from),
        Dtype::F16 => {
            let to = bytemuck::cast_slice_mut::<_, half::f16>(to);
            to.convert_from_f32_slice(from);
            to.iter_mut().filter(|x| x.is_infinite()).for_each(|x| *x = half::f16::NAN);
        }
        Dtype::F32 => bytemuck::cast_slice_mut::<_, f32>(to).copy_from_slice(from),
    }
}
