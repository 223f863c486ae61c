//! `config.json`: shapes and constants of a Llama, Mistral or Qwen model, checked before anything is allocated.

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
