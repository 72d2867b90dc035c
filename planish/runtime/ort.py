"""Programs on ONNX Runtime: sessions over the weights that planish already holds, and runs without copies."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from planish.ir.errors import InputError, PlanishError, UnsupportedError
from planish.ir.spec import TensorSpec
from planish.ir.target import Target
from planish.runtime import flush, memory
from planish.runtime.checks import InputChecks
from planish.runtime.empty import EmptyOutputs
from planish.runtime.ort_options import BUFFERS, FLUSH, session_options
from planish.runtime.tensors import EXTENDED, NATIVE, PACKED, from_ortvalue, to_arrays, to_ortvalue, to_torch

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from planish.runtime.cuda.ort_library import CudaLibrary
    from planish.runtime.kernels.library import Library
    from planish.runtime.shared_weights import EntryWeights

_PROVIDERS = ["CPUExecutionProvider"]
#: Models with more weights than this are worth the milliseconds that returning memory takes, in bytes.
_LARGE = 32 << 20
_BASIC = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC


def compile_ort(
    model: ir.Model,
    target: Target,
    *,
    optimize: bool = True,
    options: Mapping[str, str] | None = None,
    library: Library | None = None,
) -> OrtRunner:
    """Makes a session for a model; the weights are used where they lie, not copied.

    Args:
        model: is not changed, and its weight tensors must stay unchanged while the runner lives.
        target: threads and ``session.*`` options are taken from it.
        optimize: False turns off all of ONNX Runtime's own graph optimizations.
        options: further ``session.*`` options, which win over the target's.
        library: generated kernels; None: those of this model, if the target has them.

    Raises:
        UnsupportedError: ONNX Runtime has no kernel for a node, or does not take the model.
        InputError: an unknown session option.
    """
    if target.name != "ort-cpu":
        raise UnsupportedError(f"target '{target}' is not one that planish.runtime.ort compiles for; use 'ort-cpu'.")
    library = library or kernel_library([model], target)
    session, kept, settings = open_session(model, target, _PROVIDERS, optimize, options, library)
    graph = model.graph
    inputs = [TensorSpec.of(v) for v in graph.inputs if v.name not in graph.initializers]
    outputs = [TensorSpec.of(v) for v in graph.outputs]
    runner = OrtRunner(session, inputs, outputs, flush_denormals=_flushes(settings), keep_alive=kept)
    runner.library = library
    if settings.graph_optimization_level != session_options(target, options, optimize).graph_optimization_level:
        runner.notes.append("ONNX Runtime's own fusions break this model; it runs with its basic optimizations only.")
    return runner


def open_session(
    model: ir.Model,
    target: Target,
    providers: Sequence[Any],
    optimize: bool = True,
    options: Mapping[str, str] | None = None,
    library: Library | CudaLibrary | None = None,
    shared: EntryWeights | None = None,
) -> tuple[ort.InferenceSession, list[Any], ort.SessionOptions]:
    """A session over the weights of a model, what must live as long as it, and the settings that it has.

    Args:
        providers: as `onnxruntime.InferenceSession` takes them; the others as of :func:`compile_ort`.
        shared: weights that are on the device of the providers already.

    Raises:
        UnsupportedError: ONNX Runtime has no kernel for a node, or does not take the model.
        InputError: an unknown session option.
    """
    from planish.ir.serialize import to_proto_without_weights

    settings = session_options(target, options, optimize)
    if library is not None:
        _register(library, settings)
    proto, weights = to_proto_without_weights(with_bodies(model))
    kept = _hand_over(proto, weights, settings)
    if shared is not None:
        kept += shared.give(settings, {name: id(tensor) for name, tensor in weights.items()})
    large = sum(tensor.nbytes for tensor in weights.values()) > _LARGE
    if large:
        memory.trim()  # what sessions that are gone have left behind
    session = create_session(proto.SerializeToString(), settings, model, providers)
    if large:
        memory.trim()
        memory.drop_pages(weights.values())
    return session, kept, settings


def create_session(
    model: bytes, settings: ort.SessionOptions, named: ir.Model | None = None, providers: Sequence[Any] = _PROVIDERS
) -> ort.InferenceSession:
    """An ONNX Runtime session; its refusals become one-line errors. `named` serves to say more about a node."""
    # The first session of a process may leave flush-to-zero on in this thread, for NumPy and everybody else.
    with flush.KeepEnvironment():
        try:
            return ort.InferenceSession(model, settings, providers=providers)
        except Exception as error:
            failure = _load_error(error, named)
            # ONNX Runtime's own fusions can break a valid model: one fuses two Gelus that share a product.
            if settings.graph_optimization_level.value > _BASIC.value and not _KERNEL.search(str(error)):
                settings.graph_optimization_level = _BASIC
                with contextlib.suppress(Exception):
                    return ort.InferenceSession(model, settings, providers=providers)
            raise failure from error


def with_bodies(model: ir.Model) -> ir.Model:
    """The model with the function body of every dialect operator in it; the given one if nothing is missing."""
    from planish.ir.ops import DIALECT_DOMAIN, import_functions

    used = {n.op_identifier() for n in model.graph.all_nodes() if n.domain == DIALECT_DOMAIN}
    if used <= set(model.functions):
        return model
    model = model.clone()
    import_functions(model)
    return model


def kernel_library(models: Sequence[ir.Model], target: Target) -> Library | None:
    """The library of generated kernels for the entries of a program, where the target has them and there is a use.

    Raises:
        UnsupportedError: what compiles kernels is not installed, or the processor has no use for them.
    """
    if not target.kernels:
        return None
    from planish.ir.schemas import DIALECT_DOMAIN  # not at import: loading an artifact does without

    if not any(n.domain == DIALECT_DOMAIN for m in models for n in m.graph.all_nodes()):
        return None
    from planish.runtime.kernels.library import library_for

    return library_for(models)


def _register(library: Library | CudaLibrary, settings: ort.SessionOptions) -> None:
    try:
        settings.register_custom_ops_library(str(library.path))
    except Exception as error:
        raise UnsupportedError(f"generated kernels can not be used: {one_line(error)}") from error


def _hand_over(
    proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol], settings: ort.SessionOptions
) -> list[Any]:
    """Gives the weights to the session as buffers; returns what must live as long as the session.

    Of ONNX Runtime's ways to take weights from memory, this one alone copies nothing and still lets its optimizers
    read them: `add_external_initializers` copies each weight, `add_initializer` hides the values from constant
    folding. Each weight is a "file" of its own in memory.
    """
    if not weights:
        return []
    from planish.ir.external import stored_bytes

    folds = settings.graph_optimization_level != ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    buffers: dict[str, np.ndarray] = {}
    for tensor in list(proto.graph.initializer):
        if tensor.name not in weights:
            continue
        location = f"weight-{len(buffers)}"  # the weight's own name may not be one that a file can have
        raw = _transposed(proto, tensor, weights[tensor.name]) if folds else None
        buffers[location] = raw = stored_bytes(weights[tensor.name]) if raw is None else raw
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", "0"), ("length", str(raw.nbytes))):
            tensor.external_data.add(key=key, value=value)
    settings.add_session_config_entry(BUFFERS, "1")
    settings.add_external_initializers_from_files_in_memory(
        list(buffers), [raw.data for raw in buffers.values()], [raw.nbytes for raw in buffers.values()]
    )
    return [*buffers.values(), *weights.values()]


def _transposed(proto: onnx.ModelProto, tensor: onnx.TensorProto, weight: ir.TensorProtocol) -> np.ndarray | None:
    """For a weight that is a transposed view: its bytes as they lie, after a Transpose was put before its users.

    The weight of a torch Linear is such a view once its transposition is folded. ONNX Runtime folds the Transpose
    again, packs the result for its kernels and drops it; a copy made here would have to live as long as the session.
    A weight that is shared keeps its name, as what the Transpose gives, and ONNX Runtime takes the shared one for it.
    """
    import onnx

    if weight.dtype.bitwidth < 8 or len(weight.shape) < 2 or tensor.name in {v.name for v in proto.graph.output}:
        return None
    array = weight.numpy()
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    stored = array.transpose(order)
    if array.flags.c_contiguous or not stored.flags.c_contiguous:
        return None
    name = tensor.name
    tensor.name = f"{name}/stored"
    del tensor.dims[:]
    tensor.dims.extend(stored.shape)
    inverse = [order.index(axis) for axis in range(array.ndim)]
    proto.graph.node.insert(0, onnx.helper.make_node("Transpose", [tensor.name], [name], perm=inverse))
    return stored.reshape(-1).view(np.uint8)


def _flushes(settings: ort.SessionOptions) -> bool:
    return bool(settings.get_session_config_entry(FLUSH) == "1")


class OrtRunner:
    """One entry of a program as an ONNX Runtime session.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.
        inputs, outputs: what `run` takes and gives.
        notes: what a report should mention about this session.
        library: the generated kernels that it uses, or None.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        flush_denormals: bool = True,
        keep_alive: Sequence[Any] = (),
    ) -> None:
        self.session = session
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.notes: list[str] = []
        self.library: Library | None = None
        self._keep_alive = list(keep_alive)
        self._checks = InputChecks(self.inputs, frozenset(v.name for v in session.get_overridable_initializers()))
        self._names = [spec.name for spec in self.outputs]
        self._empty = EmptyOutputs(self.inputs, self.outputs)
        self._flush = flush_denormals
        self._run = session.run
        kinds = {spec.dtype for spec in (*self.inputs, *self.outputs)}
        self._extended = not kinds.isdisjoint({*EXTENDED, *PACKED})
        if flush_denormals and not flush.SUPPORTED:
            self.notes.append(
                "denormal numbers are flushed to zero in ONNX Runtime's worker threads, and in the calling thread only "
                "if this process made no ONNX Runtime session before."
            )

    @property
    def flushes(self) -> bool:
        """Whether runs treat denormal numbers as zero."""
        return self._flush

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs on inputs by name; returns outputs by name, as torch tensors if an input was one.

        Contiguous inputs are read where they lie, outputs are given without a copy.

        Raises:
            InputError: an input is unknown, missing, or of another dtype or shape; or a node failed on it.
        """
        arrays, as_torch = to_arrays(feeds) if "torch" in sys.modules else (feeds, False)
        self.check(arrays)
        outputs = self._empty.of(arrays)
        if outputs is None:
            outputs = self._run_values(arrays) if self._extended else self._run_arrays(arrays)
        if as_torch:
            return {name: to_torch(value) for name, value in outputs.items()}
        return outputs

    def check(self, arrays: Mapping[str, Any]) -> None:
        """Raises InputError if the inputs do not fit; shapes that were fine before are not checked again."""
        self._checks(arrays)

    def prepared(self, feeds: Mapping[str, Any]) -> Callable[[], Any]:
        """A function without arguments that runs on these inputs, checked once: what a measurement calls."""
        arrays, _ = to_arrays(feeds)
        self.check(arrays)
        empty = self._empty.of(arrays)
        if empty is not None:
            return lambda: empty
        if self._extended:
            return lambda: self._run_values(arrays)
        return lambda: self._run_arrays(arrays)

    def _run_arrays(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        flushing = self._flush
        try:
            if flushing:
                flush.begin()
            values = self._run(self._names, arrays)
        except Exception as error:
            raise run_error(error) from error
        finally:
            if flushing:
                flush.end()
        return dict(zip(self._names, values, strict=True))

    def _run_values(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The way for dtypes that NumPy lacks, which ONNX Runtime takes and gives as OrtValues only."""
        types = {spec.name: spec.dtype for spec in self.inputs}
        kept = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in arrays.items()}
        try:
            feeds = {name: to_ortvalue(value, types.get(name) or _native(value)) for name, value in kept.items()}
            if self._flush:
                flush.begin()
            try:
                values = self.session.run_with_ort_values(self._names, feeds)
            finally:
                if self._flush:
                    flush.end()
        except Exception as error:
            raise run_error(error) from error
        kinds = [spec.dtype or 0 for spec in self.outputs]
        return {name: from_ortvalue(value, kind) for name, value, kind in zip(self._names, values, kinds, strict=True)}


