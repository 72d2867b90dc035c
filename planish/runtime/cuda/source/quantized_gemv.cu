// y (rows, n) = x (rows, k) wᵀ for up to 8 rows and weights (n, k) in 4 or 8 bits, as com.microsoft.MatMulNBits stores
// them: a number is (code − zero) · scale, with a scale for each block of codes, or one for each channel.
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
#define WARPS 8                          // of a block, at most; blocks of weights with many channels have fewer
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
  const uint8_t *zeros;          // (n, blocks) in as many bits as codes, rows in whole bytes; used with ZEROS
  const Element *added;          // (n), or null
  Element *y;                    // (rows, n)
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

__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

struct Read {
  uint4 codes[2];
#if !CHANNEL
  __half scales[2];
#if !FEW && BITS == 4
  __half second[2];  // of blocks of 16 codes
#endif
#if ZEROS
  uint32_t zeros[2];  // of two neighbouring blocks
#endif
#endif
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 3) quantized_gemv(const __grid_constant__ Parameters p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tiles = (p.n + 15) / 16, steps = (p.stride + 3) / 4, begin = warp * GROUP, stride = GROUP * (blockDim.x / 32);
  const uint32_t flip = p.is_signed ? 0x80808080 : 0;
  // What is read next.
  int there = (p.stride - t + 3) / 4;
  const uint4 *codes[2];
#if !CHANNEL
  const __half *scales[2];
#endif
#if ZEROS
  const uint8_t *zeros[2];
#endif
  auto locate = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const long long channel = min(16 * tile + g + 8 * i, p.n - 1);
      codes[i] = p.codes + channel * p.stride + t + 4 * begin;
#if !CHANNEL
      scales[i] = static_cast<const __half *>(p.scales) + channel * p.blocks;
#endif
#if ZEROS
      zeros[i] = p.zeros + channel * ((p.blocks * BITS + 7) / 8);
#endif
    }
  };
  auto fetch = [&](Read &to, int slot, int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) read_codes(to.codes[i], codes[i] + 4 * slot, step < there);
#if !CHANNEL
    const int block = (step * STEP + t * LANE_CODES) >> p.block_shift;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to.scales[i] = __ldg(scales[i] + min(block, p.blocks - 1));
#if !FEW && BITS == 4
      to.second[i] = p.block_shift == 4 ? __ldg(scales[i] + min(block + 1, p.blocks - 1)) : to.scales[i];
#endif
#if ZEROS
      const int at = min(block, p.blocks - 1);  // blocks of 16 codes come in pairs, which share a byte
      to.zeros[i] = BITS == 8 ? __ldg(zeros[i] + at) : __ldg(zeros[i] + at / 2) >> (p.block_shift == 4 ? 0 : at % 2 * 4);
#endif
    }
#endif
  };
  Read ahead[GROUP] = {};
  locate(blockIdx.x);
#pragma unroll
  for (int slot = 0; slot < GROUP; ++slot) fetch(ahead[slot], slot, begin + slot);
  wait_for_inputs();
#if FEW
  // Columns of the product are (lane's part of a step, row): so sums of parts stay apart, each to be scaled by its block.
  constexpr int LOADS = (GROUP * STEP / 8 + 31) / 32;
  __shared__ uint4 rows[WARPS][2][GROUP * PITCH];
  __shared__ uint4 nothing[GROUP * PITCH];
  for (int i = threadIdx.x; i < GROUP * PITCH; i += blockDim.x) nothing[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  const uint4 *mine = g / 2 == t && g % 2 < p.rows ? rows[warp][g % 2] + t * (CHUNKS + 1) : nothing;
  uint4 next[2][LOADS];
  auto fetch_rows = [&](int step) {
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        const int column = step * STEP + 8 * (lane + 32 * i);
        if (row < p.rows && lane + 32 * i < GROUP * STEP / 8)
          next[row][i] = column < p.k ? __ldg(reinterpret_cast<const uint4 *>(p.x + static_cast<long long>(row) * p.k + column))
                                      : make_uint4(0, 0, 0, 0);
      }
  };
  fetch_rows(begin);
