"""Compiled relational programs, called with arrays: kernels are compiled once, plans are kept for each graph."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planish.ir.errors import InputError
from planish.ir.relational.domains import NONE
from planish.ir.relational.graph import Graph
from planish.ir.relational.inter import Variable
from planish.ir.relational.intra import Lowered
from planish.runtime.kernels.amx import amx
from planish.runtime.kernels.cpu import Cpu, permit_tiles
from planish.runtime.relational.kernel import RelationalKernel
from planish.runtime.relational.library import build
from planish.runtime.relational.plan import Plan, make_plan


@dataclass(frozen=True)
class Memory:
    """Bytes that a call needs beside its arguments.

    Attributes:
        peak: values in between and outputs: what is allocated.
        values: values in between, sharing memory; `unshared` is their sum.
        outputs: the results.
        tables: index tables of the graph that the program uses; made once for a graph.
    """

    peak: int
    values: int
    unshared: int
    outputs: int
    tables: int


class Engine:
    """A lowered program, compiled.

    Raises:
        UnsupportedError: TVM or a C compiler is missing, or the processor has no level that kernels are made for.
    """

    def __init__(self, lowered: Lowered, *, cpu: Cpu | None = None, threads: int = 1) -> None:
        self.lowered, self.threads = lowered, threads
        shapes = tuple(lowered.values.values())
        self._templates = {kernel.name: RelationalKernel(kernel, _used(kernel, shapes)) for kernel in lowered.kernels}
        if any(kernel.schedule.compute == "bfloat16" for kernel in lowered.kernels):
            cpu = cpu or amx("a relational layer")
            permit_tiles()
        self.library = build(list(self._templates.values()), cpu)
        self._plans: weakref.WeakKeyDictionary[Graph, Plan] = weakref.WeakKeyDictionary()
        self._block = np.empty(0, np.uint8)
        #: Calls share the block and the steps of a plan.
        self._lock = threading.Lock()

    def plan(self, graph: Graph) -> Plan:
        """The plan for a graph; made at its first call."""
        found = self._plans.get(graph)
        if found is None:
            found = make_plan(self.lowered, self._templates, self.library, graph)
            self._plans[graph] = found
        return found

    def memory(self, graph: Graph) -> Memory:
        """What a call on this graph allocates."""
        plan = self.plan(graph)
        outputs = sum(int(np.prod(self.shape(name, graph))) * 4 for name in self.lowered.outputs)
        return Memory(plan.arena_bytes + outputs, plan.arena_bytes, plan.sum_bytes, outputs, plan.table_bytes)

    def shape(self, name: str, graph: Graph) -> tuple[int, ...]:
        """The shape of the array of a value."""
        return full_shape(self.lowered.values[name], graph)

    def run(self, graph: Graph, addresses: Mapping[str, int]) -> None:
        """Runs the program; `addresses` are those of compact float32 arrays for every argument and output, of the
        right size: nothing checks that here."""
        with self._lock:
            plan = self.plan(graph)
            for name, address in addresses.items():
                plan.bind(name, address)
            if len(self._block) < plan.arena_bytes + 64:
                self._block = np.empty(plan.arena_bytes + 64, np.uint8)
            start = self._block.ctypes.data
            plan.bind("", start + -start % 64)
            self.library.run(plan.steps, self.threads)

    def __call__(self, graph: Graph, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the program on NumPy arrays.

        Raises:
            InputError: an argument is missing, or has a wrong dtype or shape.
        """
        arrays = {v.name: check_array(v, values.get(v.name), graph) for v in self.lowered.arguments}
        made = [name for name in self.lowered.outputs if name not in arrays]
        outputs = {name: np.empty(self.shape(name, graph), np.float32) for name in made}
        self.run(graph, {name: array.ctypes.data for name, array in (arrays | outputs).items()})
        # An output may be an argument as it is.
        return {name: outputs[name] if name in outputs else arrays[name].copy() for name in self.lowered.outputs}


def full_shape(variable: Variable, graph: Graph) -> tuple[int, ...]:
    return variable.shape if variable.domain == NONE else (graph.rows(variable.domain), *variable.shape)


def check_array(variable: Variable, array: np.ndarray | None, graph: Graph) -> np.ndarray:
    """The array, compact; raises InputError unless it is float32 of the right shape."""
    if array is None:
        raise InputError(f"no value was given for '{variable}'.")
    if array.dtype != np.float32:
        raise InputError(f"'{variable.name}' has dtype {array.dtype}; it must be float32.")
    wanted = full_shape(variable, graph)
    if array.shape != wanted:
        raise InputError(f"'{variable.name}' has shape {array.shape}; this graph and '{variable}' ask for {wanted}.")
    return np.ascontiguousarray(array)


def _used(kernel: object, shapes: Sequence[Variable]) -> tuple[Variable, ...]:
    from planish.ir.relational.intra import Kernel

    assert isinstance(kernel, Kernel)
    names = kernel.reads() | dict.fromkeys(kernel.writes())
    return tuple(v for v in shapes if v.name in names)
