/* planish::LayerNorm and its relatives: x (..., width) normalized over its last axis. */
#include "norms.h"

#include <stdlib.h>
#include <string.h>

#define ALONE (1 << 14) /* numbers */

typedef struct {
  const norm_op *op;
  float *epsilon;
  /* Scale and bias where they are constants, as they are in most models: looked up once. */
  tensor vector[2];
  int constant[2];
} norm;

static void destroy(void *given) {
  norm *kernel = given;
  planish_release(&kernel->vector[0]);
  planish_release(&kernel->vector[1]);
  free(kernel->epsilon);
  free(kernel);
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  const norm_op *op = (const norm_op *)given;
  norm *kernel = calloc(1, sizeof *kernel);
  if (kernel) kernel->epsilon = planish_allocate(sizeof *kernel->epsilon);
  if (!kernel || !kernel->epsilon) {
    free(kernel);
    return planish_error("no memory for a kernel");
  }
  kernel->op = op;
  *kernel->epsilon = planish_float(info, "epsilon", 1e-5f); /* ONNX's default */
  ort_status *status = NULL;
  for (int i = 0; i < 1 + op->bias && !status; ++i)
    status = planish_constant(info, (size_t)(1 + op->residual + i), sizeof(float), &kernel->vector[i], &kernel->constant[i]);
  if (status) {
    destroy(kernel);
    return status;
  }
  *made = kernel;
  return NULL;
}

enum { X, RESIDUAL, SCALE, BIAS, Y, SUM, TENSORS };

/* Scale or bias: number `i` of the two, input `index`. */
static ort_status *vector(const norm *kernel, ort_context *context, int i, size_t index, int64_t width, tensor *t) {
  if (kernel->constant[i]) {
    *t = kernel->vector[i];
    t->copy = NULL; /* stays with the kernel */
  } else {
    CHECK(planish_input(context, index, sizeof(float), t));
  }
  const char *what = i ? "bias" : "scale";
  if (t->rank == 1 && t->shape[0] == width) return NULL;
  return planish_error("%s: %s must have shape (%ld), as x has columns", kernel->op->base.name, what, (long)width);
}

static ort_status *run(const norm *kernel, ort_context *context, tensor *all) {
  const norm_op *op = kernel->op;
  size_t next = 0;
  CHECK(planish_input(context, next++, sizeof(float), &all[X]));
  if (op->residual) CHECK(planish_input(context, next++, sizeof(float), &all[RESIDUAL]));
  const tensor *x = &all[X], *residual = &all[RESIDUAL];
  if (!x->rank) return planish_error("%s: x has rank 0", op->base.name);
  if (op->residual && (residual->rank != x->rank || memcmp(residual->shape, x->shape, x->rank * sizeof *x->shape)))
    return planish_error("%s: the residual must have the shape of x", op->base.name);
  int64_t one[1] = {1}, width[1] = {x->shape[x->rank - 1]};
  int64_t rows[2] = {planish_product(x->shape, x->rank - 1), width[0]};
  CHECK(vector(kernel, context, 0, next++, width[0], &all[SCALE]));
  if (op->bias) CHECK(vector(kernel, context, 1, next, width[0], &all[BIAS]));
  CHECK(planish_output(context, 0, sizeof(float), x->shape, x->rank, &all[Y]));
  if (op->residual) CHECK(planish_output(context, 1, sizeof(float), x->shape, x->rank, &all[SUM]));

  dl_tensor tensors[TENSORS + 1];
  tvm_any arguments[TENSORS + 1];
  int count = 0;
#define ARGUMENT(...) arguments[count] = planish_argument(&tensors[count], __VA_ARGS__), ++count
  ARGUMENT(all[X].data, DL_FLOAT, 32, 2, rows);
  if (op->residual) ARGUMENT(all[RESIDUAL].data, DL_FLOAT, 32, 2, rows);
  ARGUMENT(all[SCALE].data, DL_FLOAT, 32, 1, width);
  if (op->bias) ARGUMENT(all[BIAS].data, DL_FLOAT, 32, 1, width);
  ARGUMENT(kernel->epsilon, DL_FLOAT, 32, 1, one);
  ARGUMENT(all[Y].data, DL_FLOAT, 32, 2, rows);
  if (op->residual) ARGUMENT(all[SUM].data, DL_FLOAT, 32, 2, rows);
  /* A few microseconds of work are not worth waking threads for: without a context a call stays on its thread. */
  CHECK(planish_call(rows[0] * rows[1] < ALONE ? NULL : context, op->call, arguments, count));
  planish_finish(&all[Y]);
  if (op->residual) planish_finish(&all[SUM]);
  return NULL;
}

static ort_status *compute(void *kernel, ort_context *context) {
  tensor all[TENSORS];
  memset(all, 0, sizeof all);
  ort_status *status = run(kernel, context, all);
  for (int i = 0; i < TENSORS; ++i) planish_release(&all[i]);
  return status;
}

void planish_norm(norm_op *op) {
  planish_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
