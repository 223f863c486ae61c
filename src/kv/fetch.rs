//! From a selection to pairs in their slots: find what is missing, gather it into a staging block, copy the block.
//!
//! ```text
//! compute   select l ─┐                                   ┌─ attend l (one step later)
//! gather              └─ host pages ▒░▓█ → staging block ─┐
//! copy in                                                 └─ staging block → slots ─┘
//! ```
//!
//! A fetch is one layer of all sequences of a batch (one sequence in the paper's schedule): one gather, one copy, one
//! event. Its memory is kept from pass to pass, so that fetching allocates nothing.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::cache::Cache;
use super::host::HostLayer;
use super::options::PAGE;
use super::prefetch::Slots;
use super::slab::PageRef;
use crate::device::buffer::{Line, unique_id};
use crate::device::link::CopyEngine;
use crate::device::order::{Resource, StreamId, Uses};
use crate::device::{Carried, Device, Event, Job, PREFETCH, Schedule};
use crate::gather::delta::Delta;
use crate::gather::{NodeId, Rows, Staging, Stores};

/// The most staging blocks, of at most a layer's pairs of a batch each.
const MAX_DEPTH: usize = 4;

/// Pairs of a selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Those that come from the host.
    pub fetched: u64,
    /// All of them.
    pub selected: u64,
}

/// The fetches of the calls that share some buffers.
#[derive(Default)]
pub struct FetchQueue {
    /// Of the device that the rest belongs to.
    engine: Option<Arc<CopyEngine>>,
    delta: Delta,
    /// `[layer]`: as many as were ever under way there at once. One, or one a sequence where each has a fetch of its
    /// own; more where several batches take turns.
    fetches: Vec<Vec<Fetch>>,
    /// Which one of its layer is being put together.
    open: Option<usize>,
    blocks: Vec<Block>,
    /// Launches so far: the next one takes block `turn % depth`.
    turn: usize,
    depth: usize,
    times: Arc<Times>,
    /// When the layers of this pass began.
    begin: Option<Instant>,
    /// How long this pass has waited for copies.
    exposed: Duration,
    /// What a layer's computation takes: [`layer_time`]; zero before the first pass.
    layer: Duration,
    /// What is being put together for a GPU.
    on_gpu: GpuFetch,
}

/// A block of host memory that pairs are gathered into and copied from, and after what it is free again.
struct Block {
    memory: Arc<Mutex<Vec<Line>>>,
    id: u64,
    free_after: Option<Event>,
}

impl Block {
    fn new() -> Block {
        Block { memory: Arc::default(), id: unique_id(), free_after: None }
    }
}

/// One layer's fetch, as its owner sees it.
struct Fetch {
    work: Arc<Mutex<Work>>,
    gather: Arc<GatherJob>,
    copy: Arc<CopyJob>,
    /// When it is done, so that it can be used again.
    done: Option<Event>,
}

/// One layer's fetch, as its jobs see it.
#[derive(Default)]
struct Work {
    sequences: Vec<Sequence>,
    rows: Vec<Row>,
    pair_bytes: usize,
    /// Pairs that the sequences may have at most, so that memory grows with them and not with each step's luck.
    room: usize,
    memory: Arc<Mutex<Vec<Line>>>,
    block: u64,
    /// When the last page that is read is on the host.
    paged_out: Option<Event>,
    failure: Option<Cow<'static, str>>,
}

/// Where a sequence's pairs come from and go to.
struct Sequence {
    host: Arc<HostLayer>,
    slots: Carried<Slots>,
    /// Its part of the rows.
    rows: Range<usize>,
    /// Why its pairs cannot come, though those of others can.
    failure: Option<String>,
}

/// As many bytes as the longest pair has: K and V of 1,024 channels at 16 bits.
static NOTHING: [u8; 4096] = [0; 4096];

/// One pair.
#[derive(Clone, Copy)]
struct Row {
    sequence: u32,
    page: u32,
    /// Its first byte in the host page.
    offset: u32,
    /// Its slot, counted over all KV heads.
    slot: u32,
}

/// What gathers and copies have taken lately, nanoseconds: the longest, which fades.
#[derive(Default)]
struct Times {
    gather: AtomicU64,
    copy: AtomicU64,
}

