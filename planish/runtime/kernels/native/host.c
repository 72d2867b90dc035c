/* Runs compiled TIR functions inside ONNX Runtime: registration, tensors, memory, threads and errors. */
#define _GNU_SOURCE
#include "host.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef PLANISH_AMX
#include <sys/syscall.h>
#endif

/* Filled in by the generated table: what is in this library, and what it needs. */
extern planish_op *const planish_ops[];
extern void planish_setup(void);
extern const char *const planish_features[];
extern const int planish_minor_first, planish_minor_last;

ort_api planish_api;
static _Thread_local ort_context *running;
static _Thread_local char failure[512];

#define API(slot, ...) (((ort_status * (*)(__VA_ARGS__)) planish_api[slot]))

/* ---- errors ---- */

ort_status *planish_error(const char *format, ...) {
  char text[640];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return API(SLOT_CREATE_STATUS, int, const char *)(ORT_FAIL, text);
}

static void forget(ort_status *status) {
  if (status) ((void (*)(ort_status *))planish_api[SLOT_RELEASE_STATUS])(status);
}

/* TVM's compiled code reports what is wrong with its arguments through this. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  size_t used = (size_t)snprintf(failure, sizeof failure, "%s: ", kind);
  for (int32_t i = 0; i < count && used < sizeof failure; ++i)
    used += (size_t)snprintf(failure + used, sizeof failure - used, "%s", parts[i] ? parts[i] : "");
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}

/* ---- memory ---- */

void *planish_allocate(size_t bytes) {
  /* Never 0 bytes, and a multiple of the alignment, as C11 asks. */
  return aligned_alloc(64, (bytes + 64) / 64 * 64);
}

static void *allocate(int type, int id, uint64_t bytes, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  return planish_allocate(bytes);
}

static int release(int type, int id, void *memory) {
  (void)type, (void)id;
  free(memory);
  return 0;
}

/* ---- threads ---- */

typedef struct {
  void *barrier;
  int32_t tasks;
} task_group;
typedef int (*task_function)(int task, task_group *, void *data);

typedef struct {
  task_function run;
  void *data;
  task_group group;
  int failed;
} job;

static void run_task(void *given, size_t task) {
  job *all = given;
  if (all->run((int)task, &all->group, all->data)) __atomic_store_n(&all->failed, 1, __ATOMIC_RELAXED);
}

static long processors = 1; /* asked for once: the C library reads a file for it */

static int launch(task_function run, void *data, int tasks) {
  job all = {run, data, {NULL, (int32_t)(tasks > 0 ? tasks : processors)}, 0};
  if (!running || all.group.tasks == 1) {
    all.group.tasks = 1;
    return run(0, &all.group, data);
  }
  ort_status *status = API(SLOT_PARALLEL_FOR, const ort_context *, void (*)(void *, size_t), size_t, size_t, void *)(
      running, run_task, (size_t)all.group.tasks, 0, &all);
  forget(status);
  return status || all.failed ? -1 : 0;
}

/* Where compiled code looks for these; each is there only if a function of the library uses it. */
extern void *__TVMBackendParallelLaunch __attribute__((weak));
extern void *__TVMBackendAllocWorkspace __attribute__((weak));
extern void *__TVMBackendFreeWorkspace __attribute__((weak));

static void connect(void) {
  long online = sysconf(_SC_NPROCESSORS_ONLN);
  if (online > 0) processors = online;
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = (void *)launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = (void *)allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = (void *)release;
}

/* ---- tensors ---- */

int64_t planish_product(const int64_t *sizes, size_t count) {
  int64_t product = 1;
  for (size_t i = 0; i < count; ++i) product *= sizes[i];
  return product;
}

static ort_status *describe(const ort_value *value, size_t width, tensor *t) {
  void *info = NULL;
  CHECK(API(SLOT_TYPE_AND_SHAPE, const ort_value *, void **)(value, &info));
  ort_status *status = API(SLOT_DIMENSION_COUNT, const void *, size_t *)(info, &t->rank);
  if (!status && t->rank > MAX_RANK) status = planish_error("a tensor has rank %zu; at most %d", t->rank, MAX_RANK);
  if (!status) status = API(SLOT_DIMENSIONS, const void *, int64_t *, size_t)(info, t->shape, t->rank);
  ((void (*)(void *))planish_api[SLOT_RELEASE_TYPE_AND_SHAPE])(info);
  CHECK(status);
  t->bytes = (size_t)planish_product(t->shape, t->rank) * width;
  return API(SLOT_TENSOR_DATA, const ort_value *, void **)(value, &t->home);
}

static ort_status *align(tensor *t, int read) {
  t->copy = NULL;
  t->data = t->home;
  if (t->home && !((uintptr_t)t->home & 63)) return NULL;
  t->data = t->copy = planish_allocate(t->bytes);
  if (!t->copy) return planish_error("no memory for a copy of %zu bytes", t->bytes);
  if (read && t->bytes) memcpy(t->copy, t->home, t->bytes);
  return NULL;
}

