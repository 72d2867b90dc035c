"""The contract of a kernel template.

A template is a frozen dataclass; its fields are what is fixed when the kernel is compiled (dtype, head size,
activation), and sizes that are not fields are symbolic in the kernel. `build` gives a TIR PrimFunc in
destination-passing form for a level of instructions, `reference` computes the same in float64. TVM is needed to
compile, never to load what came out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.errors import UnsupportedError
from planish.runtime.kernels.cpu import Cpu, host

#: Annotations of an `alloc_buffer` that is to be registers, or stack: small, of constant size.
ON_STACK = {"disable_lower_builtin": True}


@dataclass(frozen=True)
class Template(ABC):
    """A kernel in every detail but the processor's."""

    @property
    @abstractmethod
    def symbol(self) -> str:
        """The name of the C function, unique among instances: ``linear_f32_gelu``."""

    @abstractmethod
    def build(self, cpu: Cpu) -> Any:
        """The kernel as a ``tvm.tirx.PrimFunc`` named `symbol`; inputs come first, outputs last, all compact."""

    @abstractmethod
    def reference(self, *arguments: np.ndarray) -> Any:
        """The outputs in float64, from the inputs that the kernel takes."""

    def cpu(self) -> Cpu:
        """What this machine would compile it for.

        Raises:
            UnsupportedError: the processor lacks what the kernel needs.
        """
        return host()


def target(cpu: Cpu) -> Any:
    """TVM's description of a level of instructions."""
    tvm = import_tvm()
    # The name alone would mean generic code if LLVM did not know it; these are names that it knows.
    return tvm.target.Target({"kind": "llvm", "mcpu": cpu.mcpu, "mattr": list(cpu.attributes)})


def compile_module(templates: Iterable[Template], cpu: Cpu) -> Any:
    """TVM's compiled module with a function for each template."""
    tvm = import_tvm()
    functions = {template.symbol: template.build(cpu) for template in templates}
    # TVM asks its memory pool for a local buffer, in every iteration of a parallel loop, unless the buffer carries
    # `ON_STACK`; the pass that is turned off here drops such marks.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        return tvm.compile(tvm.IRModule(functions), target=target(cpu)).mod


def function(template: Template, cpu: Cpu | None = None) -> Callable[..., None]:
    """The kernel as a Python function over arrays, outputs included: for tests and benchmarks."""
    tvm = import_tvm()
    found = compile_module([template], cpu or template.cpu())[template.symbol]

    def tensor(array: np.ndarray) -> Any:
        # NumPy's strides of an array of nothing are not those of a compact one.
        return tvm.runtime.from_dlpack(array) if array.size else tvm.runtime.empty(array.shape, str(array.dtype))

    def call(*arguments: np.ndarray) -> None:
        found(*(tensor(array) for array in arguments))

    return call


def aligned(array: np.ndarray) -> np.ndarray:
    """A compact copy of an array that starts at a multiple of 64 bytes, which TVM asks of memory it is given."""
    array = np.asarray(array)
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy: np.ndarray = np.ndarray(array.shape, array.dtype, memory, start)  # a slice of nothing would start at 0
    copy[...] = array
    return copy


def import_tvm() -> Any:
    """TVM, or one line about how to get it.

    Raises:
        UnsupportedError: it is not installed, or has no compiler.
    """
    try:
        import tvm
        import tvm.tirx
    except ImportError as error:
        raise UnsupportedError(
            f"generated kernels are compiled by TVM, which can not be imported ({error}): pip install 'planish[tvm]'."
        ) from error
    return tvm
