/* Parameters of the kernels, shared by C++ kernels and the host program: plain C, fixed-width types, sizes asserted on
 * both sides. Addresses are 64-bit numbers: device addresses unless a field says host. */
#ifndef SPECACHE_ABI_H
#define SPECACHE_ABI_H

#ifdef __CUDACC_RTC__
typedef int int32_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#ifdef __cplusplus
#define SPECACHE_ASSERT_SIZE(type, bytes) static_assert(sizeof(type) == (bytes), "size of " #type)
extern "C" {
#else
#define SPECACHE_ASSERT_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), "size of " #type)
#endif

/* Tokens of a page, everywhere. */
#define SPECACHE_PAGE 64

/* Number types of a wide page. */
typedef uint32_t specache_dtype;
#define SPECACHE_FP16 0u
#define SPECACHE_BF16 1u

/* What a launch plan answers. Everything but OK comes with a sentence in specache_launch.message. */
typedef int32_t specache_status;
#define SPECACHE_OK 0
#define SPECACHE_UNSUPPORTED_HEAD_DIM 1
#define SPECACHE_UNSUPPORTED_BITS 2
#define SPECACHE_UNSUPPORTED_GROUP_SIZE 3
#define SPECACHE_UNSUPPORTED_DTYPE 4
#define SPECACHE_BAD_ADDRESS 5 /* null, or not aligned */
#define SPECACHE_BAD_STRIDE 6  /* too small for what it steps over, or not aligned */
#define SPECACHE_TOO_LARGE 7   /* more CTAs than a grid holds */

/* How a kernel is launched: made by the plan function of each op, run by whoever holds the driver. */
typedef struct specache_launch {
    const char *kernel;    /* entry point, static storage */
    uint32_t grid;         /* CTAs; 0: there is nothing to do, launch nothing */
    uint32_t block;        /* threads */
    uint32_t shared_bytes; /* dynamic shared memory */
    char message[108];     /* why the status is not OK; empty if it is */
} specache_launch;
SPECACHE_ASSERT_SIZE(specache_launch, 128);

/* pack.cu: quantise n_pages wide pages (all KV heads of one layer) into packed pages.
 *
 * wide page    [n_kv_heads][64][K: head_dim | V: head_dim] of dtype, contiguous: 64 * 2 * head_dim * 2 bytes a head
 * packed page  one block for each KV head in the format of kv_layout.cuh, contiguous, 128-byte aligned
 *
 * Page i of the list is read at     wide + wide_ids[i] * wide_page_stride + head * (64 * 4 * head_dim)
 * and written at                    packed + packed_ids[i] * packed_page_stride + head * packed_head_stride. */
typedef struct specache_pack_params {
    uint64_t wide;               /* device, 16-byte aligned */
    uint64_t packed;             /* device, 128-byte aligned */
    uint64_t wide_ids;           /* device, uint32_t [n_pages]; 0: page i is at index i */
    uint64_t packed_ids;         /* device, uint32_t [n_pages], no duplicates; 0: page i goes to index i */
    uint64_t wide_page_stride;   /* bytes, multiple of 16 */
    uint64_t packed_page_stride; /* bytes, multiple of 128 */
    uint64_t packed_head_stride; /* bytes, multiple of 128 */
    uint32_t n_pages;            /* pages of this launch */
    uint32_t n_kv_heads;         /* Hkv */
    uint32_t head_dim;           /* D: 64, 128 */
    uint32_t bits;               /* b: 1, 2, 4 */
    uint32_t group_size;         /* g: 32, 64 */
    specache_dtype dtype;        /* of the wide pages */
} specache_pack_params;
SPECACHE_ASSERT_SIZE(specache_pack_params, 80);

#ifndef __CUDACC_RTC__
/* Checks the parameters and names kernel, grid and shared memory. Host only; touches no device. */
specache_status specache_pack_plan(const specache_pack_params *params, specache_launch *launch);
#endif

#ifdef __cplusplus
}
#endif
#endif
