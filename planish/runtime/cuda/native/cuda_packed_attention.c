/* planish::PackedAttention, PackedAttentionKeyBias and FlashAttentionKeyBias in float16 on GPUs: every query sees every
   key, each with a number of its own. */
#include "cuda_packed_attention.h"

#include <stdlib.h>

#include "launch_attention.h"

enum { HALF = 2, FLOAT = 4 };

typedef struct {
  const cuda_packed_attention_op *op;
  int64_t heads, kv_heads;
  float scale;
} attention;

/* With SHIFT, as attention.cu has it. */
typedef struct {
  attention_prefill base;
  const void *q_shift, *v_shift;
} packed_parameters;

static void destroy(void *kernel) { free(kernel); }

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  const cuda_packed_attention_op *op = (const cuda_packed_attention_op *)given;
  int64_t heads = planish_int(info, op->packed ? "num_heads" : "q_num_heads", 0);
  int64_t kv_heads = op->packed ? heads : planish_int(info, "kv_num_heads", 0);
  if (heads < 1 || kv_heads < 1 || heads % kv_heads)
    return planish_error(
        "%s: there are %ld heads of queries and %ld of keys; one must be a multiple of the other", op->base.name,
        (long)heads, (long)kv_heads);
  attention *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return planish_error("no memory for a kernel");
  kernel->op = op, kernel->heads = heads, kernel->kv_heads = kv_heads;
  kernel->scale = planish_float(info, "scale", 0);
  *made = kernel;
  return NULL;
}

/* Queries, keys and values as three inputs. */
static ort_status *apart(const attention *kernel, ort_context *context, attention_call *c) {
  const char *name = kernel->op->base.name;
  tensor q, k, v;
  CHECK(planish_input_there(context, 0, HALF, &q));
  CHECK(planish_input_there(context, 1, HALF, &k));
  CHECK(planish_input_there(context, 2, HALF, &v));
  if (q.rank != 3 || k.rank != 3 || v.rank != 3) return planish_error("%s: q, k and v must have rank 3", name);
  c->size = q.shape[2] / kernel->heads;
  if (memcmp(k.shape, v.shape, 3 * sizeof *k.shape) || q.shape[0] != k.shape[0] || q.shape[2] != c->size * kernel->heads ||
      k.shape[2] != c->size * kernel->kv_heads)
    return planish_error(
        "%s: shapes of q, k and v do not fit %ld and %ld heads", name, (long)kernel->heads, (long)kernel->kv_heads);
  c->q = q.data, c->k = k.data, c->v = v.data;
  c->batch = q.shape[0], c->queries = q.shape[1], c->keys = k.shape[1];
  attention_side_by_side(c);
  return NULL;
}

/* Thirds of the rows of one input, with what is added to them. */
static ort_status *together(const attention *kernel, ort_context *context, attention_call *c, packed_parameters *p) {
  const char *name = kernel->op->base.name;
  tensor qkv, shift;
  CHECK(planish_input_there(context, 0, HALF, &qkv));
  CHECK(planish_input_there(context, 1, HALF, &shift));
  if (qkv.rank != 3 || shift.rank != 1 || shift.shape[0] != qkv.shape[2])
    return planish_error("%s: qkv must have rank 3, and shift be a vector of its last axis", name);
  const int64_t row = qkv.shape[2], width = row / 3;
  c->size = width / kernel->heads;
  if (c->size * kernel->heads * 3 != row)
    return planish_error("%s: %ld columns are not queries, keys and values of %ld heads", name, (long)row, (long)kernel->heads);
  char *data = qkv.data;
  c->q = data, c->k = data + HALF * width, c->v = data + 2 * HALF * width;
  c->batch = qkv.shape[0], c->queries = c->keys = qkv.shape[1];
  c->q_row = c->kv_row = row, c->q_head = c->kv_head = c->size, c->q_batch = c->kv_batch = row * qkv.shape[1];
  p->q_shift = shift.data, p->v_shift = (const char *)shift.data + 2 * HALF * width;
  return NULL;
}

static ort_status *bias(const attention *kernel, ort_context *context, attention_call *c) {
  tensor t;
  if (!kernel->op->biased) return NULL;
  CHECK(planish_input_there(context, kernel->op->packed ? 2 : 3, FLOAT, &t));
  if (t.rank != 2 || t.shape[0] != c->batch || t.shape[1] != c->keys)
    return planish_error("%s: key_bias must have shape (batch, keys)", kernel->op->base.name);
  c->bias = t.data, c->bias_batch = c->keys;
  return NULL;
}

static ort_status *launch(
    const attention *kernel, const cuda_packed_attention_form *form, const attention_call *c, packed_parameters *p,
    void *out, cuda_stream stream) {
  cuda_kernel code;
  CHECK(planish_cuda_kernel(&form->one, &code));
  attention_plan plan = attention_plan_tiled(c, code.arch);
  if (plan.groups == 2) CHECK(planish_cuda_kernel(&form->two, &code));
  attention_fill_prefill(&p->base, c);
  p->base.out = out;
  p->base.out_row = c->heads * c->size, p->base.out_batch = c->queries * p->base.out_row, p->base.out_head = c->size;
  _Alignas(64) unsigned char maps[2][128];
  memset(maps, 0, sizeof maps);
  if (code.arch == 90 && c->keys) {
    const int64_t sizes[3] = {c->keys, c->kv_heads, c->batch}, strides[3] = {c->kv_row, c->kv_head, c->kv_batch};
    CHECK(planish_cuda_map(maps[0], c->k, sizes, (int)c->size, strides));
    CHECK(planish_cuda_map(maps[1], c->v, sizes, (int)c->size, strides));
  }
  void *arguments[] = {p, maps[0], maps[1]};
  return planish_cuda_launch(
      &code, plan.grid, (unsigned)c->heads, (unsigned)c->batch, plan.threads, stream, arguments);
}

static ort_status *compute(void *given, ort_context *context) {
  const attention *kernel = given;
  attention_call c;
  packed_parameters p;
  tensor y;
  cuda_stream stream = NULL;
  memset(&c, 0, sizeof c);
  memset(&p, 0, sizeof p);
  c.heads = kernel->heads, c.kv_heads = kernel->kv_heads, c.scale = kernel->scale;
  CHECK(kernel->op->packed ? together(kernel, context, &c, &p) : apart(kernel, context, &c));
  CHECK(bias(kernel, context, &c));
  if (c.queries > ATTENTION_LONGEST || c.keys > ATTENTION_LONGEST)
    return planish_error("%s: an axis is longer than 2^31", kernel->op->base.name);
  const cuda_packed_attention_form *form = kernel->op->forms;
  while (form->head_size && form->head_size != c.size) ++form;
  if (!form->head_size)
    return planish_error("%s: this library has no kernel for heads of size %ld", kernel->op->base.name, (long)c.size);
  const int64_t shape[3] = {c.batch, c.queries, c.heads * c.size};
  CHECK(planish_output_there(context, 0, HALF, shape, 3, &y));
  if (!y.bytes) return NULL;
  CHECK(planish_cuda_stream(context, &stream));
  return launch(kernel, form, &c, &p, y.data, stream);
}

void planish_cuda_packed_attention(cuda_packed_attention_op *op) {
  planish_cuda_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
