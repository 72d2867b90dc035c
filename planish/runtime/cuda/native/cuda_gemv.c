/* planish::QuantizedLinear4, QuantizedSwiGLU4 and relatives in float16 on GPUs: rows times weights in 4 or 8 bits. */
#include "cuda_gemv.h"

#include <stdlib.h>
#include <string.h>

#include "launch_gemv.h"

#define API(slot, ...) (((ort_status * (*)(__VA_ARGS__)) planish_api[slot]))
enum { X, CODES, SCALES, UP_CODES, UP_SCALES, INPUTS };

typedef struct {
  const cuda_gemv_op *op;
  int64_t block;
  int constant;
} gemv;

static void destroy(void *kernel) { free(kernel); }

static int is_constant(const ort_info *info, size_t index) {
  const ort_value *value = NULL; /* the session's */
  int found = 0;
  ort_status *status = API(SLOT_CONSTANT_INPUT, const ort_info *, size_t, int *, const ort_value **)(info, index, &found, &value);
  if (status) ((void (*)(ort_status *))planish_api[SLOT_RELEASE_STATUS])(status);
  return !status && found;
}

static ort_status *create(const ort_custom_op *given, ort_api api, const ort_info *info, void **made) {
  (void)api;
  const cuda_gemv_op *op = (const cuda_gemv_op *)given;
  int64_t block = planish_int(info, "block_size", 0);
  if (block < 16 || block & (block - 1) || block > 1 << 20)
    return planish_error("%s: blocks of %ld; kernels take powers of two from 16 on", op->base.name, (long)block);
  gemv *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return planish_error("no memory for a kernel");
  *kernel = (gemv){op, block, 1};
  for (size_t i = CODES; i < (size_t)(op->base.inputs - op->bias); ++i) kernel->constant &= is_constant(info, i);
  *made = kernel;
  return NULL;
}

/* Sizes that the kernel can read. */
static ort_status *check(
    const gemv *kernel, const tensor *x, const tensor *codes, const tensor *scales, const tensor *zeros,
    const tensor *bias) {
  const char *name = kernel->op->base.name;
  int bits = kernel->op->bits;
  if (!x->rank) return planish_error("%s: x has rank 0; it must have columns", name);
  int64_t k = x->shape[x->rank - 1], blocks = (k + kernel->block - 1) / kernel->block;
  if (codes->rank != 3 || codes->shape[1] != blocks || codes->shape[2] * 8 != kernel->block * bits)
    return planish_error("%s: codes must be (n, %ld, %ld)", name, (long)blocks, (long)(kernel->block * bits / 8));
  int64_t n = codes->shape[0];
  if (planish_product(scales->shape, scales->rank) != n * blocks)
    return planish_error("%s: there must be %ld scales", name, (long)(n * blocks));
  if (zeros && planish_product(zeros->shape, zeros->rank) != n * ((blocks * bits + 7) / 8))
    return planish_error("%s: zeros must have %ld bytes", name, (long)(n * ((blocks * bits + 7) / 8)));
  if (bias && planish_product(bias->shape, bias->rank) != n)
    return planish_error("%s: the bias must have %ld numbers", name, (long)n);
  if (k % 8 || blocks * kernel->block * bits % 128)
    return planish_error("%s: %ld columns in blocks of %ld; kernels read 16 bytes at a time", name, (long)k, (long)kernel->block);
  if (n > 0x7fffffff - GEMV_TILE || k > 0x7ffffff) return planish_error("%s: a weight of %ld × %ld is too large", name, (long)n, (long)k);
  if (((uintptr_t)x->data | (uintptr_t)codes->data) & 15)
    return planish_error("%s: x and codes must start at multiples of 16 bytes", name);
  return NULL;
}

static ort_status *compute(void *given, ort_context *context) {
  const gemv *kernel = given;
  const cuda_gemv_op *op = kernel->op;
  tensor all[INPUTS], zeros, bias, y;
  cuda_kernel code;
  cuda_stream stream = NULL;
  for (size_t i = X; i <= (op->gated ? UP_SCALES : SCALES); ++i)
    CHECK(planish_input_there(context, i, i == CODES || i == UP_CODES ? 1 : 2, &all[i]));
  if (op->zeros) CHECK(planish_input_there(context, SCALES + 1, 1, &zeros));
  if (op->bias) CHECK(planish_input_there(context, (size_t)(SCALES + 1 + op->zeros), 2, &bias));
  const tensor *bias_there = op->bias ? &bias : NULL, *zeros_there = op->zeros ? &zeros : NULL;
  CHECK(check(kernel, &all[X], &all[CODES], &all[SCALES], zeros_there, bias_there));
  if (op->gated) CHECK(check(kernel, &all[X], &all[UP_CODES], &all[UP_SCALES], NULL, NULL));
  if (op->gated && all[UP_CODES].shape[0] != all[CODES].shape[0])
    return planish_error("%s: the two weights must have as many rows", op->base.name);
  size_t rank = all[X].rank;
  int64_t shape[MAX_RANK], k = all[X].shape[rank - 1], n = all[CODES].shape[0];
  memcpy(shape, all[X].shape, rank * sizeof *shape);
  shape[rank - 1] = n;
  CHECK(planish_output_there(context, 0, 2, shape, rank, &y));
  if (!y.bytes) return NULL;
  CHECK(planish_cuda_stream(context, &stream));
  int64_t rows = planish_product(shape, rank - 1);
  gemv_parameters p = gemv_sizes(n, k, op->bits, kernel->block);
  p.codes = all[CODES].data, p.scales = all[SCALES].data;
  p.zeros = op->zeros ? zeros.data : NULL, p.added = op->bias ? bias.data : NULL;
  if (op->gated) p.up_codes = all[UP_CODES].data, p.up_scales = all[UP_SCALES].data;
  for (int64_t row = 0; row < rows; row += GEMV_ROWS) {
    p.rows = (int)(rows - row < GEMV_ROWS ? rows - row : GEMV_ROWS);
    p.x = (char *)all[X].data + 2 * row * k, p.y = (char *)y.data + 2 * row * n;
    CHECK(planish_cuda_kernel(gemv_few(p.rows, op->bits, kernel->block) ? &op->few : &op->many, &code));
    void *arguments[] = {&p};
    int64_t channels = op->gated ? 2 * n : n; /* a block has as many of each weight as it would have of one */
    unsigned grid = gemv_grid(channels), threads = gemv_threads(channels);
    /* Before it waits for x the kernel reads weights, which nothing in front of it may write. */
    CHECK(kernel->constant ? planish_cuda_launch_early(&code, grid, 1, 1, threads, stream, arguments)
                           : planish_cuda_launch(&code, grid, 1, 1, threads, stream, arguments));
  }
  return NULL;
}

void planish_cuda_gemv(cuda_gemv_op *op) {
  planish_cuda_fill(&op->base);
  op->base.op.create2 = create;
  op->base.op.compute2 = compute;
  op->base.op.destroy = destroy;
}
