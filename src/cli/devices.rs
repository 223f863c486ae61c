//! `devices`: what this machine could compute on.

use std::path::PathBuf;

use specache::device::cuda::probe::{Gpu, NoGpu, probe};
use specache::device::{Device, DeviceOptions};
use specache::error::Result;

use super::output::print;

/// The GPUs, or why there are none. `SPECACHE_LIBCUDA` names another driver library than the usual one.
///
/// # Errors
/// As [`probe`].
pub fn gpus() -> Result<Vec<Gpu>, NoGpu> {
    probe(std::env::var_os("SPECACHE_LIBCUDA").map(PathBuf::from).as_deref())
}

/// Runs the command.
///
/// # Errors
/// A closed stdout.
pub fn run() -> Result<()> {
    let device = Device::cpu(&DeviceOptions::default())?;
    let mut lines = vec![format!("cpu: {}", device.describe()), device.copy_engine().gather.describe()];
    match gpus() {
        Ok(gpus) => {
            lines.extend(gpus.iter().map(Gpu::to_string));
        }
        Err(why) => lines.push(format!("no CUDA device: {why}")),
    }
    print(&(lines.join("\n") + "\n"))
}
