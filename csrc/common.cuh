// What every kernel file needs: function qualifiers that also compile on the host, and bit casts. No header of CUDA:
// NVRTC compiles kernels where there is none.
#pragma once

#ifdef SPECACHE_EMU
#include "emu/cuda.h"
#endif

#include "abi.h"

#ifdef __CUDACC__
#define SPECACHE_HOST_DEVICE __host__ __device__ __forceinline__
#define SPECACHE_DEVICE __device__ __forceinline__
#define SPECACHE_DEVICE_CALL static __device__ __noinline__   // where what it needs must not cost the caller registers
#else
#define SPECACHE_HOST_DEVICE inline
#define SPECACHE_DEVICE inline
#define SPECACHE_DEVICE_CALL static
#endif

// The block's shared memory as one struct: the emulation gives it from the heap, poisoned, so that a read before the
// write or beyond the end is seen.
#ifdef SPECACHE_EMU
#define SPECACHE_SHARED(Type, name) Type& name = emu::block_shared<Type>()
#else
#define SPECACHE_SHARED(Type, name) __shared__ Type name
#endif

// Shared memory whose size the launch names, 128-byte aligned.
#ifdef SPECACHE_EMU
#define SPECACHE_DYNAMIC_SHARED(name) \
    uint8_t* name = reinterpret_cast<uint8_t*>(emu::Block::current().dynamic_shared.data())
#else
#define SPECACHE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint8_t name[]
#endif

namespace specache {

template <class To, class From> SPECACHE_HOST_DEVICE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof(To));
    return to;
}

}   // namespace specache
