/* A log of one's own, a memory plan before anything is loaded, and a generation that another thread ends.
 *
 *     cc cancel.c $(pkg-config --cflags --libs specache) -lpthread -o cancel
 *     ./cancel MODEL "Once upon a time" [MILLISECONDS]
 */
#define _POSIX_C_SOURCE 200809L
#include <specache.h>

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void check(int32_t status, const char *what) {
    if (status != SPECACHE_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, specache_status_name(status), specache_last_error());
        exit(1);
    }
}

static void on_log(void *user_data, int32_t level, const char *message) {
    fprintf(user_data, "log %d: %s\n", (int)level, message);
}

struct alarm {
    specache_session *session;
    long ms;
};

static void *ring(void *of) {
    const struct alarm *alarm = of;
    const struct timespec time = {alarm->ms / 1000, alarm->ms % 1000 * 1000000};
    nanosleep(&time, NULL);
    check(specache_session_cancel(alarm->session), "cancel");
    return NULL;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL PROMPT [MILLISECONDS]\n", argv[0]);
        return 2;
    }
    specache_kv_options kv;
    check(specache_kv_options_init(&kv, sizeof kv), "options");
    kv.bits = 1;
    kv.top_k = 16;
    const uint64_t room = 2000;
    specache_memory_plan plan;
    plan.struct_size = sizeof plan;
    check(specache_plan(SPECACHE_ABI_VERSION, argv[1], &kv, room, &plan), "plan");
    printf("plan: %" PRIu64 " bytes on the device, %" PRIu64 " on the host\n", plan.device_bytes, plan.host_bytes);

    specache_engine_options options;
    check(specache_engine_options_init(&options, sizeof options), "options");
    options.log = on_log;
    options.log_user_data = stdout;
    options.log_level = SPECACHE_LOG_DEBUG;
    options.host_kv_budget = 1 << 30;
    specache_engine *engine = NULL;
    check(specache_engine_create(SPECACHE_ABI_VERSION, argv[1], &options, &engine), "engine");

    struct alarm alarm = {NULL, argc > 3 ? atol(argv[3]) : 100};
    check(specache_session_create(engine, &kv, room, &alarm.session), "session");
    check(specache_session_prefill_text(alarm.session, argv[2], strlen(argv[2]), SPECACHE_ADD_SPECIAL), "prompt");
    pthread_t thread;
    if (pthread_create(&thread, NULL, ring, &alarm) != 0) {
        return 1;
    }
    /* Until it is cancelled, or full. */
    uint64_t generated = 0;
    const int32_t status =
        specache_session_generate(alarm.session, UINT64_MAX, SPECACHE_IGNORE_EOS, NULL, NULL, &generated, NULL);
    pthread_join(thread, NULL);
    printf("ended: %s\n", specache_status_name(status));
    fprintf(stderr, "%" PRIu64 " tokens until then\n", generated);

    /* The session goes on from there; an alarm that came too late is not meant for this call. */
    check(specache_session_clear_cancel(alarm.session), "clear");
    uint64_t more = 0;
    check(specache_session_generate(alarm.session, 4, SPECACHE_IGNORE_EOS, NULL, NULL, &more, NULL), "going on");
    printf("went on: %" PRIu64 " tokens\n", more);
    specache_session_free(alarm.session);
    specache_engine_free(engine);
    return 0;
}
