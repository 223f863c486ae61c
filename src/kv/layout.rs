//! Where every byte of the cache lies. Arithmetic only; docs/design.md draws it.
//!
//! Two page formats, both 64 tokens of one layer, all KV heads, one head after the other:
//!
//! - a **wide** page holds the 16-bit pairs, K and V of a token side by side: `[n_kv_heads][64][K: D | V: D]`;
//! - a **packed** page holds the low-bit copy: `[n_kv_heads]` times K codes, K zeros and scales, V codes, V zeros and
//!   scales (offsets in [`PackedLayout`]).

use std::ops::Range;

use super::options::{KvOptions, PAGE};
use crate::model::{Config, Dtype};

/// Shape of the cache of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// L.
    pub n_layers: usize,
    /// Hkv.
    pub n_kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Number type of the wide pages.
    pub dtype: Dtype,
    /// The low-bit format.
    pub packed: PackedLayout,
}

impl KvShape {
    /// The shape that a model and options give.
    pub fn new(config: &Config, options: &KvOptions) -> KvShape {
        KvShape {
            n_layers: config.n_layers,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            dtype: options.kv_dtype(config),
            packed: PackedLayout { head_dim: config.head_dim, bits: options.bits, group_size: options.group_size },
        }
    }

    /// Bytes of one pair: K and V of one token and KV head, 512 for D = 128 at 16 bits.
    pub fn pair_bytes(&self) -> usize {
        2 * self.head_dim * self.dtype.bytes()
    }

    /// Bytes of one KV head in a wide page.
    pub fn wide_head_bytes(&self) -> usize {
        PAGE * self.pair_bytes()
    }

    /// Bytes of a wide page.
    pub fn wide_page_bytes(&self) -> usize {
        self.n_kv_heads * self.wide_head_bytes()
    }

    /// The bytes of one pair in a wide page.
    pub fn pair(&self, head: usize, token: usize) -> Range<usize> {
        let start = head * self.wide_head_bytes() + token * self.pair_bytes();
        start..start + self.pair_bytes()
    }

    /// Bytes of a packed page.
    pub fn packed_page_bytes(&self) -> usize {
        self.n_kv_heads * self.packed.head_bytes()
    }

    /// The bytes of one KV head among packed pages that lie one after the other.
    pub fn packed_head(&self, page: usize, head: usize) -> Range<usize> {
        let start = page * self.packed_page_bytes() + head * self.packed.head_bytes();
        start..start + self.packed.head_bytes()
    }
}

/// One KV head of a packed page: 64 tokens, `D` channels, `b` bits, groups of `g`.
///
/// Codes lie in blocks of 32 values of `4 * b` bytes (see [`crate::cpu::simd`]). K is quantised per channel over `g`
/// tokens, so its codes run along the tokens; V per token over `g` channels, so its codes run along the channels. Zeros
/// and scales are fp16.
///
/// | part | bytes | order |
/// |---|---|---|
/// | K codes | `8 b D` | `[D][2 blocks of 32 tokens]` |
/// | K zeros, scales | `2 * 64/g * D * 2` | `[64/g][zero: D, scale: D]` |
/// | V codes | `8 b D` | `[64][D/32 blocks of 32 channels]` |
/// | V zeros, scales | `2 * D/g * 64 * 2` | `[D/g][zero: 64, scale: 64]` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedLayout {
    /// D.
    pub head_dim: usize,
    /// b.
    pub bits: usize,
    /// g.
    pub group_size: usize,
}

impl PackedLayout {
    /// Bytes of the codes of K, and of V.
    pub fn code_bytes(&self) -> usize {
        PAGE * self.head_dim * self.bits / 8
    }

    /// Bytes of the zeros and scales of K, and of V: 4 bytes for each group of g values.
    pub fn param_bytes(&self) -> usize {
        PAGE * self.head_dim / self.group_size * 4
    }

    /// Bytes of one KV head of a page.
    pub fn head_bytes(&self) -> usize {
        2 * (self.code_bytes() + self.param_bytes())
    }

    /// Bytes of one block of 32 codes.
    pub fn block_bytes(&self) -> usize {
        4 * self.bits
    }

    /// Where the K codes are: channel `c`, tokens `32 * block ..`, at `(2 * c + block) * block_bytes`.
    pub fn k_codes(&self) -> Range<usize> {
        0..self.code_bytes()
    }

    /// Where the K zeros and scales are, as fp16: token group `j` has its zeros at `2 * j * D` and its scales `D` later.
    pub fn k_params(&self) -> Range<usize> {
        let start = self.code_bytes();
        start..start + self.param_bytes()
    }

    /// Where the V codes are: token `t`, channels `32 * block ..`, at `(t * D/32 + block) * block_bytes`.
    pub fn v_codes(&self) -> Range<usize> {
        let start = self.code_bytes() + self.param_bytes();
        start..start + self.code_bytes()
    }

    /// Where the V zeros and scales are, as fp16: channel group `j` has its zeros at `2 * j * 64` and its scales 64 later.
    pub fn v_params(&self) -> Range<usize> {
        let start = 2 * self.code_bytes() + self.param_bytes();
        start..start + self.param_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// method.md: D = 128, g = 64: 1-bit 48 bytes a pair, 2-bit 80, 16-bit 512: 10.7 and 6.4 times less.
    #[test]
    fn bytes_per_pair_are_those_of_the_method() {
        for (bits, group_size, pair) in [(1, 64, 48), (2, 64, 80), (4, 64, 144), (1, 32, 64), (2, 32, 96)] {
            let layout = PackedLayout { head_dim: 128, bits, group_size };
            assert_eq!(layout.head_bytes(), PAGE * pair, "{bits} bits, g = {group_size}");
        }
        let shape = KvShape {
            n_layers: 1,
            n_kv_heads: 8,
            head_dim: 128,
            dtype: Dtype::Bf16,
            packed: PackedLayout { head_dim: 128, bits: 1, group_size: 64 },
        };
        assert_eq!(shape.pair_bytes(), 512);
        assert_eq!(shape.wide_page_bytes(), 262_144);
    }

    /// The four parts of a packed head tile it without gap or overlap.
    #[test]
    fn parts_tile_the_page() {
        for head_dim in [32, 64, 96, 128] {
            for bits in [1, 2, 4] {
                for group_size in [32, 64].into_iter().filter(|g| head_dim % g == 0) {
                    let l = PackedLayout { head_dim, bits, group_size };
                    let parts = [l.k_codes(), l.k_params(), l.v_codes(), l.v_params()];
                    assert!(parts.windows(2).all(|w| w[0].end == w[1].start), "{l:?}");
                    assert_eq!((parts[0].start, parts[3].end), (0, l.head_bytes()), "{l:?}");
                    assert!(parts.iter().all(|p| p.start % 4 == 0), "{l:?}");
                }
            }
        }
    }
}
