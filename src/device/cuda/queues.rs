//! The queues of a GPU (streams, in CUDA's words), and the events that order them among each other. What is put into a
//! queue runs when everything before it is done; the calling thread does not wait.
#![allow(unsafe_code)] // Streams, events and copies of the driver.

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::bindings::driver::{CUevent, CUgraphExec, CUresult, CUstream};
use super::driver::Driver;
use super::graph::{self, Calls};
use super::mailbox::{HAS_COME, Mailbox, TAKEN};
use crate::device::order::StreamId;
use crate::error::Result;

/// Events of a queue that are used by turns. A wait for one that was recorded again since waits for the later point: more
/// than it must, and never less. A step records about two a layer.
const RING: u64 = 256;
/// As many as there are values of [`StreamId`].
pub(super) const QUEUES: usize = 4;
/// CU_STREAM_NON_BLOCKING: not ordered with the legacy default stream, which other code of the process may use.
const NON_BLOCKING: u32 = 1;
/// CU_EVENT_DISABLE_TIMING: cheaper, and nobody asks these for the time.
const NO_TIMING: u32 = 2;
/// CU_STREAM_WAIT_VALUE_EQ.
const UNTIL_EQUAL: u32 = 1;
/// CU_STREAM_WRITE_VALUE_DEFAULT: everything before it is done, and seen before the value.
const BEHIND_ALL: u32 = 0;

/// One queue for each [`StreamId`].
pub(crate) struct Queues {
    driver: Arc<Driver>,
    queues: Vec<Queue>,
    /// Shared by calls, exclusive for a pass that is captured or replayed.
    use_: RwLock<()>,
}

