//! Sixteen f32 lanes on three instruction sets, and the dispatch that picks one at run time.
//!
//! A kernel is an `#[inline(always)] unsafe fn` generic over `S: Simd`; [`dispatch!`] instantiates it once per set
//! inside a `#[target_feature]` function, into which the kernel and all lane operations inline. So a kernel must not
//! be called any other way: outside of such a function every lane operation would be a call through memory.
//! Closures in a kernel need `#[inline(always)]` too, for the same reason.
//!
//! ```text
//! #[inline(always)]
//! unsafe fn scale<S: Simd>(x: &mut [f32], by: f32) {
//!     let by_v = S::splat(by);
//!     let mut lanes = x.chunks_exact_mut(LANES);
//!     for c in &mut lanes {
//!         S::store(c.as_mut_ptr(), S::mul(S::load(c.as_ptr()), by_v));
//!     }
//!     for v in lanes.into_remainder() {
//!         *v *= by;
//!     }
//! }
//!
//! pub fn scaled(isa: Isa, x: &mut [f32], by: f32) {
//!     // SAFETY: `dispatch!` runs `scale` with the features of S switched on; it stays inside of x.
//!     dispatch!(isa, S => unsafe { scale::<S>(x, by) })
//! }
//! ```
#![allow(unsafe_code)] // Intrinsics and raw loads; the contract of the trait is what callers discharge.
#![allow(unsafe_op_in_unsafe_fn)] // Lane operations are unsafe one and all: a block around each would say nothing.

mod avx2;
mod avx512;
pub(crate) mod codes;
mod portable;
#[cfg(test)]
mod tests;

use std::fmt;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

use crate::error::{Error, Result};

/// Lanes of [`Simd::V`].
pub(crate) const LANES: usize = 16;

/// The environment variable that overrides [`Isa::detect`].
const ISA_VAR: &str = "SPECACHE_ISA";

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// What every x86-64 has; for tests and old machines.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// All sets, narrowest first.
    const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// The widest set of this machine.
    pub fn detect() -> Isa {
        *Isa::available().last().expect("Portable is always there")
    }

    /// All sets of this machine, narrowest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// `SPECACHE_ISA` if it is set, else [`Isa::detect`].
    ///
    /// # Errors
    /// [`Error::Usage`] for a name that is unknown or a set that this machine lacks.
    pub fn from_env() -> Result<Isa> {
        match std::env::var_os(ISA_VAR) {
            None => Ok(Isa::detect()),
            Some(name) => Isa::named(&name.to_string_lossy()),
        }
    }

    /// The set called `name`, if this machine has it.
    fn named(name: &str) -> Result<Isa> {
        let Some(isa) = Isa::ALL.into_iter().find(|isa| isa.name() == name) else {
            return Err(Error::Usage(format!("{ISA_VAR}={name} is unknown: use portable, avx2 or avx512")));
        };
        if !isa.is_available() {
            let best = Isa::detect();
            return Err(Error::Usage(format!("{ISA_VAR}={name}: this machine does not have it; the widest is {best}")));
        }
        Ok(isa)
    }

    fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// Whether this machine has the set. The answer is cached by the standard library: a few loads.
    #[inline]
    pub(crate) fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Avx2 => Isa::has_avx2(),
            Isa::Avx512 => Isa::has_avx2() && Isa::has_avx512(),
        }
    }

    #[inline]
    fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }

    #[inline]
    fn has_avx512() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Sixteen f32 lanes.
