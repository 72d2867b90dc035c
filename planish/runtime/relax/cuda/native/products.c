// Products by cuBLASLt, which is found when the first one runs: y = activation(alpha a b + bias) + residual over
// row-major matrices. Rows of one matrix are columns of its transpose, so that yᵀ = bᵀ aᵀ is what the library is asked for.
#include "calls.h"

// Numbers of cublasLt.h that its ABI fixes.
enum { REAL32 = 0, REAL16 = 2, BFLOAT16 = 14, COMPUTE32 = 68 };
enum { DESC_TRANSPOSE_A = 3, DESC_EPILOGUE = 7, DESC_BIAS = 8 };
enum { LAYOUT_BATCH = 5, LAYOUT_STRIDE = 6 };
enum { PREFER_WORKSPACE = 1, PREFER_ALIGNMENT_A = 5 };
enum { EPILOGUE_NONE = 1, EPILOGUE_RELU = 2, EPILOGUE_BIAS = 4 };
enum { BIAS = 1, RESIDUAL = 2, RELU = 4, TRANSPOSED = 8 };  // flags of a call
#define PLANS 1024

typedef struct {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
} Choice;

static struct {
  int (*create)(void **);
  int (*desc)(void **, int, int);
  int (*desc_set)(void *, int, const void *, size_t);
  int (*desc_free)(void *);
  int (*layout)(void **, int, uint64_t, uint64_t, int64_t);
  int (*layout_set)(void *, int, const void *, size_t);
  int (*layout_free)(void *);
  int (*preference)(void **);
  int (*preference_set)(void *, int, const void *, size_t);
  int (*preference_free)(void *);
  int (*choose)(void *, void *, void *, void *, void *, void *, void *, int, Choice *, int *);
  int (*multiply)(void *, void *, const void *, const void *, void *, const void *, void *, const void *, const void *,
                  void *, void *, void *, const void *, void *, size_t, void *);
} lt;

// What a choice of an algorithm depends on.
typedef struct {
  int64_t m, n, k, batch, a_stride, b_stride;
  uint64_t workspace;
  int type, out, flags, device, alignment, beta;
} Shape;

typedef struct {
  Shape shape;
  void *desc, *a, *b, *y;
  Choice choice;
} Plan;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *handles[DEVICES];
static Plan *plans[PLANS];

static int find_library(void) {
  static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11", "libcublasLt.so"};
  static const char *const symbols[] = {
      "cublasLtCreate", "cublasLtMatmulDescCreate", "cublasLtMatmulDescSetAttribute", "cublasLtMatmulDescDestroy",
      "cublasLtMatrixLayoutCreate", "cublasLtMatrixLayoutSetAttribute", "cublasLtMatrixLayoutDestroy",
      "cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceSetAttribute", "cublasLtMatmulPreferenceDestroy",
      "cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmul"};
  if (lt.multiply) return 0;
  void *library = NULL;
  for (size_t i = 0; i < sizeof names / sizeof *names && !library; ++i) library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
  if (!library) return failed("products", "cuBLAS (libcublasLt.so) is not found: pip install nvidia-cublas", 0);
  void *found[sizeof symbols / sizeof *symbols];
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; ++i)
    if (!(found[i] = dlsym(library, symbols[i]))) return failed("products: cuBLAS lacks", symbols[i], 0);
  memcpy(&lt, found, sizeof lt);
  return 0;
}

static int layout(void **made, int type, int64_t rows, int64_t columns, const Shape *shape, int64_t stride) {
  int code = lt.layout(made, type, rows, columns, rows);
  int32_t batch = (int32_t)shape->batch;
  if (!code && batch > 1) code = lt.layout_set(*made, LAYOUT_BATCH, &batch, sizeof batch);
  if (!code && batch > 1) code = lt.layout_set(*made, LAYOUT_STRIDE, &stride, sizeof stride);
  return code;
}

static void drop(Plan *plan) {
  if (plan->desc) lt.desc_free(plan->desc);
  if (plan->a) lt.layout_free(plan->a);
  if (plan->b) lt.layout_free(plan->b);
  if (plan->y) lt.layout_free(plan->y);
  free(plan);
}

