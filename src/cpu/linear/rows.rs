//! The skinny product of decode: a few rows of x against all of W, as fast as memory delivers W.
//!
//! What it takes, measured on a Zen 5 core that reads 36 GB/s:
//! - One output feature at a time over up to four rows of x, so that W is read as one sequential stream. Two or four
//!   features side by side fall to 11-15 GB/s.
//! - W of the group of features after this one is asked for into the second-level cache, line by line in the order of
//!   memory, while this one is multiplied: 36, 34 and 31 GB/s at 1, 2 and 4 rows against 30, 28 and 24 without.
//! - x stays in the first-level cache: where all of k does not fit, a group of features goes by for one block of k
//!   after the other, and the accumulators wait on the stack. The prefetch makes up for the broken stream of W
//!   (k = 8192, 2 rows: 27 GB/s against 11 with x from the second-level cache).
//!
//! Order of additions for each (row, feature), whatever the number of rows: two accumulators of 16 lanes take the vectors
//! of k in turn; their sum folds to a number that is added to the output.
#![allow(unsafe_code)] // Raw loads and stores within checked shapes.
#![allow(unsafe_op_in_unsafe_fn)] // Lane operations; the contract is that of `Simd`.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::{Input, Store};
use crate::cpu::element::{Element, with_element};
use crate::cpu::parallel::{Aligned, Tile, with_aligned};
use crate::cpu::simd::{Isa, LANES, Simd, dispatch, prefetch_l2};
use crate::model::Linear;

/// Bytes of a tile of x that stay in the first-level cache (48 KiB) while W streams through it.
const X_IN_L1: usize = 16 << 10;

/// Features of a group at most: their accumulators for eight rows take 16 KiB.
const GROUP: usize = 16;

/// Features of a group, which is the distance of the prefetch: 64 KiB of bf16, but at least 8 features to one load of
/// x. Two groups and x share the second-level cache (1 MiB).
fn group(k: usize) -> usize {
    (NUMBERS / k.max(1)).clamp(GROUP / 2, GROUP)
}

/// Output features of a task: 64 KiB of bf16 take two microseconds from memory, long against the 50 ns of a `join` and
/// short against the call; a multiple of 16, as a cache line of the output should have one writer.
pub(super) fn block(k: usize) -> usize {
    (NUMBERS / k.max(1)).next_multiple_of(LANES).clamp(LANES, 1024)
}

/// Numbers of W in 64 KiB of bf16.
const NUMBERS: usize = 32 << 10;

/// Numbers of k that a tile of `rows` rows takes at once; whole turns of the two accumulators.
const fn span(rows: usize) -> usize {
    X_IN_L1 / 4 / rows
}

/// Rows of x, packed for [`fill`]: tiles of 8, 4, 2 and 1 rows; in a tile, vector after vector of k, the rows' vectors side
/// by side, zeros behind k. So a tile is one stream of whole cache lines: with rows where the caller has them, each load
/// would touch two lines (4 rows: half the speed), and rows of 8 KiB would compete for the same few sets.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a> {
    x: &'a [Aligned],
    rows: usize,
    k: usize,
}

/// Packs x and lends it to `run`.
pub(super) fn with_packed<R>(isa: Isa, input: Input<'_>, run: impl FnOnce(Packed<'_>) -> R) -> R {
    let Input { rows, k, .. } = input;
    with_aligned(rows * k.div_ceil(LANES), |x| {
        // SAFETY: x has room for `rows` rows of whole vectors.
        dispatch!(isa, S => unsafe { pack::<S>(input, x.as_mut_ptr().cast()) });
        run(Packed { x, rows, k })
    })
}

/// # Safety
/// That of [`Simd`]; `to` is writable for the rows in whole vectors.
#[inline(always)]
unsafe fn pack<S: Simd>(input: Input<'_>, mut to: *mut f32) {
    let Input { x, rows, k } = input;
    let mut row = 0;
    while row < rows {
        let tile = row_tile::<S>(rows - row);
        for i in (0..k).step_by(LANES) {
            for r in row..row + tile {
                let from = x.as_ptr().add(r * k + i);
                S::store(to, if k - i < LANES { S::load_n(from, k - i) } else { S::load(from) });
                to = to.add(LANES);
            }
        }
        row += tile;
    }
}

/// Rows of the next tile when `left` are left: with two accumulators for each row, eight rows take half of AVX-512's 32
/// registers, and two rows half of AVX2's.
#[inline(always)]
fn row_tile<S: Simd>(left: usize) -> usize {
    match left {
        8.. if S::REGISTERS >= 32 => 8,
        4.. if S::REGISTERS >= 32 => 4,
        2.. => 2,
        _ => 1,
    }
}

/// See [`super::fill`].
///
/// # Safety
/// The same.
pub(super) unsafe fn fill(isa: Isa, x: Packed<'_>, linear: &Linear, range: Range<usize>, to: Tile, store: Store) {
    let w = &linear.weight;
    let row_bytes = w.cols() * w.dtype().bytes();
    let job = Job {
        x,
        w: w.bytes().as_ptr().add(range.start * row_bytes),
        left: (w.rows() - range.start) * row_bytes,
        bias: linear.bias.as_ref().map(|b| &b[range.clone()]),
        features: range.len(),
        to,
        store,
    };
    with_element!(w.dtype(), E => dispatch!(isa, S => job.run::<S, E>()));
}

