//! [`Simd`] in plain Rust: sixteen f32 in an array. Also the meaning of each operation, for the tests.
#![allow(unsafe_op_in_unsafe_fn)] // The trait's methods are unsafe for their pointers, which the callers vouch for.

use super::{LANES, Simd, codes};

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(
        #[inline(always)]
        |i| f(a[i], b[i]),
    )
}

/// Folds the upper half onto the lower one until one lane is left.
#[inline(always)]
fn fold(mut v: V, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            v[i] = f(v[i], v[i + half]);
        }
        half /= 2;
    }
    v[0]
}

impl Simd for Portable {
    type V = V;
    type M = [bool; LANES];
    const REGISTERS: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> V {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        p.cast::<V>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        p.cast::<V>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> V {
        let h = p.cast::<[u16; LANES]>().read_unaligned();
        h.map(
            #[inline(always)]
            |h| f32::from_bits(u32::from(h) << 16),
        )
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> V {
        let h = p.cast::<[u16; LANES]>().read_unaligned();
        h.map(widen_f16)
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u8, v: V) {
        let h = v.map(
            #[inline(always)]
            |x| half::bf16::from_f32(x).to_bits(),
        );
        p.cast::<[u16; LANES]>().write_unaligned(h);
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u8, v: V) {
        let h = v.map(
            #[inline(always)]
            |x| half::f16::from_f32(x).to_bits(),
        );
        p.cast::<[u16; LANES]>().write_unaligned(h);
    }

    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        map2(
            a,
            b,
            #[inline(always)]
            |a, b| a + b,
        )
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        map2(
            a,
            b,
            #[inline(always)]
            |a, b| a - b,
        )
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        map2(
            a,
            b,
            #[inline(always)]
            |a, b| a * b,
        )
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        map2(
            a,
            b,
            #[inline(always)]
            |a, b| a / b,
        )
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        map2(
            a,
            b,
            #[inline(always)]
            |a, b| if a > b { a } else { b },
        )
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        map2(
            a,
            b,
            #[inline(always)]
            |a, b| if a < b { a } else { b },
        )
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        // f32::mul_add would call libm for each lane.
        std::array::from_fn(
            #[inline(always)]
            |i| a[i] * b[i] + c[i],
        )
    }

    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        fold(
            v,
            #[inline(always)]
            |a, b| a + b,
        )
    }
    #[inline(always)]
    unsafe fn reduce_max(v: V) -> f32 {
        fold(
            v,
            #[inline(always)]
            |a, b| if a > b { a } else { b },
        )
    }

    #[inline(always)]
    unsafe fn lt(a: V, b: V) -> [bool; LANES] {
        std::array::from_fn(
            #[inline(always)]
            |i| a[i] < b[i],
        )
    }
    #[inline(always)]
    unsafe fn select(m: [bool; LANES], a: V, b: V) -> V {
        std::array::from_fn(
            #[inline(always)]
            |i| if m[i] { a[i] } else { b[i] },
        )
    }

    #[inline(always)]
    unsafe fn round(x: V) -> V {
        // Adding 1.5 * 2^23 leaves no bits for a fraction, so the addition itself rounds to nearest even.
        const MAGIC: f32 = 12_582_912.0;
        x.map(
            #[inline(always)]
            |x| (x + MAGIC) - MAGIC,
        )
    }
    #[inline(always)]
    unsafe fn scale2(p: V, n: V) -> V {
        // In two halves, as 2^128 is no f32. The cast saturates, so the exponents may wrap but never trap.
        map2(
            p,
            n,
            #[inline(always)]
            |p, n| {
                let n = n as i32;
                p * pow2(n >> 1) * pow2(n - (n >> 1))
            },
        )
    }

    #[inline(always)]
    unsafe fn codes<const BITS: usize>(p: *const u8) -> (V, V) {
        let bytes = std::slice::from_raw_parts(p, codes::block_bytes(BITS));
        let v = codes::unpack_codes(BITS, bytes);
        (std::array::from_fn(|i| f32::from(v[i])), std::array::from_fn(|i| f32::from(v[i + LANES])))
    }
}

/// 2^n for n in [-126, 127]; other exponents wrap.
#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// fp16 to f32 without a branch per class of number: shift the fraction into place and let a multiplication rebias the
/// exponent, which handles subnormals too; only infinity and NaN need a fix.
#[inline(always)]
fn widen_f16(h: u16) -> f32 {
    let sign = u32::from(h & 0x8000) << 16;
    let magnitude = u32::from(h & 0x7fff) << 13;
    let rebias = f32::from_bits((254 - 15) << 23); // 2^112
    let finite = (f32::from_bits(magnitude) * rebias).to_bits();
    let bits = if h & 0x7c00 == 0x7c00 { magnitude | 0x7f80_0000 } else { finite };
    f32::from_bits(bits | sign)
}
