// Dense flash attention for Hopper (arXiv:2407.08608): one warp group of a thread block copies tiles of 128 keys and
// values by TMA, and each of the others multiplies them for 64 queries. What is exchanged are barriers in shared memory,
// so that the groups drift apart; they take turns at the tensor cores, one weighs its scores while others multiply.
//
// With lists of blocks, a stage has the next two tiles of 64 keys that any of the groups sees.
//
// Compiled with -D HEAD=64|128, ELEMENT_BF16=0|1, LISTS=0|1, and BIAS (without lists) and SHIFT as attention.cuh has them.
#include "attention.cuh"

#ifndef LISTS
#define LISTS 0
#endif
#define GROUPS (HEAD == 64 && !LISTS ? 3 : 2)  // that compute
#define STAGES 2
#define KEYS 128  // of a tile
#define ROWS (GROUPS * TILE)
#define THREADS ((GROUPS + 1) * 128)
#define PANELS (HEAD / 64)
#define TILE_BYTES (PANELS * PANEL_BYTES)  // of 64 rows
#define STAGE_BYTES (4 * TILE_BYTES)       // keys, then values
// Of each thread: a multiprocessor has 65536.
#define REGISTERS (GROUPS == 3 ? 160 : LISTS ? 232 : 240)
#define COPY_REGISTERS (LISTS ? 40 : 24)

