/* planish::FlashAttention, BlockSparseAttention, WindowAttention and their relatives: heads side by side in the last
   axis. */
#include "attention.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ALONE (1 << 17) /* products of a number of q and one of k */
#define UNLIMITED (1LL << 40) /* a side of a window */
enum { LEFT, RIGHT, GLOBAL_KEYS, GLOBAL_QUERIES, CAUSAL, WINDOW };

typedef struct {
  const attention_op *op;
  int64_t heads, kv_heads, causal, block;
  int mean; /* a query that sees no key gives the mean of all values, not zeros */
  float *scale;
  int64_t *window;
} attention;

static void destroy(void *given) {
  attention *kernel = given;
  free(kernel->scale);
  free(kernel->window);
  free(kernel);
}

static void read_window(attention *kernel, const ort_info *info) {
  int64_t *window = kernel->window;
  window[LEFT] = planish_int(info, "left", -1);
  window[RIGHT] = planish_int(info, "right", -1);
  for (int side = LEFT; side <= RIGHT; ++side)
    if (window[side] < 0) window[side] = UNLIMITED;
  window[GLOBAL_KEYS] = planish_int(info, "global_keys", 0);
  window[GLOBAL_QUERIES] = planish_int(info, "global_queries", 0);
  window[CAUSAL] = kernel->causal;
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  const attention_op *op = (const attention_op *)given;
  attention *kernel = calloc(1, sizeof *kernel);
  if (kernel) {
    kernel->scale = planish_allocate(sizeof *kernel->scale);
    kernel->window = planish_allocate(WINDOW * sizeof *kernel->window);
  }
  if (!kernel || !kernel->scale || !kernel->window) {
    if (kernel) destroy(kernel);
    return planish_error("no memory for a kernel");
  }
  kernel->op = op;
  kernel->heads = planish_int(info, "q_num_heads", 0);
  kernel->kv_heads = planish_int(info, "kv_num_heads", 0);
  kernel->causal = op->past ? 1 : planish_int(info, "is_causal", 0) != 0;
  kernel->block = op->lists ? planish_int(info, "block_size", 64) : 0;
  kernel->mean = op->keys && planish_float(info, "hidden_score", -FLT_MAX) > -FLT_MAX;
  *kernel->scale = planish_float(info, "scale", 0);
  if (op->window) read_window(kernel, info);
  if (kernel->heads < 1 || kernel->kv_heads < 1 || kernel->heads % kernel->kv_heads) {
    ort_status *status = planish_error(
        "%s: q_num_heads is %ld and kv_num_heads %ld; one must be a multiple of the other", op->base.name,
        (long)kernel->heads, (long)kernel->kv_heads);
    destroy(kernel);
    return status;
  }
  *made = kernel;
  return NULL;
}

enum { Q, K, V, MASK, INDPTR, INDICES, LAYOUT, ENTRY_TILE, TILES, Y, LSE, TENSORS };

static ort_status *check(const attention *kernel, const tensor *all, int64_t *head_size) {
  const char *name = kernel->op->base.name;
  const int64_t *q = all[Q].shape, *k = all[K].shape;
  if (memcmp(k, all[V].shape, 3 * sizeof *k)) return planish_error("%s: k and v must have the same shape", name);
  if (q[0] != k[0]) return planish_error("%s: q has batch %ld, k and v %ld", name, (long)q[0], (long)k[0]);
  *head_size = q[2] / kernel->heads;
  if (q[2] != *head_size * kernel->heads || k[2] != *head_size * kernel->kv_heads)
    return planish_error(
        "%s: %ld and %ld heads do not divide the last axes of q and k, %ld and %ld, into equal sizes", name,
        (long)kernel->heads, (long)kernel->kv_heads, (long)q[2], (long)k[2]);
  return NULL;
}

/* Makes the mask's shape one of 4 axes, each 1 or that of the scores. */
static ort_status *check_mask(const attention *kernel, const tensor *all, int64_t *shape) {
  const tensor *mask = &all[MASK];
  const int64_t full[4] = {all[Q].shape[0], kernel->heads, all[Q].shape[1], all[K].shape[1]};
  if (mask->rank > 4) return planish_error("%s: the mask has rank %zu; at most 4", kernel->op->base.name, mask->rank);
  for (size_t i = 0; i < 4; ++i) {
    shape[i] = i + mask->rank < 4 ? 1 : mask->shape[i + mask->rank - 4];
    if (shape[i] != 1 && shape[i] != full[i])
      return planish_error(
          "%s: axis %zu of 4 of the mask has size %ld; it must be 1 or %ld", kernel->op->base.name, i, (long)shape[i],
          (long)full[i]);
  }
  if (kernel->op->keys && (shape[1] != 1 || shape[2] != 1))
    return planish_error("%s: the mask must have shape (batch or 1, 1, 1, keys or 1)", kernel->op->base.name);
  return NULL;
}

