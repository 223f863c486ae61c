//! The queues of a GPU (streams, in CUDA's words), and the events that order them among each other. What is put into a
//! queue runs when everything before it is done; the calling thread does not wait.
#![allow(unsafe_code)] // Streams, events and copies of the driver.

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::bindings::driver::{CUevent, CUresult, CUstream};
use super::driver::Driver;
use crate::device::order::StreamId;
use crate::error::Result;

/// Events of a queue that are used by turns. A wait for one that was recorded again since waits for the later point: more
/// than it must, and never less. A step records about two a layer.
const RING: u64 = 256;
const QUEUES: usize = 4;
/// CU_STREAM_NON_BLOCKING: not ordered with the legacy default stream, which other code of the process may use.
const NON_BLOCKING: u32 = 1;
/// CU_EVENT_DISABLE_TIMING: cheaper, and nobody asks these for the time.
const NO_TIMING: u32 = 2;

/// One queue for each [`StreamId`].
pub(crate) struct Queues {
    driver: Arc<Driver>,
    queues: Vec<Queue>,
}

struct Queue {
    stream: CUstream,
    events: Vec<CUevent>,
    /// Points that were recorded. Locked while one is, so that their order is that of the queue whoever records them.
    recorded: Mutex<u64>,
    /// Points that are known to have passed.
    passed: AtomicU64,
}

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

