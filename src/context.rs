//! What every pass needs and nobody changes: a model on a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cuda::GpuModel;
use crate::device::Device;
use crate::device::arena::ArenaOptions;
use crate::device::fault::Fault;
use crate::error::{Error, Result};
use crate::kv::slab::{Slab, SlabOptions};
use crate::kv::{KvOptions, KvShape};
use crate::model::rope::RopeTable;
use crate::model::{Config, Model};

/// Most tokens of a context: positions are u32 in selections, and byte counts of a page times this fit a u64.
pub const MAX_CONTEXT: usize = 1 << 28;

/// Most sequences of a batch: those that the plans of kernels take (`MOST_SEQS` of csrc/plan/plan.h).
pub const MAX_BATCH: usize = 1 << 20;

/// A model on a device.
pub struct Context {
    /// Where passes are computed.
    pub device: Device,
    /// Shapes and weights.
    pub model: Model,
    /// The model on the device's GPU, if it has one.
    pub(crate) gpu: Option<GpuModel>,
    /// RoPE frequencies of the model.
    pub rope: RopeTable,
    /// The 16-bit pages of all sequences on the host.
    pub slab: Slab,
    /// Set from outside to stop prefill and decode; whoever sets it clears it before the next call.
    pub interrupt: Arc<AtomicBool>,
}

impl Context {
    /// A model on a device.
    ///
    /// # Errors
    /// On a GPU: [`Error::Usage`] for a shape that no kernel serves, [`Error::OutOfMemory`], [`Error::Device`].
    pub fn new(model: Model, device: Device) -> Result<Context> {
        let rope = RopeTable::new(&model.config);
        let slab = host_slab(&device, &model.config);
        let gpu = device.gpu().map(|_| GpuModel::new(&device, &model, &rope)).transpose()?;
        Ok(Context { device, model, gpu, rope, slab, interrupt: Arc::default() })
    }

    pub(crate) fn check_interrupt(&self) -> Result<()> {
        if self.device.options().faults.as_ref().is_some_and(|faults| faults.strikes(Fault::Interrupt)) {
            self.interrupt.store(true, Ordering::Relaxed);
        }
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

/// The slab of a model's host pages: one page size, as K and V on the host are of 16 bits whatever their type. Nothing is
/// mapped before a sequence asks for pages.
fn host_slab(device: &Device, config: &Config) -> Slab {
    let page_bytes = KvShape::new(config, &KvOptions::default()).wide_page_bytes();
    let options = device.options();
    let nodes = device.copy_engine().gather.topology().nodes().iter().map(|node| node.id.0 as usize).collect();
    Slab::new(SlabOptions {
        what: "the 16-bit KV copy",
        // Small models map little; a large sequence maps what it needs at once.
        arena_bytes: 64 << 20,
        // Half the cores at most: whoever waits for pages computes on the others.
        touch_threads: (device.threads() / 2).clamp(1, 8),
        arena: ArenaOptions { pin: options.pin.clone(), poison: options.poison, ..ArenaOptions::default() },
        nodes,
        faults: options.faults.clone(),
        ..SlabOptions::new(page_bytes, device.host_memory())
    })
    .expect("the limits of a config keep a page below 1 GiB")
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
