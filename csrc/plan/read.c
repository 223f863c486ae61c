/* The launch plan of read.cu. */
#include "plan.h"

specache_status specache_read_plan(const specache_read_params *p, specache_launch *launch) {
    clear(launch);
    if (p->bytes % 16 != 0)
        return refuse(launch, SPECACHE_BAD_STRIDE, "read: %llu bytes: not a multiple of 16",
                      (unsigned long long)p->bytes);
    if (p->bytes == 0 || p->n_ctas == 0) return SPECACHE_OK;
    const Address all[] = {{"from", p->from, 16, REQUIRED}, {"parities", p->parities, 4, REQUIRED}};
    CHECK_ADDRESSES("read", all, launch);
    return planned(launch, "specache_read", p->n_ctas, SPECACHE_READ_THREADS);
}
