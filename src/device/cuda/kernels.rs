//! The kernels as the driver has them: loaded at the start, launched by the plans of csrc/plan/.
#![allow(unsafe_code)] // Modules and launches.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, RwLock};

use super::bindings::abi::specache_launch;
use super::bindings::driver::{
    CUfunction, CUfunction_attribute_enum as Attribute, CUlaunchAttribute, CUlaunchAttributeID_enum as LaunchAttribute,
    CUlaunchAttributeValue, CUlaunchConfig, CUmodule, CUresult,
};
use super::driver::Driver;
use super::queues::Queues;
use super::{images, nvrtc};
use crate::device::order::StreamId;
use crate::error::{Error, Result};

/// A launch plan of csrc/plan/: checks the parameters and says how the kernel is launched.
pub(crate) type Plan<P> = unsafe extern "C" fn(*const P, *mut specache_launch) -> i32;

/// Shared memory of a block that needs no permission, bytes.
const FREE_SHARED: u32 = 48 << 10;

/// The loaded kernels.
pub(crate) struct Kernels {
    driver: Arc<Driver>,
    modules: Vec<Module>,
    /// By the address of their names, which are static strings of the plans.
    functions: RwLock<HashMap<usize, Arc<Function>>>,
    /// A kernel may begin before the one before it has ended, and wait for it by itself: sm_90 and newer.
    overlap_launches: bool,
}

struct Module(CUmodule);

struct Function {
    handle: CUfunction,
    /// Dynamic shared memory that it has permission for.
    shared: AtomicU32,
}

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Kernels {
    /// Loads all kernels: those that were compiled with the program, or else sources that NVRTC compiles now, once for
    /// each machine.
    ///
    /// # Errors
    /// [`Error::Device`] that names what is missing.
    pub(crate) fn load(driver: &Arc<Driver>) -> Result<Kernels> {
        driver.enter();
        let overlap_launches = driver.facts.gpu.arch >= (9, 0);
        let mut kernels =
            Kernels { driver: driver.clone(), modules: Vec::new(), functions: RwLock::default(), overlap_launches };
        if let Some(built) = images::BUILT {
            for (_, image) in built {
                kernels.modules.push(kernels.module(image)?);
            }
            return Ok(kernels);
        }
        for kernel in nvrtc::compile_all(&driver.facts)? {
            // What lies on the disk may be damaged: compiled anew, it is not.
            let module = kernels.module(&kernel.image).or_else(|e| match kernel.recompile(&driver.facts)? {
                Some(image) => kernels.module(&image),
                None => Err(e),
            })?;
            kernels.modules.push(module);
        }
        Ok(kernels)
    }

    fn module(&self, image: &[u8]) -> Result<Module> {
        let mut module = ptr::null_mut();
        // SAFETY: writes one handle; the image is whole, and the driver checks what it says.
        let result = unsafe { self.driver.api.cuModuleLoadData(&mut module, image.as_ptr().cast()) };
        self.driver.check("cuModuleLoadData", result)?;
        Ok(Module(module))
    }

    /// Launches what `plan` makes of `params`. What fails is kept for [`Driver::sound`].
    pub(crate) fn launch<P>(&self, queues: &Queues, stream: StreamId, plan: Plan<P>, params: &P) {
        let Some(_use) = queues.call() else { return };
        if self.driver.has_failed() {
            return;
        }
        let mut launch = specache_launch::default();
        // SAFETY: plans read the parameters and write the launch; they touch no device.
        let status = unsafe { plan(params, &mut launch) };
        if status != 0 {
            // SAFETY: the message ends with a zero.
            let why = unsafe { CStr::from_ptr(launch.message.as_ptr()) }.to_string_lossy();
            self.driver.fail(format!("a kernel cannot be launched: {why}"));
        } else if launch.grid > 0
            && let Err(e) = self.start(queues, stream, &launch, ptr::from_ref(params).cast_mut().cast())
        {
            self.driver.fail(e.to_string());
        }
    }

    fn start(&self, queues: &Queues, stream: StreamId, launch: &specache_launch, params: *mut c_void) -> Result<()> {
        let function = self.function(launch)?;
        self.permit(&function, launch.shared_bytes)?;
        let overlap = CUlaunchAttribute {
            id: LaunchAttribute::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: Default::default(),
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let mut attributes = [overlap];
        // Within one queue only: a kernel waits by itself for its predecessor there.
        let n_attributes = u32::from(self.overlap_launches && stream == StreamId::Compute);
        let config = CUlaunchConfig {
            gridDimX: launch.grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: queues.handle(stream),
            attrs: attributes.as_mut_ptr(),
            numAttrs: n_attributes,
        };
        let mut arguments = [params];
        // SAFETY: the kernel takes one struct by value, which is copied before the call returns; its addresses were
        // checked by the plan as far as they can be, and are alive by the contract of the operations.
        let result = unsafe {
            self.driver.api.cuLaunchKernelEx(&config, function.handle, arguments.as_mut_ptr(), ptr::null_mut())
        };
        // SAFETY: a static string.
        let name = unsafe { CStr::from_ptr(launch.kernel) }.to_string_lossy();
        self.driver.check("cuLaunchKernelEx", result).map_err(|e| Error::Device(format!("{name}: {e}")))
    }

    fn function(&self, launch: &specache_launch) -> Result<Arc<Function>> {
        let key = launch.kernel as usize;
        if let Some(function) = self.functions.read().unwrap_or_else(|e| e.into_inner()).get(&key) {
            return Ok(function.clone());
        }
        for module in &self.modules {
            let mut handle = ptr::null_mut();
            // SAFETY: writes one handle; the name is a static string.
            let result = unsafe { self.driver.api.cuModuleGetFunction(&mut handle, module.0, launch.kernel) };
            if result == CUresult::CUDA_ERROR_NOT_FOUND {
                continue;
            }
            self.driver.check("cuModuleGetFunction", result)?;
            let function = Arc::new(Function { handle, shared: AtomicU32::new(FREE_SHARED) });
            self.functions.write().unwrap_or_else(|e| e.into_inner()).insert(key, function.clone());
            return Ok(function);
        }
        // SAFETY: a static string.
        let name = unsafe { CStr::from_ptr(launch.kernel) }.to_string_lossy();
        Err(Error::Device(format!("no kernel {name} in this program: rebuild it")))
    }

    /// A kernel that takes more than 48 KiB of shared memory must be given leave.
    fn permit(&self, function: &Function, shared_bytes: u32) -> Result<()> {
        if shared_bytes <= function.shared.load(Ordering::Relaxed) {
            return Ok(());
        }
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: sets a limit of the function.
        let result = unsafe { self.driver.api.cuFuncSetAttribute(function.handle, attribute, shared_bytes as i32) };
        self.driver.check("cuFuncSetAttribute", result)?;
        function.shared.fetch_max(shared_bytes, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        self.driver.enter();
        for Module(module) in &self.modules {
            // SAFETY: loaded once, unloaded once, when nothing runs any more.
            self.driver.note("cuModuleUnload", unsafe { self.driver.api.cuModuleUnload(*module) });
        }
    }
}
