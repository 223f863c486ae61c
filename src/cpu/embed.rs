//! Rows of the embedding matrix, widened to f32.
#![allow(unsafe_code)] // Raw loads and stores within checked shapes.

use super::element::{widen, with_element};
use super::simd::{Isa, dispatch};
use crate::model::Matrix;

/// `out[i] = matrix[tokens[i]]`; `out` is `[tokens.len(), cols]`. Serial: a chunk of 512 tokens is 2 MiB, read once
/// before megabytes of weights per layer.
///
/// # Panics
/// If a shape does not fit or a token is beyond the vocabulary.
pub fn embed(isa: Isa, matrix: &Matrix, tokens: &[u32], out: &mut [f32]) {
    let hidden = matrix.cols();
    let rows = tokens.len();
    assert_eq!(out.len(), rows * hidden, "embed: out must be [tokens, hidden] = [{rows}, {hidden}]");
    for (i, &token) in tokens.iter().enumerate() {
        let token = token as usize;
        assert!(token < matrix.rows(), "embed: token {token} is beyond the vocabulary of {}", matrix.rows());
        let from = matrix.row_bytes(token).as_ptr();
        let to = out[i * hidden..(i + 1) * hidden].as_mut_ptr();
        // SAFETY: `hidden` numbers on both sides.
        with_element!(matrix.dtype(), E => dispatch!(isa, S => unsafe { widen::<S, E>(from, to, hidden) }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::map::Bytes;
    use crate::model::Dtype;

    #[test]
    fn rows_are_the_matrix_rows() {
        for (isa, dtype) in
            Isa::available().into_iter().flat_map(|i| [Dtype::Bf16, Dtype::F16, Dtype::F32].map(|d| (i, d)))
        {
            for hidden in [1, 15, 16, 17, 80] {
                let fill = |b: &mut [u8]| b.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 37 % 120) as u8);
                let bytes = Bytes::filled(7 * hidden * dtype.bytes(), fill).unwrap();
                let matrix = Matrix::new(bytes, dtype, 7, hidden);
                let tokens = [6, 0, 3, 3];
                let mut out = vec![f32::NAN; 4 * hidden];
                embed(isa, &matrix, &tokens, &mut out);
                let mut want = vec![0f32; hidden];
                for (token, got) in tokens.iter().zip(out.chunks_exact(hidden)) {
                    matrix.row_f32(*token as usize, &mut want);
                    assert_eq!(got, want, "{isa} {dtype:?} {hidden}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "token 7 is beyond the vocabulary of 7")]
    fn a_token_beyond_the_vocabulary() {
        let matrix = Matrix::new(Bytes::filled(7 * 4, |_| {}).unwrap(), Dtype::F32, 7, 1);
        embed(Isa::Portable, &matrix, &[7], &mut [0.0]);
    }
}
