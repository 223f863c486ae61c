//! How a session keeps its K and V.

use crate::error::{Error, Result};
use crate::model::{Config, Dtype};

/// Tokens of a KV page, always. Every group size divides it.
pub const PAGE: usize = 64;

/// Where K and V live and how a decode step reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvMode {
    /// All pairs at 16 bits on the device: the quality reference.
    Full,
    /// Low-bit pages and a 16-bit residual on the device, nothing on the host.
    Kivi,
    /// All pairs on the host; every layer's pages come back whole at every step.
    Offload,
    /// Low-bit on the device, 16-bit on the host, top-k chosen by the real token and fetched while it waits.
    Fetch,
    /// Low-bit on the device, 16-bit on the host, top-k chosen one step ahead by the speculative token.
    SpeCache,
}

impl KvMode {
    /// All modes, in the order of the tables.
    pub const ALL: [KvMode; 5] = [KvMode::Full, KvMode::Kivi, KvMode::Offload, KvMode::Fetch, KvMode::SpeCache];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KvMode::Full => "full",
            KvMode::Kivi => "kivi",
            KvMode::Offload => "offload",
            KvMode::Fetch => "fetch",
            KvMode::SpeCache => "specache",
        }
    }

    /// Has low-bit pages on the device.
    pub fn low_bit(self) -> bool {
        matches!(self, KvMode::Kivi | KvMode::Fetch | KvMode::SpeCache)
    }

    /// Has a 16-bit copy on the host.
    pub fn on_host(self) -> bool {
        matches!(self, KvMode::Offload | KvMode::Fetch | KvMode::SpeCache)
    }

    /// Puts back 16-bit pairs that it has chosen.
    pub fn fetches(self) -> bool {
        matches!(self, KvMode::Fetch | KvMode::SpeCache)
    }
}

/// KV options of a session. Defaults: `specache`, 2 bits, g = 64, R = 64, k = 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvOptions {
    /// Which of the five ways.
    pub mode: KvMode,
    /// Bits of a low-bit code: 1, 2 or 4.
    pub bits: usize,
    /// Values that share a zero and a scale, g: 32 or 64.
    pub group_size: usize,
    /// Tokens that stay at 16 bits on the device, R: at least 32.
    pub residual_len: usize,
    /// 16-bit pairs prefetched per KV head, k.
    pub top_k: usize,
    /// Number type of K and V; `None`: the model's ([`Config::kv_dtype`]). F32 with `full` only.
    pub dtype: Option<Dtype>,
}

impl Default for KvOptions {
    fn default() -> Self {
        KvOptions { mode: KvMode::SpeCache, bits: 2, group_size: 64, residual_len: 64, top_k: 64, dtype: None }
    }
}

impl KvOptions {
    /// Checks the options against each other and against the model.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the option and its valid values.
    pub fn validate(&self, config: &Config) -> Result<()> {
        let usage = |what: String| Err(Error::Usage(what));
        if !matches!(self.bits, 1 | 2 | 4) {
            return usage(format!("--kv-bits {}: must be 1, 2 or 4", self.bits));
        }
        if !matches!(self.group_size, 32 | 64) {
            return usage(format!("--kv-group {}: must be 32 or 64", self.group_size));
        }
        if self.residual_len < 32 {
            return usage(format!("--kv-residual {}: must be at least 32", self.residual_len));
        }
        // Positions are u32, and the bytes of this many pairs fit a u64 in every model.
        const MOST_PAIRS: usize = 1 << 28;
        if self.top_k > MOST_PAIRS {
            return usage(format!("--kv-top-k {}: at most {MOST_PAIRS} are supported", self.top_k));
        }
        if self.mode.low_bit() && !config.head_dim.is_multiple_of(self.group_size) {
            let valid: Vec<_> =
                [32, 64].iter().filter(|&&g| config.head_dim.is_multiple_of(g)).map(|g| g.to_string()).collect();
            let fix = match valid.is_empty() {
                true => "no group size fits it; use --kv full or --kv offload".to_string(),
                false => format!("use --kv-group {}", valid.join(" or ")),
            };
            return usage(format!(
                "--kv-group {} does not divide this model's head_dim of {}: {fix}",
                self.group_size, config.head_dim
            ));
        }
        if self.dtype == Some(Dtype::F32) && self.mode != KvMode::Full {
            return usage(format!("--kv-dtype fp32 works with --kv full only, not with --kv {}", self.mode.name()));
        }
        Ok(())
    }

    /// The number type of K and V for this model.
    pub fn kv_dtype(&self, config: &Config) -> Dtype {
        self.dtype.unwrap_or(config.kv_dtype())
    }

    /// Rows of a decode step: the speculative token is the second.
    pub fn rows(&self) -> usize {
        if self.mode == KvMode::SpeCache { 2 } else { 1 }
    }
}
