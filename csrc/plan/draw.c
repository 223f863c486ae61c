/* The launch plan of draw.cu. */
#include "plan.h"

specache_status specache_draw_plan(const specache_draw_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_rows("draw", p->n_draws, launch));
    if (p->vocab == 0 || p->vocab > SPECACHE_DRAW_MOST_VOCAB)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "draw: a vocabulary of %u (1 to %u)", p->vocab,
                      SPECACHE_DRAW_MOST_VOCAB);
    if (p->n_draws == 0) return SPECACHE_OK;
    const Address all[] = {{"draws", p->draws, 8, REQUIRED},
                           {"logits", p->logits, 4, REQUIRED},
                           {"choices", p->choices, 16, REQUIRED},
                           {"tokens", p->tokens, 4, OPTIONAL}};
    CHECK_ADDRESSES("draw", all, launch);
    return planned(launch, "specache_draw_tokens", p->n_draws, SPECACHE_DRAW_THREADS);
}
