//! SpeCache (ICML 2025, arXiv 2503.16163): every 16-bit KV pair in host memory, a low-bit copy on the device, and a
//! speculative token that chooses, one step ahead, which 16-bit pairs come back.
//!
//! # The layers, from the top
//!
//! | module | what it knows |
//! |---|---|
//! | [`capi`] | C: `include/specache.h` |
//! | [`engine`], [`session`], [`teacher`] | sequences, batches, budgets: what everybody uses |
//! | [`eval`] | quality in figures: perplexity, divergence, needles, coverage, LongBench |
//! | [`prefill`], [`decode`] | the three algorithms |
//! | [`kv`] | where pairs are, and when they move |
//! | [`ops`] | the fused operations: shapes checked, one dispatch each |
//! | [`device`] | metered memory, streams, values in flight |
//! | [`cpu`] | the kernels |
//! | [`model`], [`mod@reference`], [`sampler`], [`tokenizer`], [`chat`], [`sim`] | leaves |
//!
//! # The life of a token
//!
//! [`Engine::prefill`] runs a prompt through the layers and gives the logits of `T_1`. [`Engine::decode`] takes a token and
//! gives the logits of the next: embed; per layer norm, q, k, v and RoPE, append, wait for the prefetch that the step
//! before began, attend over low-bit pages, prefetched pairs and residual, select for the step after and begin its
//! prefetch, output projection, MLP; then logits. [`decode`] tells it in one place.
//!
//! ```no_run
//! use specache::{Buffers, Engine, KvOptions, Next, Prompt, sampler::argmax};
//!
//! fn main() -> specache::Result<()> {
//!     let engine = Engine::load("tests/fixtures/recall", &Default::default())?;
//!     let mut session = engine.session(KvOptions::default(), 1024)?;
//!     let mut buffers = Buffers::default();
//!     let prompt = Prompt { session: &mut session, tokens: &[620, 295, 623] };
//!     let mut token = argmax(&engine.prefill(&mut [prompt], &mut buffers)?.remove(0)?);
//!     for _ in 0..16 {
//!         engine.decode(&mut [Next { session: &mut session, token }], &mut buffers)?;
//!         token = buffers.argmax(0)?;
//!     }
//!     Ok(())
//! }
//! ```

pub mod capi;
mod cgroup;
pub mod chat;
pub mod context;
pub mod cpu;
mod cuda;
pub mod decode;
pub mod device;
pub mod engine;
pub mod error;
pub mod eval;
pub mod gather;
pub mod kv;
pub mod model;
pub mod notice;
pub mod ops;
pub mod prefill;
pub mod reference;
pub mod sampler;
pub mod session;
pub mod sim;
pub mod teacher;
pub mod tokenizer;

pub use engine::Engine;
pub use error::{Error, Result};
pub use kv::{KvMode, KvOptions};
pub use session::{Buffers, Next, Prompt, Session};
