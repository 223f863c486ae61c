//! The driver of one GPU: every call is checked, and a thread's first failure of work in a queue is kept until it asks.
#![allow(unsafe_code)] // Calls into the driver.

use std::cell::RefCell;
use std::ffi::CStr;
use std::path::Path;
use std::ptr;

use super::bindings::driver::{CUcontext, CUdevice, CUdevice_attribute_enum as Attribute, CUresult, Cuda};
use super::probe::{self, Gpu};
use crate::error::{Error, Result};

/// What is known about a GPU.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Name, number, memory, what its driver supports.
    pub gpu: Gpu,
    /// The most dynamic shared memory of a block, bytes.
    pub shared_limit: u32,
}

thread_local! {
    /// The first failure in what this thread has asked of a GPU. Its own, as the last error is in CUDA's runtime: threads
    /// that share an engine fail one by one, unless the GPU itself is lost, which every later call tells of.
    static FAILURE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The driver of one GPU, with its primary context. Shared by everything that lives on that GPU.
pub(crate) struct Driver {
    pub(super) api: Cuda,
    context: CUcontext,
    device: CUdevice,
    /// What is known about the GPU.
    pub facts: Facts,
}

// SAFETY: the driver's functions may be called from any thread, and a context is a handle that any thread may use.
unsafe impl Send for Driver {}
// SAFETY: as above; what is of our own does not change.
unsafe impl Sync for Driver {}

impl Driver {
    /// Opens the driver for GPU `index`. `library`: the driver's library to open instead of the usual ones.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason why that GPU cannot be used, [`Error::Usage`] for a number that no GPU has.
    pub(crate) fn open(library: Option<&Path>, index: usize) -> Result<Driver> {
        let gpus = probe::probe(library).map_err(|why| Error::Device(format!("no CUDA device: {why}")))?;
        let gpu = gpus.get(index).cloned().ok_or_else(|| {
            let there = match gpus.len() {
                1 => "there is one GPU, cuda:0".to_string(),
                n => format!("there are {n} GPUs, cuda:0 to cuda:{}", n - 1),
            };
            Error::Usage(format!("--device cuda:{index}: {there}"))
        })?;
        if !gpu.is_supported() {
            return Err(Error::Device(format!("no CUDA device: {gpu}")));
        }
        let (name, library) = probe::open(library).map_err(|why| Error::Device(why.to_string()))?;
        // SAFETY: the probe has called this library; the symbols have the types of cuda.h.
        let api = unsafe { Cuda::from_library(library) }
            .map_err(|e| Error::Device(format!("{name}: {}; install a newer NVIDIA driver", probe::reason(&e))))?;
        let mut driver = Driver { api, context: ptr::null_mut(), device: 0, facts: Facts { gpu, shared_limit: 0 } };
        driver.begin(index)?;
        Ok(driver)
    }

    fn begin(&mut self, index: usize) -> Result<()> {
        let (mut device, mut context) = (0, ptr::null_mut());
        // SAFETY: initialises the library; flags must be 0.
        self.check("cuInit", unsafe { self.api.cuInit(0) })?;
        // SAFETY: writes one int.
        self.check("cuDeviceGet", unsafe { self.api.cuDeviceGet(&mut device, index as i32) })?;
        // SAFETY: writes one handle, which `drop` gives back.
        let retained = unsafe { self.api.cuDevicePrimaryCtxRetain(&mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", retained)?;
        (self.device, self.context) = (device, context);
        self.facts.shared_limit = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        if self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)? == 0 {
            return Err(Error::Device(
                "this GPU gives pinned host memory another address than the host does, which is not supported".into(),
            ));
        }
        self.enter();
        self.sound()
    }

    fn attribute(&self, attribute: Attribute) -> Result<u32> {
        let mut value = 0;
        // SAFETY: writes one int.
        let result = unsafe { self.api.cuDeviceGetAttribute(&mut value, attribute, self.device) };
        self.check("cuDeviceGetAttribute", result)?;
        Ok(value.max(0) as u32)
    }

    /// Makes this GPU the calling thread's. Whoever embeds the engine may have made another one current, so this stands at
    /// every entry: 20 to 50 ns.
    pub(crate) fn enter(&self) {
        // SAFETY: the context lives as long as `self`.
        self.note("cuCtxSetCurrent", unsafe { self.api.cuCtxSetCurrent(self.context) });
    }

    /// A request begins on the calling thread: this GPU is the thread's, and what failed before it is nobody's any more.
    pub(crate) fn begin_request(&self) {
        FAILURE.take();
        self.enter();
    }

    /// `Err` for any code but success.
    pub(super) fn check(&self, call: &'static str, result: CUresult) -> Result<()> {
        if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Error::Device(self.explain(call, result))) }
    }

    /// Keeps the first failure for [`Driver::sound`]: of calls in the middle of a pass, which goes on and comes to
    /// nothing.
    pub(super) fn note(&self, call: &'static str, result: CUresult) {
        if result != CUresult::CUDA_SUCCESS {
            self.fail(self.explain(call, result));
        }
    }

    /// Keeps the first failure.
    pub(crate) fn fail(&self, why: String) {
        FAILURE.with_borrow_mut(|failure| failure.get_or_insert(why).len());
    }

    /// Whether everything that the calling thread has asked for since the last time has gone well. A failure is told once.
    ///
    /// # Errors
    /// [`Error::Device`] with the first failure.
    pub(crate) fn sound(&self) -> Result<()> {
        FAILURE.take().map_or(Ok(()), |why| Err(Error::Device(why)))
    }

    /// Whether something has failed that the calling thread has not asked for yet. Then kernels must not run: what they are
    /// told may not have arrived.
    pub(crate) fn has_failed(&self) -> bool {
        FAILURE.with_borrow(Option::is_some)
    }

    fn explain(&self, call: &str, result: CUresult) -> String {
        let (mut name, mut text) = (ptr::null(), ptr::null());
        // SAFETY: both write a pointer to a static string, or leave null for a code that they do not know.
        unsafe {
            self.api.cuGetErrorName(result, &mut name);
            self.api.cuGetErrorString(result, &mut text);
        }
        // SAFETY: null or a zero-terminated static string.
        let read = |p: *const std::ffi::c_char| (!p.is_null()).then(|| unsafe { CStr::from_ptr(p) }.to_string_lossy());
        let name = read(name).unwrap_or_else(|| format!("error {}", result.0).into());
        let text = read(text).unwrap_or("unknown to this driver".into());
        format!("{}: {call} failed: {name} ({text})", self.facts.gpu.name)
    }

    /// Free bytes of the GPU's memory.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn free_memory(&self) -> Result<u64> {
        self.enter();
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes.
        self.check("cuMemGetInfo", unsafe { self.api.cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free as u64)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if !self.context.is_null() {
            // SAFETY: retained once, in `begin`. A failure leaves the context to the end of the process.
            unsafe { self.api.cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}
