// y (rows, n) = x (rows, k) wᵀ for up to 8 rows and weights (n, k) in 4 or 8 bits, as com.microsoft.MatMulNBits stores
// them: a number is (code − zero) · scale, with a scale for each block of codes, or one for each channel.
//
// Such products read every weight once, so that all depends on how many reads are under way, and on how few instructions
// a code takes. A warp has 16 channels and reads 16 bytes for each lane, of two channels, two steps ahead; codes become
// float16 and are multiplied on tensor cores, and sums are float32. The warps of a block share 16 channels and split k.
// A lane has columns of its own, a run of consecutive ones. That is a reordering of the product's columns, and rows of x
// are read in the same order.
//
// FEW is for one or two rows. Of the eight columns of a tensor core's product each of the four runs of a step then has two
// to itself, so that sums of runs stay apart: they are scaled by their blocks, and codes need not be. Else codes are
// scaled before they are multiplied.
//
// Compiled with -D BITS=4|8, CHANNEL=0|1 (one scale for each channel, of float32; else float16 by block), FEW=0|1,
// ZEROS=0|1 (zeros for blocks; else the middle of the codes), GATED=0|1 (two weights, and y = silu(x gateᵀ) · x upᵀ: of the
// 16 channels of a warp eight are of each).
#include "tiles.cuh"

#ifndef BITS
#define BITS 4
#endif
#ifndef CHANNEL
#define CHANNEL 0
#endif
#ifndef FEW
#define FEW 1
#endif
#ifndef ZEROS
#define ZEROS 0
#endif
#ifndef GATED
#define GATED 0
#endif
#define CHANNELS (GATED ? 8 : 16)        // of y, that a block makes
#define WARPS 12                         // of a block, at most; blocks of weights with many channels have fewer
#define GROUP 2                          // steps whose reads are under way
#define LANE_CODES (128 / BITS)          // in 16 bytes
#define STEP (4 * LANE_CODES)            // columns that a warp reads at a time
#define WORDS (16 / BITS)                // registers of two numbers each that a word becomes
#define CHUNKS (LANE_CODES / 8)          // 16 bytes of x that go with a lane's codes
#define PITCH (4 * (CHUNKS + 1))         // of a step of x in shared memory, in 16 bytes: no two lanes share a bank

struct Parameters {
  const Element *x;              // (rows, k)
  const uint4 *codes;            // (n, stride) in 16 bytes
  const void *scales;            // (n) float32, or (n, blocks) float16
  const uint8_t *zeros;          // with ZEROS: (n, blocks) in as many bits as codes, rows in whole bytes
  const Element *added;          // (n), or null
  Element *y;                    // (rows, n)
  const uint4 *up_codes;         // with GATED: of the second weight
  const void *up_scales;
  int rows, n, k, stride, blocks, block_shift, is_signed;  // a block has 2^block_shift codes
};

__device__ __forceinline__ __half2 half2_of(uint32_t pair) { return *reinterpret_cast<__half2 *>(&pair); }
__device__ __forceinline__ uint32_t bits_of(__half2 pair) { return *reinterpret_cast<uint32_t *>(&pair); }

// (word & mask) | magic in one instruction, which takes one of the constants from a register.
template <uint32_t MASK> __device__ __forceinline__ uint32_t masked(uint32_t word, uint32_t magic) {
  uint32_t made;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(made) : "r"(word), "n"(MASK), "r"(magic));
  return made;
}

// Codes less their zero in float16, exact. 1024 + a code is 0x6400 | code, and 64 + one is 0x5400 | code << 4. Of a word
// of 4-bit codes: (0, 4), (1, 5), (2, 6), (3, 7); of one of 8-bit codes: (0, 1), (2, 3).
// `zero`: of both halves, 0x6400 | zero, and of 4 bits 0x5400 | zero << 4.
__device__ __forceinline__ void numbers(uint32_t word, const uint32_t (&zero)[2], uint32_t (&to)[WORDS]) {
#if BITS == 4
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    to[2 * half] = bits_of(__hsub2(half2_of(masked<0x000F000F>(word, 0x64006400)), half2_of(zero[0])));
    to[2 * half + 1] = bits_of(__hsub2(half2_of(masked<0x00F000F0>(word, 0x54005400)), half2_of(zero[1])));
    word >>= 8;
  }
