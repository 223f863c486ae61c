//! What a GPU and a thread of the host tell each other without the driver: words in pinned memory, and a queue for the
//! answers.
//!
//! ```text
//! GPU, once a layer                      host
//! wanted pairs, then bell := 1 + n   →   polls the bell, sets it to 0
//!                                        gathers n pairs into a staging block
//! waits until flag = 1               ←   copies the block, then flag := 1, in a queue of its own
//! scatters the pairs, then flag := 2 →   the block is free again
//! ```
//!
//! A word takes about a microsecond from one side to the other, a callback of the driver 26 (docs/design.md).
#![allow(unsafe_code)] // Memory that both sides write, and calls into the driver.

use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use super::bindings::abi::specache_wanted;
use super::bindings::driver::CUstream;
use super::driver::Driver;
use super::memory::PinnedMemory;
use crate::error::Result;

/// Staging blocks: one is copied while the next one is filled.
pub(crate) const BLOCKS: usize = 2;

/// CU_STREAM_NON_BLOCKING, as the other queues have it.
const NON_BLOCKING: u32 = 1;
/// CU_STREAM_WRITE_VALUE_DEFAULT: everything before is seen before the value.
pub(super) const BEHIND_ALL: u32 = 0;

/// Why what somebody waits for could not be brought, once that is known.
pub(crate) type Failure = Arc<OnceLock<String>>;

/// How large a [`Mailbox`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MailboxSize {
    /// Letters that can be under way at once: a bell and a flag each.
    pub letters: usize,
    /// Pairs of all of them.
    pub pairs: usize,
    /// Bytes of a staging block.
    pub block_bytes: usize,
}

/// Values of a flag: what was wanted has come; the GPU has taken it. 0 in between.
pub(crate) const HAS_COME: u32 = 1;
pub(crate) const TAKEN: u32 = 2;

/// The memory of it. Letters are numbered; what one of them wants begins at a place of `wanted` that both sides know.
pub(crate) struct Mailbox {
    memory: PinnedMemory,
    size: MailboxSize,
    /// Why something that was asked for could not be brought: the first time.
    failure: Failure,
}

