/*
 * Lets system calls on the files below a directory fail, or wait, while a switch is on: to be
 * preloaded. FAULTY_DIRECTORY says where, FAULTY_CALLS which (write, sync, make), FAULTY_ERRNO
 * how they fail; 0: they wait. FAULTY_SWITCH is a file: the switch is on while it is there.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_on(void) { return access(getenv("FAULTY_SWITCH"), F_OK) == 0; }

static int path_fails(const char *call, const char *path) {
    const char *directory = getenv("FAULTY_DIRECTORY");
    if (!directory || strncmp(path, directory, strlen(directory))) return 0;
    if (!strstr(getenv("FAULTY_CALLS"), call) || !is_on()) return 0;
    int error = atoi(getenv("FAULTY_ERRNO"));
    while (!error && is_on()) usleep(10000);
    errno = error;
    return error != 0;
}

static int fails(const char *call, int fd) {
    int before = errno;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return path_fails(call, path);
}

#define WRAP(result, name, call, parameters, arguments)                       \
    result name parameters {                                                  \
        result(*real) parameters = dlsym(RTLD_NEXT, #name);                   \
        return fails(call, fd) ? -1 : real arguments;                         \
    }

WRAP(ssize_t, write, "write", (int fd, const void *data, size_t size), (fd, data, size))
WRAP(ssize_t, pwrite, "write", (int fd, const void *data, size_t size, off_t at),
     (fd, data, size, at))
WRAP(ssize_t, pwrite64, "write", (int fd, const void *data, size_t size, off64_t at),
     (fd, data, size, at))
WRAP(ssize_t, pwritev, "write", (int fd, const struct iovec *data, int count, off_t at),
     (fd, data, count, at))
WRAP(ssize_t, pwritev64, "write", (int fd, const struct iovec *data, int count, off64_t at),
     (fd, data, count, at))
WRAP(ssize_t, pwritev2, "write",
     (int fd, const struct iovec *data, int count, off_t at, int flags),
     (fd, data, count, at, flags))
WRAP(ssize_t, pwritev64v2, "write",
     (int fd, const struct iovec *data, int count, off64_t at, int flags),
     (fd, data, count, at, flags))
WRAP(int, fsync, "sync", (int fd), (fd))
WRAP(int, fdatasync, "sync", (int fd), (fd))

#define WRAP_OPEN(name)                                                       \
    int name(const char *path, int flags, ...) {                              \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);        \
        va_list rest;                                                         \
        va_start(rest, flags);                                                \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;             \
        va_end(rest);                                                         \
        int makes = flags & O_CREAT && access(path, F_OK);                    \
        return makes && path_fails("make", path) ? -1 : real(path, flags, mode); \
    }

WRAP_OPEN(open)
WRAP_OPEN(open64)