/* Queries of a sequence, from the first on, that see no key: before the first one that is not hidden. */
static int64_t blind(const attention *kernel, const tensor *all, const int64_t *shape, int64_t b) {
  const int64_t queries = all[Q].shape[1], keys = all[K].shape[1];
  const unsigned char *mask = (const unsigned char *)all[MASK].data + (shape[0] == 1 ? 0 : b) * shape[3];
  int64_t first = 0;
  while (first < keys && !mask[shape[3] == 1 ? 0 : first]) ++first;
  if (first == keys) return queries;
  return !kernel->causal ? 0 : first < queries ? first : queries;
}

/* Sums of the values of a sequence. */
static void sum_of_values(const tensor *all, int64_t b, double *sum) {
  const int64_t keys = all[K].shape[1], narrow = all[K].shape[2];
  const float *v = (const float *)all[V].data + b * keys * narrow;
  for (int64_t i = 0; i < narrow; ++i) sum[i] = 0;
  for (int64_t key = 0; key < keys; ++key)
    for (int64_t i = 0; i < narrow; ++i) sum[i] += v[key * narrow + i];
}

/* Gives queries that see no key the mean of all values. */
static ort_status *fill_blind(const attention *kernel, const tensor *all, const int64_t *shape, int64_t head_size) {
  const int64_t batch = all[Q].shape[0], queries = all[Q].shape[1], width = all[Q].shape[2];
  const int64_t keys = all[K].shape[1], narrow = all[K].shape[2], shared = kernel->heads / kernel->kv_heads;
  double *mean = NULL;
  for (int64_t b = 0; b < batch && keys; ++b) {
    int64_t rows = blind(kernel, all, shape, b);
    if (!rows) continue;
    if (!mean && !(mean = planish_allocate((size_t)narrow * sizeof *mean))) return planish_error("no memory for a mean");
    float *y = (float *)all[Y].data + b * queries * width;
    sum_of_values(all, b, mean);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < width; ++i)
        y[row * width + i] = (float)(mean[i / head_size / shared * head_size + i % head_size] / (double)keys);
  }
  free(mean);
  return NULL;
}

/* The same from the logarithms of sums, which are -inf where there is no key. */
static ort_status *fill_unseen(const attention *kernel, const tensor *all, int64_t head_size) {
  const int64_t batch = all[Q].shape[0], queries = all[Q].shape[1], heads = kernel->heads;
  const int64_t keys = all[K].shape[1], narrow = all[K].shape[2], shared = heads / kernel->kv_heads;
  const float *lse = all[LSE].data;
  double *mean = NULL;
  for (int64_t b = 0; b < batch && keys; ++b) {
    int made = 0;
    for (int64_t i = 0; i < heads * queries; ++i) {
      if (!isinf(lse[b * heads * queries + i])) continue;
      if (!mean && !(mean = planish_allocate((size_t)narrow * sizeof *mean))) return planish_error("no memory for a mean");
      if (!made) sum_of_values(all, b, mean);
      made = 1;
      int64_t head = i / queries;
      float *y = (float *)all[Y].data + ((b * queries + i % queries) * heads + head) * head_size;
      for (int64_t d = 0; d < head_size; ++d) y[d] = (float)(mean[head / shared * head_size + d] / (double)keys);
    }
  }
  free(mean);
  return NULL;
}

static ort_status *check_lists(const attention *kernel, const tensor *all) {
  const char *name = kernel->op->base.name;
  if (all[INDPTR].rank != 2 || all[INDPTR].shape[1] < 2)
    return planish_error("%s: indptr must have shape (layouts, rows + 1), with a row or more", name);
  if (all[INDICES].rank != 1) return planish_error("%s: indices has rank %zu; it must have 1", name, all[INDICES].rank);
  if (all[LAYOUT].rank != 1 || all[LAYOUT].shape[0] != kernel->heads)
    return planish_error("%s: head_layout must have shape (%ld)", name, (long)kernel->heads);
  if (!kernel->op->tiles) return NULL;
  if (all[ENTRY_TILE].rank != 1 || all[ENTRY_TILE].shape[0] != all[INDICES].shape[0])
    return planish_error("%s: entry_tile must have shape (%ld), as indices", name, (long)all[INDICES].shape[0]);
  const tensor *tiles = &all[TILES];
  if (tiles->rank != 3 || tiles->shape[1] != kernel->block || tiles->shape[2] != kernel->block)
    return planish_error("%s: tiles must have shape (number, %ld, %ld)", name, (long)kernel->block, (long)kernel->block);
  const int32_t *tile = all[ENTRY_TILE].data;
  for (int64_t i = 0; i < all[ENTRY_TILE].shape[0]; ++i)
    if (tile[i] >= tiles->shape[0])
      return planish_error("%s: entry_tile names tile %d of %ld", name, (int)tile[i], (long)tiles->shape[0]);
  return NULL;
}

static const attention_form *form_of(const attention *kernel, int64_t head_size) {
  for (const attention_form *form = kernel->op->forms; form->call; ++form)
    if (form->head_size == head_size && (kernel->op->window || form->causal == kernel->causal) &&
        form->block == kernel->block)
      return form;
  return NULL;
}

