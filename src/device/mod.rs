//! Where the engine computes: memory that is metered, streams that run in order, values that are in flight between them.
//!
//! Everything above is written once against this layer. The CPU device computes in line on the calling thread (rayon
//! inside) and has worker threads for gathers and for copies either way, so that transfers really overlap with computation.

pub mod arena;
pub mod buffer;
pub mod choice;
pub mod cuda;
pub mod fault;
pub mod gather_way;
pub mod in_flight;
pub mod interrupt;
pub mod linear;
pub mod link;
pub mod map;
pub(crate) mod nvtx;
pub mod order;
pub mod pin;
pub mod ram;
pub mod schedule;
pub mod stream;
pub mod trace;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub use buffer::{Buffer, Grant, Kind, Meter};
pub use choice::DeviceChoice;
pub use gather_way::GatherWay;
pub use in_flight::{Carried, InFlight};
pub use linear::LinearPath;
pub use schedule::Schedule;
pub use stream::{Event, Job};

use crate::cpu::Isa;
use crate::error::{Error, Result};
use crate::gather::{Gather, GatherOptions, Topology};
use cuda::Gpu;
use cuda::timing::Begun;
use fault::{Fault, Faults};
use link::{CopyEngine, LinkOptions};
use order::{Checker, EventClock, Site, StreamId, Uses};
use pin::Pin;
use stream::Streams;
use trace::{Place, Trace, Visit};

/// What a device is to be like.
#[derive(Clone)]
pub struct DeviceOptions {
    /// Which device it is.
    pub choice: DeviceChoice,
    /// Compute threads; `None`: as many as the process may use.
    pub threads: Option<usize>,
    /// Most bytes of device memory; `None`: no limit of our own.
    pub device_budget: Option<u64>,
    /// Most bytes of host memory for KV pages; `None`: no limit of our own.
    pub host_budget: Option<u64>,
    /// How computation waits for copies.
    pub pipeline: Schedule,
    /// How a GPU computes the dense part of a layer.
    pub linear: LinearPath,
    /// How selected pairs come into a GPU; `None`: [`GatherWay::Gpu`], and on the CPU device its only way.
    pub gather: Option<GatherWay>,
    /// Keep the pairs that stay selected where they are and fetch only the others.
    pub delta: bool,
    /// On a GPU: give a step that was seen before to it in one call, as a CUDA graph; not one whose pairs the host gathers.
    pub graph: bool,
    /// Threads that gather, the gather stream's own among them; `None`: a quarter of those that can run, at most 16, as all
    /// cores compute on the CPU device, but one for each NUMA node if as many can run.
    pub gather_threads: Option<usize>,
    /// A slower link between host and device than memory is.
    pub link: LinkOptions,
    /// What keeps the pages in host memory resident; `None`: nothing, as no device copies from them by itself.
    pub pin: Option<Arc<dyn Pin>>,
    /// Keep what ran when: [`Device::trace`]. On a GPU events around every operation make a step somewhat slower.
    pub trace: bool,
    /// Check the order of all operations; SPECACHE_CHECK_ORDER=1 does too, and says at the end what it found.
    pub order: Option<Arc<Mutex<Checker>>>,
    /// Fill new buffers with a pattern that reads as NaN, so that a read of what nobody wrote shows (tests).
    pub poison: bool,
    /// Rows of a prompt that a GPU computes at a time; `None`: as many as suit model and GPU (tests).
    pub prefill_rows: Option<usize>,
    /// An operation that is to fail (tests).
    pub faults: Option<Arc<Faults>>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions {
            choice: DeviceChoice::default(),
            threads: None,
            device_budget: None,
            host_budget: None,
            pipeline: Schedule::default(),
            linear: LinearPath::default(),
            gather: None,
            delta: true,
            graph: true,
            gather_threads: None,
            link: LinkOptions::default(),
            pin: None,
            trace: false,
            order: None,
            poison: false,
            prefill_rows: None,
            faults: None,
        }
    }
}

impl DeviceOptions {
    /// Whether threads of the host may gather for a GPU.
    pub fn host_may_gather(&self) -> bool {
        matches!(self.gather, Some(GatherWay::Cpu | GatherWay::Auto))
    }
}