#if WGMMA
// Barriers of warps by number: two warp groups meet, one of which need not wait.
__device__ __forceinline__ void meet(int barrier) { asm volatile("bar.sync %0, 256;" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void pass_on(int barrier) { asm volatile("bar.arrive %0, 256;" ::"r"(barrier) : "memory"); }

// What a stage holds: two tiles of 64 keys, and in bit g whether group g sees them.
struct Pair {
  int tile[2];
  uint32_t seen[2];
};

// -inf where a key of a half is later than its query, past the last key, or not seen.
__device__ __forceinline__ void hide(float (&s)[KEYS / 8][4], int half, int key, int query, int keys, bool causal, bool seen) {
#pragma unroll
  for (int i = 0; i < TILE / 8; ++i)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int k = key + i * 8 + (c & 1), q = query + (c >> 1) * 8;
      float &x = s[half * (TILE / 8) + i][c];
      if (!seen || k >= keys || (causal && k > q)) x = -INFINITY;
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention(const __grid_constant__ Parameters p, const __grid_constant__ TensorMap k_map,
              const __grid_constant__ TensorMap v_map) {
#if WGMMA
  extern __shared__ __align__(1024) char memory[];
  const uint32_t queries = shared_address(memory), stages = queries + GROUPS * TILE_BYTES;
  // Barriers: keys there, values there, keys read, values read, for each stage.
  const uint32_t barriers = stages + STAGES * STAGE_BYTES;
  auto there = [&](int stage, int values) { return barriers + 8 * (2 * stage + values); };
  auto read = [&](int stage, int values) { return barriers + 8 * (2 * STAGES + 2 * stage + values); };
  [[maybe_unused]] const uint32_t biases = barriers + 64;  // 128 numbers for each stage
  [[maybe_unused]] const uint32_t pairs = barriers + 64;   // what each stage holds
  const int thread = threadIdx.x % 128, group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
  const int head = blockIdx.y, batch = blockIdx.z, kv_head = head / (p.q_heads / p.kv_heads);
  const int offset = p.causal ? p.keys - p.queries : 0;
  const int block = gridDim.x - 1 - blockIdx.x;  // the longest rows first
#if LISTS  // positions of tiles of queries are those of keys
  const int first_tile = offset / TILE + block * GROUPS, first = first_tile * TILE - offset;
#else
  const int first = block * ROWS;
  int stages_of_keys = (p.keys + KEYS - 1) / KEYS;
  if (p.causal) stages_of_keys = min(stages_of_keys, (offset + min(first + ROWS, p.queries) + KEYS - 1) / KEYS);
#endif
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * STAGES; ++i) {
      barrier_start(barriers + 8 * i, BIAS && i % 2 == 0 ? 2 : 1);
      barrier_start(barriers + 8 * (2 * STAGES + i), GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (group < 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
    int stage = 0, phase = 1;
    auto copy = [&](int values, int one, int two) {
      const TensorMap &map = values ? v_map : k_map;
      const uint32_t barrier = there(stage, values), to = stages + stage * STAGE_BYTES + values * 2 * TILE_BYTES;
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int half = 0; half < 2; ++half)  // a panel of keys has 128 rows, one of values 64
          load_panel(to + (values ? half * PANELS + panel : 2 * panel + half) * PANEL_BYTES, map, panel * 64,
                     (half ? two : one) * TILE, kv_head, batch, barrier);
    };
    auto next_stage = [&] {
      if (++stage == STAGES) stage = 0, phase ^= 1;
    };
    if (thread == 0) {
#if LISTS
      Cursor<GROUPS> cursor;
      cursor.start(p, first_tile, offset, head, (p.keys + TILE - 1) / TILE);
      for (bool more = true; more; next_stage()) {
        Pair pair;
        pair.tile[0] = cursor.step(pair.seen[0]);
        more = pair.tile[0] != NONE;
        pair.tile[1] = more ? cursor.step(pair.seen[1]) : NONE;
        if (pair.tile[1] == NONE) pair.tile[1] = pair.tile[0], pair.seen[1] = 0;  // anything, and nobody sees it
        barrier_wait(read(stage, 0), phase);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(pairs + stage * 16), "r"(pair.tile[0]), "r"(pair.tile[1]),
                     "r"(pair.seen[0]), "r"(pair.seen[1]) : "memory");
        if (!more) {
          barrier_arrive(there(stage, 0));
          break;
        }
        for (int values = 0; values < 2; ++values) {
          if (values) barrier_wait(read(stage, 1), phase);
          barrier_expect(there(stage, values), 2 * TILE_BYTES);
          copy(values, pair.tile[0], pair.tile[1]);
        }
      }
#else
      for (int i = stages_of_keys - 1; i >= 0; --i, next_stage())
        for (int values = 0; values < 2; ++values) {
          barrier_wait(read(stage, values), phase);
          barrier_expect(there(stage, values), 2 * TILE_BYTES);
          copy(values, 2 * i, 2 * i + 1);
        }
#endif
    }
#if BIAS
    if (thread >= 32 && thread < 64) {
      const float *bias = p.bias + batch * p.bias_batch;
      for (int i = stages_of_keys - 1; i >= 0; --i, next_stage()) {
        barrier_wait(read(stage, 0), phase);
#pragma unroll
        for (int j = 0; j < KEYS / 32; ++j) {
          const int at = j * 32 + thread - 32, key = i * KEYS + at;
          const float number = key < p.keys ? bias[key] : 0.f;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(biases + (stage * KEYS + at) * 4), "f"(number) : "memory");
        }
        __syncwarp();
        if (thread == 32) barrier_arrive(there(stage, 0));
      }
    }
#endif
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  const int warp = thread / 32, lane = thread % 32, first_row = first + group * TILE;
  const uint32_t own = queries + group * TILE_BYTES;
  const Element *q = p.q + batch * p.q_batch + head * p.q_head;
#pragma unroll
  for (int i = 0; i < TILE * HEAD / 8 / 128; ++i) {
    int at = i * 128 + thread, row = first_row + at / (HEAD / 8), chunk = at % (HEAD / 8);
    bool inside = row >= 0 && row < p.queries;
    copy_chunk(own + chunk_offset(at / (HEAD / 8), chunk), q + (inside ? row * p.q_row : 0) + chunk * 8, inside);
  }
  commit_copies();
  wait_copies<0>();
#if SHIFT
#pragma unroll
  for (int i = 0; i < TILE * HEAD / 8 / 128; ++i) {  // each thread adds to the chunks that it copied
    int at = i * 128 + thread, chunk = at % (HEAD / 8);
    add_to_chunk(own + chunk_offset(at / (HEAD / 8), chunk), p.q_shift + head * HEAD + chunk * 8);
  }
  wait_copies<0>();  // what is written in the usual way is seen by wgmma behind this
#endif
  asm volatile("bar.sync %0, 128;" ::"r"(8 + group) : "memory");

  const int row = first_row + warp * 16 + lane / 4;
  float o[HEAD / 8][4] = {}, s[KEYS / 8][4], factor[2];
  uint32_t operand[KEYS / 16][4];
  Softmax<KEYS> softmax;
  auto score = [&](int stage) {
    const uint32_t at = stages + stage * STAGE_BYTES;
#pragma unroll
    for (int step = 0; step < HEAD / 16; ++step) {
      const uint32_t panel = step >> 2, column = (step & 3) * 32;
      group_multiply(s, descriptor(own + panel * PANEL_BYTES + column), descriptor(at + 2 * panel * PANEL_BYTES + column),
                     step > 0);
    }
    group_commit();
  };
  auto weigh = [&](int stage) {
    const uint32_t at = stages + stage * STAGE_BYTES + 2 * TILE_BYTES;
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j)
      group_multiply_rows(o, operand[j], descriptor(at + (j >> 2) * TILE_BYTES + (j & 3) * 2048));
    group_commit();
  };
  auto done = [&](uint32_t barrier) {
    if (thread == 0) barrier_arrive(barrier);
  };
  auto soften = [&](const Pair &pair, int stage) {
#if BIAS
    const float raw = p.scale * 0.69314718056f;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
      float b0, b1;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(b0), "=f"(b1)
                   : "r"(biases + (stage * KEYS + j * 8 + lane % 4 * 2) * 4) : "memory");
      s[j][0] = fmaf(s[j][0], raw, b0), s[j][1] = fmaf(s[j][1], raw, b1);
      s[j][2] = fmaf(s[j][2], raw, b0), s[j][3] = fmaf(s[j][3], raw, b1);
    }
#endif
    done(read(stage, 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = pair.tile[half] * TILE;
      const bool seen = !LISTS || (pair.seen[half] >> group & 1);
      if (!seen || key + TILE > p.keys || (p.causal && key + TILE - 1 > first_row + offset))
        hide(s, half, key + lane % 4 * 2, row + offset, p.keys, p.causal, seen);
    }
    softmax.step(s, BIAS ? 1.44269504089f : p.scale, factor);
  };
  const int mine = 1 + group, next = 1 + (group + 1) % GROUPS;
  if (group == GROUPS - 1) pass_on(next);

  // Waits for the keys of a stage; false if there are no more.
#if LISTS
  auto arrive = [&](int stage, int phase, Pair &pair) {
    barrier_wait(there(stage, 0), phase);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(pair.tile[0]), "=r"(pair.tile[1]), "=r"(pair.seen[0]),
                 "=r"(pair.seen[1]) : "r"(pairs + stage * 16) : "memory");
    return pair.tile[0] != NONE;
  };
