//! [`Simd`] with AVX2, FMA and F16C: two registers of eight lanes.
#![allow(unsafe_op_in_unsafe_fn)] // The trait's methods are unsafe for their features and pointers; see its contract.

use std::arch::x86_64::*;

use super::Simd;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

type V = [__m256; 2];

#[inline(always)]
unsafe fn load_u16(p: *const u8) -> __m128i {
    _mm_loadu_si128(p.cast())
}

/// Rounds eight f32 to bf16 in the low halves of eight u32.
#[inline(always)]
unsafe fn round_bf16(v: __m256) -> __m256i {
    let bits = _mm256_castps_si256(v);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    // Rounding could carry a NaN into infinity: quieten it instead.
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
}

/// Folds eight lanes: i + 4, i + 2, i + 1.
#[inline(always)]
unsafe fn sum8(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

#[inline(always)]
unsafe fn max8(v: __m256) -> f32 {
    let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
}

/// 2^n as the bits of an f32, n in [-126, 127].
#[inline(always)]
unsafe fn pow2(n: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
}

#[inline(always)]
unsafe fn scale2_half(p: __m256, n: __m256) -> __m256 {
    // In two halves, as 2^128 is no f32.
    let n = _mm256_cvtps_epi32(n);
    let half = _mm256_srai_epi32::<1>(n);
    _mm256_mul_ps(_mm256_mul_ps(p, pow2(half)), pow2(_mm256_sub_epi32(n, half)))
}

/// Bits `FROM .. FROM+8` of `word` (broadcast) as 0.0 or 1.0.
#[inline(always)]
unsafe fn codes1<const FROM: i32>(word: __m256i) -> __m256 {
    let bit = _mm256_setr_epi32(
        1 << FROM,
        2 << FROM,
        4 << FROM,
        8 << FROM,
        16 << FROM,
        32 << FROM,
        64 << FROM,
        (128u32 << FROM) as i32,
    );
    let set = _mm256_cmpeq_epi32(_mm256_and_si256(word, bit), bit);
    _mm256_and_ps(_mm256_castsi256_ps(set), _mm256_set1_ps(1.0))
}

/// Eight 2-bit codes; the lookup takes three bits of its index, and the table's period makes the third one harmless.
#[inline(always)]
unsafe fn codes2(index: __m256i) -> __m256 {
    _mm256_permutevar8x32_ps(_mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0), index)
}

#[inline(always)]
unsafe fn codes4(index: __m256i) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_and_si256(index, _mm256_set1_epi32(15)))
}

impl Simd for Avx2 {
    type V = V;
    type M = V;
    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> V {
        [_mm256_setzero_ps(); 2]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [_mm256_set1_ps(x); 2]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        _mm256_storeu_ps(p, v[0]);
        _mm256_storeu_ps(p.add(8), v[1]);
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> V {
        let lo = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_u16(p)));
        let hi = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_u16(p.add(16))));
        [_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)]
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> V {
        [_mm256_cvtph_ps(load_u16(p)), _mm256_cvtph_ps(load_u16(p.add(16)))]
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u8, v: V) {
        // The pack interleaves the halves of its operands: [lo0 hi0 lo1 hi1] -> 0, 2, 1, 3.
        let packed = _mm256_packus_epi32(round_bf16(v[0]), round_bf16(v[1]));
        _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u8, v: V) {
        _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]));
        _mm_storeu_si128(p.add(16).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]));
    }

    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }

    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        sum8(_mm256_add_ps(v[0], v[1]))
    }
    #[inline(always)]
    unsafe fn reduce_max(v: V) -> f32 {
        max8(_mm256_max_ps(v[0], v[1]))
    }

    #[inline(always)]
    unsafe fn lt(a: V, b: V) -> V {
        [_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn select(m: V, a: V, b: V) -> V {
        [_mm256_blendv_ps(b[0], a[0], m[0]), _mm256_blendv_ps(b[1], a[1], m[1])]
    }

    #[inline(always)]
    unsafe fn round(x: V) -> V {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        [_mm256_round_ps::<NEAREST>(x[0]), _mm256_round_ps::<NEAREST>(x[1])]
    }
    #[inline(always)]
    unsafe fn scale2(p: V, n: V) -> V {
        [scale2_half(p[0], n[0]), scale2_half(p[1], n[1])]
    }

    #[inline(always)]
    unsafe fn codes<const BITS: usize>(p: *const u8) -> (V, V) {
        match BITS {
            1 => {
                let w = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
                ([codes1::<0>(w), codes1::<8>(w)], [codes1::<16>(w), codes1::<24>(w)])
            }
            2 => {
                let u = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
                let lo = [codes2(u), codes2(_mm256_srli_epi32::<2>(u))];
                (lo, [codes2(_mm256_srli_epi32::<4>(u)), codes2(_mm256_srli_epi32::<6>(u))])
            }
            4 => {
                let u = _mm256_cvtepu16_epi32(load_u16(p));
                let lo = [codes4(u), codes4(_mm256_srli_epi32::<4>(u))];
                (lo, [codes4(_mm256_srli_epi32::<8>(u)), codes4(_mm256_srli_epi32::<12>(u))])
            }
            _ => panic!("codes of {BITS} bits: 1, 2 and 4 are supported"),
        }
    }
}