impl Times {
    fn note(longest: &AtomicU64, took: Duration) {
        // One thread writes each. A sixteenth less with each pass, so that one slow moment is forgotten after some steps.
        let faded = longest.load(Ordering::Relaxed) / 16 * 15;
        longest.store(faded.max(took.as_nanos() as u64), Ordering::Relaxed);
    }
}

/// Staging blocks that let gather and copy overlap as far as it helps. With `d` blocks a layer's fetch comes every
/// `max(g, c, (g + c) / d)`; more blocks are of no use once that is as short as the longest of gather, copy and the
/// layer's computation.
pub(crate) fn staging_depth(gather: Duration, copy: Duration, layer: Duration) -> usize {
    let longest = gather.max(copy).max(layer);
    if longest.is_zero() {
        return 1;
    }
    let depth = (gather + copy).as_secs_f64() / longest.as_secs_f64();
    (depth.ceil() as usize).clamp(1, MAX_DEPTH)
}

/// What a layer computes, from a pass of `n_layers` layers that took `pass` and waited `exposed` of it for copies, and from
/// what was thought `before`. The shortest, which grows by a sixteenth with each pass: the passes are of pre-decodes and
/// of batches that take turns, and a moment in which the machine was busy is none of the model's. A layer that is taken
/// for too short costs a staging block, one that is taken for too long costs time.
fn layer_time(before: Duration, pass: Duration, exposed: Duration, n_layers: usize) -> Duration {
    let computed = pass.saturating_sub(exposed) / n_layers.max(1) as u32;
    let known = if before.is_zero() { computed } else { computed.min(before + before / 16) };
    known.max(Duration::from_nanos(1))
}

impl FetchQueue {
    /// The layers of a pass begin: what the ones before took says how many staging blocks are used.
    pub fn begin_pass(&mut self, device: &Device) {
        let (engine, schedule) = (device.copy_engine(), device.pipeline());
        if self.engine.as_ref().is_none_or(|own| !Arc::ptr_eq(own, &engine)) {
            // Events mean nothing on another device. What is in flight there is held by its jobs and its sessions.
            *self = FetchQueue { engine: Some(engine), ..FetchQueue::default() };
        }
        let nanos = |time: &AtomicU64| Duration::from_nanos(time.load(Ordering::Relaxed));
        let layer = self.layer;
        self.depth = match schedule {
            Schedule::Serial => 1,
            Schedule::Stream => 2,
            // Nothing measured yet: enough for any case that is not bound by both at once.
            Schedule::Event if layer.is_zero() => 2,
            Schedule::Event => staging_depth(nanos(&self.times.gather), nanos(&self.times.copy), layer),
        };
        self.blocks.resize_with(self.blocks.len().max(self.depth), Block::new);
        (self.begin, self.exposed) = (Some(Instant::now()), Duration::ZERO);
    }

    /// The pass has waited so long for copies.
    pub fn note_wait(&mut self, exposed: Duration) {
        self.exposed += exposed;
    }

    /// All layers of the pass are done.
    pub fn end_pass(&mut self, n_layers: usize) {
        if let Some(begin) = self.begin.take() {
            self.layer = layer_time(self.layer, begin.elapsed(), self.exposed, n_layers);
        }
    }