#endif
  int parity = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
#if !FEW
    const Element *x = p.x + static_cast<long long>(min(g, p.rows - 1)) * p.k + begin * STEP + t * LANE_CODES;
    int left = g < p.rows ? p.k - begin * STEP - t * LANE_CODES : 0;  // columns from there on
#endif
    float sum[4] = {};
    auto work = [&](const Read &read, int slot) {
      float part[4] = {};
      uint4 row[CHUNKS];
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
#if FEW
        row[i] = mine[slot * PITCH + i];
#else
        const int column = slot * STEP + 8 * i;
        row[i] = paired(column < left ? __ldg(reinterpret_cast<const uint4 *>(x + column)) : make_uint4(0, 0, 0, 0));
#endif
      }
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        uint32_t a[2][WORDS];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 all = read.codes[i];
          uint32_t bits = word == 0 ? all.x : word == 1 ? all.y : word == 2 ? all.z : all.w;
          if (BITS == 8) bits ^= flip;
#if ZEROS
          uint32_t zero = BITS == 8 ? read.zeros[i] : read.zeros[i] >> (p.block_shift == 4 && word >= 2 ? 4 : 0) & 15;
          const uint32_t less[2] = {0x64006400 | zero * 0x00010001, 0x54005400 | zero * 0x00100010};
#else
          const uint32_t less[2] = {BITS == 8 ? 0x64806480u : 0x64086408u, 0x54805480u};
#endif
          numbers(bits, less, a[i]);
#if !CHANNEL && !FEW
#if BITS == 4
          const __half2 scale = __half2half2(word < 2 ? read.scales[i] : read.second[i]);
#else
          const __half2 scale = __half2half2(read.scales[i]);
#endif
#pragma unroll
          for (int j = 0; j < WORDS; ++j) a[i][j] = bits_of(__hmul2(half2_of(a[i][j]), scale));
#endif
        }
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
#if FEW && !CHANNEL
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(part[i], __half2float(read.scales[i / 2]), sum[i]);
#elif FEW
      for (int i = 0; i < 4; ++i) sum[i] += part[i];
#endif
    };
    for (int base = begin; base < steps; base += stride) {
      int after = base + stride;
      if (after < steps) {
        codes[0] += 4 * stride, codes[1] += 4 * stride;
      } else {  // the next tile's first ones
        after = begin;
        locate(tile + gridDim.x);
        if (tile + gridDim.x >= tiles) there = 0;
      }
#if FEW
      __syncwarp();
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
          const int at = lane + 32 * i, slot = at / (STEP / 8), part = at % (STEP / 8);
          if (r < p.rows && at < GROUP * STEP / 8) rows[warp][r][slot * PITCH + part / CHUNKS * (CHUNKS + 1) + part % CHUNKS] = paired(next[r][i]);
        }
      __syncwarp();
      fetch_rows(after);
#endif
#pragma unroll
      for (int slot = 0; slot < GROUP; ++slot) {
        work(ahead[slot], slot);
        fetch(ahead[slot], slot, after + slot);
      }
#if !FEW
      x += stride * STEP, left -= stride * STEP;
#endif
    }
    __shared__ float parts[2][WARPS][FEW ? 2 : 8][16];
#if FEW
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffff, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffff, sum[i], 2);
      if (t == 0) parts[parity][warp][i % 2][g + i / 2 * 8] = sum[i];
    }
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[parity][warp][2 * t + i % 2][g + i / 2 * 8] = sum[i];
#endif
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * p.rows; i += blockDim.x) {
      const int row = i / 16, channel = 16 * tile + i % 16;
      if (channel >= p.n) continue;
      float total = 0;
      for (int w = 0; w < blockDim.x / 32; ++w) total += parts[parity][w][row][i % 16];
#if CHANNEL
      total *= static_cast<const float *>(p.scales)[channel];
#endif
      if (p.added) total += static_cast<float>(p.added[channel]);
      p.y[static_cast<long long>(row) * p.n + channel] = Element(total);
    }
    parity ^= 1;
  }
}
