//! What ran when: slices of all streams, in memory until they are asked for.
//!
//! Tracing is off unless the device was made with it; then an operation costs one look at an option.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::nvtx;
use super::order::StreamId;
use super::schedule::Schedule;
use crate::gather::{NodeId, NodeShare};

/// Where in the program an operation belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Pass of the device since it was made, from 1; 0 before the first.
    pub step: u32,
    /// Model layer; `None` before and behind the layers.
    pub layer: Option<u32>,
    /// How the pass waits for copies.
    pub schedule: Schedule,
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place { step: 0, layer: None, schedule: Schedule::Event }) };
    /// The layer, for a profiler.
    static LAYER: Cell<Option<nvtx::Range>> = const { Cell::new(None) };
}

impl Place {
    /// Where the calling thread is.
    pub fn current() -> Place {
        PLACE.get()
    }

    /// The calling thread goes there.
    pub(crate) fn enter(self) {
        PLACE.set(self);
    }

    /// The calling thread goes there until what is returned is dropped.
    pub(super) fn visit(self) -> Visit {
        let (layer_before, _step) = (LAYER.take(), nvtx::range(format_args!("step {}", self.step)));
        Visit { before: PLACE.replace(self), layer_before, _step }
    }

    /// The calling thread comes to a layer of its step, or leaves the layers.
    pub(super) fn enter_layer(layer: Option<u32>) {
        drop(LAYER.take());
        Place { layer, ..Place::current() }.enter();
        LAYER.set(layer.and_then(|layer| nvtx::range(format_args!("layer {layer}"))));
    }

    /// The layer's number for people: 0 where there is none.
    pub fn layer_or_0(self) -> usize {
        self.layer.unwrap_or(0) as usize
    }
}

/// The calling thread is elsewhere. Dropped, it is where it was before: a thread that waits for others in the middle of
/// a step may be given a whole step of another session to do.
#[must_use = "the thread goes back when this is dropped"]
pub(crate) struct Visit {
    before: Place,
    /// The layer that the thread was in, for a profiler.
    layer_before: Option<nvtx::Range>,
    _step: Option<nvtx::Range>,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.before.enter();
        drop(LAYER.take()); // where an error left it, before the step that it is in
        self._step = None;
        LAYER.set(self.layer_before.take());
    }
}

/// One operation on the time line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slice {
    /// Whose row it is in.
    pub stream: StreamId,
    /// The part of a gather that the threads of one NUMA node did, on a row of its own; the whole gather has none.
    pub node: Option<NodeId>,
    /// The operation, or what the compute stream waited for.
    pub name: &'static str,
    /// A wait, not work.
    pub waits: bool,
    /// Step, layer, schedule.
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
        let (begin_us, end_us) = (self.us(from), self.us(Instant::now()));
        self.push(Slice { stream, node: None, name, waits, place, begin_us, end_us, bytes });
    }

    /// A node's part of the gather that the calling thread does.
    pub(super) fn add_share(&self, share: NodeShare) {
        let NodeShare { node, begin, end, bytes } = share;
        let (begin_us, end_us, place) = (self.us(begin), self.us(end), Place::current());
        let (stream, node) = (StreamId::Gather, Some(node));
        self.push(Slice { stream, node, name: "gather", waits: false, place, begin_us, end_us, bytes });
    }

    /// The time of the trace at a moment.
    pub(super) fn us(&self, at: Instant) -> f64 {
        (at - self.begin).as_secs_f64() * 1e6
    }

    pub(super) fn push(&self, slice: Slice) {
        if self.paused.load(Ordering::Relaxed) {
            return;
        }
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

    /// Puts back what was taken and could not be used: it lies before what has been added since.
    pub fn put_back(&self, mut taken: Vec<Slice>) {
        let mut slices = self.slices.lock().unwrap_or_else(|e| e.into_inner());
        taken.append(&mut slices);
        *slices = taken;
    }
}

/// The streams that have a row: all but that of a CPU's gather threads where none gathered, as on a GPU, whose copy-in queue
/// does it.
pub fn streams(slices: &[Slice]) -> impl Iterator<Item = StreamId> {
    let gathers = slices.iter().any(|slice| slice.stream == StreamId::Gather);
    StreamId::ALL.into_iter().filter(move |&stream| gathers || stream != StreamId::Gather)
}

/// A row of the picture: a stream, or the threads of a node in a gather.
type Row = (StreamId, Option<NodeId>);

/// Its number, which is its place from the top too: the nodes come behind the gather stream. The kernel has less than
/// 2^16.
fn row_number((stream, node): Row) -> u32 {
    (stream as u32) << 17 | node.map_or(0, |node| node.0 + 1)
}

/// Its name.
fn row_name((stream, node): Row) -> String {
    match node {
        Some(node) => format!("{}, node {}", stream.name(), node.0),
        None => stream.name().into(),
    }
}

