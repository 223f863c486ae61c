// Where every bit of a packed page lies on the device. Arithmetic only, for host and device.
//
// A packed page holds 64 tokens of one KV head: D channels, b bits, groups of g. Contiguous, 128-byte aligned:
//
//   | K codes | K scale | K zero | V codes | V scale | V zero |
//     8 b D     128 D/g   128 D/g  8 b D     128 D/g   128 D/g    bytes
//
// Codes
// -----
// Attention takes K, and then V, as the A operand of mma.m16n8k16 and the queries (probabilities) as B:
//
//   S^T[token][query]   = K[token][channel]   q^T[channel][query]       row = token,   k = channel
//   O^T[channel][query] = V^T[channel][token] p^T[token][query]         row = channel, k = token
//
// In that operand lane l = 4 i + j holds rows i and i + 8 of the tile, and of each octet of k the pair 2j, 2j + 1:
//
//          k: octet 0       octet 1
//   row i     a0 (pair j)   a2 (pair j)         a register is two fp16: even k low, odd k high
//   row i+8   a1 (pair j)   a3 (pair j)
//
// A code that is masked where it lies in a 16-bit half is an fp16 subnormal, code * 2^(e - 24) with e its lowest bit:
// dequantisation is AND only. 2^-e must then be folded into B, whose rows are k: so e may depend on the octet but not
// on the row. Hence a 32-bit word of one lane holds 8/b octets; the four bytes are (pair element, row half):
//
//   bit   31 ........ 24 23 ........ 16 15 ......... 8 7 .......... 0
//         k odd, row i+8  k odd, row i   k even, row i+8  k even, row i        (16 x + 8 r + b s)
//
//   within each byte, octet s of the word at bit b s:
//   1 bit    s = 7 6 5 4 3 2 1 0           masks 0001'0001 << s  on w and w >> 8    4 mma per word
//   2 bits   s = 3 3 2 2 1 1 0 0           masks 0003'0003 << 2s                    2 mma per word
//   4 bits   s = 1 1 1 1 0 0 0 0           masks 000F'000F << 4s                    1 mma per word
//
// so one shift by 8 and 16/b masks unpack a word, the highest bit used is 7 (a subnormal has 10), and a0, a1 (and a2,
// a3) of an mma share their e.
// The words of a lane run over row tiles, and within a tile over octets. Four words make 16 bytes, 32 lanes make a
// chunk of 512: one load is 16 bytes per lane and coalesced, whatever b and D are.
//
//   word W of lane l  ->  byte 512 (W / 4) + 16 l + 4 (W % 4)
//
// Scales and zeros
// ----------------
// fp16. K: [64/g token groups][D channels]; V: [D/g channel groups][64 tokens]. They multiply B (scale) or are an A
// row of their own (zero), so a lane needs pair j of every octet: within 32 values the four octets of four pairs are
// transposed, and lane j reads 16 bytes for four octets, its neighbours the 16 bytes beside.
//
//   value 32 c + 8 o + 2 j + x  ->  place 32 c + 8 j + 2 o + x
#pragma once

#include "common.cuh"

