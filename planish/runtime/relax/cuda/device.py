"""A GPU as a translation sees it: products by cuBLASLt, attention by our kernels, the rest as generated code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planish.ir.errors import UnsupportedError
from planish.runtime.kernels.attention import FlashAttention
from planish.runtime.kernels.batched import BatchedMatMul
from planish.runtime.kernels.images import DepthwiseConv, Patches, Pool
from planish.runtime.kernels.indices import CheckIndices
from planish.runtime.kernels.norms import LayerNorm, RmsNorm
from planish.runtime.kernels.reductions import Reduce, Softmax
from planish.runtime.kernels.template import Template, import_tvm
from planish.runtime.relax.cuda import rows, windows
from planish.runtime.relax.cuda.assemble import Code
from planish.runtime.relax.cuda.attention import attention
from planish.runtime.relax.cuda.schedules import schedule
from planish.runtime.relax.device import Device
from planish.runtime.relax.operand import Operand
from planish.runtime.relax.schedules import SCHEDULED

if TYPE_CHECKING:
    from planish.runtime.relax.translator import Translator

#: Bytes that cuBLASLt may use for a product; what it asks for on Hopper.
WORKSPACE = 32 << 20
# As in native/products.c.
BIAS, RESIDUAL, RELU, TRANSPOSED = 1, 2, 4, 8


@dataclass
class CudaDevice(Device):
    """GPUs of several architectures; the code is the same for all of them until it is assembled.

    Attributes:
        calls: names of the packed functions that the program calls.
        ours: kernels of ours that the packed functions launch.
        in_place: whether the program writes into caches that it is given.
        bad: variables that are not 0 where an index of a gather was outside of its tensor.
    """

    arch: str = "sm_75"
    calls: set[str] = field(default_factory=set)
    ours: set[Code] = field(default_factory=set)
    in_place: bool = False
    bad: list[Any] = field(default_factory=list)
    name = "tvm-cuda"
    floats = ("float32", "float16", "bfloat16")

    def target(self) -> Any:
        limits = {"max_num_threads": 1024, "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152}
        kind = {"kind": "cuda", "arch": self.arch, "thread_warp_size": 32, "host": {"kind": "llvm"}}
        return import_tvm().target.Target(kind | limits)

    def linear(
        self, t: Translator, x: Any, weight: Operand, bias: Operand | None, activation: str | None, residual: Any
    ) -> Any:
        # A residual is added after the activation, so only one of the two can go with the product.
        inside = activation == "relu" and residual is None
        flags = BIAS * (bias is not None) + RELU * inside + RESIDUAL * (residual is not None and activation is None)
        inputs = [x, t.tensor(weight)]
        if bias is not None:
            inputs.append(t.tensor(bias))
        if flags & RESIDUAL:
            inputs.append(residual)
        dtype = str(x.ty.dtype)
        y = self._with_workspace(t, "planish_linear", [*inputs, flags], [x.ty.shape[0], int(weight.dims[1])], dtype)
        if activation is None or inside:
            return y

        def change(v: Any) -> Any:
            return t.tir.max(v, t.tir.const(0.0, dtype)) if activation == "relu" else self.math(activation, v)

        others = [] if residual is None else [residual]
        return t.force(
            t.compute(
                activation,
                [y, *others],
                lambda i, v, *r: change(v(*i)) + r[0](*i) if r else change(v(*i)),
                list(y.ty.shape),
                dtype,
            )
        )

    def gated(self, t: Translator, x: Any, gate: Operand, up: Operand) -> Any:
        g, u = (self.linear(t, x, weight, None, None, None) for weight in (gate, up))
        dims, dtype = list(g.ty.shape), str(g.ty.dtype)
        return t.force(t.compute("swiglu", [g, u], lambda i, a, b: self.math("silu", a(*i)) * b(*i), dims, dtype))

    def batched(self, t: Translator, a: Any, b: Any, dims: Sequence[Any], dtype: str, alpha: float, flags: int) -> Any:
        """The variable of ``alpha · a[i] b[i]``, or of ``alpha · a[i] b[i]ᵀ`` if `flags` say so."""
        return self._with_workspace(t, "planish_batched", [a, b, float(alpha), flags], dims, dtype)

    def _with_workspace(self, t: Translator, name: str, inputs: list[Any], dims: Sequence[Any], dtype: str) -> Any:
        types = [t.type(dims, dtype), t.type([WORKSPACE], "uint8")]
        # The workspace is an output that nobody reads, so that it is planned with all other memory.
        return t.emit(t.relax.TupleGetItem(self.packed(t, name, inputs, types), 0))

    def packed(self, t: Translator, name: str, inputs: Sequence[Any], types: Sequence[Any]) -> Any:
        """The variable of a packed function's output, or of a tuple of them; numbers among the inputs are constants."""
        self.calls.add(name)

        def argument(item: Any) -> Any:
            if isinstance(item, float):
                return t.tir.FloatImm("float64", item)
            return t.tir.IntImm("int64", item) if isinstance(item, int) else item

        out = types[0] if len(types) == 1 else list(types)
        return t.emit(t.relax.call_dps_packed(name, [argument(item) for item in inputs], out_ty=out))

    def kernel(self, t: Translator, function: Any, inputs: Sequence[Any], types: Sequence[Any]) -> Any:
        """Calls a generated function that is scheduled already; its outputs come last."""
        name = str(function.attrs["global_symbol"])
        function = function.without_attr("global_symbol").with_attr(SCHEDULED, True)
        made = t.builder.add_func(function, name)
        out = types[0] if len(types) == 1 else list(types)
        return t.emit(t.relax.call_tir(made, list(inputs), out_ty=out))

    def call(self, t: Translator, template: Template, inputs: Sequence[Any], types: Sequence[Any]) -> Any:
        for kind, emit in _TEMPLATES.items():
            if isinstance(template, kind):
                return emit(self, t, template, list(inputs), list(types))
        raise UnsupportedError(f"target {self.name} has no code for the kernel '{template.symbol}'.")

    def number(self, t: Translator, number: float) -> Any:
        return float(number)

    def sizes(self, t: Translator, sizes: Sequence[Any]) -> Any:
        return list(sizes)

    def math(self, name: str, x: Any) -> Any:
        import_tvm()
        dtype = str(x.ty.dtype)
        made = _MATH[name](x.astype("float32"))
        return made.astype(dtype) if dtype != "float32" else made

    def schedule(self, function: Any) -> Any:
        return schedule(function)

    def more_outputs(self, t: Translator) -> list[Any]:
        """One number, which is not 0 where an index was wrong; nothing where no index was checked."""
        if not self.bad:
            return []
        joined = self.bad[0]
        for flag in self.bad[1:]:
            joined = t.compute("any", [joined, flag], lambda i, a, b: t.tir.max(a(*i), b(*i)), [1, 1], "float32")
        return [t.force(joined)]


