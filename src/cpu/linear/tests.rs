//! Every path, set, number type and odd shape against a plain f64 product; bits alone and in a batch; thread counts.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::*;
use crate::device::map::Bytes;
use crate::model::{Dtype, Matrix};

const DTYPES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];
const KS: [usize; 10] = [1, 15, 16, 17, 31, 33, 64, 80, 2048, 4129];
const NS: [usize; 5] = [1, 3, 4, 5, 67];
const ROWS: [usize; 7] = [0, 1, 2, 3, 5, 8, 17];

fn numbers(rng: &mut Pcg64, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A matrix that starts one byte off any alignment.
fn matrix(rng: &mut Pcg64, dtype: Dtype, n: usize, k: usize) -> Matrix {
    let len = n * k * dtype.bytes();
    let bytes = Bytes::filled(len + 1, |bytes| {
        for b in bytes[1..].chunks_exact_mut(dtype.bytes()) {
            let x: f32 = rng.random_range(-1.0..1.0);
            match dtype {
                Dtype::Bf16 => b.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
                Dtype::F16 => b.copy_from_slice(&half::f16::from_f32(x).to_le_bytes()),
                Dtype::F32 => b.copy_from_slice(&x.to_le_bytes()),
            }
        }
    });
    Matrix::new(bytes.unwrap().slice(1..1 + len), dtype, n, k)
}

fn linear(rng: &mut Pcg64, dtype: Dtype, n: usize, k: usize, bias: bool) -> Linear {
    Linear { weight: matrix(rng, dtype, n, k), bias: bias.then(|| numbers(rng, n)) }
}

/// The product in f64.
fn plain(x: &[f32], rows: usize, linear: &Linear) -> Vec<f64> {
    let (n, k) = (linear.weight.rows(), linear.weight.cols());
    let mut w = vec![0f32; k];
    let mut y = vec![0f64; rows * n];
    for feature in 0..n {
        linear.weight.row_f32(feature, &mut w);
        let bias = linear.bias.as_ref().map_or(0.0, |b| b[feature]);
        for row in 0..rows {
            let x = &x[row * k..(row + 1) * k];
            y[row * n + feature] =
                f64::from(bias) + x.iter().zip(&w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>();
        }
    }
    y
}

/// Numbers below 1 in size: each of k products and additions rounds by at most 6e-8 of a partial sum that is about
/// sqrt(k) / 3; taken as if the errors all had one sign over the 16 lanes' shares.
fn tolerance(k: usize) -> f64 {
    1e-6 + 6e-8 * (k as f64).sqrt() * (k as f64 / 16.0 + 8.0)
}

fn assert_close(got: &[f32], want: &[f64], k: usize, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(g) - w).abs() <= tolerance(k), "{what}: [{i}] = {g}, not {w}");
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn one(isa: Isa, path: Path, x: &[f32], rows: usize, linear: &Linear) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * linear.weight.rows()];
    project(isa, path, x, rows, &mut [Part { linear, out: &mut out }]);
    out
}

