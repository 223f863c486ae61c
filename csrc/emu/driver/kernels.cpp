// One line for each kernel, or list of kernels: where it is, its name, its parameters. The sources themselves are
// compiled beside this file, and a name that none of them has does not link.
#include "kernels.h"

#include "../../kernels.h"

#define KERNEL(source, name, ...)      \
    extern "C" void name(__VA_ARGS__); \
    static const emu::driver::Registered registered_##name(source, #name, name);

#define PACK(D, B, dtype, T) KERNEL("pack.cu", specache_pack_d##D##_b##B##_##dtype, specache_pack_params)
#define ATTN(D, B, dtype, T) KERNEL("attn_decode.cu", specache_attn_d##D##_b##B##_##dtype, specache_attn_params)
#define EMBED(dtype, T) KERNEL("embed.cu", specache_embed_##dtype, specache_embed_params)
#define LINEAR(dtype, T, N)                                                       \
    KERNEL("linear.cu", specache_qkv_##dtype##_n##N, specache_qkv_params)         \
    KERNEL("linear.cu", specache_residual_##dtype##_n##N, specache_linear_params) \
    KERNEL("linear.cu", specache_gate_up_##dtype##_n##N, specache_gate_up_params) \
    KERNEL("linear.cu", specache_logits_##dtype##_n##N, specache_linear_params)
#define DENSE(dtype, T)                                                   \
    KERNEL("dense.cu", specache_norm16_##dtype, specache_norm16_params)   \
    KERNEL("dense.cu", specache_round16_##dtype, specache_round16_params) \
    KERNEL("dense.cu", specache_swiglu16_##dtype, specache_swiglu16_params)
#define PREFILL(D, dtype, T) KERNEL("attn_prefill.cu", specache_prefill_d##D##_##dtype, specache_prefill_params)

SPECACHE_PACK_KERNELS(PACK)
SPECACHE_ATTN_KERNELS(ATTN)
KERNEL("attn_combine.cu", specache_attn_combine, specache_attn_params)
KERNEL("select.cu", specache_select_chunks, specache_select_params)
KERNEL("select.cu", specache_select_merge, specache_select_params)
SPECACHE_EMBED_KERNELS(EMBED)
SPECACHE_LINEAR_KERNELS(LINEAR)
KERNEL("linear.cu", specache_head_norm, specache_qkv_params)
SPECACHE_DENSE_KERNELS(DENSE)
KERNEL("dense.cu", specache_finish_qkv, specache_finish_qkv_params)
SPECACHE_PREFILL_KERNELS(PREFILL)
KERNEL("fetch.cu", specache_fetch_pairs, specache_fetch_params)
KERNEL("post.cu", specache_post_wanted, specache_post_params)
KERNEL("draw.cu", specache_draw_tokens, specache_draw_params)
KERNEL("sample.cu", specache_argmax_slices, specache_argmax_params)
KERNEL("sample.cu", specache_argmax_merge, specache_argmax_params)
KERNEL("read.cu", specache_read, specache_read_params)