def plain(sizes: Sequence[Any]) -> list[Any]:
    """Sizes as numbers where they are."""
    from tvm import tirx

    return [int(size) if isinstance(size, tirx.IntImm) else size for size in sizes]


def _norm(device: CudaDevice, t: Translator, template: Any, inputs: list[Any], types: list[Any]) -> Any:
    *tensors, epsilon = inputs
    count, width = plain(tensors[0].ty.shape)
    function = rows.norm(
        count,
        width,
        str(tensors[0].ty.dtype),
        epsilon,
        centred=isinstance(template, LayerNorm),
        bias=template._has_bias,
        residual=template.residual,
        keep_sum=template.keep_sum,
    )
    return device.kernel(t, function, tensors, types)


def _softmax(device: CudaDevice, t: Translator, template: Any, inputs: list[Any], types: list[Any]) -> Any:
    (x,) = inputs
    count, width = plain(x.ty.shape)
    dtype = str(x.ty.dtype)
    function = rows.softmax((1, 1, count, width), dtype, dtype, log=template.log)
    whole = t.reshape(x, [1, 1, count, width])
    made = device.kernel(t, function, [whole], [t.type([1, 1, count, width], dtype)])
    return t.reshape(made, [count, width])


def _reduce(device: CudaDevice, t: Translator, template: Any, inputs: list[Any], types: list[Any]) -> Any:
    (x,) = inputs
    outer, width, inner = plain(x.ty.shape)
    function = rows.reduction(outer, width, inner, str(x.ty.dtype), template.kind)
    return device.kernel(t, function, inputs, types)


