/* Preloaded (LD_PRELOAD) library that counts the file operations of a process which change something in one directory or below it,
 * logs them, and kills the process or fails the operation at a chosen one. It does nothing before `fault_arm`, or, in a process of
 * its own, before a program starts whose environment has FAULT_DIRECTORY.
 *
 * What is not seen: writes through stdio's buffers (fwrite), through a shared memory mapping (the mapping itself is logged, as
 * "mmap"), and system calls made without the C library.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = 1, FAIL = 2 };
enum { OPEN = 1, WRITE = 2, NAME = 4, REMOVE = 8, SYNC = 16, CLOSE = 32 }; /* classes of operations */
#define DESCRIPTORS 65536

static struct {
    pid_t process; /* 0: dormant. A forked child inherits this and is not it. */
    char directory[PATH_MAX];
    size_t length;
    int log;
    int action, half, lasting, error, failing; /* failing: the classes of operations that the error can hit */
    long at;
    char denied[PATH_MAX]; /* a file that cannot be opened, relative to the directory */
} armed;
static long count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned char written[DESCRIPTORS]; /* descriptors opened for writing below the directory */

#define REAL(result, name, ...)                                   \
    static result (*real)(__VA_ARGS__);                           \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static int is_armed(void) { return armed.process && armed.process == getpid(); }

/* The path without the directory ("" for the directory itself), or NULL if it lies elsewhere. */
static const char *below(int base, const char *path, char *buffer) {
    if (!path) return NULL;
    if (path[0] == '/') {
        snprintf(buffer, PATH_MAX, "%s", path);
    } else {
        char start[PATH_MAX] = "", link[64];
        if (base == AT_FDCWD) {
            if (!getcwd(start, sizeof start)) return NULL;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", base);
            ssize_t length = readlink(link, start, sizeof start - 1);
            if (length < 0) return NULL;
            start[length] = 0;
        }
        if ((size_t)snprintf(buffer, PATH_MAX, "%s%s%s", start, path[0] ? "/" : "", path) >= PATH_MAX) return NULL;
    }
    if (strncmp(buffer, armed.directory, armed.length)) return NULL;
    if (buffer[armed.length] == 0) return buffer + armed.length;
    return buffer[armed.length] == '/' ? buffer + armed.length + 1 : NULL;
}

static const char *of_descriptor(int descriptor, char *buffer) { return below(descriptor, "", buffer); }

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* Count and log an operation. Returns 0 to go on, 1 to do half of it (of a write) and then `after_half`, or the negative errno. */
static int before(int class, const char *operation, const char *path, const char *other, long size) {
    char line[2 * PATH_MAX + 100];
    pthread_mutex_lock(&lock);
    long number = count++;
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\t%ld\n", number, operation, path, other ? other : "", size);
    if (armed.log >= 0 && length > 0) syscall(SYS_write, armed.log, line, (size_t)length);
    pthread_mutex_unlock(&lock);
    if (armed.action == KILL && number == armed.at) {
        if (armed.half && class == WRITE && size > 1) return 1;
        die();
    }
    if (armed.action == FAIL && number >= armed.at && (armed.lasting || number == armed.at) && (class & armed.failing)) {
        if (armed.half && class == WRITE && size > 1 && number == armed.at) return 1;
        return -armed.error;
    }
    return 0;
}

static int fails(int verdict) {
    if (verdict >= 0) return 0;
    errno = -verdict;
    return 1;
}

/* ---- open and close ---- */

static int is_denied(const char *path) { return armed.denied[0] && path && !strcmp(path, armed.denied); }

/* Returns -1 with errno set if the call must not be made. */
static int opening(int base, const char *path, int flags, int *writes) {
    char buffer[PATH_MAX];
    const char *inside = below(base, path, buffer);
    *writes = inside && ((flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC));
    if (is_denied(inside)) {
        errno = EACCES;
        return -1;
    }
    if (!*writes) return 0;
    return fails(before(OPEN, flags & O_TRUNC ? "open-truncate" : "open", inside, NULL, 0)) ? -1 : 0;
}

static int opened(int descriptor, int writes) {
    if (descriptor >= 0 && descriptor < DESCRIPTORS) written[descriptor] = (unsigned char)writes;
    return descriptor;
}

#define MODE                           \
    mode_t mode = 0;                   \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list list;                  \
        va_start(list, flags);         \
        mode = va_arg(list, mode_t);   \
        va_end(list);                  \
    }

