/* planish::MergeTokens and its relatives on GPUs, alone and between a residual sum and a layer norm. */
#include "cuda_merge.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "launch_merge.h"

enum { FLOAT = 4, INT64 = 8 };
enum { PIECES = 4, LANES = 32 }; /* what a warp reads of a token at a time, as in merge.cuh */

/* Memory between the steps of a merge. What runs on a stream is in order, so that one block serves all runs there; a
   larger one is made beside it, since CUDA graphs may have captured the address of the first. */
typedef struct workspace {
  cuda_stream stream;
  void *memory;
  size_t bytes;
  struct workspace *next;
} workspace;

typedef struct {
  const cuda_merge_op *op;
  int64_t r, protected, heads, size, first;
  float ratio, margin, alpha, epsilon;
  pthread_mutex_t lock;
  workspace *spaces;
} merge;

typedef struct {
  tensor x, added, added_shift, keys, key_shift, sizes, gain, shift;
} inputs;

static void destroy(void *given) {
  merge *kernel = given;
  while (kernel->spaces) {
    workspace *next = kernel->spaces->next;
    planish_cuda_free(kernel->spaces->memory);
    free(kernel->spaces);
    kernel->spaces = next;
  }
  pthread_mutex_destroy(&kernel->lock);
  free(kernel);
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  merge *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return planish_error("no memory for a kernel");
  pthread_mutex_init(&kernel->lock, NULL);
  kernel->op = (const cuda_merge_op *)given;
  kernel->r = planish_int(info, "r", 0);
  kernel->protected = planish_int(info, "protected", 0);
  kernel->heads = planish_int(info, "heads", 1);
  kernel->size = planish_int(info, "size", 0);
  kernel->first = planish_int(info, "first", 0);
  kernel->ratio = planish_float(info, "ratio", 0);
  kernel->margin = planish_float(info, "margin", 0);
  kernel->alpha = planish_float(info, "alpha", 1);
  kernel->epsilon = planish_float(info, "epsilon", 1e-5f);
  ort_status *status = NULL;
  if (kernel->r < 0 || kernel->protected < 0 || kernel->ratio < 0 || kernel->heads < 1 || kernel->first < 0 ||
      (kernel->op->fused && kernel->size < 1))
    status = planish_error(
        "%s: r is %ld, protected %ld, ratio %g, heads %ld and the first column %ld; none may be negative, and a head "
        "must be there",
        kernel->op->base.name, (long)kernel->r, (long)kernel->protected, (double)kernel->ratio, (long)kernel->heads,
        (long)kernel->first);
  if (status) destroy(kernel);
  else *made = kernel;
  return status;
}

static ort_status *read(const merge *kernel, ort_context *context, inputs *in) {
  size_t at = 0, width = (size_t)kernel->op->width;
  memset(in, 0, sizeof *in);
  CHECK(planish_input_there(context, at++, width, &in->x));
  if (kernel->op->fused) {
    CHECK(planish_input_there(context, at++, width, &in->added));
    CHECK(planish_input_there(context, at++, width, &in->added_shift));
  }
  CHECK(planish_input_there(context, at++, width, &in->keys));
  if (kernel->op->fused) CHECK(planish_input_there(context, at++, FLOAT, &in->key_shift));
  CHECK(planish_input_there(context, at++, FLOAT, &in->sizes));
  if (kernel->op->fused) {
    CHECK(planish_input_there(context, at++, width, &in->gain));
    CHECK(planish_input_there(context, at++, width, &in->shift));
  }
  return NULL;
}

static int is_vector(const tensor *t, int64_t size) { return t->rank == 1 && t->shape[0] == size; }

/* `size`: of a head of the keys. */
static ort_status *check(const merge *kernel, const inputs *in, int64_t *size) {
  const char *name = kernel->op->base.name;
  const int64_t *x = in->x.shape, *keys = in->keys.shape;
  if (in->x.rank != 3 || in->keys.rank != 3 || in->sizes.rank != 2)
    return planish_error(
        "%s: x, keys and sizes have rank %zu, %zu and %zu; they must have 3, 3 and 2", name, in->x.rank, in->keys.rank,
        in->sizes.rank);
  if (memcmp(x, keys, 2 * sizeof *x) || memcmp(x, in->sizes.shape, 2 * sizeof *x))
    return planish_error("%s: x, keys and sizes differ in batch or tokens", name);
  int64_t most = kernel->op->energy ? MERGE_MOST_BY_ENERGY : MERGE_MOST_TOKENS;
  if (x[1] > most) return planish_error("%s: %ld tokens; the kernel takes at most %ld", name, (long)x[1], (long)most);
  *size = kernel->op->fused ? kernel->size : keys[2] / kernel->heads;
  int64_t columns = kernel->heads * *size;
  if (*size < 1 || (kernel->op->fused ? kernel->first + columns > keys[2] : columns != keys[2]))
    return planish_error(
        "%s: keys have %ld columns, and %ld heads of %ld from column %ld on are to be there", name, (long)keys[2],
        (long)kernel->heads, (long)*size, (long)kernel->first);
  if (x[2] > 0x7fffffff || keys[2] > 0x7fffffff) return planish_error("%s: an axis is longer than 2^31", name);
  if (!kernel->op->fused) return NULL;
  if (in->added.rank != 3 || memcmp(x, in->added.shape, 3 * sizeof *x))
    return planish_error("%s: x and added must have the same shape", name);
  if (!is_vector(&in->added_shift, x[2]) || !is_vector(&in->gain, x[2]) || !is_vector(&in->shift, x[2]) ||
      !is_vector(&in->key_shift, *size))
    return planish_error("%s: added_shift, gain, shift or key_shift is no vector of the right size", name);
  return NULL;
}

