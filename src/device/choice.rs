//! Where to compute, as a user says it: `auto`, `cpu`, `cuda` or `cuda:N`.

use std::path::PathBuf;
use std::str::FromStr;

use super::cuda::probe::{Gpu, NoGpu, probe};

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if one can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// This GPU, by the driver's number for it, and no other device.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(DeviceChoice::Auto),
            ("cpu", _) => Ok(DeviceChoice::Cpu),
            ("cuda", _) => Ok(DeviceChoice::Cuda(0)),
            (_, Some(Ok(index))) => Ok(DeviceChoice::Cuda(index)),
            _ => Err("must be auto, cpu, cuda or cuda:N".into()),
        }
    }
}

/// The GPUs, or why there are none. `SPECACHE_LIBCUDA` names another driver library than the usual one.
///
/// # Errors
/// As [`probe`].
pub fn gpus() -> Result<Vec<Gpu>, NoGpu> {
    probe(std::env::var_os("SPECACHE_LIBCUDA").map(PathBuf::from).as_deref())
}
