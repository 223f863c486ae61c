//! Where the engine computes: memory that is metered, streams that run in order, values that are in flight between them.
//!
//! Everything above is written once against this layer. The CPU device computes in line on the calling thread (rayon
//! inside) and has a copy stream of its own, one worker thread, so that transfers really overlap with computation.

pub mod arena;
pub mod buffer;
pub mod interrupt;
pub mod map;
pub mod order;
pub mod pin;
pub mod ram;
pub mod stream;

use std::sync::Arc;

pub use buffer::{Buffer, Grant, Meter};
pub use stream::{InFlight, Stream};

use crate::cpu::Isa;
use crate::error::{Error, Result};

/// What a device is to be like.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// Compute threads; `None`: as many as the process may use.
    pub threads: Option<usize>,
    /// Most bytes of device memory; `None`: no limit of our own.
    pub device_budget: Option<u64>,
    /// Most bytes of host memory for KV pages; `None`: no limit of our own.
    pub host_budget: Option<u64>,
    /// Fill new buffers with a pattern that reads as NaN, so that a read of what nobody wrote shows (tests).
    pub poison: bool,
}

/// A compute device with its memory meters and its copy stream. Cheap to clone.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    isa: Isa,
    pool: rayon::ThreadPool,
    copy: Stream,
    device_memory: Meter,
    host_memory: Meter,
    poison: bool,
}

impl Device {
    /// The CPU device.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown `SPECACHE_ISA` or zero threads.
    pub fn cpu(options: &DeviceOptions) -> Result<Device> {
        let isa = Isa::from_env()?;
        let threads = match options.threads {
            Some(0) => return Err(Error::Usage("--threads 0: at least one thread is needed".into())),
            Some(t) => t,
            None => std::thread::available_parallelism().map_or(1, |n| n.get()),
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("compute-{i}"))
            .build()
            .map_err(|e| Error::Usage(format!("--threads {threads}: {e}")))?;
        Ok(Device(Arc::new(Inner {
            isa,
            pool,
            copy: Stream::new("copy")?,
            device_memory: Meter::new("device", options.device_budget),
            host_memory: Meter::new("host", options.host_budget),
            poison: options.poison,
        })))
    }

    /// One line for people: what this device is.
    pub fn describe(&self) -> String {
        format!("CPU, {} threads, {}", self.threads(), self.0.isa)
    }

    /// Compute threads.
    pub fn threads(&self) -> usize {
        self.0.pool.current_num_threads()
    }

    /// The instruction set that kernels use.
    pub fn isa(&self) -> Isa {
        self.0.isa
    }

    /// Runs `work` with this device's compute threads as the current rayon pool.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.0.pool.install(work)
    }

    /// The stream that moves KV pages between host and device.
    pub fn copy_stream(&self) -> &Stream {
        &self.0.copy
    }

    /// Bytes and budget of device memory.
    pub fn device_memory(&self) -> &Meter {
        &self.0.device_memory
    }

    /// Bytes and budget of host memory for KV pages.
    pub fn host_memory(&self) -> &Meter {
        &self.0.host_memory
    }

    /// Admits a request: sets bytes of both kinds of memory aside, if the budgets allow it and, as both are the same RAM
    /// on this device, the machine has them.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] naming `what`, the bytes needed and the bytes available; nothing is taken then.
    pub fn grant(&self, device_bytes: u64, host_bytes: u64, what: &str) -> Result<Grants> {
        let device = self.0.device_memory.grant(device_bytes, what)?;
        let host = self.0.host_memory.grant(host_bytes, what)?;
        let needed = device_bytes.saturating_add(host_bytes);
        match ram::available() {
            Some(available) if available < needed => Err(Error::OutOfMemory {
                memory: "system",
                what: what.to_string(),
                needed,
                available,
                fix: "shorten the context, use a smaller KV cache (--kv kivi), or free memory".into(),
            }),
            _ => Ok(Grants { device, host, poison: self.0.poison }),
        }
    }

    /// Whether two handles are of one device.
    pub fn is(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Memory that a request has been granted ([`Device::grant`]). What it does not use goes back when this is dropped.
pub struct Grants {
    device: Grant,
    host: Grant,
    poison: bool,
}

impl Grants {
    /// Device memory of `len` bytes, zeroed (or poisoned). Metered until it is dropped.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when more is asked for than was granted and the budget does not have it.
    pub fn device(&mut self, len: usize, what: &str) -> Result<Buffer> {
        Buffer::new(len, &mut self.device, self.poison, what)
    }

    /// Host memory of `len` bytes for KV pages, metered as such.
    ///
    /// # Errors
    /// As [`Grants::device`].
    pub fn host(&mut self, len: usize, what: &str) -> Result<Buffer> {
        Buffer::new(len, &mut self.host, self.poison, what)
    }
}