impl Mailbox {
    /// Nothing is under way.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn new(driver: &Arc<Driver>, size: MailboxSize) -> Result<Mailbox> {
        let bytes = size.pairs * size_of::<specache_wanted>() + BLOCKS * size.block_bytes + size.letters * 8;
        Ok(Mailbox { memory: PinnedMemory::new(driver, bytes)?, size, failure: Arc::default() })
    }

    /// Where pair `at` of the wanted ones lies.
    pub(crate) fn wanted(&self, at: usize) -> u64 {
        self.memory.address() + (BLOCKS * self.size.block_bytes + at * size_of::<specache_wanted>()) as u64
    }

    /// Where a letter's bell lies.
    pub(crate) fn bell(&self, letter: usize) -> u64 {
        self.wanted(self.size.pairs) + 8 * letter as u64
    }

    /// Where a letter's flag lies.
    pub(crate) fn flag(&self, letter: usize) -> u64 {
        self.bell(letter) + 4
    }

    fn word(&self, address: u64) -> &AtomicU32 {
        let at = (address - self.memory.address()) as usize;
        assert!(at + 4 <= self.memory.bytes().len() && at.is_multiple_of(4), "a word of the mailbox");
        // SAFETY: within the memory, aligned, and only ever accessed as an atomic word, by the GPU too.
        unsafe { &*(address as *const AtomicU32) }
    }

    /// How many pairs the GPU wants by this letter, once it has written them.
    pub(crate) fn rung(&self, letter: usize) -> Option<usize> {
        (self.word(self.bell(letter)).load(Ordering::Acquire) as usize).checked_sub(1)
    }

    /// The letter is read: the next ring is another one.
    pub(crate) fn open(&self, letter: usize) {
        self.word(self.bell(letter)).store(0, Ordering::Relaxed);
        self.word(self.flag(letter)).store(0, Ordering::Relaxed);
    }

    /// Whether the GPU has taken what came by a letter.
    pub(crate) fn is_taken(&self, letter: usize) -> bool {
        self.word(self.flag(letter)).load(Ordering::Acquire) == TAKEN
    }

    /// Lets the GPU go on, whatever has come.
    pub(crate) fn raise(&self, letter: usize) {
        self.word(self.flag(letter)).store(HAS_COME, Ordering::Release);
    }

    /// The `n` pairs from `at` on that the GPU wants.
    ///
    /// # Safety
    /// The bell of their letter has rung, and its flag has not been raised since.
    ///
    /// # Panics
    /// If there are not so many.
    pub(crate) unsafe fn read_wanted(&self, at: usize, n: usize) -> &[specache_wanted] {
        assert!(at + n <= self.size.pairs, "{n} pairs from {at} of {} in the mailbox", self.size.pairs);
        // SAFETY: within the memory, aligned to 8; the GPU writes there again only behind the flag.
        unsafe { std::slice::from_raw_parts(self.wanted(at) as *const specache_wanted, n) }
    }

    /// Bytes of a staging block.
    ///
    /// # Safety
    /// No copy out of them is under way, and nobody else has them.
    ///
    /// # Panics
    /// If the block has not so many.
    #[allow(clippy::mut_from_ref)] // Blocks are lent one by one, as the contract says.
    pub(crate) unsafe fn block(&self, block: usize, range: std::ops::Range<usize>) -> &mut [u8] {
        assert!(block < BLOCKS && range.end <= self.size.block_bytes, "bytes {range:?} of staging block {block}");
        let at = self.memory.address() + (block * self.size.block_bytes + range.start) as u64;
        // SAFETY: within the memory; lent to one caller at a time, by the contract.
        unsafe { std::slice::from_raw_parts_mut(at as *mut u8, range.len()) }
    }

    /// Notes that something could not be brought.
    pub(crate) fn fail(&self, why: String) {
        // Only the first counts.
        let _ = self.failure.set(why);
    }

    /// Why something could not be brought, once that is so: what the GPU has computed with it is of no use.
    pub(crate) fn failure(&self) -> Failure {
        self.failure.clone()
    }
}

/// A queue of the thread that answers, beside those of the passes, which wait for it.
pub(crate) struct Answers {
    driver: Arc<Driver>,
    stream: CUstream,
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Answers {}

impl Answers {
    /// An empty queue.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn new(driver: &Arc<Driver>) -> Result<Answers> {
        driver.enter();
        let mut stream = ptr::null_mut();
        // SAFETY: writes one handle.
        let result = unsafe { driver.api.cuStreamCreateWithPriority(&mut stream, NON_BLOCKING, -1) };
        driver.check("cuStreamCreateWithPriority", result)?;
        Ok(Answers { driver: driver.clone(), stream })
    }

    /// The calling thread is the one that answers from now on.
    pub(crate) fn enter(&self) {
        self.driver.begin_request();
    }

    /// Copies bytes of a staging block to the GPU.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    ///
    /// # Safety
    /// `to` has room for them, and they stay as they are until the copy is done.
    pub(crate) unsafe fn copy(&self, to: u64, from: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        let result = unsafe { self.driver.api.cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.stream) };
        self.driver.check("cuMemcpyHtoDAsync", result)
    }

    /// Raises a flag behind what was copied.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn raise(&self, flag: u64) -> Result<()> {
        // SAFETY: a word of a mailbox, which lives until the GPU is done with it.
        let result = unsafe { self.driver.api.cuStreamWriteValue32_v2(self.stream, flag, HAS_COME, BEHIND_ALL) };
        self.driver.check("cuStreamWriteValue32", result)
    }

    /// Blocks until nothing is copied any more.
    pub(crate) fn drain(&self) {
        // SAFETY: the handle lives as long as `self`. A failure means that the GPU does nothing any more.
        unsafe { self.driver.api.cuStreamSynchronize(self.stream) };
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.driver.enter();
        self.drain();
        // SAFETY: made in `new`, destroyed once, when it is empty.
        unsafe { self.driver.api.cuStreamDestroy_v2(self.stream) };
    }
}
