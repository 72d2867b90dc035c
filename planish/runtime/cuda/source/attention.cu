// Flash attention (arXiv:2205.14135, arXiv:2307.08691) over all key tiles, or over those that CSR lists of blocks name
// (S2-Attention, arXiv:2407.17678). One thread block computes GROUPS tiles of 64 queries of a head; it walks the key
// tiles that any of them sees, and every one of its groups of four warps keeps a running softmax of its own tile.
//
// Compiled with -D HEAD=64|128, GROUPS=1|2, ELEMENT_BF16=0|1, and BIAS and SHIFT as attention.cuh has them; with a bias, over
// all key tiles.
#include "attention.cuh"

#ifndef GROUPS
#define GROUPS 2
#endif
#define THREADS (GROUPS * 128)
#define TILE_BYTES (HEAD / 64 * PANEL_BYTES)
// Turing has 64 KB of shared memory, and no copies that run by themselves.
#ifndef AHEAD  // tiles that are on their way while others are computed, on Hopper
#define AHEAD 1
#endif
#if WGMMA
#define STAGES (AHEAD + 2)  // one is weighed and one scored
#elif ASYNC_COPY
#define STAGES 2
#else
#define STAGES 1
#endif
#if WGMMA && HEAD == 64
#define BLOCKS (512 / THREADS)  // on a multiprocessor: the registers of 16 warps
#else
#define BLOCKS 1
#endif

// -inf where a key is later than its query, past the last key, or of a tile that the group does not see.
__device__ __forceinline__ void hide(float (&s)[TILE / 8][4], int key, int query, int keys, bool causal, bool seen) {
#pragma unroll
  for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int k = key + j * 8 + (c & 1), q = query + (c >> 1) * 8;
      if (!seen || k >= keys || (causal && k > q)) s[j][c] = -INFINITY;
    }
}

