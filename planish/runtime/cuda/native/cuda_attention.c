/* planish::FlashAttention and BlockSparseAttention in float16 on GPUs: heads side by side in the last axis. */
#include "cuda_attention.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 64, MOST_SPLITS = 64, DECODE_THREADS = 256 };
enum { Q, K, V, INDPTR, INDICES, LAYOUT, Y, TENSORS };

/* Memory for the parts of one query's attention; one for each stream, since what runs on a stream is in order. */
typedef struct workspace {
  cuda_stream stream;
  void *memory;
  size_t bytes;
  struct workspace *next;
} workspace;

typedef struct {
  const cuda_attention_op *op;
  int64_t heads, kv_heads, causal, block;
  float scale;
  pthread_mutex_t lock;
  workspace *spaces;
} attention;

/* As attention.cu and attention_decode.cu have them. */
typedef struct {
  void *q, *k, *v, *out;
  float *lse;
  long long q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head;
  const int *indptr, *indices, *head_layout, *lengths;
  int queries, keys, q_heads, kv_heads, causal, rows, block;
  float scale;
  const float *bias;
  long long bias_batch;
} prefill_parameters;

typedef struct {
  void *q, *k, *v, *out;
  float *parts;
  unsigned *done;
  long long q_batch, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_head;
  const int *indptr, *indices, *head_layout, *lengths;
  int keys, q_heads, kv_heads, rows, block, splits;
  float scale;
} decode_parameters;

static void destroy(void *given) {
  attention *kernel = given;
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
  attention *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return planish_error("no memory for a kernel");
  pthread_mutex_init(&kernel->lock, NULL);
  kernel->op = (const cuda_attention_op *)given;
  kernel->heads = planish_int(info, "q_num_heads", 0);
  kernel->kv_heads = planish_int(info, "kv_num_heads", 0);
  kernel->causal = planish_int(info, "is_causal", 0) != 0;
  kernel->block = kernel->op->lists ? planish_int(info, "block_size", TILE) : TILE;
  kernel->scale = planish_float(info, "scale", 0) * 1.44269504088896f; /* kernels use powers of two */
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

static ort_status *prefill(
    const attention *kernel, const cuda_attention_form *form, const tensor *all, cuda_stream stream) {
  const int64_t *q = all[Q].shape, *k = all[K].shape, size = form->head_size, offset = kernel->causal ? k[1] - q[1] : 0;
  cuda_kernel code;
  int groups = 1;
  CHECK(planish_cuda_kernel(&form->one, &code));
  /* Two tiles of queries share the keys that they load; with lists they would have to share these too. */
  if (q[1] > TILE && !kernel->op->lists && code.arch >= 80) {
    groups = 2;
    CHECK(planish_cuda_kernel(&form->two, &code));
  }
  prefill_parameters p;
  memset(&p, 0, sizeof p);
  p.q = all[Q].data, p.k = all[K].data, p.v = all[V].data, p.out = all[Y].data;
  p.q_batch = p.out_batch = q[1] * q[2], p.q_row = p.out_row = q[2];
  p.k_batch = p.v_batch = k[1] * k[2], p.k_row = p.v_row = k[2];
  p.q_head = p.k_head = p.v_head = p.out_head = size;
  p.queries = (int)q[1], p.keys = (int)k[1], p.q_heads = (int)kernel->heads, p.kv_heads = (int)kernel->kv_heads;
  p.causal = (int)kernel->causal, p.block = (int)kernel->block, p.scale = kernel->scale;
  if (kernel->op->lists) {
    p.indptr = all[INDPTR].data, p.indices = all[INDICES].data, p.head_layout = all[LAYOUT].data;
    p.rows = (int)all[INDPTR].shape[1] - 1;
  }
  _Alignas(64) unsigned char maps[2][128];
  memset(maps, 0, sizeof maps);
  if (code.arch == 90 && k[1]) {
    const int64_t sizes[3] = {k[1], kernel->kv_heads, k[0]}, strides[3] = {k[2], size, k[1] * k[2]};
    CHECK(planish_cuda_map(maps[0], p.k, sizes, (int)size, strides));
    CHECK(planish_cuda_map(maps[1], p.v, sizes, (int)size, strides));
  }
  void *arguments[] = {&p, maps[0], maps[1]};
  unsigned tiles = (unsigned)((offset + q[1] + TILE - 1) / TILE - offset / TILE);
  return planish_cuda_launch(
      &code, (tiles + (unsigned)groups - 1) / (unsigned)groups, (unsigned)kernel->heads, (unsigned)q[0],
      (unsigned)groups * 128, stream, arguments);
}

static ort_status *space(attention *kernel, cuda_stream stream, size_t bytes, void **memory) {
  workspace *found = kernel->spaces;
  while (found && found->stream != stream) found = found->next;
  if (!found) {
    if (!(found = calloc(1, sizeof *found))) return planish_error("no memory for a kernel");
    found->stream = stream, found->next = kernel->spaces;
    kernel->spaces = found;
  }
  if (found->bytes < bytes) {
    void *larger = NULL;
    CHECK(planish_cuda_allocate(bytes, &larger));
    planish_cuda_free(found->memory); /* waits for what uses it */
    found->memory = larger, found->bytes = bytes;
  }
  *memory = found->memory;
  return NULL;
}

static ort_status *decode(attention *kernel, const cuda_attention_form *form, const tensor *all, cuda_stream stream) {
  const int64_t *q = all[Q].shape, *k = all[K].shape, size = form->head_size;
  cuda_kernel code;
  CHECK(planish_cuda_kernel(&form->decode, &code));
  int64_t blocks = q[0] * kernel->heads, tiles = (k[1] + TILE - 1) / TILE, splits = 2 * code.processors / blocks;
  splits = splits > tiles ? tiles : splits > MOST_SPLITS ? MOST_SPLITS : splits;
  splits = splits < 1 ? 1 : splits;
  size_t counters = ((size_t)blocks * 4 + 255) / 256 * 256;
  size_t parts = (size_t)blocks * (size_t)splits * ((size_t)size + 2) * sizeof(float);
  void *memory = NULL;
  pthread_mutex_lock(&kernel->lock);
  ort_status *status = space(kernel, stream, counters + parts, &memory);
  pthread_mutex_unlock(&kernel->lock);
  CHECK(status);
  decode_parameters p;
  memset(&p, 0, sizeof p);
  p.q = all[Q].data, p.k = all[K].data, p.v = all[V].data, p.out = all[Y].data;
  p.done = memory, p.parts = (float *)((char *)memory + counters);
  p.q_batch = p.out_batch = q[2], p.k_batch = p.v_batch = k[1] * k[2], p.k_row = p.v_row = k[2];
  p.q_head = p.k_head = p.v_head = p.out_head = size;
  p.keys = (int)k[1], p.q_heads = (int)kernel->heads, p.kv_heads = (int)kernel->kv_heads;
  p.block = (int)kernel->block, p.splits = (int)splits, p.scale = kernel->scale;
  if (kernel->op->lists) {
    p.indptr = all[INDPTR].data, p.indices = all[INDICES].data, p.head_layout = all[LAYOUT].data;
    p.rows = (int)all[INDPTR].shape[1] - 1;
  }
  void *arguments[] = {&p};
  return planish_cuda_launch(
      &code, (unsigned)splits, (unsigned)kernel->heads, (unsigned)q[0], DECODE_THREADS, stream, arguments);
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
  return one ? decode(kernel, form, all, stream) : prefill(kernel, form, all, stream);
}

void planish_cuda_attention(cuda_attention_op *op) {
  planish_cuda_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
