//! Ordered queues of work beside the calling thread, and the events that order them among each other.
//!
//! The compute stream is the calling thread itself; each of the others is a worker thread. Launching, recording and waiting
//! allocate nothing once the queues have grown: jobs are values that their owners keep and launch again and again.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::nvtx;
use super::order::{EventClock, StreamId};
use super::trace::{Place, Trace};
use crate::error::{Error, Result};

/// Work that can be launched on a stream, also several times. Each run does the work of one launch, in order.
pub trait Job: Send + Sync {
    /// Does the work. Returns the bytes moved, for traces. What goes wrong is told to whoever waits for the result; a
    /// panic ends this run and not the stream.
    fn run(&self) -> u64;
}

/// A point in a stream: everything that it had been given when the event was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Event {
    stream: StreamId,
    /// Items of the stream.
    at: u64,
    /// The same for the order checker.
    clock: EventClock,
}

impl Event {
    pub(super) fn new(stream: StreamId, at: u64, clock: EventClock) -> Event {
        Event { stream, at, clock }
    }

    pub(super) fn stream(&self) -> StreamId {
        self.stream
    }

    pub(super) fn at(&self) -> u64 {
        self.at
    }

    pub(super) fn clock(&self) -> EventClock {
        self.clock
    }

    /// The later of two points in one stream.
    pub fn later(self, other: Option<Event>) -> Event {
        match other {
            Some(other) if other.at > self.at => {
                assert_eq!(self.stream, other.stream, "only points of one stream are ordered");
                other
            }
            _ => self,
        }
    }
}

/// The streams beside the compute stream.
pub(super) struct Streams {
    queues: Arc<Queues>,
    workers: Vec<JoinHandle<()>>,
}

struct Queues([Queue; WORKERS.len()]);

const WORKERS: [StreamId; 3] = [StreamId::Gather, StreamId::CopyIn, StreamId::CopyOut];

impl Queues {
    /// `None`: the compute stream, whose work is done when it has been given.
    fn of(&self, stream: StreamId) -> Option<&Queue> {
        (stream as usize).checked_sub(1).map(|i| &self.0[i])
    }
}

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    given: Condvar,
    finished: Condvar,
    /// Items that are done.
    done: AtomicU64,
}

/// Items that a queue has room for from the beginning: what a step of a large model gives a stream, even if its thread does
/// not run meanwhile. A launch is one item and up to three waits.
const QUEUE_ROOM: usize = 4096;

struct State {
    items: VecDeque<Item>,
    /// Items that were ever given.
    issued: u64,
    /// Threads that wait for `finished`.
    waiters: u32,
    /// The worker sleeps until it is given something.
    idle: bool,
    quit: bool,
}

impl Default for State {
    fn default() -> State {
        State { items: VecDeque::with_capacity(QUEUE_ROOM), issued: 0, waiters: 0, idle: false, quit: false }
    }
}

enum Item {
    Wait(Event),
    Run(Arc<dyn Job>, &'static str, Place),
}

impl Streams {
    /// Starts the workers. Each has called `begin` when this returns.
    ///
    /// # Errors
    /// [`Error::Usage`] if the system refuses a thread.
    pub(super) fn new(trace: Option<Arc<Trace>>, begin: impl Fn(StreamId) + Clone + Send + 'static) -> Result<Streams> {
        let mut streams = Streams { queues: Arc::new(Queues(Default::default())), workers: Vec::new() };
        for stream in WORKERS {
            let (queues, trace, begin) = (streams.queues.clone(), trace.clone(), begin.clone());
            let (begun, has_begun) = channel();
            let name = stream.name();
            let refused =
                |e| Error::Usage(format!("no thread for the {name} stream: {e}; raise the limit on processes"));
            let run = move || {
                begin(stream);
                // Nobody listens only if `new` has failed meanwhile.
                let _ = begun.send(());
                queues.work(stream, trace.as_deref());
            };
            streams.workers.push(std::thread::Builder::new().name(name.into()).spawn(run).map_err(refused)?);
            // An error is a panic of `begin`, which whoever joins the thread may hear of.
            let _ = has_begun.recv();
        }
        Ok(streams)
    }

    /// Hands `job` to the stream: it runs when everything given before is done.
    pub(super) fn launch(&self, stream: StreamId, job: Arc<dyn Job>, name: &'static str, clock: EventClock) -> Event {
        let at = self.give(stream, Item::Run(job, name, Place::current()));
        Event { stream, at, clock }
    }

    /// What the stream is given from now on begins after `event`.
    pub(super) fn after(&self, stream: StreamId, event: Event) {
        if event.stream != stream && event.stream != StreamId::Compute {
            self.give(stream, Item::Wait(event));
        }
    }

    /// Everything that the stream has been given so far.
    pub(super) fn record(&self, stream: StreamId, clock: EventClock) -> Event {
        let at = self.queues.of(stream).map_or(0, |queue| queue.lock().issued);
        Event { stream, at, clock }
    }

    /// Blocks until `event` has passed, and says how long that took: nothing if it had passed.
    pub(super) fn wait(&self, event: Event) -> Duration {
        self.queues.wait(event)
    }

    /// Whether `event` has passed.
    pub(super) fn has_passed(&self, event: Event) -> bool {
        self.queues.of(event.stream).is_none_or(|queue| queue.has_passed(event))
    }

