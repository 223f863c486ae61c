//! Gathering scattered rows of host memory into one block: the 16-bit pairs of a selection, on their way to the device.
//!
//! ```text
//! host pages (over several nodes)      staging block
//! ┌────────┐ ┌────────┐ ┌────────┐
//! │  ░     │ │ ▓      │ │     ▒  │  →  ▒░▓█            →  one copy to the device
//! │     █  │ └────────┘ └────────┘     slot 0, 1, 2, 3
//! └────────┘
//! ```
//!
//! [`Topology`] says which CPUs are next to which memory, [`pool`] keeps threads there, [`copy`] moves the rows, and
//! [`delta`] finds which rows need not be moved because they are in their slots from the step before.
#![allow(unsafe_code)] // Several threads write one block.

mod affinity;
mod copy;
mod cpulist;
pub mod delta;
mod futex;
mod pool;
mod quota;
mod slots;
mod topology;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError};
use std::time::{Duration, Instant};

pub use affinity::node_of_address;
pub use copy::Stores;
pub use topology::{Node, NodeId, Topology};

use crate::cpu::Isa;
use crate::error::Result;
use copy::{BATCH, Move};
use pool::Pool;
use slots::{Slots, Way};

/// Least and most bytes that a thread takes at a time: half a microsecond of work and four. Between them so many that
/// each thread comes [`TURNS`] times: threads finish together, and yet many rows are found at once.
const BLOCK_BYTES: (usize, usize) = (8 << 10, 64 << 10);

/// Times that each thread takes a block, if all are equally fast.
const TURNS: usize = 8;

/// Threads by default, where the machine has as many: a few cores saturate their memory, and a gather only has to keep
/// up with the bus to the device.
const DEFAULT_THREADS: usize = 16;

/// How to gather.
#[derive(Clone, Copy, Debug)]
pub struct GatherOptions {
    /// Threads, the caller's among them; `None` for as many as can run at once, up to 16.
    pub threads: Option<usize>,
    /// The instruction set of the copies.
    pub isa: Isa,
    /// Gathers of fewer bytes run on the calling thread alone: waking helpers costs it some microseconds, and they come
    /// tens of microseconds later. On a virtual machine with two cores, 256 KiB took 10 us alone and 13 us with a helper
    /// even while nothing else ran, 2 MiB 83 and 63 us.
    pub alone_below: usize,
    /// Bytes between the row that is copied and the one that is asked for.
    pub ahead: usize,
}

impl Default for GatherOptions {
    fn default() -> Self {
        GatherOptions { threads: None, isa: Isa::detect(), alone_below: 512 << 10, ahead: 12 << 10 }
    }
}

/// Rows that are gathered.
pub struct Rows<S, N> {
    /// How many.
    pub n_rows: usize,
    /// Bytes of each.
    pub row_bytes: usize,
    /// `Fn(usize) -> &[u8]`: the row with this index, of `row_bytes` bytes.
    pub source: S,
    /// `Fn(usize) -> NodeId`: the node that holds it. Not asked where there is one node.
    pub node: N,
}

/// The block that they go to.
pub struct Staging<'d, D> {
    /// The block: slots of `row_bytes` bytes.
    pub bytes: &'d mut [u8],
    /// `Fn(usize) -> usize`: the slot of the row with this index; no two the same. Ascending slots are checked fastest.
    pub slot: D,
}

/// What a gather did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GatherStats {
    /// Bytes copied.
    pub bytes: u64,
    /// Time from call to return.
    pub nanos: u64,
}

/// What was gathered from one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeShare {
    /// Which node.
    pub node: NodeId,
    /// When the first of its threads began.
    pub begin: Instant,
    /// When the last of its threads was done.
    pub end: Instant,
    /// Bytes copied.
    pub bytes: u64,
}

/// Gathers rows with the threads of all nodes. Nothing is allocated per call once the largest number of rows has been
/// seen ([`Gather::reserve`] sees it beforehand).
pub struct Gather {
    topology: Topology,
    options: GatherOptions,
    threads: usize,
    /// Why a helper could not be bound.
    pin_refused: Option<String>,
    /// The caller's node: where in the topology.
    own_node: usize,
    /// Whether a caller has bound itself, or why it could not.
    own_bound: OnceLock<Result<(), String>>,
    /// Who holds it gathers with helpers; others at the same time gather alone.
    team: Mutex<Team>,
}

