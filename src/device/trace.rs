//! What ran when: slices of all streams, in memory until they are asked for.
//!
//! Tracing is off unless the device was made with it; then an operation costs one look at an option.

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::order::StreamId;

/// Where in the program an operation belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Pass of the device since it was made, from 1; 0 before the first.
    pub step: u32,
    /// Model layer; `None` before and behind the layers.
    pub layer: Option<u32>,
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place { step: 0, layer: None }) };
}

impl Place {
    /// Where the calling thread is.
    pub fn current() -> Place {
        PLACE.get()
    }

    /// The calling thread goes there.
    pub(super) fn enter(self) {
        PLACE.set(self);
    }

    /// The layer's number for people: 0 where there is none.
    pub fn layer_or_0(self) -> usize {
        self.layer.unwrap_or(0) as usize
    }
}

/// One operation on the time line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slice {
    /// Whose row it is in.
    pub stream: StreamId,
    /// The operation, or what the compute stream waited for.
    pub name: &'static str,
    /// A wait, not work.
    pub waits: bool,
    /// Step and layer.
    pub place: Place,
    /// Microseconds since the trace began.
    pub begin_us: f64,
    /// As `begin_us`.
    pub end_us: f64,
    /// Bytes moved, for copies and gathers.
    pub bytes: u64,
}

impl Slice {
    /// How long it took, microseconds.
    pub fn us(&self) -> f64 {
        self.end_us - self.begin_us
    }
}

/// Slices as they end.
pub struct Trace {
    begin: Instant,
    paused: AtomicBool,
    slices: Mutex<Vec<Slice>>,
}

impl Trace {
    pub(super) fn new() -> Trace {
        // Room for some steps of a large model, so that the first of them do not pay for growing.
        Trace { begin: Instant::now(), paused: AtomicBool::new(false), slices: Mutex::new(Vec::with_capacity(1 << 14)) }
    }

    pub(super) fn add(
        &self,
        stream: StreamId,
        name: &'static str,
        waits: bool,
        place: Place,
        from: Instant,
        bytes: u64,
    ) {
        if self.paused.load(Ordering::Relaxed) {
            return;
        }
        let us = |at: Instant| (at - self.begin).as_secs_f64() * 1e6;
        let (begin_us, end_us) = (us(from), us(Instant::now()));
        let slice = Slice { stream, name, waits, place, begin_us, end_us, bytes };
        self.slices.lock().unwrap_or_else(|e| e.into_inner()).push(slice);
    }

    /// Keeps nothing from now on, or everything again.
    pub fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// All slices so far, in the order of their ends. Takes them out.
    pub fn take(&self) -> Vec<Slice> {
        std::mem::take(&mut self.slices.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

/// Writes slices in the Chrome trace format, which Perfetto and chrome://tracing open: one row per stream, step, layer and
/// bytes on every slice.
///
/// # Errors
/// What writing gives.
pub fn write_chrome(slices: &[Slice], mut out: impl Write) -> io::Result<()> {
    write!(out, "{{\"displayTimeUnit\":\"ns\",\"traceEvents\":[")?;
    for (i, stream) in StreamId::ALL.into_iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let (row, name) = (stream as usize, stream.name());
        write!(
            out,
            "{comma}\n{{\"ph\":\"M\",\"pid\":1,\"tid\":{row},\"name\":\"thread_name\",\"args\":{{\"name\":\"{name}\"}}}},\
             \n{{\"ph\":\"M\",\"pid\":1,\"tid\":{row},\"name\":\"thread_sort_index\",\"args\":{{\"sort_index\":{row}}}}}"
        )?;
    }
    for Slice { stream, name, waits, place, begin_us, end_us, bytes } in slices {
        let (row, us, category) = (*stream as usize, end_us - begin_us, if *waits { "wait" } else { "work" });
        let wait = if *waits { "wait: " } else { "" };
        write!(
            out,
            ",\n{{\"ph\":\"X\",\"pid\":1,\"tid\":{row},\"name\":\"{wait}{name}\",\"cat\":\"{category}\",\"ts\":{begin_us:.3},\
             \"dur\":{us:.3},\"args\":{{\"step\":{},\"layer\":{}",
            place.step,
            place.layer.map_or("null".to_string(), |l| l.to_string())
        )?;
        if *bytes > 0 {
            write!(out, ",\"bytes\":{bytes}")?;
        }
        write!(out, "}}}}")?;
    }
    writeln!(out, "\n]}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chrome_format_is_json_with_a_row_per_stream() {
        let place = Place { step: 3, layer: Some(1) };
        let slice =
            |stream, waits, bytes| Slice { stream, name: "gather", waits, place, begin_us: 1.5, end_us: 4.0, bytes };
        let slices = [slice(StreamId::Gather, false, 512), slice(StreamId::Compute, true, 0)];
        let mut text = Vec::new();
        write_chrome(&slices, &mut text).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let events = json["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 2 * StreamId::ALL.len() + 2);
        let gather = &events[events.len() - 2];
        assert_eq!((gather["dur"].as_f64(), gather["args"]["bytes"].as_u64()), (Some(2.5), Some(512)));
        assert_eq!((gather["args"]["step"].as_u64(), gather["args"]["layer"].as_u64()), (Some(3), Some(1)));
        assert_eq!(events[events.len() - 1]["name"], "wait: gather");
    }
}
