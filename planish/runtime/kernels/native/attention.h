/* What the generated table says of an attention operator. */
#ifndef PLANISH_ATTENTION_H
#define PLANISH_ATTENTION_H

#include "host.h"

/* Compiled code for one head size. */
typedef struct {
  int64_t head_size, causal, block; /* `block` is 0 for dense attention */
  tvm_function call;
} attention_form;

typedef struct {
  planish_op base;
  int mask;  /* the fourth input is a mask, of elements of so many bytes: 0 (there is none), 1 (bool) or 4 (float) */
  int keys;  /* the mask is one of keys, and the node says what a query gives that sees none */
  int past;  /* causal, with the queries at the last positions of the keys */
  int lists; /* indptr, indices and head_layout follow */
  int tiles; /* and entry_tile and tiles */
  int window; /* the node says which keys around a query it sees */
  int lse;   /* compiled code gives the logarithms of the sums: a second output, or to find queries without keys */
  const attention_form *forms; /* up to one without `call` */
} attention_op;

void planish_attention(attention_op *op);

#endif
