//! The tensors of a model: matrices stay in the file's number type and in the mapping, norm weights widen to f32.

use super::Dtype;
use crate::device::map::Bytes;

/// A row-major matrix `[rows, cols]` of any [`Dtype`], little endian, without alignment promises (SIMD loads need none).
#[derive(Clone)]
pub struct Matrix {
    bytes: Bytes,
    dtype: Dtype,
    rows: usize,
    cols: usize,
}

impl Matrix {
    /// Wraps `bytes`, which must hold exactly `rows * cols` numbers.
    ///
    /// # Panics
    /// If the length does not fit: the loader has checked it.
    pub fn new(bytes: Bytes, dtype: Dtype, rows: usize, cols: usize) -> Matrix {
        assert_eq!(bytes.len(), rows * cols * dtype.bytes(), "matrix bytes");
        Matrix { bytes, dtype, rows, cols }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// All bytes, row after row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes of one row.
    pub fn row_bytes(&self, row: usize) -> &[u8] {
        let n = self.cols * self.dtype.bytes();
        &self.bytes[row * n..(row + 1) * n]
    }

    /// Widens one row to f32: `out` is `[cols]`.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) {
        widen(self.dtype, self.row_bytes(row), out);
    }
}

/// Widens little-endian numbers to f32, one to one.
pub fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * dtype.bytes(), "widen: length");
    match dtype {
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Dtype::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Dtype::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
    }
}

/// `y = W x + b`.
#[derive(Clone)]
pub struct Linear {
    /// `[out_features, in_features]`.
    pub weight: Matrix,
    /// `[out_features]`.
    pub bias: Option<Vec<f32>>,
}

/// One decoder layer.
pub struct Layer {
    /// `[hidden]`, before attention.
    pub input_norm: Vec<f32>,
    /// `[n_heads * head_dim, hidden]`.
    pub q: Linear,
    /// `[n_kv_heads * head_dim, hidden]`.
    pub k: Linear,
    /// `[n_kv_heads * head_dim, hidden]`.
    pub v: Linear,
    /// `[hidden, n_heads * head_dim]`.
    pub o: Linear,
    /// `[head_dim]`, Qwen3.
    pub q_norm: Option<Vec<f32>>,
    /// `[head_dim]`, Qwen3.
    pub k_norm: Option<Vec<f32>>,
    /// `[hidden]`, before the MLP.
    pub post_norm: Vec<f32>,
    /// `[intermediate, hidden]`.
    pub gate: Linear,
    /// `[intermediate, hidden]`.
    pub up: Linear,
    /// `[hidden, intermediate]`.
    pub down: Linear,
}

/// All tensors of a model.
pub struct Weights {
    /// `[vocab, hidden]`.
    pub embed: Matrix,
    /// Decoder layers in order.
    pub layers: Vec<Layer>,
    /// `[hidden]`.
    pub final_norm: Vec<f32>,
    /// `[vocab, hidden]`; a clone of `embed` (same bytes, not copied) for tied models.
    pub lm_head: Linear,
}

impl Weights {
    /// Bytes of all matrices; a tied LM head counts once.
    pub fn bytes(&self, tied: bool) -> u64 {
        let m = |m: &Matrix| m.bytes().len() as u64;
        let layers: u64 = self
            .layers
            .iter()
            .flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down])
            .map(|lin| m(&lin.weight))
            .sum();
        layers + m(&self.embed) + if tied { 0 } else { m(&self.lm_head.weight) }
    }
}