struct Team {
    pool: Pool,
    slots: Slots,
    /// Per node.
    cursors: Vec<Cursor>,
}

/// How far a node is. On a cache line of its own, as threads of one node change it.
#[derive(Default)]
#[repr(align(64))]
struct Cursor {
    /// The first row that nobody has taken.
    next: AtomicUsize,
    /// The node's share, if somebody watches: nanoseconds since the gather began, rows.
    begin: AtomicU64,
    end: AtomicU64,
    rows: AtomicUsize,
}

impl Cursor {
    fn reset(&self) {
        self.next.store(0, Ordering::Relaxed);
        self.begin.store(u64::MAX, Ordering::Relaxed);
        self.end.store(0, Ordering::Relaxed);
        self.rows.store(0, Ordering::Relaxed);
    }

    /// A thread has copied so many rows. Relaxed: the pool orders this before whoever reads it.
    fn note(&self, begin: Duration, end: Duration, rows: usize) {
        self.begin.fetch_min(begin.as_nanos() as u64, Ordering::Relaxed);
        self.end.fetch_max(end.as_nanos() as u64, Ordering::Relaxed);
        self.rows.fetch_add(rows, Ordering::Relaxed);
    }
}

impl Gather {
    /// Starts the threads.
    ///
    /// # Errors
    /// If the system refuses one.
    pub fn new(topology: Topology, options: GatherOptions) -> Result<Gather> {
        let threads = options.threads.unwrap_or(DEFAULT_THREADS.min(topology.threads())).max(1);
        let pool = Pool::new(&topology, threads - 1)?;
        let pin_refused = pool.pin_refused().map(ToString::to_string);
        let (own_node, own_bound) = (pool.own_node(), OnceLock::new());
        let cursors = topology.nodes().iter().map(|_| Cursor::default()).collect();
        let team = Mutex::new(Team { pool, slots: Slots::default(), cursors });
        Ok(Gather { topology, options, threads, pin_refused, own_node, own_bound, team })
    }

    /// The nodes, threads and instruction set, and what did not work: for logs.
    pub fn describe(&self) -> String {
        let bound = match (self.pin_refused(), self.own_bound.get()) {
            (Some(why), _) => format!("not bound to NUMA nodes: {why}"),
            (None, Some(_)) => "bound to NUMA nodes".into(),
            (None, None) if self.threads == 1 => "the caller's, not bound".into(),
            (None, None) => "all but the caller's bound to NUMA nodes".into(),
        };
        let (topology, s) = (self.topology.describe(), if self.threads == 1 { "" } else { "s" });
        format!("gather: {} thread{s} ({bound}), {}; {topology}", self.threads, self.options.isa)
    }

    /// Binds the calling thread, which is to gather from now on, to the node that the other threads leave to it: then each
    /// node has a thread beside its memory if there are as many.
    pub fn bind_caller(&self) {
        let cpus = &self.topology.nodes()[self.own_node].cpus;
        // The first thread tells for all.
        let _ = self.own_bound.set(affinity::pin(cpus).map_err(|refused| refused.to_string()));
    }

    /// The nodes that it knows.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Why the threads could not be bound to their nodes, if that is so. They work all the same.
    pub fn pin_refused(&self) -> Option<&str> {
        let own = self.own_bound.get().and_then(|bound| bound.as_ref().err());
        self.pin_refused.as_ref().or(own).map(String::as_str)
    }

    /// Threads that gather, the caller's among them.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Allocates now what a gather of `n_rows` rows into ascending slots needs.
    pub fn reserve(&self, n_rows: usize) {
        let mut team = self.team.lock().unwrap_or_else(|e| e.into_inner());
        team.slots.reserve(n_rows);
    }