#else
  to[0] = bits_of(__hsub2(half2_of(__byte_perm(word, 0x64646464, 0x4140)), half2_of(zero[0])));
  to[1] = bits_of(__hsub2(half2_of(__byte_perm(word, 0x64646464, 0x4342)), half2_of(zero[0])));
#endif
}

// Where `there` is false nothing is read, and `to` stays as it is.
__device__ __forceinline__ void read_codes(uint4 &to, const uint4 *from, bool there) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0;\n"
               "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
               : "l"(from), "r"(static_cast<int>(there)));
}

// Columns in the order of a word's pairs.
__device__ __forceinline__ uint4 paired(uint4 at) {
#if BITS == 4
  return make_uint4(__byte_perm(at.x, at.z, 0x5410), __byte_perm(at.x, at.z, 0x7632), __byte_perm(at.y, at.w, 0x5410),
                    __byte_perm(at.y, at.w, 0x7632));
#else
  return at;
#endif
}

struct Lane {
  int g, t, warp, lane;  // lane = 4 g + t
  __device__ Lane() : g(threadIdx.x % 32 / 4), t(threadIdx.x % 4), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {}
};

// What a lane reads of a step: codes of two channels, their scales and zeros.
struct Read {
  uint4 codes[2];
#if !CHANNEL
  __half scales[2];
#if !FEW && BITS == 4
  __half second[2];  // of blocks of 16 codes, which come in pairs
#endif
#if ZEROS
  uint32_t zeros[2];  // of one block, or of such a pair
#endif
#endif
};

// Where it reads them.
struct Source {
  const Parameters &p;
  const Lane &at;
  int steps;  // that the lane has
  const uint4 *codes[2];
  const __half *scales[2];
  const uint8_t *zeros[2];

  __device__ Source(const Parameters &p, const Lane &at) : p(p), at(at), steps((p.stride - at.t + 3) / 4) {}

  __device__ __forceinline__ void locate(int tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const long long channel = min(CHANNELS * tile + at.g + (GATED ? 0 : 8 * i), p.n - 1);
      codes[i] = (GATED && i ? p.up_codes : p.codes) + channel * p.stride + at.t + 4 * GROUP * at.warp;
      scales[i] = static_cast<const __half *>(GATED && i ? p.up_scales : p.scales) + channel * p.blocks;
      zeros[i] = p.zeros + channel * ((p.blocks * BITS + 7) / 8);
    }
  }

  // Behind the last step codes stay what they were, and x is zero.
  __device__ __forceinline__ void fetch(Read &to, int slot, int step) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) read_codes(to.codes[i], codes[i] + 4 * slot, step < steps);
#if !CHANNEL
    const int block = (step * STEP + at.t * LANE_CODES) >> p.block_shift, known = min(block, p.blocks - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to.scales[i] = __ldg(scales[i] + known);
#if !FEW && BITS == 4
      to.second[i] = p.block_shift == 4 ? __ldg(scales[i] + min(block + 1, p.blocks - 1)) : to.scales[i];
#endif
#if ZEROS
      to.zeros[i] = __ldg(zeros[i] + (BITS == 8 ? known : known / 2));
      if (BITS == 4 && p.block_shift != 4) to.zeros[i] >>= known % 2 * 4;
#endif
    }
#endif
  }
};

#if FEW
// One or two rows of x in shared memory, as far as a warp needs them next, in the order of codes.
struct Rows {
  static constexpr int CHUNKS_AHEAD = GROUP * STEP / 8, LOADS = (CHUNKS_AHEAD + 31) / 32;
  const Parameters &p;
  const Lane &at;
  uint4 *own;            // of the warp: (2, GROUP * PITCH)
  const uint4 *mine;     // what this lane multiplies: of its run and row, or zeros
  uint4 next[2][LOADS];

