//! `y = W x + b` over rows of activations, W in the file's number type.
//!
//! - [`Path::Rows`], for decode: reads W once at the speed of memory ([`rows`]). A row's bits depend on that row alone.
//! - [`Path::Panel`], for prefill: widens W panel by panel and multiplies at the speed of the cores ([`panel`]).
//!
//! The output features are cut into blocks; a task fills its block for all rows. On neither path do the bits depend on
//! the number of threads: each output is computed by one task, in an order that the shapes fix.
#![allow(unsafe_code)] // Tasks fill disjoint columns of one output.

mod panel;
mod rows;
#[cfg(test)]
mod tests;

use std::ops::Range;

use super::parallel::{Scratch, Tile, for_blocks, with_scratch};
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::model::Linear;

/// How to multiply; the caller knows which phase it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Decode: a few rows, usually of different sequences.
    Rows,
    /// Prefill: a chunk of rows of one sequence.
    Panel,
}

/// One of several matrices that are applied to the same rows.
pub struct Part<'a> {
    /// `[n, k]`.
    pub linear: &'a Linear,
    /// `[rows, n]`, overwritten.
    pub out: &'a mut [f32],
}

/// What happens to the numbers that the output holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Store {
    Overwrite,
    Add,
}

/// `[rows, k]` activations of the caller.
#[derive(Clone, Copy)]
struct Input<'a> {
    x: &'a [f32],
    rows: usize,
    k: usize,
}

