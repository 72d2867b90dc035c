// total = x + (a + b); y = total / sqrt(mean(total²) + epsilon) · weight (Zhang & Sennrich 2019, arXiv:1910.07467), by
// rows, in float32 inside; b may be absent. It is what follows a sum over two ranks that their copies have not added yet:
// a + b is one number on both ranks, whichever of them is a. A block has one row, and keeps it in registers. Without y it
// only adds.
#include "tiles.cuh"

#ifndef CHUNKS
#define CHUNKS 2  // of eight elements to a thread
#endif
#define THREADS 256

struct Parameters {
  const Element *x, *a, *b, *weight;
  Element *y, *total;
  long long x_row, a_row, b_row, y_row, total_row;  // strides in elements; those of columns are 1
  int width;  // a multiple of 8, at most 8 · CHUNKS · THREADS
  float epsilon;
};

__device__ __forceinline__ float2 widened(uint32_t word) {
#if ELEMENT_BF16
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&word));
#else
  return __half22float2(*reinterpret_cast<const __half2 *>(&word));
#endif
}

__device__ __forceinline__ uint32_t narrowed(float low, float high) {
#if ELEMENT_BF16
  __nv_bfloat162 made = __floats2bfloat162_rn(low, high);
#else
  __half2 made = __floats2half2_rn(low, high);
#endif
  return *reinterpret_cast<uint32_t *>(&made);
}

__device__ __forceinline__ void load(const Element *from, float (&to)[8]) {
  const uint4 word = *reinterpret_cast<const uint4 *>(from);
  const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = widened(words[i]);
    to[2 * i] = both.x, to[2 * i + 1] = both.y;
  }
}

__device__ __forceinline__ void store(Element *to, const float (&from)[8]) {
  *reinterpret_cast<uint4 *>(to) = make_uint4(narrowed(from[0], from[1]), narrowed(from[2], from[3]),
                                              narrowed(from[4], from[5]), narrowed(from[6], from[7]));
}

extern "C" __global__ void __launch_bounds__(THREADS) add_rms_norm(const __grid_constant__ Parameters p) {
  const long long row = blockIdx.x;
  float kept[CHUNKS][8], squares = 0.f;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int column = (chunk * THREADS + threadIdx.x) * 8;
    if (column >= p.width) continue;
    float a[8], b[8];
    load(p.x + row * p.x_row + column, kept[chunk]);
    load(p.a + row * p.a_row + column, a);
    if (p.b != nullptr) {
      load(p.b + row * p.b_row + column, b);
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] += b[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      kept[chunk][i] += a[i];
      squares += kept[chunk][i] * kept[chunk][i];
    }
    if (p.total != nullptr) store(p.total + row * p.total_row + column, kept[chunk]);
  }
  if (p.y == nullptr) return;
  __shared__ float sums[THREADS / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0.f;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) squares += sums[i];
  const float scale = rsqrtf(squares / p.width + p.epsilon);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int column = (chunk * THREADS + threadIdx.x) * 8;
    if (column >= p.width) continue;
    float weight[8];
    load(p.weight + column, weight);
#pragma unroll
    for (int i = 0; i < 8; ++i) weight[i] *= kept[chunk][i] * scale;
    store(p.y + row * p.y_row + column, weight);
  }
}