ort_status *planish_input_there(ort_context *context, size_t index, size_t width, tensor *t) {
  const ort_value *value = NULL;
  memset(t, 0, sizeof *t);
  CHECK(API(SLOT_INPUT, const ort_context *, size_t, const ort_value **)(context, index, &value));
  if (!value) return planish_error("input %zu is missing", index);
  CHECK(describe(value, width, t));
  t->data = t->home;
  return NULL;
}

ort_status *planish_input(ort_context *context, size_t index, size_t width, tensor *t) {
  CHECK(planish_input_there(context, index, width, t));
  return align(t, 1);
}

ort_status *planish_constant(const ort_info *info, size_t index, size_t width, tensor *t, int *found) {
  const ort_value *value = NULL; /* the session's: not to be released */
  memset(t, 0, sizeof *t);
  *found = 0;
  CHECK(API(SLOT_CONSTANT_INPUT, const ort_info *, size_t, int *, const ort_value **)(info, index, found, &value));
  *found = *found && value;
  if (!*found) return NULL;
  CHECK(describe(value, width, t));
  return align(t, 1);
}

ort_status *planish_output_there(
    ort_context *context, size_t index, size_t width, const int64_t *shape, size_t rank, tensor *t) {
  ort_value *value = NULL;
  memset(t, 0, sizeof *t);
  CHECK(API(SLOT_OUTPUT, ort_context *, size_t, const int64_t *, size_t, ort_value **)(
      context, index, shape, rank, &value));
  memcpy(t->shape, shape, rank * sizeof *shape);
  t->rank = rank;
  t->bytes = (size_t)planish_product(shape, rank) * width;
  CHECK(API(SLOT_TENSOR_DATA, ort_value *, void **)(value, &t->home));
  t->data = t->home;
  return NULL;
}

ort_status *planish_output(
    ort_context *context, size_t index, size_t width, const int64_t *shape, size_t rank, tensor *t) {
  CHECK(planish_output_there(context, index, width, shape, rank, t));
  return align(t, 0);
}

void planish_finish(tensor *t) {
  if (t->copy && t->bytes) memcpy(t->home, t->copy, t->bytes);
  planish_release(t);
}

void planish_release(tensor *t) {
  free(t->copy);
  t->copy = NULL;
}

int64_t planish_int(const ort_info *info, const char *name, int64_t otherwise) {
  int64_t value = otherwise;
  ort_status *status = API(SLOT_ATTRIBUTE_INT, const ort_info *, const char *, int64_t *)(info, name, &value);
  forget(status); /* it is not there */
  return status ? otherwise : value;
}

float planish_float(const ort_info *info, const char *name, float otherwise) {
  float value = otherwise;
  ort_status *status = API(SLOT_ATTRIBUTE_FLOAT, const ort_info *, const char *, float *)(info, name, &value);
  forget(status);
  return status ? otherwise : value;
}

/* ---- calls ---- */

tvm_any planish_argument(dl_tensor *t, void *data, int code, int bits, int rank, int64_t *shape) {
  memset(t, 0, sizeof *t);
  t->data = data;
  t->device.type = 1; /* CPU */
  t->ndim = rank;
  t->dtype.code = (uint8_t)code;
  t->dtype.bits = (uint8_t)bits;
  t->dtype.lanes = 1;
  t->shape = shape;
  tvm_any any = {7, 0, {.pointer = t}};
  return any;
}

tvm_any planish_scalar_int(int64_t value) {
  tvm_any any = {1, 0, {.integer = value}};
  return any;
}

tvm_any planish_scalar_float(double value) {
  tvm_any any = {3, 0, {.real = value}};
  return any;
}

ort_status *planish_call(ort_context *context, tvm_function function, const tvm_any *arguments, int count) {
  tvm_any result = {0, 0, {0}};
  failure[0] = 0;
  ort_context *outer = running;
  running = context;
  int code = function(NULL, arguments, count, &result);
  running = outer;
  return code ? planish_error("kernel failed: %s", failure[0] ? failure : "no memory, or an error in one of its threads") : NULL;
}

/* ---- registration ---- */

static const char *op_name(const ort_custom_op *op) { return ((const planish_op *)op)->name; }
static const char *provider(const ort_custom_op *op) { return (void)op, NULL; }
static size_t input_count(const ort_custom_op *op) { return (size_t)((const planish_op *)op)->inputs; }
static size_t output_count(const ort_custom_op *op) { return (size_t)((const planish_op *)op)->outputs; }
static int input_type(const ort_custom_op *op, size_t i) { return ((const planish_op *)op)->types[i]; }
static int output_type(const ort_custom_op *op, size_t i) {
  const planish_op *all = (const planish_op *)op;
  return all->types[(size_t)all->inputs + i];
}
static int required(const ort_custom_op *op, size_t i) { return (void)op, (void)i, 0; }
static int cpu_memory(const ort_custom_op *op, size_t i) { return (void)op, (void)i, 0; }
static int one(const ort_custom_op *op) { return (void)op, 1; }

