/* planish::BlockSparseStep in float16 on GPUs: a token is written into its cache, in place where that is one buffer with
   the new cache, and sees the blocks of its list, split among thread blocks. */
#include "cuda_sparse_step.h"

#include <pthread.h>
#include <string.h>

#include "cuda_space.h"
#include "launch_attention.h"

enum { Q, K, V, PAST_K, PAST_V, LENGTHS, INDPTR, INDICES, LAYOUT, INPUTS, Y = INPUTS, NEW_K, NEW_V, TENSORS };
enum { APPEND_THREADS = 32 };

typedef struct {
  const cuda_sparse_step_op *op;
  int64_t heads, kv_heads, block;
  float scale;
  pthread_mutex_t lock;
  cuda_space *parts, *counters; /* of the attention; counters are zeros between launches */
} step;

/* As step_append.cu has them. */
typedef struct {
  void *k, *v, *to_k, *to_v, *lengths;
  int *totals;
  long long capacity;
  int kv_heads, chunks;
} append_parameters;

static void destroy(void *given) {
  step *kernel = given;
  cuda_space_free(&kernel->parts), cuda_space_free(&kernel->counters);
  pthread_mutex_destroy(&kernel->lock);
  free(kernel);
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  step *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return planish_error("no memory for a kernel");
  pthread_mutex_init(&kernel->lock, NULL);
  kernel->op = (const cuda_sparse_step_op *)given;
  kernel->heads = planish_int(info, "q_num_heads", 0);
  kernel->kv_heads = planish_int(info, "kv_num_heads", 0);
  kernel->block = planish_int(info, "block_size", ATTENTION_TILE);
  kernel->scale = planish_float(info, "scale", 0);
  ort_status *status = NULL;
  if (kernel->heads < 1 || kernel->kv_heads < 1 || kernel->heads % kernel->kv_heads)
    status = planish_error(
        "BlockSparseStep: q_num_heads is %ld and kv_num_heads %ld; one must be a multiple of the other",
        (long)kernel->heads, (long)kernel->kv_heads);
  else if (kernel->block < ATTENTION_TILE || kernel->block % ATTENTION_TILE)
    status = planish_error(
        "BlockSparseStep: blocks of %ld tokens; kernels take multiples of %d", (long)kernel->block, ATTENTION_TILE);
  if (status) destroy(kernel);
  else *made = kernel;
  return status;
}

static ort_status *check(const step *kernel, const tensor *all) {
  static const char name[] = "BlockSparseStep";
  for (int i = Q; i <= V; ++i)
    if (all[i].rank != 3 || all[i].shape[1] != 1) return planish_error("%s: %c must be (batch, 1, heads · size)", name, "qkv"[i]);
  if (all[PAST_K].rank != 4 || all[PAST_V].rank != 4 || memcmp(all[PAST_K].shape, all[PAST_V].shape, 4 * sizeof(int64_t)))
    return planish_error("%s: past keys and values must be (batch, heads, capacity, size), both alike", name);
  const int64_t *past = all[PAST_K].shape, batch = all[Q].shape[0], size = past[3];
  if (past[0] != batch || past[1] != kernel->kv_heads || all[K].shape[0] != batch || all[V].shape[0] != batch)
    return planish_error("%s: queries, keys and caches differ in rows or heads", name);
  if (all[Q].shape[2] != kernel->heads * size || all[K].shape[2] != past[1] * size || all[V].shape[2] != past[1] * size)
    return planish_error("%s: heads of size %ld do not fit queries, keys and values", name, (long)size);
  if (all[LENGTHS].rank != 1 || all[LENGTHS].shape[0] != batch)
    return planish_error("%s: there must be one length for each of %ld rows", name, (long)batch);
  if (past[2] < 1 || past[2] > ATTENTION_LONGEST || batch > 65535)
    return planish_error("%s: caches of %ld tokens in %ld rows", name, (long)past[2], (long)batch);
  if (all[INDPTR].rank != 2 || all[INDPTR].shape[1] < 2)
    return planish_error("%s: indptr must have shape (layouts, rows + 1), with a row or more", name);
  if (all[INDICES].rank != 1 || all[LAYOUT].rank != 1 || all[LAYOUT].shape[0] != kernel->heads)
    return planish_error("%s: indices must be a vector, and head_layout one of %ld", name, (long)kernel->heads);
  return NULL;
}

