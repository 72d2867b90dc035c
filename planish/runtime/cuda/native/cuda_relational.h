#ifndef PLANISH_CUDA_RELATIONAL_H
#define PLANISH_CUDA_RELATIONAL_H

#include "driver.h"
#include "launch_relational.h"

typedef struct {
  planish_op base;
  const relational_program *program;
  const cuda_code *codes;  /* by number, as launches have it */
  cuda_code edges, refuse; /* the kernels of relational_edges.cu */
} cuda_relational_op;

void planish_cuda_relational(cuda_relational_op *);

#endif