  __device__ Rows(const Parameters &p, const Lane &at, uint4 *own, const uint4 *zeros) : p(p), at(at), own(own) {
    mine = at.g / 2 == at.t && at.g % 2 < p.rows ? own + at.g % 2 * GROUP * PITCH + at.t * (CHUNKS + 1) : zeros;
  }

  __device__ __forceinline__ void fetch(int step) {
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        const int chunk = at.lane + 32 * i, column = step * STEP + 8 * chunk;
        const Element *from = p.x + static_cast<long long>(row) * p.k + column;
        if (row < p.rows && chunk < CHUNKS_AHEAD)
          next[row][i] = column < p.k ? __ldg(reinterpret_cast<const uint4 *>(from)) : make_uint4(0, 0, 0, 0);
      }
  }

  __device__ __forceinline__ void store() {
    __syncwarp();
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        const int chunk = at.lane + 32 * i, slot = chunk / (STEP / 8), part = chunk % (STEP / 8);
        const int to = (row * GROUP + slot) * PITCH + part / CHUNKS * (CHUNKS + 1) + part % CHUNKS;
        if (row < p.rows && chunk < CHUNKS_AHEAD) own[to] = paired(next[row][i]);
      }
    __syncwarp();
  }

  __device__ __forceinline__ uint4 chunk(int slot, int i) const { return mine[slot * PITCH + i]; }
};
#else
// Up to eight rows of x where they lie.
struct Rows {
  const Element *x;
  int left;  // columns from there on

  __device__ Rows(const Parameters &p, const Lane &at) {
    const int column = at.warp * GROUP * STEP + at.t * LANE_CODES;
    x = p.x + static_cast<long long>(min(at.g, p.rows - 1)) * p.k + column;
    left = at.g < p.rows ? p.k - column : 0;
  }

  __device__ __forceinline__ void move(int columns) { x += columns, left -= columns; }

  __device__ __forceinline__ uint4 chunk(int slot, int i) const {
    const int column = slot * STEP + 8 * i;
    return paired(column < left ? __ldg(reinterpret_cast<const uint4 *>(x + column)) : make_uint4(0, 0, 0, 0));
  }
};
#endif

// Numbers of a word of a channel, as they are multiplied. `flip` turns signed codes into unsigned ones.
__device__ __forceinline__ void operand(const Read &read, int i, int word, const Parameters &p, uint32_t flip,
                                        uint32_t (&to)[WORDS]) {
  const uint4 all = read.codes[i];
  uint32_t bits = word == 0 ? all.x : word == 1 ? all.y : word == 2 ? all.z : all.w;
  if (BITS == 8) bits ^= flip;
#if ZEROS
  const uint32_t zero = BITS == 8 ? read.zeros[i] : read.zeros[i] >> (p.block_shift == 4 && word >= 2 ? 4 : 0) & 15;
  const uint32_t less[2] = {0x64006400 | zero * 0x00010001, 0x54005400 | zero * 0x00100010};
#else
  const uint32_t less[2] = {BITS == 8 ? 0x64806480u : 0x64086408u, 0x54805480u};
#endif
  numbers(bits, less, to);
#if !CHANNEL && !FEW
#if BITS == 4
  const __half2 scale = __half2half2(word < 2 ? read.scales[i] : read.second[i]);
#else
  const __half2 scale = __half2half2(read.scales[i]);
#endif
#pragma unroll
  for (int j = 0; j < WORDS; ++j) to[j] = bits_of(__hmul2(half2_of(to[j]), scale));
#endif
}

// Adds the products of a step.
__device__ __forceinline__ void work(const Read &read, const Rows &rows, int slot, const Parameters &p, uint32_t flip,
                                     float (&sum)[4]) {
  float part[4] = {};
  uint4 row[CHUNKS];
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) row[i] = rows.chunk(slot, i);
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    uint32_t a[2][WORDS];
#pragma unroll
    for (int i = 0; i < 2; ++i) operand(read, i, word, p, flip, a[i]);
    const uint32_t one[4] = {a[0][0], a[1][0], a[0][1], a[1][1]};