    /// Copies every row to its slot. Slots that no row goes to keep their bytes.
    ///
    /// # Panics
    /// If a row has not `row_bytes` bytes, a slot is outside of the block, or two rows go to the same slot (a gather on
    /// the calling thread alone notices the last only in debug builds; there the later row stays).
    pub fn gather<'a, S, N, D>(&self, rows: &Rows<S, N>, to: Staging<'_, D>, stores: Stores) -> GatherStats
    where
        S: Fn(usize) -> &'a [u8] + Sync,
        N: Fn(usize) -> NodeId + Sync,
        D: Fn(usize) -> usize,
    {
        self.gather_watched(rows, to, stores, None)
    }

    /// As [`Gather::gather`]; `watch` hears afterwards what was gathered from each node.
    ///
    /// # Panics
    /// As there.
    pub fn gather_watched<'a, S, N, D>(
        &self,
        rows: &Rows<S, N>,
        to: Staging<'_, D>,
        stores: Stores,
        watch: Option<&dyn Fn(NodeShare)>,
    ) -> GatherStats
    where
        S: Fn(usize) -> &'a [u8] + Sync,
        N: Fn(usize) -> NodeId + Sync,
        D: Fn(usize) -> usize,
    {
        let start = Instant::now();
        let bytes = rows.n_rows * rows.row_bytes;
        let job = Job::new(self, rows, to.bytes, stores, watch.map(|watch| Watch { start, watch }));
        if bytes < self.options.alone_below || self.threads == 1 {
            job.alone(&to.slot);
        } else {
            match self.team.try_lock() {
                Ok(mut team) => job.together(&mut team, &to.slot),
                // After a panic the scratch space is as good as before: every gather writes it anew.
                Err(TryLockError::Poisoned(team)) => job.together(&mut team.into_inner(), &to.slot),
                Err(TryLockError::WouldBlock) => job.alone(&to.slot),
            }
        }
        GatherStats { bytes: bytes as u64, nanos: start.elapsed().as_nanos() as u64 }
    }
}

/// One gather, as its threads see it.
struct Job<'j, S, N> {
    gather: &'j Gather,
    rows: &'j Rows<S, N>,
    /// The staging block: valid for `n_slots * row_bytes` bytes and lent to this job alone.
    to: *mut u8,
    n_slots: usize,
    stores: Stores,
    block_rows: usize,
    watch: Option<Watch<'j>>,
}

/// Whoever wants to know what each node did.
struct Watch<'j> {
    /// When the gather began.
    start: Instant,
    /// Called on the caller's thread only.
    watch: &'j dyn Fn(NodeShare),
}

// SAFETY: the rows may be shared by their bounds; threads write through `to` to distinct slots; `Watch::watch` is
// called by the thread that made the job, the others read `start`.
unsafe impl<S: Sync, N: Sync> Sync for Job<'_, S, N> {}