    fn give(&self, stream: StreamId, item: Item) -> u64 {
        let queue = self.queues.of(stream).expect("the compute stream is the calling thread");
        // Waking a thread costs some microseconds, so nobody is woken just to wait.
        let works = matches!(item, Item::Run(..));
        let mut state = queue.lock();
        state.items.push_back(item);
        state.issued += 1;
        let (at, sleeps) = (state.issued, state.idle && works);
        drop(state);
        if sleeps {
            queue.given.notify_one();
        }
        at
    }
}

impl Drop for Streams {
    /// What has been given is done first.
    fn drop(&mut self) {
        for queue in &self.queues.0 {
            queue.lock().quit = true;
            queue.given.notify_one();
        }
        for worker in self.workers.drain(..) {
            // Jobs' panics were caught.
            let _ = worker.join();
        }
    }
}

impl Queues {
    /// The life of a worker.
    fn work(&self, stream: StreamId, trace: Option<&Trace>) {
        let queue = self.of(stream).expect("a worker has a queue");
        while let Some(item) = queue.next() {
            match item {
                // Only what was given earlier can be waited for, so no two streams wait for each other.
                Item::Wait(event) => drop(self.wait(event)),
                Item::Run(job, name, place) => {
                    let begin = Instant::now();
                    place.enter();
                    let _range = nvtx::range(name);
                    // A panic has told its waiter by poisoning what the job worked on.
                    let bytes = catch_unwind(AssertUnwindSafe(|| job.run())).unwrap_or(0);
                    drop(job); // before the event passes: what the job held is its owner's alone from then on
                    if let Some(trace) = trace {
                        trace.add(stream, name, false, place, begin, bytes);
                    }
                }
            }
            queue.finish();
        }
    }

    fn wait(&self, event: Event) -> Duration {
        let Some(queue) = self.of(event.stream) else { return Duration::ZERO };
        if queue.has_passed(event) {
            return Duration::ZERO;
        }
        let start = Instant::now();
        queue.given.notify_one(); // it may sleep over a wait that it was given last
        let mut state = queue.lock();
        state.waiters += 1;
        while !queue.has_passed(event) {
            state = queue.finished.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.waiters -= 1;
        start.elapsed()
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn has_passed(&self, event: Event) -> bool {
        self.done.load(Ordering::Acquire) >= event.at
    }

    /// The next item; `None` when there will be none.
    fn next(&self) -> Option<Item> {
        let mut state = self.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                return Some(item);
            }
            if state.quit {
                return None;
            }
            state.idle = true;
            state = self.given.wait(state).unwrap_or_else(|e| e.into_inner());
            state.idle = false;
        }
    }

    /// One more item is done.
    fn finish(&self) {
        self.done.fetch_add(1, Ordering::Release);
        // Whoever looked at `done` before is counted in `waiters` under the lock, so nobody sleeps through this.
        if self.lock().waiters > 0 {
            self.finished.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// Notes its number, after a while.
    struct Note(u32, u64, Arc<Mutex<Vec<u32>>>);

    impl Job for Note {
        fn run(&self) -> u64 {
            std::thread::sleep(Duration::from_micros(self.1));
            self.2.lock().unwrap().push(self.0);
            0
        }
    }

    fn launch(streams: &Streams, stream: StreamId, job: impl Job + 'static) -> Event {
        streams.launch(stream, Arc::new(job), "test", EventClock::default())
    }

    #[test]
    fn a_stream_runs_in_order_and_events_cover_what_came_before() {
        let streams = Streams::new(None, |_| {}).unwrap();
        let log = Arc::new(Mutex::new(vec![]));
        // The last one is still running when it is waited for, however late that is within reason.
        let us = |i: u32| if i == 19 { 300_000 } else { 50 * (20 - u64::from(i)) };
        let jobs: Vec<_> = (0..20).map(|i| launch(&streams, StreamId::CopyIn, Note(i, us(i), log.clone()))).collect();
        streams.wait(jobs[9]);
        assert!(log.lock().unwrap().len() >= 10);
        let waited = streams.wait(streams.record(StreamId::CopyIn, EventClock::default()));
        assert!(waited > Duration::ZERO);
        assert_eq!(*log.lock().unwrap(), (0..20).collect::<Vec<_>>());
        assert_eq!(streams.wait(jobs[9]), Duration::ZERO, "it has passed");
    }

    #[test]
    fn a_stream_waits_for_another_ones_event() {
        let streams = Streams::new(None, |_| {}).unwrap();
        let log = Arc::new(Mutex::new(vec![]));
        for round in 0..20 {
            let gathered = launch(&streams, StreamId::Gather, Note(2 * round, 300, log.clone()));
            streams.after(StreamId::CopyIn, gathered);
            let copied = launch(&streams, StreamId::CopyIn, Note(2 * round + 1, 0, log.clone()));
            streams.wait(copied);
        }
        assert_eq!(*log.lock().unwrap(), (0..40).collect::<Vec<_>>());
    }

    #[test]
    fn what_was_launched_runs_before_the_streams_end() {
        let log = Arc::new(Mutex::new(vec![]));
        let streams = Streams::new(None, |_| {}).unwrap();
        launch(&streams, StreamId::CopyOut, Note(7, 2000, log.clone()));
        drop(streams);
        assert_eq!(*log.lock().unwrap(), [7]);
    }

    struct Panics(Arc<AtomicU32>);

    impl Job for Panics {
        fn run(&self) -> u64 {
            self.0.fetch_add(1, Ordering::Relaxed);
            panic!("expected in this test");
        }
    }

    #[test]
    fn a_panic_ends_the_job_and_not_the_stream() {
        let streams = Streams::new(None, |_| {}).unwrap();
        let runs = Arc::new(AtomicU32::new(0));
        let job: Arc<dyn Job> = Arc::new(Panics(runs.clone()));
        for _ in 0..3 {
            let event = streams.launch(StreamId::Gather, job.clone(), "test", EventClock::default());
            streams.wait(event);
        }
        assert_eq!(runs.load(Ordering::Relaxed), 3);
    }
}
