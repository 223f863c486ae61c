/* The launch plans of linear.cu. */
#include "plan.h"

/* Room for 32-bit arithmetic on features; models end at 65536 (intermediate) and 262144 (vocabulary). */
#define MOST_INPUTS (1u << 20)
#define MOST_OUTPUTS (1u << 24)

/* The entry points of one dtype and number of n-tiles. */
typedef struct Kernels {
    const char *qkv, *residual, *gate_up, *logits;
} Kernels;

/* A shape that check_product has accepted. */
static Kernels kernels_of(specache_dtype dtype, uint32_t n_rows) {
    Kernels found = {NULL, NULL, NULL, NULL};
#define NAMES(type, T, N_TILES)                                         \
    if (dtype == SPECACHE_DTYPE(type) && (n_rows + 7) / 8 == N_TILES) { \
        found.qkv = "specache_qkv_" #type "_n" #N_TILES;                \
        found.residual = "specache_residual_" #type "_n" #N_TILES;      \
        found.gate_up = "specache_gate_up_" #type "_n" #N_TILES;        \
        found.logits = "specache_logits_" #type "_n" #N_TILES;          \
    }
    SPECACHE_LINEAR_KERNELS(NAMES)
#undef NAMES
    return found;
}

static uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

static specache_status check_product(const char *op, uint32_t n_rows, specache_dtype dtype, uint32_t k, uint32_t n,
                                     specache_launch *launch) {
    TRY(check_rows(op, n_rows, launch));
    TRY(check_weights(op, dtype, launch));
    if (k % 8 != 0 || k < 32 || k > MOST_INPUTS)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "%s: %u input features (multiples of 8 from 32 to %u)", op, k,
                      MOST_INPUTS);
    if (n == 0 || n > MOST_OUTPUTS)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "%s: %u output features (1 to %u)", op, n, MOST_OUTPUTS);
    return SPECACHE_OK;
}

static specache_status planned_product(specache_launch *launch, const char *kernel, uint32_t grid) {
    launch->shared_bytes = SPECACHE_LINEAR_SHARED;
    return planned(launch, kernel, grid, SPECACHE_LINEAR_THREADS);
}

/* ---- q, k, v ---- */

static specache_status check_qkv(const specache_qkv_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_rope_dim("qkv", p->head_dim, launch));
    if (p->n_kv_heads == 0 || p->n_heads > 4096 || p->n_kv_heads > p->n_heads)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "qkv: %u heads, %u KV heads", p->n_heads, p->n_kv_heads);
    TRY(check_cache_dtype("qkv", p->kv_dtype, launch));
    if ((p->q_norm == 0) != (p->k_norm == 0))
        return refuse(launch, SPECACHE_BAD_ADDRESS, "qkv: q_norm without k_norm, or the other way round");
    TRY(check_product("qkv", p->n_rows, p->dtype, p->hidden, p->n_heads * p->head_dim, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    const Address all[] = {{"x", p->x, 16, REQUIRED},
                           {"norm", p->norm, 16, REQUIRED},
                           {"q_weight", p->q_weight, 16, REQUIRED},
                           {"k_weight", p->k_weight, 16, REQUIRED},
                           {"v_weight", p->v_weight, 16, REQUIRED},
                           {"q_bias", p->q_bias, 4, OPTIONAL},
                           {"k_bias", p->k_bias, 4, OPTIONAL},
                           {"v_bias", p->v_bias, 4, OPTIONAL},
                           {"q_norm", p->q_norm, 4, OPTIONAL},
                           {"k_norm", p->k_norm, 4, OPTIONAL},
                           {"k", p->k, 4, p->q_norm == 0},
                           {"rope", p->rope, 8, REQUIRED},
                           {"append", p->append, 8, REQUIRED},
                           {"q", p->q, 4, REQUIRED},
                           {"bad_layer", p->bad_layer, 4, REQUIRED}};
    CHECK_ADDRESSES("qkv", all, launch);
    return SPECACHE_OK;
}

specache_status specache_qkv_plan(const specache_qkv_params *p, specache_launch *launch) {
    TRY(check_qkv(p, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    const uint32_t tiles = ceil_div(p->head_dim / 2, 16), heads = p->n_heads + 2 * p->n_kv_heads;
    return planned_product(launch, kernels_of(p->dtype, p->n_rows).qkv, heads * tiles);
}

specache_status specache_head_norm_plan(const specache_qkv_params *p, specache_launch *launch) {
    TRY(check_qkv(p, launch));
    if (p->n_rows == 0 || p->q_norm == 0) return SPECACHE_OK;
    const uint32_t warps = p->n_rows * (p->n_heads + p->n_kv_heads);
    return planned(launch, "specache_head_norm", ceil_div(warps, SPECACHE_HEAD_NORM_THREADS / 32),
                   SPECACHE_HEAD_NORM_THREADS);
}

/* ---- gate and up ---- */

specache_status specache_gate_up_plan(const specache_gate_up_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_product("gate_up", p->n_rows, p->dtype, p->hidden, p->intermediate, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    const Address all[] = {{"x", p->x, 16, REQUIRED},
                           {"norm", p->norm, 16, REQUIRED},
                           {"gate_weight", p->gate_weight, 16, REQUIRED},
                           {"up_weight", p->up_weight, 16, REQUIRED},
                           {"gate_bias", p->gate_bias, 4, OPTIONAL},
                           {"up_bias", p->up_bias, 4, OPTIONAL},
                           {"y", p->y, 4, REQUIRED}};
    CHECK_ADDRESSES("gate_up", all, launch);
    return planned_product(launch, kernels_of(p->dtype, p->n_rows).gate_up, ceil_div(p->intermediate, 16));
}

/* ---- one matrix ---- */

static specache_status check_matrix(const char *op, const specache_linear_params *p, bool norm,
                                    specache_launch *launch) {
    clear(launch);
    TRY(check_product(op, p->n_rows, p->dtype, p->k, p->n, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    if (!norm && p->norm != 0) return refuse(launch, SPECACHE_BAD_ADDRESS, "%s: takes no norm", op);
    if (p->x == p->y) return refuse(launch, SPECACHE_BAD_ADDRESS, "%s: x and y are one buffer", op);
    const Address all[] = {{"x", p->x, 16, REQUIRED},
                           {"norm", p->norm, 16, !norm},
                           {"weight", p->weight, 16, REQUIRED},
                           {"bias", p->bias, 4, OPTIONAL},
                           {"y", p->y, 4, REQUIRED}};
    CHECK_ADDRESSES(op, all, launch);
    return SPECACHE_OK;
}

specache_status specache_residual_plan(const specache_linear_params *p, specache_launch *launch) {
    TRY(check_matrix("residual", p, false, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    return planned_product(launch, kernels_of(p->dtype, p->n_rows).residual, ceil_div(p->n, 32));
}

specache_status specache_logits_plan(const specache_linear_params *p, specache_launch *launch) {
    TRY(check_matrix("logits", p, true, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    return planned_product(launch, kernels_of(p->dtype, p->n_rows).logits, ceil_div(p->n, 32));
}
