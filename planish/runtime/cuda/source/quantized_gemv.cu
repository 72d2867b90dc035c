// y (rows, n) = x (rows, k) wᵀ for up to 8 rows and weights (n, k) in 4 or 8 bits, as com.microsoft.MatMulNBits stores
// them: a number is (code − 2^(bits − 1)) · scale, with a scale for each block of codes, or one for each channel.
//
// Such products read every weight once, so that all depends on how many reads are under way at a time. A warp has 16
// channels and reads 16 bytes for each lane, of two channels; codes become float16 and are multiplied on tensor cores,
// where 8 rows cost no more than one, and sums are float32. The warps of a block share 16 channels and split k.
//
// A lane has columns of its own, a run of consecutive ones. That is a reordering of the product's columns, and rows of x
// are read in the same order.
//
// Of one or two rows of x (FEW), the eight columns that tensor cores take are four for each row, one for the run of each
// lane: so sums of a run stay apart, and scales are multiplied with them, four a step, rather than with every code.
//
// Compiled with -D BITS=4|8, CHANNEL=0|1 (one scale for each channel, of float32; else float16 by block), FEW=0|1.
#include "tiles.cuh"

#ifndef BITS
#define BITS 4
#endif
#ifndef CHANNEL
#define CHANNEL 0
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef FEW
#define FEW 0
#endif
#define SCALED (!CHANNEL && !FEW)        // codes are scaled one by one
#define LANE_CODES (128 / BITS)          // in 16 bytes
#define STEP (4 * LANE_CODES)            // columns that a warp reads at a time
#ifndef AHEAD
#define AHEAD (ASYNC_COPY ? 5 : 2)       // steps in shared memory: one that is worked on, the others under way
#endif
#ifndef BLOCKS
#define BLOCKS 1                         // on a multiprocessor, at least
#endif

struct Parameters {
  const Element *x;              // (rows, k)
  const uint4 *codes;            // (n, stride) in 16 bytes
  const void *scales;            // (n) float32, or (n, blocks) float16
  const Element *added;          // (n), or null
  Element *y;                    // (rows, n)
  int rows, n, k, stride, blocks, block_shift, is_signed;  // a block has 2^block_shift codes
};

__device__ __forceinline__ uint32_t minus(uint32_t pair, uint32_t other) {
  __half2 difference = __hsub2(*reinterpret_cast<__half2 *>(&pair), *reinterpret_cast<__half2 *>(&other));
  return *reinterpret_cast<uint32_t *>(&difference);
}

__device__ __forceinline__ uint32_t times(uint32_t pair, __half2 by) {
  __half2 product = __hmul2(*reinterpret_cast<__half2 *>(&pair), by);
  return *reinterpret_cast<uint32_t *>(&product);
}

// 1024 + a code is float16's 0x6400 | code. Of a word of 4-bit codes: (0, 4), (1, 5), (2, 6), (3, 7); of one of 8-bit
// codes: (0, 1), (2, 3).
__device__ __forceinline__ void numbers(uint32_t word, uint32_t (&to)[16 / BITS]) {
#if BITS == 4
  const __half2 sixteenth = __float2half2_rn(0.0625f), middle = __float2half2_rn(-72.f);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t low = (word & 0x000F000F) | 0x64006400, high = (word & 0x00F000F0) | 0x64006400;
    to[2 * half] = minus(low, 0x64086408);
    __half2 scaled = __hfma2(*reinterpret_cast<__half2 *>(&high), sixteenth, middle);  // (1024 + 16 code) / 16 - 72
    to[2 * half + 1] = *reinterpret_cast<uint32_t *>(&scaled);
    word >>= 8;
  }