#define OPEN_AT_PATH(name)                                                    \
    int name(const char *path, int flags, ...) {                              \
        REAL(int, name, const char *, int, ...);                              \
        MODE int writes = 0;                                                  \
        if (is_armed() && opening(AT_FDCWD, path, flags, &writes)) return -1; \
        return opened(real(path, flags, mode), writes);                       \
    }
OPEN_AT_PATH(open)
OPEN_AT_PATH(open64)

#define OPEN_AT_BASE(name)                                                \
    int name(int base, const char *path, int flags, ...) {                \
        REAL(int, name, int, const char *, int, ...);                     \
        MODE int writes = 0;                                              \
        if (is_armed() && opening(base, path, flags, &writes)) return -1; \
        return opened(real(base, path, flags, mode), writes);             \
    }
OPEN_AT_BASE(openat)
OPEN_AT_BASE(openat64)

#define CREATE(name)                                                                                   \
    int name(const char *path, mode_t mode) {                                                          \
        REAL(int, name, const char *, mode_t);                                                         \
        int writes = 0;                                                                                \
        if (is_armed() && opening(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, &writes)) return -1; \
        return opened(real(path, mode), writes);                                                       \
    }
CREATE(creat)
CREATE(creat64)

/* C++'s std::ofstream opens through fopen, and then writes to the descriptor. */
#define STREAM(name)                                                                                                      \
    FILE *name(const char *path, const char *mode) {                                                                      \
        REAL(FILE *, name, const char *, const char *);                                                                   \
        int writes = 0, flags = mode[0] == 'w' ? O_WRONLY | O_CREAT | O_TRUNC                                             \
                                : mode[0] == 'a' || strchr(mode, '+') ? O_WRONLY | (mode[0] == 'a' ? O_CREAT : 0) : O_RDONLY; \
        if (is_armed() && opening(AT_FDCWD, path, flags, &writes)) return NULL;                                           \
        FILE *stream = real(path, mode);                                                                                  \
        if (stream) opened(fileno(stream), writes);                                                                       \
        return stream;                                                                                                    \
    }
STREAM(fopen)
STREAM(fopen64)

static int is_written(int descriptor) {
    return descriptor >= 0 && descriptor < DESCRIPTORS && written[descriptor] && is_armed();
}

static void closing(int descriptor) {
    char buffer[PATH_MAX];
    if (is_written(descriptor)) {
        const char *inside = of_descriptor(descriptor, buffer);
        if (inside) before(CLOSE, "close", inside, NULL, 0);
        written[descriptor] = 0;
    }
}

int close(int descriptor) {
    REAL(int, close, int);
    closing(descriptor);
    return real(descriptor);
}

int fclose(FILE *stream) {
    REAL(int, fclose, FILE *);
    closing(fileno(stream));
    return real(stream);
}

/* ---- write ---- */

/* As `before`, for a write of `size` bytes to a descriptor. */
static int writing(int descriptor, const char *operation, size_t size) {
    char buffer[PATH_MAX];
    if (!is_written(descriptor)) return 0;
    const char *inside = of_descriptor(descriptor, buffer);
    return inside ? before(WRITE, operation, inside, NULL, (long)size) : 0;
}

static ssize_t after_half(ssize_t result) {
    if (armed.action == KILL) die();
    return result;
}

#define WRITES(name, operation, size, parameters, half, whole, ...) \
    ssize_t name parameters {                                       \
        REAL(ssize_t, name, __VA_ARGS__);                           \
        int verdict = writing(descriptor, operation, size);         \
        if (fails(verdict)) return -1;                              \
        if (verdict == 1) return after_half(real half);             \
        return real whole;                                          \
    }

WRITES(write, "write", size, (int descriptor, const void *data, size_t size), (descriptor, data, size / 2),
       (descriptor, data, size), int, const void *, size_t)
WRITES(pwrite, "pwrite", size, (int descriptor, const void *data, size_t size, off_t offset),
       (descriptor, data, size / 2, offset), (descriptor, data, size, offset), int, const void *, size_t, off_t)
WRITES(pwrite64, "pwrite", size, (int descriptor, const void *data, size_t size, off64_t offset),
       (descriptor, data, size / 2, offset), (descriptor, data, size, offset), int, const void *, size_t, off64_t)
