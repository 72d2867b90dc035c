/* planish::SwiGLU in float16 on GPUs. */
#include "cuda_swiglu.h"

#include <string.h>

enum { THREADS = 256, CHUNK = 8 };

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api, (void)info;
  *made = (void *)(uintptr_t)given; /* nothing of a node differs */
  return NULL;
}

static void destroy(void *kernel) { (void)kernel; }

static ort_status *compute(void *given, ort_context *context) {
  const cuda_swiglu_op *op = given;
  tensor gate, up, y;
  cuda_kernel code;
  cuda_stream stream = NULL;
  CHECK(planish_input_there(context, 0, 2, &gate));
  CHECK(planish_input_there(context, 1, 2, &up));
  if (gate.rank != up.rank || memcmp(gate.shape, up.shape, gate.rank * sizeof *gate.shape))
    return planish_error("SwiGLU: gate and up must have the same shape");
  CHECK(planish_output_there(context, 0, 2, gate.shape, gate.rank, &y));
  if (!y.bytes) return NULL;
  CHECK(planish_cuda_stream(context, &stream));
  CHECK(planish_cuda_kernel(&op->code, &code));
  struct {
    void *gate, *up, *y;
    long long count;
  } p = {gate.data, up.data, y.data, (long long)(y.bytes / 2)};
  long long blocks = (p.count + THREADS * CHUNK - 1) / (THREADS * CHUNK);
  if (blocks > 0x7fffffff) return planish_error("SwiGLU: %lld elements are too many", p.count);
  void *arguments[] = {&p};
  return planish_cuda_launch(&code, (unsigned)blocks, 1, 1, THREADS, stream, arguments);
}

void planish_cuda_swiglu(cuda_swiglu_op *op) {
  planish_cuda_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
