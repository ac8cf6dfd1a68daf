// Makes a worker of a bridge late after it has told an outcome, and counts allocations of the size of an eager buffer;
// loaded ahead of the C library (LD_PRELOAD).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

enum { EAGER_BYTES = 262144, LATE_US = 5000, NAME = 16 };

extern void* __libc_memalign(size_t, size_t);

static _Atomic long eager_buffers;
static _Thread_local int has_told;

long eager_buffers_so_far(void) {
  return eager_buffers;
}

int posix_memalign(void** where, size_t alignment, size_t size) {
  if (size == EAGER_BYTES) ++eager_buffers;
  *where = __libc_memalign(alignment, size);
  return *where != NULL ? 0 : 12;  // ENOMEM
}

int pthread_cond_broadcast(pthread_cond_t* condition) {
  static int (*real)(pthread_cond_t*);
  // Without the version dlsym finds one that takes conditions of another size.
  if (real == NULL) real = (int (*)(pthread_cond_t*))dlvsym(RTLD_NEXT, "pthread_cond_broadcast", "GLIBC_2.3.2");
  char name[NAME] = "";
  pthread_getname_np(pthread_self(), name, sizeof name);
  has_told = strncmp(name, "mimo-recv", 9) == 0;
  return real(condition);
}

int pthread_mutex_unlock(pthread_mutex_t* mutex) {
  static int (*real)(pthread_mutex_t*);
  if (real == NULL) real = (int (*)(pthread_mutex_t*))dlsym(RTLD_NEXT, "pthread_mutex_unlock");
  const int result = real(mutex);
  if (has_told) {
    has_told = 0;
    usleep(LATE_US);
  }
  return result;
}
