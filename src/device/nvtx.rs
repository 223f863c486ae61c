//! Ranges for profilers: NVTX 3, as Nsight Systems and others listen to it.
//!
//! NVTX is a protocol and no library: a profiler names its own in `NVTX_INJECTION64_PATH`, the program opens that and gives
//! it places for the functions that it wants called. NVIDIA's side of it is headers only, which would make every build need
//! them; the part that ranges take is this file. Without a profiler a range costs one load.
#![allow(unsafe_code)] // The profiler's library.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::fmt::Display;
use std::marker::PhantomData;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::Library;

use super::cuda::probe::reason;
use crate::notice;

/// Begins a range of the calling thread that lasts until it is dropped. Ranges of a thread nest.
pub(crate) fn range(name: impl Display) -> Option<Range> {
    let mut refused = None;
    let profiler = PROFILER.get_or_init(|| Profiler::attach().map_err(|why| refused = Some(why)).ok().flatten());
    // Not before it is settled: whoever hears of it may come here again.
    if let Some(why) = refused {
        notice::warn(format_args!("{why}"));
    }
    let profiler = profiler.as_ref()?;
    let name = CString::new(name.to_string()).unwrap_or_default();
    // SAFETY: what the profiler put there has this type; it copies the text.
    unsafe { (profiler.push)(name.as_ptr()) };
    Some(Range(PhantomData))
}

/// A range, until it is dropped.
pub(crate) struct Range(PhantomData<*const ()>); // neither Send nor Sync: it ends on its own thread

impl Drop for Range {
    fn drop(&mut self) {
        if let Some(Some(profiler)) = PROFILER.get() {
            // SAFETY: what the profiler put there has this type.
            unsafe { (profiler.pop)() };
        }
    }
}

static PROFILER: OnceLock<Option<Profiler>> = OnceLock::new();

/// nvtxRangePushA and nvtxRangePop.
struct Profiler {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
}

/// Functions of each module of NVTX 3, counted from 1 as its callback numbers are: none, core, CUDA, OpenCL, CUDA runtime,
/// domains, synchronisation. A profiler fills in what it wants to hear of; of that we call two.
const MODULES: [usize; 7] = [0, 15, 8, 14, 6, 15, 6];
const CORE: usize = 1;
const RANGE_PUSH_A: usize = 9;
const RANGE_POP: usize = 11;

type Slot = AtomicPtr<c_void>;
static SLOTS: [[Slot; 16]; MODULES.len()] = [const { [const { AtomicPtr::new(ptr::null_mut()) }; 16] }; MODULES.len()];
/// For each module the addresses of its slots, from number 1 on, with null before and behind them.
static TABLES: OnceLock<[[usize; 17]; MODULES.len()]> = OnceLock::new();

impl Profiler {
    /// The profiler that listens, if one does, or why it cannot.
    fn attach() -> Result<Option<Profiler>, String> {
        let Some(path) = std::env::var_os("NVTX_INJECTION64_PATH").filter(|path| !path.is_empty()) else {
            return Ok(None);
        };
        let attached = Profiler::open(&path);
        let why = |why| format!("NVTX_INJECTION64_PATH {}: no ranges for a profiler: {why}", path.display());
        attached.map(Some).map_err(why)
    }

    fn open(path: &std::ffi::OsStr) -> Result<Profiler, String> {
        type Initialize = unsafe extern "C" fn(unsafe extern "C" fn(u32) -> *const c_void) -> c_int;
        // SAFETY: a profiler's library is made to be loaded into programs.
        let library = unsafe { Library::new(path) }.map_err(|e| reason(&e))?;
        // SAFETY: the type that NVTX 3 gives this symbol.
        let initialize = unsafe { library.get::<Initialize>("InitializeInjectionNvtx2") }.map_err(|e| reason(&e))?;
        // SAFETY: as NVTX 3 calls it.
        if unsafe { initialize(export_table) } == 0 {
            return Err("it refused".into());
        }
        std::mem::forget(library); // what it gave is called until the process ends
        let slot = |number: usize| SLOTS[CORE][number].load(Ordering::Acquire);
        let (push, pop) = (slot(RANGE_PUSH_A), slot(RANGE_POP));
        if push.is_null() || pop.is_null() {
            return Err("it does not listen to ranges".into());
        }
        // SAFETY: NVTX 3 gives these slots these types.
        let (push, pop) = unsafe {
            (
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> c_int>(push),
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(pop),
            )
        };
        Ok(Profiler { push, pop })
    }
}

/// NvtxExportTableCallbacks.
#[repr(C)]
struct Callbacks {
    bytes: usize,
    function_table: unsafe extern "C" fn(c_uint, *mut *const usize, *mut c_uint) -> c_int,
}

/// NvtxExportTableVersionInfo.
#[repr(C)]
struct VersionInfo {
    bytes: usize,
    version: u32,
    reserved: u32,
    set_version: unsafe extern "C" fn(u32),
}

static CALLBACKS: Callbacks = Callbacks { bytes: size_of::<Callbacks>(), function_table };
static VERSION_INFO: VersionInfo =
    VersionInfo { bytes: size_of::<VersionInfo>(), version: 3, reserved: 0, set_version };

/// Asked by the profiler for table 1, the callbacks, and table 3, the version.
unsafe extern "C" fn export_table(number: u32) -> *const c_void {
    match number {
        1 => ptr::from_ref(&CALLBACKS).cast(),
        3 => ptr::from_ref(&VERSION_INFO).cast(),
        _ => ptr::null(),
    }
}

/// The profiler's own version, which says nothing that matters here.
unsafe extern "C" fn set_version(_: u32) {}

/// Gives the profiler the slots of a module, and how many there are with the unused first one; 0 for one that is not known.
unsafe extern "C" fn function_table(module: c_uint, table: *mut *const usize, size: *mut c_uint) -> c_int {
    let Some(&functions) = MODULES.get(module as usize).filter(|&&functions| functions > 0) else { return 0 };
    let addresses = |module: usize| -> [usize; 17] {
        std::array::from_fn(|i| match i {
            1.. if i <= MODULES[module] => SLOTS[module][i].as_ptr() as usize,
            _ => 0,
        })
    };
    let tables = TABLES.get_or_init(|| std::array::from_fn(addresses));
    // SAFETY: the profiler passes two places to write to, either of which may be null.
    unsafe {
        if !table.is_null() {
            *table = tables[module as usize].as_ptr();
        }
        if !size.is_null() {
            *size = functions as c_uint + 1;
        }
    }
    1
}
