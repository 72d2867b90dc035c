/* planish::MergeTokens: of x (batch, tokens, width) those tokens that are most alike become one.
 *
 * Compiled functions multiply and add; here is chosen who merges with whom. */
#include "merge.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ALONE (1 << 14) /* numbers */

typedef struct {
  const merge_op *op;
  int64_t r, protect, heads;
  float ratio;
} merge;

/* What one call works on. `first_a`, `first_b`: the first token at either side, from which on every other one is; `a`,
 * `b`: how many there are; `count` of those of side a go. */
typedef struct {
  int64_t batch, tokens, width, head, front, first_a, first_b, a, b, count, left;
} sizes;

typedef struct {
  float score;
  int64_t from, to; /* numbers on their sides */
} pair;

enum { X, KEYS, SIZES, Y, MERGED, INDEX, TENSORS };

static void destroy(void *kernel) { free(kernel); }

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  merge *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return planish_error("no memory for a kernel");
  kernel->op = (const merge_op *)given;
  kernel->r = planish_int(info, "r", 0);
  kernel->protect = planish_int(info, "protected", 0);
  kernel->heads = planish_int(info, "heads", 1);
  kernel->ratio = planish_float(info, "ratio", 0);
  *made = kernel;
  return NULL;
}

static int64_t every_other(int64_t tokens, int64_t first) { return tokens > first ? (tokens - first + 1) / 2 : 0; }

static ort_status *measure(const merge *kernel, const tensor *all, sizes *n) {
  const tensor *x = &all[X], *keys = &all[KEYS], *weights = &all[SIZES];
  const char *name = kernel->op->base.name;
  if (x->rank != 3 || keys->rank != 3 || weights->rank != 2)
    return planish_error("%s: x and keys must have rank 3, and sizes rank 2", name);
  for (int axis = 0; axis < 2; ++axis)
    if (keys->shape[axis] != x->shape[axis] || weights->shape[axis] != x->shape[axis])
      return planish_error("%s: x, keys and sizes must have one batch and one number of tokens", name);
  if (kernel->heads < 1 || keys->shape[2] % kernel->heads)
    return planish_error("%s: keys of width %ld can not be %ld heads", name, (long)keys->shape[2], (long)kernel->heads);
  int64_t protect = kernel->protect, odd = protect % 2;
  n->batch = x->shape[0], n->tokens = x->shape[1], n->width = x->shape[2];
  n->head = keys->shape[2] / kernel->heads;
  n->front = protect < n->tokens ? protect : n->tokens;
  n->first_a = protect + odd, n->first_b = protect + 1 - odd;
  n->a = every_other(n->tokens, n->first_a), n->b = every_other(n->tokens, n->first_b);
  n->count = kernel->r + (int64_t)floorf(kernel->ratio * (float)n->tokens);
  int64_t most = (n->tokens - n->front) / 2;
  if (n->count > most) n->count = most;
  n->left = n->tokens - n->count;
  return NULL;
}

/* The higher score first; of equal ones the earlier token. */
static int better(const void *one, const void *two) {
  const pair *p = one, *q = two;
  if (p->score != q->score) return p->score > q->score ? -1 : 1;
  return p->from < q->from ? -1 : 1;
}

/* For each token of side a the one of side b that it is most like, the most alike first. */
static void match(const sizes *n, const float *scores, pair *pairs) {
  for (int64_t i = 0; i < n->a; ++i) {
    const float *row = scores + i * n->b;
    int64_t best = 0;
    for (int64_t j = 1; j < n->b; ++j)
      if (row[j] > row[best]) best = j;
    pairs[i] = (pair){n->b ? row[best] : 0, i, best};
  }
  qsort(pairs, (size_t)n->a, sizeof *pairs, better);
}

/* What a sequence becomes: `start` has the place of the first member of each token that is left in `members` and
 * `shares`, counted over the batch; members are rows of x. */
static void arrange(const sizes *n, int64_t row, const pair *pairs, const float *weight, int64_t *start,
                    int64_t *members, float *shares, float *merged, int64_t *index) {
  const int64_t base = row * n->tokens;
  int64_t position = 0, before_b = n->front + n->a - n->count;
  for (int64_t t = 0; t < n->tokens; ++t) index[t] = -1;
  for (int64_t k = 0; k < n->count; ++k) index[n->first_a + 2 * pairs[k].from] = before_b + pairs[k].to;
  int64_t *size = start + 1; /* first how many members a token has, then where they end */
  for (int64_t t = 0; t < n->left; ++t) size[t] = 0;
  for (int64_t side = 0; side < 3; ++side) {
    int64_t from = side == 0 ? 0 : side == 1 ? n->first_a : n->first_b, step = side == 0 ? 1 : 2;
    int64_t end = side == 0 ? n->front : n->tokens;
    for (int64_t t = from; t < end; t += step)
      if (index[t] < 0) index[t] = position++;
  }
  for (int64_t t = 0; t < n->tokens; ++t) ++size[index[t]];
  int64_t at = base;
  for (int64_t t = 0; t < n->left; ++t) {
    int64_t own = size[t];
    size[t] = at, at += own;
  }
  /* The token that stays comes first, then those that go into it, the most alike first. */
  for (int64_t k = 0; k < n->count; ++k) index[n->first_a + 2 * pairs[k].from] = ~index[n->first_a + 2 * pairs[k].from];
  for (int64_t t = 0; t < n->tokens; ++t)
    if (index[t] >= 0) {
      merged[index[t]] = weight[t];
      members[size[index[t]]++] = base + t;
    }
  for (int64_t k = 0; k < n->count; ++k) {
    int64_t t = n->first_a + 2 * pairs[k].from;
    index[t] = ~index[t];
    merged[index[t]] += weight[t];
    members[size[index[t]]++] = base + t;
  }
  for (int64_t t = 0, k = base; t < n->left; ++t)
    for (; k < size[t]; ++k) shares[k] = weight[members[k] - base] / merged[t];
}

