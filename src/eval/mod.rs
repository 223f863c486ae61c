//! Quality in figures: what a KV mode costs in answers, not in bytes (docs/evaluation.md).
//!
//! | module | question |
//! |---|---|
//! | [`perplexity`] | how well is a text predicted? |
//! | [`divergence`] | how far are the predictions from those of `full`? |
//! | [`coverage`] | how few keys hold the attention, and were the right ones fetched? |
//! | [`needle`] | is a planted fact found again? |
//! | [`longbench`], [`metrics`] | the tasks of LongBench, and how their answers are scored |
//!
//! [`windows`] cuts a text into runs, [`lockstep`] feeds one run to several KV options at once, [`answer`] continues a
//! prompt. [`journal`] keeps finished items in a file that a later run continues, [`picture`] draws.

pub mod answer;
pub mod coverage;
pub mod divergence;
pub mod journal;
pub mod lockstep;
pub mod longbench;
pub mod metrics;
pub mod needle;
pub mod perplexity;
pub mod picture;
pub mod windows;

use crate::kv::{KvMode, KvOptions};

/// The options that matter of a mode, as tables name them: `specache 1-bit R=64 k=16`.
pub fn name(kv: &KvOptions) -> String {
    let mode = kv.mode.name();
    match kv.mode {
        KvMode::Full | KvMode::Offload => mode.into(),
        KvMode::Kivi => format!("{mode} {}-bit R={}", kv.bits, kv.residual_len),
        KvMode::Fetch | KvMode::SpeCache => {
            format!("{mode} {}-bit R={} k={}", kv.bits, kv.residual_len, kv.top_k)
        }
    }
}
