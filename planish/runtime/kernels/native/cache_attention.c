/* planish::CacheAttention and CacheAttentionFloat16: one token a row over a cache of 8 bits, or of float16.
 *
 * Caches are used where they lie. Where an output has the memory of its input, as in generation, the token is written
 * and nothing else is touched; where it has not, the cache is copied first. */
#include "cache_attention.h"

#include <stdlib.h>
#include <string.h>

#define ALONE (1 << 15) /* products of a number of q and one of k */

typedef struct {
  const cache_attention_op *op;
  int64_t heads, kv_heads;
  float *scale;
  int64_t *window;
} cache_attention;

static void destroy(void *given) {
  cache_attention *kernel = given;
  free(kernel->scale);
  free(kernel->window);
  free(kernel);
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  cache_attention *kernel = calloc(1, sizeof *kernel);
  if (kernel) {
    kernel->scale = planish_allocate(sizeof *kernel->scale);
    kernel->window = planish_allocate(sizeof *kernel->window);
  }
  if (!kernel || !kernel->scale || !kernel->window) {
    if (kernel) destroy(kernel);
    return planish_error("no memory for a kernel");
  }
  kernel->op = (const cache_attention_op *)given;
  kernel->heads = planish_int(info, "q_num_heads", 0);
  kernel->kv_heads = planish_int(info, "kv_num_heads", 0);
  *kernel->scale = planish_float(info, "scale", 0);
  *kernel->window = planish_int(info, "window", 1LL << 40);
  if (kernel->heads < 1 || kernel->kv_heads < 1 || kernel->heads % kernel->kv_heads || *kernel->window < 1) {
    ort_status *status = planish_error(
        "%s: q_num_heads is %ld, kv_num_heads %ld, window %ld; heads must be a multiple of those of keys, and a window "
        "1 or more", kernel->op->base.name, (long)kernel->heads, (long)kernel->kv_heads, (long)*kernel->window);
    destroy(kernel);
    return status;
  }
  *made = kernel;
  return NULL;
}

/* The inputs, in order; then y and the caches that come out. */
enum { Q, K, V, KEYS, VALUES, KEY_SCALES, VALUE_SCALES, LENGTHS, CHANNELS, Y, OUT, TENSORS = OUT + 4 };
static const size_t widths[] = {4, 4, 4, 1, 1, 4, 4, 4, 4};
static int absent(const cache_attention *kernel, int i) {
  return !kernel->op->scales && (i == KEY_SCALES || i == VALUE_SCALES || i == CHANNELS);
}
static size_t width(const cache_attention *kernel, int i) {
  return !kernel->op->scales && (i == KEYS || i == VALUES) ? 2 : widths[i];
}
static const size_t ranks[] = {3, 3, 3, 4, 4, 4, 4, 1, 2};
static const char *const names[] = {
    "q", "k", "v", "past_key", "past_value", "past_key_scale", "past_value_scale", "lengths", "channels"};

static ort_status *check(const cache_attention *kernel, const tensor *all) {
  const char *name = kernel->op->base.name;
  const int64_t batch = all[Q].shape[0], kv = kernel->kv_heads;
  const int64_t capacity = all[KEYS].shape[2], size = all[KEYS].shape[3];
  const int64_t wanted[][4] = {
      {batch, 1, kernel->heads * size}, {batch, 1, kv * size}, {batch, 1, kv * size},
      {batch, kv, capacity, size},      {batch, kv, capacity, size},
      {batch, kv, capacity, 1},         {batch, kv, capacity, 1},
      {batch},                          {kv, size}};
  for (int i = Q; i <= CHANNELS; ++i)
    for (size_t axis = 0; axis < ranks[i] && !absent(kernel, i); ++axis)
      if (all[i].shape[axis] != wanted[i][axis])
        return planish_error(
            "%s: axis %zu of %s has size %ld; it must be %ld", name, axis, names[i], (long)all[i].shape[axis],
            (long)wanted[i][axis]);
  const int32_t *length = all[LENGTHS].data;
  for (int64_t b = 0; b < batch; ++b)
    if (length[b] < 0 || length[b] >= capacity)
      return planish_error(
          "%s: row %ld holds %ld tokens, and its cache has room for %ld: there is none for a new one", name, (long)b,
          (long)length[b], (long)capacity);
  return NULL;
}

