// What the two kernels of a decode step's attention have in common: units, and parts of what they find.
#pragma once

#include "seq.cuh"
#include "attn_work.h"

namespace specache {

constexpr uint32_t kAttnThreads = SPECACHE_ATTN_THREADS;
constexpr float kNothingSeen = -1e30f;   // a maximum of no score: finite, so that differences are numbers

// Of one sequence.
SPECACHE_DEVICE uint32_t units_of(const specache_attn_params& p, uint32_t seq_index) {
    if (seq_index >= p.n_seqs) return 0;
    const specache_seq seq = load_seq(p.seqs, seq_index);
    const SeqWork work = seq_work(&p, &seq);
    return seq_units(&work, p.n_kv_heads);
}

}   // namespace specache