/// A compute device with its memory meters, its streams and its gather pool. Cheap to clone.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    /// What computes, if it is not the CPU.
    gpu: Option<Arc<Gpu>>,
    /// Why it is the CPU that computes, where a GPU would have been taken.
    why_no_gpu: Option<String>,
    isa: Isa,
    pool: rayon::ThreadPool,
    /// The streams of the CPU device.
    streams: Option<Streams>,
    copy_engine: Arc<CopyEngine>,
    device_memory: Meter,
    host_memory: Meter,
    options: DeviceOptions,
    trace: Option<Arc<Trace>>,
    order: Option<Arc<Mutex<Checker>>>,
    /// Passes so far.
    steps: AtomicU32,
    /// Number of the schedule in [`Schedule::ALL`].
    pipeline: AtomicUsize,
    /// [`Device::measure_waits`].
    measures_waits: AtomicBool,
}

impl Device {
    /// The device that `options.choice` names. [`Device::why_no_gpu`] tells why it is the CPU, where that was left open.
    ///
    /// # Errors
    /// As [`Device::cpu`] and [`Device::cuda`].
    pub fn open(options: &DeviceOptions) -> Result<Device> {
        match options.choice {
            DeviceChoice::Cpu => Device::cpu(options),
            DeviceChoice::Cuda(index) => Device::cuda(index, options),
            DeviceChoice::Auto => match Device::cuda(0, options) {
                Err(Error::Device(why)) => Device::cpu_because(options, why),
                device => device,
            },
        }
    }

    /// The CPU device.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown `SPECACHE_ISA`, zero threads, [`LinearPath::Cublas`], or [`GatherWay::Gpu`].
    pub fn cpu(options: &DeviceOptions) -> Result<Device> {
        Device::new(options, None, None)
    }

    /// The CPU device, where a GPU would have been taken but for this reason.
    pub(crate) fn cpu_because(options: &DeviceOptions, why: String) -> Result<Device> {
        Device::new(options, None, Some(why))
    }

    /// GPU `index`, as the driver counts them. `SPECACHE_LIBCUDA` names another driver library than the usual one.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason why it cannot be used, and as [`Device::cpu`].
    pub fn cuda(index: usize, options: &DeviceOptions) -> Result<Device> {
        let library = std::env::var_os("SPECACHE_LIBCUDA").map(std::path::PathBuf::from);
        let gpu = Arc::new(Gpu::open(library.as_deref(), index)?);
        let pin: Arc<dyn Pin> = Arc::new(cuda::Register(gpu.driver().clone()));
        // What others have is not ours; the driver keeps some for itself.
        let free = gpu.driver().free_memory()?;
        let device_budget = Some(options.device_budget.unwrap_or(u64::MAX).min(free - free / 32));
        Device::new(&DeviceOptions { device_budget, pin: Some(pin), ..options.clone() }, Some(gpu), None)
    }

    fn new(options: &DeviceOptions, gpu: Option<Arc<Gpu>>, why_no_gpu: Option<String>) -> Result<Device> {
        if options.linear == LinearPath::Cublas && gpu.is_none() {
            let why = why_no_gpu.as_deref().unwrap_or("--device cpu was asked for");
            return Err(Error::Usage(format!("--linear cublas needs a GPU: {why}")));
        }
        if options.gather == Some(GatherWay::Gpu) && gpu.is_none() {
            let why = why_no_gpu.as_deref().unwrap_or("--device cpu was asked for");
            return Err(Error::Usage(format!("--gather gpu needs a GPU: {why}")));
        }
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
            .map_err(|e| Error::Device(format!("{threads} compute threads cannot be started: {e}; take fewer")))?;
        let topology = Topology::detect();
        let gather_threads = options.gather_threads.unwrap_or_else(|| gather_threads(&topology));
        let gather_options = GatherOptions { threads: Some(gather_threads), isa, ..GatherOptions::default() };
        let gather = Gather::new(topology, gather_options)?;
        let trace = options.trace.then(|| Arc::new(Trace::new()));
        let copy_engine = Arc::new(CopyEngine::new(gather, options.link, options.faults.clone(), trace.clone()));
        let bind = {
            let engine = copy_engine.clone();
            move |stream| {
                if stream == StreamId::Gather {
                    engine.gather.bind_caller()
                }
            }
        };
        let asked = says_yes("SPECACHE_CHECK_ORDER")?;
        Ok(Device(Arc::new(Inner {
            isa,
            pool,
            streams: gpu.is_none().then(|| Streams::new(trace.clone(), bind)).transpose()?,
            gpu,
            why_no_gpu,
            copy_engine,
            device_memory: Meter::new("device", options.device_budget),
            host_memory: Meter::new("host", options.host_budget),
            trace,
            order: options.order.clone().or_else(|| asked.then(Arc::default)),
            options: options.clone(),
            steps: AtomicU32::new(0),
            pipeline: AtomicUsize::new(options.pipeline as usize),
            measures_waits: AtomicBool::new(options.trace),
        })))
    }