///
/// # Safety
/// Each method may be called only where the features of the implementing set are switched on ([`dispatch!`] sees to
/// that), and pointers must be valid for the bytes that the method says. No pointer needs alignment.
pub(crate) trait Simd: Copy + 'static {
    /// The lanes.
    type V: Copy;
    /// One truth value per lane.
    type M: Copy;
    /// How many [`Simd::V`] the registers hold: what bounds the tile of a kernel.
    const REGISTERS: usize;

    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    /// 16 f32.
    unsafe fn load(p: *const f32) -> Self::V;
    /// 16 f32.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// 16 little-endian f32: 64 bytes.
    #[inline(always)]
    unsafe fn load_f32(p: *const u8) -> Self::V {
        Self::load(p.cast())
    }
    /// 16 bf16, widened: 32 bytes. Exact.
    unsafe fn load_bf16(p: *const u8) -> Self::V;
    /// 16 fp16, widened: 32 bytes. Exact.
    unsafe fn load_f16(p: *const u8) -> Self::V;
    /// 16 bf16: 32 bytes, rounded to nearest even; NaN stays NaN.
    unsafe fn store_bf16(p: *mut u8, v: Self::V);
    /// 16 fp16: 32 bytes, rounded to nearest even; beyond 65504 infinite; NaN stays NaN.
    unsafe fn store_f16(p: *mut u8, v: Self::V);

    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a > b ? a : b` per lane, so `b` where either is NaN (what `vmaxps` does).
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b` per lane, so `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`; rounded once where the set has FMA, twice in [`Portable`].
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// Sum of the lanes, in halves: lane i + lane i+8, then i+4, i+2, i+1. The same order on all sets.
    unsafe fn sum(v: Self::V) -> f32;
    /// Maximum of the lanes, by [`Simd::max`] in the order of [`Simd::sum`]: a NaN may be lost.
    unsafe fn reduce_max(v: Self::V) -> f32;

    /// `a < b`, false where either is NaN.
    unsafe fn lt(a: Self::V, b: Self::V) -> Self::M;
    /// `m ? a : b`.
    unsafe fn select(m: Self::M, a: Self::V, b: Self::V) -> Self::V;

    /// `round(x)` to the nearest integer, ties to even; |x| < 2^22.
    unsafe fn round(x: Self::V) -> Self::V;
    /// `p * 2^n` for integral `n` in [-126, 128]; anything finite or not for other `n`, NaN where p is NaN.
    unsafe fn scale2(p: Self::V, n: Self::V) -> Self::V;

    /// 32 codes of `BITS` bits (`4 * BITS` bytes, layout: [`codes`]) as f32 `0 ..= 2^BITS-1`: values 0..16, 16..32.
    unsafe fn codes<const BITS: usize>(p: *const u8) -> (Self::V, Self::V);

    /// The first `n < 16` of 16 f32 lanes from memory, 0 in the others.
    #[inline(always)]
    unsafe fn load_n(p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0f32; LANES];
        std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
        Self::load(lanes.as_ptr())
    }
    /// Stores the first `n < 16` lanes.
    #[inline(always)]
    unsafe fn store_n(p: *mut f32, v: Self::V, n: usize) {
        let mut lanes = [0f32; LANES];
        Self::store(lanes.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
    }

    /// `e^x`. Relative error at most 1.2e-7 (one unit in the last place) where the result is a normal number; 0 below
    /// [`EXP_MIN`] (no subnormal results, e^-inf = 0), infinite above 88.72, NaN for NaN.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // Cody-Waite: ln 2 = LN2_HI + LN2_LO with 9 bits in the first, so that n * LN2_HI is exact without FMA as well.
        const LN2_HI: f32 = 0.693_359_4;
        const LN2_LO: f32 = -2.121_944_4e-4;
        // e^r = 1 + r + r^2 q(r) on |r| <= ln(2)/2, minimax in the relative error: 3.1e-9.
        const Q: [f32; 5] = EXP_POLY;
        // min(HI, x) is x where x is NaN. From 89 on, 2^128 * e^0.28 overflows to infinity as it should.
        let y = Self::min(Self::splat(89.0), x);
        let n = Self::round(Self::mul(y, Self::splat(std::f32::consts::LOG2_E)));
        let r = Self::fma(n, Self::splat(-LN2_HI), y);
        let r = Self::fma(n, Self::splat(-LN2_LO), r);
        let mut q = Self::fma(Self::splat(Q[4]), r, Self::splat(Q[3]));
        q = Self::fma(q, r, Self::splat(Q[2]));
        q = Self::fma(q, r, Self::splat(Q[1]));
        q = Self::fma(q, r, Self::splat(Q[0]));
        let p = Self::fma(q, Self::mul(r, r), Self::add(r, Self::splat(1.0)));
        Self::select(Self::lt(x, Self::splat(EXP_MIN)), Self::zero(), Self::scale2(p, n))
    }
}

/// Below this, e^x is less than the smallest normal number, and [`Simd::exp`] gives 0.
pub(crate) const EXP_MIN: f32 = -87.336_54;

/// Coefficients of r^2 .. r^6 in [`Simd::exp`].
const EXP_POLY: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_393, 0.008_368_781, 0.001_381_446_7];

/// Asks for the cache line at `p` into the second-level cache. Never faults, so any address will do.
#[inline(always)]
pub(crate) fn prefetch_l2(p: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: SSE is part of x86-64; a prefetch of an invalid address is ignored.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
}

/// Runs `f`, which must inline, with the features of AVX2 switched on.
///
/// # Safety
/// The machine has [`Isa::Avx2`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn with_avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Runs `f`, which must inline, with the features of AVX-512 switched on.
///
/// # Safety
/// The machine has [`Isa::Avx512`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn with_avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// `f` itself: a place where a closure can carry an attribute, outside of the `unsafe` block that runs it.
#[inline(always)]
pub(crate) fn task<R, F: FnOnce() -> R>(f: F) -> F {
    f
}

/// `dispatch!(isa, S => unsafe { kernel::<S>(args) })`: the expression with `S` the [`Simd`] of `isa`, compiled with
/// that set's features. Panics if the machine lacks `isa`, so the features are never in doubt; costs a few loads and a
/// branch, so dispatch per task and not per row.
macro_rules! dispatch {
    ($isa:expr, $S:ident => $call:expr) => {{
        let isa: $crate::cpu::simd::Isa = $isa;
        assert!(isa.is_available(), "this machine does not have {isa}");
        match isa {
            $crate::cpu::simd::Isa::Portable => {
                type $S = $crate::cpu::simd::Portable;
                $call
            }
            $crate::cpu::simd::Isa::Avx2 => {
                type $S = $crate::cpu::simd::Avx2;
                let task = $crate::cpu::simd::task(
                    #[inline(always)]
                    || $call,
                );
                #[allow(unused_unsafe, clippy::let_and_return)] // Where the caller is unsafe itself.
                // SAFETY: asserted above.
                let result = unsafe { $crate::cpu::simd::with_avx2(task) };
                result
            }
            $crate::cpu::simd::Isa::Avx512 => {
                type $S = $crate::cpu::simd::Avx512;
                let task = $crate::cpu::simd::task(
                    #[inline(always)]
                    || $call,
                );
                #[allow(unused_unsafe, clippy::let_and_return)] // Where the caller is unsafe itself.
                // SAFETY: asserted above.
                let result = unsafe { $crate::cpu::simd::with_avx512(task) };
                result
            }
        }
    }};
}
pub(crate) use dispatch;
