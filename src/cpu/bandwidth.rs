//! The limit of decode: how fast this machine reads memory.
#![allow(unsafe_code)] // Raw loads.
#![allow(unsafe_op_in_unsafe_fn)] // Lane operations; the contract is that of `Simd`.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use super::parallel::{SERIAL_WORK, for_blocks};
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::device::map::Bytes;
use crate::error::{Error, Result};

/// Bytes that are read: 1 GiB, far more than any cache (the largest last-level caches of one socket have 1.1 GiB, but
/// a thread's share of those is small).
const BUFFER: usize = 1 << 30;

/// Bytes of a task.
const BLOCK: usize = 1 << 20;

/// Bytes that are timed together: about a millisecond.
const SLICE: usize = 64 << 20;

/// Passes over the buffer; the best slice counts, as other users of the machine can only slow one down.
const PASSES: usize = 6;

/// Gigabytes (10^9) per second that `threads` threads read from memory: each sums f32 in one sequential stream of
/// 512 bytes per step. Neither software prefetch nor more streams improved on it on a Zen 5. Takes about a second.
///
/// # Errors
/// If 1 GiB or the threads are not to be had.
pub fn read_gbps(threads: usize) -> Result<f64> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| Error::Usage(format!("{threads} threads: {e}")))?;
    pool.install(|| {
        let reader = Reader::new()?;
        let slices = (0..PASSES).flat_map(|_| reader.buffer.chunks_exact(SLICE));
        let best = slices.map(seconds).fold(f64::INFINITY, f64::min);
        Ok(SLICE as f64 / best / 1e9)
    })
}

/// Memory to read, for comparing something with a plain read of as many bytes at the same moment: on a shared machine,
/// the bandwidth of a second ago says little.
pub struct Reader {
    buffer: Bytes,
}

impl Reader {
    /// A buffer of 1 GiB, filled by the threads of the current rayon pool, so that its pages are spread over the memory
    /// next to them.
    ///
    /// # Errors
    /// If 1 GiB is not to be had.
    pub fn new() -> Result<Reader> {
        let fill = |b: &mut [u8]| b.par_chunks_mut(BLOCK).for_each(|b| b.fill(1));
        Ok(Reader { buffer: Bytes::filled(BUFFER, fill)? })
    }

    /// Seconds that the current rayon pool takes to read `bytes`, in whole slices of 64 MiB and scaled to the rest.
    pub fn seconds(&self, bytes: usize) -> f64 {
        let slices = bytes.div_ceil(SLICE);
        let all: f64 = self.buffer.chunks_exact(SLICE).cycle().take(slices).map(seconds).sum();
        all * bytes as f64 / (slices * SLICE) as f64
    }
}

/// Reads some blocks.
fn seconds(bytes: &[u8]) -> f64 {
    let isa = Isa::detect();
    let start = Instant::now();
    for_blocks(bytes.len() / BLOCK, SERIAL_WORK, &|i| {
        let block = &bytes[i * BLOCK..(i + 1) * BLOCK];
        // SAFETY: reads the block only.
        black_box(dispatch!(isa, S => unsafe { sum::<S>(block) }));
    });
    start.elapsed().as_secs_f64()
}

/// Sum of the f32 in whole steps of 512 bytes.
#[inline(always)]
unsafe fn sum<S: Simd>(bytes: &[u8]) -> f32 {
    const STREAMS: usize = 8;
    let mut sums = [S::zero(); STREAMS];
    for step in bytes.chunks_exact(STREAMS * LANES * 4) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = S::add(*sum, S::load_f32(step.as_ptr().add(i * LANES * 4)));
        }
    }
    let mut total = 0.0;
    for sum in sums {
        total += S::sum(sum);
    }
    total
}