    /// One line for people: what this device is.
    pub fn describe(&self) -> String {
        match &self.0.gpu {
            None => format!("CPU, {} threads, {}", self.threads(), self.0.isa),
            Some(gpu) => gpu.facts().gpu.to_string(),
        }
    }

    /// Why it is the CPU that computes, where a GPU would have been taken: one line.
    pub fn why_no_gpu(&self) -> Option<&str> {
        self.0.why_no_gpu.as_deref()
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
        self.0.pool.install(|| {
            self.0.gpu.iter().for_each(|gpu| gpu.driver().begin_request());
            work()
        })
    }

    /// Whether a GPU computes.
    pub fn is_gpu(&self) -> bool {
        self.0.gpu.is_some()
    }

    /// Gigabytes (10^9) per second that this device reads from its memory, measured now; `None` where memory is too short
    /// for that.
    ///
    /// # Errors
    /// [`Error::Device`] and [`Error::OutOfMemory`] of a GPU; on the CPU as [`crate::cpu::bandwidth::read_gbps`].
    pub fn read_gbps(&self) -> Result<Option<f64>> {
        if self.is_gpu() {
            return self.run(|| crate::cuda::read_gbps(self));
        }
        // The measurement reads 1 GiB.
        let enough = ram::available().is_none_or(|bytes| bytes > 2 << 30);
        enough.then(|| crate::cpu::bandwidth::read_gbps(self.threads())).transpose()
    }

