//! [`Simd`] with AVX-512: one register of sixteen lanes.
#![allow(unsafe_op_in_unsafe_fn)] // The trait's methods are unsafe for their features and pointers; see its contract.

use std::arch::x86_64::*;

use super::Simd;

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// `lo` in lanes 0..8 and `hi` in lanes 8..16: shift counts.
#[inline(always)]
unsafe fn shifts(lo: i32, hi: i32) -> __m512i {
    _mm512_setr_epi32(lo, lo, lo, lo, lo, lo, lo, lo, hi, hi, hi, hi, hi, hi, hi, hi)
}

/// Sixteen numbers by the low four bits of the index.
#[inline(always)]
unsafe fn lookup(table: __m512, index: __m512i) -> __m512 {
    _mm512_permutexvar_ps(index, table)
}

impl Simd for Avx512 {
    type V = __m512;
    type M = __mmask16;
    const REGISTERS: usize = 32;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        _mm512_setzero_ps()
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        _mm512_storeu_ps(p, v);
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> __m512 {
        let h = _mm256_loadu_si256(p.cast());
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(h)))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u8, v: __m512) {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        // Rounding could carry a NaN into infinity: quieten it instead.
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let safe = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000));
        _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(safe)));
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u8, v: __m512) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(v));
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }
    #[inline(always)]
    unsafe fn reduce_max(v: __m512) -> f32 {
        let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
    }

    #[inline(always)]
    unsafe fn lt(a: __m512, b: __m512) -> __mmask16 {
        _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b)
    }
    #[inline(always)]
    unsafe fn select(m: __mmask16, a: __m512, b: __m512) -> __m512 {
        _mm512_mask_blend_ps(m, b, a)
    }

    #[inline(always)]
    unsafe fn round(x: __m512) -> __m512 {
        _mm512_roundscale_ps::<NEAREST>(x)
    }
    #[inline(always)]
    unsafe fn scale2(p: __m512, n: __m512) -> __m512 {
        _mm512_scalef_ps(p, n)
    }

    #[inline(always)]
    unsafe fn codes<const BITS: usize>(p: *const u8) -> (__m512, __m512) {
        match BITS {
            1 => {
                let bits = p.cast::<u32>().read_unaligned();
                let one = _mm512_set1_ps(1.0);
                (_mm512_maskz_mov_ps(bits as u16, one), _mm512_maskz_mov_ps((bits >> 16) as u16, one))
            }
            2 => {
                // The lookup takes four bits of its index; with a table of period 4 the upper two do no harm.
                let units = _mm512_cvtepu8_epi32(_mm_set1_epi64x(p.cast::<i64>().read_unaligned()));
                let table = _mm512_setr4_ps(0.0, 1.0, 2.0, 3.0);
                let lo = lookup(table, _mm512_srlv_epi32(units, shifts(0, 2)));
                (lo, lookup(table, _mm512_srlv_epi32(units, shifts(4, 6))))
            }
            4 => {
                let units = _mm512_cvtepu16_epi32(_mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())));
                let table = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
                let lo = lookup(table, _mm512_srlv_epi32(units, shifts(0, 4)));
                (lo, lookup(table, _mm512_srlv_epi32(units, shifts(8, 12))))
            }
            _ => panic!("codes of {BITS} bits: 1, 2 and 4 are supported"),
        }
    }

    #[inline(always)]
    unsafe fn load_n(p: *const f32, n: usize) -> __m512 {
        _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, p)
    }
    #[inline(always)]
    unsafe fn store_n(p: *mut f32, v: __m512, n: usize) {
        _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as u16, v);
    }
}
