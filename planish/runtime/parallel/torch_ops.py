"""ONNX operators of transformers on torch tensors, as far as `planish.runtime.parallel.rank` needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from planish.ir.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

#: (q, k, v as (batch, tokens, heads, size), mask or None, causal, scale or None) → as q. With `causal` the queries are
#: at the last positions of the keys.
Attend = Callable[..., Any]
_CASTS = {1: "float32", 10: "float16", 16: "bfloat16", 7: "int64", 6: "int32", 9: "bool", 11: "float64"}


def contiguous_attention(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None) -> Any:
    """Attention by torch's own operators; queries at the end of the keys by torch's lower-right causal bias."""
    import torch
    from torch.nn.attention.bias import causal_lower_right

    queries, keys = q.shape[1], k.shape[1]
    bias = mask
    if causal and queries != keys:
        bias = causal_lower_right(queries, keys)
        if mask is not None or q.device.type == "cpu":
            sees = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
            bias = sees if mask is None else _both(mask, sees)
        causal = False
    elif causal and mask is not None:
        sees = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
        bias, causal = _both(mask, sees), False
    found = torch.nn.functional.scaled_dot_product_attention(
        *(item.transpose(1, 2) for item in (q, k, v)),
        attn_mask=bias,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return found.transpose(1, 2)


def _both(mask: Any, sees: Any) -> Any:
    return mask & sees if str(mask.dtype) == "torch.bool" else mask.masked_fill(~sees, float("-inf"))


def _attention(node: ir.Node, given: list[Any], attend: Attend) -> Any:
    q, k, v, mask, past_k, past_v = [*given, *[None] * 6][:6]
    attributes = node.attributes
    if q.dim() != 3:
        raise UnsupportedError(f"Attention '{node.name}' takes rank {q.dim()}; here it must be (batch, tokens, width).")
    heads, shared = attributes.get_int("q_num_heads", 0), attributes.get_int("kv_num_heads", 0)
    q, k, v = q.unflatten(2, (heads, -1)), k.unflatten(2, (shared, -1)), v.unflatten(2, (shared, -1))
    if past_k is not None:
        k, v = _behind(past_k.transpose(1, 2), k), _behind(past_v.transpose(1, 2), v)
    scale = attributes["scale"].value if "scale" in attributes else None
    if attributes.get_float("softcap", 0.0):
        raise UnsupportedError(f"Attention '{node.name}' has a softcap.")
    return attend(q, k, v, mask, bool(attributes.get_int("is_causal", 0)), scale).flatten(2)


def _behind(past: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Past and present keys, (batch, tokens, heads, size): without a copy where they are neighbours in memory."""
    import torch

    if not past.shape[1]:
        return now
    same = past.untyped_storage().data_ptr() == now.untyped_storage().data_ptr() and past.stride() == now.stride()
    if same and past.storage_offset() + past.shape[1] * past.stride(1) == now.storage_offset():
        size = (past.shape[0], past.shape[1] + now.shape[1], *past.shape[2:])
        return past.as_strided(size, past.stride())
    return torch.cat((past, now), dim=1)


def _slice(node: ir.Node, given: list[Any], _: Attend) -> Any:
    import torch

    begins, ends = given[1].tolist(), given[2].tolist()
    axes = given[3].tolist() if len(given) > 3 and given[3] is not None else list(range(len(begins)))
    steps = given[4].tolist() if len(given) > 4 and given[4] is not None else [1] * len(begins)
    result = given[0]
    for begin, end, axis, step in zip(begins, ends, axes, steps, strict=True):
        if step != 1:
            raise UnsupportedError(f"Slice '{node.name}' has a step of {step}.")
        size = result.shape[axis]
        first, last = (min(max(n + size if n < 0 else n, 0), size) for n in (begin, end))
        result = torch.narrow(result, axis, first, max(last - first, 0))
    return result


def _reshape(node: ir.Node, given: list[Any], _: Attend) -> Any:
    sizes = given[1].tolist()
    if not node.attributes.get_int("allowzero", 0):
        sizes = [given[0].shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return given[0].reshape(sizes)


def _shape(node: ir.Node, given: list[Any], _: Attend) -> Any:
    import torch

    sizes = list(given[0].shape)
    return torch.tensor(sizes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(sizes))])


def _gelu(node: ir.Node, given: list[Any], _: Attend) -> Any:
    import torch

    return torch.nn.functional.gelu(given[0], approximate=node.attributes.get_string("approximate", "none"))


def _layer_norm(node: ir.Node, given: list[Any], _: Attend) -> Any:
    import torch

    _last_axis(node, given[0])
    x, bias = given[0], given[2] if len(given) > 2 else None
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], given[1], bias, epsilon)


def _rms_norm(node: ir.Node, given: list[Any], _: Attend) -> Any:
    import torch

    _last_axis(node, given[0])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return torch.nn.functional.rms_norm(given[0], given[0].shape[-1:], given[1], epsilon)


def _last_axis(node: ir.Node, x: Any) -> None:
    if node.attributes.get_int("axis", -1) not in (-1, x.dim() - 1):
        raise UnsupportedError(f"{node.op_type} '{node.name}' is over more than the last axis.")


