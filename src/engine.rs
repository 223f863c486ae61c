//! What everybody uses: an [`Engine`] (model and device), [`Session`]s (one sequence each), steps over batches of them.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::context::{Context, check_context};
use crate::cuda;
pub use crate::cuda::GpuTarget;
use crate::device::{Device, DeviceChoice, DeviceOptions};
use crate::error::Result;
use crate::kv::cache::CacheBytes;
use crate::kv::slab::SlabStats;
use crate::kv::{KvOptions, KvShape};
use crate::model::{Config, Model};
use crate::session::{Buffers, Next, Prompt, Session};
use crate::{decode, prefill};

/// A model on a device. Shared by any number of sessions and threads.
pub struct Engine {
    context: Context,
}

impl Engine {
    /// Loads a model folder, or makes `synthetic:<shape>`, for a device.
    ///
    /// # Errors
    /// [`crate::Error::Model`] for a folder that cannot be used, [`crate::Error::Usage`] for device options that cannot
    /// be.
    pub fn load(spec: &str, options: &DeviceOptions) -> Result<Engine> {
        Engine::load_with(spec, options, |_| {})
    }

    /// The same; `taken` is shown each device that is taken, before the model is loaded, which may take a while or fail: one
    /// that was left open may be a GPU, and then the CPU, if the GPU has no kernels for the model.
    pub(crate) fn load_with(spec: &str, options: &DeviceOptions, taken: impl Fn(&Device)) -> Result<Engine> {
        let mut device = Device::open(options)?;
        taken(&device);
        let model = device.run(|| Model::load(spec))?;
        if options.choice == DeviceChoice::Auto
            && device.gpu().is_some()
            && let Err(why) = cuda::check_shape(&model)
        {
            device = Device::cpu_because(options, why.to_string())?;
            taken(&device);
        }
        Engine::new(model, device)
    }

    /// An engine for a model that is in memory already.
    ///
    /// # Errors
    /// On a GPU: [`crate::Error::Usage`] for a shape that no kernel serves, [`crate::Error::OutOfMemory`],
    /// [`crate::Error::Device`].
    pub fn new(model: Model, device: Device) -> Result<Engine> {
        Ok(Engine { context: Context::new(model, device)? })
    }

    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.context.model
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.context.device
    }

    /// Setting this flag, from any thread or a signal handler, makes prefill and decode stop before the next layer (a
    /// prefill also between two chunks of one) with [`crate::Error::Interrupted`]. Sessions are then as before the
    /// call: made again it has the same result, and so has any other call. On a GPU decode looks at the flag before a
    /// pass. The flag stays set until whoever set it clears it.
    pub fn interrupt_flag(&self) -> Arc<AtomicBool> {
        self.context.interrupt.clone()
    }

    /// An empty sequence with room for `max_tokens` tokens; its memory is set aside now, so that decoding needs no more.
    /// A prefill that goes beyond makes more room; decoding does not.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] for options that do not fit the model, [`crate::Error::OutOfMemory`] for a cache that does not fit a
    /// budget; nothing is allocated then.
    pub fn session(&self, kv: KvOptions, max_tokens: usize) -> Result<Session> {
        Session::new(&self.context, kv, max_tokens)
    }

    /// What a session of these options and tokens takes, without making it.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] for options or a context that do not fit the model.
    pub fn plan(&self, kv: &KvOptions, max_tokens: usize) -> Result<CacheBytes> {
        plan(&self.context.model.config, kv, max_tokens)
    }

    /// Whether [`Engine::decode`] takes this token of this session: a batch is taken whole or not at all.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self, next: &Next) -> Result<()> {
        decode::check(&self.context, next)
    }

    /// The 16-bit pages of all sessions on the host, in figures.
    pub fn host_pages(&self) -> SlabStats {
        self.context.slab.stats()
    }

    /// See [`prefill::prefill`]. `buffers` keeps memory between calls; its contents mean nothing.
    ///
    /// # Errors
    /// As there.
    pub fn prefill(&self, prompts: &mut [Prompt], buffers: &mut Buffers) -> Result<Vec<Result<Vec<f32>>>> {
        self.prefill_telling(prompts, buffers, &mut |_| {})
    }

    /// The same, for somebody who waits: `tell` hears after each chunk of a layer which share of the work is done, in
    /// ascending order up to 1. On a GPU, which is told everything at once, it hears nothing.
    ///
    /// # Errors
    /// As [`Engine::prefill`].
    pub fn prefill_telling(
        &self,
        prompts: &mut [Prompt],
        buffers: &mut Buffers,
        tell: &mut (dyn FnMut(f64) + Send),
    ) -> Result<Vec<Result<Vec<f32>>>> {
        self.context.device.run(|| prefill::prefill(&self.context, prompts, buffers, tell))
    }

    /// See [`decode::decode`]. The logits are in `buffers` afterwards: [`Buffers::logits`].
    ///
    /// # Errors
    /// As there.
    pub fn decode(&self, batch: &mut [Next], buffers: &mut Buffers) -> Result<()> {
        self.context.device.run(|| decode::decode(&self.context, batch, buffers))
    }
}

/// What `batch` sequences take on a GPU beside their caches and the weights ([`plan_on_gpu`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuBytes {
    /// Of each sequence: lists of pages, and which positions are not read low-bit.
    pub tables: u64,
    /// What decode steps of all of them work in, cuBLASLt included.
    pub workspace: u64,
    /// While one prompt of all tokens is prefilled: its rows, and those of a chunk that is computed.
    pub prefill: u64,
}

/// What prefills and decode steps on a GPU need besides, for a model that need not be loaded. `number_bytes`: of a weight.
pub fn plan_on_gpu(
    config: &Config,
    kv: &KvOptions,
    max_tokens: usize,
    batch: usize,
    target: GpuTarget,
    number_bytes: u64,
) -> GpuBytes {
    let has_cublas = number_bytes == 2;
    let library = if has_cublas { target.cublas_bytes() } else { 0 };
    GpuBytes {
        tables: CacheBytes::gpu_tables(&KvShape::new(config, kv), kv, max_tokens),
        workspace: cuda::workspace_bytes(target, config, kv, max_tokens, batch, has_cublas) + library,
        prefill: cuda::prefill_bytes(target, config, max_tokens, has_cublas),
    }
}

/// What a session of these options and tokens takes of a model that need not be loaded ([`crate::model::config_of`]).
///
/// # Errors
/// As [`Engine::plan`].
pub fn plan(config: &Config, kv: &KvOptions, max_tokens: usize) -> Result<CacheBytes> {
    kv.validate(config)?;
    check_context(max_tokens, config.max_context())?;
    Ok(CacheBytes::plan(&KvShape::new(config, kv), kv, max_tokens))
}
