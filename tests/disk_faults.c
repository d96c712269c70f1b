/* Lets calls below a folder fail as some file systems and dying disks do. Preloaded by
 * tests/unit/test_disk_faults.py.
 *
 * FAULT_FOLDER: only paths below it are concerned. FAULTS: CALL=ERRNO[@COUNT],... : the call fails
 * with that number, after COUNT calls that work. The calls: chmod, link, symlink, rename, fsync,
 * fsyncdir, write, create (a file opened for writing), mkdir, lock; and name=ERRNO@LENGTH for names
 * that are longer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

static int below(int dir, const char *path) {
    const char *folder = getenv("FAULT_FOLDER");
    char whole[2 * PATH_MAX], base[PATH_MAX], link[64];
    if (!folder || !path) return 0;
    if (path[0] != '/') {
        ssize_t size;
        if (dir == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            size = readlink(link, base, sizeof base - 1);
            if (size < 0) return 0;
            base[size] = 0;
        }
        snprintf(whole, sizeof whole, "%s/%s", base, path);
        path = whole;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(AT_FDCWD, path);
}

static const char *rule(const char *call) {
    const char *at = getenv("FAULTS");
    size_t length = strlen(call);
    while (at && *at) {
        if (strncmp(at, call, length) == 0 && at[length] == '=') return at + length + 1;
        at = strchr(at, ',');
        if (at) at++;
    }
    return NULL;
}

static long after(const char *found) {
    const char *at = strchr(found, '@'), *end = strchr(found, ',');
    return at && (!end || at < end) ? atol(at + 1) : 0;
}

static int fails(const char *call, int *done) {
    const char *found = rule(call);
    if (!found || (*done)++ < after(found)) return 0;
    errno = atoi(found);
    return 1;
}

static int too_long(const char *path) {
    const char *found = rule("name"), *name = strrchr(path, '/');
    if (!found || (long)strlen(name ? name + 1 : path) <= after(found)) return 0;
    errno = atoi(found);
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(result, name, call, where, parameters, arguments)             \
    result name parameters {                                              \
        static int done;                                                  \
        if ((where) && fails(call, &done)) return -1;                     \
        return REAL(name) arguments;                                      \
    }

CALL(int, chmod, "chmod", below(AT_FDCWD, p), (const char *p, mode_t m), (p, m))
CALL(int, fchmod, "chmod", below_fd(fd), (int fd, mode_t m), (fd, m))
CALL(int, fchmodat, "chmod", below(d, p), (int d, const char *p, mode_t m, int f), (d, p, m, f))
CALL(int, link, "link", below(AT_FDCWD, q), (const char *p, const char *q), (p, q))
CALL(int, linkat, "link", below(e, q), (int d, const char *p, int e, const char *q, int f),
     (d, p, e, q, f))
CALL(int, symlink, "symlink", below(AT_FDCWD, q), (const char *p, const char *q), (p, q))
CALL(int, symlinkat, "symlink", below(d, q), (const char *p, int d, const char *q), (p, d, q))
CALL(int, rename, "rename", below(AT_FDCWD, q), (const char *p, const char *q), (p, q))
CALL(int, renameat, "rename", below(e, q), (int d, const char *p, int e, const char *q),
     (d, p, e, q))
CALL(ssize_t, write, "write", below_fd(fd), (int fd, const void *b, size_t n), (fd, b, n))
CALL(ssize_t, sendfile, "write", below_fd(fd), (int fd, int in, off_t *o, size_t n), (fd, in, o, n))
CALL(ssize_t, sendfile64, "write", below_fd(fd), (int fd, int in, off64_t *o, size_t n),
     (fd, in, o, n))
CALL(int, flock, "lock", below_fd(fd), (int fd, int how), (fd, how))

int fsync(int fd) {
    static int files, folders;
    struct stat found;
    if (below_fd(fd) && fstat(fd, &found) == 0 &&
        (S_ISDIR(found.st_mode) ? fails("fsyncdir", &folders) : fails("fsync", &files)))
        return -1;
    return REAL(fsync)(fd);
}

int mkdir(const char *path, mode_t mode) {
    static int done;
    if (below(AT_FDCWD, path) && (too_long(path) || fails("mkdir", &done))) return -1;
    return REAL(mkdir)(path, mode);
}

static int refused(int dir, const char *path, int flags) {
    static int done;
    return flags & (O_WRONLY | O_RDWR | O_CREAT) && below(dir, path) &&
           (too_long(path) || fails("create", &done));
}

#define MODE                               \
    mode_t mode = 0;                       \
    if (flags & (O_CREAT | O_TMPFILE)) {   \
        va_list rest;                      \
        va_start(rest, flags);             \
        mode = (mode_t)va_arg(rest, int);  \
        va_end(rest);                      \
    }

int open(const char *path, int flags, ...) {
    MODE
    return refused(AT_FDCWD, path, flags) ? -1 : REAL(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE
    return refused(AT_FDCWD, path, flags) ? -1 : REAL(open64)(path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...) {
    MODE
    return refused(dir, path, flags) ? -1 : REAL(openat)(dir, path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...) {
    MODE
    return refused(dir, path, flags) ? -1 : REAL(openat64)(dir, path, flags, mode);
}
