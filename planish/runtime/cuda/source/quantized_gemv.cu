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
// Compiled with -D BITS=4|8, CHANNEL=0|1 (one scale for each channel, of float32; else float16 by block).
#include "tiles.cuh"

#ifndef BITS
#define BITS 4
#endif
#ifndef CHANNEL
#define CHANNEL 0
#endif
#define WARPS 8
#define LANE_CODES (128 / BITS)          // in 16 bytes
#define STEP (4 * LANE_CODES)            // columns that a warp reads at a time
#define AHEAD 4                          // steps whose reads are under way

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

// What a lane reads of a step: codes of two channels, and their scales. Four-bit codes in blocks of 16 have two.
struct Read {
  uint4 codes[2];
#if !CHANNEL
  __half2 scales[2];
#endif
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) quantized_gemv(const __grid_constant__ Parameters p) {
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
  const Element *x = p.x + static_cast<long long>(min(g, p.rows - 1)) * p.k;
  // Behind the last step codes are zeros, scales any, and x zero, so that nothing has to be left out.
  auto fetch = [&](Read &to, int step) {
    const bool there = step * 4 + t < p.stride;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to.codes[i] = there ? __ldcs(codes[i] + step * 4) : make_uint4(0, 0, 0, 0);
#if !CHANNEL
      const int column = step * STEP + t * LANE_CODES, block = column >> p.block_shift;
      to.scales[i] = __half2half2(__ldg(scales[i] + min(block, p.blocks - 1)));
      if (BITS == 4 && p.block_shift == 4) to.scales[i].y = __ldg(scales[i] + min(block + 1, p.blocks - 1));
#endif
    }
  };
  float sum[4] = {};
  auto work = [&](const Read &read, int step) {
    const int column = step * STEP + t * LANE_CODES;
    uint4 row[LANE_CODES / 8];
#pragma unroll
    for (int i = 0; i < LANE_CODES / 8; ++i)
      row[i] = g < p.rows && column + 8 * i < p.k ? __ldg(reinterpret_cast<const uint4 *>(x + column + 8 * i))
                                                  : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      uint32_t a[2][16 / BITS];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 all = read.codes[i];
        uint32_t bits = word == 0 ? all.x : word == 1 ? all.y : word == 2 ? all.z : all.w;
        if (BITS == 8 && p.is_signed) bits ^= 0x80808080;
        numbers(bits, a[i]);
#if !CHANNEL
        const __half2 scale = __half2half2(word < 2 ? read.scales[i].x : read.scales[i].y);
#pragma unroll
        for (int j = 0; j < 16 / BITS; ++j) a[i][j] = times(a[i][j], scale);
#endif
      }
      const uint32_t one[4] = {a[0][0], a[1][0], a[0][1], a[1][1]};
#if BITS == 4
      const uint32_t two[4] = {a[0][2], a[1][2], a[0][3], a[1][3]};
      const uint4 at = row[word];  // a word's pairs are (0, 4), (1, 5), (2, 6), (3, 7)
      multiply(sum, one, __byte_perm(at.x, at.z, 0x5410), __byte_perm(at.x, at.z, 0x7632));
      multiply(sum, two, __byte_perm(at.y, at.w, 0x5410), __byte_perm(at.y, at.w, 0x7632));
#else
      const uint4 at = row[word / 2];
      multiply(sum, one, word % 2 ? at.z : at.x, word % 2 ? at.w : at.y);
#endif
    }
  };
  Read ahead[AHEAD];
#pragma unroll
  for (int slot = 0; slot < AHEAD; ++slot) fetch(ahead[slot], warp + slot * WARPS);
  for (int base = warp; base < steps; base += AHEAD * WARPS)
#pragma unroll
    for (int slot = 0; slot < AHEAD; ++slot) {
      const Read now = ahead[slot];
      fetch(ahead[slot], base + (slot + AHEAD) * WARPS);
      work(now, base + slot * WARPS);
    }
  __shared__ float parts[WARPS][16][8];
  for (int i = 0; i < 4; ++i) parts[warp][g + i / 2 * 8][2 * t + i % 2] = sum[i];
  __syncthreads();
  if (threadIdx.x >= 128) return;
  const int row = threadIdx.x / 16, channel = threadIdx.x % 16;
  if (row >= p.rows || first + channel >= p.n) return;
  float total = 0;
  for (int i = 0; i < WARPS; ++i) total += parts[i][channel][row];
#if CHANNEL
  total *= static_cast<const float *>(p.scales)[first + channel];
#endif
  if (p.added) total += static_cast<float>(p.added[first + channel]);
  p.y[static_cast<long long>(row) * p.n + first + channel] = Element(total);
}
