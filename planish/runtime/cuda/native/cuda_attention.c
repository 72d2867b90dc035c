/* planish::FlashAttention and BlockSparseAttention in float16 on GPUs: heads side by side in the last axis. */
#include "cuda_attention.h"

#include <pthread.h>
#include <string.h>

#include "cuda_space.h"
#include "launch_attention.h"

enum { TILE = ATTENTION_TILE };
enum { Q, K, V, INDPTR, INDICES, LAYOUT, Y, TENSORS };

typedef struct {
  const cuda_attention_op *op;
  int64_t heads, kv_heads, causal, block;
  float scale;
  pthread_mutex_t lock;
  cuda_space *parts, *counters; /* of one query's attention; counters are zeros between launches */
} attention;

static void destroy(void *given) {
  attention *kernel = given;
  cuda_space_free(&kernel->parts), cuda_space_free(&kernel->counters);
  pthread_mutex_destroy(&kernel->lock);
  free(kernel);
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  attention *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return planish_error("no memory for a kernel");
  pthread_mutex_init(&kernel->lock, NULL);
  kernel->op = (const cuda_attention_op *)given;
  kernel->heads = planish_int(info, "q_num_heads", 0);
  kernel->kv_heads = planish_int(info, "kv_num_heads", 0);
  kernel->causal = planish_int(info, "is_causal", 0) != 0;
  kernel->block = kernel->op->lists ? planish_int(info, "block_size", TILE) : TILE;
  kernel->scale = planish_float(info, "scale", 0);
  ort_status *status = NULL;
  if (kernel->heads < 1 || kernel->kv_heads < 1 || kernel->heads % kernel->kv_heads)
    status = planish_error(
        "%s: q_num_heads is %ld and kv_num_heads %ld; one must be a multiple of the other", kernel->op->base.name,
        (long)kernel->heads, (long)kernel->kv_heads);
  else if (kernel->block < TILE || kernel->block % TILE)
    status = planish_error("%s: blocks of %ld tokens; kernels take multiples of %d", kernel->op->base.name, (long)kernel->block, TILE);
  if (status) destroy(kernel);
  else *made = kernel;
  return status;
}

static ort_status *check(const attention *kernel, const tensor *all, int64_t *size) {
  const char *name = kernel->op->base.name;
  for (int i = Q; i <= V; ++i)
    if (all[i].rank != 3) return planish_error("%s: %c has rank %zu; it must have 3", name, "qkv"[i], all[i].rank);
  const int64_t *q = all[Q].shape, *k = all[K].shape;
  if (memcmp(k, all[V].shape, 3 * sizeof *k)) return planish_error("%s: k and v must have the same shape", name);
  *size = q[2] / kernel->heads;
  if (q[0] != k[0] || q[2] != *size * kernel->heads || k[2] != *size * kernel->kv_heads)
    return planish_error("%s: shapes of q and k do not fit %ld and %ld heads", name, (long)kernel->heads, (long)kernel->kv_heads);
  for (int i = 0; i < 2; ++i)
    if (q[i] > 0x7fffffff || k[i] > 0x7fffffff) return planish_error("%s: an axis is longer than 2^31", name);
  if (!kernel->op->lists) {
    if (kernel->causal && q[1] != k[1])
      return planish_error("%s: it is causal, with %ld queries and %ld keys; kernels take as many", name, (long)q[1], (long)k[1]);
    return NULL;
  }
  if (kernel->causal && q[1] > k[1]) return planish_error("%s: there are %ld queries and %ld keys", name, (long)q[1], (long)k[1]);
  if (all[INDPTR].rank != 2 || all[INDPTR].shape[1] < 2)
    return planish_error("%s: indptr must have shape (layouts, rows + 1), with a row or more", name);
  if (all[INDICES].rank != 1 || all[LAYOUT].rank != 1 || all[LAYOUT].shape[0] != kernel->heads)
    return planish_error("%s: indices must be a vector, and head_layout one of %ld", name, (long)kernel->heads);
  return NULL;
}

