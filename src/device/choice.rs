//! Where to compute, as a user says it: `auto`, `cpu`, `cuda` or `cuda:N`.

use std::path::PathBuf;
use std::str::FromStr;

use super::cuda::probe::{Gpu, NoGpu, probe};
use crate::error::{Error, Result};

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best that can be used.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, by the driver's number for it.
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

impl DeviceChoice {
    /// Whether it can be had.
    ///
    /// # Errors
    /// [`Error::Usage`] with the reason, for a GPU: this version computes on the CPU only.
    pub fn check(self) -> Result<()> {
        let DeviceChoice::Cuda(index) = self else { return Ok(()) };
        let why = match gpus() {
            Err(why) => why.to_string(),
            Ok(gpus) if index >= gpus.len() => format!("there are cuda:0 to cuda:{}", gpus.len() - 1),
            Ok(gpus) => {
                format!("{} is there, but this version computes on the CPU only; leave --device out", gpus[index])
            }
        };
        Err(Error::Usage(format!("--device cuda:{index}: {why}")))
    }
}

/// The GPUs, or why there are none. `SPECACHE_LIBCUDA` names another driver library than the usual one.
///
/// # Errors
/// As [`probe`].
pub fn gpus() -> Result<Vec<Gpu>, NoGpu> {
    probe(std::env::var_os("SPECACHE_LIBCUDA").map(PathBuf::from).as_deref())
}
