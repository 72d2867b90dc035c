/* How quantized_gemv.cu is launched: a few rows times a weight in 4 or 8 bits, scaled by blocks, as MatMulNBits has it.
   Nothing here asks for a runtime or a driver. */
#ifndef PLANISH_LAUNCH_GEMV_H
#define PLANISH_LAUNCH_GEMV_H

#include <stdint.h>

enum { GEMV_ROWS = 8, GEMV_FEW_ROWS = 2, GEMV_TILE = 16 };
enum { GEMV_FEW_CHANNELS = 4224, GEMV_MANY_CHANNELS = 8192 };

/* As quantized_gemv.cu has it. */
typedef struct {
  const void *x, *codes, *scales, *zeros, *added;
  void *y;
  const void *up_codes, *up_scales; /* with GATED: of the second weight */
  int rows, n, k, stride, blocks, block_shift, is_signed;
} gemv_parameters;

/* Grid and threads for n channels; a pair of weights has twice as many as one. Few blocks have more of them to
   themselves; many are smaller, and more evenly spread. */
static inline unsigned gemv_grid(int64_t channels) { return (unsigned)((channels + GEMV_TILE - 1) / GEMV_TILE); }
static inline unsigned gemv_threads(int64_t channels) {
  return channels <= GEMV_FEW_CHANNELS ? 384 : channels <= GEMV_MANY_CHANNELS ? 256 : 128;
}

/* Whether the form for one or two rows takes a call; its blocks do not end inside of 16 bytes. */
static inline int gemv_few(int64_t rows, int bits, int64_t block) {
  return rows <= GEMV_FEW_ROWS && !(bits == 4 && block < 32);
}

/* Sizes of a weight (n, k) in blocks, a power of two; addresses and rows are left to the caller. */
static inline gemv_parameters gemv_sizes(int64_t n, int64_t k, int bits, int64_t block) {
  gemv_parameters p = {0};
  int64_t blocks = (k + block - 1) / block;
  p.n = (int)n, p.k = (int)k, p.blocks = (int)blocks, p.stride = (int)(blocks * block * bits / 128);
  while ((int64_t)1 << p.block_shift < block) ++p.block_shift;
  return p;
}

#endif
