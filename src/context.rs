//! What every pass needs and nobody changes: a model on a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::rope::RopeTable;

/// A model on a device.
pub struct Context {
    /// Where passes are computed.
    pub device: Device,
    /// Shapes and weights.
    pub model: Model,
    /// RoPE frequencies of the model.
    pub rope: RopeTable,
    /// Set from outside to stop prefill and decode.
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
        // Positions are u32 in selections; the attention buffers of a step grow with the context.
        const MOST: usize = 1 << 28;
        if tokens > MOST {
            return Err(Error::Usage(format!("a context of {tokens} tokens: at most {MOST} are supported")));
        }
        match self.model.config.max_context() {
            Some(most) if tokens > most => Err(Error::Usage(format!(
                "a context of {tokens} tokens: this model's dynamic RoPE scaling is supported up to its \
                 max_position_embeddings of {most}"
            ))),
            _ => Ok(()),
        }
    }
}