def _product(device: CudaDevice, t: Translator, template: Any, inputs: list[Any], types: list[Any]) -> Any:
    a, b = inputs
    return device.batched(t, a, b, list(types[0].shape), str(types[0].dtype), 1.0, 0)


def _checked(device: CudaDevice, t: Translator, template: Any, inputs: list[Any], types: list[Any]) -> Any:
    """Indices inside of their limits, whatever they were; those that were not are told in :attr:`CudaDevice.bad`."""
    indices, limits = inputs
    tir, dims = t.tir, list(types[0].shape)

    def limit(axis: Any) -> Any:
        made = t.dim(limits[-1])
        for position in range(len(limits) - 2, -1, -1):
            made = tir.Select(axis == position, t.dim(limits[position]), made)
        return made

    def found(i: Sequence[Any], v: Any) -> Any:
        index = v(*i).astype("int64")
        return index + tir.Select(index < 0, limit(i[1]), tir.IntImm("int64", 0))

    def inside(i: Sequence[Any], v: Any) -> Any:
        return tir.max(tir.min(found(i, v), limit(i[1]) - 1), tir.IntImm("int64", 0))

    def wrong(i: Sequence[Any], v: Any) -> Any:
        at = found(i, v)
        return tir.Select(tir.any(at < 0, at >= limit(i[1])), tir.const(1.0, "float32"), tir.const(0.0, "float32"))

    bad = t.force(t.compute("wrong_indices", [indices], wrong, dims, "float32"))
    count = t.product(plain(dims))
    flat = t.reshape(bad, [1, count, 1])
    device.bad.append(
        device.kernel(t, rows.reduction(1, count, 1, "float32", "max"), [flat], [t.type([1, 1], "float32")])
    )
    return t.force(t.compute("indices", [indices], inside, dims, "int64"))


def _gelu(x: Any) -> Any:
    from tvm import tirx

    half, one, root = (tirx.const(v, "float32") for v in (0.5, 1.0, 0.7071067811865476))
    return half * x * (one + tirx.erf(x * root))


def _gelu_tanh(x: Any) -> Any:
    from tvm import tirx

    half, one, a, b = (tirx.const(v, "float32") for v in (0.5, 1.0, 0.7978845608028654, 0.044715))
    return half * x * (one + tirx.tanh(a * (x + b * x * x * x)))


def _sigmoid(x: Any) -> Any:
    from tvm import tirx

    one = tirx.const(1.0, "float32")
    return one / (one + tirx.exp(-x))


def _intrinsic(name: str) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        from tvm import tirx

        return getattr(tirx, name)(x)

    return function


def _quick_gelu(x: Any) -> Any:
    from tvm import tirx

    return x * _sigmoid(x * tirx.const(1.702, "float32"))


_MATH: dict[str, Callable[[Any], Any]] = {
    "exp": _intrinsic("exp"),
    "erf": _intrinsic("erf"),
    "tanh": _intrinsic("tanh"),
    "sigmoid": _sigmoid,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: x * _sigmoid(x),
    "quick_gelu": _quick_gelu,
}
_TEMPLATES: dict[type[Template], Callable[..., Any]] = {
    LayerNorm: _norm,
    RmsNorm: _norm,
    Softmax: _softmax,
    Reduce: _reduce,
    BatchedMatMul: _product,
    CheckIndices: _checked,
    FlashAttention: attention,
    Patches: windows.patches,
    Pool: windows.pool,
    DepthwiseConv: windows.depthwise,
}
