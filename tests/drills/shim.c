/* Kills a process, or fails its calls, at the N-th call that changes files in a folder.
 *
 * Compiled and preloaded by tests/drills/storage.py. The environment says what is done:
 *   FAULT_PATH   the folder's name and a slash; a call counts if its path, or its descriptor's, contains it
 *   FAULT_TRACE  a file that gets a line for each call struck: its kind, and the path from FAULT_PATH on
 *   FAULT_KIND   only calls of this kind count: open (for writing), write, sync, rename, mkdir, ...; if unset, all
 *   FAULT_AT     N; if 0, no call is struck, and FAULT_TRACE gets all that count
 *   FAULT_ERRNO  the error; if unset, the process is killed
 * EIO occurs once, like a bad sector; any other error persists, like a full disk.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define HERE AT_FDCWD

static long number(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

/* Counts a call on `path` in the folder `fd`, or on `fd` itself; returns whether it is the N-th. */
static int reached(const char *kind, int fd, const char *path) {
    static atomic_long calls;
    char link[64], full[8192] = "";
    const char *folder = getenv("FAULT_PATH"), *wanted = getenv("FAULT_KIND"), *trace = getenv("FAULT_TRACE");
    if (fd != HERE && (!path || *path != '/')) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, full, 4096);
        snprintf(full + (length > 0 ? length : 0), 4096, "%s", path ? "/" : "");
    }
    strncat(full, path ? path : "", sizeof full - strlen(full) - 1);
    const char *place = folder ? strstr(full, folder) : NULL;
    if (!place || (wanted && strcmp(wanted, kind))) return 0;
    long call = ++calls, at = number("FAULT_AT"), error = number("FAULT_ERRNO");
    int hit = at && (call == at || (call > at && error && error != EIO));
    int out = trace && (hit || !at) ? (int)syscall(SYS_openat, HERE, trace, O_WRONLY | O_APPEND | O_CREAT, 0644) : -1;
    if (out >= 0) {
        dprintf(out, "%s %s\n", kind, place);
        syscall(SYS_close, out);
    }
    return hit;
}

/* Kills the process, or makes the call fail. */
static int strike(void) {
    errno = (int)number("FAULT_ERRNO");
    while (!errno) kill(getpid(), SIGKILL);
    return -1;
}

static int fails(const char *kind, int fd, const char *path) {
    return reached(kind, fd, path) ? strike() : 0;
}

#define OPEN(name, folder, ...)                                            \
    {                                                                      \
        va_list more;                                                      \
        va_start(more, flags);                                             \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;          \
        va_end(more);                                                      \
        if (flags & (O_WRONLY | O_RDWR) && fails("open", folder, path)) return -1; \
        return REAL(name)(__VA_ARGS__, path, flags, mode);                 \
    }
#define PATH(kind, name, arguments, folder, path, ...) \
    int name arguments { return fails(kind, folder, path) ? -1 : REAL(name)(__VA_ARGS__); }

int openat64(int fd, const char *path, int flags, ...) OPEN(openat64, fd, fd)
int open64(const char *path, int flags, ...) OPEN(openat64, HERE, HERE)
int open(const char *path, int flags, ...) OPEN(openat64, HERE, HERE)
PATH("sync", fsync, (int fd), fd, NULL, fd)
PATH("sync", fdatasync, (int fd), fd, NULL, fd)
PATH("truncate", ftruncate64, (int fd, off64_t length), fd, NULL, fd, length)
PATH("chmod", chmod, (const char *path, mode_t mode), HERE, path, path, mode)
PATH("mkdir", mkdir, (const char *path, mode_t mode), HERE, path, path, mode)
PATH("rename", rename, (const char *from, const char *to), HERE, to, from, to)
PATH("link", linkat, (int a, const char *from, int b, const char *to, int flags), b, to, a, from, b, to, flags)
PATH("unlink", unlink, (const char *path), HERE, path, path)
PATH("unlink", unlinkat, (int fd, const char *path, int flags), fd, path, fd, path, flags)
PATH("unlink", rmdir, (const char *path), HERE, path, path)

ssize_t write(int fd, const void *bytes, size_t size) {
    static atomic_int filled;
    long error = number("FAULT_ERRNO");
    if (reached("write", fd, NULL)) {
        /* A full disk takes what fits. */
        if (!error || error == EIO || size < 2 || filled++) return strike();
        return REAL(write)(fd, bytes, size / 2);
    }
    if (!error && size > 1 && reached("half a write", fd, NULL)) {
        REAL(write)(fd, bytes, size / 2);
        return strike();
    }
    return REAL(write)(fd, bytes, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    return fails("write", fd, NULL) ? -1 : REAL(writev)(fd, parts, count);
}
