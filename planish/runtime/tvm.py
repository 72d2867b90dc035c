"""Programs on TVM's virtual machine: compiled through Relax, loaded and run with TVM's runtime alone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.errors import ArtifactError, InputError, PlanishError, UnsupportedError
from planish.ir.spec import TensorSpec
from planish.ir.target import Target
from planish.runtime import flush
from planish.runtime.checks import InputChecks
from planish.runtime.empty import EmptyOutputs
from planish.runtime.kernels.cpu import LEVELS, Cpu, host, missing
from planish.runtime.tensors import to_arrays, to_torch

if TYPE_CHECKING:
    import onnx_ir as ir

#: The function of the module that checks sizes of inputs against what was assumed at compile time.
CHECK = "check_sizes"
_OUT_OF_RANGE = "outside of the tensor"


def level(target: Target) -> Cpu:
    """The level of instructions to compile for: the target's ``arch``, else the widest vectors of this processor.

    Raises:
        InputError: ``arch`` names none.
        UnsupportedError: this processor has none.
    """
    if target.arch is None:
        return host()
    if target.arch not in LEVELS:
        raise InputError(f"target '{target}': arch is one of {', '.join(LEVELS)}, not '{target.arch}'.")
    return LEVELS[target.arch]


def compile_tvm(model: ir.Model, target: Target) -> TvmRunner:
    """Compiles a model; its weights are packed for the kernels.

    Args:
        model: is not changed.
        target: threads and ``arch`` are taken from it.

    Raises:
        UnsupportedError: TVM is not installed, an operator has no code, or this processor lacks the target's level.
        InputError: the target has options, which are those of ONNX Runtime.
    """
    from planish.runtime.relax.build import build
    from planish.runtime.relax.device import CpuDevice

    if target.name != "tvm-cpu":
        raise UnsupportedError(f"target '{target}' is not one that planish.runtime.tvm compiles for; use 'tvm-cpu'.")
    if target.options:
        raise InputError(f"target '{target}': {target.options[0][0]} is an option of ONNX Runtime; leave it out.")
    cpu = level(target)
    graph = model.graph
    inputs = [TensorSpec.of(v) for v in graph.inputs if v.name not in graph.initializers]
    outputs = [TensorSpec.of(v) for v in graph.outputs]
    compiled = build(model, inputs, CpuDevice(cpu))
    if lacking := missing(cpu.features):
        raise UnsupportedError(
            f"target '{target}': this processor lacks {', '.join(lacking)}, so nothing can be measured for it here."
        )
    runner = TvmRunner(compiled.executable.jit(), compiled.weights, inputs, outputs, target)
    runner.features, runner.export = cpu.features, compiled.export
    return runner


def load_tvm(
    path: Path,
    weights: Mapping[str, np.ndarray],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    target: Target,
) -> TvmRunner:
    """A runner of a compiled library; `weights` in the order in which its function takes them.

    Raises:
        UnsupportedError: TVM's runtime is not installed.
        ArtifactError: the library does not load.
    """
    tvm = import_runtime()
    try:
        module = tvm.runtime.load_module(str(path))
    except Exception as error:  # not for this system, or of another version of TVM
        raise ArtifactError(f"'{path}' does not load: {one_line(error)}") from error
    return TvmRunner(module, weights, inputs, outputs, target)


class TvmRunner:
    """One entry of a program on TVM's virtual machine.

    Attributes:
        inputs, outputs: what `run` takes and gives.
        weights: name → array, in the order in which the compiled function takes them.
        notes: what a report should mention.
        features: what the code needs of a processor.
        export: writes the code as a shared library; None for a loaded one.
    """

    def __init__(
        self,
        module: Any,
        weights: Mapping[str, np.ndarray],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        target: Target,
    ) -> None:
        tvm = import_runtime()
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.weights = dict(weights)
        self.notes: list[str] = []
        self.features: frozenset[str] = frozenset()
        self.export: Callable[[Path], None] | None = None
        self._threads = target.threads
        self._machine = tvm.runtime.vm.VirtualMachine(module, tvm.cpu())
        self._main = self._machine["main"]
        self._check_sizes = module.get_function(CHECK, query_imports=True)
        self._names = [spec.name for spec in self.outputs]
        self._weights = [_tensor(array) for array in self.weights.values()]
        self._empty = EmptyOutputs(self.inputs, self.outputs)
        self._checks = InputChecks(self.inputs, more=self._fitting)
        self._symbols = symbols_of(self.inputs)
        self._lock = threading.Lock()  # the machine has one stack

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs on inputs by name; returns outputs by name, as torch tensors if an input was one.

        Raises:
            InputError: an input is unknown, missing, or of another dtype or shape; or a node failed on it.
        """
        arrays, as_torch = to_arrays(feeds) if "torch" in sys.modules else (feeds, False)
        self.check(arrays)
        outputs = self._empty.of(arrays)
        if outputs is None:
            outputs = self._run([_tensor(np.asarray(arrays[spec.name])) for spec in self.inputs])
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
        tensors = [_tensor(np.asarray(arrays[spec.name])) for spec in self.inputs]
        return lambda: self._run(tensors)

    def _run(self, tensors: list[Any]) -> dict[str, Any]:
        with self._lock:
            _set_threads(self._threads)
            flush.begin()
            try:
                values = self._main(*tensors, *self._weights)
            except Exception as error:
                raise run_error(error) from error
            finally:
                flush.end()
        return {name: np.from_dlpack(value) for name, value in zip(self._names, values, strict=True)}

    def _fitting(self, arrays: Mapping[str, Any]) -> None:
        """What the compiled code assumes of sizes, beyond the specs."""
        if self._empty.of(arrays) is None:
            check_symbols(self.inputs, arrays, self._symbols, self._check_sizes, "tvm-cpu")


