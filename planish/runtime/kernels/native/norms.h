/* What the generated table says of a normalization operator. */
#ifndef PLANISH_NORMS_H
#define PLANISH_NORMS_H

#include "host.h"

typedef struct {
  planish_op base;
  int residual, bias; /* inputs, in this order: x, residual, scale, bias; with a residual the sum is a second output */
  tvm_function call;
} norm_op;

void planish_norm(norm_op *op);

#endif