/* How many tokens go: as merged_count of planish/ir/ops/merge_reference.py. */
static int64_t count_of(const merge *kernel, int64_t tokens) {
  int64_t asked = kernel->r + (int64_t)floorf(kernel->ratio * (float)tokens), free = tokens - kernel->protected;
  int64_t most = free > 0 ? free / 2 : 0;
  return asked < most ? asked : most;
}

static ort_status *space(merge *kernel, cuda_stream stream, size_t bytes, void **memory) {
  ort_status *status = NULL;
  pthread_mutex_lock(&kernel->lock);
  workspace *found = kernel->spaces;
  while (found && (found->stream != stream || found->bytes < bytes)) found = found->next;
  if (!found) {
    found = calloc(1, sizeof *found);
    status = found ? planish_cuda_allocate(bytes, &found->memory) : planish_error("no memory for a kernel");
    if (status) free(found), found = NULL;
    else {
      found->stream = stream, found->bytes = bytes, found->next = kernel->spaces;
      kernel->spaces = found;
    }
  }
  pthread_mutex_unlock(&kernel->lock);
  if (found) *memory = found->memory;
  return status;
}

static int aligned(const tensor *t) { return !((uintptr_t)t->data & 15); }

/* Whether everything can be read 16 bytes at a time. */
static int is_wide(const merge *kernel, const inputs *in, int64_t size) {
  if ((in->x.shape[2] | in->keys.shape[2] | size | kernel->first) & (16 / kernel->op->width - 1)) return 0;
  return aligned(&in->x) && aligned(&in->keys) && aligned(&in->added) && aligned(&in->added_shift) && aligned(&in->gain) &&
         aligned(&in->shift);
}

static ort_status *outputs(const merge *kernel, ort_context *context, const inputs *in, int64_t count, merge_parameters *p) {
  const int64_t *x = in->x.shape, left = x[1] - count;
  const int64_t tokens[3] = {x[0], left, x[2]}, all[2] = {x[0], x[1]};
  tensor out;
  size_t at = 0, width = (size_t)kernel->op->width;
  CHECK(planish_output_there(context, at++, width, tokens, 3, &out));
  p->y = out.data;
  if (kernel->op->fused) {
    CHECK(planish_output_there(context, at++, width, tokens, 3, &out));
    p->normed = out.data;
  }
  CHECK(planish_output_there(context, at++, FLOAT, tokens, 2, &out));
  p->merged = out.data;
  if (kernel->op->fused) {
    CHECK(planish_output_there(context, at++, FLOAT, tokens, 2, &out));
    p->logs = out.data;
  }
  CHECK(planish_output_there(context, at++, INT64, all, 2, &out));
  p->index = out.data;
  return NULL;
}

static void fill(const merge *kernel, const inputs *in, int64_t size, int64_t count, merge_parameters *p) {
  const int64_t *x = in->x.shape, *keys = in->keys.shape;
  p->x = in->x.data, p->sizes = in->sizes.data;
  p->keys = (const char *)in->keys.data + kernel->op->width * kernel->first;
  p->x_batch = x[1] * x[2], p->x_row = x[2];
  p->keys_batch = keys[1] * keys[2], p->keys_row = keys[2], p->keys_head = size;
  p->tokens = (int)x[1], p->width = (int)x[2], p->heads = (int)kernel->heads, p->size = (int)size;
  p->count = (int)count, p->protect = (int)(kernel->protected < x[1] ? kernel->protected : x[1]);
  p->max_norm = kernel->op->max_norm, p->wide = is_wide(kernel, in, size);
  p->margin = kernel->margin, p->alpha = kernel->alpha, p->epsilon = kernel->epsilon;
  p->added = in->added.data, p->gain = in->gain.data, p->shift = in->shift.data;
  p->added_shift = in->added_shift.data, p->key_shift = in->key_shift.data;
}

static ort_status *compute(void *given, ort_context *context) {
  merge *kernel = given;
  inputs in;
  merge_parameters p;
  cuda_kernel code;
  cuda_stream stream = NULL;
  int64_t size = 0;
  CHECK(read(kernel, context, &in));
  CHECK(check(kernel, &in, &size));
  const int64_t batch = in.x.shape[0], tokens = in.x.shape[1], width = in.x.shape[2], count = count_of(kernel, tokens);
  memset(&p, 0, sizeof p);
  fill(kernel, &in, size, count, &p);
  const int64_t widest = LANES * PIECES * (p.wide ? 16 / kernel->op->width : 1);
  if (kernel->op->fused && width > widest)
    return planish_error("%s: width %ld; the kernel takes at most %ld", kernel->op->base.name, (long)width, (long)widest);
  CHECK(outputs(kernel, context, &in, count, &p));
  if (!batch || !tokens) return NULL;
  CHECK(planish_cuda_stream(context, &stream));
  CHECK(planish_cuda_kernel(&kernel->op->code, &code));
  p.scratch_batch = merge_scratch(tokens, kernel->protected, size, count, kernel->op->energy);
  if (count) CHECK(space(kernel, stream, (size_t)(batch * p.scratch_batch), &p.scratch));
  void *arguments[] = {&p};
  return planish_cuda_launch_clusters(
      &code, merge_cluster(code.arch, code.processors, batch), (unsigned)batch, MERGE_THREADS,
      (unsigned)merge_shared(tokens, kernel->protected, count, kernel->op->energy), stream, arguments);
}

void planish_cuda_merge(cuda_merge_op *op) {
  planish_cuda_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
