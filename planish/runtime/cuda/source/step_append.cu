// The key and the value of one token a row, written into caches where the row ends, for attention_decode.cu behind it.
#include <cuda_fp16.h>

struct Parameters {
  const uint4 *k, *v;        // (batch, kv_heads, size), in chunks of 8 elements
  uint4 *to_k, *to_v;        // (batch, kv_heads, capacity, size)
  const int *lengths;        // (batch): tokens that a row holds
  int *totals;               // (batch): with the new one, those that it sees
  long long capacity;
  int kv_heads, chunks;      // chunks of a head, at most half of the threads
};

extern "C" __global__ void __launch_bounds__(32) step_append(const __grid_constant__ Parameters p) {
  const int head = blockIdx.x, row = blockIdx.y, held = p.lengths[row];
  if (head == 0 && threadIdx.x == 0) p.totals[row] = min(max(held, 0), (int)p.capacity - 1) + 1;
  const bool value = threadIdx.x >= 16;
  const int chunk = threadIdx.x % 16;
  if (chunk >= p.chunks || held < 0 || held >= p.capacity) return;
  const long long from = ((long long)row * p.kv_heads + head) * p.chunks + chunk;
  const long long to = (((long long)row * p.kv_heads + head) * p.capacity + held) * p.chunks + chunk;
  (value ? p.to_v : p.to_k)[to] = (value ? p.v : p.k)[from];
}