namespace specache {

constexpr int kPage = SPECACHE_PAGE;
constexpr int kLaneBytes = 16;                 // one load of one lane
constexpr int kChunkBytes = 32 * kLaneBytes;   // one load of a warp
constexpr int kLaneWords = kLaneBytes / 4;

// Where one code starts: bit 0 is the lowest of the byte; its b bits never cross a byte.
struct CodePlace {
    int byte;
    int bit;
};

// The 32-bit word of a lane that holds a code, and the code's lowest bit there.
struct WordPlace {
    int word;
    int lane;
    int bit;
};

// Octets of k that share one word, and so the number of different exponents.
template <int B> constexpr int kOctetsPerWord = 8 / B;

// Words of one lane for a tile of 16 rows, where k runs over K_LEN values.
template <int K_LEN, int B> constexpr int kTileWords = K_LEN * B / 64;

// e of an octet: an unpacked code is code * 2^(e - 24).
template <int B> SPECACHE_HOST_DEVICE constexpr int code_exponent(int octet) { return B * (octet % kOctetsPerWord<B>); }

// Place of (row, k) of an A operand with k over K_LEN values.
template <int K_LEN, int B> SPECACHE_HOST_DEVICE constexpr WordPlace word_place(int row, int k) {
    const int tile = row / 16, row_half = row / 8 % 2, octet = k / 8, pair = k % 8 / 2, element = k % 2;
    return WordPlace{tile * kTileWords<K_LEN, B> + octet / kOctetsPerWord<B>, row % 8 * 4 + pair,
                     16 * element + 8 * row_half + code_exponent<B>(octet)};
}

// First byte of a lane's word within the codes.
SPECACHE_HOST_DEVICE constexpr int word_byte(int word, int lane) {
    return word / kLaneWords * kChunkBytes + lane * kLaneBytes + word % kLaneWords * 4;
}

// Words are little-endian.
SPECACHE_HOST_DEVICE constexpr CodePlace code_place(WordPlace at) {
    return CodePlace{word_byte(at.word, at.lane) + at.bit / 8, at.bit % 8};
}

// Place of value i (a channel for K, a token for V) among the scales or zeros of its group, in fp16 numbers.
SPECACHE_HOST_DEVICE constexpr int param_place(int i) { return i / 32 * 32 + i % 8 / 2 * 8 + i % 32 / 8 * 2 + i % 2; }

// Groups of g in n values; g is 32 or 64. By a shift: a division by what the compiler does not know takes a GPU 30
// instructions, one after the other.
SPECACHE_HOST_DEVICE constexpr int groups_in(int n, int g) { return n >> (g == 64 ? 6 : 5); }

// One KV head of a packed page. Offsets and sizes are bytes from the page's start.
template <int D, int B> struct PackedPage {
    static_assert(D == 64 || D == 128, "head_dim: 64 or 128");
    static_assert(B == 1 || B == 2 || B == 4, "bits: 1, 2 or 4");

    static constexpr int kCodeBytes = kPage * D * B / 8;
    static constexpr int kLaneCodeWords = D * B / 16;   // words of one lane in K, and in V

    // Scales (or zeros) of K, and of V.
    static SPECACHE_HOST_DEVICE constexpr int param_bytes(int g) { return groups_in(kPage * D, g) * 2; }

    static SPECACHE_HOST_DEVICE constexpr int k_codes() { return 0; }
    static SPECACHE_HOST_DEVICE constexpr int k_scale(int) { return kCodeBytes; }
    static SPECACHE_HOST_DEVICE constexpr int k_zero(int g) { return kCodeBytes + param_bytes(g); }
    static SPECACHE_HOST_DEVICE constexpr int v_codes(int g) { return kCodeBytes + 2 * param_bytes(g); }
    static SPECACHE_HOST_DEVICE constexpr int v_scale(int g) { return v_codes(g) + kCodeBytes; }
    static SPECACHE_HOST_DEVICE constexpr int v_zero(int g) { return v_scale(g) + param_bytes(g); }
    static SPECACHE_HOST_DEVICE constexpr int bytes(int g) { return v_zero(g) + param_bytes(g); }

    static SPECACHE_HOST_DEVICE constexpr CodePlace k_code(int token, int channel) {
        const CodePlace at = code_place(word_place<D, B>(token, channel));
        return CodePlace{k_codes() + at.byte, at.bit};
    }

    static SPECACHE_HOST_DEVICE constexpr CodePlace v_code(int g, int token, int channel) {
        const CodePlace at = code_place(word_place<kPage, B>(channel, token));
        return CodePlace{v_codes(g) + at.byte, at.bit};
    }

    // Byte of the fp16 scale (or zero, with `part` = k_zero(g)) of a channel in a group of g tokens.
    static SPECACHE_HOST_DEVICE constexpr int k_param(int part, int token_group, int channel) {
        return part + 2 * (token_group * D + param_place(channel));
    }

    // The same for V: a token in a group of g channels.
    static SPECACHE_HOST_DEVICE constexpr int v_param(int part, int channel_group, int token) {
        return part + 2 * (channel_group * kPage + param_place(token));
    }
};

// method.md: 48, 80 and 144 bytes a pair at D = 128, g = 64; every part begins at a multiple of 128.
template <int D, int B> SPECACHE_HOST_DEVICE constexpr bool sizes_hold(int g) {
    using P = PackedPage<D, B>;
    const bool method = P::bytes(g) == kPage * (2 * D * B / 8 + 2 * 2 * D * 2 / g);
    const bool aligned = P::k_scale(g) % 128 == 0 && P::k_zero(g) % 128 == 0 && P::v_codes(g) % 128 == 0 &&
                         P::v_scale(g) % 128 == 0 && P::v_zero(g) % 128 == 0 && P::bytes(g) % 128 == 0;
    return method && aligned && P::kLaneCodeWords % kLaneWords == 0;
}
static_assert(PackedPage<128, 1>::bytes(64) == kPage * 48, "1 bit: 48 bytes a pair");
static_assert(PackedPage<128, 2>::bytes(64) == kPage * 80, "2 bits: 80 bytes a pair");
static_assert(PackedPage<128, 4>::bytes(64) == kPage * 144, "4 bits: 144 bytes a pair");
static_assert(sizes_hold<64, 1>(32) && sizes_hold<64, 1>(64) && sizes_hold<128, 1>(32) && sizes_hold<128, 1>(64),
              "1 bit");
static_assert(sizes_hold<64, 2>(32) && sizes_hold<64, 2>(64) && sizes_hold<128, 2>(32) && sizes_hold<128, 2>(64),
              "2 bits");
static_assert(sizes_hold<64, 4>(32) && sizes_hold<64, 4>(64) && sizes_hold<128, 4>(32) && sizes_hold<128, 4>(64),
              "4 bits");

// The two fp16 subnormals of octet `octet` (within the word) and row half `row_half`: one AND, one shift shared by all.
template <int B> SPECACHE_HOST_DEVICE constexpr uint32_t code_pair(uint32_t word, int octet, int row_half) {
    const uint32_t mask = ((1u << B) - 1) * 0x00010001u << (B * octet);
    return (row_half == 0 ? word : word >> 8) & mask;
}

// The A registers of mma number `step` (0 .. 4/b - 1) of a word.
template <int B> SPECACHE_DEVICE void code_fragment(uint32_t word, int step, uint32_t (&a)[4]) {
    a[0] = code_pair<B>(word, 2 * step, 0);
    a[1] = code_pair<B>(word, 2 * step, 1);
    a[2] = code_pair<B>(word, 2 * step + 1, 0);
    a[3] = code_pair<B>(word, 2 * step + 1, 1);
}

}   // namespace specache