def _native(array: np.ndarray) -> int:
    return next((number for number, dtype in NATIVE.items() if dtype == array.dtype), 0)


_KERNEL = re.compile(r"Could not find an implementation for (\S+?)\((\d+)\) node with name '(.*?)'")
# The C++ function in which a check failed, which says nothing to a user and can be longer than the message.
_SIGNATURE = re.compile(r"(?:[\w:<>*&]*[\w>*&] )?onnxruntime::[\w:~<>]+\([^()]*\)(?: const)? (?=\S.* was false\. )")
_NODE = re.compile(r"running (\S+) node\. Name:'(.*?)' Status Message: (.*)", re.DOTALL)


def _load_error(error: Exception, model: ir.Model | None) -> PlanishError:
    text = one_line(error)
    if match := _KERNEL.search(text):
        op, version, name = match.groups()
        place = f" at node '{name}'{_operands(model, name, op)}" if name else ""  # one inside of a function has no name
        return UnsupportedError(
            f"ONNX Runtime {ort.__version__} has no CPU kernel for {op} (opset {version}){place}{_remedy(model)}."
        )
    return UnsupportedError(f"ONNX Runtime {ort.__version__} does not take the model: {text}")


def _remedy(model: ir.Model | None) -> str:
    """What to do about a model of a dtype that few kernels take."""
    values = () if model is None else (*model.graph.inputs, *model.graph.initializers.values())
    odd = sorted({v.dtype.name.lower() for v in values if v.dtype is not None} & {"bfloat16", "double"})
    return f"; the model is {odd[0]}: convert it to float32" if odd else ""