/// Writes slices in the Chrome trace format, which Perfetto and chrome://tracing open: one row per stream and one per
/// NUMA node that pairs were gathered from; step, layer, schedule and bytes on every slice.
///
/// # Errors
/// What writing gives.
pub fn write_chrome(slices: &[Slice], mut out: impl Write) -> io::Result<()> {
    write!(out, "{{\"displayTimeUnit\":\"ns\",\"traceEvents\":[")?;
    let streams = streams(slices).map(|stream| (stream, None));
    let nodes: BTreeSet<Row> = slices.iter().filter(|s| s.node.is_some()).map(|s| (s.stream, s.node)).collect();
    for (i, row) in streams.chain(nodes).enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let (name, row) = (row_name(row), row_number(row));
        write!(
            out,
            "{comma}\n{{\"ph\":\"M\",\"pid\":1,\"tid\":{row},\"name\":\"thread_name\",\"args\":{{\"name\":\"{name}\"}}}},\
             \n{{\"ph\":\"M\",\"pid\":1,\"tid\":{row},\"name\":\"thread_sort_index\",\"args\":{{\"sort_index\":{row}}}}}"
        )?;
    }
    for Slice { stream, node, name, waits, place, begin_us, end_us, bytes } in slices {
        let row = row_number((*stream, *node));
        let (us, category) = (end_us - begin_us, if *waits { "wait" } else { "work" });
        let wait = if *waits { "wait: " } else { "" };
        write!(
            out,
            ",\n{{\"ph\":\"X\",\"pid\":1,\"tid\":{row},\"name\":\"{wait}{name}\",\"cat\":\"{category}\",\"ts\":{begin_us:.3},\
             \"dur\":{us:.3},\"args\":{{\"step\":{},\"layer\":{},\"schedule\":\"{}\"",
            place.step,
            place.layer.map_or("null".to_string(), |l| l.to_string()),
            place.schedule.name()
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
    fn a_visit_ends_where_it_began() {
        let place = |step, layer| Place { step, layer, ..Place::default() };
        let before = Place::current();
        let outer = place(1, None).visit();
        place(1, Some(3)).enter();
        {
            let _inner = place(2, None).visit();
            place(2, Some(0)).enter();
        }
        assert_eq!(Place::current(), place(1, Some(3)));
        drop(outer);
        assert_eq!(Place::current(), before);
    }

    #[test]
    fn the_chrome_format_is_json_with_a_row_per_stream_and_node() {
        let place = Place { step: 3, layer: Some(1), schedule: Schedule::Stream };
        let slice = |stream, node: Option<u32>, waits, bytes| {
            let (node, name, begin_us, end_us) = (node.map(NodeId), "gather", 1.5, 4.0);
            Slice { stream, node, name, waits, place, begin_us, end_us, bytes }
        };
        let share = |node| slice(StreamId::Gather, Some(node), false, 256);
        let slices =
            [share(1), share(0), slice(StreamId::Gather, None, false, 512), slice(StreamId::Compute, None, true, 0)];
        let mut text = Vec::new();
        write_chrome(&slices, &mut text).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let events = json["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 2 * (StreamId::ALL.len() + 2) + slices.len());
        let mut rows: Vec<(u64, &str)> = events
            .iter()
            .filter(|event| event["name"] == "thread_name")
            .map(|event| (event["tid"].as_u64().unwrap(), event["args"]["name"].as_str().unwrap()))
            .collect();
        rows.sort_unstable();
        let names = ["compute", "gather", "gather, node 0", "gather, node 1", "copy-in", "copy-out"];
        assert_eq!(rows.iter().map(|row| row.1).collect::<Vec<_>>(), names);
        let of_node_1 = &events[events.len() - 4];
        assert_eq!((of_node_1["tid"].as_u64(), of_node_1["args"]["bytes"].as_u64()), (Some(rows[3].0), Some(256)));
        let gather = &events[events.len() - 2];
        assert_eq!((gather["dur"].as_f64(), gather["args"]["bytes"].as_u64()), (Some(2.5), Some(512)));
        assert_eq!((gather["args"]["step"].as_u64(), gather["args"]["layer"].as_u64()), (Some(3), Some(1)));
        assert_eq!(
            (&gather["args"]["schedule"], &events[events.len() - 1]["name"]),
            (&"stream".into(), &"wait: gather".into())
        );
    }

    #[test]
    fn there_is_no_row_for_gather_threads_that_do_not_gather() {
        let slice = |stream| Slice {
            stream,
            node: None,
            name: "prefetch",
            waits: false,
            place: Place::default(),
            begin_us: 0.0,
            end_us: 1.0,
            bytes: 0,
        };
        assert_eq!(streams(&[slice(StreamId::Gather)]).count(), 4);
        let rows: Vec<_> = streams(&[slice(StreamId::CopyIn)]).collect();
        assert_eq!(rows, [StreamId::Compute, StreamId::CopyIn, StreamId::CopyOut]);
    }
}
