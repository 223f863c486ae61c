//! `config.json`: shapes and constants of a Llama, Mistral or Qwen model, checked before anything is allocated.

use std::path::Path;

use super::fields::Fields;
use super::rope_config;
use crate::error::Result;

// Caps: far above any published model, and low enough that the bytes of all matrices together
// (7 * 2^12 layers * 2^22 * 2^20 numbers * 4 bytes) stay below 2^63.
const MAX_WIDTH: usize = 1 << 22;
const MAX_HIDDEN: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 12;
const MAX_HEAD_DIM: usize = 1 << 10;
const MAX_VOCAB: usize = 1 << 24;
/// Positions stay exact in 32 bits.
pub(super) const MAX_POSITIONS: usize = 1 << 31;

/// The number type of weights or of cached K and V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// The families that are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM` (q, k, v biases).
    Qwen2,
    /// `Qwen3ForCausalLM` (RMS norm of each q and k head before RoPE).
    Qwen3,
}

/// Rotary position embedding: base frequency and how it is stretched.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `rope_theta`.
    pub theta: f64,
    /// `rope_scaling` / `rope_parameters`.
    pub scaling: RopeScaling,
}

/// How RoPE frequencies are stretched to longer contexts. Names and formulas as in Hugging Face transformers.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Unscaled.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// As `Default` up to `max_position_embeddings`; longer contexts are refused.
    Dynamic {
        /// Stretch that longer contexts would use.
        factor: f64,
    },
    /// Llama 3.1's piecewise scaling.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// `low_freq_factor`.
        low_freq_factor: f64,
        /// `high_freq_factor`.
        high_freq_factor: f64,
        /// `original_max_position_embeddings`.
        original_max_positions: usize,
    },
    /// YaRN.
    Yarn {
        /// Stretch.
        factor: f64,
        /// `original_max_position_embeddings`.
        original_max_positions: usize,
        /// `beta_fast`.
        beta_fast: f64,
        /// `beta_slow`.
        beta_slow: f64,
        /// Multiplies cos and sin; derived from factor and mscale fields where the file does not say.
        attention_factor: f64,
        /// Round the correction range to whole dimensions.
        truncate: bool,
    },
}

