//! Memory of the GPU, and host memory that it reads and writes by itself.
#![allow(unsafe_code)] // Allocation through the driver.

use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::bindings::driver::{
    CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP, CU_MEMHOSTREGISTER_PORTABLE,
    CUresult,
};
use super::driver::Driver;
use crate::device::pin::Pin;
use crate::error::{Error, Result};

/// Bytes in the GPU's memory, 256-byte aligned. Freed on drop; whoever drops it knows that no queue uses it any more.
pub(crate) struct GpuMemory {
    driver: Arc<Driver>,
    address: u64,
    len: usize,
}

impl GpuMemory {
    /// `len` bytes that hold anything. Address 0 if `len` is 0.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with what the driver has free, [`Error::Device`].
    pub(crate) fn new(driver: &Arc<Driver>, len: usize, what: &str) -> Result<GpuMemory> {
        let mut address = 0;
        if len > 0 {
            driver.enter();
            // SAFETY: writes one address.
            let result = unsafe { driver.api.cuMemAlloc_v2(&mut address, len) };
            if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(Error::OutOfMemory {
                    memory: "device",
                    what: what.to_string(),
                    needed: len as u64,
                    available: driver.free_memory()?,
                    fix: "shorten the context, lower the batch, or end other programs on this GPU".into(),
                });
            }
            driver.check("cuMemAlloc", result)?;
        }
        Ok(GpuMemory { driver: driver.clone(), address, len })
    }

    /// Its first byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for GpuMemory {
    fn drop(&mut self) {
        if self.address != 0 {
            self.driver.enter();
            // SAFETY: allocated in `new`, freed once.
            self.driver.note("cuMemFree", unsafe { self.driver.api.cuMemFree_v2(self.address) });
        }
    }
}

/// Page-locked host memory that copies read and write without another copy: for what goes to and fro in every step. Never
/// write-combined, which the host would read at a hundredth of the speed.
pub(crate) struct PinnedMemory {
    driver: Arc<Driver>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory; who reads and writes it when is up to its owner.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above; shared access only reads, but for words and blocks of a mailbox, whose owner says who writes when.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// `len` zeroed bytes.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn new(driver: &Arc<Driver>, len: usize) -> Result<PinnedMemory> {
        let mut start = ptr::null_mut();
        driver.enter();
        // SAFETY: writes one address of at least one byte.
        let result = unsafe {
            driver.api.cuMemHostAlloc(&mut start, len.max(1), CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP)
        };
        driver.check("cuMemHostAlloc", result)?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(Error::Device("cuMemHostAlloc gave nothing".into()))?;
        // SAFETY: `len.max(1)` bytes were allocated.
        unsafe { start.write_bytes(0, len.max(1)) };
        Ok(PinnedMemory { driver: driver.clone(), start, len })
    }

    /// Its first byte.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// The same for the GPU, which has the host's addresses.
    pub(super) fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Its bytes. The caller has waited for copies into them.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this length; `&self` keeps others of this program from writing.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// Its bytes, to write. The caller has waited for copies out of them.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this length; `&mut self` is the only way to it.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        self.driver.enter();
        // SAFETY: allocated in `new`, freed once.
        self.driver.note("cuMemFreeHost", unsafe { self.driver.api.cuMemFreeHost(self.start.as_ptr().cast()) });
    }
}

/// Registers the arenas of host pages with the GPU: its copy engines and its kernels then reach them directly.
pub(crate) struct Register(pub(crate) Arc<Driver>);

impl Pin for Register {
    fn pin(&self, start: NonNull<u8>, bytes: usize) -> Result<(), String> {
        self.0.enter();
        let flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the range is mapped and stays so until `unpin`.
        let result = unsafe { self.0.api.cuMemHostRegister_v2(start.as_ptr().cast(), bytes, flags) };
        self.0.check("cuMemHostRegister", result).map_err(|e| {
            format!(
                "{} MiB of host memory could not be registered with the GPU ({e}); lower --host-kv-budget, or raise \
                 the limit on locked memory (containers: --ulimit memlock=-1)",
                bytes >> 20
            )
        })
    }

    /// Kernels read the pages where they are.
    fn is_required(&self) -> bool {
        true
    }

    fn unpin(&self, start: NonNull<u8>, _bytes: usize) {
        self.0.enter();
        // SAFETY: registered by `pin`; whoever unmaps it knows that no queue uses it any more.
        self.0.note("cuMemHostUnregister", unsafe { self.0.api.cuMemHostUnregister(start.as_ptr().cast()) });
    }
}