static attention_call call_of(const attention *kernel, const tensor *all, int64_t size) {
  const int64_t *q = all[Q].shape;
  attention_call c;
  memset(&c, 0, sizeof c);
  c.q = all[Q].data, c.k = all[K].data, c.v = all[V].data, c.out = all[Y].data;
  c.batch = q[0], c.queries = q[1], c.keys = all[K].shape[1];
  c.heads = kernel->heads, c.kv_heads = kernel->kv_heads, c.size = size;
  attention_side_by_side(&c);
  c.block = kernel->block, c.causal = (int)kernel->causal, c.scale = kernel->scale;
  if (kernel->op->lists) {
    c.indptr = all[INDPTR].data, c.indices = all[INDICES].data, c.head_layout = all[LAYOUT].data;
    c.rows = all[INDPTR].shape[1] - 1, c.together = kernel->op->together;
  }
  return c;
}

static ort_status *prefill(const cuda_attention_form *form, const attention_call *c, cuda_stream stream) {
  cuda_kernel code;
  CHECK(planish_cuda_kernel(&form->one, &code));
  attention_plan plan = attention_plan_of(c, code.arch);
  if (plan.apart) CHECK(planish_cuda_kernel(&form->apart, &code));
  else if (plan.groups == 2) CHECK(planish_cuda_kernel(&form->two, &code));
  attention_prefill p;
  attention_fill_prefill(&p, c);
  _Alignas(64) unsigned char maps[2][128];
  memset(maps, 0, sizeof maps);
  if (code.arch == 90 && c->keys) {
    const int64_t sizes[3] = {c->keys, c->kv_heads, c->batch}, strides[3] = {c->kv_row, c->kv_head, c->kv_batch};
    CHECK(planish_cuda_map(maps[0], p.k, sizes, (int)c->size, strides));
    CHECK(planish_cuda_map(maps[1], p.v, sizes, (int)c->size, strides));
  }
  void *arguments[] = {&p, maps[0], maps[1]};
  return planish_cuda_launch(
      &code, plan.grid, (unsigned)c->heads, (unsigned)c->batch, plan.threads, stream, arguments);
}

static ort_status *decode(
    attention *kernel, const cuda_attention_form *form, const attention_call *c, cuda_stream stream) {
  cuda_kernel code;
  CHECK(planish_cuda_kernel(&form->decode, &code));
  int splits = attention_splits(c, code.arch, code.processors, 1);
  void *parts = NULL, *counters = NULL;
  pthread_mutex_lock(&kernel->lock);
  ort_status *status = cuda_space_for(&kernel->parts, stream, attention_parts(c, splits), &parts);
  if (!status) status = cuda_space_for(&kernel->counters, stream, attention_counters(c), &counters);
  pthread_mutex_unlock(&kernel->lock);
  CHECK(status);
  attention_step p;
  attention_fill_step(&p, c, counters, splits);
  p.parts = parts;
  void *arguments[] = {&p};
  return planish_cuda_launch_early(
      &code, (unsigned)splits, (unsigned)c->heads, (unsigned)c->batch, ATTENTION_DECODE_THREADS, stream, arguments);
}

static ort_status *compute(void *given, ort_context *context) {
  attention *kernel = given;
  tensor all[TENSORS];
  int64_t size = 0;
  cuda_stream stream = NULL;
  int last = kernel->op->lists ? LAYOUT : V;
  for (int i = Q; i <= last; ++i) CHECK(planish_input_there(context, (size_t)i, i <= V ? 2 : 4, &all[i]));
  CHECK(check(kernel, all, &size));
  const cuda_attention_form *form = kernel->op->forms;
  while (form->head_size && form->head_size != size) ++form;
  if (!form->head_size)
    return planish_error("%s: this library has no kernel for heads of size %ld", kernel->op->base.name, (long)size);
  CHECK(planish_output_there(context, 0, 2, all[Q].shape, 3, &all[Y]));
  if (!all[Y].bytes) return NULL;
  CHECK(planish_cuda_stream(context, &stream));
  int one = all[Q].shape[1] == 1 && all[K].shape[1] && (kernel->causal || !kernel->op->lists);
  attention_call call = call_of(kernel, all, size);
  return one ? decode(kernel, form, &call, stream) : prefill(form, &call, stream);
}

void planish_cuda_attention(cuda_attention_op *op) {
  planish_cuda_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
