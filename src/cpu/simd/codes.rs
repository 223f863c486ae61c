//! The bytes of 32 low-bit codes, in plain form. [`Simd::codes`](super::Simd::codes) is the fast reader.
//!
//! | bits | bytes | where value v lies |
//! |---|---|---|
//! | 1 | one u32 | bit v |
//! | 2 | 8 u8 | byte v % 8, bits 2 (v / 8) and up |
//! | 4 | 8 u16 | u16 v % 8, bits 4 (v / 8) and up |
//!
//! All little endian. With eight units per block, one widening load and one variable shift per 16 values put the
//! values into the lanes in their natural order.

/// Codes of a block.
pub(crate) const BLOCK: usize = 32;

/// Bytes of a block of 32 codes.
pub(crate) const fn block_bytes(bits: usize) -> usize {
    BLOCK * bits / 8
}

/// Byte and shift at which value `v` of a block starts. A code never crosses a byte.
fn place(bits: usize, v: usize) -> (usize, usize) {
    assert!(matches!(bits, 1 | 2 | 4), "codes of {bits} bits: 1, 2 and 4 are supported");
    let units = if bits == 1 { 1 } else { 8 };
    let bit = v / units * bits;
    (v % units * block_bytes(bits) / units + bit / 8, bit % 8)
}

/// Packs 32 codes into `out`, `4 * bits` bytes.
pub(crate) fn pack_codes(bits: usize, codes: &[u8; BLOCK], out: &mut [u8]) {
    assert_eq!(out.len(), block_bytes(bits), "pack_codes: bytes of a block of {bits}-bit codes");
    out.fill(0);
    for (v, &code) in codes.iter().enumerate() {
        debug_assert!(usize::from(code) < 1 << bits, "code {code} needs more than {bits} bits");
        let (byte, shift) = place(bits, v);
        out[byte] |= code << shift;
    }
}

/// The inverse of [`pack_codes`].
pub(crate) fn unpack_codes(bits: usize, bytes: &[u8]) -> [u8; BLOCK] {
    assert_eq!(bytes.len(), block_bytes(bits), "unpack_codes: bytes of a block of {bits}-bit codes");
    std::array::from_fn(|v| {
        let (byte, shift) = place(bits, v);
        bytes[byte] >> shift & ((1 << bits) - 1)
    })
}
