//! Matrix products by cuBLASLt: 16-bit operands, fp32 sums and results.
//!
//! cuBLASLt counts matrices by columns. Row-major `Y[rows][n] = X[rows][k] W[n][k]^T` is by columns `Y' = W X'`, where a
//! transposed matrix is the same bytes read the other way: so W is its first operand, transposed, and X its second, as it
//! lies.
#![allow(unsafe_code)] // Calls into cuBLASLt.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::sys::{
    self, cublasLtEpilogue_t as Epilogue, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t as DescAttribute, cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute, cublasLtMatrixLayout_t, cudaDataType_t as DataType,
};

use super::bindings::abi::{SPECACHE_BF16, SPECACHE_FP16};
use super::bindings::driver::CUstream;
use super::{Gpu, library};
use crate::device::order::StreamId;
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};

/// Bytes that cuBLASLt may work in: what NVIDIA advises for Hopper and newer, and for what came before.
const WORKSPACE: [usize; 2] = [32 << 20, 4 << 20];
/// Every operand begins at a multiple of so many bytes: what vector loads and TMA want.
const ALIGNMENT: u32 = 16;
/// Shapes whose plans are kept. A prompt's last chunk may have any number of rows; a plan is about a kilobyte.
const MOST_PLANS: usize = 1024;
/// CUBLAS_OP_T.
const TRANSPOSED: i32 = 1;

/// One product: `y = W x + bias` for each row, or `y += W x + bias`. Addresses on the GPU.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    /// `[n, k]` of `dtype`.
    pub weight: u64,
    /// `[n]` f32, or 0.
    pub bias: u64,
    /// `[n_rows, k]` of `dtype`.
    pub x: u64,
    /// `[n_rows]` rows of `n` f32, `y_stride` apart.
    pub y: u64,
    pub n_rows: u32,
    pub k: u32,
    pub n: u32,
    pub y_stride: u32,
    /// Of weight and x: fp16 or bf16, as the kernels count them.
    pub dtype: u32,
    /// Whether y is added to.
    pub adds: bool,
}

/// What cuBLASLt's choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    n_rows: u32,
    k: u32,
    n: u32,
    y_stride: u32,
    dtype: u32,
    adds: bool,
    has_bias: bool,
}

impl Product {
    fn shape(&self) -> Shape {
        let Product { bias, n_rows, k, n, y_stride, dtype, adds, .. } = *self;
        Shape { n_rows, k, n, y_stride, dtype, adds, has_bias: bias != 0 }
    }
}

/// cuBLASLt on one GPU. All products run on the compute queue, so they can share a workspace.
pub(crate) struct Cublas {
    // Dropped in this order: freeing the workspace waits for the last product.
    workspace: Buffer,
    plans: Mutex<HashMap<Shape, Plan>>,
    api: Arc<Api>,
    gpu: Arc<Gpu>,
}

impl Cublas {
    /// What [`Cublas::open`] takes on a GPU of this compute capability.
    pub(crate) fn workspace_bytes(arch: (u32, u32)) -> usize {
        WORKSPACE[usize::from(arch < (9, 0))]
    }

    /// Opens the library and takes its workspace from the device's budget.
    ///
    /// # Errors
    /// [`Error::Device`] that names what is missing, [`Error::OutOfMemory`].
    pub(crate) fn open(device: &Device, gpu: &Arc<Gpu>) -> Result<Cublas> {
        gpu.driver().enter();
        let api = Arc::new(Api::open()?);
        let bytes = Cublas::workspace_bytes(gpu.facts().gpu.arch);
        let what = "the workspace of cuBLASLt";
        let workspace = device.grant(bytes as u64, 0, what)?.device(bytes, what)?;
        Ok(Cublas { plans: Mutex::default(), api, workspace, gpu: gpu.clone() })
    }

