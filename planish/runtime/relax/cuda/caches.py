"""Attention of one token a row behind caches that are updated in place: com.microsoft's GroupQueryAttention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from planish.runtime.relax.cuda.attention import FLASH_SIZES, HALVES, use
from planish.runtime.relax.operand import Operand
from planish.runtime.relax.translator import Translator, attribute, emits

if TYPE_CHECKING:
    from planish.runtime.relax.cuda.device import CudaDevice

DECODE, STEP = 1, 2  # sources of native/attention.c
_FORMS = {"float16": 0, "bfloat16": 1, "float32": 2}
#: Heads are no wider, by the shared memory that the parts of a row take.
WIDEST = 256
#: Parts beyond one for each head: two for each multiprocessor of the largest GPUs.
_PARTS = 512
# Inputs of the operator. The longest row's length is on the host there, and not needed here.
_KEYS, _VALUES, _LONGEST, _COSINE = 3, 4, 6, 7


@emits("GroupQueryAttention", domain="com.microsoft")
def _step(t: Translator, node: ir.Node) -> list[Operand]:
    from planish.runtime.relax.cuda.device import CudaDevice

    device = t.device
    if not isinstance(device, CudaDevice):
        t.refuse(node, "caches that are updated in place are for GPUs")
    read = [None if v is None or not v.name or i == _LONGEST else t.get(v) for i, v in enumerate(node.inputs)]
    given = [*read, *[None] * 8]
    q, k, v, keys, values, held = given[:6]
    if q is None or k is None or v is None or keys is None or values is None or held is None:
        t.refuse(node, "it has no cache, or packed projections")
    if any(item is not None for item in given[_COSINE:]) or attribute(node, "do_rotary", 0):
        t.refuse(node, "a rotation, a bias or scales")
    t.require_float(node, q, k, v, keys, values)
    heads, size = int(attribute(node, "num_heads")), keys.dims[3]
    if not isinstance(size, int) or size > WIDEST or not t.equal(q.dims[1], 1) or held.dtype != "int32":
        t.refuse(node, f"heads of size {size} (at most {WIDEST}), {q.dims[1]} tokens a row (1), or int64 lengths")
    batch = q.dims[0]
    wanted = [batch, keys.dims[1], keys.dims[2], size]
    caches = [t.match(cache, wanted) for cache in (keys, values)]
    for cache, value in zip(caches, node.inputs[_KEYS : _VALUES + 1], strict=True):
        assert value is not None
        if not value.is_graph_input() or len(value.uses()) > 1 or cache.dims is not t.get(value).dims:
            t.refuse(node, f"its cache '{value.name}' is no input that it alone reads")
    length = t.tensor(t.match(held, [batch]))
    tensors = [t.tensor(item) for item in (q, k, v, *caches)]
    scale = float(attribute(node, "scale", 0.0)) or 1 / math.sqrt(size)
    window, softcap = int(attribute(node, "local_window_size", -1)), float(attribute(node, "softcap", 0.0))
    clears(device, size, q.dtype)
    if q.dtype in HALVES and size in FLASH_SIZES and window < 1 and not softcap:
        made = _decode(t, device, [*tensors, length], (heads, size, scale), list(q.dims), q.dtype)
    else:
        numbers = [size, max(window, 0), scale, softcap]
        made = device.packed(t, "planish_cache_step", [*tensors, length, *numbers], [t.type(q.dims, q.dtype)])
    device.in_place = True
    return [Operand(q.dtype, list(q.dims), made), *caches]


def clears(device: CudaDevice, size: int, dtype: str) -> None:
    """Adds the kernels of cache_step.cu, which clear the counters of a decode too."""
    defines = {"HEAD": size, "ELEMENT_F32": int(dtype == "float32"), "ELEMENT_BF16": int(dtype == "bfloat16")}
    use(device, STEP, size, _FORMS[dtype], "cache_step.cu", defines)


def workspace(t: Translator, rows: Any, size: int, shared: int = 1) -> Any:
    """Bytes for the parts of `rows` heads, of which `shared` are in one block, and for their counters."""
    return t.plain(t.dim(rows) * (4 * (size + 2) + 4) + _PARTS * shared * 4 * (size + 2) + 256)


def _decode(
    t: Translator, device: Any, tensors: list[Any], how: tuple[int, int, float], dims: list[Any], dtype: str
) -> Any:
    """With the keys split among thread blocks; heads that share keys read them together."""
    heads, size, scale = how
    share = heads // int(tensors[3].ty.shape[1])
    shared = next(n for n in (8, 4, 2, 1) if share % n == 0)
    bfloat = int(dtype == "bfloat16")
    defines = {"HEAD": size, "SHARED": shared, "ELEMENT_BF16": bfloat}
    use(device, DECODE, size, shared + 16 * bfloat, "attention_decode.cu", defines)
    held = tensors[-1]
    key = ("total", id(held))
    if key not in t.derived:
        one = t.tir.IntImm("int32", 1)
        t.derived[key] = (
            held,
            t.force(t.compute("total", [held], lambda i, x: x(*i) + one, list(held.ty.shape), "int32")),
        )
    total = t.derived[key][1]
    types = [t.type(dims, dtype), t.type([workspace(t, t.product([dims[0], heads]), size, shared)], "uint8")]
    made = device.packed(t, "planish_cache_decode", [*tensors, total, size, shared, scale], types)
    return t.emit(t.relax.TupleGetItem(made, 0))
