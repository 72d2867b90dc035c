/* The part of ONNX Runtime's C ABI that kernels use, declared from its public documentation.
 *
 * OrtApi is a table of function pointers that only grows at its end, so a slot keeps its number for good; the numbers
 * below are checked against real sessions by the tests, and the version of the runtime at registration.
 */
#ifndef PLANISH_ORT_ABI_H
#define PLANISH_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef void ort_status; /* NULL is success */
typedef void ort_value;
typedef void ort_context;
typedef void ort_info;
typedef const void *const *ort_api;

typedef struct {
  ort_api (*get_api)(uint32_t version);
  const char *(*version)(void);
} ort_api_base;

enum {
  SLOT_CREATE_STATUS = 0,
  SLOT_CREATE_DOMAIN = 26,
  SLOT_DOMAIN_ADD = 27,
  SLOT_ADD_DOMAIN = 28,
  SLOT_TENSOR_DATA = 51,
  SLOT_DIMENSION_COUNT = 61,
  SLOT_DIMENSIONS = 62,
  SLOT_TYPE_AND_SHAPE = 65,
  SLOT_ATTRIBUTE_FLOAT = 85,
  SLOT_ATTRIBUTE_INT = 86,
  SLOT_INPUT = 90,
  SLOT_OUTPUT = 91,
  SLOT_RELEASE_STATUS = 93,
  SLOT_RELEASE_TYPE_AND_SHAPE = 99,
  SLOT_CONSTANT_INPUT = 249,
  SLOT_PARALLEL_FOR = 274,
};

/* Element types of tensors. */
enum { ORT_FLOAT = 1, ORT_INT32 = 6, ORT_INT64 = 7, ORT_BOOL = 9, ORT_INVALID_GRAPH = 10, ORT_FAIL = 1 };

/* OrtCustomOp, as far as version 16 of the API defines it; NULL members are optional ones. */
typedef struct ort_custom_op {
  uint32_t version;
  void *(*create)(const struct ort_custom_op *, ort_api, const ort_info *);
  const char *(*name)(const struct ort_custom_op *);
  const char *(*provider)(const struct ort_custom_op *);
  int (*input_type)(const struct ort_custom_op *, size_t);
  size_t (*input_count)(const struct ort_custom_op *);
  int (*output_type)(const struct ort_custom_op *, size_t);
  size_t (*output_count)(const struct ort_custom_op *);
  void (*compute)(void *, ort_context *);
  void (*destroy)(void *);
  int (*input_kind)(const struct ort_custom_op *, size_t);
  int (*output_kind)(const struct ort_custom_op *, size_t);
  int (*input_memory)(const struct ort_custom_op *, size_t);
  int (*variadic_input_arity)(const struct ort_custom_op *);
  int (*variadic_input_homogeneous)(const struct ort_custom_op *);
  int (*variadic_output_arity)(const struct ort_custom_op *);
  int (*variadic_output_homogeneous)(const struct ort_custom_op *);
  ort_status *(*create2)(const struct ort_custom_op *, ort_api, const ort_info *, void **);
  ort_status *(*compute2)(void *, ort_context *);
} ort_custom_op;

#endif
