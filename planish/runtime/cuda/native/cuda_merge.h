#ifndef PLANISH_CUDA_MERGE_H
#define PLANISH_CUDA_MERGE_H

#include "driver.h"

typedef struct {
  planish_op base;
  int energy, max_norm;
  int fused; /* with a sum before and a layer norm behind: AddMergeTokensNorm and its relative */
  int width; /* bytes of an element of the tokens */
  cuda_code code;
} cuda_merge_op;

void planish_cuda_merge(cuda_merge_op *);

#endif