/// Runs `check` for every set, path, number type and shape.
fn for_all(check: impl Fn(&mut Pcg64, Isa, Path, Dtype, usize, usize, usize)) {
    let mut rng = Pcg64::seed_from_u64(11);
    for isa in Isa::available() {
        for path in [Path::Rows, Path::Panel] {
            for dtype in DTYPES {
                for k in KS {
                    for n in NS {
                        // All counts of rows for one shape, a few for the others.
                        let all = n == 5 || k == 33;
                        for rows in ROWS.into_iter().filter(|&r| all || r == 3 || r == 8) {
                            check(&mut rng, isa, path, dtype, n, k, rows);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn products_match_the_plain_form() {
    for_all(|rng, isa, path, dtype, n, k, rows| {
        let what = format!("{isa} {path:?} {dtype:?} n={n} k={k} rows={rows}");
        let x = numbers(rng, rows * k);
        let a = linear(rng, dtype, n, k, n % 2 == 1);
        let b = linear(rng, dtype, 3, k, n % 2 == 0);
        let (mut out_a, mut out_b) = (vec![f32::NAN; rows * n], vec![f32::NAN; rows * 3]);
        let mut parts = [Part { linear: &a, out: &mut out_a }, Part { linear: &b, out: &mut out_b }];
        project(isa, path, &x, rows, &mut parts);
        assert_close(&out_a, &plain(&x, rows, &a), k, &what);
        assert_close(&out_b, &plain(&x, rows, &b), k, &what);
    });
}

#[test]
fn residual_is_added_once() {
    for_all(|rng, isa, path, dtype, n, k, rows| {
        let x = numbers(rng, rows * k);
        let w = linear(rng, dtype, n, k, true);
        let mut out = numbers(rng, rows * n);
        let want: Vec<f64> = plain(&x, rows, &w).iter().zip(&out).map(|(y, &o)| y + f64::from(o)).collect();
        project_add(isa, path, &x, rows, &w, &mut out);
        assert_close(&out, &want, k, &format!("{isa} {path:?} {dtype:?} n={n} k={k} rows={rows}"));
    });
}

#[test]
fn swiglu_matches_the_plain_form() {
    for_all(|rng, isa, path, dtype, n, k, rows| {
        let x = numbers(rng, rows * k);
        let (gate, up) = (linear(rng, dtype, n, k, false), linear(rng, dtype, n, k, true));
        let mut out = vec![f32::NAN; rows * n];
        swiglu(isa, path, &x, rows, &gate, &up, &mut out);
        let (g, u) = (plain(&x, rows, &gate), plain(&x, rows, &up));
        for i in 0..out.len() {
            let want = g[i] / (1.0 + (-g[i]).exp()) * u[i];
            // The slope of silu is at most 1.1; each factor carries the other's error.
            let slack = tolerance(k) * (1.0 + 1.1 * u[i].abs() + g[i].abs());
            assert!((f64::from(out[i]) - want).abs() <= slack, "{isa} {path:?} {dtype:?} {n} {k}: {} {want}", out[i]);
        }
    });
}

#[test]
fn a_gate_of_any_size_stays_finite() {
    let mut rng = Pcg64::seed_from_u64(2);
    let (gate, up) = (linear(&mut rng, Dtype::F32, 5, 1, false), linear(&mut rng, Dtype::F32, 5, 1, false));
    for isa in Isa::available() {
        for x in [-1e4f32, -200.0, -88.0, 0.0, 88.0, 1e4] {
            let mut out = [f32::NAN; 5];
            swiglu(isa, Path::Rows, &[x], 1, &gate, &up, &mut out);
            assert!(out.iter().all(|y| y.is_finite()), "{isa} {x}: {out:?}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    let mut rng = Pcg64::seed_from_u64(3);
    for isa in Isa::available() {
        for dtype in DTYPES {
            for k in [17, 80, 2048, 8192 + 33] {
                let w = linear(&mut rng, dtype, 67, k, true);
                let up = linear(&mut rng, dtype, 67, k, false);
                let x = numbers(&mut rng, 17 * k);
                let alone: Vec<Vec<u32>> = x.chunks_exact(k).map(|x| bits(&one(isa, Path::Rows, x, 1, &w))).collect();
                for rows in ROWS {
                    for first in [0, 17 - rows] {
                        let x = &x[first * k..(first + rows) * k];
                        let batch = one(isa, Path::Rows, x, rows, &w);
                        assert_eq!(bits(&batch), alone[first..first + rows].concat(), "{isa} {dtype:?} k={k} {rows}");
                    }
                }
                let glu = |x: &[f32], rows| {
                    let mut out = vec![f32::NAN; rows * 67];
                    swiglu(isa, Path::Rows, x, rows, &w, &up, &mut out);
                    project_add(isa, Path::Rows, x, rows, &w, &mut out);
                    bits(&out)
                };
                let alone: Vec<Vec<u32>> = x.chunks_exact(k).map(|x| glu(x, 1)).collect();
                assert_eq!(glu(&x, 17), alone.concat(), "{isa} {dtype:?} k={k}");
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_threads() {
    let mut rng = Pcg64::seed_from_u64(4);
    let pools = [1, 2, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for path in [Path::Rows, Path::Panel] {
        for (n, k, rows) in [(1000, 2048, 2), (300, 256, 33), (67, 8192, 5)] {
            let (a, b) = (linear(&mut rng, Dtype::Bf16, n, k, true), linear(&mut rng, Dtype::Bf16, n, k, false));
            let x = numbers(&mut rng, rows * k);
            let run = || {
                let (mut y, mut z) = (one(Isa::detect(), path, &x, rows, &a), vec![f32::NAN; rows * n]);
                swiglu(Isa::detect(), path, &x, rows, &a, &b, &mut z);
                project_add(Isa::detect(), path, &x, rows, &b, &mut y);
                (bits(&y), bits(&z))
            };
            let first = pools[0].install(run);
            for pool in &pools[1..] {
                for _ in 0..3 {
                    assert!(pool.install(run) == first, "{path:?} n={n} k={k} rows={rows}");
                }
            }
        }
    }
}

#[test]
fn nothing_at_all() {
    project(Isa::detect(), Path::Rows, &[], 0, &mut []);
    let empty = Linear { weight: Matrix::new(Bytes::filled(0, |_| {}).unwrap(), Dtype::Bf16, 0, 16), bias: None };
    for path in [Path::Rows, Path::Panel] {
        assert!(one(Isa::detect(), path, &[1.0; 32], 2, &empty).is_empty());
    }
}

#[test]
#[should_panic(expected = "x must be [rows, k] = [2, 16]")]
fn a_wrong_x_is_named() {
    let w = linear(&mut Pcg64::seed_from_u64(0), Dtype::F32, 3, 16, false);
    one(Isa::Portable, Path::Rows, &[0.0; 31], 2, &w);
}

#[test]
#[should_panic(expected = "out must be [rows, n] = [2, 3]")]
fn a_wrong_out_is_named() {
    let w = linear(&mut Pcg64::seed_from_u64(0), Dtype::F32, 3, 16, false);
    project_add(Isa::Portable, Path::Rows, &[0.0; 32], 2, &w, &mut [0.0; 5]);
}
