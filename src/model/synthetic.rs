//! Random weights in the shapes of published models, for benchmarks: no download, true sizes, meaningless text.
//!
//! Every tensor can be reproduced alone, in any order and in any language (`tools/synthetic_weights.py` does it in
//! numpy): element `i` of the row-major matrix `name` is
//!
//! ```text
//! hash  = splitmix64_finaliser(fnv1a64(name) + (i / 4 + 1) * 0x9E3779B97F4A7C15)      (mod 2^64)
//! word  = bits 16 * (i % 4) .. 16 * (i % 4) + 16 of hash, as a signed 16-bit integer
//! value = bf16(f32(word) * (f32(a) / 32768))                                          in [-a, a]
//! ```
//!
//! with `a = sqrt(3 / cols)` for projections, so that a unit-variance input gives a unit-variance output, and `a = 1`
//! for the embedding. Norm weights are 1. The configs are those of the published models, except that `dtype` names the
//! bf16 that the weights have here.

use std::path::Path;

use rayon::prelude::*;

use super::weights::Matrix;
use super::{Config, Dtype, GenerationConfig, Layer, Linear, Model, Weights};
use crate::device::map::Bytes;
use crate::device::ram;
use crate::error::{Error, Result};

/// Name and `config.json` of each shape.
const SHAPES: [(&str, &str); 7] = [
    (
        "llama-3-8b",
        r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_theta": 500000.0, "dtype": "bfloat16",
            "bos_token_id": 128000, "eos_token_id": 128001}"#,
    ),
    (
        "llama-3.1-8b",
        r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "rope_theta": 500000.0, "dtype": "bfloat16",
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192},
            "bos_token_id": 128000, "eos_token_id": 128001}"#,
    ),
    (
        "llama-3.2-1b",
        r#"{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0, "dtype": "bfloat16",
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192},
            "tie_word_embeddings": true, "bos_token_id": 128000, "eos_token_id": 128001}"#,
    ),
    (
        "llama-2-7b",
        r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}"#,
    ),
    (
        "mistral-7b-v0.2",
        r#"{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": null, "dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2}"#,
    ),
    (
        "tinyllama-1.1b",
        r#"{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
            "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048, "rope_theta": 10000.0, "dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2}"#,
    ),
    // Four heads of 64 are wider than the hidden size: whoever mixes the two up fails here first.
    (
        "tiny",
        r#"{"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "dtype": "bfloat16",
            "bos_token_id": 0, "eos_token_id": 1}"#,
    ),
];

/// The names after `synthetic:`.
pub fn shapes() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|(name, _)| *name)
}

/// The configuration of a shape.
///
/// # Errors
/// [`Error::Usage`] listing the valid shapes.
pub fn config(shape: &str) -> Result<Config> {
    let Some((_, json)) = SHAPES.iter().find(|(name, _)| *name == shape) else {
        let valid = shapes().collect::<Vec<_>>().join(", ");
        return Err(Error::Usage(format!("synthetic:{shape}: there is no such shape; valid are {valid}")));
    };
    Config::parse(Path::new(&format!("synthetic:{shape}")), json)
}

/// Makes a model with random weights.
///
/// # Errors
/// [`Error::Usage`] for an unknown shape; [`Error::OutOfMemory`], before anything is allocated, where it does not fit.
pub fn model(shape: &str) -> Result<Model> {
    let config = config(shape)?;
    check_memory(shape, &config, ram::available())?;
    Ok(Model {
        name: format!("synthetic:{shape}"),
        weights: weights(&config)?,
        config,
        generation: GenerationConfig::default(),
        synthetic: true,
    })
}

fn check_memory(shape: &str, config: &Config, available: Option<u64>) -> Result<()> {
    let needed = matrix_bytes(config);
    match available {
        Some(available) if available < needed => Err(Error::OutOfMemory {
            memory: "host",
            what: format!("the weights of synthetic:{shape}"),
            needed,
            available,
            fix: "free memory or choose a smaller shape".into(),
        }),
        _ => Ok(()),
    }
}

/// Bytes of all bf16 matrices; a tied LM head counts once.
fn matrix_bytes(c: &Config) -> u64 {
    let heads = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim;
    let per_layer = c.hidden_size as u64 * (heads + 3 * c.intermediate_size) as u64;
    let vocab_matrices = if c.tie_word_embeddings { 1 } else { 2 };
    let numbers = c.n_layers as u64 * per_layer + vocab_matrices * (c.vocab_size as u64 * c.hidden_size as u64);
    numbers * Dtype::Bf16.bytes() as u64
}

