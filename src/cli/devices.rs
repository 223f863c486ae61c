//! `devices`: what this machine could compute on.

use specache::device::choice::gpus;
use specache::device::cuda::probe::Gpu;
use specache::device::{Device, DeviceOptions};
use specache::error::Result;

use super::output::print;

/// Runs the command.
///
/// # Errors
/// A closed stdout.
pub fn run() -> Result<()> {
    let device = Device::cpu(&DeviceOptions::default())?;
    let mut lines = vec![format!("cpu: {}", device.describe()), device.copy_engine().gather.describe()];
    match gpus() {
        Ok(gpus) => lines.extend(gpus.iter().map(Gpu::to_string)),
        Err(why) => lines.push(format!("no CUDA device: {why}")),
    }
    print(&(lines.join("\n") + "\n"))
}
