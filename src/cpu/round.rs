//! f32 to the number types of the cache, to nearest, ties to even.

use super::simd::{Isa, LANES, Simd, dispatch};
use crate::model::Dtype;

/// Rounds `from` into the bytes of `to`, one number each. What fp16 cannot hold becomes NaN, which fails the request with
/// the layer's name: a score of minus infinity would hide its token without a word.
pub(crate) fn round_into(isa: Isa, dtype: Dtype, from: &[f32], to: &mut [u8]) {
    assert_eq!(from.len() * dtype.bytes(), to.len(), "round: length");
    match dtype {
        Dtype::F32 => to.copy_from_slice(bytemuck::cast_slice(from)),
        // SAFETY: `dispatch!` switches on the features of S; the lengths fit.
        Dtype::Bf16 => dispatch!(isa, S => unsafe { round_halves::<S>(from, to, |p, v| S::store_bf16(p, v)) }),
        Dtype::F16 => {
            // SAFETY: as above.
            dispatch!(isa, S => unsafe { round_halves::<S>(from, to, |p, v| S::store_f16(p, v)) });
            let infinite = |x: &&mut [u8]| x[0] == 0 && x[1] & 0x7F == 0x7C;
            to.chunks_exact_mut(2).filter(infinite).for_each(|x| x.copy_from_slice(&half::f16::NAN.to_le_bytes()));
        }
    }
}

/// # Safety
/// The features of `S`; `to` holds two bytes for each number; `store` writes 16 of them.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // Lane operations, as in `simd`.
unsafe fn round_halves<S: Simd>(from: &[f32], to: &mut [u8], store: impl Fn(*mut u8, S::V)) {
    let mut lanes = from.chunks_exact(LANES);
    let mut to = to.chunks_mut(2 * LANES);
    for (from, to) in (&mut lanes).zip(&mut to) {
        store(to.as_mut_ptr(), S::load(from.as_ptr()));
    }
    if let Some(to) = to.next() {
        let rest = lanes.remainder();
        let mut bytes = [0u8; 2 * LANES];
        store(bytes.as_mut_ptr(), S::load_n(rest.as_ptr(), rest.len()));
        to.copy_from_slice(&bytes[..to.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::round_kv;

    #[test]
    fn what_fp16_cannot_hold_is_nan() {
        for isa in Isa::available() {
            let mut bytes = [0u8; 6];
            round_into(isa, Dtype::F16, &[65504.0, 65520.0, f32::NEG_INFINITY], &mut bytes);
            let mut numbers = [0f32; 3];
            crate::model::weights::widen(Dtype::F16, &bytes, &mut numbers);
            assert!(numbers[0] == 65504.0 && numbers[1].is_nan() && numbers[2].is_nan(), "{isa}: {numbers:?}");
        }
    }

    #[test]
    fn rounds_as_the_plain_form_whatever_the_length() {
        let numbers: Vec<f32> =
            (0..67).map(|i| (i as f32 - 33.0).powi(3) * 1.000_37 + 1e-3 / (i as f32 + 1.0)).collect();
        for isa in Isa::available() {
            for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
                for n in [0, 1, 15, 16, 17, 32, 33, 67] {
                    let mut bytes = vec![0xFF; n * dtype.bytes()];
                    round_into(isa, dtype, &numbers[..n], &mut bytes);
                    let mut widened = vec![f32::NAN; n];
                    crate::model::weights::widen(dtype, &bytes, &mut widened);
                    let plain: Vec<f32> = numbers[..n].iter().map(|&x| round_kv(x, dtype)).collect();
                    assert_eq!(widened, plain, "{isa} {dtype:?} {n}");
                }
            }
        }
    }
}
