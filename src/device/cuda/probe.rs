//! Is there a GPU that could be used, and if not, why? Asked before any binding is called: the driver's library is opened at
//! run time, so that one binary works with and without it.
#![allow(unsafe_code)] // Calls into a library that is opened at run time.

use std::error::Error;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::fmt;
use std::path::Path;

use libloading::Library;

/// Where the driver's library is, first come first served: the system's, that of WSL, and the name that only development
/// packages have.
const LIBRARIES: [&str; 3] = ["libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1", "libcuda.so"];

/// The oldest driver interface that the kernels are built for, CUDA 12.0, as the driver counts.
const OLDEST: i32 = 12_000;

/// The oldest compute capability that there are kernels for: Ampere.
const OLDEST_ARCH: (u32, u32) = (8, 0);

/// A GPU that the driver knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The driver's number for it, after `CUDA_VISIBLE_DEVICES`.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// Major and minor compute capability.
    pub arch: (u32, u32),
    /// Multiprocessors.
    pub n_sms: u32,
    /// Bytes of its memory.
    pub memory: u64,
    /// What its driver supports: 13000 for CUDA 13.0.
    pub driver: i32,
}

impl Gpu {
    /// Whether there are kernels for it.
    pub fn is_supported(&self) -> bool {
        self.arch >= OLDEST_ARCH
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Gpu { index, name, arch: (major, minor), n_sms, memory, driver } = self;
        let (gib, cuda) = (*memory as f64 / (1u64 << 30) as f64, (driver / 1000, driver % 1000 / 10));
        write!(
            f,
            "cuda:{index}: {name}, sm_{major}{minor}, {n_sms} SMs, {gib:.1} GiB, driver for CUDA {}.{}",
            cuda.0, cuda.1
        )?;
        if self.is_supported() { Ok(()) } else { write!(f, " (too old: sm_80 or newer is needed)") }
    }
}

/// Why no GPU can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGpu {
    /// No library.
    #[error("no NVIDIA driver: {0}")]
    NoDriver(String),
    /// A library without what every driver has: a stub of a toolkit, or damaged.
    #[error("{library} has no {symbol}: a stub or a damaged driver; install the NVIDIA driver")]
    Stub {
        /// Which file.
        library: String,
        /// What it lacks.
        symbol: &'static str,
    },
    /// The driver is older than the kernels.
    #[error("the NVIDIA driver supports CUDA {}.{}: 12.0 or newer is needed (driver 525 or newer)", .0 / 1000, .0 % 1000 / 10)]
    TooOld(i32),
    /// A call failed.
    #[error("the NVIDIA driver failed: {call} gave error {code} ({})", meaning(*code))]
    Failed {
        /// Which one.
        call: &'static str,
        /// `CUresult`.
        code: i32,
    },
    /// A driver, and nothing to drive.
    #[error("the NVIDIA driver finds no GPU (CUDA_VISIBLE_DEVICES may hide them)")]
    NoDevice,
}

/// What the codes mean that a probe meets.
fn meaning(code: i32) -> &'static str {
    match code {
        1 => "invalid value",
        2 => "out of memory",
        3 => "not initialised: the kernel module may not be loaded",
        34 => "a stub library",
        100 => "no device",
        101 => "invalid device",
        803 => "library and kernel module are of different versions: reboot after a driver update",
        804 => "forward compatibility is not supported on this GPU",
        999 => "unknown: see the kernel log",
        _ => "see CUresult in the CUDA driver API",
    }
}

