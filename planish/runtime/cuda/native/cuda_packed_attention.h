#ifndef PLANISH_CUDA_PACKED_ATTENTION_H
#define PLANISH_CUDA_PACKED_ATTENTION_H

#include "driver.h"

/* Code for heads of one size, by 64 and by 128 queries of a thread block. */
typedef struct {
  int64_t head_size;
  cuda_code one, two;
} cuda_packed_attention_form;

typedef struct {
  planish_op base;
  int packed, biased; /* queries, keys and values are one input, with their bias; a number for each key is added */
  const cuda_packed_attention_form *forms; /* ends with head_size 0 */
} cuda_packed_attention_op;

void planish_cuda_packed_attention(cuda_packed_attention_op *);

#endif