typedef struct {
  float *unit, *scores, *shares;
  int64_t *start, *members, *first;
  pair *pairs;
} workspace;

static ort_status *choose(const merge *kernel, ort_context *context, const sizes *n, tensor *all, workspace *w) {
  const merge_op *op = kernel->op;
  int64_t rows = n->batch * n->tokens;
  dl_tensor t[3];
  tvm_any arguments[3];
  int64_t keys[3] = {rows, kernel->heads, n->head}, unit[3] = {n->batch, n->tokens, n->head}, flat[2] = {rows, n->head};
  int64_t two[1] = {2}, scores[3] = {n->batch, n->a, n->b};
  ort_context *threads = rows * n->head * kernel->heads < ALONE ? NULL : context;
  arguments[0] = planish_argument(&t[0], all[KEYS].data, DL_FLOAT, 32, 3, keys);
  arguments[1] = planish_argument(&t[1], w->unit, DL_FLOAT, 32, 2, flat);
  CHECK(planish_call(threads, op->directions, arguments, 2));
  w->first[0] = n->first_a, w->first[1] = n->first_b;
  arguments[0] = planish_argument(&t[0], w->unit, DL_FLOAT, 32, 3, unit);
  arguments[1] = planish_argument(&t[1], w->first, DL_INT, 64, 1, two);
  arguments[2] = planish_argument(&t[2], w->scores, DL_FLOAT, 32, 3, scores);
  CHECK(planish_call(threads, op->scores, arguments, 3));
  w->start[0] = 0;
  for (int64_t b = 0; b < n->batch; ++b) {
    match(n, w->scores + b * n->a * n->b, w->pairs);
    arrange(n, b, w->pairs, (float *)all[SIZES].data + b * n->tokens, w->start + b * n->left, w->members, w->shares,
            (float *)all[MERGED].data + b * n->left, (int64_t *)all[INDEX].data + b * n->tokens);
  }
  return NULL;
}

static ort_status *gather(const merge *kernel, ort_context *context, const sizes *n, tensor *all, workspace *w) {
  int64_t rows = n->batch * n->tokens;
  dl_tensor t[5];
  tvm_any arguments[5];
  int64_t starts[1] = {n->batch * n->left + 1}, edges[1] = {rows};
  int64_t x[3] = {rows, 1, n->width}, y[3] = {n->batch * n->left, 1, n->width};
  arguments[0] = planish_argument(&t[0], w->start, DL_INT, 64, 1, starts);
  arguments[1] = planish_argument(&t[1], w->members, DL_INT, 64, 1, edges);
  arguments[2] = planish_argument(&t[2], all[X].data, DL_FLOAT, 32, 3, x);
  arguments[3] = planish_argument(&t[3], w->shares, DL_FLOAT, 32, 1, edges);
  arguments[4] = planish_argument(&t[4], all[Y].data, DL_FLOAT, 32, 3, y);
  return planish_call(rows * n->width < ALONE ? NULL : context, kernel->op->aggregate, arguments, 5);
}

static ort_status *with_workspace(const merge *kernel, ort_context *context, const sizes *n, tensor *all) {
  int64_t rows = n->batch * n->tokens;
  workspace w = {
      planish_allocate((size_t)(rows * n->head) * sizeof(float)),
      planish_allocate((size_t)(n->batch * n->a * n->b) * sizeof(float)),
      planish_allocate((size_t)rows * sizeof(float)),
      planish_allocate((size_t)(n->batch * n->left + 1) * sizeof(int64_t)),
      planish_allocate((size_t)rows * sizeof(int64_t)),
      planish_allocate(2 * sizeof(int64_t)),
      planish_allocate((size_t)n->a * sizeof(pair)),
  };
  ort_status *status;
  if (!w.unit || !w.scores || !w.shares || !w.start || !w.members || !w.first || !w.pairs) {
    status = planish_error("%s: no memory", kernel->op->base.name);
  } else {
    status = choose(kernel, context, n, all, &w);
    if (!status && n->width) status = gather(kernel, context, n, all, &w);
  }
  free(w.unit), free(w.scores), free(w.shares), free(w.start), free(w.members), free(w.first), free(w.pairs);
  return status;
}

static ort_status *run(const merge *kernel, ort_context *context, tensor *all) {
  sizes n;
  for (size_t i = 0; i < 3; ++i) CHECK(planish_input(context, i, sizeof(float), &all[i]));
  CHECK(measure(kernel, all, &n));
  int64_t y[3] = {n.batch, n.left, n.width}, index[2] = {n.batch, n.tokens};
  CHECK(planish_output(context, 0, sizeof(float), y, 3, &all[Y]));
  CHECK(planish_output(context, 1, sizeof(float), y, 2, &all[MERGED]));
  CHECK(planish_output(context, 2, sizeof(int64_t), index, 2, &all[INDEX]));
  if (n.batch * n.tokens) CHECK(with_workspace(kernel, context, &n, all));
  for (int i = Y; i < TENSORS; ++i) planish_finish(&all[i]);
  return NULL;
}

static ort_status *compute(void *kernel, ort_context *context) {
  tensor all[TENSORS];
  memset(all, 0, sizeof all);
  ort_status *status = run(kernel, context, all);
  for (int i = 0; i < TENSORS; ++i) planish_release(&all[i]);
  return status;
}

void planish_merge(merge_op *op) {
  planish_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
