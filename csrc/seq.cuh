// A sequence's place in this step and where its cache lies, as kernels read them.
#pragma once

#include "ptx.cuh"

namespace specache {

SPECACHE_DEVICE specache_seq load_seq(uint64_t seqs, uint32_t index) {
    const uint4* at = reinterpret_cast<const uint4*>(seqs) + 2 * index;
    const uint4 halves[2] = {load_device(at), load_device(at + 1)};
    return bit_cast<specache_seq>(halves);
}

// Of one layer: `caches` is its part of the table.
SPECACHE_DEVICE specache_layer_cache load_cache(uint64_t caches, uint32_t index) {
    const uint4* at = reinterpret_cast<const uint4*>(caches) + 4 * index;
    const uint4 quarters[4] = {load_device(at), load_device(at + 1), load_device(at + 2), load_device(at + 3)};
    return bit_cast<specache_layer_cache>(quarters);
}

}   // namespace specache
