//! An ordered queue of work beside the calling thread, and values that it is busy with.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// An ordered queue: work runs one after the other, in the order of its launch, while the caller goes on.
pub struct Stream {
    queue: Option<Sender<Box<dyn FnOnce() + Send>>>,
    worker: Option<JoinHandle<()>>,
}

impl Stream {
    /// Starts the worker thread of a stream.
    ///
    /// # Errors
    /// [`Error::Usage`] if the system refuses a thread.
    pub fn new(name: &str) -> Result<Stream> {
        let (queue, jobs) = channel::<Box<dyn FnOnce() + Send>>();
        // A job that panics tells its waiter (see `Finish`); the stream goes on.
        let run = move || jobs.into_iter().for_each(|job| drop(catch_unwind(AssertUnwindSafe(job))));
        let refused = |e| Error::Usage(format!("no thread for the {name} stream: {e}; raise the limit on processes"));
        let worker = std::thread::Builder::new().name(name.into()).spawn(run).map_err(refused)?;
        Ok(Stream { queue: Some(queue), worker: Some(worker) })
    }

    fn enqueue(&self, job: Box<dyn FnOnce() + Send>) {
        self.queue.as_ref().expect("present until drop").send(job).expect("the worker lives as long as the stream");
    }

    /// Runs work that nobody waits for by itself; [`Stream::drain`] does.
    pub fn launch_detached(&self, work: impl FnOnce() + Send + 'static) {
        self.enqueue(Box::new(work));
    }

    /// Waits until everything launched so far is done, and says how long that took.
    pub fn drain(&self) -> Duration {
        let mut waited = Duration::default();
        self.launch((), |()| ()).wait(&mut waited);
        waited
    }

    /// Hands `value` to the stream, which runs `work` on it when everything launched before is done. The value can be
    /// had back only by waiting for it, so nobody reads it early and nobody frees it early.
    pub fn launch<T: Send + 'static>(&self, mut value: T, work: impl FnOnce(&mut T) + Send + 'static) -> InFlight<T> {
        let shared = Arc::new(Shared { state: Mutex::new(State::Busy), done: Condvar::new() });
        let finish = Finish(shared.clone(), None);
        let job = Box::new(move || {
            // A panic in `work` drops `finish` without its value, and the waiter hears of it.
            work(&mut value);
            finish.with(value);
        });
        self.enqueue(job);
        InFlight(shared)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(worker) = self.worker.take() {
            // A panic of the worker was reported to whoever waited for its value.
            let _ = worker.join();
        }
    }
}

struct Shared<T> {
    state: Mutex<State<T>>,
    done: Condvar,
}

enum State<T> {
    Busy,
    Done(T),
    Failed,
}

/// Reports the end of a job whether it returned or panicked.
struct Finish<T>(Arc<Shared<T>>, Option<T>);

impl<T> Finish<T> {
    fn with(mut self, value: T) {
        self.1 = Some(value);
    }
}

impl<T> Drop for Finish<T> {
    fn drop(&mut self) {
        let state = self.1.take().map_or(State::Failed, State::Done);
        *self.0.state.lock().unwrap_or_else(|e| e.into_inner()) = state;
        self.0.done.notify_all();
    }
}

/// A value that a stream is working on. Dropping it waits too: nothing is freed while the stream uses it.
#[must_use = "the value comes back only by waiting for it"]
pub struct InFlight<T>(Arc<Shared<T>>);

impl<T> InFlight<T> {
    /// Waits until the stream is done with the value. The time spent here is added to `exposed`.
    ///
    /// # Panics
    /// If the work panicked.
    pub fn wait(self, exposed: &mut Duration) -> T {
        let mut state = self.0.state.lock().unwrap_or_else(|e| e.into_inner());
        if matches!(*state, State::Busy) {
            let start = Instant::now();
            let busy = |s: &mut State<T>| matches!(s, State::Busy);
            state = self.0.done.wait_while(state, busy).unwrap_or_else(|e| e.into_inner());
            *exposed += start.elapsed();
        }
        match std::mem::replace(&mut *state, State::Failed) {
            State::Done(value) => value,
            State::Busy | State::Failed => panic!("work on the copy stream panicked"),
        }
    }
}

impl<T> Drop for InFlight<T> {
    fn drop(&mut self) {
        let state = self.0.state.lock().unwrap_or_else(|e| e.into_inner());
        let busy = |s: &mut State<T>| matches!(s, State::Busy);
        drop(self.0.done.wait_while(state, busy).unwrap_or_else(|e| e.into_inner()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_a_value_in_flight_waits_for_it() {
        let stream = Stream::new("test").unwrap();
        let done = Arc::new(Mutex::new(false));
        let flag = done.clone();
        drop(stream.launch(0, move |_| {
            std::thread::sleep(Duration::from_millis(20));
            *flag.lock().unwrap() = true;
        }));
        assert!(*done.lock().unwrap());
    }

    #[test]
    fn work_runs_in_order_and_values_come_back() {
        let stream = Stream::new("test").unwrap();
        let log = Arc::new(Mutex::new(vec![]));
        let jobs: Vec<_> = (0..20)
            .map(|i| {
                let log = log.clone();
                stream.launch(i, move |v| {
                    std::thread::sleep(Duration::from_micros(50 * (20 - i)));
                    log.lock().unwrap().push(*v);
                    *v += 100;
                })
            })
            .collect();
        let mut exposed = Duration::ZERO;
        let values: Vec<_> = jobs.into_iter().map(|j| j.wait(&mut exposed)).collect();
        assert_eq!(values, (100..120).collect::<Vec<_>>());
        assert_eq!(*log.lock().unwrap(), (0..20).collect::<Vec<_>>());
        assert!(exposed > Duration::ZERO);
    }

    #[test]
    #[should_panic(expected = "copy stream panicked")]
    fn a_panic_reaches_the_waiter() {
        let stream = Stream::new("test").unwrap();
        stream.launch((), |_| panic!("expected in this test")).wait(&mut Duration::default());
    }
}
