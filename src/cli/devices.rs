//! `devices`: what this machine could compute on.

use specache::device::choice::gpus;
use specache::device::cuda::probe::Gpu;
use specache::device::{Device, DeviceOptions};
use specache::error::Result;

use super::output::print;

/// One line on GPUs for reports that are not about them.
pub fn cuda_line() -> String {
    match gpus() {
        Ok(gpus) => format!("{} is not used: this version computes on the CPU only", gpus[0]),
        Err(why) => format!("no CUDA device: {why}"),
    }
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
            lines.push("GPUs are found but not used: this version computes on the CPU only".into());
        }
        Err(why) => lines.push(format!("no CUDA device: {why}")),
    }
    print(&(lines.join("\n") + "\n"))
}