    /// Puts a product into the compute queue. What fails is kept for [`super::driver::Driver::sound`].
    pub(crate) fn launch(&self, product: &Product) {
        let Some(_use) = self.gpu.queues().call() else { return };
        let driver = self.gpu.driver();
        if product.n_rows == 0 || driver.has_failed() {
            return;
        }
        if let Err(why) = self.start(product) {
            let Product { n_rows, k, n, .. } = product;
            driver.fail(format!("{}: a product of {n_rows} rows, {k} to {n} features: {why}", driver.facts.gpu.name));
        }
    }

    fn start(&self, product: &Product) -> Result<(), String> {
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        let shape = product.shape();
        if plans.len() >= MOST_PLANS && !plans.contains_key(&shape) {
            plans.clear();
        }
        let plan = match plans.entry(shape) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => place.insert(Plan::new(&self.api, shape, self.workspace.len())?),
        };
        let Some(_use) = self.gpu.queues().call() else { return Ok(()) };
        if product.bias != 0 {
            plan.set(DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &product.bias)?;
        }
        let (alpha, beta) = (1.0f32, f32::from(u8::from(product.adds)));
        let address = |at: u64| at as *mut c_void;
        // SAFETY: the plan's handles live; alpha and beta are read during the call; the addresses are alive by the contract
        // of the operations, and as large as the plan says; the workspace is used by this queue alone.
        let status = unsafe {
            (self.api.matmul)(
                self.api.handle,
                plan.desc,
                ptr::from_ref(&alpha).cast(),
                address(product.weight),
                plan.weight,
                address(product.x),
                plan.x,
                ptr::from_ref(&beta).cast(),
                address(product.y),
                plan.y,
                address(product.y),
                plan.y,
                &plan.algorithm,
                address(self.workspace.address()),
                self.workspace.len(),
                self.gpu.queues().handle(StreamId::Compute),
            )
        };
        check("cublasLtMatmul", status)
    }
}

/// A shape's descriptors, and the algorithm for it.
struct Plan {
    api: Arc<Api>,
    desc: cublasLtMatmulDesc_t,
    weight: cublasLtMatrixLayout_t,
    x: cublasLtMatrixLayout_t,
    y: cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
}

// SAFETY: descriptors in host memory, used behind the mutex of `Cublas`.
unsafe impl Send for Plan {}

impl Plan {
    fn new(api: &Arc<Api>, shape: Shape, workspace: usize) -> Result<Plan, String> {
        let dtype = match shape.dtype {
            SPECACHE_FP16 => DataType::CUDA_R_16F,
            SPECACHE_BF16 => DataType::CUDA_R_16BF,
            _ => return Err("cuBLASLt is used for fp16 and bf16 weights only; use --linear fused".into()),
        };
        let mut plan = Plan {
            api: api.clone(),
            desc: ptr::null_mut(),
            weight: ptr::null_mut(),
            x: ptr::null_mut(),
            y: ptr::null_mut(),
            algorithm: cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F);
        // SAFETY: writes one handle, which `drop` gives back.
        check("cublasLtMatmulDescCreate", unsafe {
            (api.desc_create)(&mut plan.desc, compute as c_int, scale as c_int)
        })?;
        plan.set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if shape.has_bias {
            plan.set(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &(Epilogue::CUBLASLT_EPILOGUE_BIAS as i32))?;
        }
        let Shape { n_rows, k, n, y_stride, .. } = shape;
        for (layout, dtype, rows, columns, stride) in [
            (&mut plan.weight, dtype, k, n, k),
            (&mut plan.x, dtype, k, n_rows, k),
            (&mut plan.y, DataType::CUDA_R_32F, n, n_rows, y_stride),
        ] {
            // SAFETY: writes one handle, which `drop` gives back.
            let status = unsafe {
                (api.layout_create)(layout, dtype as c_int, u64::from(rows), u64::from(columns), i64::from(stride))
            };
            check("cublasLtMatrixLayoutCreate", status)?;
        }
        plan.algorithm = plan.choose(workspace)?;
        Ok(plan)
    }

