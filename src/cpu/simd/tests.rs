//! Every operation on every set against its plain form, over one table of edge values and random numbers.
#![allow(unsafe_op_in_unsafe_fn)] // Test kernels; the contract is the trait's.

use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::codes::{BLOCK, block_bytes, pack_codes, unpack_codes};
use super::*;

type Lanes = [f32; LANES];

/// What every operation must survive.
const EDGES: [f32; 20] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.1,
    1.5,
    2.5,
    -3.5,
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MIN_POSITIVE,
    1e-45,
    -1e-40,
    f32::MAX,
    f32::MIN,
    65504.0,
    65520.0,
    1e-7,
    -87.4,
];

/// Vectors of all rotations of the edge values, then random bit patterns, then random numbers of common size.
fn inputs() -> Vec<Lanes> {
    let mut rng = Pcg64::seed_from_u64(7);
    let edges = (0..EDGES.len()).map(|r| std::array::from_fn(|i| EDGES[(r + i) % EDGES.len()]));
    let mut v: Vec<Lanes> = edges.collect();
    v.extend((0..300).map(|_| std::array::from_fn(|_| f32::from_bits(rng.next_u32()))));
    v.extend((0..300).map(|_| std::array::from_fn(|_| rng.random_range(-4.0..4.0))));
    v
}

/// Equal bits, or both NaN.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

/// Applies `$body` (an expression over `S` and `V`s) to arrays on `isa`.
macro_rules! lanes {
    ($isa:expr, $($a:ident),+ ; $S:ident => $body:expr) => {{
        let mut out = [f32::NAN; LANES];
        let ($($a,)+) = ($(*$a,)+);
        // SAFETY: the loads and the store stay within arrays of 16.
        dispatch!($isa, $S => unsafe {
            $(let $a = <$S as Simd>::load($a.as_ptr());)+
            <$S as Simd>::store(out.as_mut_ptr(), $body)
        });
        out
    }};
}

/// Pairs of inputs: each with one at another place of the table.
fn pairs() -> Vec<(Lanes, Lanes)> {
    let v = inputs();
    let n = v.len();
    (0..n).flat_map(|i| [1, 7, 13].map(|d| (v[i], v[(i + d) % n]))).collect()
}

fn check2(isa: Isa, what: &str, got: Lanes, a: Lanes, b: Lanes, plain: impl Fn(f32, f32) -> f32) {
    for i in 0..LANES {
        let want = plain(a[i], b[i]);
        assert!(same(got[i], want), "{isa} {what}({:e}, {:e}) = {:e}, not {want:e}", a[i], b[i], got[i]);
    }
}

#[test]
fn arithmetic() {
    for isa in Isa::available() {
        for (a, b) in &pairs() {
            check2(isa, "add", lanes!(isa, a, b; S => S::add(a, b)), *a, *b, |a, b| a + b);
            check2(isa, "sub", lanes!(isa, a, b; S => S::sub(a, b)), *a, *b, |a, b| a - b);
            check2(isa, "mul", lanes!(isa, a, b; S => S::mul(a, b)), *a, *b, |a, b| a * b);
            check2(isa, "div", lanes!(isa, a, b; S => S::div(a, b)), *a, *b, |a, b| a / b);
            check2(isa, "max", lanes!(isa, a, b; S => S::max(a, b)), *a, *b, |a, b| if a > b { a } else { b });
            check2(isa, "min", lanes!(isa, a, b; S => S::min(a, b)), *a, *b, |a, b| if a < b { a } else { b });
            let less = lanes!(isa, a, b; S => S::select(S::lt(a, b), S::splat(1.0), S::zero()));
            check2(isa, "lt", less, *a, *b, |a, b| f32::from(a < b));
        }
    }
}

#[test]
fn fma_rounds_once_or_twice() {
    for isa in Isa::available() {
        for (a, b) in &pairs() {
            let c: &Lanes = &std::array::from_fn(|i| b[(i + 3) % LANES]);
            let got = lanes!(isa, a, b, c; S => S::fma(a, b, c));
            for i in 0..LANES {
                let once = a[i].mul_add(b[i], c[i]);
                let twice = a[i] * b[i] + c[i];
                let want = if isa == Isa::Portable { twice } else { once };
                assert!(same(got[i], want), "{isa} fma({:e}, {:e}, {:e}) = {:e}", a[i], b[i], c[i], got[i]);
            }
        }
    }
}