#else
  int left = stages_of_keys;
  auto arrive = [&](int stage, int phase, Pair &pair) {
    if (--left < 0) return false;
    pair.tile[0] = 2 * left, pair.tile[1] = 2 * left + 1;
    barrier_wait(there(stage, 0), phase);
    return true;
  };
#endif

  Pair pair;
  if (arrive(0, 0, pair)) {
    meet(mine);
    group_fence();
    score(0);
    pass_on(next);
    group_wait<0>();
    soften(pair, 0);
    to_operand(s, operand);
    int stage = 0, phase = 0;
#pragma unroll 1
    while (true) {
      const int after = stage + 1 == STAGES ? 0 : stage + 1, its = after ? phase : phase ^ 1;
      if (!arrive(after, its, pair)) break;
      meet(mine);
      group_fence();
      score(after);
      barrier_wait(there(stage, 1), phase);
      weigh(stage);
      pass_on(next);
      group_wait<1>();
      soften(pair, after);
      group_wait<0>();
      done(read(stage, 1));
      shrink(o, factor);
      to_operand(s, operand);
      stage = after, phase = its;
    }
    barrier_wait(there(stage, 1), phase);
    group_fence();
    weigh(stage);
    group_wait<0>();
  }

  write_rows(p, o, softmax.maximum, softmax.sum, row, lane, head, kv_head, batch);
#endif
}