def _skip_rms_norm(node: ir.Node, given: list[Any], _: Attend) -> Any:
    """The norm of a sum, and the sum; a summand may be a pair that is to be added up first."""
    import torch

    x, skip, weight, bias = [*given, None][:4]
    if isinstance(x, tuple):
        x, skip = skip, x
    a, b = skip if isinstance(skip, tuple) else (skip, None)
    epsilon, wanted = node.attributes.get_float("epsilon", 1e-5), len(node.outputs) > 3
    if not isinstance(x, tuple) and bias is None and _kernels(x, a, *(() if b is None else (b,)), weight):
        from planish.runtime.cuda import rows

        y, total = rows.add_rms_norm(x, a, b, weight, epsilon, wanted)
        return y, None, None, total
    x = x[0] + x[1] if isinstance(x, tuple) else x
    total = x + (a if b is None else a + b)
    total = total if bias is None else total + bias
    return torch.nn.functional.rms_norm(total, total.shape[-1:], weight, epsilon), None, None, total


def add(x: Any, y: Any, out: Any = None) -> Any:
    """x + y; one of them may be a pair that is to be added up first."""
    import torch

    if isinstance(x, tuple):
        x, y = y, x
    if isinstance(x, tuple):
        x = x[0] + x[1]
    if isinstance(y, tuple):
        if x.shape == y[0].shape and _kernels(x, *y, *(() if out is None else (out,))):
            from planish.runtime.cuda import rows

            return rows.add(x, y[0], y[1], out)
        y = y[0] + y[1]
    return torch.add(x, y, out=out)


def _skip_layer_norm(node: ir.Node, given: list[Any], _: Attend) -> Any:
    import torch

    x, skip, weight, shift, bias = [*given, None, None][:5]
    x, skip = (item[0] + item[1] if isinstance(item, tuple) else item for item in (x, skip))
    total = x + skip if bias is None else x + skip + bias
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, shift, epsilon), None, None, total


def _kernels(*operands: Any) -> bool:
    """Whether our kernels take these."""
    if any(item.device.type != "cuda" for item in operands):
        return False
    from planish.runtime.cuda import rows

    return rows.fits(*operands) and rows.available()


def _swiglu(_: ir.Node, given: list[Any], __: Attend) -> Any:
    import torch

    whole = given[0].shape == given[1].shape and not given[0].numel() % 8
    if whole and _kernels(*(item.reshape(-1, 8) for item in given)):
        from planish.runtime.cuda import rows

        return rows.swiglu(*given)
    return torch.nn.functional.silu(given[0]) * given[1]


def _concat(node: ir.Node, given: list[Any], _: Attend) -> Any:
    import torch

    return torch.cat(given, dim=node.attributes.get_int("axis"))


def _cast(node: ir.Node, given: list[Any], _: Attend) -> Any:
    import torch

    return given[0].to(getattr(torch, _CASTS[node.attributes.get_int("to")]))


def _plain(name: str) -> Callable[[ir.Node, list[Any], Attend], Any]:
    def call(_: ir.Node, given: list[Any], __: Attend) -> Any:
        import torch

        return getattr(torch, name)(*given)

    return call


def _divide(_: ir.Node, given: list[Any], __: Attend) -> Any:
    import torch

    return torch.div(*given, rounding_mode=None if given[0].is_floating_point() else "floor")


#: (domain, operator) → what computes it.
OPS: dict[tuple[str, str], Callable[[ir.Node, list[Any], Attend], Any]] = {
    ("", "Attention"): _attention,
    ("", "Slice"): _slice,
    ("", "Reshape"): _reshape,
    ("", "Shape"): _shape,
    ("", "Concat"): _concat,
    ("", "Cast"): _cast,
    ("", "Gelu"): _gelu,
    ("", "LayerNormalization"): _layer_norm,
    ("", "RMSNormalization"): _rms_norm,
    ("planish", "SwiGLU"): _swiglu,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
    ("com.microsoft", "SkipLayerNormalization"): _skip_layer_norm,
    ("", "Div"): _divide,
    ("", "Add"): lambda node, given, attend: add(given[0], given[1]),
    ("", "Identity"): lambda node, given, attend: given[0],
    ("", "Transpose"): lambda node, given, attend: given[0].permute(
        list(node.attributes.get_ints("perm", range(given[0].dim())[::-1]))
    ),
    **{
        ("", op): _plain(name)
        for op, name in {"MatMul": "matmul", "Sub": "sub", "Mul": "mul", "Min": "minimum",
                         "Tanh": "tanh", "Erf": "erf", "Sigmoid": "sigmoid", "Relu": "relu", "Pow": "pow",
                         "Sqrt": "sqrt"}.items()
    },
}  # fmt: skip
#: (domain, operator) → operands that it takes as a pair of addends too.
ADDENDS: dict[tuple[str, str], tuple[int, ...]] = {
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (0, 1),
    ("com.microsoft", "SkipLayerNormalization"): (0, 1),
    ("", "Add"): (0, 1),
}
