//! Copies of short rows from anywhere in memory.
//!
//! A row of 512 bytes is eight cache lines: too short for the hardware's stream prefetcher, so a plain loop waits for
//! memory at every row. So rows are asked for ahead, and twice:
//!
//! ```text
//! rows known   │ copy │ .... │ ask again │ ............ │ ask │ found, not asked for yet │
//!              └──────┴ near ┘           │              │     │                          │
//!              └───────────────── ahead ────────────────┘     └───────── BATCH ──────────┘
//! ```
//!
//! What bounds it on a Zen 5, whose figures these are:
//!
//! - A prefetch is a hint. Up to a quarter are dropped while many lines are on their way, and a line that was dropped is
//!   missed when it is copied. Asking again took the copy of rows out of 64 MiB from 18.3 to 13.6 ns a row.
//! - A prefetch that waits for a page walk keeps everything behind it from retiring. So the walks that overlap are those
//!   of the rows that the core has in sight: every instruction per row costs. Rows are therefore found many at a time in
//!   a loop that does nothing else (1 ns a row), and the loop that follows runs over plain pointers, without branches
//!   where the length is one of those that models have. With rows found 32 at a time through an iterator's branches it
//!   took a tenth longer; a bare loop over an array of indices takes up to 7 % less.
#![allow(unsafe_code)] // Intrinsics and raw pointers.
#![allow(unsafe_op_in_unsafe_fn)] // Lane operations; the contract is that of `Line`.

use std::arch::x86_64::*;

use crate::cpu::simd::{Avx2, Avx512, Isa, Portable, dispatch};

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Most rows that are asked for ahead.
const MAX_AHEAD: usize = 64;

/// Most rows that are found at a time: as fast as all at once; 64 are 2 % slower, 32 are 5 %.
pub(crate) const BATCH: usize = 128;

/// Rows that are asked for, and then copied, together: 4 % faster than one by one; four are slower again.
const PAIR: usize = 2;

/// Most bytes of a row that are asked for: of a longer one the hardware finds the rest.
const MAX_ASKED: usize = 4096;

/// How the staging block is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stores {
    /// Through the caches: for a reader on the same cores that comes right afterwards.
    Temporal,
    /// Past the caches: for a device that reads the block from memory, and for blocks larger than the caches.
    NonTemporal,
}

/// One row's way.
#[derive(Clone, Copy)]
pub(crate) struct Move {
    pub(crate) from: *const u8,
    pub(crate) to: *mut u8,
}

impl Move {
    /// Fills what is not in use.
    pub(crate) const NOWHERE: Move = Move { from: std::ptr::null(), to: std::ptr::null_mut() };
}

/// Copies rows of `row_bytes` each, and asks for the row that is `ahead` rows further on while it does. `find` writes the
/// ways of the next rows to the front of a slice of [`BATCH`], and says how many; 0 if there are no more. It must inline.
///
/// # Safety
/// Every `from` is valid for reads and every `to` for writes of `row_bytes` bytes, nobody else accesses the latter, and
/// the two do not overlap. After [`Stores::NonTemporal`] this thread calls [`fence`] before it tells anybody.
#[inline(always)]
pub(crate) unsafe fn copy_rows(
    isa: Isa,
    stores: Stores,
    find: impl FnMut(&mut [Move]) -> usize,
    row_bytes: usize,
    ahead: usize,
) {
    match stores {
        // SAFETY: the contract is the same.
        Stores::Temporal => dispatch!(isa, S => unsafe { rows_of::<S, false>(find, row_bytes, ahead) }),
        // SAFETY: the contract is the same.
        Stores::NonTemporal => dispatch!(isa, S => unsafe { rows_of::<S, true>(find, row_bytes, ahead) }),
    }
}

/// Puts the stores of this thread in order: non-temporal ones are not ordered by a release store.
pub(crate) fn fence(stores: Stores) {
    if stores == Stores::NonTemporal {
        // SAFETY: SSE is part of x86-64.
        unsafe { _mm_sfence() }
    }
}

/// Loads and stores of a whole line.
///
/// # Safety
/// Pointers are valid for 64 bytes, and the implementing set's features are switched on.
trait Line {
    /// Whether the registers hold eight lines.
    const WIDE: bool;
    type V: Copy;
    unsafe fn load(p: *const u8) -> Self::V;
    unsafe fn store(p: *mut u8, v: Self::V);
    /// Non-temporal; `p` is aligned to 64 bytes.
    unsafe fn stream(p: *mut u8, v: Self::V);
}

impl Line for Avx512 {
    const WIDE: bool = true;
    type V = __m512i;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn store(p: *mut u8, v: __m512i) {
        _mm512_storeu_si512(p.cast(), v);
    }
    #[inline(always)]
    unsafe fn stream(p: *mut u8, v: __m512i) {
        _mm512_stream_si512(p.cast(), v);
    }
}

impl Line for Avx2 {
    const WIDE: bool = true;
    type V = [__m256i; 2];
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::V {
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())]
    }
    #[inline(always)]
    unsafe fn store(p: *mut u8, v: Self::V) {
        _mm256_storeu_si256(p.cast(), v[0]);
        _mm256_storeu_si256(p.add(32).cast(), v[1]);
    }
    #[inline(always)]
    unsafe fn stream(p: *mut u8, v: Self::V) {
        _mm256_stream_si256(p.cast(), v[0]);
        _mm256_stream_si256(p.add(32).cast(), v[1]);
    }
}

