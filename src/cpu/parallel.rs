//! Work in numbered blocks over rayon's current pool, and what a task needs for it.
#![allow(unsafe_code)] // Tasks write disjoint parts of one output.

use std::cell::RefCell;
use std::ops::Range;

/// Multiply-adds below which a second thread costs more than it saves: waking one takes several microseconds, and a
/// core does 2^16 multiply-adds in about 2.
pub(crate) const SERIAL_WORK: usize = 1 << 16;

/// Runs `run(0) .. run(blocks - 1)`, on the calling thread alone if `work` multiply-adds in total are few.
///
/// Halves by `rayon::join`, which allocates nothing: a thread walks its half in ascending order, so it reads weights
/// as one long stream, and an idle thread steals the largest piece that is left.
pub(crate) fn for_blocks(blocks: usize, work: usize, run: &(impl Fn(usize) + Sync)) {
    if work < SERIAL_WORK || blocks < 2 {
        return (0..blocks).for_each(run);
    }
    halve(0..blocks, run);
}

fn halve(range: Range<usize>, run: &(impl Fn(usize) + Sync)) {
    if range.len() == 1 {
        return run(range.start);
    }
    let mid = range.start + range.len() / 2;
    rayon::join(|| halve(range.start..mid, run), || halve(mid..range.end, run));
}

/// The buffers of a thread: one per purpose, as two may be lent at once.
#[derive(Clone, Copy)]
pub(crate) enum Scratch {
    /// A panel of weights widened to f32.
    Panel,
    /// The `up` half of a SwiGLU block.
    Up,
}

thread_local! {
    static SCRATCH: [RefCell<Vec<f32>>; 2] = const { [RefCell::new(Vec::new()), RefCell::new(Vec::new())] };
}

/// Lends `len` floats of this thread, with anything in them; they are allocated once and grow. `run` must not enter
/// rayon, which might run another task on this thread that wants them too.
pub(crate) fn with_scratch<R>(which: Scratch, len: usize, run: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with(|scratch| {
        let mut floats = scratch[which as usize].borrow_mut();
        if floats.len() < len {
            floats.resize(len, 0.0);
        }
        run(&mut floats[..len])
    })
}

/// A cache line of floats.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Aligned(pub(crate) [f32; 16]);

thread_local! {
    static ALIGNED: RefCell<Vec<Aligned>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` lines of this thread, with anything in them. `run` may enter rayon: a task that comes to run on this
/// thread meanwhile finds no buffer here and makes its own.
pub(crate) fn with_aligned<R>(len: usize, run: impl FnOnce(&mut [Aligned]) -> R) -> R {
    let mut lines = ALIGNED.take();
    if lines.len() < len {
        lines.resize(len, Aligned([0.0; 16]));
    }
    let result = run(&mut lines[..len]);
    ALIGNED.set(lines);
    result
}

/// A tile of a row-major f32 matrix, written by one task at a time.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// Row 0, column 0.
    pub(crate) at: *mut f32,
    /// Floats from one row to the next.
    pub(crate) stride: usize,
}

// SAFETY: a pointer and a number; those who write through it promise in their own `# Safety` to stay apart.
unsafe impl Send for Tile {}
// SAFETY: as above.
unsafe impl Sync for Tile {}

impl Tile {
    /// A matrix of rows of `stride` floats.
    pub(crate) fn new(matrix: &mut [f32], stride: usize) -> Tile {
        Tile { at: matrix.as_mut_ptr(), stride }
    }

    /// The tile that begins `cols` columns further right.
    pub(crate) fn right(self, cols: usize) -> Tile {
        Tile { at: self.at.wrapping_add(cols), ..self }
    }
}