WRITES(sendfile, "sendfile", size, (int descriptor, int source, off_t *offset, size_t size),
       (descriptor, source, offset, size / 2), (descriptor, source, offset, size), int, int, off_t *, size_t)
WRITES(sendfile64, "sendfile", size, (int descriptor, int source, off64_t *offset, size_t size),
       (descriptor, source, offset, size / 2), (descriptor, source, offset, size), int, int, off64_t *, size_t)
WRITES(copy_file_range, "copy_file_range", size,
       (int source, off64_t *from, int descriptor, off64_t *to, size_t size, unsigned int flags),
       (source, from, descriptor, to, size / 2, flags), (source, from, descriptor, to, size, flags), int, off64_t *, int,
       off64_t *, size_t, unsigned int)

static size_t total(const struct iovec *parts, int number) {
    size_t size = 0;
    for (int i = 0; i < number; i++) size += parts[i].iov_len;
    return size;
}

/* The first half of the parts, and half of a single one. */
static ssize_t half_of(int descriptor, const struct iovec *parts, int number) {
    if (number > 1) return syscall(SYS_writev, descriptor, parts, number / 2);
    return syscall(SYS_write, descriptor, parts[0].iov_base, parts[0].iov_len / 2);
}

WRITES(writev, "writev", total(parts, number), (int descriptor, const struct iovec *parts, int number),
       (descriptor, parts, 0) + half_of(descriptor, parts, number), (descriptor, parts, number), int, const struct iovec *, int)

#define RESIZE(name, type)                                                         \
    int name(int descriptor, type size) {                                          \
        REAL(int, name, int, type);                                                \
        char buffer[PATH_MAX];                                                     \
        const char *inside = is_armed() ? of_descriptor(descriptor, buffer) : NULL; \
        if (inside && fails(before(OPEN, "ftruncate", inside, NULL, (long)size))) return -1; \
        return real(descriptor, size);                                             \
    }
RESIZE(ftruncate, off_t)
RESIZE(ftruncate64, off64_t)

#define RESIZE_PATH(name, type)                                                          \
    int name(const char *path, type size) {                                              \
        REAL(int, name, const char *, type);                                             \
        char buffer[PATH_MAX];                                                           \
        const char *inside = is_armed() ? below(AT_FDCWD, path, buffer) : NULL;          \
        if (inside && fails(before(OPEN, "truncate", inside, NULL, (long)size))) return -1; \
        return real(path, size);                                                         \
    }
RESIZE_PATH(truncate, off_t)
RESIZE_PATH(truncate64, off64_t)

