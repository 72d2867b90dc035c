#ifndef PLANISH_CUDA_SWIGLU_H
#define PLANISH_CUDA_SWIGLU_H

#include "driver.h"

typedef struct {
  planish_op base;
  cuda_code code;
} cuda_swiglu_op;

void planish_cuda_swiglu(cuda_swiglu_op *);

#endif
