//! RMS norm over rows.
#![allow(unsafe_code)] // Raw loads and stores within checked shapes.
#![allow(unsafe_op_in_unsafe_fn)] // Lane operations; the contract is that of `Simd`.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::parallel::{Tile, for_blocks};
use super::simd::{Isa, LANES, Simd, dispatch};

/// Rows of a task.
const BLOCK: usize = 8;

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row of `[rows, weight.len()]`; a row's bits depend on that row
/// alone. Gives the first row whose sum of squares is not finite, if there is one: NaN and infinity are found here.
///
/// # Panics
/// If a shape does not fit.
pub fn rms_norm(isa: Isa, x: &[f32], rows: usize, weight: &[f32], eps: f32, out: &mut [f32]) -> Option<usize> {
    let dim = weight.len();
    assert_eq!(x.len(), rows * dim, "rms_norm: x must be [rows, dim] = [{rows}, {dim}]");
    assert_eq!(out.len(), rows * dim, "rms_norm: out must be [rows, dim] = [{rows}, {dim}]");
    let first_bad = AtomicUsize::new(usize::MAX);
    let tile = Tile::new(out, dim);
    // Two passes over a row cost about four multiply-adds per number.
    for_blocks(rows.div_ceil(BLOCK), 4 * rows * dim, &|block| {
        for row in block * BLOCK..((block + 1) * BLOCK).min(rows) {
            let x = &x[row * dim..(row + 1) * dim];
            // SAFETY: row `row` of the output belongs to this block alone.
            let sum = dispatch!(isa, S => unsafe { norm_row::<S>(x, weight, eps, tile.right(row * dim).at) });
            if !sum.is_finite() {
                first_bad.fetch_min(row, Ordering::Relaxed);
            }
        }
    });
    Some(first_bad.into_inner()).filter(|&row| row < rows)
}

/// Normalises one row; gives its sum of squares.
#[inline(always)]
unsafe fn norm_row<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: *mut f32) -> f32 {
    let sum = sum_of_squares::<S>(x);
    let scale = S::splat(1.0 / (sum / x.len() as f32 + eps).sqrt());
    let (px, pw) = (x.as_ptr(), weight.as_ptr());
    let mut i = 0;
    while i + LANES <= x.len() {
        S::store(out.add(i), S::mul(S::mul(S::load(px.add(i)), scale), S::load(pw.add(i))));
        i += LANES;
    }
    let n = x.len() - i;
    if n > 0 {
        let y = S::mul(S::mul(S::load_n(px.add(i), n), scale), S::load_n(pw.add(i), n));
        S::store_n(out.add(i), y, n);
    }
    sum
}

/// Four accumulators take the vectors in turn.
#[inline(always)]
unsafe fn sum_of_squares<S: Simd>(x: &[f32]) -> f32 {
    let mut sums = [S::zero(); 4];
    let mut steps = x.chunks_exact(4 * LANES);
    for step in &mut steps {
        for (i, sum) in sums.iter_mut().enumerate() {
            let v = S::load(step.as_ptr().add(i * LANES));
            *sum = S::fma(v, v, *sum);
        }
    }
    let mut rest = steps.remainder().chunks_exact(LANES);
    for (sum, step) in sums.iter_mut().zip(&mut rest) {
        let v = S::load(step.as_ptr());
        *sum = S::fma(v, v, *sum);
    }
    let v = S::load_n(rest.remainder().as_ptr(), rest.remainder().len());
    sums[3] = S::fma(v, v, sums[3]);
    S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn plain(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        x.iter().zip(weight).map(|(&x, &w)| (f64::from(x) * scale * f64::from(w)) as f32).collect()
    }

    #[test]
    fn rows_match_the_plain_form_and_stand_alone() {
        let mut rng = rand_pcg::Pcg64::seed_from_u64(5);
        for isa in Isa::available() {
            for dim in [1, 15, 16, 17, 63, 64, 80, 128, 2048] {
                for rows in [0, 1, 2, 17] {
                    let x: Vec<f32> = (0..rows * dim).map(|_| rng.random_range(-3.0..3.0)).collect();
                    let weight: Vec<f32> = (0..dim).map(|_| rng.random_range(0.5..1.5)).collect();
                    let mut out = vec![f32::NAN; x.len()];
                    assert_eq!(rms_norm(isa, &x, rows, &weight, 1e-5, &mut out), None);
                    for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact(dim)) {
                        for (got, want) in out.iter().zip(plain(x, &weight, 1e-5)) {
                            // A few roundings; the sum's own error is far smaller than one.
                            assert!((got - want).abs() <= 5e-7 * want.abs(), "{isa} {dim}: {got} {want}");
                        }
                        let mut alone = vec![f32::NAN; dim];
                        assert_eq!(rms_norm(isa, x, 1, &weight, 1e-5, &mut alone), None);
                        assert!(alone.iter().zip(out).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa} {dim}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_first_row_that_is_not_finite() {
        for isa in Isa::available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![1f32; 40 * 33];
                x[39 * 33 + 32] = bad;
                x[21 * 33] = bad;
                let mut out = vec![0f32; x.len()];
                assert_eq!(rms_norm(isa, &x, 40, &[1.0; 33], 1e-5, &mut out), Some(21), "{isa} {bad}");
            }
        }
    }
}