#define ALLOCATE(name, type)                                                               \
    int name(int descriptor, type offset, type size) {                                     \
        REAL(int, name, int, type, type);                                                  \
        int verdict = writing(descriptor, "allocate", (size_t)size);                       \
        return verdict < 0 ? -verdict : real(descriptor, offset, size);                    \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define MAP(name, type)                                                                              \
    void *name(void *address, size_t size, int protection, int flags, int descriptor, type offset) { \
        REAL(void *, name, void *, size_t, int, int, int, type);                                     \
        if (descriptor >= 0 && flags & MAP_SHARED && protection & PROT_WRITE && fails(writing(descriptor, "mmap", size))) \
            return MAP_FAILED;                                                                       \
        return real(address, size, protection, flags, descriptor, offset);                           \
    }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

#define SYNCS(name)                                                               \
    int name(int descriptor) {                                                    \
        REAL(int, name, int);                                                     \
        char buffer[PATH_MAX];                                                    \
        const char *inside = is_armed() ? of_descriptor(descriptor, buffer) : NULL; \
        if (inside && fails(before(SYNC, "fsync", inside, NULL, 0))) return -1;   \
        return real(descriptor);                                                  \
    }
SYNCS(fsync)
SYNCS(fdatasync)

/* ---- names ---- */

/* Two paths, one of them may be NULL. Returns -1 with errno set if the call must not be made. */
static int naming(int class, const char *operation, int base, const char *path, int other_base, const char *other) {
    char first[PATH_MAX], second[PATH_MAX];
    if (!is_armed()) return 0;
    const char *inside = below(base, path, first), *target = below(other_base, other, second);
    if (!inside && !target) return 0;
    return fails(before(class, operation, inside ? inside : "(outside)", target, 0)) ? -1 : 0;
}

#define HERE AT_FDCWD
#define NAMES(name, parameters, arguments, check, ...) \
    int name parameters {                              \
        REAL(int, name, __VA_ARGS__);                  \
        if (check) return -1;                          \
        return real arguments;                         \
    }
NAMES(rename, (const char *from, const char *to), (from, to), naming(NAME, "rename", HERE, from, HERE, to), const char *,
      const char *)
NAMES(renameat, (int base, const char *from, int other, const char *to), (base, from, other, to),
      naming(NAME, "rename", base, from, other, to), int, const char *, int, const char *)
NAMES(renameat2, (int base, const char *from, int other, const char *to, unsigned int flags), (base, from, other, to, flags),
      naming(NAME, flags & RENAME_EXCHANGE ? "exchange" : "rename", base, from, other, to), int, const char *, int, const char *,
      unsigned int)
NAMES(link, (const char *from, const char *to), (from, to), naming(NAME, "link", HERE, from, HERE, to), const char *,
      const char *)
NAMES(linkat, (int base, const char *from, int other, const char *to, int flags), (base, from, other, to, flags),
      naming(NAME, "link", base, from, other, to), int, const char *, int, const char *, int)
NAMES(symlink, (const char *text, const char *path), (text, path), naming(NAME, "symlink", HERE, path, HERE, NULL),
      const char *, const char *)
NAMES(symlinkat, (const char *text, int base, const char *path), (text, base, path),
      naming(NAME, "symlink", base, path, HERE, NULL), const char *, int, const char *)
NAMES(mkdir, (const char *path, mode_t mode), (path, mode), naming(NAME, "mkdir", HERE, path, HERE, NULL), const char *, mode_t)
NAMES(mkdirat, (int base, const char *path, mode_t mode), (base, path, mode), naming(NAME, "mkdir", base, path, HERE, NULL), int,
      const char *, mode_t)
NAMES(unlink, (const char *path), (path), naming(REMOVE, "unlink", HERE, path, HERE, NULL), const char *)
NAMES(remove, (const char *path), (path), naming(REMOVE, "unlink", HERE, path, HERE, NULL), const char *)
NAMES(rmdir, (const char *path), (path), naming(REMOVE, "rmdir", HERE, path, HERE, NULL), const char *)
NAMES(unlinkat, (int base, const char *path, int flags), (base, path, flags),
      naming(REMOVE, flags & AT_REMOVEDIR ? "rmdir" : "unlink", base, path, HERE, NULL), int, const char *, int)

/* ---- control ---- */

static int classes_hit_by(int error) {
    switch (error) {
        case ENOSPC: case EDQUOT: return OPEN | WRITE | NAME | SYNC; /* removing makes room */
        case EROFS: return OPEN | WRITE | NAME | REMOVE;
        case EACCES: return OPEN | NAME | REMOVE;
        default: return OPEN | WRITE | NAME | REMOVE | SYNC;
    }
}

/* Begin to count the operations of this process below `directory`, an absolute path without symbolic links.
 *
 * log: a file outside of it that gets a line for each. action: 0, KILL before operation number `at`, or FAIL it with `error` and, if
 * `lasting`, all later ones that such an error can hit. half: where that operation is a write, do half of it first. denied: a file that cannot be opened, relative to the directory; "": none.
 */
void fault_arm(const char *directory, const char *log, int action, long at, int half, int error, int lasting, const char *denied) {
    snprintf(armed.directory, sizeof armed.directory, "%s", directory);
    armed.length = strlen(armed.directory);
    armed.log = log[0] ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    armed.action = action, armed.at = at, armed.half = half;
    armed.error = error, armed.lasting = lasting, armed.failing = classes_hit_by(error);
    snprintf(armed.denied, sizeof armed.denied, "%s", denied);
    count = 0;
    armed.process = getpid();
}

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

__attribute__((constructor)) static void start(void) {
    if (!setting("FAULT_DIRECTORY")[0]) return;
    fault_arm(setting("FAULT_DIRECTORY"), setting("FAULT_LOG"), atoi(setting("FAULT_ACTION")), atol(setting("FAULT_AT")),
              atoi(setting("FAULT_HALF")), atoi(setting("FAULT_ERROR")), atoi(setting("FAULT_LASTING")),
              setting("FAULT_DENIED"));
    unsetenv("FAULT_DIRECTORY"); /* not for the processes that this one starts */
}
