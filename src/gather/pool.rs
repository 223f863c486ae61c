//! Threads next to each node's memory that help a caller for some microseconds at a time.
//!
//! A gather takes tens of microseconds, as long as a sleeping thread takes to wake. So nobody waits for a helper to
//! arrive: the caller begins at once, helpers join when they are awake, and when no work is left the caller closes the
//! gate and waits only for those inside. A helper that comes too late finds the gate closed and sleeps again.
//!
//! ```text
//! caller   open gate, ring ── works ────────────── close gate ── wait for those inside ── returns
//! helper 1        wakes ........ enter, rings on ── works ── leave
//! helper 2                             wakes ......... enter ── works ── leave
//! helper 3                                 wakes ................. gate is closed, sleeps
//! ```
#![allow(unsafe_code)] // The work borrows from the caller's stack.

use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use super::topology::{Node, Topology};
use super::{affinity, futex};
use crate::error::{Error, Result};

/// What a helper of the node with this index in the topology does: takes pieces of the work until none is left.
type Work<'w> = dyn Fn(usize) + Sync + 'w;

/// Helpers woken by one system call. Each that arrives wakes as many again, so that the caller pays for two only and
/// 31 are awake after five hops.
const WAKE: u32 = 2;

/// Looks at the gate before the caller sleeps: about 10 us at 20 ns a pause, longer than a helper needs for its last
/// piece unless it lost its core.
const SPINS: u32 = 500;

/// Bits of the gate; the rest counts the helpers inside.
const OPEN: u32 = 1 << 31;
const SLEEPING: u32 = 1 << 30;

/// Helpers of all nodes. `&mut` is the right to give them work.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Where in the topology the caller does best to be, beside these helpers.
    own_node: usize,
    pin_refused: Option<io::Error>,
}

struct Shared {
    /// Written by the caller while the gate is closed and nobody is inside; read by those inside.
    work: UnsafeCell<*const Work<'static>>,
    gate: Line<AtomicU32>,
    /// Helpers that the work is enough for.
    wanted: AtomicU32,
    /// Per node: changes whenever there is work.
    bells: Vec<Line<AtomicU32>>,
    panicked: AtomicBool,
    quit: AtomicBool,
}

/// On a cache line of its own.
#[repr(align(64))]
struct Line<T>(T);

// SAFETY: `work` is written only by the holder of `&mut Pool` while the gate is closed and empty, and read only by
// helpers inside of it; the gate's release and acquire order the two. `Work` is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts `helpers` threads, spread over the nodes by their CPUs and bound to them.
    ///
    /// # Errors
    /// If the system refuses a thread. A refusal to bind one is kept in [`Pool::pin_refused`].
    pub(crate) fn new(topology: &Topology, helpers: usize) -> Result<Pool> {
        let bells = topology.nodes().iter().map(|_| Line(AtomicU32::new(0))).collect();
        let shared = Arc::new(Shared {
            work: UnsafeCell::new(&|_: usize| {}),
            gate: Line(AtomicU32::new(0)),
            wanted: AtomicU32::new(0),
            bells,
            panicked: AtomicBool::new(false),
            quit: AtomicBool::new(false),
        });
        let homes = spread(topology.nodes(), helpers + 1);
        let (&own_node, homes) = homes.split_first().expect("the caller's");
        let mut pool = Pool { shared, threads: Vec::with_capacity(helpers), own_node, pin_refused: None };
        for &node in homes {
            pool.start(node, &topology.nodes()[node].cpus)?;
        }
        Ok(pool)
    }

    /// The node that the helpers have left to the caller: where in the topology.
    pub(crate) fn own_node(&self) -> usize {
        self.own_node
    }

    fn start(&mut self, node: usize, cpus: &[usize]) -> Result<()> {
        let (shared, cpus) = (self.shared.clone(), cpus.to_vec());
        let (report, pinned) = channel();
        let run = move || {
            // Nobody listens only if `new` has failed meanwhile.
            let _ = report.send(affinity::pin(&cpus));
            shared.help(node);
        };
        let name = format!("gather-{}", self.threads.len());
        let thread = std::thread::Builder::new().name(name).spawn(run);
        self.threads.push(thread.map_err(|e| Error::Usage(format!("a thread of the gather pool: {e}")))?);
        if let Ok(Err(refused)) = pinned.recv() {
            self.pin_refused.get_or_insert(refused);
        }
        Ok(())
    }

    /// Why the threads could not be bound to their node, if that is so.
    pub(crate) fn pin_refused(&self) -> Option<&io::Error> {
        self.pin_refused.as_ref()
    }

    /// Runs `own` on this thread while up to `wanted` helpers run `work`. `own` must itself take pieces until none is
    /// left, as helpers may not come. On return nobody is at work any more.
    ///
    /// # Panics
    /// If `own` does, or `work` did.
    pub(crate) fn run(&mut self, wanted: usize, work: &Work<'_>, own: impl FnOnce()) {
        let shared = &*self.shared;
        let wanted = wanted.min(self.threads.len()) as u32;
        if wanted == 0 {
            return own();
        }
        // SAFETY: the same pointer type but for the lifetime; nobody uses it after `closing` is dropped, which is in
        // this call.
        let work = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work) };
        // SAFETY: the gate is closed and empty between calls, and `&mut self` excludes a second one.
        unsafe { *shared.work.get() = work };
        shared.wanted.store(wanted, Ordering::Relaxed);
        shared.gate.0.store(OPEN, Ordering::Release);
        let closing = Closing(shared);
        for bell in &shared.bells {
            bell.0.fetch_add(1, Ordering::Release);
            futex::wake(&bell.0, wanted.min(WAKE));
        }
        own();
        drop(closing);
        if shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a helper of the gather panicked");
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Relaxed);
        for bell in &self.shared.bells {
            bell.0.fetch_add(1, Ordering::Release);
            futex::wake(&bell.0, u32::MAX);
        }
        for thread in self.threads.drain(..) {
            // A panic of the work was caught and reported by `run`.
            let _ = thread.join();
        }
    }
}

