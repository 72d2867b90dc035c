// Hopper's products of a warp group (wgmma), over tiles as tiles.cuh lays them out.
#pragma once
#include "tiles.cuh"

// A tensor's description for Hopper's copies of whole tiles (CUtensorMap); other architectures do not read it.
struct alignas(64) TensorMap {
  char data[128];
};

#if WGMMA
// Barriers in shared memory that count the bytes of copies; a phase ends when those that were announced are there.
__device__ __forceinline__ void barrier_start(uint32_t barrier, int arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// A panel of 64 rows: coordinates are column, token, head and batch.
__device__ __forceinline__ void load_panel(uint32_t to, const TensorMap &map, int column, int token, int head, int batch,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          to),
      "l"(&map), "r"(column), "r"(token), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// Descriptor of a matrix in shared memory: 128-byte swizzle; eight rows are 1024 bytes, a panel PANEL_BYTES.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(PANEL_BYTES >> 4) << 16) |
         (static_cast<uint64_t>(1024 >> 4) << 32) | (1ull << 62);
}

__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void group_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The registers of a sum, in assembly and as operands: of 8 columns each a row of four.
#define REGISTERS_32                                                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, "  \
  "%25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                                                     \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "  \
  "%55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_1(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
#define SUMS_8(i)                                                                                                        \
  SUMS_1(i), SUMS_1(i + 1), SUMS_1(i + 2), SUMS_1(i + 3), SUMS_1(i + 4), SUMS_1(i + 5), SUMS_1(i + 6), SUMS_1(i + 7)

// sum (64 x 64) = a bᵀ, or += it: a (64 x 16) and b (64 x 16) in shared memory, 16 columns of their panels.
__device__ __forceinline__ void group_multiply(float (&sum)[8][4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT_NAME "." ELEMENT_NAME " "
      "{" REGISTERS_32 "}, %32, %33, p, 1, 1, 0, 0; }"
      : SUMS_8(0)
      : "l"(a), "l"(b), "r"(add));
}

// sum (64 x 128) = a bᵀ, or += it: a (64 x 16) and b (128 x 16) in shared memory, 16 columns of their panels.
__device__ __forceinline__ void group_multiply(float (&sum)[16][4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT_NAME "." ELEMENT_NAME " "
      "{" REGISTERS_32 ", " REGISTERS_64 "}, %64, %65, p, 1, 1, 0, 0; }"
      : SUMS_8(0), SUMS_8(8)
      : "l"(a), "l"(b), "r"(add));
}

// sum (64 x 64) += a b: a (64 x 16) in registers, b (16 x 64) in shared memory, 16 rows of its panels.
__device__ __forceinline__ void group_multiply_rows(float (&sum)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT_NAME "." ELEMENT_NAME " "
      "{" REGISTERS_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : SUMS_8(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// sum (64 x 128) += a b: a (64 x 16) in registers, b (16 x 128) in shared memory, 16 rows of its panels.
__device__ __forceinline__ void group_multiply_rows(float (&sum)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT_NAME "." ELEMENT_NAME " "
      "{" REGISTERS_32 ", " REGISTERS_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : SUMS_8(0), SUMS_8(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef REGISTERS_32
#undef REGISTERS_64
#undef SUMS_1
#undef SUMS_8
#endif
