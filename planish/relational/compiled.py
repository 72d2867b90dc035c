"""Relational programs and PyG modules as compiled kernels that run, and train, in PyTorch."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planish.ir.errors import InputError, UnsupportedError
from planish.ir.relational.graph import Graph
from planish.ir.relational.inter import Program, Variable
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.pipeline import DEFAULT

if TYPE_CHECKING:
    import torch

    from planish.runtime.relational.engine import Memory


def compile(
    module_or_program: Any,
    *,
    device: str = "cpu",
    passes: str = DEFAULT,
    threads: int = 1,
    schedule: Mapping[str, Any] | None = None,
    deterministic: bool = False,
) -> Any:
    """A relational program, or the PyG layers of a module, compiled for this processor or for GPUs.

    Kernels are compiled at the first call, which takes seconds, for the statistics of its graph; they are right for
    every graph. What depends on the graph alone (sorted edges, pairs, tiles) is made at the first call with it and kept
    as long as the graph is: a `Graph`, or for modules the last ``edge_index`` and types, compared by content.

    Args:
        module_or_program: a `Program`, or a ``torch.nn.Module`` with PyG layers that planish reads.
        device: ``"cpu"``, or ``"cuda"``: arguments and results are then tensors on a GPU, which nvcc compiles for;
            kernels run on torch's current stream, and nothing waits for them.
        passes: a pipeline of relational passes.
        threads: of a call. With one, kernels may add rows to others as they come; with more, such sums go through
            memory first, in the order of the edges: results do not depend on the number of threads beyond rounding.
        schedule: overrides of what the chooser would choose: fields of `planish.ir.relational.intra.Schedule`.
            For processors only.
        deterministic: on a GPU, sums are made in the same order in every run, which takes more memory and time;
            without it rows are added atomically, as they come. On processors they always are.

    Returns:
        For a program a `CompiledProgram`. For a module another with the same parameters, whose layers run compiled and
        train in place of the given one.

    Raises:
        InputError: neither of both, a module without a layer that planish reads, or a device that there is not.
        UnsupportedError: TVM or a C compiler, or for GPUs nvcc, is missing.
    """
    if device not in ("cpu", "cuda"):
        raise InputError(f"device is '{device}'; it must be cpu or cuda.")
    if device == "cuda" and (schedule or threads != 1):
        raise InputError("threads and schedule are for processors; leave them out with device='cuda'.")
    options: dict[str, Any] = {
        "passes": passes,
        "threads": threads,
        "schedule": dict(schedule or {}),
        "device": device,
        "deterministic": deterministic,
    }
    if isinstance(module_or_program, Program):
        return CompiledProgram(module_or_program, **options)
    try:
        import torch
    except ImportError:
        torch = None  # type: ignore[assignment]
    if torch is not None and isinstance(module_or_program, torch.nn.Module):
        return _compiled_module(module_or_program, options)
    kind = type(module_or_program).__name__
    raise InputError(f"planish.relational.compile takes a relational program or a torch module, not a {kind}.")


def _statistics(graph: Graph) -> Statistics:
    """The statistics of a graph; made once."""
    if graph not in _known:
        _known[graph] = Statistics.of(graph)
    return _known[graph]


_known: weakref.WeakKeyDictionary[Graph, Statistics] = weakref.WeakKeyDictionary()


class CompiledProgram:
    """A relational program, callable with a graph and its arguments.

    >>> layer = planish.relational.compile(program)
    >>> y = layer(graph, x=x, W=weight)

    Arguments are float32, [rows of the domain, *shape], all NumPy arrays or all torch tensors; with tensors that
    require gradients, the result has them. One output is returned by itself, several as a tuple.
    """

    def __init__(
        self,
        program: Program,
        passes: str,
        threads: int,
        schedule: Mapping[str, Any],
        device: str = "cpu",
        deterministic: bool = False,
    ) -> None:
        self.program, self.passes, self.threads, self.schedule = program, passes, threads, dict(schedule)
        self.device, self.deterministic = device, deterministic
        self._engines: dict[Any, Any] = {}

    def __call__(self, graph: Graph, **values: Any) -> Any:
        """Raises InputError for a missing, unknown or ill-shaped argument, before any kernel runs."""
        if not isinstance(graph, Graph):
            raise InputError(f"the first argument is a {type(graph).__name__}; it must be a planish.relational.Graph.")
        known = [v.name for v in self.program.arguments]
        wrong = [name for name in values if name not in known] or [name for name in known if name not in values]
        if wrong:
            raise InputError(f"'{self.program.name}' takes {', '.join(known)}; '{wrong[0]}' is missing or unknown.")
        outputs = self.run(graph, [values[name] for name in known])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, graph: Graph, operands: Sequence[Any]) -> list[Any]:
        """The outputs, for operands in the order of `program.arguments`."""
        if self.device == "cpu" and all(type(operand).__module__ == "numpy" for operand in operands):
            engine = self.inference(graph)
            found = engine(graph, dict(zip([v.name for v in self.program.arguments], operands, strict=True)))
            return [found[name] for name in self.program.outputs]
        from planish.relational.autograd import run

        return run(self, graph, operands)

    def inference(self, graph: Graph) -> Any:
        """The compiled forward pass; `graph` is what it is compiled for, if it is not yet."""
        rows = _statistics(graph)
        key = ("inference", rows.canonical)
        if key not in self._engines:
            self._engines[key] = self._engine(self.program, rows)
        return self._engines[key]

    def training(self, graph: Graph, wrt: tuple[str, ...]) -> Any:
        """The compiled forward and backward pass for gradients of `wrt`: (what autodiff made, forward, backward)."""
        from planish.ir.relational.autodiff import differentiate
        from planish.passes.relational.pipeline import run_passes

        rows = _statistics(graph)
        key = (wrt, rows.canonical)
        if key not in self._engines:
            both = differentiate(run_passes(self.program, rows, self.passes).program, wrt)
            self._engines[key] = (both, self._engine(both.forward, rows), self._engine(both.backward, rows))
        return self._engines[key]

    def memory(self, graph: Graph, *, training: bool = False) -> Memory | tuple[Memory, Memory]:
        """What a call allocates; with `training`, of the forward and of the backward pass for all arguments."""
        if not training:
            found: Memory = self.inference(graph).memory(graph)
            return found
        _, forward, backward = self.training(graph, tuple(v.name for v in self.program.arguments))
        return forward.memory(graph), backward.memory(graph)

    def _engine(self, program: Program, rows: Statistics) -> Any:
        from planish.ir.relational.lowering import lower
        from planish.ir.relational.schedules import choose
        from planish.passes.relational.pipeline import run_passes
        from planish.runtime.relational.engine import Engine

        optimized = run_passes(program, rows, self.passes).program
        if self.device == "cuda":
            from planish.runtime.cuda.relational.engine import CudaEngine

            kernels = lower(optimized, scatter=not self.deterministic, canonical=rows.canonical, recompute=True)
            return CudaEngine(kernels, self.deterministic)
        lowered = choose(
            lower(optimized, scatter=self.threads == 1, canonical=rows.canonical), rows, self.threads, **self.schedule
        )
        return Engine(lowered, threads=self.threads)


class GraphCache:
    """The graph of the last call, kept as long as the edges stay the same."""

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self._seen: tuple[Any, ...] = ()

    def get(
        self, edge_index: torch.Tensor, edge_type: torch.Tensor, node_counts: Sequence[int], kinds: int, ends: Any
    ) -> Graph:
        """The graph of these edges: that of the last call if they are the same tensors, or equal ones."""
        rest = (tuple(int(n) for n in node_counts), kinds, ends)
        seen = (weakref.ref(edge_index), _version(edge_index), weakref.ref(edge_type), _version(edge_type), rest)
        if self.graph is not None and self._seen[-1] == rest:
            if self._same(seen):
                return self.graph
            index, types = edge_index.detach().cpu().numpy(), edge_type.detach().cpu().numpy()
            if index.shape == self.graph.edge_index.shape and self.graph.same_as(index, types):
                self._seen = seen
                return self.graph
        pointers = [0]
        for count in rest[0]:
            pointers.append(pointers[-1] + count)
        self.graph = Graph(edge_index, edge_type, num_edge_types=kinds, node_ptr=pointers, edge_ends=ends)
        self._seen = seen
        return self.graph

    def _same(self, seen: tuple[Any, ...]) -> bool:
        index, index_version, types, types_version, _ = self._seen
        return (
            index() is seen[0]()
            and types() is seen[2]()
            and index() is not None
            and types() is not None
            and None not in (index_version, types_version)
            and (index_version, types_version) == (seen[1], seen[3])
        )


def _version(tensor: torch.Tensor) -> int | None:
    """Counts changes in place; None where torch does not count them."""
    return None if tensor.is_inference() else tensor._version


def _compiled_module(module: torch.nn.Module, options: Mapping[str, Any]) -> torch.nn.Module:
    from planish.frontends.pyg import layers

    if not any(True for _ in layers(module)):
        raise InputError(f"{type(module).__name__} has no PyG layer that planish reads: nothing to compile.")
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    made = copy.deepcopy(module, dict(shared))
    state = _State(options)
    for _, part in list(layers(made)):
        part.__dict__["_planish_state"] = state
        part.__class__ = _compiled_class(type(part))  # type: ignore[arg-type]
    return made


class _State:
    """What the compiled layers of a net share: the graph of the last call, and programs by what they compute."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.graphs = GraphCache()
        self.programs: dict[Program, CompiledProgram] = {}
        #: By identity, since to hash a program takes as long as to start its kernels; readers keep their programs.
        self._seen: dict[int, tuple[Program, CompiledProgram]] = {}

    def compiled(self, program: Program) -> CompiledProgram:
        found = self._seen.get(id(program))
        if found is None:
            made = self.programs.setdefault(program, CompiledProgram(program, **self.options))
            found = self._seen[id(program)] = (program, made)
        return found[1]

    def __deepcopy__(self, memo: Any) -> _State:
        made = _State(self.options)
        made.programs = self.programs  # they hold no parameters
        return made


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of compiled layers."""
    from planish.frontends.pyg import read_call

    state: _State = self.__dict__["_planish_state"]
    call = read_call(self, *args, **kwargs)
    graph = state.graphs.get(call.edge_index, call.edge_type, call.node_counts, call.num_edge_types, call.type_ends)
    return call.result(state.compiled(call.program).run(graph, call.operands))


@functools.cache
def _compiled_class(kind: type) -> type:
    """The class of layers with the compiled forward; it goes by the same name, by which layers are known."""
    names = {"forward": _forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names)


__all__ = ["CompiledProgram", "Graph", "GraphCache", "UnsupportedError", "Variable", "compile"]
