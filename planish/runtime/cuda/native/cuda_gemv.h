#ifndef PLANISH_CUDA_GEMV_H
#define PLANISH_CUDA_GEMV_H

#include "driver.h"

/* Weights in 4 or 8 bits, with or without zeros for blocks and a bias; or two, of a gate and of what it scales. `few`: for one or two rows and blocks that do not
   end inside of 16 bytes; `many`: for up to eight rows, and blocks of 16. */
typedef struct {
  planish_op base;
  int bits, zeros, bias, gated;
  cuda_code few, many;
} cuda_gemv_op;

void planish_cuda_gemv(cuda_gemv_op *);

#endif