def _operands(model: ir.Model | None, name: str, op: str) -> str:
    """``" with inputs float8e4m3fn, int64"``, for the node that ONNX Runtime named."""
    nodes = [] if model is None else [n for n in model.graph.all_nodes() if n.op_type == op and n.name == name]
    if not nodes:
        return ""
    kinds = [v.dtype.name.lower() if v is not None and v.dtype is not None else "?" for v in nodes[0].inputs]
    return f" with inputs {', '.join(kinds)}" if kinds else ""


def run_error(error: Exception) -> PlanishError:
    """What ONNX Runtime raised in a run, as one line."""
    if isinstance(error, PlanishError):
        return error
    text = one_line(error)
    if match := _NODE.search(text):
        op, name, message = match.groups()
        return InputError(f"node '{name}' ({op}) failed on these inputs: {message}")
    return InputError(f"ONNX Runtime {ort.__version__} failed on these inputs: {text}")


def one_line(error: Exception) -> str:
    """ONNX Runtime's message without its prefix, source paths, C++ signatures and line breaks."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    text = re.sub(r"/\S*onnxruntime\S*\.(cc|h):\d+\s*", "", text)
    text = _SIGNATURE.sub("", re.sub(r"\s+", " ", text).strip())
    return text if len(text) <= 600 else text[:597] + "..."