impl Queues {
    /// Empty queues. Copies and gathers have the higher priority: they are short, and computation waits for them.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn new(driver: &Arc<Driver>) -> Result<Queues> {
        driver.enter();
        let mut made = Queues { driver: driver.clone(), queues: Vec::new() };
        for number in 0..QUEUES {
            let mut stream = ptr::null_mut();
            let priority = if number == StreamId::Compute as usize { 0 } else { -1 };
            // SAFETY: writes one handle.
            let result = unsafe { driver.api.cuStreamCreateWithPriority(&mut stream, NON_BLOCKING, priority) };
            driver.check("cuStreamCreateWithPriority", result)?;
            let (recorded, passed) = (Mutex::new(0), AtomicU64::new(0));
            made.queues.push(Queue { stream, events: Vec::new(), recorded, passed });
            for _ in 0..RING {
                let mut event = ptr::null_mut();
                // SAFETY: writes one handle.
                let result = unsafe { driver.api.cuEventCreate(&mut event, NO_TIMING) };
                driver.check("cuEventCreate", result)?;
                made.queues[number].events.push(event);
            }
        }
        Ok(made)
    }

    fn of(&self, stream: StreamId) -> &Queue {
        &self.queues[stream as usize]
    }

    /// The driver's handle.
    pub(super) fn handle(&self, stream: StreamId) -> CUstream {
        self.of(stream).stream
    }

    /// A point behind everything that `stream` has been given so far. If it cannot be recorded, the calling thread waits
    /// for all of that instead: whatever fails, nothing is in use when its owner takes it for free.
    pub(crate) fn record(&self, stream: StreamId) -> u64 {
        let queue = self.of(stream);
        let mut recorded = queue.recorded.lock().unwrap_or_else(|e| e.into_inner());
        let at = *recorded + 1;
        // SAFETY: both handles live as long as `self`.
        let result = unsafe { self.driver.api.cuEventRecord(queue.event(at), queue.stream) };
        if result != CUresult::CUDA_SUCCESS {
            self.driver.note("cuEventRecord", result);
            self.synchronize(queue);
            queue.passed.fetch_max(at, Ordering::AcqRel);
        }
        *recorded = at;
        at
    }

    /// What `stream` is given from now on comes after point `at` of `other`. If the queue cannot wait, the calling thread
    /// does.
    pub(crate) fn after(&self, stream: StreamId, other: StreamId, at: u64) {
        let from = self.of(other);
        if stream == other || from.passed.load(Ordering::Acquire) >= at {
            return;
        }
        // SAFETY: both handles live as long as `self`; the event was recorded.
        let result = unsafe { self.driver.api.cuStreamWaitEvent(self.handle(stream), from.event(at), 0) };
        if result != CUresult::CUDA_SUCCESS {
            self.driver.note("cuStreamWaitEvent", result);
            self.finish(other, at);
        }
    }

    /// Blocks the calling thread until point `at` of `stream` has passed.
    pub(crate) fn finish(&self, stream: StreamId, at: u64) {
        let queue = self.of(stream);
        if at == 0 || queue.passed.load(Ordering::Acquire) >= at {
            return;
        }
        // SAFETY: the handle lives as long as `self`; the event was recorded.
        let result = unsafe { self.driver.api.cuEventSynchronize(queue.event(at)) };
        if result != CUresult::CUDA_SUCCESS {
            self.driver.note("cuEventSynchronize", result);
            self.synchronize(queue);
        }
        queue.passed.fetch_max(at, Ordering::AcqRel);
    }

    /// Blocks the calling thread until the queue is empty.
    fn synchronize(&self, queue: &Queue) {
        // SAFETY: the handle lives as long as `self`.
        self.driver.note("cuStreamSynchronize", unsafe { self.driver.api.cuStreamSynchronize(queue.stream) });
    }

    /// Whether point `at` of `stream` has passed; does not wait.
    pub(crate) fn has_passed(&self, stream: StreamId, at: u64) -> bool {
        let queue = self.of(stream);
        if queue.passed.load(Ordering::Acquire) >= at {
            return true;
        }
        // SAFETY: the handle lives as long as `self`; the event was recorded.
        match unsafe { self.driver.api.cuEventQuery(queue.event(at)) } {
            CUresult::CUDA_ERROR_NOT_READY => return false,
            CUresult::CUDA_SUCCESS => {}
            failed => {
                self.driver.note("cuEventQuery", failed);
                self.synchronize(queue);
            }
        }
        queue.passed.fetch_max(at, Ordering::AcqRel);
        true
    }

    /// Copies host bytes to the GPU.
    ///
    /// # Safety
    /// `to` has room for them, and they stay as they are until the copy is done.
    pub(crate) unsafe fn upload(&self, stream: StreamId, to: u64, from: &[u8]) {
        if !from.is_empty() {
            // SAFETY: the caller's promise.
            let result = unsafe {
                self.driver.api.cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.handle(stream))
            };
            self.driver.note("cuMemcpyHtoDAsync", result);
        }
    }

    /// Copies bytes of the GPU to the host.
    ///
    /// # Safety
    /// `from` has as many, and nobody reads, writes or frees `to` until the copy is done.
    pub(crate) unsafe fn download(&self, stream: StreamId, to: &mut [u8], from: u64) {
        if !to.is_empty() {
            // SAFETY: the caller's promise.
            let result = unsafe {
                self.driver.api.cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.handle(stream))
            };
            self.driver.note("cuMemcpyDtoHAsync", result);
        }
    }

    /// Copies bytes within the GPU.
    ///
    /// # Safety
    /// Both ranges are allocated, and stay so until the copy is done.
    pub(crate) unsafe fn copy(&self, stream: StreamId, to: u64, from: u64, len: usize) {
        if len > 0 {
            // SAFETY: the caller's promise.
            let result = unsafe { self.driver.api.cuMemcpyDtoDAsync_v2(to, from, len, self.handle(stream)) };
            self.driver.note("cuMemcpyDtoDAsync", result);
        }
    }

    /// Fills memory of the GPU with one byte.
    ///
    /// # Safety
    /// The range is allocated, and stays so until it is filled.
    pub(crate) unsafe fn fill(&self, stream: StreamId, to: u64, byte: u8, len: usize) {
        if len > 0 {
            // SAFETY: the caller's promise.
            let result = unsafe { self.driver.api.cuMemsetD8Async(to, byte, len, self.handle(stream)) };
            self.driver.note("cuMemsetD8Async", result);
        }
    }

    /// Blocks the calling thread until everything that `stream` has been given is done.
    pub(crate) fn drain(&self, stream: StreamId) {
        let at = self.record(stream);
        self.finish(stream, at);
    }
}

impl Queue {
    fn event(&self, at: u64) -> CUevent {
        self.events[(at % RING) as usize]
    }
}

impl Drop for Queues {
    /// What was given is done first.
    fn drop(&mut self) {
        self.driver.enter();
        for queue in &self.queues {
            // SAFETY: handles made in `new`, destroyed once, when the GPU is done with them.
            unsafe {
                self.synchronize(queue);
                for &event in &queue.events {
                    self.driver.note("cuEventDestroy", self.driver.api.cuEventDestroy_v2(event));
                }
                self.driver.note("cuStreamDestroy", self.driver.api.cuStreamDestroy_v2(queue.stream));
            }
        }
    }
}
