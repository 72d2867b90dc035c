/* planish::FeedForwardGelu and its relatives: two products and what is between them, with weights packed once. */
#include "feed_forward.h"

#include <stdlib.h>
#include <string.h>

enum { WEIGHTS = 3 };

typedef struct {
  const feed_forward_op *op;
  void *packed[WEIGHTS];     /* NULL where the weight is no constant */
  int64_t shape[WEIGHTS][2]; /* K and N of the packed weights */
} feed_forward;

/* The inputs that are weights: x comes first, the bias of the hidden layer after one weight. */
static int weight_count(const feed_forward_op *op) { return op->gated ? 3 : 2; }
static size_t weight_input(const feed_forward_op *op, int i) { return op->gated ? (size_t)(1 + i) : (size_t)(1 + 2 * i); }

static void destroy(void *given) {
  feed_forward *kernel = given;
  for (int i = 0; i < WEIGHTS; ++i) free(kernel->packed[i]);
  free(kernel);
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  const feed_forward_op *op = (const feed_forward_op *)given;
  feed_forward *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return planish_error("no memory for a kernel");
  kernel->op = op;
  int64_t type = planish_int(info, "compute_type", ORT_FLOAT);
  ort_status *status = NULL;
  if (type != op->form->type)
    status = planish_error("%s: this library has no kernel for compute_type %ld", op->base.name, (long)type);
  for (int i = 0; i < weight_count(op) && !status; ++i) {
    tensor weight;
    int found;
    status = planish_constant(info, weight_input(op, i), (size_t)op->form->stored / 8, &weight, &found);
    if (!status && found) status = planish_pack(op->form, 0, NULL, &weight, &kernel->packed[i], kernel->shape[i]);
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
  tensor x, weight[WEIGHTS], bias, out_bias, residual, y;
  void *packed[WEIGHTS];
  int64_t shape[WEIGHTS][2];
} operands;

static ort_status *fetch(const feed_forward *kernel, ort_context *context, operands *all) {
  const feed_forward_op *op = kernel->op;
  const int count = weight_count(op);
  const size_t last = weight_input(op, count - 1);
  CHECK(planish_input(context, 0, sizeof(float), &all->x));
  if (!all->x.rank) return planish_error("%s: x has rank 0", op->base.name);
  for (int i = 0; i < count; ++i) {
    memcpy(all->shape[i], kernel->shape[i], sizeof all->shape[i]);
    if (kernel->packed[i]) continue;
    CHECK(planish_input(context, weight_input(op, i), (size_t)op->form->stored / 8, &all->weight[i]));
    CHECK(planish_pack(op->form, 0, context, &all->weight[i], &all->packed[i], all->shape[i]));
  }
  const int64_t *first = all->shape[0], *second = all->shape[count - 1];
  if (op->gated && memcmp(first, all->shape[1], sizeof all->shape[0]))
    return planish_error("%s: the gate's weight and the other one must have the same shape", op->base.name);
  if (all->x.shape[all->x.rank - 1] != first[0] || first[1] != second[0])
    return planish_error(
        "%s: x has %ld columns, and the weights have shapes (%ld, %ld) and (%ld, %ld)", op->base.name,
        (long)all->x.shape[all->x.rank - 1], (long)first[0], (long)first[1], (long)second[0], (long)second[1]);
  if (!op->gated) CHECK(planish_input(context, 2, sizeof(float), &all->bias));
  if (!op->gated && (all->bias.rank != 1 || all->bias.shape[0] != first[1]))
    return planish_error("%s: the bias must have shape (%ld)", op->base.name, (long)first[1]);
  CHECK(planish_input(context, last + 1, sizeof(float), &all->out_bias));
  if (all->out_bias.rank != 1 || all->out_bias.shape[0] != second[1])
    return planish_error("%s: the last bias must have shape (%ld)", op->base.name, (long)second[1]);
  return planish_input(context, last + 2, sizeof(float), &all->residual);
}

static ort_status *run(const feed_forward *kernel, ort_context *context, operands *all) {
  const feed_forward_op *op = kernel->op;
  const int count = weight_count(op);
  int64_t shape[MAX_RANK], rows[2], columns[2], packed[WEIGHTS][3], hidden[1], width[1];
  dl_tensor tensors[8];
  tvm_any arguments[8];
  int used = 0;
  CHECK(fetch(kernel, context, all));
  size_t rank = all->x.rank;
  memcpy(shape, all->x.shape, rank * sizeof *shape);
  hidden[0] = all->shape[0][1];
  shape[rank - 1] = width[0] = all->shape[count - 1][1];
  if (all->residual.rank != rank || memcmp(shape, all->residual.shape, rank * sizeof *shape))
    return planish_error("%s: the residual must have the shape of the result", op->base.name);
  CHECK(planish_output(context, 0, sizeof(float), shape, rank, &all->y));
  rows[0] = columns[0] = planish_product(shape, rank - 1);
  rows[1] = all->shape[0][0];
  columns[1] = width[0];
#define ARGUMENT(...) arguments[used] = planish_argument(&tensors[used], __VA_ARGS__), ++used
  ARGUMENT(all->x.data, DL_FLOAT, 32, 2, rows);
  for (int i = 0; i < count; ++i) {
    void *data = kernel->packed[i] ? kernel->packed[i] : all->packed[i];
    int packed_rank = planish_packed_shape(op->form, all->shape[i][0], all->shape[i][1], packed[i]);
    ARGUMENT(data, op->form->code, op->form->bits, packed_rank, packed[i]);
    if (!i && !op->gated) ARGUMENT(all->bias.data, DL_FLOAT, 32, 1, hidden);
  }
  ARGUMENT(all->out_bias.data, DL_FLOAT, 32, 1, width);
  ARGUMENT(all->residual.data, DL_FLOAT, 32, 2, columns);
  ARGUMENT(all->y.data, DL_FLOAT, 32, 2, columns);
  CHECK(planish_call(context, op->form->call, arguments, used));
  planish_finish(&all->y);
  return NULL;
}

static ort_status *compute(void *kernel, ort_context *context) {
  operands all;
  memset(&all, 0, sizeof all);
  ort_status *status = run(kernel, context, &all);
  tensor *held[] = {&all.x, &all.bias, &all.out_bias, &all.residual, &all.y};
  for (size_t i = 0; i < sizeof held / sizeof *held; ++i) planish_release(held[i]);
  for (int i = 0; i < WEIGHTS; ++i) {
    planish_release(&all.weight[i]);
    free(all.packed[i]);
  }
  return status;
}

void planish_feed_forward(feed_forward_op *op) {
  planish_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
