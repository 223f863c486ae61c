/* Streams a completion: the shortest whole program.
 *
 *     cc complete.c $(pkg-config --cflags --libs specache) -o complete
 *     ./complete MODEL "Once upon a time" [TOKENS]
 */
#include <specache.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, specache_last_error());
    return 1;
}

static int32_t show(void *user_data, const specache_token *token) {
    (void)user_data;
    fwrite(token->text, 1, token->n_bytes, stdout);
    return fflush(stdout); /* whoever read has gone: that is not 0, and stops the generation */
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL PROMPT [TOKENS]\n", argv[0]);
        return 2;
    }
    const size_t length = strlen(argv[2]);
    const uint64_t n = argc > 3 ? strtoull(argv[3], NULL, 10) : 64;

    specache_engine *engine = NULL;
    if (specache_engine_create(SPECACHE_ABI_VERSION, argv[1], NULL, &engine) != SPECACHE_OK) {
        return fail("engine");
    }
    specache_session *session = NULL;
    int status = 0;
    /* A token has at least a byte, and a first one may be added. */
    if (specache_session_create(engine, NULL, length + 1 + n, &session) != SPECACHE_OK) {
        status = fail("session");
    } else if (specache_session_prefill_text(session, argv[2], length, SPECACHE_ADD_SPECIAL) != SPECACHE_OK) {
        status = fail("prompt");
    } else if (specache_session_generate(session, n, 0, show, NULL, NULL, NULL) != SPECACHE_OK) {
        status = fail("generation");
    } else {
        specache_session_stats stats;
        stats.struct_size = sizeof stats;
        if (specache_session_get_stats(session, &stats) == SPECACHE_OK) {
            fprintf(stderr, "\n%" PRIu64 " tokens, %" PRIu64 " bytes of them on the host, %" PRIu64 " bytes fetched\n",
                    stats.n_tokens, stats.host_bytes, stats.fetched_bytes);
            if (stats.hit_rate >= 0) { /* not NaN: prompts of less than 128 tokens stay on the device */
                fprintf(stderr, "hit rate %.3f, acceptance %.3f\n", stats.hit_rate, stats.acceptance);
            }
        }
    }
    specache_session_free(session);
    specache_engine_free(engine);
    return status;
}
