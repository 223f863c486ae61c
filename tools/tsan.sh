#!/usr/bin/env bash
# Looks for data races in a test, with ThreadSanitizer on the stable toolchain.
#
#   tools/tsan.sh TEST [ARGUMENT...]     such as: SPECACHE_STRESS_SECONDS=60 tools/tsan.sh capi_stress
#
# The toolchain's own library is not instrumented, and without its sources cannot be. Most of what it synchronises with is
# compiled into our code all the same, as it is generic or inline; what is not is wrapped here, so that ThreadSanitizer hears of
# it: waits for locks, condition variables, what is done once. And the fence at the end of an Arc, which it does not know.
# Left are false reports of what the library's threads do with each other at their ends (docs/testing.md).
set -euo pipefail
test=${1:?usage: tools/tsan.sh TEST [ARGUMENT...]}
shift
cd "$(dirname "$0")/.."
triple=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=$PWD/target/tsan RUSTC_BOOTSTRAP=1
export RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer"
mkdir -p "$CARGO_TARGET_DIR"

# A function of the library, by the end of its mangled name.
symbols=$(nm -D --defined-only "$(rustc --print target-libdir)"/libstd-*.so | cut -d' ' -f3)
named() { grep -E "^_RN.*3sys4sync.*$1\$" <<<"$symbols"; }
arguments=(-Clink-arg=-Wl,--wrap=__tsan_atomic64_fetch_sub)
# wrap NAME WHAT-THE-HEADERS-CALL-IT
wrap() {
    [ -n "$2" ] || { echo "tsan: this toolchain's library has no function for $1" >&2; exit 1; }
    arguments+=("-Clink-arg=-Wl,--wrap=$2")
    printf '#define %s(prefix) __asm__(prefix "%s")\n' "$1" "$2"
}
shim=$CARGO_TARGET_DIR/shim.c
{
    wrap MUTEX_LOCK "$(named 5Mutex14lock_contended)"
    wrap READ_LOCK "$(named 6RwLock14read_contended)"
    wrap WRITE_LOCK "$(named 6RwLock15write_contended)"
    wrap WAIT "$(named 7Condvar4wait)"
    wrap ONCE "$(named 4Once4call)"
    cat <<'C'
#include <stdint.h>
void __tsan_acquire(void *), __tsan_release(void *);

void real_mutex_lock(void *lock) MUTEX_LOCK("__real_");
void mutex_lock(void *lock) MUTEX_LOCK("__wrap_");
void mutex_lock(void *lock) {
    real_mutex_lock(lock);
    __tsan_acquire(lock);
}

/* The state is one of the two words of an RwLock. */
static void locked(char *lock) {
    __tsan_acquire(lock);
    __tsan_acquire(lock + 4);
}
void real_read_lock(void *lock) READ_LOCK("__real_");
void read_lock(void *lock) READ_LOCK("__wrap_");
void read_lock(void *lock) {
    real_read_lock(lock);
    locked(lock);
}
void real_write_lock(void *lock) WRITE_LOCK("__real_");
void write_lock(void *lock) WRITE_LOCK("__wrap_");
void write_lock(void *lock) {
    real_write_lock(lock);
    locked(lock);
}

void real_wait(void *condvar, void *mutex) WAIT("__real_");
void wait_for(void *condvar, void *mutex) WAIT("__wrap_");
void wait_for(void *condvar, void *mutex) {
    __tsan_release(mutex);
    real_wait(condvar, mutex);
    __tsan_acquire(mutex);
}

void real_once(void *once, uint64_t flag, void *what, void *table, void *from) ONCE("__real_");
void once(void *once, uint64_t flag, void *what, void *table, void *from) ONCE("__wrap_");
void once(void *once, uint64_t flag, void *what, void *table, void *from) {
    real_once(once, flag, what, table, from);
    __tsan_release(once);
    __tsan_acquire(once);
}

/* Counts of references go down with release, and a fence behind the last: here each acquires, too (4). */
int64_t __real___tsan_atomic64_fetch_sub(volatile int64_t *, int64_t, int);
int64_t __wrap___tsan_atomic64_fetch_sub(volatile int64_t *at, int64_t by, int order) {
    (void)order;
    return __real___tsan_atomic64_fetch_sub(at, by, 4);
}
C
} >"$shim"
cc -O1 -Wall -Wno-nonnull -c "$shim" -o "${shim%.c}.o"
arguments+=("-Clink-arg=${shim%.c}.o")

cargo rustc --release --locked --target "$triple" --test "$test" -- "${arguments[@]}"
# The newest is the one that has just been linked.
program=$(find "$CARGO_TARGET_DIR/$triple/release/deps" -name "$test-*" -executable -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2)
TSAN_OPTIONS=history_size=7 "$program" --nocapture "$@"
