/* What the generated table says of planish::QuantizeCache. */
#ifndef PLANISH_CACHE_QUANTIZE_H
#define PLANISH_CACHE_QUANTIZE_H

#include "host.h"

/* Compiled code for one size of heads. */
typedef struct {
  int64_t head_size;
  tvm_function call;
} cache_quantize_form;

typedef struct {
  planish_op base;
  const cache_quantize_form *forms; /* up to one without `call` */
} cache_quantize_op;

void planish_cache_quantize(cache_quantize_op *op);

#endif