    /// The algorithm that cuBLASLt's heuristic puts first.
    fn choose(&self, workspace: usize) -> Result<cublasLtMatmulAlgo_t, String> {
        let preference = Preference::new(&self.api)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(workspace as u64))?;
        for operand in [
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(operand, &ALIGNMENT)?;
        }
        let (mut found, mut choice) = (0, Choice::default());
        // SAFETY: all handles live; room for the one result that is asked for.
        let status = unsafe {
            (self.api.heuristic)(
                self.api.handle,
                self.desc,
                self.weight,
                self.x,
                self.y,
                self.y,
                preference.handle,
                1,
                &mut choice,
                &mut found,
            )
        };
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        check("cublasLtMatmulAlgoGetHeuristic", if found == 0 { NOT_SUPPORTED } else { choice.state })?;
        Ok(cublasLtMatmulAlgo_t { data: choice.algorithm })
    }

    fn set<T: Copy>(&self, attribute: DescAttribute, value: &T) -> Result<(), String> {
        // SAFETY: the descriptor lives; `value` is read during the call.
        let status =
            unsafe { (self.api.desc_set)(self.desc, attribute as c_int, ptr::from_ref(value).cast(), size_of::<T>()) };
        check("cublasLtMatmulDescSetAttribute", status)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once; null where `new` did not come so far.
        unsafe {
            for layout in [self.y, self.x, self.weight].into_iter().filter(|layout| !layout.is_null()) {
                (self.api.layout_destroy)(layout);
            }
            if !self.desc.is_null() {
                (self.api.desc_destroy)(self.desc);
            }
        }
    }
}

/// What an algorithm is chosen by.
struct Preference<'a> {
    api: &'a Api,
    handle: cublasLtMatmulPreference_t,
}

impl Preference<'_> {
    fn new(api: &Api) -> Result<Preference<'_>, String> {
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle, which `drop` gives back.
        check("cublasLtMatmulPreferenceCreate", unsafe { (api.preference_create)(&mut handle) })?;
        Ok(Preference { api, handle })
    }

    fn set<T: Copy>(&self, attribute: PreferenceAttribute, value: &T) -> Result<(), String> {
        // SAFETY: the preference lives; `value` is read during the call.
        let status = unsafe {
            (self.api.preference_set)(self.handle, attribute as c_int, ptr::from_ref(value).cast(), size_of::<T>())
        };
        check("cublasLtMatmulPreferenceSetAttribute", status)
    }
}

impl Drop for Preference<'_> {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        unsafe { (self.api.preference_destroy)(self.handle) };
    }
}

/// cublasLtMatmulHeuristicResult_t, with a status that may be any number.
#[repr(C)]
#[derive(Default)]
struct Choice {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Choice>() == size_of::<sys::cublasLtMatmulHeuristicResult_t>());
const _: () = assert!(size_of::<cublasLtMatmulAlgo_t>() == size_of::<[u64; 8]>());

/// cublasStatus_t: a Rust enum in cudarc, which a newer library's codes must not become.
type Status = c_int;

/// CUBLAS_STATUS_NOT_SUPPORTED.
const NOT_SUPPORTED: Status = 15;

type Destroy<T> = unsafe extern "C" fn(T) -> Status;
type Set<T> = unsafe extern "C" fn(T, c_int, *const c_void, usize) -> Status;

/// The library's functions, with cublasLt.h's types and enums as the numbers that they are; and its handle.
struct Api {
    handle: cublasLtHandle_t,
    destroy: Destroy<cublasLtHandle_t>,
    desc_create: unsafe extern "C" fn(*mut cublasLtMatmulDesc_t, c_int, c_int) -> Status,
    desc_set: Set<cublasLtMatmulDesc_t>,
    desc_destroy: Destroy<cublasLtMatmulDesc_t>,
    layout_create: unsafe extern "C" fn(*mut cublasLtMatrixLayout_t, c_int, u64, u64, i64) -> Status,
    layout_destroy: Destroy<cublasLtMatrixLayout_t>,
    preference_create: unsafe extern "C" fn(*mut cublasLtMatmulPreference_t) -> Status,
    preference_set: Set<cublasLtMatmulPreference_t>,
    preference_destroy: Destroy<cublasLtMatmulPreference_t>,
    heuristic: Heuristic,
    matmul: Matmul,
}