void planish_fill(planish_op *all) {
  ort_custom_op *op = &all->op;
  op->version = 16;
  op->name = op_name;
  op->provider = provider;
  op->input_count = input_count;
  op->output_count = output_count;
  op->input_type = input_type;
  op->output_type = output_type;
  op->input_kind = op->output_kind = required;
  op->input_memory = cpu_memory;
  op->variadic_input_arity = op->variadic_output_arity = one;
  op->variadic_input_homogeneous = op->variadic_output_homogeneous = one;
}

#if defined(__x86_64__)
enum { EAX, EBX, ECX, EDX };
/* Where CPUID has a feature (Intel's manual, volume 2), and the parts of the processor's state that the operating
 * system must keep for it (bits of XCR0). The compilers' own __builtin_cpu_supports does not work with all linkers. */
static const struct {
  const char *name;
  unsigned leaf, subleaf, part, bit, state;
} known_features[] = {
    {"fma", 1, 0, ECX, 12, 0x6},          {"movbe", 1, 0, ECX, 22, 0},          {"avx", 1, 0, ECX, 28, 0x6},
    {"f16c", 1, 0, ECX, 29, 0x6},         {"bmi1", 7, 0, EBX, 3, 0},            {"avx2", 7, 0, EBX, 5, 0x6},
    {"bmi2", 7, 0, EBX, 8, 0},            {"avx512f", 7, 0, EBX, 16, 0xe6},     {"avx512dq", 7, 0, EBX, 17, 0xe6},
    {"avx512cd", 7, 0, EBX, 28, 0xe6},    {"avx512bw", 7, 0, EBX, 30, 0xe6},    {"avx512vl", 7, 0, EBX, 31, 0xe6},
    {"amx_bf16", 7, 0, EDX, 22, 0x60000}, {"amx_tile", 7, 0, EDX, 24, 0x60000}, {"avx512_bf16", 7, 1, EAX, 5, 0xe6},
};

static uint64_t kept_state(void) {
  unsigned parts[4], low, high;
  __cpuid_count(1, 0, parts[EAX], parts[EBX], parts[ECX], parts[EDX]);
  if (!(parts[ECX] >> 27 & 1)) return 0; /* no XGETBV */
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

static int has(const char *name) {
  for (size_t i = 0; i < sizeof known_features / sizeof *known_features; ++i) {
    unsigned parts[4], state = known_features[i].state;
    if (strcmp(name, known_features[i].name)) continue;
    if (!__get_cpuid_count(known_features[i].leaf, known_features[i].subleaf, parts, parts + 1, parts + 2, parts + 3))
      return 0;
    if (!(parts[known_features[i].part] >> known_features[i].bit & 1) || (kept_state() & state) != state) return 0;
#ifdef PLANISH_AMX
    /* Linux gives a process the tile registers only if it asks for them: ARCH_REQ_XCOMP_PERM, XTILEDATA. */
    if (!strcmp(name, "amx_tile")) return !syscall(SYS_arch_prctl, 0x1023, 18);
#endif
    return 1;
  }
  return 0;
}
#else
static int has(const char *name) { return !strcmp(name, "asimd"); } /* every 64-bit Arm has it */
#endif

/* NULL, or the first feature that this processor lacks. */
static const char *lacking(void) {
  for (const char *const *at = planish_features; *at; ++at)
    if (!has(*at)) return *at;
  return NULL;
}

/* What all sessions are given: ONNX Runtime never frees a domain. */
static void *shared_domain;

__attribute__((visibility("default"))) ort_status *RegisterCustomOps(void *options, const ort_api_base *base) {
  ort_api api = base->get_api(16);
  if (!api) return NULL; /* no table to make an error with; there is no such version of ONNX Runtime */
  if (planish_api && planish_api != api)
    return ((ort_status * (*)(int, const char *)) api[SLOT_CREATE_STATUS])(
        ORT_FAIL, "planish's kernels are in use by another ONNX Runtime in this process");
  planish_api = api;
  int major = 0, minor = 0;
  sscanf(base->version(), "%d.%d", &major, &minor);
  if (major != 1 || minor < planish_minor_first || minor > planish_minor_last)
    return planish_error(
        "planish's kernels were tested with ONNX Runtime 1.%d to 1.%d, not with %s", planish_minor_first,
        planish_minor_last, base->version());
  const char *feature = lacking();
  if (feature) return planish_error("planish's kernels need %s, which this processor does not have", feature);
  void *domain = __atomic_load_n(&shared_domain, __ATOMIC_ACQUIRE);
  if (!domain) {
    connect();
    planish_setup();
    CHECK(API(SLOT_CREATE_DOMAIN, const char *, void **)("planish", &domain));
    for (planish_op *const *op = planish_ops; *op; ++op)
      CHECK(API(SLOT_DOMAIN_ADD, void *, const ort_custom_op *)(domain, &(*op)->op));
    __atomic_store_n(&shared_domain, domain, __ATOMIC_RELEASE);
  }
  return API(SLOT_ADD_DOMAIN, void *, void *)(options, domain);
}