static int prepare(Plan *plan, const void *bias) {
  const Shape *s = &plan->shape;
  int32_t yes = 1;
  uint32_t epilogue = EPILOGUE_NONE;
  if (s->flags & BIAS) epilogue = EPILOGUE_BIAS;
  if (s->flags & RELU) epilogue = s->flags & BIAS ? (EPILOGUE_BIAS | EPILOGUE_RELU) : EPILOGUE_RELU;
  int code = lt.desc(&plan->desc, COMPUTE32, REAL32);
  if (!code && (s->flags & TRANSPOSED)) code = lt.desc_set(plan->desc, DESC_TRANSPOSE_A, &yes, sizeof yes);
  if (!code) code = lt.desc_set(plan->desc, DESC_EPILOGUE, &epilogue, sizeof epilogue);
  if (!code && (s->flags & BIAS)) code = lt.desc_set(plan->desc, DESC_BIAS, &bias, sizeof bias);
  int64_t rows = s->flags & TRANSPOSED ? s->k : s->n, columns = s->flags & TRANSPOSED ? s->n : s->k;
  if (!code) code = layout(&plan->b, s->type, rows, columns, s, s->b_stride);
  if (!code) code = layout(&plan->a, s->type, s->k, s->m, s, s->a_stride);
  if (!code) code = layout(&plan->y, s->out, s->n, s->m, s, s->n * s->m);
  void *preference = NULL;
  if (!code) code = lt.preference(&preference);
  if (!code) code = lt.preference_set(preference, PREFER_WORKSPACE, &s->workspace, sizeof s->workspace);
  uint32_t alignment = (uint32_t)s->alignment;
  for (int i = 0; i < 4 && !code; ++i)
    code = lt.preference_set(preference, PREFER_ALIGNMENT_A + i, &alignment, sizeof alignment);
  int found = 0;
  if (!code)
    code = lt.choose(handles[s->device], plan->desc, plan->b, plan->a, plan->y, plan->y, preference, 1, &plan->choice,
                     &found);
  if (preference) lt.preference_free(preference);
  return code ? code : found ? 0 : 15;  // CUBLAS_STATUS_NOT_SUPPORTED
}

// The plan of a shape: the one that is kept, or a new one in its place. The lock is held.
static int plan_of(const Shape *shape, const void *bias, Plan **plan) {
  uint64_t hash = 1469598103934665603u;
  for (size_t i = 0; i < sizeof *shape; ++i) hash = (hash ^ ((const unsigned char *)shape)[i]) * 1099511628211u;
  for (int probe = 0; probe < 8; ++probe) {
    Plan **slot = &plans[(hash + probe) % PLANS];
    if (*slot && memcmp(&(*slot)->shape, shape, sizeof *shape) == 0) return *plan = *slot, 0;
    if (*slot && probe < 7) continue;
    Plan *made = calloc(1, sizeof *made);
    if (!made) return failed("products", "no memory", 0);
    made->shape = *shape;
    int code = prepare(made, bias);
    if (code) {
      drop(made);
      char what[160];
      snprintf(what, sizeof what, "product of (%lld, %lld) by (%lld, %lld)", (long long)shape->m, (long long)shape->k,
               (long long)shape->k, (long long)shape->n);
      return failed(what, "cuBLAS has no algorithm for it", code);
    }
    if (*slot) drop(*slot);
    return *plan = *slot = made, 0;
  }
  return -1;
}

static int alignment_of(const void *const *pointers, int count, const int64_t *strides) {
  uintptr_t all = 256;
  for (int i = 0; i < count; ++i) all |= (uintptr_t)pointers[i] | (uintptr_t)strides[i];
  return (int)(all & -all);
}

static int size_of(int type) { return type == REAL32 ? 4 : 2; }

static int type_of(const DLTensor *t) {
  return t->dtype.bits != 16 ? REAL32 : t->dtype.code == kDLBfloat ? BFLOAT16 : REAL16;
}