#[test]
fn reductions_have_one_order() {
    fn fold(mut v: Lanes, f: impl Fn(f32, f32) -> f32) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] = f(v[i], v[i + half]);
            }
        }
        v[0]
    }
    for isa in Isa::available() {
        for a in &inputs() {
            let sum = lanes!(isa, a; S => S::splat(S::sum(a)));
            let max = lanes!(isa, a; S => S::splat(S::reduce_max(a)));
            assert!(same(sum[0], fold(*a, |a, b| a + b)), "{isa} sum {a:?}: {}", sum[0]);
            assert!(same(max[5], fold(*a, |a, b| if a > b { a } else { b })), "{isa} max {a:?}: {}", max[0]);
        }
    }
}

#[test]
fn round_to_nearest_even() {
    for isa in Isa::available() {
        let mut rng = Pcg64::seed_from_u64(1);
        let halves: Lanes = std::array::from_fn(|i| i as f32 - 7.5);
        let large: Lanes = std::array::from_fn(|_| rng.random_range(-4e6..4e6));
        for a in [&halves, &large] {
            let got = lanes!(isa, a; S => S::round(a));
            for i in 0..LANES {
                assert_eq!(got[i], a[i].round_ties_even(), "{isa} round({})", a[i]);
            }
        }
    }
}

/// All 65536 numbers of a 16-bit type widen as the `half` crate does it.
fn widen_all(load: impl Fn(Isa, &[u16; LANES]) -> Lanes, plain: impl Fn(u16) -> f32) {
    for isa in Isa::available() {
        for first in (0..65536).step_by(LANES) {
            let h: [u16; LANES] = std::array::from_fn(|i| (first + i) as u16);
            for (&h, got) in h.iter().zip(load(isa, &h)) {
                assert!(same(got, plain(h)), "{isa} {h:#06x}: {got:e}, not {:e}", plain(h));
            }
        }
    }
}

#[test]
fn all_bf16_widen() {
    let load = |isa, h: &[u16; LANES]| {
        let mut out = [0f32; LANES];
        // SAFETY: 16 numbers in, 16 out.
        dispatch!(isa, S => unsafe { S::store(out.as_mut_ptr(), S::load_bf16(h.as_ptr().cast())) });
        out
    };
    widen_all(load, |h| half::bf16::from_bits(h).to_f32());
}

#[test]
fn all_fp16_widen() {
    let load = |isa, h: &[u16; LANES]| {
        let mut out = [0f32; LANES];
        // SAFETY: 16 numbers in, 16 out.
        dispatch!(isa, S => unsafe { S::store(out.as_mut_ptr(), S::load_f16(h.as_ptr().cast())) });
        out
    };
    widen_all(load, |h| half::f16::from_bits(h).to_f32());
}

/// Every f32 that lies on, between or next to 16-bit numbers, given the f32s of two neighbours.
fn around(lo: f32, hi: f32) -> [f32; 5] {
    let mid = lo + (hi - lo) / 2.0;
    [lo, f32::from_bits(mid.to_bits().wrapping_sub(1)), mid, f32::from_bits(mid.to_bits().wrapping_add(1)), hi]
}

#[test]
fn stores_of_16_bits_round_to_nearest_even() {
    let mut values: Vec<f32> = EDGES.to_vec();
    for h in 0..=u16::MAX {
        let next = h.wrapping_add(1);
        values.extend(around(half::bf16::from_bits(h).to_f32(), half::bf16::from_bits(next).to_f32()));
        values.extend(around(half::f16::from_bits(h).to_f32(), half::f16::from_bits(next).to_f32()));
    }
    values.resize(values.len().next_multiple_of(LANES), 0.0);
    for isa in Isa::available() {
        for v in values.chunks_exact(LANES) {
            let (mut bf16, mut f16) = ([0u16; LANES], [0u16; LANES]);
            // SAFETY: 16 numbers in, 16 out.
            dispatch!(isa, S => unsafe {
                let lanes = S::load(v.as_ptr());
                S::store_bf16(bf16.as_mut_ptr().cast(), lanes);
                S::store_f16(f16.as_mut_ptr().cast(), lanes);
            });
            for i in 0..LANES {
                let (b, h) = (half::bf16::from_bits(bf16[i]), half::f16::from_bits(f16[i]));
                assert!(same(b.to_f32(), half::bf16::from_f32(v[i]).to_f32()), "{isa} bf16({:e}) = {b}", v[i]);
                assert!(same(h.to_f32(), half::f16::from_f32(v[i]).to_f32()), "{isa} fp16({:e}) = {h}", v[i]);
            }
        }
    }
}

