//! What a GPU and a thread of the host tell each other without the driver: words in pinned memory.
//!
//! ```text
//! GPU, once a layer                              host
//! wanted pairs, then bell := 1 + n           →   polls the bell, sets it to 0
//!                                                gathers n pairs into a block of pinned memory
//! waits until flag = 1                       ←   flag := 1
//! copies the block, then flag := 2           →   the block is free again
//! ```
//!
//! The host answers by a word and not by a call: whatever the driver waits for meanwhile (memory that another thread frees,
//! a kernel that is loaded, a copy in front of this one), the answer comes.
#![allow(unsafe_code)] // Memory that both sides write.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use super::bindings::abi::specache_wanted;
use super::driver::Driver;
use super::memory::PinnedMemory;
use crate::error::Result;

/// Blocks: one is copied while the next one is filled.
pub(crate) const BLOCKS: usize = 2;

/// Values of a flag: what was wanted has come; the GPU has taken it. 0 in between.
pub(super) const HAS_COME: u32 = 1;
pub(super) const TAKEN: u32 = 2;

/// Why what somebody waits for could not be brought, once that is known.
pub(crate) type Failure = Arc<OnceLock<String>>;

/// How large a [`Mailbox`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MailboxSize {
    /// Letters that can be under way at once: a bell and a flag each.
    pub letters: usize,
    /// Pairs of all of them.
    pub pairs: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
}

/// The memory of it: blocks, what is wanted, words. Letters are numbered; what one of them wants begins at a place among the
/// wanted pairs that both sides know.
pub(crate) struct Mailbox {
    memory: PinnedMemory,
    size: MailboxSize,
}

impl Mailbox {
    /// Nothing is under way.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn new(driver: &Arc<Driver>, size: MailboxSize) -> Result<Mailbox> {
        let bytes = BLOCKS * size.block_bytes + size.pairs * size_of::<specache_wanted>() + size.letters * 8;
        Ok(Mailbox { memory: PinnedMemory::new(driver, bytes)?, size })
    }

    fn wanted_at(&self, pair: usize) -> usize {
        BLOCKS * self.size.block_bytes + pair * size_of::<specache_wanted>()
    }

    fn bell_at(&self, letter: usize) -> usize {
        assert!(letter < self.size.letters, "letter {letter} of {}", self.size.letters);
        self.wanted_at(self.size.pairs) + 8 * letter
    }

    fn flag_at(&self, letter: usize) -> usize {
        self.bell_at(letter) + 4
    }

    fn address(&self, at: usize) -> u64 {
        self.memory.address() + at as u64
    }

    /// Where pair `pair` of the wanted ones lies, for the GPU.
    pub(crate) fn wanted(&self, pair: usize) -> u64 {
        self.address(self.wanted_at(pair))
    }

    /// Where a letter's bell lies, for the GPU.
    pub(crate) fn bell(&self, letter: usize) -> u64 {
        self.address(self.bell_at(letter))
    }

    /// Where a letter's flag lies, for the GPU.
    pub(crate) fn flag(&self, letter: usize) -> u64 {
        self.address(self.flag_at(letter))
    }

    /// Where byte `at` of the memory is.
    fn place(&self, at: usize) -> NonNull<u8> {
        // SAFETY: all places are within the memory: `new` has counted them.
        unsafe { self.memory.start().add(at) }
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: within the memory, a multiple of 4 as all parts before it are, and only ever accessed as an atomic word,
        // by the GPU too.
        unsafe { self.place(at).cast().as_ref() }
    }

    /// How many pairs the GPU wants by this letter, once it has written them.
    pub(crate) fn rung(&self, letter: usize) -> Option<usize> {
        (self.word(self.bell_at(letter)).load(Ordering::Acquire) as usize).checked_sub(1)
    }

    /// The letter is read: the next ring is another one.
    pub(crate) fn open(&self, letter: usize) {
        self.word(self.bell_at(letter)).store(0, Ordering::Relaxed);
        self.word(self.flag_at(letter)).store(0, Ordering::Relaxed);
    }

    /// Whether what a letter wants has come, and the GPU has not taken it.
    pub(crate) fn is_up(&self, letter: usize) -> bool {
        self.word(self.flag_at(letter)).load(Ordering::Acquire) == HAS_COME
    }

    /// Whether the GPU has taken what came by a letter.
    pub(crate) fn is_taken(&self, letter: usize) -> bool {
        self.word(self.flag_at(letter)).load(Ordering::Acquire) == TAKEN
    }

    /// What a letter wants has come: the GPU goes on.
    pub(crate) fn raise(&self, letter: usize) {
        // The gather's threads have fenced their stores past the caches (`gather::copy`); this one comes behind.
        self.word(self.flag_at(letter)).store(HAS_COME, Ordering::Release);
    }

    /// The `n` pairs from `first` on that the GPU wants.
    ///
    /// # Safety
    /// The bell of their letter has rung, and its flag has not been raised since.
    ///
    /// # Panics
    /// If there are not so many.
    pub(crate) unsafe fn read_wanted(&self, first: usize, n: usize) -> &[specache_wanted] {
        assert!(first + n <= self.size.pairs, "{n} pairs from {first} of {} in the mailbox", self.size.pairs);
        // SAFETY: within the memory, a multiple of 8; the GPU writes there again only behind the flag.
        unsafe { NonNull::slice_from_raw_parts(self.place(self.wanted_at(first)).cast(), n).as_ref() }
    }

    fn block_at(&self, block: usize, bytes: usize) -> Range<usize> {
        assert!(block < BLOCKS && bytes <= self.size.block_bytes, "{bytes} bytes of block {block} of the mailbox");
        block * self.size.block_bytes..block * self.size.block_bytes + bytes
    }

    /// The first bytes of a block, to write.
    ///
    /// # Safety
    /// The GPU has taken what was in it, and nobody else has it.
    ///
    /// # Panics
    /// If the block has not so many.
    #[allow(clippy::mut_from_ref)] // Blocks are lent one by one, as the contract says.
    pub(crate) unsafe fn block(&self, block: usize, bytes: usize) -> &mut [u8] {
        let range = self.block_at(block, bytes);
        // SAFETY: within the memory; lent to one caller at a time, by the contract.
        unsafe { NonNull::slice_from_raw_parts(self.place(range.start), range.len()).as_mut() }
    }

    /// Where the first bytes of a block lie, for a copy.
    pub(super) fn block_place(&self, block: usize, bytes: usize) -> *const u8 {
        self.place(self.block_at(block, bytes).start).as_ptr()
    }
}
