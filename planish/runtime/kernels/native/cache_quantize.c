/* planish::QuantizeCache: keys or values of a prompt, (batch, heads, tokens, size), as 8 bits with scales. */
#include "cache_quantize.h"

#include <stdlib.h>

#define ALONE (1 << 14) /* numbers */

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api, (void)info;
  *made = (void *)given; /* there is nothing that a node has for itself */
  return NULL;
}

static void destroy(void *kernel) { (void)kernel; }

static ort_status *compute(void *given, ort_context *context) {
  const cache_quantize_op *op = given;
  const char *name = op->base.name;
  tensor x, channels, codes, scales;
  CHECK(planish_input_there(context, 0, sizeof(float), &x));
  CHECK(planish_input_there(context, 1, sizeof(float), &channels));
  if (x.rank != 4 || channels.rank != 2)
    return planish_error("%s: x has rank %zu and channels %zu; they must have 4 and 2", name, x.rank, channels.rank);
  int64_t size = x.shape[3], one[4] = {x.shape[0], x.shape[1], x.shape[2], 1};
  if (channels.shape[0] != x.shape[1] || channels.shape[1] != size)
    return planish_error(
        "%s: channels are %ld by %ld; x has %ld heads of size %ld", name, (long)channels.shape[0],
        (long)channels.shape[1], (long)x.shape[1], (long)size);
  CHECK(planish_output_there(context, 0, 1, x.shape, 4, &codes));
  CHECK(planish_output_there(context, 1, sizeof(float), one, 4, &scales));
  int64_t numbers = planish_product(x.shape, 4);
  if (!numbers) return NULL;
  const cache_quantize_form *form = op->forms;
  while (form->call && form->head_size != size) ++form;
  if (!form->call) return planish_error("%s: this library has no kernel for heads of size %ld", name, (long)size);
  dl_tensor t[4];
  tvm_any arguments[4];
  arguments[0] = planish_argument(&t[0], x.data, DL_FLOAT, 32, 4, x.shape);
  arguments[1] = planish_argument(&t[1], channels.data, DL_FLOAT, 32, 2, channels.shape);
  arguments[2] = planish_argument(&t[2], codes.data, DL_INT, 8, 4, x.shape);
  arguments[3] = planish_argument(&t[3], scales.data, DL_FLOAT, 32, 3, x.shape);
  return planish_call(numbers < ALONE ? NULL : context, form->call, arguments, 4);
}

void planish_cache_quantize(cache_quantize_op *op) {
  planish_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