fn weights(c: &Config) -> Result<Weights> {
    let embed = random("model.embed_tokens.weight", c.vocab_size, c.hidden_size, 1.0)?;
    let lm_head = match c.tie_word_embeddings {
        true => Linear { weight: embed.clone(), bias: None },
        false => projection("lm_head.weight", c.vocab_size, c.hidden_size)?,
    };
    Ok(Weights {
        embed,
        layers: (0..c.n_layers).map(|i| layer(c, i)).collect::<Result<_>>()?,
        final_norm: vec![1.0; c.hidden_size],
        lm_head,
    })
}

fn layer(c: &Config, i: usize) -> Result<Layer> {
    let (hidden, inter) = (c.hidden_size, c.intermediate_size);
    let (q_rows, kv_rows) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
    let linear = |name: &str, rows, cols| projection(&format!("model.layers.{i}.{name}.weight"), rows, cols);
    Ok(Layer {
        input_norm: vec![1.0; hidden],
        q: linear("self_attn.q_proj", q_rows, hidden)?,
        k: linear("self_attn.k_proj", kv_rows, hidden)?,
        v: linear("self_attn.v_proj", kv_rows, hidden)?,
        o: linear("self_attn.o_proj", hidden, q_rows)?,
        q_norm: None,
        k_norm: None,
        post_norm: vec![1.0; hidden],
        gate: linear("mlp.gate_proj", inter, hidden)?,
        up: linear("mlp.up_proj", inter, hidden)?,
        down: linear("mlp.down_proj", hidden, inter)?,
    })
}

fn projection(name: &str, rows: usize, cols: usize) -> Result<Linear> {
    let amplitude = (3.0 / cols as f64).sqrt() as f32;
    Ok(Linear { weight: random(name, rows, cols, amplitude)?, bias: None })
}

/// A matrix of uniform numbers in `[-amplitude, amplitude]`, see the head of this file.
fn random(name: &str, rows: usize, cols: usize, amplitude: f32) -> Result<Matrix> {
    let seed = fnv1a64(name.as_bytes());
    let scale = amplitude / 32768.0;
    let bytes = Bytes::filled(rows * cols * 2, |out| fill(seed, scale, out))?;
    Ok(Matrix::new(bytes, Dtype::Bf16, rows, cols))
}

/// Fills `out` with bf16 numbers, four from each hash.
fn fill(seed: u64, scale: f32, out: &mut [u8]) {
    // 1 MiB: enough work to hide what a rayon task costs, small enough to balance.
    const CHUNK_BYTES: usize = 1 << 20;
    out.par_chunks_mut(CHUNK_BYTES).enumerate().for_each(|(chunk, out)| {
        let first = (chunk * (CHUNK_BYTES / 8)) as u64;
        for (i, four) in (first..).zip(out.chunks_mut(8)) {
            four.copy_from_slice(&four_numbers(seed, i, scale)[..four.len()]);
        }
    });
}

/// Numbers `4 * i .. 4 * i + 4` of a tensor.
#[inline]
fn four_numbers(seed: u64, i: u64, scale: f32) -> [u8; 8] {
    let hash = splitmix64(seed.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
    let mut packed = 0;
    for shift in [0, 16, 32, 48] {
        let word = (hash >> shift) as i16;
        packed |= u64::from(bf16_bits(f32::from(word) * scale)) << shift;
    }
    packed.to_le_bytes()
}

/// Rounds a finite f32 to bf16, ties to even.
#[inline]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16
}

/// The finaliser of splitmix64.
#[inline]
fn splitmix64(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_checked_before_anything_is_allocated() {
        for shape in shapes() {
            let config = config(shape).unwrap();
            let needed = matrix_bytes(&config);
            check_memory(shape, &config, Some(needed)).unwrap();
            check_memory(shape, &config, None).unwrap();
            let error = check_memory(shape, &config, Some(needed - 1)).unwrap_err();
            assert_eq!(error.exit_code(), 4);
            assert!(error.to_string().contains(&format!("synthetic:{shape} needs {needed} bytes")), "{error}");
        }
        let published_parameters = 8_030_261_248;
        let in_norms = (2 * 32 + 1) * 4096;
        assert_eq!(matrix_bytes(&config("llama-3-8b").unwrap()), 2 * (published_parameters - in_norms));
    }

    #[test]
    fn the_bytes_made_are_the_bytes_planned() {
        let model = model("tiny").unwrap();
        assert_eq!(model.weights.bytes(false), matrix_bytes(&model.config));
    }

    #[test]
    fn a_part_of_four_numbers_at_the_end() {
        let (mut long, mut short) = ([0; 24], [0; 18]);
        fill(7, 1.0, &mut long);
        fill(7, 1.0, &mut short);
        assert_eq!(short, long[..18]);
    }
}
