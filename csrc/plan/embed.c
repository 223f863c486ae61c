/* The launch plan of embed.cu. */
#include "plan.h"

static const char *kernel_of(specache_dtype dtype) {
#define NAME(type, T) \
    if (dtype == SPECACHE_DTYPE(type)) return "specache_embed_" #type;
    SPECACHE_EMBED_KERNELS(NAME)
#undef NAME
    return NULL;
}

static specache_status check_shape(const specache_embed_params *p, specache_launch *launch) {
    const uint32_t most = p->append_stride == 0 ? SPECACHE_MAX_ROWS : p->append_stride;
    if (p->n_rows > most)
        return refuse(launch, SPECACHE_UNSUPPORTED_ROWS, "embed: %u rows (1 to append_stride, %u)", p->n_rows, most);
    TRY(check_weights("embed", p->dtype, launch));
    if (p->hidden == 0 || p->hidden % 8 != 0 || p->hidden > 1u << 20)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "embed: hidden size %u (multiples of 8 to %u)", p->hidden,
                      1u << 20);
    if (p->vocab == 0) return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "embed: an empty vocabulary");
    return check_rope_dim("embed", p->head_dim, launch);
}

static specache_status check_memory(const specache_embed_params *p, specache_launch *launch) {
    const Address all[] = {{"table", p->table, 16, REQUIRED},       {"tokens", p->tokens, 4, REQUIRED},
                           {"seqs", p->seqs, 16, REQUIRED},         {"caches", p->caches, 16, REQUIRED},
                           {"inv_freq", p->inv_freq, 4, REQUIRED},  {"x", p->x, 16, REQUIRED},
                           {"rope", p->rope, 8, REQUIRED},          {"append", p->append, 8, REQUIRED},
                           {"bad_layer", p->bad_layer, 4, REQUIRED}};
    CHECK_ADDRESSES("embed", all, launch);
    return SPECACHE_OK;
}

specache_status specache_embed_plan(const specache_embed_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_shape(p, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    TRY(check_memory(p, launch));
    return planned(launch, kernel_of(p->dtype), p->n_rows, SPECACHE_EMBED_THREADS);
}
