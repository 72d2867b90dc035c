/* Runs the steps of a relational program one after the other: compiled TIR functions, clears and copies. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

/* TVM's packed calling convention, and DLPack's tensor. */
typedef struct {
  int32_t type;
  uint32_t padding;
  void *pointer;
} any;
typedef int (*function)(void *self, const any *arguments, int32_t count, any *result);
typedef struct {
  void *data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} tensor;

enum { CALL = 0, CLEAR = 1, COPY = 2 };
typedef struct {
  int64_t kind, index; /* of the function, if it is a call */
  const any *arguments;
  int64_t count;
  tensor *to, *from;
  int64_t to_offset, from_offset, bytes;
} step;

extern const function planish_relational_functions[]; /* generated */

static _Thread_local char failure[512];
static _Thread_local int threads = 1;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  size_t used = (size_t)snprintf(failure, sizeof failure, "%s: ", kind);
  for (int32_t i = 0; i < count && used < sizeof failure; ++i)
    used += (size_t)snprintf(failure + used, sizeof failure - used, "%s", parts[i] ? parts[i] : "");
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}

static void *allocate(int type, int id, uint64_t bytes, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  return aligned_alloc(64, (bytes + 64) / 64 * 64);
}

static int release(int type, int id, void *memory) {
  (void)type, (void)id;
  free(memory);
  return 0;
}

typedef struct {
  void *barrier;
  int32_t tasks;
} task_group;
typedef int (*task_function)(int task, task_group *, void *data);
typedef struct {
  task_function run;
  void *data;
  task_group *group;
  int task, failed;
} job;

/* Results below the smallest normal number are 0: sums of such numbers take a hundred times as long as others. */
static unsigned flush_denormals(void) {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
#else
  return 0;
#endif
}

static void restore(unsigned before) {
#if defined(__x86_64__)
  _mm_setcsr(before);
#else
  (void)before;
#endif
}

static void *work(void *given) {
  job *own = given;
  flush_denormals();
  own->failed = own->run(own->task, own->group, own->data) != 0;
  return NULL;
}

static int launch(task_function run, void *data, int tasks) {
  task_group group = {NULL, (int32_t)(tasks > 0 ? tasks : threads)};
  if (group.tasks <= 1) {
    group.tasks = 1;
    return run(0, &group, data);
  }
  job *jobs = calloc((size_t)group.tasks, sizeof *jobs);
  pthread_t *started = calloc((size_t)group.tasks, sizeof *started);
  int failed = !jobs || !started;
  for (int i = 0; !failed && i < group.tasks; ++i) {
    jobs[i] = (job){run, data, &group, i, 0};
    /* Where a thread can not be made, its part is done here. */
    if (i && pthread_create(&started[i], NULL, work, &jobs[i])) started[i] = 0, work(&jobs[i]);
  }
  if (!failed) work(&jobs[0]);
  for (int i = 0; !failed && i < group.tasks; ++i)
    if (i && started[i]) pthread_join(started[i], NULL);
  for (int i = 0; jobs && i < group.tasks; ++i) failed |= jobs[i].failed;
  free(jobs), free(started);
  return failed ? -1 : 0;
}

/* Where compiled code looks for these; each is there only if a function of the library uses it. */
extern void *__TVMBackendParallelLaunch __attribute__((weak));
extern void *__TVMBackendAllocWorkspace __attribute__((weak));
extern void *__TVMBackendFreeWorkspace __attribute__((weak));

__attribute__((constructor)) static void connect_runtime(void) {
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = (void *)launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = (void *)allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = (void *)release;
}

/* NULL, or what went wrong. */
EXPORT const char *planish_relational_run(const step *steps, int64_t count, int32_t thread_count) {
  unsigned before = flush_denormals();
  threads = thread_count;
  failure[0] = 0;
  int failed = 0;
  for (int64_t i = 0; i < count && !failed; ++i) {
    const step *s = &steps[i];
    any result = {0, 0, NULL};
    if (s->kind == CALL)
      failed = planish_relational_functions[s->index](NULL, s->arguments, (int32_t)s->count, &result);
    else if (s->kind == CLEAR)
      memset((char *)s->to->data + s->to_offset, 0, (size_t)s->bytes);
    else if (s->bytes)
      memmove((char *)s->to->data + s->to_offset, (const char *)s->from->data + s->from_offset, (size_t)s->bytes);
  }
  restore(before);
  return failed ? (failure[0] ? failure : "no memory, or an error in one of its threads") : NULL;
}
