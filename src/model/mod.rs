//! The model: its configuration, its weights, and where both come from.
//!
//! A leaf of the dependency tree: nothing here knows about devices, caches or decoding.

pub mod config;
pub(crate) mod fields;
mod generation;
pub mod hub;
pub mod loader;
pub mod rope;
mod rope_config;
pub mod synthetic;
mod tensors;
pub mod weights;

pub use config::{Arch, Config, Dtype, Rope, RopeScaling};
pub use rope::RopeTable;
pub use weights::{Layer, Linear, Matrix, Weights};

use std::path::{Path, PathBuf};

use crate::error::Result;

/// A configuration together with its weights.
pub struct Model {
    /// A short name for tables: the folder's last component or `synthetic:<shape>`.
    pub name: String,
    /// Shapes and constants.
    pub config: Config,
    /// All tensors.
    pub weights: Weights,
    /// Defaults that `generation_config.json` sets; all absent for synthetic models.
    pub generation: GenerationConfig,
    /// Whether the weights are random, so that quality figures mean nothing.
    pub synthetic: bool,
}

/// What `generation_config.json` may set. `None`: the file says nothing about it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Sample (true) or take the argmax (false).
    pub do_sample: Option<bool>,
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Keep the k most likely tokens.
    pub top_k: Option<usize>,
    /// Keep the smallest set of tokens whose probability reaches p.
    pub top_p: Option<f32>,
    /// Drop tokens below this share of the most likely token's probability.
    pub min_p: Option<f32>,
    /// Divide (positive) or multiply (negative) the logits of seen tokens by this.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end generation (wins over config.json's).
    pub eos_token_ids: Option<Vec<u32>>,
}

/// The folder of a model; `None` for `synthetic:SHAPE`, which has none. `org/name` is one of the Hugging Face cache.
///
/// # Errors
/// As [`hub::folder`].
pub fn folder(spec: &str) -> Result<Option<PathBuf>> {
    if spec.starts_with("synthetic:") { Ok(None) } else { hub::folder(spec).map(Some) }
}

/// The configuration of a model folder, `org/name` or `synthetic:SHAPE`, without its weights.
///
/// # Errors
/// [`crate::error::Error::Model`] with file and field; [`crate::error::Error::Usage`] for an unknown shape.
pub fn config_of(spec: &str) -> Result<Config> {
    match spec.strip_prefix("synthetic:") {
        Some(shape) => synthetic::config(shape),
        None => loader::config(&hub::folder(spec)?),
    }
}

impl Model {
    /// Loads a Hugging Face folder, also by its `org/name` in the local cache, or makes `synthetic:<shape>` with random
    /// weights.
    ///
    /// # Errors
    /// [`crate::Error::Model`] with file, field or tensor, and the fix.
    pub fn load(spec: &str) -> Result<Model> {
        match spec.strip_prefix("synthetic:") {
            Some(shape) => synthetic::model(shape),
            None => {
                let folder = hub::folder(spec)?;
                let mut model = loader::load(&folder)?;
                // A snapshot's own name is that of its revision.
                if folder != Path::new(spec) {
                    model.name = spec.to_string();
                }
                Ok(model)
            }
        }
    }
}