type Heuristic = unsafe extern "C" fn(
    cublasLtHandle_t,
    cublasLtMatmulDesc_t,
    cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t,
    cublasLtMatmulPreference_t,
    c_int,
    *mut Choice,
    *mut c_int,
) -> Status;

type Matmul = unsafe extern "C" fn(
    cublasLtHandle_t,
    cublasLtMatmulDesc_t,
    *const c_void,
    *const c_void,
    cublasLtMatrixLayout_t,
    *const c_void,
    cublasLtMatrixLayout_t,
    *const c_void,
    *const c_void,
    cublasLtMatrixLayout_t,
    *mut c_void,
    cublasLtMatrixLayout_t,
    *const cublasLtMatmulAlgo_t,
    *mut c_void,
    usize,
    CUstream,
) -> Status;

// SAFETY: the library's functions and its handle may be used from any thread.
unsafe impl Send for Api {}
// SAFETY: as above.
unsafe impl Sync for Api {}

impl Api {
    /// For the GPU whose context is current.
    fn open() -> Result<Api> {
        library::open("cublasLt").map_err(|why| {
            Error::Device(format!(
                "cuBLASLt cannot be opened ({why}): install the CUDA toolkit or `pip install nvidia-cublas`, set \
                 CUDA_HOME, or use --linear fused"
            ))
        })?;
        let mut handle = ptr::null_mut();
        let create: unsafe extern "C" fn(*mut cublasLtHandle_t) -> Status = function("cublasLtCreate")?;
        let mut api = Api {
            handle,
            destroy: function("cublasLtDestroy")?,
            desc_create: function("cublasLtMatmulDescCreate")?,
            desc_set: function("cublasLtMatmulDescSetAttribute")?,
            desc_destroy: function("cublasLtMatmulDescDestroy")?,
            layout_create: function("cublasLtMatrixLayoutCreate")?,
            layout_destroy: function("cublasLtMatrixLayoutDestroy")?,
            preference_create: function("cublasLtMatmulPreferenceCreate")?,
            preference_set: function("cublasLtMatmulPreferenceSetAttribute")?,
            preference_destroy: function("cublasLtMatmulPreferenceDestroy")?,
            heuristic: function("cublasLtMatmulAlgoGetHeuristic")?,
            matmul: function("cublasLtMatmul")?,
        };
        // SAFETY: writes one handle, which `drop` gives back.
        check("cublasLtCreate", unsafe { create(&mut handle) }).map_err(Error::Device)?;
        api.handle = handle;
        Ok(api)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: made once, destroyed once, after all that was made with it.
            unsafe { (self.destroy)(self.handle) };
        }
    }
}

/// A function of the library, which is open. `F`: its type, as cublasLt.h declares it.
fn function<F: Copy>(symbol: &'static str) -> Result<F> {
    // SAFETY: the library is there, as was just seen; each caller names the type that is documented for this symbol.
    let found = unsafe { sys::culib().get::<F>(symbol.as_bytes()) };
    found
        .map(|f| *f)
        .map_err(|_| Error::Device(format!("libcublasLt has no {symbol}: install one of CUDA 12 or newer")))
}

fn check(call: &str, status: Status) -> Result<(), String> {
    let meaning = match status {
        0 => return Ok(()),
        1 => "not initialised",
        3 => "out of memory",
        7 => "invalid value",
        8 => "not for this GPU",
        13 => "it did not run",
        14 => "internal error",
        NOT_SUPPORTED => "no algorithm for this shape",
        _ => "see cublasStatus_t",
    };
    Err(format!("{call} failed with {status} ({meaning})"))
}
