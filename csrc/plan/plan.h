/* What launch plans share: how they refuse, and the checks that more than one of them needs. Plain C99. */
#ifndef SPECACHE_PLAN_H
#define SPECACHE_PLAN_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "../kernels.h"

#define MOST_CTAS 0x7FFFFFFFu
/* What plans accept: positions and what is added to them stay below 2^31, and products of counts below 2^64. */
#define MOST_TOKENS (1u << 30)
#define MOST_SEQS (1u << 20)
#define MOST_HEADS (1u << 16)

/* Leaves the plan with the status of a check that refuses. */
#define TRY(check)                                        \
    do {                                                  \
        const specache_status try_status = (check);       \
        if (try_status != SPECACHE_OK) return try_status; \
    } while (0)

/* Nothing planned, nothing wrong. */
static inline void clear(specache_launch *launch) {
    static const specache_launch nothing = {0};
    *launch = nothing;
}

/* Writes the sentence and passes the status on: `return refuse(launch, STATUS, "...", ...)`. */
static inline specache_status refuse(specache_launch *launch, specache_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(launch->message, sizeof launch->message, format, args);
    va_end(args);
    return status;
}

static inline specache_status planned(specache_launch *launch, const char *kernel, uint64_t grid, uint32_t block) {
    if (grid > MOST_CTAS) return refuse(launch, SPECACHE_TOO_LARGE, "%s: %llu CTAs", kernel, (unsigned long long)grid);
    launch->kernel = kernel;
    launch->grid = (uint32_t)grid;
    launch->block = block;
    return SPECACHE_OK;
}

/* ---- addresses and strides ---- */

/* A buffer and what it must be aligned to. Optional ones may be 0. */
typedef struct Address {
    const char *name;
    uint64_t at;
    uint32_t align;
    bool optional;
} Address;

enum { REQUIRED = false, OPTIONAL = true };

static inline specache_status check_addresses(const char *op, const Address *all, size_t n, specache_launch *launch) {
    for (const Address *a = all; a < all + n; a++)
        if ((a->at == 0 && !a->optional) || a->at % a->align != 0)
            return refuse(launch, SPECACHE_BAD_ADDRESS, "%s: %s is null or not %u-byte aligned", op, a->name, a->align);
    return SPECACHE_OK;
}

#define CHECK_ADDRESSES(op, all, launch) TRY(check_addresses(op, all, sizeof(all) / sizeof *(all), launch))

/* Bytes of one layer of a wide page. */
static inline uint64_t wide_page_bytes(uint32_t n_kv_heads, uint32_t head_dim) {
    return (uint64_t)n_kv_heads * SPECACHE_PAGE * 4 * head_dim;
}

static inline specache_status check_wide_stride(const char *op, const char *name, uint64_t stride, uint64_t page,
                                                specache_launch *launch) {
    if (stride < page || stride % 16 != 0)
        return refuse(launch, SPECACHE_BAD_STRIDE, "%s: %s below %llu or not a multiple of 16", op, name,
                      (unsigned long long)page);
    return SPECACHE_OK;
}

/* Bytes of one head of a packed page. */
static inline uint64_t packed_head_bytes(uint32_t head_dim, uint32_t bits, uint32_t group_size) {
    return SPECACHE_PAGE * ((uint64_t)2 * head_dim * bits / 8 + (uint64_t)8 * head_dim / group_size);
}

/* Heads may lie page by page or all pages of a head together: only each stride's own minimum can be asked for. */
static inline specache_status check_packed_strides(const char *op, uint64_t page_stride, uint64_t head_stride,
                                                   uint64_t head, specache_launch *launch) {
    if (head_stride < head || page_stride < head)
        return refuse(launch, SPECACHE_BAD_STRIDE, "%s: a packed stride is below %llu", op, (unsigned long long)head);
    if (head_stride % 128 != 0 || page_stride % 128 != 0)
        return refuse(launch, SPECACHE_BAD_STRIDE, "%s: a packed stride is not a multiple of 128", op);
    return SPECACHE_OK;
}

/* ---- shapes ---- */

/* 0 rows are fine: nothing to launch. */
static inline specache_status check_rows(const char *op, uint32_t n_rows, specache_launch *launch) {
    if (n_rows > SPECACHE_MAX_ROWS)
        return refuse(launch, SPECACHE_UNSUPPORTED_ROWS, "%s: %u rows (1 to %u)", op, n_rows, SPECACHE_MAX_ROWS);
    return SPECACHE_OK;
}

static inline specache_status check_weights(const char *op, specache_dtype dtype, specache_launch *launch) {
    if (dtype != SPECACHE_FP16 && dtype != SPECACHE_BF16 && dtype != SPECACHE_FP32)
        return refuse(launch, SPECACHE_UNSUPPORTED_DTYPE, "%s: weights of dtype %u (fp16, bf16 or fp32)", op, dtype);
    return SPECACHE_OK;
}

/* Of wide pages and prefetched pairs. */
static inline specache_status check_cache_dtype(const char *op, specache_dtype dtype, specache_launch *launch) {
    if (dtype != SPECACHE_FP16 && dtype != SPECACHE_BF16)
        return refuse(launch, SPECACHE_UNSUPPORTED_DTYPE, "%s: a cache of dtype %u (fp16 or bf16)", op, dtype);
    return SPECACHE_OK;
}

static inline specache_status check_rope_dim(const char *op, uint32_t head_dim, specache_launch *launch) {
    if (head_dim == 0 || head_dim % 2 != 0 || head_dim > 256)
        return refuse(launch, SPECACHE_UNSUPPORTED_HEAD_DIM, "%s: head_dim %u (even, at most 256)", op, head_dim);
    return SPECACHE_OK;
}

/* What kernels that read or write packed pages are built for. */
static inline specache_status check_packing(const char *op, uint32_t head_dim, uint32_t bits, uint32_t group_size,
                                            specache_dtype dtype, specache_launch *launch) {
    if (head_dim != 64 && head_dim != 128)
        return refuse(launch, SPECACHE_UNSUPPORTED_HEAD_DIM, "%s: head_dim %u (64 or 128)", op, head_dim);
    if (bits != 1 && bits != 2 && bits != 4)
        return refuse(launch, SPECACHE_UNSUPPORTED_BITS, "%s: %u bits (1, 2 or 4)", op, bits);
    if (group_size != 32 && group_size != 64)
        return refuse(launch, SPECACHE_UNSUPPORTED_GROUP_SIZE, "%s: group_size %u (32 or 64)", op, group_size);
    return check_cache_dtype(op, dtype, launch);
}

/* `most`: query heads on one KV head. */
static inline specache_status check_heads(const char *op, uint32_t n_heads, uint32_t n_kv_heads, uint32_t most,
                                          specache_launch *launch) {
    if (n_kv_heads == 0 || n_heads == 0 || n_heads % n_kv_heads != 0 || n_heads / n_kv_heads > most)
        return refuse(launch, SPECACHE_UNSUPPORTED_HEADS, "%s: %u heads on %u KV heads (1 to %u on each)", op, n_heads,
                      n_kv_heads, most);
    return SPECACHE_OK;
}

#endif