    /// Adds what `cache` has newly selected in `layer` to the fetch that is being put together there. If no pair has to
    /// be fetched, the slots stay where they are.
    pub fn add(&mut self, device: &Device, cache: &mut Cache, layer: usize) -> Fetched {
        if device.gpu().is_some() {
            return self.on_gpu.add(cache, layer);
        }
        let (shape, keep) = (cache.shape, device.options().delta);
        let (prefetch, host, completion) = cache.fetching(layer);
        let fetch = open_fetch(&mut self.fetches, &mut self.open, device, &self.times, layer);
        let mut work = lock(&fetch.work);
        let Work { sequences, rows, .. } = &mut *work;
        let (sequence, first) = (sequences.len() as u32, rows.len());
        let slots = prefetch.slots_mut();
        let top_k = slots.top_k;
        rows.reserve(shape.n_kv_heads * top_k);
        self.delta.reserve(top_k);
        for head in 0..shape.n_kv_heads {
            slots.place(head, &mut self.delta, keep, |miss| {
                let (page, token) = (miss.position as usize / PAGE, miss.position as usize % PAGE);
                let slot = head as u32 * top_k as u32 + miss.slot;
                rows.push(Row { sequence, page: page as u32, offset: shape.pair(head, token).start as u32, slot });
            });
        }
        let rows = first..rows.len();
        let fetched = Fetched { fetched: rows.len() as u64, selected: (shape.n_kv_heads * slots.count) as u64 };
        if !rows.is_empty() {
            sequences.push(Sequence { host: host.clone(), slots: prefetch.send(), rows: rows.clone(), failure: None });
            work.pair_bytes = shape.pair_bytes();
            work.room += shape.n_kv_heads * top_k;
            let last = work.rows[rows].iter().map(|row| row.page).max().expect("there are rows");
            let complete = completion.of(last as usize);
            work.paged_out = complete.map(|event| event.later(work.paged_out)).or(work.paged_out);
        }
        fetched
    }

    /// On a GPU: launches what was added. Kernels have selected and know what is missing: `gather` launches what brings it, and
    /// says when the pairs are there. `selects`: the stream that has selected; `reads`: the one behind which pages are read.
    pub(crate) fn launch_on_gpu(
        &mut self,
        device: &Device,
        selects: StreamId,
        reads: StreamId,
        gather: impl FnOnce() -> Event,
    ) {
        self.on_gpu.launch(device, selects, reads, gather);
    }

    /// Launches what was added to `layer`, if anything was. `selects`: the stream that has selected.
    pub(crate) fn launch(&mut self, device: &Device, layer: usize, selects: StreamId) {
        let Some(open) = self.open.take() else { return };
        let fetch = &mut self.fetches[layer][open];
        let mut work = lock(&fetch.work);
        if work.sequences.is_empty() {
            return;
        }
        let block = &mut self.blocks[self.turn % self.depth];
        self.turn += 1;
        (work.memory, work.block) = (block.memory.clone(), block.id);
        device.after(StreamId::Gather, device.record(selects), "a selection is complete before its gather");
        if let Some(event) = work.paged_out.take() {
            device.after(StreamId::Gather, event, "host pages are complete before a gather");
        }
        if let Some(event) = block.free_after {
            device.after(StreamId::Gather, event, "a staging block is free before a gather");
        }
        let gathered = device.launch(StreamId::Gather, "gather", |u| work.gather_uses(u), fetch.gather.clone());
        device.after(StreamId::CopyIn, gathered, "a staging block is full before its copy");
        let copied = device.launch(StreamId::CopyIn, PREFETCH, |u| work.copy_uses(u), fetch.copy.clone());
        block.free_after = Some(copied);
        work.sequences.iter().for_each(|sequence| sequence.slots.depart(copied));
        fetch.done = Some(copied);
    }
}

/// What a GPU fetches next. Its kernel reads the pairs from pinned pages by itself, or asks threads of the host for them
/// (`cuda/host_gather.rs`): either way the host's program learns what was fetched when the pass is over.
#[derive(Default)]
struct GpuFetch {
    slots: Vec<Carried<Slots>>,
    /// Host pages that may be read: a table, and how many of its first pages.
    pages: Vec<(Arc<HostLayer>, usize)>,
    /// When the last of them is complete.
    complete: Option<Event>,
}

impl GpuFetch {
    fn add(&mut self, cache: &mut Cache, layer: usize) -> Fetched {
        let (n_kv_heads, n_pages) = (cache.shape.n_kv_heads, cache.counters.no / PAGE);
        let (prefetch, host, completion) = cache.fetching(layer);
        let count = prefetch.slots().count;
        if count > 0 {
            self.pages.push((host.clone(), n_pages));
            self.slots.push(prefetch.send());
            let complete = completion.of(n_pages - 1);
            self.complete = complete.map(|event| event.later(self.complete)).or(self.complete);
        }
        Fetched { fetched: 0, selected: (n_kv_heads * count) as u64 }
    }