struct Queue {
    stream: CUstream,
    events: Vec<CUevent>,
    /// For edges within a graph.
    edge: CUevent,
    /// One thread at a time makes a point.
    recording: Mutex<()>,
    /// Points that were recorded.
    recorded: AtomicU64,
    /// Points that are known to have passed.
    passed: AtomicU64,
    /// For each queue, the last of its points that this one waits for.
    awaited: [AtomicU64; QUEUES],
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
        let mut made = Queues { driver: driver.clone(), queues: Vec::new(), use_: RwLock::new(()) };
        for number in 0..QUEUES {
            let mut stream = ptr::null_mut();
            let priority = if number == StreamId::Compute as usize { 0 } else { -1 };
            // SAFETY: writes one handle.
            let result = unsafe { driver.api.cuStreamCreateWithPriority(&mut stream, NON_BLOCKING, priority) };
            driver.check("cuStreamCreateWithPriority", result)?;
            made.queues.push(Queue {
                stream,
                events: Vec::new(),
                edge: ptr::null_mut(),
                recording: Mutex::new(()),
                recorded: AtomicU64::new(0),
                passed: AtomicU64::new(0),
                awaited: Default::default(),
            });
            made.queues[number].edge = event(driver)?;
            for _ in 0..RING {
                made.queues[number].events.push(event(driver)?);
            }
        }
        Ok(made)
    }

    /// The driver.
    pub(super) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    /// Keeps all other threads away.
    pub(super) fn exclude(&self) -> RwLockWriteGuard<'_, ()> {
        self.use_.write().unwrap_or_else(|e| e.into_inner())
    }

    /// For a call that goes to the driver: `None` if it must not, because it is a part of a graph that is replayed. While it
    /// is held, no other thread captures.
    pub(super) fn call(&self) -> Option<Option<RwLockReadGuard<'_, ()>>> {
        match graph::calls(self) {
            Calls::Direct => Some(Some(self.use_.read().unwrap_or_else(|e| e.into_inner()))),
            Calls::Captured => Some(None),
            Calls::Replayed => None,
        }
    }

    fn of(&self, stream: StreamId) -> &Queue {
        &self.queues[stream as usize]
    }

    /// The driver's handle.
    pub(super) fn handle(&self, stream: StreamId) -> CUstream {
        self.of(stream).stream
    }

    /// A point behind everything that `stream` has been given so far. In a graph: its end.
    pub(crate) fn record(&self, stream: StreamId) -> u64 {
        let queue = self.of(stream);
        match graph::calls(self) {
            Calls::Direct => {
                let _use = self.use_.read().unwrap_or_else(|e| e.into_inner());
                let _one = queue.recording.lock().unwrap_or_else(|e| e.into_inner());
                self.record_in(stream, stream)
            }
            Calls::Captured if graph::is_captured(stream) => {
                // SAFETY: both handles live as long as `self`.
                let result = unsafe { self.driver.api.cuEventRecord(queue.edge, queue.stream) };
                self.driver.note("cuEventRecord", result);
                queue.recorded() + 1
            }
            // Nobody else has given it anything since its last point.
            Calls::Captured => queue.recorded(),
            Calls::Replayed => queue.recorded() + 1,
        }
    }

    /// Makes the next point of `stream`, behind what `from` has been given. If it cannot be recorded, the calling thread
    /// waits for all of that instead: whatever fails, nothing is in use when its owner takes it for free.
    fn record_in(&self, stream: StreamId, from: StreamId) -> u64 {
        let queue = self.of(stream);
        let at = queue.recorded() + 1;
        // SAFETY: both handles live as long as `self`.
        let result = unsafe { self.driver.api.cuEventRecord(queue.event(at), self.handle(from)) };
        if result != CUresult::CUDA_SUCCESS {
            self.driver.note("cuEventRecord", result);
            self.synchronize(self.of(from));
            queue.passed.fetch_max(at, Ordering::AcqRel);
        }
        queue.recorded.store(at, Ordering::Release);
        at
    }

    /// A point of `stream` that is in its queue, or will be: outside of a pass that becomes a graph the points of one that was
    /// given up never come, and stand for what was there before it.
    fn reachable(&self, stream: StreamId, at: u64) -> u64 {
        match graph::calls(self) {
            Calls::Direct => at.min(self.of(stream).recorded()),
            Calls::Captured | Calls::Replayed => at,
        }
    }

    /// Whether `stream` could be ahead of point `at` of `other`: nobody knows yet that the point has passed, and `stream` has
    /// not been told to wait for it.
    pub(crate) fn must_wait(&self, stream: StreamId, other: StreamId, at: u64) -> bool {
        let at = self.reachable(other, at);
        let known = |point: &AtomicU64| point.load(Ordering::Acquire) >= at;
        // Streams of a graph begin with the compute stream, and know nothing of their own past.
        let awaited = graph::calls(self) == Calls::Direct && known(&self.of(stream).awaited[other as usize]);
        stream != other && !known(&self.of(other).passed) && !awaited
    }

    /// What `stream` is given from now on comes after point `at` of `other`.
    pub(crate) fn after(&self, stream: StreamId, other: StreamId, at: u64) {
        if !self.must_wait(stream, other, at) {
            return;
        }
        let (from, at) = (self.of(other), self.reachable(other, at));
        match (graph::calls(self), at > from.recorded()) {
            (Calls::Direct, _) => {
                let _use = self.use_.read().unwrap_or_else(|e| e.into_inner());
                self.wait(stream, from.event(at));
                self.of(stream).awaited[other as usize].fetch_max(at, Ordering::AcqRel);
            }
            (Calls::Captured, true) => {
                self.wait(stream, from.edge);
                graph::capture(stream);
            }
            (Calls::Replayed, true) => {}
            (Calls::Captured | Calls::Replayed, false) => graph::wait_before(other, at),
        }
    }

    fn wait(&self, stream: StreamId, event: CUevent) {
        // SAFETY: both handles live as long as `self`; the event was recorded.
        let result = unsafe { self.driver.api.cuStreamWaitEvent(self.handle(stream), event, 0) };
        if result != CUresult::CUDA_SUCCESS {
            self.driver.note("cuStreamWaitEvent", result);
            if graph::calls(self) == Calls::Direct {
                self.queues.iter().for_each(|queue| self.synchronize(queue)); // nobody runs ahead then
            }
        }
    }

    /// The streams that have joined a capture come together again, as they must before its end.
    pub(super) fn join_captured(&self) {
        for stream in [StreamId::Gather, StreamId::CopyIn, StreamId::CopyOut] {
            if graph::is_captured(stream) {
                let at = self.record(stream);
                self.after(StreamId::Compute, stream, at);
            }
        }
    }

    /// Gives a graph to the compute stream, behind the points `before` of all streams. Its end is the next point of every
    /// stream that the pass may have made one of.
    pub(super) fn launch_graph(&self, exec: CUgraphExec, mut before: [u64; QUEUES]) {
        // The points of a stream pass in their order: before the graph's, those that other threads have made.
        for stream in [StreamId::Gather, StreamId::CopyIn] {
            before[stream as usize] = self.of(stream).recorded();
        }
        for ((from, at), awaited) in self.queues.iter().zip(before).zip(&self.of(StreamId::Compute).awaited) {
            if at > 0 && from.passed.load(Ordering::Acquire) < at {
                self.wait(StreamId::Compute, from.event(at));
                awaited.fetch_max(at, Ordering::AcqRel);
            }
        }
        // SAFETY: both handles are alive: the graph's owner waits before it drops it.
        let result = unsafe { self.driver.api.cuGraphLaunch(exec, self.handle(StreamId::Compute)) };
        self.driver.note("cuGraphLaunch", result);
        for stream in [StreamId::Compute, StreamId::Gather, StreamId::CopyIn] {
            self.record_in(stream, StreamId::Compute);
        }
    }

    /// Blocks the calling thread until point `at` of `stream` has passed.
    pub(crate) fn finish(&self, stream: StreamId, at: u64) {
        let (queue, at) = (self.of(stream), self.reachable(stream, at));
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
        let (queue, at) = (self.of(stream), self.reachable(stream, at));
        if queue.passed.load(Ordering::Acquire) >= at {
            return true;
        }
        if at > queue.recorded() {
            return false; // the end of a graph that has not been launched
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
        if let (false, Some(_use)) = (from.is_empty(), self.call()) {
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
        if let (false, Some(_use)) = (to.is_empty(), self.call()) {
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
        if let (true, Some(_use)) = (len > 0, self.call()) {
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
        if let (true, Some(_use)) = (len > 0, self.call()) {
            // SAFETY: the caller's promise.
            let result = unsafe { self.driver.api.cuMemsetD8Async(to, byte, len, self.handle(stream)) };
            self.driver.note("cuMemsetD8Async", result);
        }
    }

    /// Brings what a letter of `mailbox` wants: waits until the host has put it into `block`, copies `bytes` bytes of that to
    /// the GPU, and says that they are taken. Nothing where something of the calling thread has failed: the letter may not
    /// have been written then.
    ///
    /// # Safety
    /// `to` has room for them, and the mailbox lives, until the copy is done.
    pub(crate) unsafe fn take(
        &self,
        stream: StreamId,
        mailbox: &Mailbox,
        letter: usize,
        block: usize,
        to: u64,
        bytes: usize,
    ) {
        let Some(_use) = self.call() else { return };
        let (api, queue, flag) = (&self.driver.api, self.handle(stream), mailbox.flag(letter));
        let from = mailbox.block_place(block, bytes);
        let steps: [(&str, &dyn Fn() -> CUresult); 3] = [
            // SAFETY: the flag is a word of the mailbox, which lives until the queue has come so far.
            ("cuStreamWaitValue32", &|| unsafe { api.cuStreamWaitValue32_v2(queue, flag, HAS_COME, UNTIL_EQUAL) }),
            // SAFETY: the caller's promise; nobody writes the block before it is taken.
            ("cuMemcpyHtoDAsync", &|| unsafe { api.cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, queue) }),
            // SAFETY: as for the wait.
            ("cuStreamWriteValue32", &|| unsafe { api.cuStreamWriteValue32_v2(queue, flag, TAKEN, BEHIND_ALL) }),
        ];
        for (call, make) in steps {
            if !self.driver.has_failed() {
                self.driver.note(call, make());
            }
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

    fn recorded(&self) -> u64 {
        self.recorded.load(Ordering::Acquire)
    }
}

/// An event without times.
fn event(driver: &Driver) -> Result<CUevent> {
    let mut event = ptr::null_mut();
    // SAFETY: writes one handle.
    driver.check("cuEventCreate", unsafe { driver.api.cuEventCreate(&mut event, NO_TIMING) })?;
    Ok(event)
}

impl Drop for Queues {
    /// What was given is done first.
    fn drop(&mut self) {
        self.driver.enter();
        for queue in &self.queues {
            // SAFETY: handles made in `new`, destroyed once, when the GPU is done with them.
            unsafe {
                self.synchronize(queue);
                for &event in queue.events.iter().chain([&queue.edge]).filter(|event| !event.is_null()) {
                    self.driver.note("cuEventDestroy", self.driver.api.cuEventDestroy_v2(event));
                }
                self.driver.note("cuStreamDestroy", self.driver.api.cuStreamDestroy_v2(queue.stream));
            }
        }
    }
}
