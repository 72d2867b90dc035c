"""Attention on GPUs: our flash kernel where it takes it, else products around a softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planish.ir.errors import UnsupportedError
from planish.runtime.cuda.attention import APART_FROM
from planish.runtime.relax.cuda import rows
from planish.runtime.relax.cuda.assemble import AHEAD, Code

if TYPE_CHECKING:
    from planish.runtime.relax.cuda.device import CudaDevice
    from planish.runtime.relax.translator import Translator

#: Sizes of heads that attention.cu has kernels for.
FLASH_SIZES = (64, 128)
HALVES = ("float16", "bfloat16")
#: The number of attention_hopper.cu in native/attention.c.
APART = 3


def attention(device: CudaDevice, t: Translator, template: Any, inputs: list[Any], types: list[Any]) -> Any:
    """softmax(scale · q kᵀ + mask) v by heads, which lie side by side; as of `kernels.attention.FlashAttention`."""
    q, k, v, *rest = inputs
    mask = rest.pop(0) if template.mask != "none" else None
    scale = rest.pop(0)
    causal = _causal(t, template, q, k, rest)
    size, dtype = template.head_size, str(q.ty.dtype)
    flash = dtype in HALVES and size in FLASH_SIZES and causal in ("", "end")
    if flash and (mask is None or _is_padding(mask)):
        biases = [] if mask is None else [_bias(t, mask)]
        use_prefill(device, size, len(biases), dtype)
        use_apart(device, size, len(biases), dtype, t.plain(q.ty.shape[1]))
        inputs = [q, k, v, *biases, size, int(causal == "end"), float(scale)]
        return device.packed(t, "planish_attention", inputs, types)
    return by_products(device, t, (q, k, v), mask, (size, float(scale), causal), dtype)


def use_prefill(device: CudaDevice, size: int, bias: int, dtype: str) -> None:
    """Adds the kernels that planish_attention chooses from."""
    bfloat = int(dtype == "bfloat16")
    for groups in (1, 2):
        defines = {"AHEAD": AHEAD, "BIAS": bias, "ELEMENT_BF16": bfloat, "GROUPS": groups, "HEAD": size}
        use(device, 0, size, groups + 2 * bias + 4 * bfloat, "attention.cu", defines)


def use_apart(device: CudaDevice, size: int, bias: int, dtype: str, queries: Any, lists: int = 0) -> None:
    """Adds the kernel for Hopper, where prompts may be as long as those that it is taken for."""
    bfloat = int(dtype == "bfloat16")
    if not isinstance(queries, int) or queries >= APART_FROM[size]:
        defines = {"BIAS": bias, "ELEMENT_BF16": bfloat, "HEAD": size, "LISTS": lists}
        use(device, APART, size, lists + 2 * bias + 4 * bfloat, "attention_hopper.cu", defines)


def use(device: CudaDevice, number: int, size: int, form: int, source: str, defines: dict[str, int]) -> None:
    """Adds a kernel that the functions of native/attention.c launch; numbers and forms as there."""
    device.ours.add(Code("attention", number, size, form, source, tuple(sorted(defines.items()))))


def _is_padding(mask: Any) -> bool:
    """Whether a mask is the same for all heads and queries."""
    from planish.runtime.relax.cuda.device import plain

    return plain(mask.ty.shape)[1:3] == [1, 1]


def _bias(t: Translator, mask: Any) -> Any:
    """The variable of what is added to the scores of keys, (batch or 1, keys) float32; one for all layers."""
    key = ("key_bias", id(mask))
    if key not in t.derived:
        batch, _, _, keys = list(mask.ty.shape)
        zero, hidden = t.tir.const(0.0, "float32"), t.tir.const(float("-inf"), "float32")

        def bias(i: Any, m: Any) -> Any:
            seen = m(i[0], 0, 0, i[1])
            return t.tir.Select(seen, zero, hidden) if str(mask.ty.dtype) == "bool" else seen.astype("float32")

        t.derived[key] = (mask, t.force(t.compute("key_bias", [mask], bias, [batch, keys], "float32")))
    return t.derived[key][1]


def _causal(t: Translator, template: Any, q: Any, k: Any, rest: list[Any]) -> str:
    """How queries and keys are aligned: ``"start"``, ``"end"``, or empty."""
    if not template.causal:
        return ""
    ((past,),) = rest
    if t.equal(t.plain(t.dim(past) + q.ty.shape[1]), t.plain(k.ty.shape[1])):
        return "end"
    if isinstance(past, int) and past == 0:
        return "start"
    raise UnsupportedError(f"target tvm-cuda: causal attention with a past of {past} and {k.ty.shape[1]} keys.")


def by_products(
    device: CudaDevice, t: Translator, qkv: tuple[Any, Any, Any], mask: Any, how: tuple[int, float, str], dtype: str
) -> Any:
    """Scores are float32, and written to memory: for masks, float32 and other sizes of heads."""
    from planish.runtime.relax.cuda.device import TRANSPOSED, plain

    size, scale, causal = how
    q, k, v = qkv
    batch, queries, width = plain(q.ty.shape)
    keys = plain(k.ty.shape)[1]
    heads = width // size
    count = t.product([batch, heads])
    left, right, values = (_apart(t, x, heads, size, dtype) for x in (q, k, v))
    scores = device.batched(t, left, right, [count, queries, keys], "float32", scale, TRANSPOSED)
    shape = [batch, heads, queries, keys]
    masks = [] if mask is None else [mask]
    function = rows.softmax(
        shape,
        "float32",
        dtype,
        mask=None if mask is None else plain(mask.ty.shape),
        mask_dtype="" if mask is None else str(mask.ty.dtype),
        causal=causal,
    )
    shares = device.kernel(t, function, [t.reshape(scores, shape), *masks], [t.type(shape, dtype)])
    made = device.batched(t, t.reshape(shares, [count, queries, keys]), values, [count, queries, size], dtype, 1.0, 0)
    four = t.reshape(made, [batch, heads, queries, size])
    joined = t.compute(
        "join_heads", [four], lambda i, x: x(i[0], i[2], i[1], i[3]), [batch, queries, heads, size], dtype
    )
    return t.reshape(joined, [batch, queries, width])


def _apart(t: Translator, x: Any, heads: int, size: int, dtype: str) -> Any:
    """(batch, length, own heads · size) as (batch · heads, length, size), each of its heads several times."""
    from planish.runtime.relax.cuda.device import plain

    batch, length, width = plain(x.ty.shape)
    share = heads * size // width
    made = t.compute(
        "split_heads",
        [x],
        lambda i, v: v(i[0], i[2], t.tir.floordiv(i[1], share) * size + i[3]),
        [batch, heads, length, size],
        dtype,
    )
    return t.reshape(made, [t.product([batch, heads]), length, size])
