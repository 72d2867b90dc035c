/* What the operators' glue is written with: tensors of ONNX Runtime as arguments of compiled TIR functions. */
#ifndef PLANISH_HOST_H
#define PLANISH_HOST_H

#include "ort_abi.h"

#define MAX_RANK 8

/* A compiled TIR function (TVM's packed calling convention). */
typedef struct {
  int32_t type;
  uint32_t padding;
  union {
    int64_t integer;
    double real;
    void *pointer;
  } value;
} tvm_any;
typedef int (*tvm_function)(void *self, const tvm_any *arguments, int32_t count, tvm_any *result);

/* DLPack's tensor. */
typedef struct {
  void *data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape;
  int64_t *strides; /* NULL: compact */
  uint64_t byte_offset;
} dl_tensor;

enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BOOL = 6 };

/* A tensor of the graph. */
typedef struct {
  void *data; /* starts at a multiple of 64 bytes, and is never NULL */
  int64_t shape[MAX_RANK];
  size_t rank;
  void *copy; /* what `data` is, where the graph's own memory (`home`) does not start at such a multiple */
  void *home;
  size_t bytes;
} tensor;

/* Every operator begins with this; the rest is its glue's. */
typedef struct {
  ort_custom_op op; /* first, so that a pointer to it is a pointer to this */
  const char *name;
  int inputs, outputs;
  const int *types; /* of the inputs, then of the outputs */
} planish_op;

/* The members of `op` that all operators share; `create2`, `compute2` and `destroy` are the glue's. */
void planish_fill(planish_op *op);

extern ort_api planish_api;

#define CHECK(expression)                  \
  do {                                     \
    ort_status *status_ = (expression);    \
    if (status_) return status_;           \
  } while (0)

ort_status *planish_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Input `index`, of elements of `width` bytes; free with `planish_release`. */
ort_status *planish_input(ort_context *, size_t index, size_t width, tensor *);
/* The same where they lie, aligned or not; NULL for a tensor of nothing. Nothing is to be released. */
ort_status *planish_input_there(ort_context *, size_t index, size_t width, tensor *);
ort_status *planish_output_there(
    ort_context *, size_t index, size_t width, const int64_t *shape, size_t rank, tensor *);
/* A constant input, when the kernel is made; `*found` is 0 if it is none. */
ort_status *planish_constant(const ort_info *, size_t index, size_t width, tensor *, int *found);
/* Output `index` of this shape; once written it is handed over with `planish_finish`. */
ort_status *planish_output(ort_context *, size_t index, size_t width, const int64_t *shape, size_t rank, tensor *);
void planish_finish(tensor *);
void planish_release(tensor *);
/* Attributes of the node, or `otherwise` where it does not have them. */
int64_t planish_int(const ort_info *, const char *name, int64_t otherwise);
float planish_float(const ort_info *, const char *name, float otherwise);

int64_t planish_product(const int64_t *sizes, size_t count);
/* Memory that starts at a multiple of 64 bytes, to be freed with `free`; NULL if there is none. */
void *planish_allocate(size_t bytes);

/* An argument for a compiled function; `t` and `shape` must live until the call returns. */
tvm_any planish_argument(dl_tensor *t, void *data, int code, int bits, int rank, int64_t *shape);
tvm_any planish_scalar_int(int64_t);
tvm_any planish_scalar_float(double);
/* Calls a compiled function; its parallel loops run on ONNX Runtime's threads. */
ort_status *planish_call(ort_context *, tvm_function, const tvm_any *arguments, int count);

#endif
