"""Target tvm-cuda: programs that Relax has compiled for GPUs, run with TVM's runtime alone."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.causal_lm import cache_layer
from planish.ir.errors import ArtifactError, InputError, UnsupportedError
from planish.ir.machine import Machine, Needs, unmet
from planish.ir.spec import TensorSpec
from planish.ir.target import Target
from planish.runtime.checks import InputChecks
from planish.runtime.empty import EmptyOutputs
from planish.runtime.tensors import from_torch, is_torch, to_torch
from planish.runtime.tvm import CHECK, check_symbols, import_runtime, one_line, run_error, symbols_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from planish.runtime.manifest import Manifest

#: The function of the module that gives the bytes of a run beside weights and inputs.
PLANNED = "planned_bytes"
#: The version of CUDA that TVM's runtime is built with.
CUDA = (13, 0)
_CUDA_DEVICE = 2  # kDLCUDA of DLPack
#: Generated code loads this many bytes at once.
_ALIGNED = 16


def compile_tvm_cuda(model: ir.Model, target: Target) -> TvmCudaRunner:
    """Compiles a model. No GPU is needed; without one the result is there to be exported and does not run.

    Args:
        model: is not changed.
        target: ``arch`` chooses one architecture, else there is code for several; ``memory`` is what a run may take.

    Raises:
        UnsupportedError: TVM or nvcc is not installed, an operator has no code, or `memory` is too little.
        InputError: the target has options, which are those of ONNX Runtime.
    """
    from planish.runtime.relax.cuda.build import build

    if target.options:
        raise InputError(f"target '{target}': {target.options[0][0]} is an option of ONNX Runtime; leave it out.")
    graph = model.graph
    inputs = [TensorSpec.of(v) for v in graph.inputs if v.name not in graph.initializers]
    outputs = [TensorSpec.of(v) for v in graph.outputs]
    known = all(isinstance(size, int) for spec in inputs for size in spec.shape or (None,))
    compiled = build(model, inputs, target.arch, graph=known and target.graphs != 0)
    needs = Needs(
        gpus=1,
        code=compiled.codes.names,
        cuda=CUDA,
        memory=sum(array.nbytes for array in compiled.weights.values()) + (compiled.planned or 0),
    )
    _require_memory(target, needs.memory)
    reason = lacking(needs)
    if reason:
        runner = TvmCudaRunner(None, compiled.weights, inputs, outputs, target, reason)
    else:
        with tempfile.TemporaryDirectory(prefix="planish-cuda-") as folder:
            path = Path(folder) / "entry.so"
            compiled.export(path)
            runner = TvmCudaRunner(load_module(path), compiled.weights, inputs, outputs, target)
    runner.needs, runner.export = needs, compiled.export
    return runner


def lacking(needs: Needs, machine: Machine | None = None) -> str:
    """What a machine lacks, in words; empty if it lacks nothing.

    Args:
        machine: None for the one at hand.
    """
    if machine is None:
        from planish.runtime.machine import machine as this_machine

        machine = this_machine()
    return "; it ".join(unmet(needs, machine))


def require(target: Target, machine: Machine | None = None) -> None:
    """Asks for a GPU that a program of this target runs on.

    Raises:
        UnsupportedError: there is none; says why.
    """
    code = (target.arch, target.arch.rstrip("af").replace("sm_", "compute_")) if target.arch else ()
    if reason := lacking(Needs(gpus=1, cuda=CUDA, code=code), machine):
        raise UnsupportedError(f"target '{target}' {reason}.")


def refuse(manifest: Manifest, machine: Machine, where: str) -> None:
    """Compares what an artifact needs with a machine, before anything of it is loaded.

    Raises:
        UnsupportedError: something is missing: says all that is, with what there is in its place.
    """
    from planish.runtime.machine import needs_of

    if reason := lacking(needs_of(manifest), machine):
        raise UnsupportedError(f"'{where}' can not run on this machine: it {reason}.")


def load_module(path: Path) -> Any:
    """The compiled module of a library.

    Raises:
        UnsupportedError: a part of TVM's runtime or of CUDA's is missing.
        ArtifactError: the library does not load.
    """
    from planish.runtime.cuda.tvm_libraries import load_runtime

    load_runtime()
    try:
        return import_runtime().runtime.load_module(str(path))
    except Exception as error:  # not for this system, or of another version of TVM
        raise ArtifactError(f"'{path}' does not load: {one_line(error)}") from error


def _require_memory(target: Target, planned: int) -> None:
    if target.memory is not None and planned > target.memory:
        mib = 1 << 20
        raise UnsupportedError(
            f"target '{target}': weights and what a run needs beside them take {planned / mib:.1f} MiB, "
            f"{(planned - target.memory) / mib:.1f} MiB more than memory allows; take smaller inputs or a narrower "
            "dtype, or allow more."
        )


class TvmCudaRunner:
    """One entry of a program on a GPU.

    Inputs are NumPy arrays, torch tensors, or anything with ``__dlpack__``. Those on the GPU are read where they lie;
    if one is, outputs stay there, as torch tensors if an input is one, and nothing waits for them. Otherwise outputs
    are copied to the host.

    Attributes:
        inputs, outputs: what `run` takes and gives.
        weights: name → array, in the order in which the compiled function takes them.
        notes: what a report should mention.
        features: what the code needs of a processor.
        needs: what it needs of a machine.
        export: writes the code as a shared library; None for a loaded one.
        offline: this machine can not run it.
    """

    def __init__(
        self,
        module: Any,
        weights: Mapping[str, np.ndarray],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        target: Target,
        reason: str = "",
    ) -> None:
        self.inputs, self.outputs, self.target = list(inputs), list(outputs), target
        self.weights = dict(weights)
        self.notes: list[str] = []
        self.features: frozenset[str] = frozenset()
        self.needs = Needs()
        self.export: Callable[[Path], None] | None = None
        self._reason, self.offline = reason, bool(reason)
        self._names = [spec.name for spec in self.outputs]
        self._empty = EmptyOutputs(self.inputs, self.outputs)
        self._checks = InputChecks(self.inputs, more=self._fitting)
        self._symbols = symbols_of(self.inputs)
        self._lock = threading.Lock()  # the machine has one stack
        # Code for caches writes into them.
        given = {name.replace("present_", "past_", 1) for name in self._names if cache_layer(name) is not None}
        self._in_place = given & {spec.name for spec in self.inputs}
        if module is None:
            return
        tvm = import_runtime()
        self._device = tvm.runtime.device("cuda", 0)
        self._machine = tvm.runtime.vm.VirtualMachine(module, self._device)
        self._main = self._machine["main"]
        self._check_sizes = module.get_function(CHECK, query_imports=True)
        self._planned = module.get_function(PLANNED, query_imports=True)
        self._held = [_weight(array, self._to_device) for array in self.weights.values()]
        self._weights = [weight.tensor for weight in self._held]
        self._weight_bytes = sum(array.nbytes for array in self.weights.values())

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs on inputs by name; returns outputs by name.

        An index of a gather that is outside of its tensor is an error where outputs are copied to the host; where they
        stay on the GPU, the nearest row is read.

        Raises:
            InputError: an input is unknown, missing, or of another dtype or shape; or a node failed on it.
            UnsupportedError: this machine has no GPU that runs the program.
        """
        given, seen = self._placed(feeds)
        self._checks(seen)
        torch = any(is_torch(value) for value in feeds.values())
        empty = self._empty.of(seen)
        if empty is not None:
            return {name: to_torch(array) for name, array in empty.items()} if torch else dict(empty)
        stays = any(not isinstance(value, np.ndarray) for value in given.values())
        with self._stream(feeds):
            values, _ = self._call([self._own(spec.name, given[spec.name]) for spec in self.inputs])
            if not stays:
                return self._to_host(values, torch)
        return {name: _as_torch(v) if torch else v for name, v in zip(self._names, values, strict=False)}

    def on_stream(self, tensors: Mapping[str, Any], stream: int) -> tuple[dict[str, Any], Any]:
        """Runs on tensors of TVM on the GPU, which fit and are not copied, so that caches are updated in place.

        Args:
            stream: the address of one; nothing waits for it.

        Returns:
            Outputs by name; and, where caches are updated, what holds all memory that the run has used.
        """
        import tvm_ffi

        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), stream):
            values, memory = self._call([tensors[spec.name] for spec in self.inputs])
        return dict(zip(self._names, values, strict=False)), memory

    def check(self, feeds: Mapping[str, Any]) -> None:
        """Raises InputError if the inputs do not fit; shapes that were fine before are not checked again."""
        self._checks(self._placed(feeds)[1])

    def prepared(self, feeds: Mapping[str, Any]) -> Callable[[], Any]:
        """A function without arguments that runs on these inputs, which are on the GPU then, and waits for the end."""
        given, seen = self._placed(feeds)
        self._checks(seen)
        empty = self._empty.of(seen)
        if empty is not None:
            return lambda: empty
        tensors = [self._to_device(given[spec.name]) for spec in self.inputs]

        def run() -> None:
            self._call(tensors)
            self._device.sync()

        return run

    def _placed(self, feeds: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inputs as arrays of the host or tensors of the GPU; and arrays of their dtype and shape, for checks."""
        if self._reason:
            raise UnsupportedError(f"the program for '{self.target}' can not run on this machine: it {self._reason}.")
        given: dict[str, Any] = {}
        for name, value in feeds.items():
            if is_torch(value):
                value = value.detach()
                on_host = value.device.type == "cpu"
                given[name] = from_torch(name, value) if on_host else value.contiguous()
                where = value.device
            elif isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
                given[name] = value
                continue
            else:
                kind, index = (int(part) for part in value.__dlpack_device__())
                on_host = kind == 1
                given[name] = np.from_dlpack(value) if on_host else import_runtime().runtime.from_dlpack(value)
                where = f"device {kind}:{index}"
                if kind == _CUDA_DEVICE and index == 0:
                    continue
            if not on_host and str(where) not in ("cuda", "cuda:0"):
                raise InputError(f"input '{name}' is on {where}, and this program on cuda:0: move it.")
        return given, {name: _shadow(value) for name, value in given.items()}

    def _to_device(self, value: Any) -> Any:
        tvm = import_runtime()
        if isinstance(value, np.ndarray):
            return tvm.runtime.tensor(np.ascontiguousarray(value).reshape(value.shape), self._device)
        if is_torch(value):
            if value.data_ptr() % _ALIGNED:
                value = value.clone()
            return tvm.runtime.from_dlpack(value)
        return value

    def _own(self, name: str, value: Any) -> Any:
        """An input on the GPU; of a cache that stays there, which the code writes into, a copy."""
        made = self._to_device(value)
        if name not in self._in_place or isinstance(value, np.ndarray):
            return made
        return made.copyto(import_runtime().runtime.empty(made.shape, str(made.dtype), self._device))

    def _call(self, tensors: list[Any]) -> tuple[list[Any], Any]:
        """The values that ``main`` gives; and the memory of the run, if it gives that behind them."""
        with self._lock:
            try:
                values = list(self._main(*tensors, *self._weights))
            except Exception as error:
                raise run_error(error) from error
        memory = None if hasattr(values[-1], "shape") else values.pop()
        return values, memory

    def _to_host(self, values: list[Any], torch: bool) -> dict[str, Any]:
        arrays = [value.numpy() for value in values]
        if len(arrays) > len(self._names) and arrays.pop().any():
            raise InputError("a gather failed on these inputs: an index is outside of the tensor.")
        return {n: to_torch(array) if torch else array for n, array in zip(self._names, arrays, strict=True)}

    def _stream(self, feeds: Mapping[str, Any]) -> Any:
        """The stream of torch, where its tensors come from the GPU."""
        if not any(is_torch(value) and value.device.type == "cuda" for value in feeds.values()):
            return contextlib.nullcontext()
        import torch
        import tvm_ffi

        return tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), torch.cuda.current_stream(0).cuda_stream)

    def _fitting(self, arrays: Mapping[str, Any]) -> None:
        """What the compiled code assumes of sizes, and that a run has room."""
        if self._empty.of(arrays) is not None:
            return
        sizes = check_symbols(self.inputs, arrays, self._symbols, self._check_sizes, "tvm-cuda")
        if self.target.memory is not None:
            _require_memory(self.target, self._weight_bytes + int(self._planned(*sizes)))


class _Weight:
    """A weight on the GPU, and the array that it is a copy of."""

    def __init__(self, array: np.ndarray, tensor: Any) -> None:
        self.array, self.tensor = array, tensor


#: Those that a runner holds: the entries of a program share them.
_weights: weakref.WeakValueDictionary[Any, _Weight] = weakref.WeakValueDictionary()


def _weight(array: np.ndarray, copy: Callable[[np.ndarray], Any]) -> _Weight:
    key = (array.ctypes.data, array.shape, array.strides, str(array.dtype))
    found = _weights.get(key)
    if found is None:
        found = _weights[key] = _Weight(array, copy(array))
    return found


def _shadow(value: Any) -> Any:
    """An array of the shape and dtype of a tensor, without memory."""
    if isinstance(value, np.ndarray) or not hasattr(value, "shape"):
        return value
    dtype = str(value.dtype).removeprefix("torch.")
    try:
        like = np.empty((), np.dtype(dtype))
    except TypeError as error:
        raise InputError(f"tensors of {dtype} on the GPU are not taken.") from error
    return np.broadcast_to(like, tuple(int(size) for size in value.shape))


def _as_torch(value: Any) -> Any:
    import torch

    return torch.from_dlpack(value)
