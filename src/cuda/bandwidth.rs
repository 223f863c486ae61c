//! The limit of decode on a GPU: how fast it reads its memory.

use crate::device::Device;
use crate::device::cuda::bindings::abi::{specache_read_params, specache_read_plan};
use crate::error::Result;

/// Bytes that are read: far more than any L2 (50 MB on an H100, 126 MB on a B200).
const MOST: u64 = 1 << 30;
const LEAST: u64 = 256 << 20;

/// Passes over them. The best counts, as other users of the GPU can only slow one down; the first also loads the kernel.
const PASSES: usize = 6;

/// CTAs of 256 threads, four loads of 16 bytes each: as many as an SM holds.
const CTAS_PER_SM: u32 = 8;

/// Memory is filled in parts of this size, each with a byte of its own: nothing is read faster because it is all the same.
const PART: u64 = 1 << 20;

/// Gigabytes (10^9) per second that a kernel which does nothing else reads from the memory of the device's GPU; `None` if
/// too little of it is left to be beyond its caches. Takes some milliseconds.
///
/// # Errors
/// [`crate::Error::OutOfMemory`], [`crate::Error::Device`].
pub(crate) fn read_gbps(device: &Device) -> Result<Option<f64>> {
    let gpu = device.gpu().expect("a GPU's bandwidth");
    let bytes = (device.device_memory().available().min(gpu.driver().free_memory()?) / 4).min(MOST) / PART * PART;
    if bytes < LEAST {
        return Ok(None);
    }
    let n_ctas = gpu.facts().gpu.n_sms * CTAS_PER_SM;
    let what = "a measurement of bandwidth";
    let mut grants = device.grant(bytes + 4 * u64::from(n_ctas), 0, what)?;
    let (from, parities) = (grants.device(bytes as usize, what)?, grants.device(4 * n_ctas as usize, what)?);
    for part in 0..bytes / PART {
        gpu.fill(from.address() + part * PART, (part * 37 + 11) as u8, PART as usize);
    }
    let params =
        specache_read_params { from: from.address(), parities: parities.address(), bytes, n_ctas, reserved: 0 };
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let took = gpu.timing().measure(gpu.queues(), || gpu.launch(specache_read_plan, &params))?;
        best = best.min(took.as_secs_f64());
    }
    Ok((best > 0.0).then(|| bytes as f64 / best / 1e9))
}