    fn launch(&mut self, device: &Device, selects: StreamId, reads: StreamId, gather: impl FnOnce() -> Event) {
        if self.slots.is_empty() {
            return;
        }
        if let Some(event) = self.complete.take() {
            device.after(reads, event, "host pages are complete before a gather");
        }
        device.after(StreamId::CopyIn, device.record(selects), "a selection is complete before its gather");
        let prefetch = device.operation_on(StreamId::CopyIn, PREFETCH, 0, |uses| {
            uses.reads.extend(self.pages.iter().flat_map(|(host, n)| (0..*n).filter_map(|page| host.resource(page))));
            for slots in &self.slots {
                slots.look(|slots| {
                    uses.reads.push(Resource::Selection(slots.positions.id()));
                    uses.writes.push(Resource::Slots(slots.pairs.id()));
                });
            }
        });
        let event = gather();
        drop(prefetch);
        for slots in self.slots.drain(..) {
            slots.work(|_| Ok(())); // what fails on the GPU, its driver tells at the end of the pass
            slots.depart(event);
        }
        self.pages.clear();
    }
}

/// The fetch that is being put together in a layer: the first that is not under way, made where all are.
fn open_fetch<'q>(
    fetches: &'q mut Vec<Vec<Fetch>>,
    open: &mut Option<usize>,
    device: &Device,
    times: &Arc<Times>,
    layer: usize,
) -> &'q mut Fetch {
    fetches.resize_with(fetches.len().max(layer + 1), Vec::new);
    let fetches = &mut fetches[layer];
    let open = *open.get_or_insert_with(|| {
        let free = fetches.iter().position(|fetch| fetch.done.is_none_or(|event| device.has_passed(event)));
        free.unwrap_or_else(|| {
            fetches.push(Fetch::new(device, times));
            fetches.len() - 1
        })
    });
    &mut fetches[open]
}

