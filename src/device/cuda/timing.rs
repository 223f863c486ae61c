//! When the work in the queues begins and ends, by the GPU's own clock: an event before it and one behind.
//!
//! A timed event costs the GPU about a microsecond and keeps two kernels from overlapping, so nothing is timed unless
//! somebody asks. Events are read at the end of a pass, when the compute queue is empty; what other queues are still doing
//! is read at the end of a later one.
#![allow(unsafe_code)] // Events of the driver.

use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::bindings::driver::{CUevent, CUresult};
use super::driver::Driver;
use super::queues::Queues;
use crate::device::order::StreamId;
use crate::device::trace::{Place, Slice, Trace};
use crate::error::Result;

/// CU_EVENT_DEFAULT: with the time, and waits for it spin.
const TIMED: u32 = 0;
/// Waits of a pass that never ended are forgotten after so many more passes.
const FORGOTTEN_AFTER: u32 = 64;

/// The timed work of one GPU.
pub(crate) struct Timing {
    driver: Arc<Driver>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Events that nobody uses.
    free: Vec<Handle>,
    /// What times are counted from: an event that has passed, and when that was in the trace, microseconds. Elapsed times
    /// are f32 milliseconds, so it moves with every pass.
    origin: Option<(Handle, f64)>,
    /// The origin of the pass that has begun, and when the host recorded it in the trace.
    next_origin: Option<(Handle, f64)>,
    spans: Vec<Span>,
}

/// An event of the driver.
#[derive(Clone, Copy)]
struct Handle(CUevent);

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Handle {}

/// Where a span began; [`Timing::end`] takes it.
#[must_use = "a span that begins ends"]
pub(crate) struct Begun {
    begin: Handle,
    stream: StreamId,
}

/// Work between two events.
#[derive(Clone, Copy)]
struct Span {
    begin: Handle,
    end: Handle,
    stream: StreamId,
    name: &'static str,
    waits: bool,
    place: Place,
    bytes: u64,
}

