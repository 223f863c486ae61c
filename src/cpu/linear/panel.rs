//! The product of prefill: W widened to f32 a panel at a time, then the `gemm` crate.
//!
//! A panel of [`BLOCK`] features is the unit of work and of parallelism, whatever the number of threads, as the order of
//! the additions inside of `gemm` may depend on the shape it is given.
#![allow(unsafe_code)] // Raw pointers into the gemm crate, within checked shapes.

use std::ops::Range;

use gemm::Parallelism;

use super::{Input, Store};
use crate::cpu::element::{widen, with_element};
use crate::cpu::parallel::{Scratch, Tile, with_scratch};
use crate::cpu::simd::{Isa, dispatch};
use crate::model::Linear;

/// Output features of a panel.
pub(super) const BLOCK: usize = 128;

/// See [`super::fill`].
///
/// # Safety
/// The same.
pub(super) unsafe fn fill(isa: Isa, input: Input<'_>, linear: &Linear, range: Range<usize>, to: Tile, store: Store) {
    let w = &linear.weight;
    let row_bytes = w.cols() * w.dtype().bytes();
    let bytes = &w.bytes()[range.start * row_bytes..range.end * row_bytes];
    with_scratch(Scratch::Panel, range.len() * input.k, |panel| {
        let (from, into, n) = (bytes.as_ptr(), panel.as_mut_ptr(), panel.len());
        // SAFETY: n numbers on both sides; `to` is the caller's.
        unsafe {
            with_element!(w.dtype(), E => dispatch!(isa, S => widen::<S, E>(from, into, n)));
            multiply(input, panel, range.len(), to, store);
        }
    });
    if let Some(bias) = &linear.bias {
        // SAFETY: passed on.
        unsafe { add_bias(&bias[range], input.rows, to) }
    }
}

/// `to = x panel^T`, or `+=`.
///
/// # Safety
/// `to` is writable for `rows` x `features`; `panel` is `[features, k]`.
unsafe fn multiply(input: Input<'_>, panel: &[f32], features: usize, to: Tile, store: Store) {
    let k = input.k as isize;
    let add = store == Store::Add;
    // SAFETY: x is [rows, k], the panel [features, k] read as its transpose, `to` the caller's.
    unsafe {
        gemm::gemm(
            input.rows,
            features,
            input.k,
            to.at,
            1,
            to.stride as isize,
            add,
            input.x.as_ptr(),
            1,
            k,
            panel.as_ptr(),
            k,
            1,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// # Safety
/// `to` is writable for `rows` x `bias.len()`.
unsafe fn add_bias(bias: &[f32], rows: usize, to: Tile) {
    for row in 0..rows {
        for (i, b) in bias.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { *to.at.add(row * to.stride + i) += b };
        }
    }
}