impl Fetch {
    fn new(device: &Device, times: &Arc<Times>) -> Fetch {
        let (work, engine, times) = (Arc::<Mutex<Work>>::default(), device.copy_engine(), times.clone());
        let gather = Arc::new(GatherJob { work: work.clone(), engine: engine.clone(), times: times.clone() });
        let copy = Arc::new(CopyJob { work: work.clone(), engine, times });
        Fetch { work, gather, copy, done: None }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Work {
    fn gather_uses(&self, uses: &mut Uses) {
        let row = |row: &Row| self.sequences[row.sequence as usize].host.resource(row.page as usize);
        uses.reads.extend(self.rows.iter().flat_map(row));
        self.for_each_slots(|slots| uses.reads.push(Resource::Selection(slots.positions.id())));
        uses.writes.push(Resource::Staging(self.block));
    }

    fn copy_uses(&self, uses: &mut Uses) {
        uses.reads.push(Resource::Staging(self.block));
        self.for_each_slots(|slots| uses.writes.push(Resource::Slots(slots.pairs.id())));
    }

    fn for_each_slots(&self, mut each: impl FnMut(&Slots)) {
        self.sequences.iter().for_each(|sequence| sequence.slots.look(&mut each));
    }

    fn bytes(&self) -> usize {
        self.rows.len() * self.pair_bytes
    }

    /// All pairs into the staging block, in the order of the rows.
    fn gather(&mut self, engine: &CopyEngine) -> Result<(), String> {
        engine.check()?;
        for Sequence { host, rows: own, failure, .. } in &mut self.sequences {
            let missing = self.rows[own.clone()].iter().find(|row| host.page(row.page as usize).is_none());
            *failure = missing.map(|row| format!("page {} is not on the host", row.page));
        }
        let Work { sequences, rows, pair_bytes, .. } = &*self;
        let page = |i: usize| sequences[rows[i].sequence as usize].host.page(rows[i].page as usize);
        let mut memory = lock(&self.memory);
        let lines = (self.room * pair_bytes).div_ceil(size_of::<Line>()).max(memory.len());
        memory.resize(lines, Line::default());
        // Where a page is missing its sequence fails, and what it is given does not matter.
        let source = |i: usize| page(i).map_or(&NOTHING[..], |page| &page.bytes()[rows[i].offset as usize..]);
        let source = |i: usize| &source(i)[..*pair_bytes];
        let node = |i: usize| page(i).and_then(PageRef::node).unwrap_or(NodeId(0));
        let bytes = &mut bytemuck::cast_slice_mut(&mut memory[..])[..self.bytes()];
        let gathered = Rows { n_rows: rows.len(), row_bytes: *pair_bytes, source, node };
        engine.gather.reserve(self.room);
        // The copy comes right afterwards, and on this device it reads the block through the caches.
        engine.gather(&gathered, Staging { bytes, slot: |i| i }, Stores::Temporal);
        Ok(())
    }

    /// The staging block into the slots of one sequence.
    fn copy(&self, rows: Range<usize>, slots: &mut Slots) {
        let memory = lock(&self.memory);
        let bytes: &[u8] = bytemuck::cast_slice(&memory[..]);
        let pairs = slots.pairs.bytes_mut().chunks_exact_mut(self.pair_bytes);
        let mut pairs = pairs.enumerate();
        let from = bytes[rows.start * self.pair_bytes..].chunks_exact(self.pair_bytes);
        // Slots ascend within a sequence, so one walk over them meets all.
        for (row, from) in self.rows[rows].iter().zip(from) {
            let (_, to) = pairs.find(|(slot, _)| *slot == row.slot as usize).expect("slots ascend");
            to.copy_from_slice(from);
        }
    }
}

/// First half of a fetch.
struct GatherJob {
    work: Arc<Mutex<Work>>,
    engine: Arc<CopyEngine>,
    times: Arc<Times>,
}

impl Job for GatherJob {
    fn run(&self) -> u64 {
        let start = Instant::now();
        let mut work = lock(&self.work);
        // The copy would tell a panic's waiter of nothing, if it were not noted before.
        work.failure = Some(Cow::Borrowed("a thread of the gather panicked"));
        work.failure = work.gather(&self.engine).err().map(Cow::Owned);
        Times::note(&self.times.gather, start.elapsed());
        work.bytes() as u64
    }
}

/// Second half of a fetch.
struct CopyJob {
    work: Arc<Mutex<Work>>,
    engine: Arc<CopyEngine>,
    times: Arc<Times>,
}

/// The work of a fetch that is about to end: what it held is its owners' alone afterwards, however it ends.
struct Ending<'a>(MutexGuard<'a, Work>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.sequences.clear();
        self.0.rows.clear();
        self.0.room = 0;
    }
}

impl Job for CopyJob {
    fn run(&self) -> u64 {
        let start = Instant::now();
        let mut ending = Ending(lock(&self.work));
        let work = &mut *ending.0;
        let bytes = work.bytes() as u64;
        let failure = work.failure.take().or_else(|| self.engine.check().err().map(Cow::Owned));
        self.engine.transfer(bytes, || {
            for sequence in &work.sequences {
                let failure = failure.as_deref().or(sequence.failure.as_deref());
                sequence.slots.work(|slots| match failure {
                    Some(why) => Err(why.to_string()),
                    None => {
                        work.copy(sequence.rows.clone(), slots);
                        Ok(())
                    }
                });
            }
        });
        Times::note(&self.times.copy, start.elapsed());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Copies as long as a layer need two staging blocks, and go on having two after a pass that waited for them, after one
    /// that met a busy machine, and after a pre-decode.
    #[test]
    fn the_staging_depth_stays_while_the_costs_do() {
        let us = Duration::from_micros;
        let (gather, copy) = (us(40), us(90));
        let mut layer = Duration::ZERO;
        // Whole passes of 10 layers, and how long they waited.
        for (pass, exposed) in [(1000, 0), (1900, 900), (1000, 0), (5000, 300), (1000, 10), (900, 0), (1000, 0)] {
            layer = layer_time(layer, us(pass), us(exposed), 10);
            assert_eq!(staging_depth(gather, copy, layer), 2, "{pass} us, {exposed} exposed: a layer of {layer:?}");
        }
        // A context that grows is followed.
        (0..60).for_each(|_| layer = layer_time(layer, us(9000), us(0), 10));
        assert_eq!(layer, us(900));
        assert!(!layer_time(layer, us(10), us(20), 10).is_zero());
    }
}