/// `out = W x + b` for each part, in one parallel region.
///
/// # Panics
/// If a shape does not fit.
pub fn project(isa: Isa, path: Path, x: &[f32], rows: usize, parts: &mut [Part<'_>]) {
    let Some(first) = parts.first() else { return };
    let input = Input::new(x, rows, first.linear);
    for part in parts.iter() {
        check(&input, part.linear, part.out);
    }
    let block = path.block(input.k);
    let n = |linear: &Linear| linear.weight.rows();
    let blocks: usize = parts.iter().map(|p| n(p.linear).div_ceil(block)).sum();
    let work = parts.iter().map(|p| n(p.linear)).sum::<usize>() * rows * input.k;
    // The mutable borrows become tiles for the time of the region: in an array, as nothing may be allocated for them.
    assert!(parts.len() <= MOST_PARTS, "linear: at most {MOST_PARTS} matrices share an input");
    let mut targets = [None; MOST_PARTS];
    for (target, part) in targets.iter_mut().zip(parts) {
        *target = Some((part.linear, Tile::new(part.out, n(part.linear))));
    }
    path.prepare(isa, input, |x| {
        for_blocks(blocks, work, &|index| {
            let (linear, tile, range) = find(&targets, index, block);
            // SAFETY: `check` and `find` keep the range within the part; each index is another part or range of columns.
            unsafe { fill(isa, x, linear, range.clone(), tile.right(range.start), Store::Overwrite) }
        })
    });
}

/// `out += W x + b`: a projection back into the residual stream.
///
/// # Panics
/// If a shape does not fit.
pub fn project_add(isa: Isa, path: Path, x: &[f32], rows: usize, linear: &Linear, out: &mut [f32]) {
    let input = Input::new(x, rows, linear);
    check(&input, linear, out);
    let (n, block) = (linear.weight.rows(), path.block(input.k));
    let tile = Tile::new(out, n);
    path.prepare(isa, input, |x| {
        for_blocks(n.div_ceil(block), n * rows * input.k, &|index| {
            let range = block_range(index, block, n);
            // SAFETY: the range is within n, and each index has other columns.
            unsafe { fill(isa, x, linear, range.clone(), tile.right(range.start), Store::Add) }
        })
    });
}

/// `out = silu(gate x) * (up x)`; a task computes both for its features.
///
/// # Panics
/// If a shape does not fit.
pub fn swiglu(isa: Isa, path: Path, x: &[f32], rows: usize, gate: &Linear, up: &Linear, out: &mut [f32]) {
    let input = Input::new(x, rows, gate);
    check(&input, gate, out);
    check(&input, up, out);
    let (n, block) = (gate.weight.rows(), path.block(input.k));
    let tile = Tile::new(out, n);
    path.prepare(isa, input, |x| {
        for_blocks(n.div_ceil(block), 2 * n * rows * input.k, &|index| {
            let range = block_range(index, block, n);
            let (width, gated) = (range.len(), tile.right(range.start));
            with_scratch(Scratch::Up, rows * width, |up_out| {
                let up_tile = Tile::new(up_out, width);
                // SAFETY: the range is within n, each index has other columns, and the second tile is this thread's own.
                unsafe {
                    fill(isa, x, gate, range.clone(), gated, Store::Overwrite);
                    fill(isa, x, up, range, up_tile, Store::Overwrite);
                    dispatch!(isa, S => silu_mul::<S>(gated, up_tile, rows, width));
                }
            });
        })
    });
}

/// The activations in the form that a path wants.
#[derive(Clone, Copy)]
enum Prepared<'a> {
    Rows(rows::Packed<'a>),
    Panel(Input<'a>),
}

impl Path {
    /// Prepares the activations, once for all tasks of a region.
    fn prepare<R>(self, isa: Isa, input: Input<'_>, run: impl FnOnce(Prepared<'_>) -> R) -> R {
        match self {
            Path::Rows => rows::with_packed(isa, input, |packed| run(Prepared::Rows(packed))),
            Path::Panel => run(Prepared::Panel(input)),
        }
    }

    /// Output features of a task, for rows of W of `k` numbers.
    fn block(self, k: usize) -> usize {
        match self {
            Path::Rows => rows::block(k),
            Path::Panel => panel::BLOCK,
        }
    }
}

impl<'a> Input<'a> {
    fn new(x: &'a [f32], rows: usize, linear: &Linear) -> Input<'a> {
        let k = linear.weight.cols();
        assert_eq!(x.len(), rows * k, "linear: x must be [rows, k] = [{rows}, {k}]");
        Input { x, rows, k }
    }
}

fn check(input: &Input<'_>, linear: &Linear, out: &[f32]) {
    let (n, k, rows) = (linear.weight.rows(), linear.weight.cols(), input.rows);
    assert_eq!(k, input.k, "linear: the matrices of one call must have the same input features");
    assert_eq!(out.len(), rows * n, "linear: out must be [rows, n] = [{rows}, {n}]");
    if let Some(bias) = &linear.bias {
        assert_eq!(bias.len(), n, "linear: bias must be [n]");
    }
}

/// Columns of block `index`.
fn block_range(index: usize, block: usize, n: usize) -> Range<usize> {
    index * block..((index + 1) * block).min(n)
}

/// Matrices of one [`project`]: q, k and v are the most there is.
const MOST_PARTS: usize = 4;

/// Matrix, output and columns of block `index`, counted through all parts.
fn find<'a>(
    targets: &[Option<(&'a Linear, Tile)>],
    mut index: usize,
    block: usize,
) -> (&'a Linear, Tile, Range<usize>) {
    for &(linear, tile) in targets.iter().flatten() {
        let n = linear.weight.rows();
        let blocks = n.div_ceil(block);
        if index < blocks {
            return (linear, tile, block_range(index, block, n));
        }
        index -= blocks;
    }
    unreachable!("a block beyond the last part")
}

/// Output features `range` of all rows, to `to`.
///
/// # Safety
/// `range` is within W, `to` is writable for `rows` x `range.len()`, and nobody else touches that while this runs.
unsafe fn fill(isa: Isa, x: Prepared<'_>, linear: &Linear, range: Range<usize>, to: Tile, store: Store) {
    // SAFETY: passed on.
    unsafe {
        match x {
            Prepared::Rows(x) => rows::fill(isa, x, linear, range, to, store),
            Prepared::Panel(x) => panel::fill(isa, x, linear, range, to, store),
        }
    }
}

/// `gate = silu(gate) * up` over a tile; silu(x) = x / (1 + e^-x).
///
/// # Safety
/// That of [`Simd`]; both tiles are `rows` x `width`, the first writable.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // Lane operations.
unsafe fn silu_mul<S: Simd>(gate: Tile, up: Tile, rows: usize, width: usize) {
    for row in 0..rows {
        let (g, u) = (gate.at.add(row * gate.stride), up.at.add(row * up.stride));
        let mut i = 0;
        while i + LANES <= width {
            S::store(g.add(i), silu_mul_lanes::<S>(S::load(g.add(i)), S::load(u.add(i))));
            i += LANES;
        }
        if i < width {
            let n = width - i;
            S::store_n(g.add(i), silu_mul_lanes::<S>(S::load_n(g.add(i), n), S::load_n(u.add(i), n)), n);
        }
    }
}

#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // Lane operations.
unsafe fn silu_mul_lanes<S: Simd>(gate: S::V, up: S::V) -> S::V {
    let denominator = S::add(S::splat(1.0), S::exp(S::sub(S::zero(), gate)));
    S::mul(S::div(gate, denominator), up)
}