def check_symbols(
    inputs: Sequence[TensorSpec], arrays: Mapping[str, Any], symbols: Sequence[str], check: Any, target: str
) -> list[int]:
    """The symbolic sizes of inputs, in order, after the compiled check of them.

    Raises:
        InputError: a size is 0, or not one that the code takes.
    """
    sizes: dict[Any, int] = {}
    for spec in inputs:
        for axis, (name, size) in enumerate(zip(spec.shape or (), arrays[spec.name].shape, strict=True)):
            if size == 0:
                raise InputError(
                    f"input '{spec.name}' has size 0 in dimension {axis}; target {target} takes 1 or more."
                )
            if not isinstance(name, int):
                sizes.setdefault(name or f"{spec.name}.{axis}", int(size))
    own = [sizes[name] for name in symbols]
    try:
        check(*own)
    except Exception as error:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(f"the program does not take inputs of {given}: {one_line(error)}.") from error
    return own


def symbols_of(inputs: Sequence[TensorSpec]) -> list[str]:
    """The symbolic sizes, in the order in which the translation meets them."""
    names = [
        name or f"{spec.name}.{axis}"
        for spec in inputs
        for axis, name in enumerate(spec.shape or ())
        if not isinstance(name, int)
    ]
    return list(dict.fromkeys(names))


class _Threads(threading.local):
    """TVM has a pool of threads for each thread that calls it."""

    count: int | None = None


_threads = _Threads()


def _set_threads(count: int) -> None:
    if _threads.count != count:
        # Mode 1 takes the fastest cores first; 0 threads are as many as there are cores.
        import_runtime().get_global_func("runtime.config_threadpool")(1, count)
        _threads.count = count


def import_runtime() -> Any:
    """TVM with at least its runtime, or one line about how to get it.

    Raises:
        UnsupportedError: it is not installed.
    """
    # Threads bound to cores would stay there for everything else in the process.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    try:
        import tvm
        import tvm.runtime.vm
    except ImportError as error:
        raise UnsupportedError(
            f"targets tvm-cpu and tvm-cuda run on TVM, which can not be imported ({error}): pip install 'planish[tvm]'."
        ) from error
    return tvm


def _tensor(array: np.ndarray) -> Any:
    """A tensor of TVM over the memory of an array, or over a copy that lies as TVM wants it."""
    tvm = import_runtime()
    if not array.flags.c_contiguous or not array.flags.writeable or array.ctypes.data % 64 or not array.size:
        return tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape))
    return tvm.runtime.from_dlpack(array)


def run_error(error: Exception) -> PlanishError:
    text = one_line(error)
    if _OUT_OF_RANGE in text:
        return InputError(f"a gather failed on these inputs: {text}.")
    return InputError(f"TVM failed on these inputs: {text}.")


def one_line(error: BaseException) -> str:
    """The last line of TVM's message, which says what was wrong; those before it say where in TVM's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return (text if len(text) <= 400 else text[:397] + "...").rstrip(".")
