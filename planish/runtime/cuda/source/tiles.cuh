// Tiles of 64 rows in shared memory, and products over them, for tensor cores from Turing to Hopper.
//
// A tile is kept as panels of 64 columns: a row of a panel is 128 bytes, and its eight chunks of 16 bytes are permuted by
// the row's number (chunk ^ row % 8). That is what wgmma calls the 128-byte swizzle, and it keeps ldmatrix free of bank
// conflicts too, so that all architectures share one layout.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#ifndef ELEMENT_BF16
#define ELEMENT_BF16 0
#endif
#if ELEMENT_BF16
typedef __nv_bfloat16 Element;
#define ELEMENT_NAME "bf16"
#else
typedef __half Element;
#define ELEMENT_NAME "f16"
#endif

#define TILE 64
#define PANEL_BYTES (TILE * 128)

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WGMMA 1
#else
#define WGMMA 0
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define ASYNC_COPY 1
#else
#define ASYNC_COPY 0
#endif

// A kernel in front of this one may still run until here.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start once all blocks are here; it waits for the end of this one by itself.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Byte offset of a chunk of 8 elements in a tile.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return (chunk >> 3) * PANEL_BYTES + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

// 16 bytes from global to shared memory; zeros where `valid` is false.
__device__ __forceinline__ void copy_chunk(uint32_t to, const void *from, bool valid) {
#if ASYNC_COPY
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
  uint4 data = valid ? *static_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(data.x), "r"(data.y), "r"(data.z), "r"(data.w)
               : "memory");
#endif
}

// 4 bytes alike.
__device__ __forceinline__ void copy_number(uint32_t to, const float *from, bool valid) {
#if ASYNC_COPY
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
#else
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(valid ? *from : 0.f) : "memory");
#endif
}

__device__ __forceinline__ void clear_chunk(uint32_t at) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
}

__device__ __forceinline__ void commit_copies() {
#if ASYNC_COPY
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int PENDING> __device__ __forceinline__ void wait_copies() {
#if ASYNC_COPY
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
#if WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A tile of 64 rows of `columns` elements, by `threads` threads; rows from `rows` on are zeros.
template <int COLUMNS, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t to, const Element *from, long long stride, int rows, int thread) {
  constexpr int CHUNKS = COLUMNS / 8;
  static_assert(TILE * CHUNKS % THREADS == 0, "whole chunks for each thread");
#pragma unroll
  for (int i = 0; i < TILE * CHUNKS / THREADS; ++i) {
    int at = i * THREADS + thread, row = at / CHUNKS, chunk = at % CHUNKS;
    bool valid = row < rows;
    copy_chunk(to + chunk_offset(row, chunk), from + (valid ? row * stride : 0) + chunk * 8, valid);
  }
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
#if ELEMENT_BF16
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
#else
  __half2 both = __floats2half2_rn(low, high);
#endif
  return *reinterpret_cast<uint32_t *>(&both);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---------------------------------------------------------------------------------------------- mma.sync
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

// sum (16 x 8) += a (16 x 16) b (16 x 8); Turing has the half as long product only.
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT_NAME "." ELEMENT_NAME
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
