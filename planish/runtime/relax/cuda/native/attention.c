// Flash attention, planish's own kernels: fat binaries that are in this library, loaded on each GPU when first called.
#include "calls.h"

enum { ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76, MAX_DYNAMIC_SHARED = 8, TILE = 64 };

// As in attention.cu.
typedef struct {
  const void *q, *k, *v;
  void *out, *lse;
  long long q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head;
  const int *indptr, *indices, *head_layout, *lengths;
  int queries, keys, q_heads, kv_heads, causal, rows, block;
  float scale;
  const float *bias;
  long long bias_batch;
} Parameters;

typedef struct {
  const unsigned char *code;
  int head, groups, bias;
} Binary;

// A list of BINARY(number, head, groups, bias), made when the library is linked; each is a file of that number.
#define BINARY(n, head, groups, bias)                                                               \
  __asm__(".section .rodata\n.balign 64\n.hidden planish_code_" #n "\n.globl planish_code_" #n      \
          "\nplanish_code_" #n ":\n.incbin \"attention" #n ".fatbin\"\n.byte 0\n.previous\n");      \
  extern const unsigned char planish_code_##n[];
#include "binaries.h"
#undef BINARY
#define BINARY(n, head, groups, bias) {planish_code_##n, head, groups, bias},
static const Binary binaries[] = {
#include "binaries.h"
};
#define COUNT (int)(sizeof binaries / sizeof *binaries)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Driver cu;
static void *functions[DEVICES][sizeof binaries / sizeof *binaries];
static int arches[DEVICES];

static int wrong(const char *doing, int code) {
  const char *why = "the driver refuses";
  if (cu.get_error) cu.get_error(code, &why);
  return failed(doing, why ? why : "the driver refuses", code);
}

static int find_driver(void) {
  static const char *const names[] = {"cuGetErrorString", "cuDeviceGet", "cuDeviceGetAttribute", "cuModuleLoadData",
                                      "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel",
                                      "cuTensorMapEncodeTiled"};
  if (cu.tensor_map) return 0;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), *found[sizeof names / sizeof *names];
  if (!library) return failed("attention", "there is no NVIDIA driver", 0);
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i)
    if (!(found[i] = dlsym(library, names[i]))) return failed("attention: the driver lacks", names[i], 0);
  memcpy(&cu, found, sizeof cu);
  return 0;
}

// Shared memory of a block: the queries' tiles, the keys' and values' of each stage, barriers, biases.
static int shared_bytes(int arch, int head, int groups, int bias) {
  int stages = arch == 90 ? AHEAD + 2 : arch >= 80 ? 2 : 1;
  return (groups + 2 * stages) * TILE * head * 2 + 64 + bias * stages * TILE * 4;
}

// The kernel of a head size on a GPU, whose context is current. The lock is held.
static int kernel(int device, int head, int groups, int bias, void **function) {
  int code, major, minor, handle;
  if (!arches[device]) {
    if ((code = cu.device(&handle, device)) || (code = cu.attribute(&major, ATTRIBUTE_MAJOR, handle)) ||
        (code = cu.attribute(&minor, ATTRIBUTE_MINOR, handle)))
      return wrong("attention", code);
    arches[device] = 10 * major + minor;
  }
  for (int i = 0; i < COUNT; ++i) {
    if (binaries[i].head != head || binaries[i].groups != groups || binaries[i].bias != bias) continue;
    void **kept = &functions[device][i], *module;
    if (!*kept) {
      if ((code = cu.load(&module, binaries[i].code)) || (code = cu.function(kept, module, "attention")) ||
          (code = cu.set_attribute(*kept, MAX_DYNAMIC_SHARED, shared_bytes(arches[device], head, groups, bias)))) {
        *kept = NULL;
        return wrong("loading attention", code);
      }
    }
    *function = *kept;
    return 0;
  }
  return failed("attention", "no kernel for heads of this size", head);
}

