/* Two prompts continued together: every step reads the weights once for both.
 *
 *     cc batch.c $(pkg-config --cflags --libs specache) -o batch
 *     ./batch MODEL "First prompt" "Second prompt" [TOKENS]
 */
#include <specache.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 2 };

static void check(int32_t status, const char *what) {
    if (status != SPECACHE_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, specache_status_name(status), specache_last_error());
        exit(1);
    }
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s MODEL PROMPT PROMPT [TOKENS]\n", argv[0]);
        return 2;
    }
    const size_t n = argc > 4 ? strtoull(argv[4], NULL, 10) : 16;

    specache_engine *engine = NULL;
    check(specache_engine_create(SPECACHE_ABI_VERSION, argv[1], NULL, &engine), "engine");

    specache_step steps[N];
    uint32_t *tokens[N];
    memset(steps, 0, sizeof steps);
    for (int i = 0; i < N; i++) {
        const char *prompt = argv[2 + i];
        /* A token has at least a byte, and a first one may be added. */
        check(specache_session_create(engine, NULL, strlen(prompt) + 1 + n, &steps[i].session), "session");
        check(specache_session_prefill_text(steps[i].session, prompt, strlen(prompt), SPECACHE_ADD_SPECIAL), "prompt");
        check(specache_session_sample(steps[i].session, &steps[i].token), "first token");
        tokens[i] = malloc((n + 1) * sizeof *tokens[i]);
        if (tokens[i] == NULL) {
            return 1;
        }
        tokens[i][0] = steps[i].token;
    }
    for (size_t t = 1; t < n; t++) {
        check(specache_step_batch(steps, N, sizeof steps[0]), "step");
        for (int i = 0; i < N; i++) {
            steps[i].token = tokens[i][t] = steps[i].next;
        }
    }
    for (int i = 0; i < N; i++) {
        size_t length = 0;
        check(specache_detokenize(engine, tokens[i], n, NULL, 0, &length), "length");
        char *text = malloc(length + 1);
        if (text == NULL) {
            return 1;
        }
        check(specache_detokenize(engine, tokens[i], n, text, length + 1, &length), "text");
        printf("%s%s\n", argv[2 + i], text);
        free(text);
        free(tokens[i]);
        specache_session_free(steps[i].session);
    }
    specache_engine_free(engine);
    return 0;
}
