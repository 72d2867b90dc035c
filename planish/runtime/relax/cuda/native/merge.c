// Merging of similar tokens by planish's own kernel.
#define BINARIES "merge_binaries.h"
#include "kernels.h"
#include "launch_merge.h"

// (x (batch, tokens, width), keys (batch, tokens, heads · size), sizes (batch, tokens) float32, heads, protected, whether
// by energy, whether scaled to the longest norm, margin, alpha; y (batch, left, width), merged sizes (batch, left), index
// (batch, tokens) int64, scratch (bytes))
EXPORT int __tvm_ffi_planish_merge_tokens(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  if (count != 13 || args[7].type_index != kTVMFFIFloat) return failed("planish_merge_tokens", "arguments", count);
  const DLTensor *x = tensor(args), *keys = tensor(args + 1), *y = tensor(args + 9), *scratch = tensor(args + 12);
  int64_t batch = x->shape[0], tokens = x->shape[1], heads = args[3].v_int64, protect = args[4].v_int64;
  int64_t gone = tokens - y->shape[1], size = keys->shape[2] / heads;
  int energy = (int)args[5].v_int64, device = x->device.device_id, arch = arch_of(device);
  if (!arch) return -1;
  if (tokens > (energy ? MERGE_MOST_BY_ENERGY : MERGE_MOST_TOKENS))
    return failed("planish_merge_tokens", "more tokens than the kernel takes", (int)tokens);
  merge_parameters p;
  memset(&p, 0, sizeof p);
  p.x = data(x), p.keys = data(keys), p.sizes = data(tensor(args + 2));
  p.y = data(y), p.merged = data(tensor(args + 10)), p.index = data(tensor(args + 11)), p.scratch = data(scratch);
  p.x_row = x->shape[2], p.x_batch = tokens * p.x_row;
  p.keys_head = size, p.keys_row = keys->shape[2], p.keys_batch = tokens * p.keys_row;
  p.scratch_batch = merge_scratch(tokens, protect, size, gone, energy);
  if (batch * p.scratch_batch > scratch->shape[0]) return failed("planish_merge_tokens", "too little scratch", 0);
  p.tokens = (int)tokens, p.width = (int)x->shape[2], p.heads = (int)heads, p.size = (int)size, p.count = (int)gone;
  p.protect = (int)(protect < tokens ? protect : tokens), p.max_norm = (int)args[6].v_int64;
  int64_t each = 128 / x->dtype.bits;
  p.wide = !(((uintptr_t)p.x | (uintptr_t)p.keys) & 15) && !(p.x_row % each) && !(size % each);
  p.margin = (float)args[7].v_float64, p.alpha = (float)args[8].v_float64;
  int value = x->dtype.bits == 32 ? 2 : x->dtype.code == kDLBfloat ? 1 : 0;
  void *function = NULL, *arguments[] = {&p};
  if (kernel(device, energy, 0, value, "merge_tokens", 0, 0, &function)) return -1;
  return launch_clusters(function, "merge_tokens", merge_cluster(arch, processors[device], batch), (unsigned)batch,
                         MERGE_THREADS, (int)merge_shared(tokens, protect, gone, energy), stream(x), arguments);
}
