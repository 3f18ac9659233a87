/* A disk that fails, for benchmarks/survive.py: preloaded (LD_PRELOAD), it looks at writes and reads of files
 * below FAULT_DIR. FAULT_FULL_AFTER: bytes that may be written, then ENOSPC. FAULT_EIO_AFTER: reads that
 * succeed, then EIO for each of FAULT_EIO_COUNT more. Counted in each process on its own. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static long long written, reads;

static int ours(int fd) {
  const char *folder = getenv("FAULT_DIR");
  char link[64], path[PATH_MAX];
  ssize_t n;
  if (!folder || fd < 3) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if ((n = readlink(link, path, sizeof path - 1)) <= 0) return 0;
  path[n] = 0;
  return strncmp(path, folder, strlen(folder)) == 0;
}

static long long limit(const char *name) {
  const char *value = getenv(name);
  return value ? atoll(value) : -1;
}

static int full(int fd, size_t n) {
  long long most = limit("FAULT_FULL_AFTER");
  if (most < 0 || !ours(fd)) return 0;
  if (written + (long long)n > most) { errno = ENOSPC; return 1; }
  written += n;
  return 0;
}

static int broken(int fd) {
  long long after = limit("FAULT_EIO_AFTER"), count = limit("FAULT_EIO_COUNT");
  if (after < 0 || !ours(fd)) return 0;
  if (++reads <= after || reads > after + (count < 0 ? 1 : count)) return 0;
  errno = EIO;
  return 1;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t n) {
  REAL(ssize_t, "write", int, const void *, size_t);
  return full(fd, n) ? -1 : real(fd, data, n);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int);
  size_t n = 0;
  for (int i = 0; i < count; i++) n += parts[i].iov_len;
  return full(fd, n) ? -1 : real(fd, parts, count);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
  REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
  return full(fd, n) ? -1 : real(fd, data, n, at);
}

ssize_t read(int fd, void *data, size_t n) {
  REAL(ssize_t, "read", int, void *, size_t);
  return broken(fd) ? -1 : real(fd, data, n);
}

ssize_t pread64(int fd, void *data, size_t n, off64_t at) {
  REAL(ssize_t, "pread64", int, void *, size_t, off64_t);
  return broken(fd) ? -1 : real(fd, data, n, at);
}

ssize_t pread(int fd, void *data, size_t n, off_t at) {
  REAL(ssize_t, "pread", int, void *, size_t, off_t);
  return broken(fd) ? -1 : real(fd, data, n, at);
}
