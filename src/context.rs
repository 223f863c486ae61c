//! What every pass needs and nobody changes: a model on a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::rope::RopeTable;

/// Most tokens of a context: positions are u32 in selections, and byte counts of a page times this fit a u64.
pub const MAX_CONTEXT: usize = 1 << 28;

/// A model on a device.
pub struct Context {
    /// Where passes are computed.
    pub device: Device,
    /// Shapes and weights.
    pub model: Model,
    /// RoPE frequencies of the model.
    pub rope: RopeTable,
    /// Set from outside to stop prefill and decode; whoever sets it clears it before the next call.
    pub interrupt: Arc<AtomicBool>,
}

impl Context {
    /// A model on a device.
    pub fn new(model: Model, device: Device) -> Context {
        let rope = RopeTable::new(&model.config);
        Context { device, model, rope, interrupt: Arc::default() }
    }

    pub(crate) fn check_interrupt(&self) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.model.config.vocab_size;
        if tokens.is_empty() {
            return Err(Error::Usage("the prompt is empty: at least one token is needed".into()));
        }
        match tokens.iter().position(|&t| t as usize >= vocab) {
            Some(i) => {
                let id = tokens[i];
                Err(Error::Usage(format!("token {id} at place {i}: the vocabulary ends at {}", vocab - 1)))
            }
            None => Ok(()),
        }
    }

    pub(crate) fn check_context(&self, tokens: usize) -> Result<()> {
        check_context(tokens, self.model.config.max_context())
    }
}

/// Whether a context of `tokens` is supported; `max_context` is the model's own limit ([`crate::model::Config`]).
pub(crate) fn check_context(tokens: usize, max_context: Option<usize>) -> Result<()> {
    if tokens > MAX_CONTEXT {
        return Err(Error::Usage(format!("a context of {tokens} tokens: at most {MAX_CONTEXT} are supported")));
    }
    match max_context {
        Some(most) if tokens > most => Err(Error::Usage(format!(
            "a context of {tokens} tokens: this model's dynamic RoPE scaling is supported up to its \
             max_position_embeddings of {most}"
        ))),
        _ => Ok(()),
    }
}
