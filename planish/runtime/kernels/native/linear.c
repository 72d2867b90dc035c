/* planish::Linear and its relatives: x (..., K) times a weight (K, N) that is packed when the kernel is made. */
#include "linear.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
  const linear_op *op;
  const linear_form *form;
  void *packed[2]; /* NULL where the weight is no constant */
  int64_t shape[2][2]; /* K and N of the packed weights */
} linear;

static int64_t panels(const linear_form *form, int64_t n) { return (n + form->width - 1) / form->width; }

int planish_packed_shape(const linear_form *form, int64_t k, int64_t n, int64_t *shape) {
  shape[0] = panels(form, n);
  shape[1] = (k + form->rows - 1) / form->rows;
  shape[2] = form->rows * form->width;
  return 3;
}

ort_status *planish_pack(
    const linear_form *form, int transposed, ort_context *context, tensor *weight, void **packed, int64_t *sizes) {
  dl_tensor from, to;
  int64_t shape[3];
  if (weight->rank != 2) return planish_error("the weight has rank %zu; it must have 2", weight->rank);
  for (int i = 0; i < 2; ++i) sizes[i] = weight->shape[transposed ? 1 - i : i];
  int rank = planish_packed_shape(form, sizes[0], sizes[1], shape);
  *packed = planish_allocate((size_t)planish_product(shape, (size_t)rank) * (size_t)form->bits / 8);
  if (!*packed) return planish_error("no memory for a packed weight of %ld x %ld", (long)sizes[0], (long)sizes[1]);
  tvm_any arguments[2] = {
      planish_argument(&from, weight->data, form->stored == 16 ? DL_UINT : DL_FLOAT, form->stored, 2, weight->shape),
      planish_argument(&to, *packed, form->code, form->bits, rank, shape),
  };
  return planish_call(context, form->pack, arguments, 2);
}

static void destroy(void *given) {
  linear *kernel = given;
  free(kernel->packed[0]);
  free(kernel->packed[1]);
  free(kernel);
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  const linear_op *op = (const linear_op *)given;
  int64_t type = planish_int(info, "compute_type", ORT_FLOAT);
  linear *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return planish_error("no memory for a kernel");
  kernel->op = op;
  for (const linear_form *form = op->forms; form->call; ++form)
    if (form->type == type) kernel->form = form;
  ort_status *status = kernel->form ? NULL : planish_error("%s: this library has no kernel for compute_type %ld", op->base.name, (long)type);
  for (int i = 0; i < op->weights && !status; ++i) {
    tensor weight;
    int found;
    status = planish_constant(info, (size_t)(1 + i), (size_t)kernel->form->stored / 8, &weight, &found);
    if (!status && found) status = planish_pack(kernel->form, op->transposed, NULL, &weight, &kernel->packed[i], kernel->shape[i]);
    planish_release(&weight);
  }
  if (status) {
    destroy(kernel);
    return status;
  }
  *made = kernel;
  return NULL;
}

/* The inputs of one call and what was packed for it. */
typedef struct {
  tensor x, weight[2], bias, residual, y;
  void *packed[2];
  int64_t shape[2][2];
} operands;

static ort_status *fetch(const linear *kernel, ort_context *context, operands *all, int64_t *k, int64_t *n) {
  const linear_op *op = kernel->op;
  size_t next = 1;
  CHECK(planish_input(context, 0, sizeof(float), &all->x));
  if (!all->x.rank) return planish_error("%s: x has rank 0", op->base.name);
  for (int i = 0; i < op->weights; ++i, ++next) {
    const int64_t *shape = kernel->shape[i];
    if (!kernel->packed[i]) {
      CHECK(planish_input(context, next, (size_t)kernel->form->stored / 8, &all->weight[i]));
      CHECK(planish_pack(kernel->form, op->transposed, context, &all->weight[i], &all->packed[i], all->shape[i]));
      shape = all->shape[i];
    }
    if (i && (shape[0] != *k || shape[1] != *n))
      return planish_error("%s: the weights have shapes (%ld, %ld) and (%ld, %ld)", op->base.name, (long)*k, (long)*n, (long)shape[0], (long)shape[1]);
    *k = shape[0];
    *n = shape[1];
  }
  if (all->x.shape[all->x.rank - 1] != *k)
    return planish_error(
        "%s: x has %ld columns and the weight %ld %s", op->base.name, (long)all->x.shape[all->x.rank - 1], (long)*k,
        op->transposed ? "columns" : "rows");
  if (op->bias) CHECK(planish_input(context, next++, sizeof(float), &all->bias));
  if (op->bias && (all->bias.rank != 1 || all->bias.shape[0] != *n))
    return planish_error("%s: the bias must have shape (%ld)", op->base.name, (long)*n);
  if (op->residual) CHECK(planish_input(context, next, sizeof(float), &all->residual));
  return NULL;
}

static ort_status *run(const linear *kernel, ort_context *context, operands *all) {
  const linear_op *op = kernel->op;
  int64_t k = 0, n = 0, shape[MAX_RANK], packed[3], rows[2], columns[2], width[1];
  dl_tensor tensors[6];
  tvm_any arguments[6];
  int count = 0;
  CHECK(fetch(kernel, context, all, &k, &n));
  size_t rank = all->x.rank;
  memcpy(shape, all->x.shape, rank * sizeof *shape);
  shape[rank - 1] = n;
  if (op->residual && (all->residual.rank != rank || memcmp(shape, all->residual.shape, rank * sizeof *shape)))
    return planish_error("%s: the residual must have the shape of the result", op->base.name);
  CHECK(planish_output(context, 0, sizeof(float), shape, rank, &all->y));
  rows[0] = columns[0] = planish_product(shape, rank - 1);
  rows[1] = k;
  columns[1] = width[0] = n;
  int packed_rank = planish_packed_shape(kernel->form, k, n, packed);
#define ARGUMENT(...) arguments[count] = planish_argument(&tensors[count], __VA_ARGS__), ++count
  ARGUMENT(all->x.data, DL_FLOAT, 32, 2, rows);
  for (int i = 0; i < op->weights; ++i)
    ARGUMENT(kernel->packed[i] ? kernel->packed[i] : all->packed[i], kernel->form->code, kernel->form->bits, packed_rank, packed);
  if (op->bias) ARGUMENT(all->bias.data, DL_FLOAT, 32, 1, width);
  if (op->residual) ARGUMENT(all->residual.data, DL_FLOAT, 32, 2, columns);
  ARGUMENT(all->y.data, DL_FLOAT, 32, 2, columns);
  CHECK(planish_call(context, kernel->form->call, arguments, count));
  planish_finish(&all->y);
  return NULL;
}

static ort_status *compute(void *kernel, ort_context *context) {
  operands all;
  memset(&all, 0, sizeof all);
  ort_status *status = run(kernel, context, &all);
  planish_release(&all.x);
  planish_release(&all.weight[0]);
  planish_release(&all.weight[1]);
  planish_release(&all.bias);
  planish_release(&all.residual);
  planish_release(&all.y);
  free(all.packed[0]);
  free(all.packed[1]);
  return status;
}

void planish_linear(linear_op *op) {
  planish_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
