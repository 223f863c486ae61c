//! A GPU in use: its driver, its queues, its kernels, and what must outlive the work that it was given.
#![allow(unsafe_code)] // Copies on queues.

use std::any::Any;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::driver::{Driver, Facts};
use super::kernels::{Kernels, Plan};
use super::queues::Queues;
use crate::device::order::StreamId;
use crate::error::Result;

/// A GPU in use.
pub(crate) struct Gpu {
    // Dropped in this order: first what runs ends, then what it needs.
    queues: Queues,
    kernels: Kernels,
    retained: Mutex<VecDeque<Retained>>,
    driver: Arc<Driver>,
}

/// Something that a queue still uses.
struct Retained {
    stream: StreamId,
    /// Until this point of it.
    until: u64,
    _what: Box<dyn Any + Send>,
}

impl Gpu {
    /// GPU `index` with its kernels loaded. `library`: the driver's library to open instead of the usual ones.
    ///
    /// # Errors
    /// See [`Driver::open`] and [`Kernels::load`].
    pub(crate) fn open(library: Option<&Path>, index: usize) -> Result<Gpu> {
        let driver = Arc::new(Driver::open(library, index)?);
        let queues = Queues::new(&driver)?;
        let kernels = Kernels::load(&driver)?;
        Ok(Gpu { queues, kernels, retained: Mutex::default(), driver })
    }

    /// The driver.
    pub(crate) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    /// What is known about the GPU.
    pub(crate) fn facts(&self) -> &Facts {
        &self.driver.facts
    }

    /// The queues.
    pub(crate) fn queues(&self) -> &Queues {
        &self.queues
    }

    /// Launches a kernel of the compute queue.
    pub(crate) fn launch<P>(&self, plan: Plan<P>, params: &P) {
        self.launch_on(StreamId::Compute, plan, params);
    }

    /// Launches a kernel.
    pub(crate) fn launch_on<P>(&self, stream: StreamId, plan: Plan<P>, params: &P) {
        self.kernels.launch(&self.queues, stream, plan, params);
    }

    /// Keeps `what` until `stream` has passed point `until`; lets go of what has passed its own.
    pub(crate) fn retain(&self, stream: StreamId, until: u64, what: impl Any + Send) {
        let mut retained = self.retained.lock().unwrap_or_else(|e| e.into_inner());
        while retained.front().is_some_and(|r| self.queues.has_passed(r.stream, r.until)) {
            retained.pop_front();
        }
        retained.push_back(Retained { stream, until, _what: Box::new(what) });
    }

    /// Lets go of everything whose point has passed.
    pub(crate) fn release(&self) {
        let mut retained = self.retained.lock().unwrap_or_else(|e| e.into_inner());
        retained.retain(|r| !self.queues.has_passed(r.stream, r.until));
    }

    /// Writes host bytes to the GPU, and waits until they are there: for what is set up once.
    pub(crate) fn put(&self, to: u64, from: &[u8]) {
        self.driver.enter();
        // SAFETY: the caller's buffer has room; the wait keeps `from` until the copy is done.
        unsafe { self.queues.upload(StreamId::Compute, to, from) };
        self.queues.drain(StreamId::Compute);
    }

    /// Reads bytes of the GPU, behind everything that the compute queue has been given.
    pub(crate) fn get(&self, to: &mut [u8], from: u64) {
        self.driver.enter();
        // SAFETY: the caller's buffer has as many; the wait keeps `to` until the copy is done.
        unsafe { self.queues.download(StreamId::Compute, to, from) };
        self.queues.drain(StreamId::Compute);
    }
}
