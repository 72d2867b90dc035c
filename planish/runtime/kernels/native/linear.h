/* What the generated table says of an operator of the Linear family. */
#ifndef PLANISH_LINEAR_H
#define PLANISH_LINEAR_H

#include "host.h"

/* One way to compute the product. A weight (K, N), or (N, K) if it is transposed, is packed to (panels of `width` columns, K in steps of `rows`,
 * rows * width) elements of DLPack's `code` and `bits`. */
typedef struct {
  int64_t type; /* of the operands of the product, as in ONNX: 1 float32, 16 bfloat16 */
  tvm_function call, pack;
  int64_t width, rows;
  int code, bits;
  int stored; /* bits of an element of the weight as the graph has it: 32 (float32) or 16 (bfloat16) */
} linear_form;

typedef struct {
  planish_op base;
  int weights, bias, residual, transposed;
  const linear_form *forms; /* ends with one whose `call` is NULL */
} linear_op;

void planish_linear(linear_op *op);

/* Shape of a packed weight; returns its rank. */
int planish_packed_shape(const linear_form *, int64_t k, int64_t n, int64_t *shape);
/* Packs a weight (K, N), or (N, K) if it is transposed, into memory to be freed with `free`; `sizes` gets K and N. */
ort_status *planish_pack(
    const linear_form *, int transposed, ort_context *, tensor *weight, void **packed, int64_t *sizes);

#endif
