#ifndef PLANISH_CUDA_SPARSE_STEP_H
#define PLANISH_CUDA_SPARSE_STEP_H

#include "driver.h"

/* Code for heads of one size. */
typedef struct {
  int64_t head_size;
  cuda_code decode;
} cuda_sparse_step_form;

typedef struct {
  planish_op base;
  const cuda_sparse_step_form *forms; /* ends with head_size 0 */
  cuda_code append;
} cuda_sparse_step_op;

void planish_cuda_sparse_step(cuda_sparse_step_op *);

#endif