/// What one task fills.
struct Job<'a> {
    x: Packed<'a>,
    /// Row 0 of the task's features.
    w: *const u8,
    /// Bytes from there to the end of the matrix.
    left: usize,
    bias: Option<&'a [f32]>,
    features: usize,
    to: Tile,
    store: Store,
}

/// The two accumulators of R rows and one feature.
type Accumulators<S, const R: usize> = [[<S as Simd>::V; R]; 2];

impl Job<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element>(&self) {
        let group = group(self.x.k);
        for first in (0..self.features).step_by(group) {
            let features = first..(first + group).min(self.features);
            let mut row = 0;
            while row < self.x.rows {
                let tile = row_tile::<S>(self.x.rows - row);
                match tile {
                    8 => self.tile::<S, E, 8>(row, features.clone()),
                    4 => self.tile::<S, E, 4>(row, features.clone()),
                    2 => self.tile::<S, E, 2>(row, features.clone()),
                    _ => self.tile::<S, E, 1>(row, features.clone()),
                }
                row += tile;
            }
        }
    }

    /// A group of features for rows `row .. row + R`.
    #[inline(always)]
    unsafe fn tile<S: Simd, E: Element, const R: usize>(&self, row: usize, features: Range<usize>) {
        let k = self.x.k;
        let x = self.x.x.as_ptr().cast::<f32>().add(row * k.next_multiple_of(LANES));
        let mut ahead = features.end * k * E::BYTES;
        let mut waiting = [const { MaybeUninit::<Accumulators<S, R>>::uninit() }; GROUP];
        let mut from = 0;
        loop {
            let len = span(R).min(k - from);
            for (feature, waiting) in features.clone().zip(&mut waiting) {
                let mut acc = if from == 0 { [[S::zero(); R]; 2] } else { waiting.assume_init() };
                let w = self.w.add((feature * k + from) * E::BYTES);
                // The first rows ask for the next group; the others, and the end of W, for what they read anyway.
                let asked = row == 0 && ahead < self.left;
                dots::<S, E, R>(&mut acc, x.add(from * R), w, if asked { self.w.add(ahead) } else { w }, len);
                ahead += len * E::BYTES;
                if from + len == k {
                    self.finish::<S, R>(row, feature, &acc);
                } else {
                    waiting.write(acc);
                }
            }
            from += len;
            if from == k {
                break;
            }
        }
    }

    /// Folds the accumulators of a feature into the output.
    #[inline(always)]
    unsafe fn finish<S: Simd, const R: usize>(&self, row: usize, feature: usize, acc: &Accumulators<S, R>) {
        for r in 0..R {
            let out = self.to.at.add((row + r) * self.to.stride + feature);
            *out = self.start(out, feature) + S::sum(S::add(acc[0][r], acc[1][r]));
        }
    }

    /// What the products are added to: the bias, and the output's old value where that is wanted.
    #[inline(always)]
    unsafe fn start(&self, out: *const f32, feature: usize) -> f32 {
        let bias = match self.bias {
            Some(bias) => *bias.get_unchecked(feature),
            None => 0.0,
        };
        match self.store {
            Store::Overwrite => bias,
            Store::Add => *out + bias,
        }
    }
}

/// Adds the products of `len` numbers of a row of W with the R rows of a tile of x; asks for as many bytes from `ahead`
/// on. `len` is even in vectors but at the end of k.
#[inline(always)]
unsafe fn dots<S: Simd, E: Element, const R: usize>(
    acc: &mut Accumulators<S, R>,
    x: *const f32,
    w: *const u8,
    ahead: *const u8,
    len: usize,
) {
    let [mut even, mut odd] = *acc;
    let mut i = 0;
    while i + 2 * LANES <= len {
        for line in (0..2 * LANES * E::BYTES).step_by(64) {
            prefetch_l2(ahead.wrapping_add(i * E::BYTES + line));
        }
        step::<S, R>(&mut even, E::load::<S>(w.add(i * E::BYTES)), x.add(i * R));
        step::<S, R>(&mut odd, E::load::<S>(w.add((i + LANES) * E::BYTES)), x.add((i + LANES) * R));
        i += 2 * LANES;
    }
    if i + LANES <= len {
        step::<S, R>(&mut even, E::load::<S>(w.add(i * E::BYTES)), x.add(i * R));
        i += LANES;
    }
    if i < len {
        step::<S, R>(&mut odd, E::load_n::<S>(w.add(i * E::BYTES), len - i), x.add(i * R));
    }
    *acc = [even, odd];
}

/// One vector of a row of W times the same vector of R rows of x.
#[inline(always)]
unsafe fn step<S: Simd, const R: usize>(acc: &mut [S::V; R], w: S::V, x: *const f32) {
    for (r, acc) in acc.iter_mut().enumerate() {
        *acc = S::fma(w, S::load(x.add(r * LANES)), *acc);
    }
}
