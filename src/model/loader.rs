//! Hugging Face model folders: `config.json`, `generation_config.json` and safetensors become a [`Model`].

use std::path::Path;

use super::fields::read_text;
use super::tensors::Tensors;
use super::{Config, GenerationConfig, Layer, Linear, Model, Weights};
use crate::error::{Error, Result};

/// Loads a folder. Matrices stay in the mapped files. End-of-text tokens of `generation_config.json` replace those of
/// `config.json`.
///
/// # Errors
/// [`Error::Model`] naming the file, the field or tensor, and the fix; [`Error::Io`] where the system refuses to read.
pub fn load(dir: &Path) -> Result<Model> {
    check_folder(dir)?;
    let mut config = read_config(dir)?;
    let generation = GenerationConfig::load(dir)?;
    if let Some(ids) = &generation.eos_token_ids {
        config.eos_token_ids = ids.clone();
    }
    let weights = weights(&Tensors::open(dir)?, &config)?;
    Ok(Model { name: name(dir), config, weights, generation, synthetic: false })
}

/// The configuration of a folder, without its weights.
///
/// # Errors
/// As [`load`], for `config.json` alone.
pub fn config(dir: &Path) -> Result<Config> {
    check_folder(dir)?;
    read_config(dir)
}

fn check_folder(dir: &Path) -> Result<()> {
    match std::fs::metadata(dir) {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => {
            let fix = "give the model's folder, which holds config.json and model.safetensors";
            Err(Error::model(dir, format!("is a file, not a folder; {fix}")))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::model(dir, "there is no such folder; give a Hugging Face model folder or synthetic:<shape>"))
        }
        Err(e) => Err(Error::io(dir, e)),
    }
}

fn read_config(dir: &Path) -> Result<Config> {
    let file = dir.join("config.json");
    match read_text(&file)? {
        Some(json) => Config::parse(&file, &json),
        None => Err(Error::model(file, "there is no such file; a Hugging Face model folder has one")),
    }
}

/// The folder's own name, also for `.` and the like.
fn name(dir: &Path) -> String {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy().into_owned()
}

fn weights(tensors: &Tensors, config: &Config) -> Result<Weights> {
    let embed = tensors.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)?;
    let lm_head = match config.tie_word_embeddings {
        true => embed.clone(),
        false => tensors.matrix("lm_head.weight", config.vocab_size, config.hidden_size)?,
    };
    Ok(Weights {
        embed,
        layers: (0..config.n_layers).map(|i| layer(tensors, config, i)).collect::<Result<_>>()?,
        final_norm: tensors.vector("model.norm.weight", config.hidden_size)?,
        lm_head: Linear { weight: lm_head, bias: None },
    })
}

fn layer(tensors: &Tensors, config: &Config, i: usize) -> Result<Layer> {
    let (hidden, inter, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q_rows, kv_rows) = (config.n_heads * head_dim, config.n_kv_heads * head_dim);
    let norm = |name: &str, len| tensors.vector(&format!("model.layers.{i}.{name}.weight"), len);
    let head_norm = |name: &str| config.qk_norm.then(|| norm(name, head_dim)).transpose();
    let linear = |name: &str, rows, cols, bias| linear(tensors, &format!("model.layers.{i}.{name}"), rows, cols, bias);
    Ok(Layer {
        input_norm: norm("input_layernorm", hidden)?,
        q: linear("self_attn.q_proj", q_rows, hidden, config.qkv_bias)?,
        k: linear("self_attn.k_proj", kv_rows, hidden, config.qkv_bias)?,
        v: linear("self_attn.v_proj", kv_rows, hidden, config.qkv_bias)?,
        o: linear("self_attn.o_proj", hidden, q_rows, config.o_bias)?,
        q_norm: head_norm("self_attn.q_norm")?,
        k_norm: head_norm("self_attn.k_norm")?,
        post_norm: norm("post_attention_layernorm", hidden)?,
        gate: linear("mlp.gate_proj", inter, hidden, config.mlp_bias)?,
        up: linear("mlp.up_proj", inter, hidden, config.mlp_bias)?,
        down: linear("mlp.down_proj", hidden, inter, config.mlp_bias)?,
    })
}

fn linear(tensors: &Tensors, name: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear> {
    Ok(Linear {
        weight: tensors.matrix(&format!("{name}.weight"), rows, cols)?,
        bias: bias.then(|| tensors.vector(&format!("{name}.bias"), rows)).transpose()?,
    })
}