/// Everything that the forward pass needs to know about a model. Field names follow `config.json`, counts start with `n_`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Family.
    pub arch: Arch,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers, L.
    pub n_layers: usize,
    /// Query heads, H.
    pub n_heads: usize,
    /// KV heads, Hkv; divides H.
    pub n_kv_heads: usize,
    /// Numbers per head, D; even.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Position i sees j > i - w.
    pub sliding_window: Option<usize>,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k, v projections have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub o_bias: bool,
    /// gate, up and down projections have biases.
    pub mlp_bias: bool,
    /// q and k heads are RMS-normalised before RoPE.
    pub qk_norm: bool,
    /// The config's `dtype` / `torch_dtype`; decides the 16-bit type of cached K and V. Absent: `None`.
    pub dtype: Option<Dtype>,
    /// First token of a text, if the config names one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl Config {
    /// Parses the text of a `config.json`; `file` is named in errors. Absent fields have the defaults of the Hugging
    /// Face configuration classes; the five sizes that make the model (hidden, intermediate, layers, heads,
    /// vocabulary) must be there.
    ///
    /// # Errors
    /// [`crate::error::Error::Model`] naming the field, the value found and what would be right.
    pub fn parse(file: &Path, json: &str) -> Result<Config> {
        let f = Fields::parse(file, json)?;
        let arch = arch(&f)?;
        refuse_unsupported(&f)?;
        let hidden_size = f.required_count("hidden_size", MAX_HIDDEN)?;
        let n_layers = f.required_count("num_hidden_layers", MAX_LAYERS)?;
        let n_heads = f.required_count("num_attention_heads", MAX_HEADS)?;
        let vocab_size = f.required_count("vocab_size", MAX_VOCAB)?;
        let max_positions = f.count("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(default_positions(arch));
        let biases = biases(&f, arch)?;
        Ok(Config {
            arch,
            hidden_size,
            intermediate_size: f.required_count("intermediate_size", MAX_WIDTH)?,
            n_layers,
            n_heads,
            n_kv_heads: n_kv_heads(&f, arch, n_heads)?,
            head_dim: head_dim(&f, arch, hidden_size, n_heads)?,
            vocab_size,
            max_positions,
            rms_norm_eps: rms_norm_eps(&f)?,
            rope: rope_config::parse(&f, max_positions)?,
            sliding_window: sliding_window(&f, arch, n_layers)?,
            tie_word_embeddings: f.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: biases.qkv,
            o_bias: biases.o,
            mlp_bias: biases.mlp,
            qk_norm: arch == Arch::Qwen3,
            dtype: dtype(&f)?,
            bos_token_id: bos_token_id(&f, arch, vocab_size)?,
            eos_token_ids: eos_token_ids(&f, arch)?,
        })
    }

    /// The longest context that RoPE can place. `dynamic` RoPE recomputes all frequencies beyond
    /// `max_position_embeddings`, which would invalidate the cached keys, so it ends there; for the others there is no
    /// hard limit (`None`), though quality falls beyond what the model was trained on.
    pub fn max_context(&self) -> Option<usize> {
        match self.rope.scaling {
            RopeScaling::Dynamic { .. } => Some(self.max_positions),
            _ => None,
        }
    }

    /// Numbers in all matrices; a tied LM head counts once.
    pub fn n_weights(&self) -> u64 {
        let n = |count: usize| count as u64; // the caps above keep products below 2^63
        let attention = 2 * n(self.head_dim) * n(self.hidden_size) * n(self.n_heads + self.n_kv_heads);
        let mlp = 3 * n(self.hidden_size) * n(self.intermediate_size);
        let embeddings = if self.tie_word_embeddings { 1 } else { 2 };
        n(self.n_layers) * (attention + mlp) + embeddings * n(self.hidden_size) * n(self.vocab_size)
    }

    /// Query heads per KV head, G = H / Hkv.
    pub fn group_heads(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// The 16-bit type of cached K and V: float16 gives fp16, anything else (bfloat16, float32, absent) bf16.
    pub fn kv_dtype(&self) -> Dtype {
        match self.dtype {
            Some(Dtype::F16) => Dtype::F16,
            _ => Dtype::Bf16,
        }
    }
}

/// The family: `model_type`, or the first entry of `architectures` where the file has no `model_type`.
fn arch(f: &Fields) -> Result<Arch> {
    const VALID: &str = "valid are llama, mistral, qwen2, qwen3";
    if let Some(model_type) = f.text("model_type")? {
        return match model_type {
            "llama" => Ok(Arch::Llama),
            "mistral" => Ok(Arch::Mistral),
            "qwen2" => Ok(Arch::Qwen2),
            "qwen3" => Ok(Arch::Qwen3),
            _ => Err(f.error("model_type", format!("this family is not supported; {VALID}"))),
        };
    }
    match f.texts("architectures")?.and_then(|list| list.first().copied()) {
        Some("LlamaForCausalLM") => Ok(Arch::Llama),
        Some("MistralForCausalLM") => Ok(Arch::Mistral),
        Some("Qwen2ForCausalLM") => Ok(Arch::Qwen2),
        Some("Qwen3ForCausalLM") => Ok(Arch::Qwen3),
        Some(_) => Err(f.error("architectures", format!("this family is not supported; give a model_type: {VALID}"))),
        None => Err(f.error("model_type", VALID)),
    }
}

/// What would change the numbers and is not implemented is refused rather than guessed.
fn refuse_unsupported(f: &Fields) -> Result<()> {
    for name in ["quantization_config", "compression_config"] {
        if f.get(name).is_some() {
            return Err(
                f.error(name, "quantised weights are not supported; use the model's bf16, fp16 or fp32 weights")
            );
        }
    }
    match f.text("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(_) => Err(f.error("hidden_act", "only silu is supported")),
    }
}

/// `max_position_embeddings` where the file has none.
fn default_positions(arch: Arch) -> usize {
    match arch {
        Arch::Llama => 2048,
        Arch::Mistral => 4096 * 32,
        Arch::Qwen2 | Arch::Qwen3 => 32768,
    }
}

/// Most query heads per KV head: with two rows, 32 queries are what the attention kernels hold at once.
const MAX_GROUP_HEADS: usize = 16;

/// Null, or absent outside of the Mistral family: one KV head per query head.
fn n_kv_heads(f: &Fields, arch: Arch, n_heads: usize) -> Result<usize> {
    const NAME: &str = "num_key_value_heads";
    let n = match f.count(NAME, MAX_HEADS)? {
        Some(n) => n,
        None if arch == Arch::Mistral && !f.has(NAME) => 8,
        None => n_heads,
    };
    if !n_heads.is_multiple_of(n) {
        return Err(f.error(NAME, format!("{n} KV heads must divide num_attention_heads ({n_heads})")));
    }
    if n_heads / n > MAX_GROUP_HEADS {
        let g = n_heads / n;
        return Err(f.error(NAME, format!("{g} query heads share a KV head; at most {MAX_GROUP_HEADS} are supported")));
    }
    Ok(n)
}

fn head_dim(f: &Fields, arch: Arch, hidden_size: usize, n_heads: usize) -> Result<usize> {
    let head_dim = match f.count("head_dim", MAX_HEAD_DIM)? {
        Some(d) => d,
        None if arch == Arch::Qwen3 => 128,
        None if hidden_size.is_multiple_of(n_heads) && hidden_size / n_heads <= MAX_HEAD_DIM => hidden_size / n_heads,
        None => {
            let fix = format!("it must be a multiple of num_attention_heads ({n_heads}), or head_dim must be given");
            return Err(f.error("hidden_size", fix));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(f.error("head_dim", format!("RoPE rotates pairs, so head_dim ({head_dim}) must be even")));
    }
    Ok(head_dim)
}

fn rms_norm_eps(f: &Fields) -> Result<f32> {
    // Below the smallest normal f32 it would vanish and no longer guard the division.
    let range = "from 1e-37 to 1";
    Ok(f.number("rms_norm_eps", range, |x| (1e-37..=1.0).contains(&x))?.unwrap_or(1e-6) as f32)
}

struct Biases {
    qkv: bool,
    o: bool,
    mlp: bool,
}

fn biases(f: &Fields, arch: Arch) -> Result<Biases> {
    let flag = |name| Ok(f.flag(name)?.unwrap_or(false));
    Ok(match arch {
        Arch::Llama => {
            let attention = flag("attention_bias")?;
            Biases { qkv: attention, o: attention, mlp: flag("mlp_bias")? }
        }
        Arch::Qwen3 => {
            let attention = flag("attention_bias")?;
            Biases { qkv: attention, o: attention, mlp: false }
        }
        Arch::Qwen2 => Biases { qkv: true, o: false, mlp: false },
        Arch::Mistral => Biases { qkv: false, o: false, mlp: false },
    })
}

/// One window for all layers, or none. Models that mix both are refused.
fn sliding_window(f: &Fields, arch: Arch, n_layers: usize) -> Result<Option<usize>> {
    const NAME: &str = "sliding_window";
    let window = match (arch, f.has(NAME)) {
        (Arch::Llama, _) => return Ok(None),
        (Arch::Mistral, true) => f.count(NAME, MAX_POSITIONS)?,
        (Arch::Mistral, false) => Some(4096),
        (Arch::Qwen2 | Arch::Qwen3, _) if f.flag("use_sliding_window")? != Some(true) => None,
        (Arch::Qwen2 | Arch::Qwen3, true) => f.count(NAME, MAX_POSITIONS)?,
        (Arch::Qwen2 | Arch::Qwen3, false) => Some(4096),
    };
    Ok(match sliding_layers(f, arch, n_layers)? {
        Sliding::None => None,
        Sliding::All => window,
    })
}

enum Sliding {
    None,
    All,
}

/// Which layers have the window: `layer_types`, else Qwen's `max_window_layers` (the first that many have none).
fn sliding_layers(f: &Fields, arch: Arch, n_layers: usize) -> Result<Sliding> {
    const MIXED: &str = "layers with and without a sliding window in one model are not supported";
    if let Some(types) = f.texts("layer_types")? {
        if types.len() != n_layers {
            return Err(f.error("layer_types", format!("it must have num_hidden_layers ({n_layers}) entries")));
        }
        return match types.iter().filter(|&&t| t == "sliding_attention").count() {
            n if n == n_layers => Ok(Sliding::All),
            0 if types.iter().all(|&t| t == "full_attention") => Ok(Sliding::None),
            _ => Err(f.error("layer_types", MIXED)),
        };
    }
    if arch == Arch::Mistral || f.flag("use_sliding_window")? != Some(true) {
        return Ok(Sliding::All);
    }
    match f.get("max_window_layers").map_or(Some(28), serde_json::Value::as_u64) {
        None => Err(f.error("max_window_layers", "it must be a whole number")),
        Some(0) => Ok(Sliding::All),
        Some(n) if n >= n_layers as u64 => Ok(Sliding::None),
        Some(_) => Err(f.error("max_window_layers", MIXED)),
    }
}

/// `dtype`, or its older name `torch_dtype`.
fn dtype(f: &Fields) -> Result<Option<Dtype>> {
    let name = if f.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match f.text(name)?.map(|s| s.trim_start_matches("torch.")) {
        None => Ok(None),
        Some("bfloat16") => Ok(Some(Dtype::Bf16)),
        Some("float16") => Ok(Some(Dtype::F16)),
        Some("float32") => Ok(Some(Dtype::F32)),
        Some(_) => Err(f.error(name, "valid are bfloat16, float16, float32")),
    }
}

/// Absent (not null): 1 in the Llama and Mistral classes, none in the Qwen classes.
fn bos_token_id(f: &Fields, arch: Arch, vocab_size: usize) -> Result<Option<u32>> {
    const NAME: &str = "bos_token_id";
    let id = match f.token_ids(NAME)?.as_deref() {
        Some([id]) => Some(*id),
        Some(_) => return Err(f.error(NAME, "it must be one token id")),
        None if f.has(NAME) || matches!(arch, Arch::Qwen2 | Arch::Qwen3) => None,
        None => Some(1),
    };
    match id {
        Some(id) if id as usize >= vocab_size && f.has(NAME) => {
            Err(f.error(NAME, format!("it must be below vocab_size ({vocab_size})")))
        }
        id => Ok(id),
    }
}

/// Absent (not null): 2 in the Llama and Mistral classes, none in the Qwen classes.
fn eos_token_ids(f: &Fields, arch: Arch) -> Result<Vec<u32>> {
    const NAME: &str = "eos_token_id";
    Ok(match f.token_ids(NAME)? {
        Some(ids) => ids,
        None if f.has(NAME) || matches!(arch, Arch::Qwen2 | Arch::Qwen3) => Vec::new(),
        None => vec![2],
    })
}