/// The GPUs of this machine. `library`: the driver's library to open instead of the usual ones.
///
/// # Errors
/// Why there are none.
pub fn probe(library: Option<&Path>) -> Result<Vec<Gpu>, NoGpu> {
    let (name, library) = open(library)?;
    let driver = Driver { name, library };
    driver.call("cuInit", |init: unsafe extern "C" fn(c_uint) -> c_int| {
        // SAFETY: takes flags, which must be 0.
        unsafe { init(0) }
    })?;
    let mut version = 0;
    driver.call("cuDriverGetVersion", |get: unsafe extern "C" fn(*mut c_int) -> c_int| {
        // SAFETY: writes one int.
        unsafe { get(&mut version) }
    })?;
    if version < OLDEST {
        return Err(NoGpu::TooOld(version));
    }
    let mut count = 0;
    driver.call("cuDeviceGetCount", |get: unsafe extern "C" fn(*mut c_int) -> c_int| {
        // SAFETY: writes one int.
        unsafe { get(&mut count) }
    })?;
    match count {
        1.. => (0..count).map(|i| driver.gpu(i, version)).collect(),
        _ => Err(NoGpu::NoDevice),
    }
}

/// What the dynamic linker says, which libloading keeps behind its own words.
pub(crate) fn reason(e: &libloading::Error) -> String {
    e.source().map_or_else(|| e.to_string(), ToString::to_string)
}

pub(super) fn open(library: Option<&Path>) -> Result<(String, Library), NoGpu> {
    let usual = LIBRARIES.map(Path::new);
    let mut why = String::new();
    for path in library.as_ref().map_or(&usual[..], std::slice::from_ref) {
        // SAFETY: the constructors of NVIDIA's driver library may be run on any thread at any time.
        match unsafe { Library::new(*path) } {
            Ok(library) => return Ok((path.display().to_string(), library)),
            Err(e) if why.is_empty() => why = reason(&e),
            Err(_) => {} // the first name is the one that people know
        }
    }
    Err(NoGpu::NoDriver(why))
}

/// The driver's library.
struct Driver {
    name: String,
    library: Library,
}

impl Driver {
    /// Looks up a function and has it called. `F`: its type, as CUDA's `cuda.h` declares it.
    fn call<F: Copy>(&self, symbol: &'static str, call: impl FnOnce(F) -> c_int) -> Result<(), NoGpu> {
        let stub = || NoGpu::Stub { library: self.name.clone(), symbol };
        // SAFETY: each caller names the type that the driver API documents for this symbol.
        let function = unsafe { self.library.get::<F>(symbol) }.map_err(|_| stub())?;
        match call(*function) {
            0 => Ok(()),
            100 => Err(NoGpu::NoDevice),
            code => Err(NoGpu::Failed { call: symbol, code }),
        }
    }

    fn gpu(&self, index: c_int, version: c_int) -> Result<Gpu, NoGpu> {
        let mut device = 0;
        self.call("cuDeviceGet", |get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int| {
            // SAFETY: writes one int, the handle.
            unsafe { get(&mut device, index) }
        })?;
        let mut name = [0 as c_char; 256];
        self.call("cuDeviceGetName", |get: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int| {
            // SAFETY: writes at most 255 bytes and a zero behind them; the array stays zero-terminated.
            unsafe { get(name.as_mut_ptr(), 255, device) }
        })?;
        let mut memory = 0usize;
        self.call("cuDeviceTotalMem_v2", |get: unsafe extern "C" fn(*mut usize, c_int) -> c_int| {
            // SAFETY: writes one size_t.
            unsafe { get(&mut memory, device) }
        })?;
        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
        let arch = (self.attribute(75, device)?, self.attribute(76, device)?);
        // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT.
        let n_sms = self.attribute(16, device)?;
        // SAFETY: zero-terminated, as said above.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Gpu { index: index as usize, name, arch, n_sms, memory: memory as u64, driver: version })
    }

    fn attribute(&self, attribute: c_int, device: c_int) -> Result<u32, NoGpu> {
        let mut value = 0;
        self.call("cuDeviceGetAttribute", |get: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int| {
            // SAFETY: writes one int.
            unsafe { get(&mut value, attribute, device) }
        })?;
        Ok(u32::try_from(value).unwrap_or(0))
    }
}
