// A sequence's place in this step, as kernels read it.
#pragma once

#include "ptx.cuh"

namespace specache {

SPECACHE_DEVICE specache_seq load_seq(uint64_t seqs, uint32_t index) {
    const uint4* at = reinterpret_cast<const uint4*>(seqs) + 2 * index;
    const uint4 halves[2] = {load_device(at), load_device(at + 1)};
    return bit_cast<specache_seq>(halves);
}

}   // namespace specache