/// SSE2, which every x86-64 has.
impl Line for Portable {
    const WIDE: bool = false;
    type V = [__m128i; 4];
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::V {
        let quarter = |i: usize| _mm_loadu_si128(p.add(16 * i).cast());
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }
    #[inline(always)]
    unsafe fn store(p: *mut u8, v: Self::V) {
        for (i, v) in v.into_iter().enumerate() {
            _mm_storeu_si128(p.add(16 * i).cast(), v);
        }
    }
    #[inline(always)]
    unsafe fn stream(p: *mut u8, v: Self::V) {
        for (i, v) in v.into_iter().enumerate() {
            _mm_stream_si128(p.add(16 * i).cast(), v);
        }
    }
}

/// The copy for rows of this length.
#[inline(always)]
unsafe fn rows_of<L: Line, const STREAM: bool>(find: impl FnMut(&mut [Move]) -> usize, row_bytes: usize, ahead: usize) {
    match row_bytes {
        // Pairs of 64 and of 128 numbers of 16 bits.
        256 => rows::<L, STREAM>(find, 256, ahead),
        512 => rows::<L, STREAM>(find, 512, ahead),
        _ => rows::<L, STREAM>(find, row_bytes, ahead),
    }
}

#[inline(always)]
unsafe fn rows<L: Line, const STREAM: bool>(
    mut find: impl FnMut(&mut [Move]) -> usize,
    row_bytes: usize,
    ahead: usize,
) {
    let ahead = ahead.clamp(1, MAX_AHEAD);
    let near = ahead / 3;
    // The first `n` are known and not copied; of them the first `ahead` have been asked for.
    let mut known = [Move::NOWHERE; MAX_AHEAD + PAIR + BATCH];
    let mut n = 0;
    loop {
        let found = find(&mut known[n..n + BATCH]);
        if found == 0 {
            break;
        }
        let before = n;
        n += found;
        for row in known.iter().take(n.min(ahead)).skip(before) {
            ask(row.from, row_bytes);
        }
        let copied = n.saturating_sub(ahead) / PAIR * PAIR;
        let (rows, _) = known[..copied].as_chunks::<PAIR>();
        let ((again, _), (new, _)) = (known[near..].as_chunks::<PAIR>(), known[ahead..].as_chunks::<PAIR>());
        for ((rows, again), new) in rows.iter().zip(again).zip(new) {
            for row in new {
                ask(row.from, row_bytes);
            }
            for row in again {
                ask(row.from, row_bytes);
            }
            for &row in rows {
                copy_row::<L, STREAM>(row, row_bytes);
            }
        }
        known.copy_within(copied..n, 0);
        n -= copied;
    }
    for i in 0..n {
        ask(known[(i + near).min(n - 1)].from, row_bytes);
        copy_row::<L, STREAM>(known[i], row_bytes);
    }
}

/// Asks for the lines of a row, into the first-level cache alone: no other has use for a row that is copied once. (A
/// Zen 5 drops half of the requests for other levels alone.) Never faults.
#[inline(always)]
fn ask(row: *const u8, row_bytes: usize) {
    let bytes = row_bytes.min(MAX_ASKED);
    let mut at = 0;
    while at + 8 * LINE <= bytes {
        for i in 0..8 {
            ask_line(row.wrapping_add(at + i * LINE));
        }
        at += 8 * LINE;
    }
    while at < bytes {
        ask_line(row.wrapping_add(at));
        at += LINE;
    }
}

/// Asks for the line at `p`.
#[inline(always)]
fn ask_line(p: *const u8) {
    // SAFETY: SSE is part of x86-64; a prefetch of an invalid address is ignored.
    unsafe { _mm_prefetch::<_MM_HINT_NTA>(p.cast()) }
}

/// Copies one row.
#[inline(always)]
unsafe fn copy_row<L: Line, const STREAM: bool>(row: Move, row_bytes: usize) {
    // Streaming stores need aligned lines: up to the first one the bytes go the usual way. Most rows begin with one,
    // and their length is still known when compiled.
    let head = if STREAM { row.to.align_offset(LINE).min(row_bytes) } else { 0 };
    if head == 0 {
        return copy_aligned::<L, STREAM>(row, row_bytes);
    }
    std::ptr::copy_nonoverlapping(row.from, row.to, head);
    copy_aligned::<L, STREAM>(Move { from: row.from.add(head), to: row.to.add(head) }, row_bytes - head);
}

/// Copies a row that goes to the beginning of a line, or anywhere without `STREAM`.
#[inline(always)]
unsafe fn copy_aligned<L: Line, const STREAM: bool>(row: Move, row_bytes: usize) {
    let mut at = 0;
    // A row of 128 pairs of 16 bits is eight lines, one of 64 is four.
    while L::WIDE && at + 8 * LINE <= row_bytes {
        copy_lines::<L, STREAM, 8>(row, at);
        at += 8 * LINE;
    }
    while at + 4 * LINE <= row_bytes {
        copy_lines::<L, STREAM, 4>(row, at);
        at += 4 * LINE;
    }
    while at + LINE <= row_bytes {
        copy_lines::<L, STREAM, 1>(row, at);
        at += LINE;
    }
    if at < row_bytes {
        std::ptr::copy_nonoverlapping(row.from.add(at), row.to.add(at), row_bytes - at);
    }
}

/// Copies `N` lines from byte `at` of a row on: loads first, then stores. Line by line, the copy took longer.
#[inline(always)]
unsafe fn copy_lines<L: Line, const STREAM: bool, const N: usize>(row: Move, at: usize) {
    let lines: [L::V; N] = std::array::from_fn(
        #[inline(always)]
        |i| L::load(row.from.add(at + i * LINE)),
    );
    for (i, line) in lines.into_iter().enumerate() {
        let to = row.to.add(at + i * LINE);
        if STREAM { L::stream(to, line) } else { L::store(to, line) }
    }
}
