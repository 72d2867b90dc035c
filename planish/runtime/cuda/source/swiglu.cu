// y = gate · sigmoid(gate) · up, elementwise, in float32 inside (Shazeer 2020, arXiv:2002.05202). One pass over memory:
// eight elements of 16 bits to a thread.
#include "tiles.cuh"

__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }

__device__ __forceinline__ float2 widened(uint32_t word) {
#if ELEMENT_BF16
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&word));
#else
  return __half22float2(*reinterpret_cast<const __half2 *>(&word));
#endif
}

__device__ __forceinline__ uint32_t both(uint32_t gate, uint32_t up) {
  float2 a = widened(gate), b = widened(up);
  return pack(gated(a.x, b.x), gated(a.y, b.y));
}

struct Parameters {
  const Element *gate, *up;
  Element *y;
  long long count;
};

extern "C" __global__ void __launch_bounds__(256) swiglu(const __grid_constant__ Parameters p) {
  const long long first = (static_cast<long long>(blockIdx.x) * 256 + threadIdx.x) * 8;
  if (first + 8 <= p.count) {
    uint4 a = *reinterpret_cast<const uint4 *>(p.gate + first), b = *reinterpret_cast<const uint4 *>(p.up + first);
    uint4 y = {both(a.x, b.x), both(a.y, b.y), both(a.z, b.z), both(a.w, b.w)};
    *reinterpret_cast<uint4 *>(p.y + first) = y;
    return;
  }
  for (long long i = first; i < p.count; ++i) {
    float2 a = widened(*reinterpret_cast<const unsigned short *>(p.gate + i));
    float2 b = widened(*reinterpret_cast<const unsigned short *>(p.up + i));
    p.y[i] = Element(gated(a.x, b.x));
  }
}
