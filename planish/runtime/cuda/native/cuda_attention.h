#ifndef PLANISH_CUDA_ATTENTION_H
#define PLANISH_CUDA_ATTENTION_H

#include "driver.h"

/* Code for heads of one size. `one`, `two`: prefill by 64 and by 128 queries of a thread block; `apart`: of long prompts on
   Hopper; `decode`: one query. */
typedef struct {
  int64_t head_size;
  cuda_code one, two, apart, decode;
} cuda_attention_form;

typedef struct {
  planish_op base;
  int lists, together; /* with lists of blocks; those of neighbouring tiles are nearly alike */
  const cuda_attention_form *forms; /* ends with head_size 0 */
} cuda_attention_op;

void planish_cuda_attention(cuda_attention_op *);

#endif
