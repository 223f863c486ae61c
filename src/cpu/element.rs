//! The number types that weights are stored in, as types, so that a kernel is compiled once for each.
#![allow(unsafe_code)] // Raw loads.
#![allow(unsafe_op_in_unsafe_fn)] // Lane operations; the contract is that of `Simd`.

use super::simd::{LANES, Simd};

/// A stored number type that widens to f32 without loss.
pub(crate) trait Element {
    /// Bytes of a number.
    const BYTES: usize;

    /// 16 numbers, unaligned.
    ///
    /// # Safety
    /// That of [`Simd`]; `16 * BYTES` bytes are readable.
    unsafe fn load<S: Simd>(p: *const u8) -> S::V;

    /// The first `n < 16` of 16 numbers, 0 in the other lanes.
    ///
    /// # Safety
    /// That of [`Simd`]; `n * BYTES` bytes are readable.
    #[inline(always)]
    unsafe fn load_n<S: Simd>(p: *const u8, n: usize) -> S::V {
        // All-zero bytes are 0.0 in each of the types.
        let mut bytes = [0u8; LANES * 4];
        std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), n * Self::BYTES);
        Self::load::<S>(bytes.as_ptr())
    }
}

pub(crate) struct Bf16;
pub(crate) struct F16;
pub(crate) struct F32;

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        S::load_bf16(p)
    }
}

impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        S::load_f16(p)
    }
}

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        S::load_f32(p)
    }
}

/// `n` numbers from `from`, widened to `to`.
///
/// # Safety
/// That of [`Simd`]; `n` numbers are readable and writable.
#[inline(always)]
pub(crate) unsafe fn widen<S: Simd, E: Element>(from: *const u8, to: *mut f32, n: usize) {
    let whole = n - n % LANES;
    let mut i = 0;
    while i < whole {
        S::store(to.add(i), E::load::<S>(from.add(i * E::BYTES)));
        i += LANES;
    }
    if i < n {
        S::store_n(to.add(i), E::load_n::<S>(from.add(i * E::BYTES), n - i), n - i);
    }
}

/// `with_element!(dtype, E => expression)`: the expression with `E` the [`Element`] of a `Dtype`.
macro_rules! with_element {
    ($dtype:expr, $E:ident => $call:expr) => {
        match $dtype {
            $crate::model::Dtype::Bf16 => {
                type $E = $crate::cpu::element::Bf16;
                $call
            }
            $crate::model::Dtype::F16 => {
                type $E = $crate::cpu::element::F16;
                $call
            }
            $crate::model::Dtype::F32 => {
                type $E = $crate::cpu::element::F32;
                $call
            }
        }
    };
}
pub(crate) use with_element;
