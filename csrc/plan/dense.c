/* The launch plans of dense.cu. */
#include "plan.h"

/* Models end at 65536 (intermediate). */
#define MOST_WIDTH (1u << 20)
#define MOST_ROWS (1u << 24)

/* The entry points of one dtype. */
typedef struct Kernels {
    const char *norm16, *round16, *swiglu16;
} Kernels;

static Kernels kernels_of(specache_dtype dtype) {
    Kernels found = {NULL, NULL, NULL};
#define NAMES(type, T)                               \
    if (dtype == SPECACHE_DTYPE(type)) {             \
        found.norm16 = "specache_norm16_" #type;     \
        found.round16 = "specache_round16_" #type;   \
        found.swiglu16 = "specache_swiglu16_" #type; \
    }
    SPECACHE_DENSE_KERNELS(NAMES)
#undef NAMES
    return found;
}

static specache_status check_dtype(const char *op, specache_dtype dtype, specache_launch *launch) {
    if (dtype == SPECACHE_FP32)
        return refuse(launch, SPECACHE_UNSUPPORTED_DTYPE,
                      "%s: fp32 weights have no 16-bit products; use the fused linears, or convert the model", op);
    if (dtype != SPECACHE_FP16 && dtype != SPECACHE_BF16)
        return refuse(launch, SPECACHE_UNSUPPORTED_DTYPE, "%s: weights of dtype %u (fp16 or bf16)", op, dtype);
    return SPECACHE_OK;
}

static specache_status check_width(const char *op, uint32_t n_rows, uint32_t width, specache_launch *launch) {
    if (n_rows > MOST_ROWS)
        return refuse(launch, SPECACHE_UNSUPPORTED_ROWS, "%s: %u rows (at most %u)", op, n_rows, MOST_ROWS);
    if (width == 0 || width % 8 != 0 || width > MOST_WIDTH)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "%s: %u features (multiples of 8 to %u)", op, width,
                      MOST_WIDTH);
    return SPECACHE_OK;
}

static uint64_t ceil_div(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }

specache_status specache_norm16_plan(const specache_norm16_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_dtype("norm16", p->dtype, launch));
    TRY(check_width("norm16", p->n_rows, p->hidden, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    const Address all[] = {{"x", p->x, 16, REQUIRED},
                           {"norm", p->norm, 16, REQUIRED},
                           {"y", p->y, 16, REQUIRED},
                           {"bad_layer", p->bad_layer, 4, OPTIONAL}};
    CHECK_ADDRESSES("norm16", all, launch);
    return planned(launch, kernels_of(p->dtype).norm16, p->n_rows, SPECACHE_DENSE_THREADS);
}

specache_status specache_finish_qkv_plan(const specache_finish_qkv_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_rope_dim("finish_qkv", p->head_dim, launch));
    if (p->n_kv_heads == 0 || p->n_heads > 4096 || p->n_kv_heads > p->n_heads)
        return refuse(launch, SPECACHE_UNSUPPORTED_HEADS, "finish_qkv: %u heads, %u KV heads", p->n_heads,
                      p->n_kv_heads);
    TRY(check_cache_dtype("finish_qkv", p->kv_dtype, launch));
    if ((p->q_norm == 0) != (p->k_norm == 0))
        return refuse(launch, SPECACHE_BAD_ADDRESS, "finish_qkv: q_norm without k_norm, or the other way round");
    const uint64_t warps = (uint64_t)p->n_rows * (p->n_heads + 2 * p->n_kv_heads);
    if (warps > MOST_CTAS) /* the kernel counts them in 32 bits */
        return refuse(launch, SPECACHE_TOO_LARGE, "finish_qkv: %u rows of %u heads", p->n_rows, p->n_heads);
    if (p->n_rows == 0) return SPECACHE_OK;
    const Address all[] = {{"products", p->products, 4, REQUIRED}, {"q_bias", p->q_bias, 4, OPTIONAL},
                           {"k_bias", p->k_bias, 4, OPTIONAL},     {"v_bias", p->v_bias, 4, OPTIONAL},
                           {"q_norm", p->q_norm, 4, OPTIONAL},     {"k_norm", p->k_norm, 4, OPTIONAL},
                           {"rope", p->rope, 8, REQUIRED},         {"append", p->append, 8, REQUIRED},
                           {"q", p->q, 4, REQUIRED}};
    CHECK_ADDRESSES("finish_qkv", all, launch);
    return planned(launch, "specache_finish_qkv", ceil_div(warps, SPECACHE_DENSE_THREADS / 32), SPECACHE_DENSE_THREADS);
}

specache_status specache_round16_plan(const specache_round16_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_dtype("round16", p->dtype, launch));
    if (p->count % 8 != 0)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "round16: %llu numbers (multiples of 8)",
                      (unsigned long long)p->count);
    if (p->count == 0) return SPECACHE_OK;
    const Address all[] = {{"x", p->x, 16, REQUIRED}, {"y", p->y, 16, REQUIRED}};
    CHECK_ADDRESSES("round16", all, launch);
    return planned(launch, kernels_of(p->dtype).round16, ceil_div(p->count / 8, SPECACHE_DENSE_THREADS),
                   SPECACHE_DENSE_THREADS);
}

specache_status specache_swiglu16_plan(const specache_swiglu16_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_dtype("swiglu16", p->dtype, launch));
    TRY(check_width("swiglu16", p->n_rows, p->intermediate, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    if (p->stride < p->intermediate || p->stride % 4 != 0)
        return refuse(launch, SPECACHE_BAD_STRIDE, "swiglu16: stride %u (multiples of 4 from %u)", p->stride,
                      p->intermediate);
    const Address all[] = {{"gate", p->gate, 16, REQUIRED},
                           {"up", p->up, 16, REQUIRED},
                           {"gate_bias", p->gate_bias, 16, OPTIONAL},
                           {"up_bias", p->up_bias, 16, OPTIONAL},
                           {"y", p->y, 16, REQUIRED}};
    CHECK_ADDRESSES("swiglu16", all, launch);
    const uint64_t eights = (uint64_t)p->n_rows * (p->intermediate / 8);
    return planned(launch, kernels_of(p->dtype).swiglu16, ceil_div(eights, SPECACHE_DENSE_THREADS),
                   SPECACHE_DENSE_THREADS);
}