impl Timing {
    pub(super) fn new(driver: &Arc<Driver>) -> Timing {
        Timing { driver: driver.clone(), state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Records an event behind everything that `stream` has been given; `None` if the driver refuses, and in a graph.
    fn mark(&self, queues: &Queues, stream: StreamId) -> Option<Handle> {
        let _use = queues.call()??;
        let event = self.lock().free.pop().map_or_else(|| self.new_event(), Some)?;
        // SAFETY: both handles live as long as the GPU.
        self.driver.note("cuEventRecord", unsafe { self.driver.api.cuEventRecord(event.0, queues.handle(stream)) });
        Some(event)
    }

    fn new_event(&self) -> Option<Handle> {
        let mut event = ptr::null_mut();
        // SAFETY: writes one handle.
        let result = unsafe { self.driver.api.cuEventCreate(&mut event, TIMED) };
        self.driver.note("cuEventCreate", result);
        (result == CUresult::CUDA_SUCCESS).then_some(Handle(event))
    }

    /// Before the first operation of all, while the queues are empty, the GPU is there as soon as the host: all times of a trace
    /// count from here. What a sequence does before its first pass may take the GPU longer than the host.
    pub(crate) fn begin_clock(&self, queues: &Queues, now_us: impl FnOnce() -> f64) {
        if self.lock().origin.is_some() {
            return;
        }
        let now_us = now_us();
        let Some(event) = self.mark(queues, StreamId::Compute) else { return };
        let mut state = self.lock();
        match state.origin {
            None => state.origin = Some((event, now_us)),
            Some(_) => state.free.push(event), // another thread was faster
        }
    }

    /// A pass begins: its times count from here. `now_us`: the time of the trace.
    pub(crate) fn begin_pass(&self, queues: &Queues, now_us: f64) {
        let Some(event) = self.mark(queues, StreamId::Compute) else { return };
        let mut state = self.lock();
        let given_up = state.next_origin.replace((event, now_us));
        state.free.extend(given_up.map(|(event, _)| event));
    }

    /// Work of `stream` is given next.
    pub(crate) fn begin(&self, queues: &Queues, stream: StreamId) -> Option<Begun> {
        self.mark(queues, stream).map(|begin| Begun { begin, stream })
    }

    /// The work that was begun has been given. `waits`: it was a wait for another queue.
    pub(crate) fn end(&self, queues: &Queues, begun: Begun, name: &'static str, waits: bool, bytes: u64) {
        let Begun { begin, stream } = begun;
        let end = self.mark(queues, stream);
        let mut state = self.lock();
        match end {
            Some(end) => state.spans.push(Span { begin, end, stream, name, waits, place: Place::current(), bytes }),
            None => state.free.push(begin),
        }
    }

    /// What the calling thread's pass has brought in by `name`, which only its end tells: `bytes(layer)` are the layer's, and
    /// its first span has them.
    pub(crate) fn tell_bytes(&self, name: &'static str, bytes: impl Fn(usize) -> u64) {
        let step = Place::current().step;
        let mut told = None;
        for span in self.lock().spans.iter_mut().filter(|span| span.name == name && span.place.step == step) {
            if told != span.place.layer {
                told = span.place.layer;
                span.bytes = bytes(span.place.layer_or_0());
            }
        }
    }

    /// The calling thread's pass is over; waits for the compute queue. What has ended goes to `trace`, if there is one.
    /// Returns how long the compute queue has waited for others in this pass.
    pub(crate) fn end_pass(&self, queues: &Queues, trace: Option<&Trace>) -> Duration {
        queues.drain(StreamId::Compute);
        let step = Place::current().step;
        let mut state = self.lock();
        if let Some(why) = self.move_origin(&mut state).err() {
            self.driver.fail(why.to_string());
            return Duration::ZERO;
        }
        let Some((origin, origin_us)) = state.origin else { return Duration::ZERO };
        let mut waited_us = 0.0;
        let spans = std::mem::take(&mut state.spans);
        for span in spans {
            // A wait counts for its own pass, which may be another thread's and not over.
            let others = span.waits && span.place.step != step && span.place.step + FORGOTTEN_AFTER > step;
            if others || !self.has_passed(span.end) {
                state.spans.push(span);
                continue;
            }
            state.free.extend([span.begin, span.end]);
            let times =
                self.elapsed_us(origin, span.begin).and_then(|us| Ok((us, self.elapsed_us(span.begin, span.end)?)));
            let (begin, took) = match times {
                Ok(times) => times,
                Err(why) => {
                    self.driver.fail(why.to_string());
                    continue;
                }
            };
            if span.waits && span.place.step == step {
                waited_us += took;
            }
            if let Some(trace) = trace {
                let Span { stream, name, waits, place, bytes, .. } = span;
                let (begin_us, end_us) = (origin_us + begin, origin_us + begin + took);
                trace.push(Slice { stream, node: None, name, waits, place, begin_us, end_us, bytes });
            }
        }
        Duration::from_secs_f64(waited_us.max(0.0) / 1e6)
    }

    fn move_origin(&self, state: &mut State) -> Result<()> {
        let Some((next, host_us)) = state.next_origin else { return Ok(()) };
        let us = match state.origin {
            None => host_us, // nothing is traced, and only differences count
            Some((origin, us)) => us + self.elapsed_us(origin, next)?,
        };
        state.next_origin = None;
        let old = state.origin.replace((next, us));
        state.free.extend(old.map(|(event, _)| event));
        Ok(())
    }

    fn has_passed(&self, event: Handle) -> bool {
        // SAFETY: the event was recorded and lives as long as `self`.
        unsafe { self.driver.api.cuEventQuery(event.0) == CUresult::CUDA_SUCCESS }
    }

    /// Microseconds from one event that has passed to another, which may be the earlier one.
    fn elapsed_us(&self, from: Handle, to: Handle) -> Result<f64> {
        let mut ms = 0.0;
        // SAFETY: writes one float; both events were recorded.
        let result = unsafe { self.driver.api.cuEventElapsedTime(&mut ms, from.0, to.0) };
        self.driver.check("cuEventElapsedTime", result).map(|()| f64::from(ms) * 1e3)
    }

    /// How long what `work` gives to the compute queue takes there. Waits for it.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn measure(&self, queues: &Queues, work: impl FnOnce()) -> Result<Duration> {
        let begin = self.mark(queues, StreamId::Compute);
        work();
        let end = self.mark(queues, StreamId::Compute);
        queues.drain(StreamId::Compute);
        self.driver.sound()?;
        let (Some(begin), Some(end)) = (begin, end) else { unreachable!("a refused event is a failure") };
        let us = self.elapsed_us(begin, end)?;
        self.lock().free.extend([begin, end]);
        Ok(Duration::from_secs_f64(us.max(0.0) / 1e6))
    }
}

impl Drop for Timing {
    fn drop(&mut self) {
        self.driver.enter();
        let State { free, origin, next_origin, spans } = std::mem::take(&mut *self.lock());
        let origins = origin.into_iter().chain(next_origin).map(|(event, _)| event);
        let of_spans = spans.into_iter().flat_map(|span| [span.begin, span.end]);
        for event in free.into_iter().chain(origins).chain(of_spans) {
            // SAFETY: created here, destroyed once; the queues are done.
            self.driver.note("cuEventDestroy", unsafe { self.driver.api.cuEventDestroy_v2(event.0) });
        }
    }
}
