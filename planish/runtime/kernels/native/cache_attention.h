/* What the generated table says of planish::CacheAttention and CacheAttentionFloat16. */
#ifndef PLANISH_CACHE_ATTENTION_H
#define PLANISH_CACHE_ATTENTION_H

#include "host.h"

/* Compiled code for one size of heads, and query heads that share one of keys. */
typedef struct {
  int64_t head_size, group;
  tvm_function call;
} cache_attention_form;

typedef struct {
  planish_op base;
  int scales; /* the cache is int8 with scales, and `channels` are divided out of its keys; else it is float16 */
  const cache_attention_form *forms; /* up to one without `call` */
} cache_attention_op;

void planish_cache_attention(cache_attention_op *op);

#endif
