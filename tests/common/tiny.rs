//! Small random models of every shape, made by hand.

use specache::device::map::Bytes;
use specache::model::{
    Arch, Config, Dtype, GenerationConfig, Layer, Linear, Matrix, Model, Rope, RopeScaling, Weights,
};

/// Tokens that a [`Tiny`] model knows.
pub const VOCAB: usize = 64;
const HIDDEN: usize = 48;
const INTERMEDIATE: usize = 64;

/// The shape of a small model: what the cache and attention depend on.
#[derive(Clone, Copy, Debug)]
pub struct Tiny {
    pub head_dim: usize,
    pub n_kv_heads: usize,
    /// G.
    pub group_heads: usize,
    pub n_layers: usize,
    pub window: Option<usize>,
}

impl Tiny {
    /// Uniform weights with variances that keep the residual stream near 1 and attention peaked (scores of about
    /// +-4), so that what is selected matters.
    pub fn model(&self) -> Model {
        let config = Config {
            arch: Arch::Llama,
            hidden_size: HIDDEN,
            intermediate_size: INTERMEDIATE,
            n_layers: self.n_layers,
            n_heads: self.n_kv_heads * self.group_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            vocab_size: VOCAB,
            max_positions: 8192,
            rms_norm_eps: 1e-6,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::Default },
            sliding_window: self.window,
            tie_word_embeddings: false,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            dtype: None,
            bos_token_id: None,
            eos_token_ids: vec![],
        };
        let mut random = Random(self.head_dim as u64 * 31 + self.group_heads as u64);
        let mut linear = |rows: usize, cols: usize| {
            let size = 2.0 / (cols as f32).sqrt();
            let values: Vec<f32> = (0..rows * cols).map(|_| random.next() * size).collect();
            Linear { weight: matrix(rows, cols, &values), bias: None }
        };
        let (q, kv) = (config.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let mut layer = || Layer {
            input_norm: vec![1.5; HIDDEN],
            q: linear(q, HIDDEN),
            k: linear(kv, HIDDEN),
            v: linear(kv, HIDDEN),
            o: linear(HIDDEN, q),
            q_norm: None,
            k_norm: None,
            post_norm: vec![0.5; HIDDEN],
            gate: linear(INTERMEDIATE, HIDDEN),
            up: linear(INTERMEDIATE, HIDDEN),
            down: linear(HIDDEN, INTERMEDIATE),
        };
        let layers = (0..self.n_layers).map(|_| layer()).collect();
        let (embed, lm_head) = (linear(VOCAB, HIDDEN).weight, linear(VOCAB, HIDDEN));
        let weights = Weights { embed, layers, final_norm: vec![1.0; HIDDEN], lm_head };
        Model { name: "tiny".into(), config, weights, generation: GenerationConfig::default(), synthetic: true }
    }
}

/// A matrix of f32.
pub fn matrix(rows: usize, cols: usize, values: &[f32]) -> Matrix {
    let fill = |to: &mut [u8]| to.copy_from_slice(bytemuck::cast_slice(values));
    Matrix::new(Bytes::filled(values.len() * 4, fill).unwrap(), Dtype::F32, rows, cols)
}

/// The same matrix with NaN in one place.
pub fn with_nan(from: &Matrix, row: usize, col: usize) -> Matrix {
    let mut values = vec![0.0; from.rows() * from.cols()];
    values.chunks_exact_mut(from.cols()).enumerate().for_each(|(r, to)| from.row_f32(r, to));
    values[row * from.cols() + col] = f32::NAN;
    matrix(from.rows(), from.cols(), &values)
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `-1 .. 1`.
    pub fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// `n` token ids.
pub fn ids(seed: u64, n: usize) -> Vec<u32> {
    let mut random = Random(seed);
    (0..n).map(|_| (random.bits() % VOCAB as u64) as u32).collect()
}