#else
  to[0] = minus(__byte_perm(word, 0x64646464, 0x4140), 0x64806480);
  to[1] = minus(__byte_perm(word, 0x64646464, 0x4342), 0x64806480);
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) quantized_gemv(const __grid_constant__ Parameters p) {
  // Codes of AHEAD steps, of two channels for each lane, which reads its own only.
  __shared__ uint4 ring[WARPS][AHEAD][2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * 16, steps = (p.k + STEP - 1) / STEP;
  const uint4 *codes[2];
#if !CHANNEL
  const __half *scales[2];
#endif
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const long long channel = min(first + g + 8 * i, p.n - 1);
    codes[i] = p.codes + channel * p.stride + t;
#if !CHANNEL
    scales[i] = static_cast<const __half *>(p.scales) + channel * p.blocks;
#endif
  }
#if FEW
  const int mine = g / 4;
  const bool reads = mine < p.rows && g % 4 == t;
#else
  const int mine = g;
  const bool reads = mine < p.rows;
#endif
  const Element *x = p.x + static_cast<long long>(min(mine, p.rows - 1)) * p.k;
  auto fetch = [&](int slot, int step) {
    const bool there = step < steps && step * 4 + t < p.stride;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      copy_chunk(shared_address(&ring[warp][slot][i][lane]), codes[i] + (there ? step * 4 : 0), there);
    commit_copies();
  };
  float sum[4] = {};
#if CHANNEL || !FEW
  float (&part)[4] = sum;
#endif
#pragma unroll
  for (int slot = 0; slot < AHEAD - 1; ++slot) fetch(slot, warp + slot * WARPS);
  int slot = 0;
#pragma unroll 1
  for (int step = warp; step < steps; step += WARPS) {
    const int column = step * STEP + t * LANE_CODES;
    uint4 row[LANE_CODES / 8];
#pragma unroll
    for (int i = 0; i < LANE_CODES / 8; ++i)
      row[i] = reads && column + 8 * i < p.k ? __ldg(reinterpret_cast<const uint4 *>(x + column + 8 * i))
                                                  : make_uint4(0, 0, 0, 0);
#if SCALED
    __half2 scale[2];  // of the first half of a lane's codes and of the second, which differ in blocks of 16
    const int block = min(column >> p.block_shift, p.blocks - 1);
    const int second = min((column + LANE_CODES / 2) >> p.block_shift, p.blocks - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = __half2half2(__ldg(scales[i] + block));
      if (BITS == 4 && p.block_shift == 4) scale[i].y = __ldg(scales[i] + second);
    }
#elif !CHANNEL
    __half scale[4];  // of the sums that the lane gets
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int run = (2 * t + i % 2) % 4, block = (step * STEP + run * LANE_CODES) >> p.block_shift;
      scale[i] = __ldg(scales[i / 2] + min(block, p.blocks - 1));
    }
    float part[4] = {};
#endif
#if ASYNC_COPY
    asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 2) : "memory");
#endif
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 some = ring[warp][slot][i][lane];
      words[i][0] = some.x, words[i][1] = some.y, words[i][2] = some.z, words[i][3] = some.w;
    }
    // To where the codes of the step before were.
    fetch(slot == 0 ? AHEAD - 1 : slot - 1, step + (AHEAD - 1) * WARPS);
    slot = slot + 1 == AHEAD ? 0 : slot + 1;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      uint32_t a[2][16 / BITS];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (BITS == 8 && p.is_signed) words[i][word] ^= 0x80808080;
        numbers(words[i][word], a[i]);
#if SCALED
        const __half2 by = __half2half2(word < 2 ? scale[i].x : scale[i].y);
#pragma unroll
        for (int j = 0; j < 16 / BITS; ++j) a[i][j] = times(a[i][j], by);
#endif
      }
      const uint32_t one[4] = {a[0][0], a[1][0], a[0][1], a[1][1]};
#if BITS == 4
      const uint32_t two[4] = {a[0][2], a[1][2], a[0][3], a[1][3]};
      const uint4 at = row[word];  // a word's pairs are (0, 4), (1, 5), (2, 6), (3, 7)
      multiply(part, one, __byte_perm(at.x, at.z, 0x5410), __byte_perm(at.x, at.z, 0x7632));
      multiply(part, two, __byte_perm(at.y, at.w, 0x5410), __byte_perm(at.y, at.w, 0x7632));
#else
      const uint4 at = row[word / 2];
      multiply(part, one, word % 2 ? at.z : at.x, word % 2 ? at.w : at.y);
#endif
    }
#if !CHANNEL && FEW
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fmaf(part[i], __half2float(scale[i]), sum[i]);
#endif
  }
  wait_copies<0>();
  __shared__ float parts[WARPS][16][8];
  for (int i = 0; i < 4; ++i) parts[warp][g + i / 2 * 8][2 * t + i % 2] = sum[i];
  __syncthreads();
  if (threadIdx.x >= 128) return;
  const int row = threadIdx.x / 16, channel = threadIdx.x % 16;
  if (row >= p.rows || first + channel >= p.n) return;
  float total = 0;
#if FEW
  for (int i = 0; i < WARPS; ++i)
    for (int run = 0; run < 4; ++run) total += parts[i][channel][row * 4 + run];
#else
  for (int i = 0; i < WARPS; ++i) total += parts[i][channel][row];
#endif
#if CHANNEL
  total *= static_cast<const float *>(p.scales)[first + channel];
#endif
  if (p.added) total += static_cast<float>(p.added[first + channel]);
  p.y[static_cast<long long>(row) * p.n + first + channel] = Element(total);
}