#if BITS == 4
    const uint32_t two[4] = {a[0][2], a[1][2], a[0][3], a[1][3]};
    multiply(FEW ? part : sum, one, row[word].x, row[word].y);
    multiply(FEW ? part : sum, two, row[word].z, row[word].w);
#else
    const uint4 at = row[word / 2];
    multiply(FEW ? part : sum, one, word % 2 ? at.z : at.x, word % 2 ? at.w : at.y);
#endif
  }
#pragma unroll
  for (int i = 0; FEW && i < 4; ++i) {
#if CHANNEL
    sum[i] += part[i];
#else
    sum[i] = fmaf(part[i], __half2float(read.scales[i / 2]), sum[i]);
#endif
  }
}

// Sums of a warp, to those of the other warps: (rows, 16 channels).
__device__ __forceinline__ void hand_over(float (&sum)[4], const Lane &at, float (*parts)[16]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int channel = at.g + i / 2 * 8;
#if FEW
    sum[i] += __shfl_xor_sync(0xffffffff, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffff, sum[i], 2);
    if (at.t == 0) parts[i % 2][channel] = sum[i];
#else
    parts[2 * at.t + i % 2][channel] = sum[i];
#endif
  }
}

__device__ __forceinline__ void finish(const Parameters &p, int tile, const float (*parts)[FEW ? 2 : 8][16]) {
  for (int i = threadIdx.x; i < CHANNELS * p.rows; i += blockDim.x) {
    const int row = i / CHANNELS, at = i % CHANNELS, channel = CHANNELS * tile + at;
    if (channel >= p.n) continue;
    float total = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += parts[warp][row][at];
#if GATED
    float up = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) up += parts[warp][row][at + 8];
    total *= up / (1 + __expf(-total));
#elif CHANNEL
    total *= static_cast<const float *>(p.scales)[channel];
#endif
    if (p.added) total += static_cast<float>(p.added[channel]);
    p.y[static_cast<long long>(row) * p.n + channel] = Element(total);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) quantized_gemv(const __grid_constant__ Parameters p) {
  const Lane at;
  const int tiles = (p.n + CHANNELS - 1) / CHANNELS, steps = (p.stride + 3) / 4;
  const int begin = at.warp * GROUP, stride = GROUP * (blockDim.x / 32);
  const uint32_t flip = p.is_signed ? 0x80808080 : 0;
  Source source(p, at);
  Read ahead[GROUP] = {};
  source.locate(blockIdx.x);
#pragma unroll
  for (int slot = 0; slot < GROUP; ++slot) source.fetch(ahead[slot], slot, begin + slot);
  let_next_start();  // which reads its weights ahead
  wait_for_inputs();
#if FEW
  __shared__ uint4 own[WARPS][2 * GROUP * PITCH], nothing[GROUP * PITCH];
  for (int i = threadIdx.x; i < GROUP * PITCH; i += blockDim.x) nothing[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  Rows rows(p, at, own[at.warp], nothing);
  rows.fetch(begin);
#endif
  __shared__ float parts[2][WARPS][FEW ? 2 : 8][16];
  int parity = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
#if !FEW
    Rows rows(p, at);
#endif
    float sum[4] = {};
    for (int base = begin; base < steps; base += stride) {
      int after = base + stride;  // what is read while this is multiplied
      if (after < steps) {
        source.codes[0] += 4 * stride, source.codes[1] += 4 * stride;
      } else {  // the next tile's first steps
        after = begin;
        source.locate(tile + gridDim.x);
        if (tile + gridDim.x >= tiles) source.steps = 0;
      }
#if FEW
      rows.store();
      rows.fetch(after);
#endif
#pragma unroll
      for (int slot = 0; slot < GROUP; ++slot) {
        work(ahead[slot], rows, slot, p, flip, sum);
        source.fetch(ahead[slot], slot, after + slot);
      }
#if !FEW
      rows.move(stride * STEP);
#endif
    }
    hand_over(sum, at, parts[parity][at.warp]);
    __syncthreads();
    finish(p, tile, parts[parity]);
  }
}