#[test]
fn exp_sweep() {
    for isa in Isa::available() {
        let mut worst = 0f64;
        for step in 0..(176 << 13) / LANES {
            let a: &Lanes = &std::array::from_fn(|i| -88.0 + (step * LANES + i) as f32 / 8192.0);
            for (x, got) in a.iter().zip(lanes!(isa, a; S => S::exp(a))) {
                if *x < EXP_MIN {
                    assert_eq!(got.to_bits(), 0, "{isa} exp({x})");
                    continue;
                }
                let want = f64::from(*x).exp();
                worst = worst.max((f64::from(got) / want - 1.0).abs());
            }
        }
        // One unit in the last place of a number just above a power of two; without FMA the reduction adds another half.
        let limit = if isa == Isa::Portable { 1.8e-7 } else { 1.2e-7 };
        assert!(worst < limit, "{isa}: relative error {worst:e}");
    }
}

#[test]
fn exp_edges() {
    let cases = [
        (f32::NEG_INFINITY, 0.0),
        (f32::MIN, 0.0),
        (-1e4, 0.0),
        (-87.4, 0.0),
        (0.0, 1.0),
        (-0.0, 1.0),
        (1e-45, 1.0),
        (88.8, f32::INFINITY),
        (1e4, f32::INFINITY),
        (f32::MAX, f32::INFINITY),
        (f32::INFINITY, f32::INFINITY),
        (f32::NAN, f32::NAN),
        (-f32::NAN, f32::NAN),
    ];
    for isa in Isa::available() {
        for (x, want) in cases {
            let a = &[x; LANES];
            let got = lanes!(isa, a; S => S::exp(a));
            assert!(got.iter().all(|&g| same(g, want)), "{isa} exp({x}) = {}, not {want}", got[0]);
        }
    }
}

fn check_codes<const BITS: usize>(isa: Isa, rng: &mut Pcg64) {
    // One byte off, as a packed page promises no alignment.
    let mut bytes = vec![0u8; 1 + block_bytes(BITS)];
    for _ in 0..500 {
        let codes: [u8; BLOCK] = std::array::from_fn(|_| rng.random_range(0..1u8 << BITS));
        pack_codes(BITS, &codes, &mut bytes[1..]);
        assert_eq!(unpack_codes(BITS, &bytes[1..]), codes, "{BITS} bits, plain");
        let mut out = [f32::NAN; BLOCK];
        // SAFETY: a whole block in, 32 numbers out.
        dispatch!(isa, S => unsafe {
            let (lo, hi) = S::codes::<BITS>(bytes[1..].as_ptr());
            S::store(out.as_mut_ptr(), lo);
            S::store(out.as_mut_ptr().add(LANES), hi);
        });
        assert_eq!(out, codes.map(f32::from), "{isa}, {BITS} bits");
    }
}

#[test]
fn codes_expand_in_order() {
    let mut rng = Pcg64::seed_from_u64(3);
    for isa in Isa::available() {
        check_codes::<1>(isa, &mut rng);
        check_codes::<2>(isa, &mut rng);
        check_codes::<4>(isa, &mut rng);
    }
}

#[test]
fn code_layout() {
    let at = |v: usize| std::array::from_fn(|i| u8::from(i == v));
    let mut out = [0u8; 16];
    pack_codes(1, &at(9), &mut out[..4]);
    assert_eq!(out[..4], [0, 2, 0, 0]);
    pack_codes(2, &at(19), &mut out[..8]);
    assert_eq!(out[..8], [0, 0, 0, 1 << 4, 0, 0, 0, 0]);
    pack_codes(4, &at(30), &mut out);
    assert_eq!(u16::from_le_bytes([out[12], out[13]]), 1 << 12);
}

#[test]
fn partial_loads_and_stores_stay_inside() {
    for isa in Isa::available() {
        for n in 0..LANES {
            let from: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            let mut to = [-1f32; LANES];
            let mut loaded = [f32::NAN; LANES];
            // SAFETY: n numbers in, n and 16 out.
            dispatch!(isa, S => unsafe {
                let v = S::load_n(from.as_ptr(), n);
                S::store(loaded.as_mut_ptr(), v);
                S::store_n(to.as_mut_ptr(), v, n);
            });
            for i in 0..LANES {
                assert_eq!(loaded[i], if i < n { from[i] } else { 0.0 }, "{isa} load_n {n}");
                assert_eq!(to[i], if i < n { from[i] } else { -1.0 }, "{isa} store_n {n}");
            }
        }
    }
}

#[test]
fn names_of_sets() {
    for isa in Isa::available() {
        assert_eq!(Isa::named(&isa.to_string()).unwrap(), isa);
    }
    let error = Isa::named("neon").unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("portable, avx2 or avx512"), "{error}");
}
