/* What the generated table says of planish::MergeTokens. */
#ifndef PLANISH_MERGE_H
#define PLANISH_MERGE_H

#include "host.h"

typedef struct {
  planish_op base;
  tvm_function directions, scores, aggregate;
} merge_op;

void planish_merge(merge_op *op);

#endif