/// Closes the gate when dropped, also by a panic of the caller's own part, and waits for those inside.
struct Closing<'p>(&'p Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let gate = &self.0.gate.0;
        let mut inside = gate.fetch_and(!OPEN, Ordering::Acquire) & !OPEN;
        for _ in 0..SPINS {
            if inside == 0 {
                return;
            }
            std::hint::spin_loop();
            inside = gate.load(Ordering::Acquire);
        }
        inside = gate.fetch_or(SLEEPING, Ordering::Acquire) | SLEEPING;
        while inside != SLEEPING {
            futex::wait(gate, inside);
            inside = gate.load(Ordering::Acquire);
        }
        gate.store(0, Ordering::Relaxed);
    }
}

impl Shared {
    /// The life of a helper.
    fn help(&self, node: usize) {
        let bell = &self.bells[node].0;
        let mut heard = 0;
        loop {
            let rung = bell.load(Ordering::Acquire);
            if rung == heard {
                futex::wait(bell, heard);
                continue;
            }
            heard = rung;
            if self.quit.load(Ordering::Relaxed) {
                return;
            }
            self.join_in(node);
        }
    }

    fn join_in(&self, node: usize) {
        let Some(inside) = self.enter() else { return };
        if inside < self.wanted.load(Ordering::Relaxed) {
            futex::wake(&self.bells[node].0, WAKE);
        }
        // SAFETY: inside of the gate, so the work is there and `run` does not return before `leave`.
        let work = unsafe { &**self.work.get() };
        if catch_unwind(AssertUnwindSafe(|| work(node))).is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.leave();
    }

    /// Steps inside if the gate is open, and says how many are there then.
    fn enter(&self) -> Option<u32> {
        let step = |gate: u32| (gate & OPEN != 0).then_some(gate + 1);
        let before = self.gate.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, step);
        before.ok().map(|gate| (gate & !OPEN) + 1)
    }

    fn leave(&self) {
        if self.gate.0.fetch_sub(1, Ordering::Release) == SLEEPING | 1 {
            futex::wake(&self.gate.0, 1);
        }
    }
}

/// The node of each thread: the next one goes to a node that has none, else where a CPU has the fewest of them.
fn spread(nodes: &[Node], threads: usize) -> Vec<usize> {
    let mut counts = vec![0usize; nodes.len()];
    let next = |_| {
        // (count + 1) / cpus, compared without division.
        let less = |&a: &usize, &b: &usize| {
            let load = ((counts[a] + 1) * nodes[b].cpus.len()).cmp(&((counts[b] + 1) * nodes[a].cpus.len()));
            (counts[a] > 0).cmp(&(counts[b] > 0)).then(load)
        };
        let node = (0..nodes.len()).min_by(less).expect("a topology has a node");
        counts[node] += 1;
        node
    };
    (0..threads).map(next).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::gather::NodeId;

    fn node(id: u32, cpus: &[usize]) -> Node {
        Node { id: NodeId(id), cpus: cpus.to_vec() }
    }

    #[test]
    fn threads_are_spread_by_cpus_and_leave_no_node_out() {
        let nodes = [node(0, &[0, 1, 2, 3]), node(1, &[4, 5])];
        let mut homes = spread(&nodes, 6);
        assert_eq!(spread(&nodes, 1), [0]);
        assert_eq!(spread(&nodes, 2), [0, 1]);
        homes.sort_unstable();
        assert_eq!(homes, [0, 0, 0, 0, 1, 1]);
    }

    /// Every piece is done once, over many rounds that begin while helpers of the last one are still on their way.
    #[test]
    fn every_piece_once() {
        let topology = Topology::of(vec![node(0, &[0]), node(2, &[1])]);
        let mut pool = Pool::new(&topology, 5).unwrap();
        for round in 0..3000 {
            let pieces: Vec<AtomicUsize> = (0..round % 50).map(|_| AtomicUsize::new(0)).collect();
            let next = AtomicUsize::new(0);
            let take = || {
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    piece.fetch_add(1, Ordering::Relaxed);
                }
            };
            pool.run(round % 7, &|_| take(), take);
            assert!(pieces.into_iter().all(|piece| piece.into_inner() == 1), "round {round}");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(&Topology::of(vec![node(0, &[0])]), 1).unwrap();
        let entered = AtomicBool::new(false);
        let wait = || {
            while !entered.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
        };
        let fail = |_: usize| {
            entered.store(true, Ordering::Relaxed);
            panic!("expected in this test");
        };
        assert!(catch_unwind(AssertUnwindSafe(|| pool.run(1, &fail, wait))).is_err());
        assert!(catch_unwind(AssertUnwindSafe(|| pool.run(1, &|_| {}, || panic!("expected in this test")))).is_err());
        entered.store(false, Ordering::Relaxed);
        pool.run(1, &|_| entered.store(true, Ordering::Relaxed), wait);
    }
}