    /// The GPU that computes; `None`: the CPU does.
    pub(crate) fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.0.gpu.as_ref()
    }

    /// Whether all work that the calling thread has given to a GPU since the last time has been accepted, and has run as
    /// far as is known.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn sound(&self) -> Result<()> {
        self.0.gpu.as_ref().map_or(Ok(()), |gpu| gpu.driver().sound())
    }

    /// The calling thread is about to use the GPU, if there is one.
    pub(crate) fn enter(&self) {
        self.0.gpu.iter().for_each(|gpu| gpu.driver().enter());
    }

    /// Blocks until the compute stream of a GPU has done everything that it was given, so that memory which it used may
    /// be freed or written by the host. Any thread may call this. On the CPU device the calling thread is that stream.
    pub(crate) fn finish_compute(&self) {
        if let Some(gpu) = &self.0.gpu {
            gpu.driver().enter();
            gpu.queues().drain(StreamId::Compute);
            gpu.release();
        }
    }

    /// The streams of the CPU device.
    fn streams(&self) -> &Streams {
        self.0.streams.as_ref().expect("only the CPU device runs jobs")
    }

    /// What it was made with.
    pub fn options(&self) -> &DeviceOptions {
        &self.0.options
    }

    /// How computation waits for copies.
    pub fn pipeline(&self) -> Schedule {
        Schedule::ALL[self.0.pipeline.load(Ordering::Relaxed)]
    }

    /// Changes how computation waits for copies, from the next pass on: results do not depend on it, so that schedules can
    /// be compared on one engine.
    pub fn set_pipeline(&self, schedule: Schedule) {
        self.0.pipeline.store(schedule as usize, Ordering::Relaxed);
    }

    /// Whether passes measure how long computation waits for copies ([`crate::session::Stats::exposed`]): the CPU device always
    /// does.
    pub fn measures_waits(&self) -> bool {
        self.0.gpu.is_none() || self.0.measures_waits.load(Ordering::Relaxed)
    }

    /// On a GPU: has passes measure, from the next one on, how long the compute queue stands waiting for copies. That takes two
    /// timed events around each wait, about a microsecond each; a traced device always does it.
    pub fn measure_waits(&self, on: bool) {
        self.0.measures_waits.store(on || self.0.options.trace, Ordering::Relaxed);
    }

    /// The gather pool and the link, for the jobs of copies.
    pub fn copy_engine(&self) -> Arc<CopyEngine> {
        self.0.copy_engine.clone()
    }

    /// A new pass begins on the calling thread: what it launches belongs to it, until what is returned is dropped.
    pub(crate) fn begin_step(&self) -> Visit {
        let step = self.0.steps.fetch_add(1, Ordering::Relaxed) + 1;
        if let (Some(gpu), true) = (&self.0.gpu, self.measures_waits()) {
            gpu.timing().begin_pass(gpu.queues(), self.0.trace.as_ref().map_or(0.0, |trace| trace.us(Instant::now())));
        }
        Place { step, layer: None, schedule: self.pipeline() }.visit()
    }

    /// On a GPU at the end of a pass, for whose compute queue it waits: what was timed goes to the trace. Returns how long the
    /// queue has waited for copies; `None` where that was not measured, and on the CPU device, whose waits say it themselves.
    pub(crate) fn end_step(&self) -> Option<Duration> {
        let gpu = self.0.gpu.as_ref().filter(|_| self.measures_waits())?;
        Some(gpu.timing().end_pass(gpu.queues(), self.0.trace.as_deref()))
    }

    /// On a GPU, before [`Device::end_step`]: the bytes that the pass has fetched for each layer, which the launches did not
    /// know.
    pub(crate) fn tell_fetched(&self, bytes: impl Fn(usize) -> u64) {
        if let (Some(gpu), Some(_)) = (&self.0.gpu, &self.0.trace) {
            gpu.timing().tell_bytes(PREFETCH, bytes);
        }
    }

    /// The calling thread comes to a layer, or leaves the layers.
    pub(crate) fn at_layer(&self, layer: Option<usize>) {
        Place::enter_layer(layer.map(|l| l as u32));
    }

    /// What the calling thread launches is for another layer than the one that it is at, until what is returned is dropped.
    pub(crate) fn for_layer(&self, layer: usize) -> Visit {
        Place { layer: Some(layer as u32), ..Place::current() }.visit()
    }

    /// Marks an operation of the compute stream: it uses what `uses` says, and lasts until the guard is dropped.
    pub(crate) fn operation(&self, name: &'static str, uses: impl FnOnce(&mut Uses)) -> Operation<'_> {
        self.operation_on(StreamId::Compute, name, 0, uses)
    }

    /// As [`Device::operation`], of a GPU's queue `stream`: it moves `bytes` bytes.
    pub(crate) fn operation_on(
        &self,
        stream: StreamId,
        name: &'static str,
        bytes: u64,
        uses: impl FnOnce(&mut Uses),
    ) -> Operation<'_> {
        self.declare(stream, name, uses);
        let range = nvtx::range(name);
        let begun = match (&self.0.trace, &self.0.gpu) {
            (None, _) => None,
            (Some(trace), None) => Some(Began::OnCpu(trace, Instant::now())),
            (Some(trace), Some(gpu)) => {
                gpu.timing().begin_clock(gpu.queues(), || trace.us(Instant::now()));
                gpu.timing().begin(gpu.queues(), stream).map(|begun| Began::OnGpu(gpu, begun))
            }
        };
        Operation { begun, name, bytes, _range: range }
    }

    /// Hands `job` to a stream: it runs when everything given before is done, and uses what `uses` says.
    pub fn launch(
        &self,
        stream: StreamId,
        name: &'static str,
        uses: impl FnOnce(&mut Uses),
        job: Arc<dyn Job>,
    ) -> Event {
        self.declare(stream, name, uses);
        self.streams().launch(stream, job, name, self.clock(stream))
    }

    /// An event that stands for everything that `stream` has been given so far.
    pub fn record(&self, stream: StreamId) -> Event {
        match (&self.0.gpu, stream) {
            (Some(gpu), _) => Event::new(stream, gpu.queues().record(stream), self.clock(stream)),
            (None, StreamId::Compute) => Event::new(stream, 0, self.clock(stream)),
            (None, _) => self.streams().record(stream, self.clock(stream)),
        }
    }

    /// What `stream` is given from now on comes after `event`. `site` names the place in the program.
    pub fn after(&self, stream: StreamId, event: Event, site: Site) {
        if let Some(mut checker) = self.checker() {
            checker.wait(stream, event.clock(), site);
        }
        match &self.0.gpu {
            Some(gpu) => gpu.queues().after(stream, event.stream(), event.at()),
            None => self.streams().after(stream, event),
        }
    }

    /// The compute stream waits for `event`. Returns the time that this took the calling thread, which on a GPU goes on at
    /// once: [`Device::end_step`] tells of its waits. `site` names the place in the program.
    pub fn wait(&self, event: Event, site: Site) -> Duration {
        if let Some(mut checker) = self.checker() {
            checker.wait(StreamId::Compute, event.clock(), site);
        }
        if let Some(gpu) = &self.0.gpu {
            self.wait_on_gpu(gpu, event, site);
            return Duration::ZERO;
        }
        let start = Instant::now();
        let waited = self.streams().wait(event);
        if let (Some(trace), true) = (&self.0.trace, waited > Duration::ZERO) {
            trace.add(StreamId::Compute, site, true, Place::current(), start, 0);
        }
        waited
    }

    fn wait_on_gpu(&self, gpu: &Gpu, event: Event, site: Site) {
        let (queues, timing) = (gpu.queues(), gpu.timing());
        if !queues.must_wait(StreamId::Compute, event.stream(), event.at()) {
            return;
        }
        let begun = self.measures_waits().then(|| timing.begin(queues, StreamId::Compute)).flatten();
        queues.after(StreamId::Compute, event.stream(), event.at());
        if let Some(begun) = begun {
            timing.end(queues, begun, site, true, 0);
        }
    }

    /// Blocks until `event` has passed, so that the memory of its job can be used anew. Orders nothing that the checker
    /// would count: on a device with queues of its own, this is the host's business and not the compute stream's.
    pub(crate) fn finish(&self, event: Event) {
        match &self.0.gpu {
            Some(gpu) => gpu.queues().finish(event.stream(), event.at()),
            None => drop(self.streams().wait(event)),
        }
    }

    /// Whether `event` has passed. Orders nothing, as [`Device::finish`].
    pub(crate) fn has_passed(&self, event: Event) -> bool {
        match &self.0.gpu {
            Some(gpu) => gpu.queues().has_passed(event.stream(), event.at()),
            None => self.streams().has_passed(event),
        }
    }

    /// What ran when, if the device was made to keep it.
    pub fn trace(&self) -> Option<&Trace> {
        self.0.trace.as_deref()
    }

    /// Waits for all streams of a device that keeps a trace, so that what they still did behind the last pass is in it.
    pub fn finish_trace(&self) {
        match (&self.0.gpu, &self.0.trace) {
            (_, None) => {}
            (None, Some(_)) => StreamId::ALL.into_iter().for_each(|stream| self.finish(self.record(stream))),
            (Some(gpu), Some(trace)) => {
                gpu.driver().enter();
                StreamId::ALL.into_iter().for_each(|stream| gpu.queues().drain(stream));
                gpu.timing().end_pass(gpu.queues(), Some(trace));
            }
        }
    }

    fn checker(&self) -> Option<MutexGuard<'_, Checker>> {
        Some(self.0.order.as_ref()?.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Tells the order checker what an operation of `stream` uses.
    fn declare(&self, stream: StreamId, name: &'static str, uses: impl FnOnce(&mut Uses)) {
        if let Some(mut checker) = self.checker() {
            let mut used = Uses::default();
            uses(&mut used);
            checker.operation(stream, name, Place::current().layer_or_0(), used.reads, used.writes);
        }
    }

    fn clock(&self, stream: StreamId) -> EventClock {
        self.checker().map_or(EventClock::default(), |checker| checker.record(stream))
    }

    /// Bytes and budget of device memory.
    pub fn device_memory(&self) -> &Meter {
        &self.0.device_memory
    }

    /// Bytes and budget of host memory for KV pages.
    pub fn host_memory(&self) -> &Meter {
        &self.0.host_memory
    }

    /// As [`Device::grant_for`], for what passes work in.
    ///
    /// # Errors
    /// As there.
    pub fn grant(&self, device_bytes: u64, host_bytes: u64, what: &str) -> Result<Grants> {
        self.grant_for(Kind::Workspace, device_bytes, host_bytes, what)
    }

    /// Admits a request: sets bytes of device memory aside, if the budget allows it and the machine has them, and as many
    /// for the host pages beside them: both are the same RAM on this device. Host pages are promised by their slab.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] naming `what`, the bytes needed and the bytes available; nothing is taken then.
    pub fn grant_for(&self, kind: Kind, device_bytes: u64, host_bytes: u64, what: &str) -> Result<Grants> {
        let device = self.0.device_memory.of(kind).grant(device_bytes, what)?;
        // The CPU device's memory is the system's.
        let needed = if self.0.gpu.is_some() { host_bytes } else { device_bytes.saturating_add(host_bytes) };
        match ram::available() {
            Some(available) if available < needed => Err(Error::OutOfMemory {
                memory: "system",
                what: what.to_string(),
                needed,
                available,
                fix: "shorten the context, use a smaller KV cache (--kv kivi), or free memory".into(),
            }),
            _ => {
                let Inner { options, gpu, .. } = &*self.0;
                Ok(Grants { device, poison: options.poison, faults: options.faults.clone(), gpu: gpu.clone() })
            }
        }
    }

    /// Whether two handles are of one device.
    pub fn is(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Whether a variable says yes, in the words of the command line's flags.
fn says_yes(variable: &str) -> Result<bool> {
    let said = std::env::var_os(variable).unwrap_or_default().to_string_lossy().to_lowercase();
    match said.as_str() {
        "" | "0" | "n" | "no" | "f" | "false" | "off" => Ok(false),
        "1" | "y" | "yes" | "t" | "true" | "on" => Ok(true),
        _ => Err(Error::Usage(format!("{variable}={said}: it must be 1, yes or true; 0, no, false or empty"))),
    }
}

/// Threads of the gather if nobody says: enough for the link, and one beside each node's memory.
fn gather_threads(topology: &Topology) -> usize {
    let can_run = topology.threads();
    (can_run / 4).clamp(1, 16).max(topology.nodes().len().min(can_run))
}

impl Drop for Inner {
    /// Only whoever asked for the check by the environment has nobody else to tell it.
    fn drop(&mut self) {
        if let (Some(order), None) = (&self.order, &self.options.order) {
            let checker = order.lock().unwrap_or_else(|e| e.into_inner());
            let conflicts = checker.conflicts();
            if checker.operations() == 0 {
                return;
            }
            eprintln!("order of {} operations: {} conflicts", checker.operations(), conflicts.len());
            conflicts.iter().take(10).for_each(|conflict| eprintln!("  {conflict}"));
        }
    }
}

/// What brings selected pairs into their slots.
pub(crate) const PREFETCH: &str = "prefetch";

/// An operation, until it is dropped.
#[must_use = "it lasts until it is dropped"]
pub(crate) struct Operation<'a> {
    begun: Option<Began<'a>>,
    name: &'static str,
    bytes: u64,
    _range: Option<nvtx::Range>,
}

/// An operation that is traced.
enum Began<'a> {
    OnCpu(&'a Trace, Instant),
    OnGpu(&'a Gpu, Begun),
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        match self.begun.take() {
            None => {}
            Some(Began::OnCpu(trace, at)) => {
                trace.add(StreamId::Compute, self.name, false, Place::current(), at, self.bytes);
            }
            Some(Began::OnGpu(gpu, begun)) => {
                gpu.timing().end(gpu.queues(), begun, self.name, false, self.bytes);
            }
        }
    }
}

/// Device memory that a request has been granted ([`Device::grant`]). What it does not use goes back when this is dropped.
pub struct Grants {
    device: Grant,
    poison: bool,
    gpu: Option<Arc<Gpu>>,
    faults: Option<Arc<Faults>>,
}

impl Grants {
    /// Whether it is a GPU's memory.
    pub(crate) fn is_gpu(&self) -> bool {
        self.gpu.is_some()
    }

    /// Device memory of `len` bytes, zeroed (or poisoned). Metered until it is dropped.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when more is asked for than was granted and the budget does not have it, or when the
    /// system does not.
    pub fn device(&mut self, len: usize, what: &str) -> Result<Buffer> {
        if len > 0 && self.faults.as_ref().is_some_and(|faults| faults.strikes(Fault::Buffer)) {
            return Err(self.device.system_refusal(len as u64, what));
        }
        Buffer::new(len, &mut self.device, self.gpu.as_ref(), self.poison, what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gather::{Node, NodeId};

    #[test]
    fn no_nodes_memory_is_without_a_gather_thread() {
        let threads = |nodes: u32, cpus: usize| {
            let node = |id: u32| Node { id: NodeId(id), cpus: (0..cpus).map(|cpu| id as usize * cpus + cpu).collect() };
            gather_threads(&Topology::of((0..nodes).map(node).collect()))
        };
        assert_eq!((threads(1, 1), threads(1, 8), threads(1, 200)), (1, 2, 16));
        assert_eq!((threads(2, 1), threads(4, 2), threads(8, 16)), (2, 4, 16));
    }
}