static ort_status *append(
    const step *kernel, const tensor *all, const attention_call *c, int *totals, cuda_stream stream) {
  cuda_kernel code;
  CHECK(planish_cuda_kernel(&kernel->op->append, &code));
  for (int i = 0; i < 2; ++i)
    if (all[NEW_K + i].data != all[PAST_K + i].data)
      CHECK(planish_cuda_copy(all[NEW_K + i].data, all[PAST_K + i].data, all[PAST_K + i].bytes, stream));
  append_parameters p = {all[K].data,    all[V].data, all[NEW_K].data, all[NEW_V].data,    all[LENGTHS].data,
                         totals,         c->keys,     (int)c->kv_heads, (int)(c->size / 8)};
  void *arguments[] = {&p};
  return planish_cuda_launch(
      &code, (unsigned)c->kv_heads, (unsigned)c->batch, 1, APPEND_THREADS, stream, arguments);
}

static ort_status *attend(step *kernel, const cuda_sparse_step_form *form, const tensor *all, cuda_stream stream) {
  const int64_t *past = all[PAST_K].shape;
  attention_call c;
  memset(&c, 0, sizeof c);
  c.q = all[Q].data, c.k = all[NEW_K].data, c.v = all[NEW_V].data, c.out = all[Y].data;
  c.batch = past[0], c.queries = 1, c.keys = past[2], c.heads = kernel->heads, c.kv_heads = past[1], c.size = past[3];
  c.causal = 1, c.scale = kernel->scale, c.block = kernel->block;
  c.indptr = all[INDPTR].data, c.indices = all[INDICES].data, c.head_layout = all[LAYOUT].data;
  c.rows = all[INDPTR].shape[1] - 1;
  attention_side_by_side(&c);
  attention_by_heads(&c, c.keys);
  cuda_kernel code;
  CHECK(planish_cuda_kernel(&form->decode, &code));
  int splits = attention_splits(&c, code.arch, code.processors, 1);
  size_t inside = (attention_parts(&c, splits) + 255) / 256 * 256;
  void *parts = NULL, *counters = NULL;
  pthread_mutex_lock(&kernel->lock);
  ort_status *status = cuda_space_for(&kernel->parts, stream, inside + (size_t)c.batch * sizeof(int), &parts);
  if (!status) status = cuda_space_for(&kernel->counters, stream, attention_counters(&c), &counters);
  pthread_mutex_unlock(&kernel->lock);
  CHECK(status);
  int *totals = (int *)((char *)parts + inside);
  CHECK(append(kernel, all, &c, totals, stream));
  c.lengths = totals;
  attention_step p;
  attention_fill_step(&p, &c, counters, splits);
  p.parts = parts;
  void *arguments[] = {&p};
  return planish_cuda_launch_early(
      &code, (unsigned)splits, (unsigned)c.heads, (unsigned)c.batch, ATTENTION_DECODE_THREADS, stream, arguments);
}

static ort_status *compute(void *given, ort_context *context) {
  step *kernel = given;
  tensor all[TENSORS];
  cuda_stream stream = NULL;
  for (int i = 0; i < INPUTS; ++i) CHECK(planish_input_there(context, (size_t)i, i <= PAST_V ? 2 : 4, &all[i]));
  CHECK(check(kernel, all));
  const cuda_sparse_step_form *form = kernel->op->forms;
  while (form->head_size && form->head_size != all[PAST_K].shape[3]) ++form;
  if (!form->head_size)
    return planish_error("BlockSparseStep: this library has no kernel for heads of size %ld", (long)all[PAST_K].shape[3]);
  CHECK(planish_output_there(context, 0, 2, all[Q].shape, 3, &all[Y]));
  for (size_t i = 0; i < 2; ++i) CHECK(planish_output_there(context, 1 + i, 2, all[PAST_K].shape, 4, &all[NEW_K + i]));
  if (!all[Y].bytes) return NULL;
  CHECK(planish_cuda_stream(context, &stream));
  return attend(kernel, form, all, stream);
}

void planish_cuda_sparse_step(cuda_sparse_step_op *op) {
  planish_cuda_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
