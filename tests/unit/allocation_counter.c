// Counts what the calling thread allocates; loaded ahead of the C library (LD_PRELOAD).
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_memalign(size_t, size_t);

static _Thread_local long count;

long allocations_of_this_thread(void) { return count; }

void* malloc(size_t size) {
  ++count;
  return __libc_malloc(size);
}

void* calloc(size_t number, size_t size) {
  ++count;
  return __libc_calloc(number, size);
}

void* memalign(size_t alignment, size_t size) {
  ++count;
  return __libc_memalign(alignment, size);
}

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** where, size_t alignment, size_t size) {
  *where = memalign(alignment, size);
  return *where != NULL ? 0 : 12;  // ENOMEM
}
