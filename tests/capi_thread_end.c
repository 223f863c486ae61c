/* For tests/capi.rs: calls at a thread's very end, when the library's own data of that thread may be gone.
 *
 *     capi_thread_end MODEL
 */
#include <specache.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static pthread_key_t key;
static int rounds;

/* Runs with the destructors of thread-local data, again and again while it sets its value. */
static void at_end(void *data) {
    specache_session *session = data;
    uint32_t id = 1;
    if (specache_session_step(NULL, 1, NULL, 0) != SPECACHE_ERR_HANDLE || specache_last_error() == NULL ||
        specache_session_step(session, 1u << 30, NULL, 0) != SPECACHE_ERR_USAGE ||
        specache_session_prefill(session, &id, 1) != SPECACHE_OK || specache_session_step(session, 1, NULL, 0) != SPECACHE_OK) {
        fprintf(stderr, "round %d: %s\n", rounds, specache_last_error());
        exit(1);
    }
    if (++rounds < 4) {
        pthread_setspecific(key, data);
    }
}

static void *run(void *data) {
    pthread_setspecific(key, data);
    return specache_session_step(NULL, 1, NULL, 0) == SPECACHE_ERR_HANDLE ? data : NULL;
}

int main(int argc, char **argv) {
    specache_engine *engine = NULL;
    specache_session *session = NULL;
    pthread_t thread;
    void *result = NULL;
    if (argc != 2 || specache_engine_create(SPECACHE_ABI_VERSION, argv[1], NULL, &engine) != SPECACHE_OK ||
        specache_session_create(engine, NULL, 64, &session) != SPECACHE_OK || pthread_key_create(&key, at_end) != 0 ||
        pthread_create(&thread, NULL, run, session) != 0 || pthread_join(thread, &result) != 0) {
        fprintf(stderr, "%s\n", specache_last_error());
        return 1;
    }
    printf("%d rounds\n", rounds);
    specache_session_free(session);
    specache_engine_free(engine);
    return result != session;
}
