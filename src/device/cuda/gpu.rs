//! A GPU in use: its driver, its queues, its kernels, and what must outlive the work that it was given.
#![allow(unsafe_code)] // Copies on queues.

use std::any::Any;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use super::driver::{Driver, Facts};
use super::kernels::{Kernels, Plan};
use super::mailbox::Mailbox;
use super::memory::PinnedMemory;
use super::queues::Queues;
use super::timing::Timing;
use crate::device::Event;
use crate::device::order::StreamId;
use crate::error::Result;

/// A GPU in use.
pub(crate) struct Gpu {
    // Dropped in this order: first what runs ends, then what it needs.
    queues: Queues,
    timing: Timing,
    kernels: Kernels,
    retained: Mutex<Vec<Retained>>,
    driver: Arc<Driver>,
}

/// Something that a queue still uses.
struct Retained {
    until: Event,
    _what: Box<dyn Any + Send>,
}

impl Gpu {
    /// GPU `index` with its kernels loaded. `library`: the driver's library to open instead of the usual ones.
    ///
    /// # Errors
    /// See [`Driver::open`] and [`Kernels::load`].
    pub(crate) fn open(library: Option<&Path>, index: usize) -> Result<Gpu> {
        let driver = Arc::new(Driver::open(library, index)?);
        let queues = Queues::new(&driver)?;
        let (timing, kernels) = (Timing::new(&driver), Kernels::load(&driver)?);
        Ok(Gpu { queues, timing, kernels, retained: Mutex::default(), driver })
    }

    /// The driver.
    pub(crate) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    /// What is known about the GPU.
    pub(crate) fn facts(&self) -> &Facts {
        &self.driver.facts
    }

    /// The queues.
    pub(crate) fn queues(&self) -> &Queues {
        &self.queues
    }

    /// When their work begins and ends.
    pub(crate) fn timing(&self) -> &Timing {
        &self.timing
    }

    /// Launches a kernel of the compute queue.
    pub(crate) fn launch<P>(&self, plan: Plan<P>, params: &P) {
        self.launch_on(StreamId::Compute, plan, params);
    }

    /// Launches a kernel.
    pub(crate) fn launch_on<P>(&self, stream: StreamId, plan: Plan<P>, params: &P) {
        self.kernels.launch(&self.queues, stream, plan, params);
    }

    /// Keeps `what` until `event` has passed; lets go of what has passed its own.
    pub(crate) fn retain(&self, event: Event, what: impl Any + Send) {
        self.release();
        self.lock().push(Retained { until: event, _what: Box::new(what) });
    }

    /// Lets go of everything whose event has passed.
    pub(crate) fn release(&self) {
        let passed = |r: &mut Retained| self.queues.has_passed(r.until.stream(), r.until.at());
        // Dropped outside of the lock: what is freed may come here again.
        let passed: Vec<Retained> = self.lock().extract_if(.., passed).collect();
        drop(passed);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Retained>> {
        self.retained.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Copies a part of pinned memory to the GPU. Its owner does not change it before the queue has come so far, and waits
    /// for the queue before either side is freed.
    pub(crate) fn send(&self, stream: StreamId, to: u64, from: &PinnedMemory, range: Range<usize>) {
        // SAFETY: the owner's promise, above; within the bounds of `from` by the slice.
        unsafe { self.queues.upload(stream, to, &from.bytes()[range]) };
    }

    /// Copies memory of the GPU into pinned memory, whose owner waits for the queue before it reads or frees it.
    pub(crate) fn fetch(&self, stream: StreamId, to: &mut PinnedMemory, at: usize, from: u64, bytes: usize) {
        // SAFETY: the owner's promise, above; within the bounds of `to` by the slice.
        unsafe { self.queues.download(stream, &mut to.bytes_mut()[at..at + bytes], from) };
    }

    /// Brings what a letter to the host wants, behind everything that the queue has been given: waits for the answer in
    /// `block`, and copies it. The mailbox and the memory at `to` are kept until the queue has come so far.
    pub(crate) fn take(&self, stream: StreamId, mailbox: &Mailbox, letter: usize, block: usize, to: u64, bytes: usize) {
        // SAFETY: the owner's promise, above.
        unsafe { self.queues.take(stream, mailbox, letter, block, to, bytes) };
    }

    /// Copies a page to the host. The lease of `to` and the memory at `from` are kept until the queue has come so far: by an
    /// event that their owners wait for, and by [`Gpu::retain`].
    pub(crate) fn page_out(&self, to: &mut [u8], from: u64) {
        // SAFETY: the owners' promise, above.
        unsafe { self.queues.download(StreamId::CopyOut, to, from) };
    }

    /// Copies a page from the host; as [`Gpu::page_out`].
    pub(crate) fn page_in(&self, to: u64, from: &[u8]) {
        // SAFETY: the owners' promise, as above.
        unsafe { self.queues.upload(StreamId::CopyIn, to, from) };
    }

    /// Fills memory with one byte, in the order of the compute queue. Its owner waits for the queue before it is freed.
    pub(crate) fn fill(&self, to: u64, byte: u8, bytes: usize) {
        // SAFETY: the owner's promise, above; the caller's buffer has as many.
        unsafe { self.queues.fill(StreamId::Compute, to, byte, bytes) };
    }

    /// Writes host bytes to the GPU, and waits until they are there: for what is set up once.
    pub(crate) fn put(&self, to: u64, from: &[u8]) {
        self.driver.enter();
        // SAFETY: the caller's buffer has room; the wait keeps `from` until the copy is done.
        unsafe { self.queues.upload(StreamId::Compute, to, from) };
        self.queues.drain(StreamId::Compute);
    }

    /// Reads bytes of the GPU, behind everything that the compute queue has been given.
    pub(crate) fn get(&self, to: &mut [u8], from: u64) {
        self.driver.enter();
        // SAFETY: the caller's buffer has as many; the wait keeps `to` until the copy is done.
        unsafe { self.queues.download(StreamId::Compute, to, from) };
        self.queues.drain(StreamId::Compute);
    }
}
