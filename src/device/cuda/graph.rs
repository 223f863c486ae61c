//! A pass as a CUDA graph: captured once, then given to the GPU in one call instead of some hundred.
//!
//! The code of a pass is the same in all three cases; only what [`Queues`] does with its calls differs:
//!
//! | | launches, copies | record | wait |
//! |---|---|---|---|
//! | directly | go to the driver | an event of the ring | a wait of that stream |
//! | while captured | become nodes | the end of the graph | an edge; what began before the pass: before the graph |
//! | while replayed | are in the graph already | the end of the graph | nothing; as above |
//!
//! All points of a captured pass are one: its end. So the next pass waits for the last gathers of this one before it begins
//! and not layer by layer, which costs nothing as long as they are shorter than the LM head.
//!
//! While a thread captures or replays, no other one uses the queues: their work would become a part of the graph.
#![allow(unsafe_code)] // Capture and graphs of the driver.

use std::cell::RefCell;
use std::ptr;
use std::sync::{Arc, RwLockWriteGuard};

use super::bindings::driver::{CUgraphExec, CUstreamCaptureMode};
use super::driver::Driver;
use super::queues::{QUEUES, Queues};
use crate::device::order::StreamId;
use crate::error::Result;

/// A pass that the GPU can be given in one call.
pub(crate) struct Graph {
    driver: Arc<Driver>,
    exec: CUgraphExec,
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    /// Whoever drops it has waited for its last launch.
    fn drop(&mut self) {
        self.driver.enter();
        // SAFETY: instantiated once, destroyed once.
        self.driver.note("cuGraphExecDestroy", unsafe { self.driver.api.cuGraphExecDestroy(self.exec) });
    }
}

/// How the calling thread's pass uses the queues.
pub(super) struct Pass {
    queues: *const Queues,
    capturing: bool,
    /// Streams that are captured.
    captured: [bool; QUEUES],
    /// Points from before the pass that the graph has to wait for: the latest of each stream.
    before: [u64; QUEUES],
}

thread_local! {
    static PASS: RefCell<Option<Pass>> = const { RefCell::new(None) };
}

/// What a call on the queues is to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Calls {
    /// Goes to the driver; nobody captures.
    Direct,
    /// Goes to the driver, and becomes a node.
    Captured,
    /// Is in the graph already.
    Replayed,
}

/// The exclusive use of the queues for a pass that is captured or replayed. Dropped before its end, it gives the pass up.
pub(crate) struct Exclusive<'a> {
    queues: &'a Queues,
    graph: Option<Arc<Graph>>,
    _lock: RwLockWriteGuard<'a, ()>,
}

impl<'a> Exclusive<'a> {
    /// A pass that becomes a graph, or that one replays.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn begin(queues: &'a Queues, graph: Option<Arc<Graph>>) -> Result<Exclusive<'a>> {
        let lock = queues.exclude();
        let capturing = graph.is_none();
        if capturing {
            let stream = queues.handle(StreamId::Compute);
            let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            // SAFETY: the stream lives as long as `queues`; the capture ends with this value.
            let result = unsafe { queues.driver().api.cuStreamBeginCapture_v2(stream, mode) };
            queues.driver().check("cuStreamBeginCapture", result)?;
        }
        let mut captured = [false; QUEUES];
        captured[StreamId::Compute as usize] = true;
        PASS.with_borrow_mut(|pass| *pass = Some(Pass { queues, capturing, captured, before: [0; QUEUES] }));
        Ok(Exclusive { queues, graph, _lock: lock })
    }

    /// The pass is complete: the GPU is given its graph. Returns it, for the next time.
    ///
    /// # Errors
    /// [`crate::Error::Device`]; nothing of the pass has run then.
    pub(crate) fn end(mut self) -> Result<Arc<Graph>> {
        let before = PASS.with_borrow(|pass| pass.as_ref().map_or([0; QUEUES], |pass| pass.before));
        let graph = match self.graph.take() {
            Some(graph) => graph,
            None => {
                self.queues.join_captured();
                Arc::new(self.instantiate()?)
            }
        };
        PASS.with_borrow_mut(|pass| *pass = None);
        self.queues.launch_graph(graph.exec, before);
        Ok(graph)
    }

    /// Ends the capture.
    fn instantiate(&self) -> Result<Graph> {
        let (driver, mut captured, mut exec) = (self.queues.driver(), ptr::null_mut(), ptr::null_mut());
        PASS.with_borrow_mut(|pass| pass.iter_mut().for_each(|pass| pass.capturing = false));
        // SAFETY: ends the capture that `begin` began; writes one handle.
        let result = unsafe { driver.api.cuStreamEndCapture(self.queues.handle(StreamId::Compute), &mut captured) };
        driver.check("cuStreamEndCapture", result)?;
        driver.sound()?; // a call that could not be captured
        // SAFETY: writes one handle; the graph was just made.
        let instantiated = unsafe { driver.api.cuGraphInstantiateWithFlags(&mut exec, captured, 0) };
        // SAFETY: made once, destroyed once; what was instantiated does not need it.
        driver.note("cuGraphDestroy", unsafe { driver.api.cuGraphDestroy(captured) });
        driver.check("cuGraphInstantiateWithFlags", instantiated)?;
        Ok(Graph { driver: driver.clone(), exec })
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        let given_up = PASS.with_borrow_mut(Option::take);
        if given_up.is_some_and(|pass| pass.capturing) {
            let (driver, mut graph) = (self.queues.driver(), ptr::null_mut());
            // SAFETY: ends the capture that `begin` began, and destroys what came of it.
            unsafe {
                let ended = driver.api.cuStreamEndCapture(self.queues.handle(StreamId::Compute), &mut graph);
                driver.note("cuStreamEndCapture", ended);
                if !graph.is_null() {
                    driver.note("cuGraphDestroy", driver.api.cuGraphDestroy(graph));
                }
            }
        }
    }
}

/// What the calling thread's pass does with its calls on `queues`.
pub(super) fn calls(queues: &Queues) -> Calls {
    PASS.with_borrow(|pass| match pass {
        Some(pass) if ptr::eq(pass.queues, queues) => {
            if pass.capturing {
                Calls::Captured
            } else {
                Calls::Replayed
            }
        }
        _ => Calls::Direct,
    })
}

/// Whether `stream` is a part of what the calling thread captures.
pub(super) fn is_captured(stream: StreamId) -> bool {
    PASS.with_borrow(|pass| pass.as_ref().is_some_and(|pass| pass.captured[stream as usize]))
}

/// `stream` becomes a part of what the calling thread captures.
pub(super) fn capture(stream: StreamId) {
    PASS.with_borrow_mut(|pass| pass.iter_mut().for_each(|pass| pass.captured[stream as usize] = true));
}

/// The graph of the calling thread's pass has to wait for point `at` of `stream`, which lies before the pass.
pub(super) fn wait_before(stream: StreamId, at: u64) {
    PASS.with_borrow_mut(|pass| {
        let latest = pass.iter_mut().map(|pass| &mut pass.before[stream as usize]);
        latest.for_each(|latest| *latest = at.max(*latest));
    });
}