// For Hopper's copies of tiles; others do not read it.
static int map(unsigned char *made, const DLTensor *t, int heads, int head) {
  uint64_t sizes[] = {(uint64_t)head, (uint64_t)t->shape[1], (uint64_t)heads, (uint64_t)t->shape[0]};
  uint64_t row = 2 * (uint64_t)t->shape[2], strides[] = {row, 2 * (uint64_t)head, row * (uint64_t)t->shape[1]};
  uint32_t box[] = {64, TILE, 1, 1}, one[] = {1, 1, 1, 1};
  // 16-bit elements, not interleaved, 128-byte swizzle, L2 sectors of 128 bytes, zeros outside
  return cu.tensor_map(made, 6, 4, data(t), sizes, strides, box, one, 0, 3, 2, 0);
}

// (q (batch, queries, heads · size), k, v (batch, keys, kv heads · size), [bias (batch or 1, keys) float32], size,
// causal, scale, out as q), float16
EXPORT int __tvm_ffi_planish_attention(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  int biased = count == 8;
  const TVMFFIAny *rest = args + 3 + biased;
  if (count < 7 || count > 8 || rest[2].type_index != kTVMFFIFloat)
    return failed("planish_attention", "arguments", count);
  const DLTensor *q = tensor(args), *k = tensor(args + 1), *v = tensor(args + 2), *out = tensor(rest + 3);
  int head = (int)rest[0].v_int64, causal = (int)rest[1].v_int64, device = q->device.device_id;
  if (device < 0 || device >= DEVICES) return failed("planish_attention", "no such GPU", device);
  int64_t batch = q->shape[0], queries = q->shape[1], width = q->shape[2], keys = k->shape[1], narrow = k->shape[2];
  if (queries > 0x7fffffff || keys > 0x7fffffff || batch > 65535) return failed("planish_attention", "too large", 0);
  Parameters p;
  memset(&p, 0, sizeof p);
  p.q = data(q), p.k = data(k), p.v = data(v), p.out = data(out);
  p.q_batch = p.out_batch = queries * width, p.q_row = p.out_row = width, p.q_head = p.out_head = head;
  p.k_batch = p.v_batch = keys * narrow, p.k_row = p.v_row = narrow, p.k_head = p.v_head = head;
  p.queries = (int)queries, p.keys = (int)keys, p.q_heads = (int)(width / head), p.kv_heads = (int)(narrow / head);
  p.causal = causal, p.block = TILE;
  p.scale = (float)(rest[2].v_float64 * 1.4426950408889634);
  if (biased) p.bias = data(tensor(args + 3)), p.bias_batch = tensor(args + 3)->shape[0] == 1 ? 0 : keys;
  _Alignas(64) unsigned char k_map[128] = {0}, v_map[128] = {0};
  pthread_mutex_lock(&lock);
  void *function = NULL;
  int code = find_driver(), groups = 1;
  if (!code && !(code = kernel(device, head, 1, biased, &function)) && queries > TILE && arches[device] >= 80)
    code = kernel(device, head, groups = 2, biased, &function);
  pthread_mutex_unlock(&lock);
  if (code) return -1;
  if (arches[device] == 90 && ((code = map(k_map, k, p.kv_heads, head)) || (code = map(v_map, v, p.kv_heads, head))))
    return wrong("describing keys and values", code);
  int64_t offset = causal ? keys - queries : 0;
  int64_t tiles = (offset + queries + TILE - 1) / TILE - offset / TILE;
  void *arguments[] = {&p, k_map, v_map};
  code = cu.launch(function, (unsigned)((tiles + groups - 1) / groups), (unsigned)p.q_heads, (unsigned)batch, groups * 128,
                   1, 1, (unsigned)shared_bytes(arches[device], head, groups, biased), stream(q), arguments, NULL);
  return code ? wrong("launching attention", code) : 0;
}