static ort_status *read_inputs(const attention *kernel, ort_context *context, tensor *all, int64_t *mask) {
  const attention_op *op = kernel->op;
  size_t next = 0;
  for (int i = Q; i <= V; ++i) CHECK(planish_input(context, next++, sizeof(float), &all[i]));
  if (op->mask) CHECK(planish_input(context, next++, (size_t)op->mask, &all[MASK]));
  for (int i = INDPTR; op->lists && i <= LAYOUT; ++i) CHECK(planish_input(context, next++, sizeof(int32_t), &all[i]));
  if (op->tiles) {
    CHECK(planish_input(context, next++, sizeof(int32_t), &all[ENTRY_TILE]));
    CHECK(planish_input(context, next++, 1, &all[TILES]));
  }
  for (int i = Q; i <= V; ++i)
    if (all[i].rank != 3) return planish_error("%s: %c has rank %zu; it must have 3", op->base.name, "qkv"[i], all[i].rank);
  if (op->mask) CHECK(check_mask(kernel, all, mask));
  return op->lists ? check_lists(kernel, all) : NULL;
}

/* The second output, or memory of the same shape that `planish_release` frees. */
static ort_status *sums(const attention *kernel, ort_context *context, tensor *all) {
  const int64_t shape[3] = {all[Q].shape[0], kernel->heads, all[Q].shape[1]};
  if (kernel->op->base.outputs > 1) return planish_output(context, 1, sizeof(float), shape, 3, &all[LSE]);
  tensor *lse = &all[LSE];
  lse->rank = 3;
  memcpy(lse->shape, shape, sizeof shape);
  lse->copy = lse->data = planish_allocate((size_t)planish_product(shape, 3) * sizeof(float));
  return lse->data ? NULL : planish_error("no memory for sums");
}

static ort_status *run(const attention *kernel, ort_context *context, tensor *all) {
  const attention_op *op = kernel->op;
  int64_t head_size = 0, mask[4], one[1] = {1}, five[1] = {WINDOW};
  _Alignas(64) int64_t offset[8] = {0};
  CHECK(read_inputs(kernel, context, all, mask));
  CHECK(check(kernel, all, &head_size));
  const attention_form *form = form_of(kernel, head_size);
  if (!form)
    return planish_error(
        "%s: this library has no kernel for heads of size %ld (is_causal %ld, block_size %ld)", op->base.name,
        (long)head_size, (long)kernel->causal, (long)kernel->block);
  int64_t *q = all[Q].shape, *k = all[K].shape;
  if (op->past || op->window || (op->lists && kernel->causal)) offset[0] = k[1] - q[1];
  if ((op->past || op->window) && offset[0] < 0)
    return planish_error("%s: there are %ld queries and %ld keys; there must be a key for each", op->base.name, (long)q[1], (long)k[1]);
  CHECK(planish_output(context, 0, sizeof(float), q, 3, &all[Y]));
  if (op->lse) CHECK(sums(kernel, context, all));

  dl_tensor tensors[13];
  tvm_any arguments[13];
  int count = 0;
#define ARGUMENT(...) arguments[count] = planish_argument(&tensors[count], __VA_ARGS__), ++count
  for (int i = Q; i <= V; ++i) ARGUMENT(all[i].data, DL_FLOAT, 32, 3, all[i].shape);
  if (op->mask) ARGUMENT(all[MASK].data, op->mask == 1 ? DL_BOOL : DL_FLOAT, op->mask * 8, 4, mask);
  for (int i = INDPTR; op->lists && i <= LAYOUT; ++i) ARGUMENT(all[i].data, DL_INT, 32, (int)all[i].rank, all[i].shape);
  if (op->tiles) {
    ARGUMENT(all[ENTRY_TILE].data, DL_INT, 32, 1, all[ENTRY_TILE].shape);
    ARGUMENT(all[TILES].data, DL_BOOL, 8, 3, all[TILES].shape);
  }
  ARGUMENT(kernel->scale, DL_FLOAT, 32, 1, one);
  if (kernel->causal || op->lists || op->window) ARGUMENT(offset, DL_INT, 64, 1, one);
  if (op->window) ARGUMENT(kernel->window, DL_INT, 64, 1, five);
  ARGUMENT(all[Y].data, DL_FLOAT, 32, 3, q);
  if (op->lse) ARGUMENT(all[LSE].data, DL_FLOAT, 32, 3, all[LSE].shape);
  /* A few microseconds of work are not worth waking threads for: without a context a call stays on its thread. */
  int small = planish_product(q, 3) * k[1] < ALONE;
  CHECK(planish_call(small ? NULL : context, form->call, arguments, count));
  if (kernel->mean) CHECK(op->lse ? fill_unseen(kernel, all, head_size) : fill_blind(kernel, all, mask, head_size));
  planish_finish(&all[Y]);
  if (op->base.outputs > 1) planish_finish(&all[LSE]);
  return NULL;
}

static ort_status *compute(void *kernel, ort_context *context) {
  tensor all[TENSORS];
  memset(all, 0, sizeof all);
  ort_status *status = run(kernel, context, all);
  for (int i = 0; i < TENSORS; ++i) planish_release(&all[i]);
  return status;
}

void planish_attention(attention_op *op) {
  planish_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