static int run(Shape *s, float alpha, const void *a, const void *b, const void *bias, const void *residual, void *y,
               const DLTensor *workspace, void *on) {
  float beta = residual ? 1.f : 0.f;
  const void *pointers[] = {a, b, y, residual ? residual : y, bias};
  int64_t strides[] = {s->a_stride * size_of(s->type), s->b_stride * size_of(s->type), s->n * s->m * size_of(s->out), 0, 0};
  s->alignment = alignment_of(pointers, bias ? 5 : 4, s->batch > 1 ? strides : (int64_t[5]){0});
  s->workspace = (uint64_t)workspace->shape[0];
  s->beta = residual != NULL;
  if (s->device < 0 || s->device >= DEVICES) return failed("products", "no such GPU", s->device);
  pthread_mutex_lock(&lock);
  int code = find_library();
  if (!code && !handles[s->device] && (code = lt.create(&handles[s->device])))
    failed("products", "cuBLAS does not start", code);
  Plan *plan = NULL;
  if (!code) code = plan_of(s, bias, &plan);
  if (!code && bias) code = lt.desc_set(plan->desc, DESC_BIAS, &bias, sizeof bias);
  if (!code) {
    code = lt.multiply(handles[s->device], plan->desc, &alpha, b, plan->b, a, plan->a, &beta, residual ? residual : y,
                       plan->y, y, plan->y, plan->choice.algorithm, data(workspace), plan->choice.workspace, on);
    if (code) failed("products", "cuBLAS refuses a product", code);
  }
  pthread_mutex_unlock(&lock);
  return code ? -1 : 0;
}

// (x (m, k), w (k, n), [bias (n,)], [residual (m, n)], flags, y (m, n), workspace (bytes,))
EXPORT int __tvm_ffi_planish_linear(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  int flags = -1, next = 2;
  for (int i = 0; i < count; ++i)
    if (args[i].type_index == kTVMFFIInt) flags = (int)args[i].v_int64;
  if (flags < 0 || count != 5 + !!(flags & BIAS) + !!(flags & RESIDUAL)) return failed("planish_linear", "arguments", count);
  const DLTensor *x = tensor(args), *w = tensor(args + 1);
  const DLTensor *bias = flags & BIAS ? tensor(args + next++) : NULL;
  const DLTensor *residual = flags & RESIDUAL ? tensor(args + next++) : NULL;
  const DLTensor *y = tensor(args + next + 1), *workspace = tensor(args + next + 2);
  Shape s;
  memset(&s, 0, sizeof s);
  s.m = x->shape[0], s.k = x->shape[1], s.n = w->shape[1], s.batch = 1;
  s.type = type_of(x), s.out = type_of(y), s.flags = flags & (BIAS | RELU), s.device = x->device.device_id;
  return run(&s, 1.f, data(x), data(w), bias ? data(bias) : NULL, residual ? data(residual) : NULL, data(y), workspace,
             stream(x));
}

// (a (count or 1, m, k), b (count or 1, k, n) or, transposed, (…, n, k), alpha, flags, y (count, m, n), workspace)
EXPORT int __tvm_ffi_planish_batched(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  if (count != 6 || args[2].type_index != kTVMFFIFloat) return failed("planish_batched", "arguments", count);
  const DLTensor *a = tensor(args), *b = tensor(args + 1), *y = tensor(args + 4), *workspace = tensor(args + 5);
  Shape s;
  memset(&s, 0, sizeof s);
  s.flags = (int)args[3].v_int64 & TRANSPOSED;
  s.m = a->shape[1], s.k = a->shape[2], s.n = b->shape[s.flags ? 1 : 2], s.batch = y->shape[0];
  s.a_stride = a->shape[0] == 1 ? 0 : s.m * s.k, s.b_stride = b->shape[0] == 1 ? 0 : s.k * s.n;
  s.type = type_of(a), s.out = type_of(y), s.device = a->device.device_id;
  return run(&s, (float)args[2].v_float64, data(a), data(b), NULL, NULL, data(y), workspace, stream(a));
}