impl<'a, 'j, S, N> Job<'j, S, N>
where
    S: Fn(usize) -> &'a [u8] + Sync,
    N: Fn(usize) -> NodeId + Sync,
{
    fn new(
        gather: &'j Gather,
        rows: &'j Rows<S, N>,
        to: &'j mut [u8],
        stores: Stores,
        watch: Option<Watch<'j>>,
    ) -> Self {
        let row_bytes = rows.row_bytes.max(1);
        let [least, most] = [BLOCK_BYTES.0, BLOCK_BYTES.1].map(|bytes| (bytes / row_bytes).clamp(1, BATCH));
        let block_rows = (rows.n_rows / (TURNS * gather.threads)).clamp(least, most);
        Job { gather, rows, to: to.as_mut_ptr(), n_slots: to.len() / row_bytes, stores, block_rows, watch }
    }

    /// All rows, on this thread.
    fn alone(&self, slot: &impl Fn(usize) -> usize) {
        debug_assert!(distinct((0..self.rows.n_rows).map(slot)), "two rows go to the same slot");
        let mut next = 0;
        self.copy(
            #[inline(always)]
            |found| {
                let rows = next..self.rows.n_rows.min(next + found.len());
                next = rows.end;
                for (found, i) in found.iter_mut().zip(rows.clone()) {
                    *found = self.row(i, slot(i));
                }
                rows.len()
            },
        );
        if let Some(Watch { start, watch }) = &self.watch {
            let (node, bytes) = (self.gather.topology.nodes()[self.here()].id, self.rows.n_rows * self.rows.row_bytes);
            watch(NodeShare { node, begin: *start, end: Instant::now(), bytes: bytes as u64 });
        }
    }

    /// All rows, by the threads of the nodes that hold them.
    fn together(&self, team: &mut Team, slot: &impl Fn(usize) -> usize) {
        let ways = team.slots.resolve(self.rows.n_rows, self.n_slots, |i| Way { slot: slot(i), home: self.home(i) });
        let cursors = &team.cursors[..];
        cursors.iter().for_each(Cursor::reset);
        let share = |node: usize| self.copy_share(node, &cursors[node], ways);
        let own = || {
            // First what is near, then what the others have not taken: waiting for them would take longer.
            let here = self.here();
            for i in 0..cursors.len() {
                share((here + i) % cursors.len());
            }
        };
        let blocks = self.rows.n_rows.div_ceil(self.block_rows);
        team.pool.run(blocks.saturating_sub(1), &share, own);
        if let Some(watched) = &self.watch {
            self.tell(watched, cursors);
        }
    }

    /// Tells the watch of every node that had rows.
    fn tell(&self, Watch { start, watch }: &Watch, cursors: &[Cursor]) {
        for (node, cursor) in self.gather.topology.nodes().iter().zip(cursors) {
            let at = |nanos: &AtomicU64| *start + Duration::from_nanos(nanos.load(Ordering::Relaxed));
            let bytes = (cursor.rows.load(Ordering::Relaxed) * self.rows.row_bytes) as u64;
            if bytes > 0 {
                watch(NodeShare { node: node.id, begin: at(&cursor.begin), end: at(&cursor.end), bytes });
            }
        }
    }

    /// The node whose threads copy row `i`.
    fn home(&self, i: usize) -> usize {
        let topology = &self.gather.topology;
        if topology.nodes().len() == 1 { 0 } else { topology.home((self.rows.node)(i)) }
    }

    /// The node of the calling thread.
    fn here(&self) -> usize {
        let topology = &self.gather.topology;
        if topology.nodes().len() == 1 {
            return 0;
        }
        affinity::current().and_then(|cpu| topology.node_of_cpu(cpu)).unwrap_or(0)
    }

    /// Rows of one node, block by block until none is left.
    fn copy_share(&self, node: usize, cursor: &Cursor, ways: &[Way]) {
        let begin = self.watch.as_ref().map(|watch| watch.start.elapsed());
        let mut copied = 0;
        self.copy(
            #[inline(always)]
            |found| loop {
                // Relaxed: which block it is matters, not when; the pool orders the bytes.
                let first = cursor.next.fetch_add(self.block_rows, Ordering::Relaxed);
                let Some(block) = ways.get(first..ways.len().min(first + self.block_rows)) else { return 0 };
                let near = (first..).zip(block).filter(|(_, way)| way.home == node);
                let mut n = 0;
                for (found, (i, way)) in found.iter_mut().zip(near) {
                    *found = self.row(i, way.slot);
                    n += 1;
                }
                // Of a block there may be no row here.
                if n > 0 || block.is_empty() {
                    copied += n;
                    return n;
                }
            },
        );
        if let (Some(watch), Some(begin), true) = (&self.watch, begin, copied > 0) {
            cursor.note(begin, watch.start.elapsed(), copied);
        }
    }

    #[inline(always)]
    fn copy(&self, find: impl FnMut(&mut [Move]) -> usize) {
        let (isa, row_bytes) = (self.gather.options.isa, self.rows.row_bytes);
        let ahead = self.gather.options.ahead / row_bytes.max(1);
        // SAFETY: `row` has checked both ends. The slots of rows that run on different threads are distinct
        // (`Slots::resolve`), and the block is lent to this job alone, so no source lies in it.
        unsafe { copy::copy_rows(isa, self.stores, find, row_bytes, ahead) };
        copy::fence(self.stores);
    }

    /// The way of row `i`, with both ends checked.
    #[inline(always)]
    fn row(&self, i: usize, slot: usize) -> Move {
        let from = (self.rows.source)(i);
        if from.len() != self.rows.row_bytes {
            wrong_length(i, from.len());
        }
        if slot >= self.n_slots {
            outside(slot, self.n_slots);
        }
        // SAFETY: inside of the block, as was just checked.
        Move { from: from.as_ptr(), to: unsafe { self.to.add(slot * self.rows.row_bytes) } }
    }
}

/// Takes its numbers by value: with the message in the loop that finds rows they would live in memory there.
#[cold]
#[inline(never)]
fn wrong_length(i: usize, n_bytes: usize) -> ! {
    panic!("row {i} has {n_bytes} bytes")
}

/// As above.
#[cold]
#[inline(never)]
fn outside(slot: usize, n_slots: usize) -> ! {
    panic!("slot {slot} of a staging block of {n_slots}")
}

/// For debug builds.
fn distinct(slots: impl Iterator<Item = usize>) -> bool {
    let mut seen = std::collections::HashSet::new();
    slots.into_iter().all(|slot| seen.insert(slot))
}
