//! The skinny product of decode: a few rows of x against all of W, as fast as memory delivers W.
//!
//! What it takes, measured on a Zen 5 core that reads 36 GB/s:
//! - One output feature at a time over up to four rows of x, so that W is read as one sequential stream. Two or four
//!   features side by side fall to 11-15 GB/s.
//! - W of the group of features after this one is asked for into the second-level cache, line by line in the order of
//!   memory, while this one is multiplied: 36, 34 and 31 GB/s at 1, 2 and 4 rows against 30, 28 and 24 without.
//! - x stays in the first-level cache: where all of k does not fit, a group of features goes by for one block of k
//!   after the other. The prefetch makes up for the broken stream (k = 8192, 2 rows: 27 GB/s against 11).
//!
//! Order of additions for each (row, feature), whatever the number of rows: k in blocks of [`K_BLOCK`]; within one, two
//! accumulators of 16 lanes take the vectors in turn; their sum folds to a number that is added to the output.
#![allow(unsafe_code)] // Raw loads and stores within checked shapes.
#![allow(unsafe_op_in_unsafe_fn)] // Lane operations; the contract is that of `Simd`.

use std::ops::Range;

use super::{Input, Store};
use crate::cpu::element::{Element, with_element};
use crate::cpu::parallel::{Aligned, Tile, with_aligned};
use crate::cpu::simd::{Isa, LANES, Simd, dispatch, prefetch_l2};
use crate::model::Linear;

/// Numbers of k between two foldings of the accumulators: four rows of so much x take 16 KiB.
const K_BLOCK: usize = 1024;

/// Bytes of a tile of x that stay in the first-level cache (48 KiB) while W streams through it.
const X_IN_L1: usize = 16 << 10;

/// Output features of a group, the distance of the prefetch: 64 KiB of bf16, and at least 8 features to one load of x.
/// Two groups and x share the second-level cache (1 MiB).
fn group(k: usize) -> usize {
    const NUMBERS: usize = 32 << 10;
    (NUMBERS / k.max(1)).clamp(8, 1024)
}

/// Output features of a task: a group takes two microseconds from memory, long against the 50 ns of a `join` and short
/// against the call; a multiple of 16, as a cache line of the output should have one writer.
pub(super) fn block(k: usize) -> usize {
    group(k).next_multiple_of(LANES)
}

/// Rows of x, packed for [`fill`]: tiles of 4, 2 and 1 rows; in a tile, vector after vector of k, the rows' vectors side
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

/// Rows of the next tile when `left` are left: with two accumulators for each row, four rows take 8 of AVX-512's 32
/// registers, and 16 of AVX2's, which has no more. Tiles of eight are no faster.
#[inline(always)]
fn row_tile<S: Simd>(left: usize) -> usize {
    match left {
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

/// Features of the task and numbers of k that are multiplied together, and how far on the prefetch is.
struct Piece {
    features: Range<usize>,
    k: Range<usize>,
    /// Offset of the first byte to ask for.
    ahead: usize,
}

impl Job<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element>(&self) {
        let (k, group) = (self.x.k, group(self.x.k));
        // The bits are the same either way: a feature meets its blocks of k in ascending order.
        let span = if self.x.rows.min(4) * k * 4 <= X_IN_L1 { k.max(1) } else { K_BLOCK };
        for first in (0..self.features).step_by(group) {
            let features = first..(first + group).min(self.features);
            let mut ahead = (first + group) * k * E::BYTES;
            let mut from = 0;
            loop {
                let k = from..(from + span).min(k);
                let bytes = features.len() * k.len() * E::BYTES;
                from += span;
                self.piece::<S, E>(&Piece { features: features.clone(), k, ahead });
                ahead += bytes;
                if from >= self.x.k {
                    break;
                }
            }
        }
    }

    /// A piece for all rows.
    #[inline(always)]
    unsafe fn piece<S: Simd, E: Element>(&self, piece: &Piece) {
        let mut row = 0;
        while row < self.x.rows {
            let tile = row_tile::<S>(self.x.rows - row);
            match tile {
                4 => self.tile::<S, E, 4>(row, piece),
                2 => self.tile::<S, E, 2>(row, piece),
                _ => self.tile::<S, E, 1>(row, piece),
            }
            row += tile;
        }
    }

    /// A piece for rows `row .. row + R`.
    #[inline(always)]
    unsafe fn tile<S: Simd, E: Element, const R: usize>(&self, row: usize, piece: &Piece) {
        let (k, span) = (self.x.k, &piece.k);
        let x = self.x.x.as_ptr().cast::<f32>().add(row * k.next_multiple_of(LANES));
        let mut ahead = piece.ahead;
        for feature in piece.features.clone() {
            let out = self.to.at.add(row * self.to.stride + feature);
            let mut sums = [0f32; R];
            for (r, sum) in sums.iter_mut().enumerate() {
                let out = out.add(r * self.to.stride);
                *sum = if span.start == 0 { self.start(out, feature) } else { *out };
            }
            for from in span.clone().step_by(K_BLOCK) {
                let len = K_BLOCK.min(span.end - from);
                let w = self.w.add((feature * k + from) * E::BYTES);
                // The first rows ask for all of it; the others, and the end of W, for what they are reading anyway.
                let asked = row == 0 && ahead < self.left;
                let part = dots::<S, E, R>(x.add(from * R), w, if asked { self.w.wrapping_add(ahead) } else { w }, len);
                for (sum, part) in sums.iter_mut().zip(part) {
                    *sum += part;
                }
                ahead += len * E::BYTES;
            }
            for (r, sum) in sums.iter().enumerate() {
                *out.add(r * self.to.stride) = *sum;
            }
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

/// Dot products of a row of W with the R rows of a tile of x over `len` numbers; asks for as many bytes from `ahead` on.
#[inline(always)]
unsafe fn dots<S: Simd, E: Element, const R: usize>(
    x: *const f32,
    w: *const u8,
    ahead: *const u8,
    len: usize,
) -> [f32; R] {
    let (mut even, mut odd) = ([S::zero(); R], [S::zero(); R]);
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
    let mut sums = [0f32; R];
    for (r, sum) in sums.iter_mut().enumerate() {
        *sum = S::sum(S::add(even[r], odd[r]));
    }
    sums
}

/// One vector of a row of W times the same vector of R rows of x.
#[inline(always)]
unsafe fn step<S: Simd, const R: usize>(acc: &mut [S::V; R], w: S::V, x: *const f32) {
    for (r, acc) in acc.iter_mut().enumerate() {
        *acc = S::fma(w, S::load(x.add(r * LANES)), *acc);
    }
}