static const cache_attention_form *form_of(const cache_attention *kernel, int64_t head_size) {
  for (const cache_attention_form *form = kernel->op->forms; form->call; ++form)
    if (form->head_size == head_size && form->group == kernel->heads / kernel->kv_heads) return form;
  return NULL;
}

static ort_status *run(const cache_attention *kernel, ort_context *context, tensor *all) {
  const char *name = kernel->op->base.name;
  size_t next = 0;
  for (int i = Q; i <= CHANNELS; ++i) {
    if (absent(kernel, i)) continue;
    CHECK(planish_input_there(context, next++, width(kernel, i), &all[i]));
    if (all[i].rank != ranks[i])
      return planish_error("%s: %s has rank %zu; it must have %zu", name, names[i], all[i].rank, ranks[i]);
  }
  CHECK(check(kernel, all));
  CHECK(planish_output_there(context, 0, sizeof(float), all[Q].shape, 3, &all[Y]));
  const int caches = kernel->op->scales ? 4 : 2;
  for (int i = 0; i < caches; ++i) {
    const tensor *past = &all[KEYS + i];
    CHECK(planish_output_there(context, (size_t)i + 1, width(kernel, KEYS + i), past->shape, 4, &all[OUT + i]));
    if (past->bytes && all[OUT + i].data != past->data) memcpy(all[OUT + i].data, past->data, past->bytes);
  }
  int64_t batch = all[Q].shape[0], kv = kernel->kv_heads, size = all[KEYS].shape[3], longest = 0;
  if (!batch) return NULL;
  const cache_attention_form *form = form_of(kernel, size);
  if (!form) return planish_error("%s: this library has no kernel for heads of size %ld", name, (long)size);

  int64_t q[4] = {batch, kv, form->group, size}, new[3] = {batch, kv, size}, one[1] = {1};
  dl_tensor tensors[12];
  tvm_any arguments[12];
  int count = 0;
#define ARGUMENT(...) arguments[count] = planish_argument(&tensors[count], __VA_ARGS__), ++count
  ARGUMENT(all[Q].data, DL_FLOAT, 32, 4, q);
  for (int i = K; i <= V; ++i) ARGUMENT(all[i].data, DL_FLOAT, 32, 3, new);
  const int code = kernel->op->scales ? DL_INT : DL_FLOAT, bits = kernel->op->scales ? 8 : 16;
  for (int i = 0; i < 2; ++i) ARGUMENT(all[OUT + i].data, code, bits, 4, all[KEYS].shape);
  for (int i = 2; i < caches; ++i) ARGUMENT(all[OUT + i].data, DL_FLOAT, 32, 3, all[KEYS].shape);
  ARGUMENT(all[LENGTHS].data, DL_INT, 32, 1, all[LENGTHS].shape);
  if (kernel->op->scales) ARGUMENT(all[CHANNELS].data, DL_FLOAT, 32, 2, all[CHANNELS].shape);
  ARGUMENT(kernel->scale, DL_FLOAT, 32, 1, one);
  ARGUMENT(kernel->window, DL_INT, 64, 1, one);
  ARGUMENT(all[Y].data, DL_FLOAT, 32, 4, q);
  /* A few microseconds of work are not worth waking threads for: without a context a call stays on its thread. */
  for (int64_t b = 0; b < batch; ++b)
    if (((const int32_t *)all[LENGTHS].data)[b] > longest) longest = ((const int32_t *)all[LENGTHS].data)[b];
  int small = planish_product(q, 4) * (longest + 1) < ALONE;
  return planish_call(small ? NULL : context, form->call, arguments, count);
}

static ort_status *compute(void *kernel, ort_context *context) {
  tensor all[TENSORS];
  return run(kernel, context, all);
}

void planish_cache_attention(cache_attention_op *op) {
  planish_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
