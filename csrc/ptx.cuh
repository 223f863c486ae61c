// Every instruction that CUDA C++ has no name for without a header, behind a named wrapper. The emulation has its own
// form of each. On top of them, the number types that kernels are built for.
#pragma once

#include "common.cuh"

#ifdef SPECACHE_EMU
#include "emu/ptx.h"
#else

namespace specache {

// 16 bytes of device memory that nobody reads again: kept out of L1.
SPECACHE_DEVICE uint4 load_streaming(const void* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// 4 bytes of device memory.
SPECACHE_DEVICE uint32_t load_u32(const void* from) { return *static_cast<const uint32_t*>(from); }

// 16 bytes to device memory.
SPECACHE_DEVICE void store_16(void* to, uint4 v) { *static_cast<uint4*>(to) = v; }

// Two fp16 numbers, low half first, as floats.
SPECACHE_DEVICE float2 widen_fp16(uint32_t pair) {
    float2 x;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(x.x) : "r"(pair));
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(x.y) : "r"(pair));
    return x;
}

// Rounded to the nearest, ties to even; x is the low half.
SPECACHE_DEVICE uint32_t narrow_fp16(float x, float y) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(x), "f"(y));
    return pair;
}

SPECACHE_DEVICE uint32_t narrow_bf16(float x, float y) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(x), "f"(y));
    return pair;
}

// The products of two pairs of fp16 numbers.
SPECACHE_DEVICE uint32_t multiply_fp16(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// d += a b for a 16 x 16 tile of fp16 (row-major) and a 16 x 8 tile (column-major), sums in fp32. Lane 4i + j holds
//   a: rows i, i+8 (a0, a1), k 2j, 2j+1, and the same of k + 8 (a2, a3)     b: column i, k 2j, 2j+1 (b0) and k + 8 (b1)
//   d: row i, columns 2j, 2j+1 (d0, d1), row i+8 (d2, d3)
SPECACHE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 tile of 16-bit numbers; lane 4i + j holds row i, columns 2j, 2j+1.
SPECACHE_DEVICE uint32_t transpose_8x8(uint32_t row) {
    uint32_t column;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
    return column;
}

// ---- attention and selection ----

// Any small type from, or to, device memory.
template <class T> SPECACHE_DEVICE T load_device(const T* from) { return *from; }
template <class T> SPECACHE_DEVICE void store_device(T* to, T v) { *to = v; }

// A word that the host waits for. What the threads of the block wrote before their last barrier can be seen before it.
SPECACHE_DEVICE void store_release_system(uint32_t* to, uint32_t v) {
    __threadfence_system();
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(v) : "memory");
}

// 16 bytes of device memory to shared memory, by the thread's own copy queue: kept out of L1. `bytes` = 0 writes zeros
// and reads nothing.
SPECACHE_DEVICE void copy_async_16(void* to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
}

// Ends a batch of the thread's copies.
SPECACHE_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of the thread's youngest batches are under way.
template <int N> SPECACHE_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8 x 8 tiles of 16-bit numbers: lane 8t + r names the 16 bytes of row r of tile t. Lane 4i + j gets row i,
// columns 2j, 2j+1 of each tile; transposed, column i, rows 2j, 2j+1.
SPECACHE_DEVICE void load_tiles(uint32_t (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

SPECACHE_DEVICE void load_tiles_transposed(uint32_t (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

// mma_m16n8k16 for bf16.
SPECACHE_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x within 2 units in the last place; results below 2^-126 are 0.
SPECACHE_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Counts in shared memory (what was there before comes back), bits in device memory: atomic among the threads.
SPECACHE_DEVICE uint32_t shared_add(uint32_t* to, uint32_t v) { return atomicAdd(to, v); }
SPECACHE_DEVICE void device_or(uint32_t* to, uint32_t v) { atomicOr(to, v); }
SPECACHE_DEVICE void device_and(uint32_t* to, uint32_t v) { atomicAnd(to, v); }

// ---- sm_90 and later: bulk copies that complete on a barrier in shared memory ----
#if __CUDA_ARCH__ >= 900

SPECACHE_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// A barrier that one arrival and the expected bytes complete.
SPECACHE_DEVICE void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

SPECACHE_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase with this parity is complete.
SPECACHE_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Global (or pinned host) memory to shared memory; 16-byte aligned, a multiple of 16 bytes.
SPECACHE_DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Shared memory to global memory; joins the thread's current bulk group.
SPECACHE_DEVICE void bulk_store(void* to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until this thread's bulk stores have read their shared memory.
SPECACHE_DEVICE void bulk_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Until this thread's bulk stores are complete.
SPECACHE_DEVICE void bulk_stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

#endif

// ---- the dense half of a step: weights, dependent launches ----

// 16 bytes of weights: nobody writes them while a kernel runs, no CTA reads them twice, and the other half of their
// line is wanted next.
SPECACHE_DEVICE uint4 load_weight(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// blockIdx.x, read from where it stands each time: what is computed from it needs no register in between.
SPECACHE_DEVICE uint32_t block_index() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}

// Programmatic dependent launch: the next kernel may start while this one runs, and must wait before it reads what
// this one writes, or writes what this one reads. Without the launch attribute, and before sm_90, neither does
// anything.
SPECACHE_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until all kernels before this one are complete and their writes can be seen.
SPECACHE_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}   // namespace specache
#endif

namespace specache {

// For a kernel that reads nothing early: it starts when it may, and waits at once.
SPECACHE_DEVICE void follow_previous_kernel() {
    let_next_kernel_start();
    wait_for_previous_kernel();
}

// Two neighbouring 16-bit numbers, low half first: to floats, and rounded from them.
struct Fp16 {
    static SPECACHE_DEVICE float2 widen(uint32_t pair) { return widen_fp16(pair); }
    static SPECACHE_DEVICE uint32_t narrow(float x, float y) { return narrow_fp16(x, y); }
};

struct Bf16 {
    static SPECACHE_DEVICE float2 widen(uint32_t pair) {
        return make_float2(bit_cast<float>(pair << 16), bit_cast<float>(pair & 0xFFFF0000u));
    }
    static SPECACHE_DEVICE uint32_t narrow(float x, float y) { return narrow_bf16(x, y); }
};

// Where a kernel takes 32-bit numbers as well.
struct Fp32 {};

// mma_m16n8k16 by the type of its operands.
SPECACHE_DEVICE void mma_16(Fp16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16(d, a, b0, b1);
}

SPECACHE_DEVICE void mma_16(Bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16_bf16(d, a, b0, b1);
}

}   // namespace specache