#if !WGMMA
// s = q kᵀ of a warp's 16 queries; the lanes' addresses are those that ldmatrix wants.
__device__ __forceinline__ void scores(float (&s)[TILE / 8][4], uint32_t q, uint32_t k, int warp, int lane) {
#pragma unroll
  for (int j = 0; j < TILE / 8; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
#pragma unroll
  for (int step = 0; step < HEAD / 16; ++step) {
    uint32_t a[4];
    load_matrices(a, q + chunk_offset(warp * 16 + (lane & 15), step * 2 + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < TILE / 16; ++j) {
      uint32_t b[4];
      load_matrices(b, k + chunk_offset(j * 16 + (lane >> 4) * 8 + (lane & 7), step * 2 + (lane >> 3 & 1)));
      multiply(s[2 * j], a, b[0], b[1]);
      multiply(s[2 * j + 1], a, b[2], b[3]);
    }
  }
}

__device__ __forceinline__ void weighted(float (&o)[HEAD / 8][4], const uint32_t (&p)[TILE / 16][4], uint32_t v, int lane) {
#pragma unroll
  for (int j = 0; j < TILE / 16; ++j)
#pragma unroll
    for (int n = 0; n < HEAD / 16; ++n) {
      uint32_t b[4];
      load_transposed(b, v + chunk_offset(j * 16 + (lane & 15), n * 2 + (lane >> 4)));
      multiply(o[2 * n], p[j], b[0], b[1]);
      multiply(o[2 * n + 1], p[j], b[2], b[3]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention(const __grid_constant__ Parameters p, const __grid_constant__ TensorMap k_map,
              const __grid_constant__ TensorMap v_map) {
  extern __shared__ __align__(1024) char memory[];  // nothing is before it, so that it is aligned
  const uint32_t base = shared_address(memory);
  const uint32_t stages = base + GROUPS * TILE_BYTES;
  const int thread = threadIdx.x, warp = thread / 32 % 4, lane = thread % 32, group = thread / 128;
  const int head = blockIdx.y, kv_head = head / (p.q_heads / p.kv_heads), batch = blockIdx.z;
  const int keys = p.lengths ? min(p.lengths[batch], p.keys) : p.keys, tiles = (keys + TILE - 1) / TILE;
  // Positions: tiles of queries and of keys have common borders, so that a tile lies in one row of the layout.
  const int offset = p.causal ? p.keys - p.queries : 0;
  // The longest rows first, so that the last blocks to run are short.
  const int first_tile = offset / TILE + (gridDim.x - 1 - blockIdx.x) * GROUPS;
  const Element *q = p.q + batch * p.q_batch + head * p.q_head;
#if BIAS
  const uint32_t biases = stages + STAGES * 2 * TILE_BYTES + 64;  // behind the barriers: 64 numbers for each stage
  auto load_bias = [&](int stage, int tile) {
    int key = tile * TILE + thread;
    if (thread < TILE && tile != NONE)
      copy_number(biases + (stage * TILE + thread) * 4, p.bias + batch * p.bias_batch + (key < keys ? key : 0), key < keys);
  };
#else
  auto load_bias = [](int, int) {};
#endif

#pragma unroll
  for (int i = 0; i < GROUPS * TILE * HEAD / 8 / THREADS; ++i) {
    int at = i * THREADS + thread, row = at / (HEAD / 8), chunk = at % (HEAD / 8);
    int query = first_tile * TILE + row - offset;
    bool there = query >= 0 && query < p.queries;
    copy_chunk(base + row / TILE * TILE_BYTES + chunk_offset(row % TILE, chunk), q + (there ? query * p.q_row : 0) + chunk * 8, there);
  }
#if SHIFT
  // Each thread adds to the chunks that it copied, once they are there.
  auto shift_queries = [&] {
#pragma unroll
    for (int i = 0; i < GROUPS * TILE * HEAD / 8 / THREADS; ++i) {
      int at = i * THREADS + thread, row = at / (HEAD / 8), chunk = at % (HEAD / 8);
      add_to_chunk(base + row / TILE * TILE_BYTES + chunk_offset(row % TILE, chunk), p.q_shift + head * HEAD + chunk * 8);
    }
  };
#endif
  Cursor<GROUPS> cursor;
  cursor.start(p, first_tile, offset, head, tiles);
  uint32_t now;  // what each group sees of a tile
#if WGMMA
  const uint32_t arrived = stages + STAGES * 2 * TILE_BYTES;
  if (thread == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_start(arrived + 8 * i);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  auto load = [&](int stage, int tile) {
    load_bias(stage, tile);
    if (thread != 0 || tile == NONE) return;
    uint32_t to = stages + stage * 2 * TILE_BYTES, barrier = arrived + 8 * stage;
    barrier_expect(barrier, 2 * TILE_BYTES);
    for (int panel = 0; panel < HEAD / 64; ++panel) {
      load_panel(to + panel * PANEL_BYTES, k_map, panel * 64, tile * TILE, kv_head, batch, barrier);
      load_panel(to + TILE_BYTES + panel * PANEL_BYTES, v_map, panel * 64, tile * TILE, kv_head, batch, barrier);
    }
  };
  // What lies behind the last key may be anything in memory, and zero times that must be zero.
  auto arrive = [&](int stage, uint32_t phase, int tile) {
    barrier_wait(arrived + 8 * stage, phase);
#if BIAS
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    int rows = keys - tile * TILE;
    if (p.lengths && rows < TILE) {
      for (int i = thread; i < (TILE - rows) * HEAD / 8; i += THREADS)
        clear_chunk(stages + stage * 2 * TILE_BYTES + TILE_BYTES + chunk_offset(rows + i / (HEAD / 8), i % (HEAD / 8)));
      wait_copies<0>();
    }
    __syncthreads();
  };
#else
  const Element *k = p.k + batch * p.k_batch + kv_head * p.k_head, *v = p.v + batch * p.v_batch + kv_head * p.v_head;
  auto load = [&](int stage, int tile) {
    load_bias(stage, tile);
    if (tile != NONE) {
      uint32_t to = stages + stage * 2 * TILE_BYTES;
      int rows = min(TILE, keys - tile * TILE);
      load_tile<HEAD, THREADS>(to, k + static_cast<long long>(tile) * TILE * p.k_row, p.k_row, rows, thread);
      load_tile<HEAD, THREADS>(to + TILE_BYTES, v + static_cast<long long>(tile) * TILE * p.v_row, p.v_row, rows, thread);
    }
    commit_copies();
  };
#endif

  float o[HEAD / 8][4] = {}, factor[2];
  uint32_t operand[TILE / 16][4] = {};
  Softmax<TILE> softmax;
  const int first_query = (first_tile + group) * TILE, query = first_query + warp * 16 + lane / 4;
  const float scale = BIAS ? 1.44269504089f : p.scale;
  [[maybe_unused]] const float raw = p.scale * 0.69314718056f;
  auto soften = [&](float(&s)[TILE / 8][4], int tile, bool visible, int stage) {
#if BIAS
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
      float b0, b1;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(b0), "=f"(b1)
                   : "r"(biases + (stage * TILE + j * 8 + lane % 4 * 2) * 4) : "memory");
      s[j][0] = fmaf(s[j][0], raw, b0), s[j][1] = fmaf(s[j][1], raw, b1);
      s[j][2] = fmaf(s[j][2], raw, b0), s[j][3] = fmaf(s[j][3], raw, b1);
    }
#endif
    if (!visible || (tile + 1) * TILE > keys || (p.causal && tile * TILE + TILE - 1 > first_query))
      hide(s, tile * TILE + lane % 4 * 2, query, keys, p.causal, visible);
    softmax.step(s, scale, factor);
  };
  int tile = cursor.step(now);
  load(0, tile);
#if WGMMA
  // The scores of a tile are computed together with the product of the tile before; the next ones are on their way.
  int ahead[AHEAD], stage = 0;
  uint32_t visible[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD - 1; ++i) {
    ahead[i] = cursor.step(visible[i]);
    load(i + 1, ahead[i]);
  }
  commit_copies();
  wait_copies<0>();  // the queries
#if SHIFT
  shift_queries();
  wait_copies<0>();  // what is written in the usual way is seen by wgmma behind this
#endif
  __syncthreads();
  uint32_t phase = 0;
  auto keys_at = [&](int stage) { return stages + stage * 2 * TILE_BYTES; };
  auto score = [&](float(&s)[TILE / 8][4], uint32_t at) {
#pragma unroll
    for (int step = 0; step < HEAD / 16; ++step) {
      uint32_t column = (step >> 2) * PANEL_BYTES + (step & 3) * 32;
      group_multiply(s, descriptor(base + group * TILE_BYTES + column), descriptor(at + column), step > 0);
    }
    group_commit();
  };
  auto weigh = [&](uint32_t at) {
#pragma unroll
    for (int j = 0; j < TILE / 16; ++j) group_multiply_rows(o, operand[j], descriptor(at + j * 2048));
    group_commit();
  };
  if (tile != NONE) {
    ahead[AHEAD - 1] = cursor.step(visible[AHEAD - 1]);
    arrive(0, 0, tile);
    load(AHEAD, ahead[AHEAD - 1]);
    float s[TILE / 8][4];
    group_fence();
    score(s, keys_at(0));
    group_wait<0>();
    soften(s, tile, now >> group & 1, 0);
    to_operand(s, operand);
    while ((tile = ahead[0]) != NONE) {
      now = visible[0];
#pragma unroll
      for (int i = 0; i < AHEAD - 1; ++i) ahead[i] = ahead[i + 1], visible[i] = visible[i + 1];
      ahead[AHEAD - 1] = cursor.step(visible[AHEAD - 1]);
      const int before = stage;
      if (++stage == STAGES) stage = 0, phase ^= 1;
      arrive(stage, phase, tile);
      load((stage + AHEAD) % STAGES, ahead[AHEAD - 1]);
      group_fence();
      score(s, keys_at(stage));
      weigh(keys_at(before) + TILE_BYTES);
      group_wait<1>();
      soften(s, tile, now >> group & 1, stage);
      group_wait<0>();
      shrink(o, factor);
      to_operand(s, operand);
    }
    group_fence();
    weigh(keys_at(stage) + TILE_BYTES);
    group_wait<0>();
  }
#else
  int next;
  uint32_t later;
#if SHIFT
  wait_copies<0>();
  shift_queries();
#endif
  for (int stage = 0; tile != NONE; tile = next, now = later, stage ^= STAGES > 1) {
    uint32_t at = stages;
#if STAGES > 1
    at += stage * 2 * TILE_BYTES;
    next = cursor.step(later);
    load(stage ^ 1, next);
    wait_copies<1>();
#endif
    __syncthreads();
    float s[TILE / 8][4];
    scores(s, base + group * TILE_BYTES, at, warp, lane);
    soften(s, tile, now >> group & 1, stage);
    shrink(o, factor);
    to_operand(s, operand);
    weighted(o, operand, at + TILE_BYTES, lane);
    __syncthreads();
#if STAGES == 1
    next = cursor.step(later);
    load(0, next);
#endif
  }
#endif
  wait_copies<0>();

  write_rows(p, o, softmax.maximum, softmax.sum, query - offset, lane, head, kv_head, batch);
}
