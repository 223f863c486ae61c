/* Loaded before the C library (LD_PRELOAD): fails the n-th call of one kind, to the files of one folder or for large memory,
 * as a system in need does. Made by tests/system_faults.rs.
 *
 *   FAULTY_FOLDER     whose files are meant
 *   FAULTY=kind:n     which call fails, from 0, in a program that does not call faulty_arm; kind+:n and all behind it
 *   FAULTY_REPORT     a file that is made when the fault has struck
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LARGE_MAPPING (64 << 10) /* stacks of signals and the like are smaller */
#define LARGE_BUFFER (2 << 10)

static char kind[16];
static atomic_long left = -1;
static atomic_int struck;
static atomic_char watched[4096];

void faulty_arm(const char *what, long index) {
    left = -1;
    struck = 0;
    strncpy(kind, what, sizeof kind - 1);
    left = index;
}

int faulty_struck(void) { return struck; }

__attribute__((constructor)) static void from_environment(void) {
    const char *fault = getenv("FAULTY"), *colon = fault ? strchr(fault, ':') : NULL;
    if (colon && colon - fault < (long)sizeof kind) {
        memcpy(kind, fault, colon - fault);
        left = atol(colon + 1);
    }
}

static int strikes(const char *what) {
    size_t length = strlen(what);
    int lasting = kind[length] == '+';
    if (strncmp(kind, what, length) != 0 || (kind[length] && !lasting)) return 0;
    long before = left < 0 ? left : atomic_fetch_sub(&left, 1);
    if (before > 0 || (before < 0 && !(lasting && struck))) return 0;
    const char *report = getenv("FAULTY_REPORT");
    if (report) syscall(SYS_close, syscall(SYS_openat, AT_FDCWD, report, O_CREAT | O_WRONLY, 0600));
    return struck = 1;
}

static int is_ours(const char *path) {
    const char *folder = getenv("FAULTY_FOLDER");
    return folder && path && strncmp(path, folder, strlen(folder)) == 0 && path[strlen(folder)] == '/';
}

static int is_watched(int fd) { return fd >= 0 && fd < (int)sizeof watched && watched[fd]; }

static int fail(int error) {
    errno = error;
    return -1;
}

static int open_at(int folder, const char *path, int flags, int mode) {
    int ours = is_ours(path);
    if (ours && strikes("open")) return fail(EIO);
    int fd = syscall(SYS_openat, folder, path, flags, mode);
    if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = ours;
    return fd;
}

#define MODE(flags) va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list)
int open(const char *path, int flags, ...) { MODE(flags); return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags); return open_at(AT_FDCWD, path, flags, mode); }

int close(int fd) {
    if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = 0;
    return syscall(SYS_close, fd);
}

int statx(int folder, const char *restrict path, int flags, unsigned mask, struct statx *restrict out) {
    if (is_ours(path) && strikes("stat")) return fail(EACCES);
    return syscall(SYS_statx, folder, path, flags, mask, out);
}

ssize_t read(int fd, void *to, size_t n) {
    if (is_watched(fd) && strikes("read")) return fail(EIO);
    return syscall(SYS_read, fd, to, n);
}

ssize_t write(int fd, const void *from, size_t n) {
    if (is_watched(fd) && strikes("write")) return fail(ENOSPC);
    return syscall(SYS_write, fd, from, n);
}

int flock(int fd, int operation) {
    if (is_watched(fd) && strikes("lock")) return fail(ENOLCK);
    return syscall(SYS_flock, fd, operation);
}

int rename(const char *from, const char *to) {
    if (is_ours(to) && strikes("rename")) return fail(EIO);
    return syscall(SYS_rename, from, to);
}

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) {
    int ours = flags & MAP_ANONYMOUS ? n >= LARGE_MAPPING && protection & PROT_WRITE : is_watched(fd);
    if (ours && strikes("map")) return errno = ENOMEM, MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, n, protection, flags, fd, offset);
}
void *mmap64(void *at, size_t n, int protection, int flags, int fd, off64_t offset) {
    return mmap(at, n, protection, flags, fd, offset);
}

/* Memory that is aligned to cache lines: buffers of the device. */
extern void *__libc_memalign(size_t, size_t);
int posix_memalign(void **out, size_t alignment, size_t n) {
    if (alignment == 64 && n >= LARGE_BUFFER && strikes("memory")) return ENOMEM;
    return (*out = __libc_memalign(alignment, n)) ? 0 : ENOMEM;
}
