// Rows times weights in 4 or 8 bits by planish's own kernel, up to eight rows at a time.
#define BINARIES "gemv_binaries.h"
#include "kernels.h"
#include "launch_gemv.h"

// Forms of the source.
static int form_of(int few, int zeros) { return few + 2 * zeros; }

// (x (rows, k) float16, codes (n, blocks, bytes), scales (n, blocks) float16, [zeros (n, bytes)], [bias (n) float16],
// bits, block, whether there are zeros, whether there is a bias, y (rows, n))
EXPORT int __tvm_ffi_planish_quantized_gemv(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  if (count < 8 || count > 10) return failed("planish_quantized_gemv", "arguments", count);
  const TVMFFIAny *rest = args + count - 5;
  int bits = (int)rest[0].v_int64, zeros = (int)rest[2].v_int64, bias = (int)rest[3].v_int64;
  const DLTensor *x = tensor(args), *codes = tensor(args + 1), *y = tensor(rest + 4);
  if (count != 8 + zeros + bias) return failed("planish_quantized_gemv", "arguments", count);
  int64_t rows = x->shape[0], k = x->shape[1], n = codes->shape[0], block = rest[1].v_int64;
  int device = x->device.device_id;
  if (((uintptr_t)data(x) | (uintptr_t)data(codes)) & 15)
    return failed("planish_quantized_gemv", "x and codes must start at multiples of 16 bytes", 0);
  gemv_parameters p = gemv_sizes(n, k, bits, block);
  p.codes = data(codes), p.scales = data(tensor(args + 2));
  p.zeros = zeros ? data(tensor(args + 3)) : NULL, p.added = bias ? data(tensor(args + 3 + zeros)) : NULL;
  for (int64_t row = 0; row < rows; row += GEMV_ROWS) {
    p.rows = (int)(rows - row < GEMV_ROWS ? rows - row : GEMV_ROWS);
    p.x = (char *)data(x) + 2 * row * k, p.y = (char *)data(y) + 2 * row * n;
    void *function = NULL, *arguments[] = {&p};
    if (kernel(device, 0, bits, form_of(gemv_few(p.rows, bits, block), zeros), "quantized_gemv", 0, 0, &function)) return -1;
    if (launch(function, "quantized_gemv", gemv_grid(n), 1, 1, gemv_threads(n), 0, stream(x), arguments)) return -1;
  }
  return 0;
}
