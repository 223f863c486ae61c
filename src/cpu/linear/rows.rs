//! The skinny product of decode: a few rows of x against all of W, as fast as memory delivers W.
//!
//! One output feature at a time over up to four rows of x, so that W is read as one sequential stream: on a Zen 5 with
//! two cores that reaches the rate of a plain read, where 4 or 8 interleaved streams reach 85 % of it, with software
//! prefetch or without.
//!
//! Order of additions for each (row, feature), whatever the number of rows: k in blocks of [`K_BLOCK`]; within one, two
//! accumulators of 16 lanes take the vectors in turn; their sum folds to a number that is added to the output.
#![allow(unsafe_code)] // Raw loads and stores within checked shapes.
#![allow(unsafe_op_in_unsafe_fn)] // Lane operations; the contract is that of `Simd`.

use std::ops::Range;

use super::{Input, Store};
use crate::cpu::element::{Element, with_element};
use crate::cpu::parallel::Tile;
use crate::cpu::simd::{Isa, LANES, Simd, dispatch};
use crate::model::Linear;

/// Numbers of k between two foldings of the accumulators: four rows of so much x take 32 KiB, which stay in the first
/// level cache while the features of a task go by.
const K_BLOCK: usize = 2048;

/// Bytes of x up to which all of k stays in the first level cache (48 KiB), so that blocks of k need no reuse.
const X_IN_L1: usize = 40 << 10;

/// Output features of a task: 64 KiB of W take two microseconds from memory, long against the 50 ns of a `join` and
/// short against the call; a multiple of 16, as a cache line of the output should have one writer.
pub(super) fn block(k: usize) -> usize {
    const NUMBERS: usize = 32 << 10;
    (NUMBERS / k.max(1)).next_multiple_of(LANES).clamp(LANES, 1024)
}

/// See [`super::fill`].
///
/// # Safety
/// The same.
pub(super) unsafe fn fill(isa: Isa, input: Input<'_>, linear: &Linear, range: Range<usize>, to: Tile, store: Store) {
    let w = &linear.weight;
    let job = Job {
        input,
        w: w.bytes().as_ptr().add(range.start * w.cols() * w.dtype().bytes()),
        bias: linear.bias.as_ref().map(|b| &b[range.clone()]),
        features: range.len(),
        to,
        store,
    };
    with_element!(w.dtype(), E => dispatch!(isa, S => job.run::<S, E>()));
}

/// What one task fills.
struct Job<'a> {
    input: Input<'a>,
    /// Row 0 of the task's features.
    w: *const u8,
    bias: Option<&'a [f32]>,
    features: usize,
    to: Tile,
    store: Store,
}

impl Job<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element>(&self) {
        let mut row = 0;
        while self.input.rows - row >= 4 && S::REGISTERS >= 32 {
            self.row_tile::<S, E, 4>(row);
            row += 4;
        }
        while self.input.rows - row >= 2 {
            self.row_tile::<S, E, 2>(row);
            row += 2;
        }
        if row < self.input.rows {
            self.row_tile::<S, E, 1>(row);
        }
    }

    /// All features for rows `row .. row + R`. The order of the loops is free: a feature meets its blocks of k in
    /// ascending order either way.
    #[inline(always)]
    unsafe fn row_tile<S: Simd, E: Element, const R: usize>(&self, row: usize) {
        let k = self.input.k;
        // Blocks of k on the outside only where they save loads of x: it breaks the stream of W.
        let span = if R * k * 4 <= X_IN_L1 { k.max(1) } else { K_BLOCK };
        let mut from = 0;
        loop {
            let end = (from + span).min(k);
            for feature in 0..self.features {
                self.feature::<S, E, R>(row, feature, from..end);
            }
            from = end;
            if from >= k {
                break;
            }
        }
    }

    /// Adds the blocks of `span` to one feature of R rows.
    #[inline(always)]
    unsafe fn feature<S: Simd, E: Element, const R: usize>(&self, row: usize, feature: usize, span: Range<usize>) {
        let k = self.input.k;
        let out = self.to.at.add(row * self.to.stride + feature);
        let mut sum = [0f32; R];
        for (r, sum) in sum.iter_mut().enumerate() {
            *sum = if span.start == 0 {
                self.start(out.add(r * self.to.stride), feature)
            } else {
                *out.add(r * self.to.stride)
            };
        }
        let mut from = span.start;
        while from < span.end {
            let len = K_BLOCK.min(span.end - from);
            let x = self.input.x.as_ptr().add(row * k + from);
            let part = dots::<S, E, R>(x, k, self.w.add((feature * k + from) * E::BYTES), len);
            for r in 0..R {
                sum[r] += part[r];
            }
            from += len;
        }
        for (r, sum) in sum.iter().enumerate() {
            *out.add(r * self.to.stride) = *sum;
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

/// Dot products of one row of W with R rows of x, `stride` apart, over `len` numbers.
#[inline(always)]
unsafe fn dots<S: Simd, E: Element, const R: usize>(
    x: *const f32,
    stride: usize,
    w: *const u8,
    len: usize,
) -> [f32; R] {
    let (mut even, mut odd) = ([S::zero(); R], [S::zero(); R]);
    let mut i = 0;
    while i + 2 * LANES <= len {
        let (w0, w1) = (E::load::<S>(w.add(i * E::BYTES)), E::load::<S>(w.add((i + LANES) * E::BYTES)));
        for r in 0..R {
            let x = x.add(r * stride + i);
            even[r] = S::fma(w0, S::load(x), even[r]);
            odd[r] = S::fma(w1, S::load(x.add(LANES)), odd[r]);
        }
        i += 2 * LANES;
    }
    if i + LANES <= len {
        let w = E::load::<S>(w.add(i * E::BYTES));
        for r in 0..R {
            even[r] = S::fma(w, S::load(x.add(r * stride + i)), even[r]);
        }
        i += LANES;
    }
    if i < len {
        let w = E::load_n::<S>(w.add(i * E::BYTES), len - i);
        for r in 0..R {
            odd[r] = S::fma(w, S::load_n(x.add(r * stride + i), len - i), odd[r]);
        }
    }
    let mut sums = [0f32; R];
    for r in 0..R {
        sums[r] = S::sum(S::add(even[r], odd[r]));
    }
    sums
}
