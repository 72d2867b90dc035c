"""One rank of a tensor-parallel program on a device of torch: nodes in their order, sums on a stream of their own.

The order is the program's: an AllReduce is begun behind the node that makes its addend, and the device waits for it
where something reads the sum. What comes between overlaps with it; `tile-all-reduce` puts something there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir

from planish.ir.errors import UnsupportedError
from planish.ir.graphs import dims_of
from planish.ir.parallel import is_all_reduce
from planish.ir.program import Program
from planish.runtime.parallel.torch_ops import OPS, Attend, contiguous_attention

if TYPE_CHECKING:
    import torch


class Reducer(Protocol):
    """Begins a sum over ranks, in place, behind what the current stream holds."""

    def begin(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Returns what makes the current stream wait for the sum."""
        ...


class NcclReducer:
    """Sums by NCCL on a second stream. `communicator` is a `nccl.Communicator`."""

    def __init__(self, communicator: Any) -> None:
        import torch

        self.communicator = communicator
        # Sums are short, and others wait for them: their blocks go first.
        self.stream = torch.cuda.Stream(priority=-1)

    def begin(self, tensor: torch.Tensor) -> Callable[[], None]:
        import torch

        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record()
        self.stream.wait_event(ready)
        self.communicator.all_reduce(tensor, self.stream.cuda_stream)
        done.record(self.stream)
        return lambda: torch.cuda.current_stream().wait_event(done)


class GlooReducer:
    """Sums by torch.distributed's default group, for processes on CPUs."""

    def begin(self, tensor: torch.Tensor) -> Callable[[], None]:
        import torch.distributed

        work = torch.distributed.all_reduce(tensor, async_op=True)
        assert work is not None
        return lambda: work.wait() and None


@dataclass
class Rank:
    """An entry of one rank's program, its weights on a device.

    Args:
        attend: what computes attention; by default torch's own.
        dtype: of floating-point weights, such as ``"float16"``; None keeps theirs.

    Raises:
        UnsupportedError: an operator that this executor does not have.
    """

    program: Program
    reducer: Reducer
    entry: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    attend: Attend = contiguous_attention
    _weights: dict[ir.Value, Any] = field(default_factory=dict)
    #: Addend of a chunk → (the whole, chunk): chunks are written where their Concat wants them.
    _places: dict[ir.Value, tuple[ir.Node, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        self.graph = self.program.entry(self.entry or self.program.default_entry).graph
        for node in self.graph:
            if not is_all_reduce(node) and (node.domain, node.op_type) not in OPS:
                raise UnsupportedError(f"{node.op_type} '{node.name}' has no form in this executor.")
        for value in self.graph.initializers.values():
            array = np.asarray(value.const_value.numpy())  # type: ignore[union-attr]
            tensor = torch.from_numpy(np.array(array))
            # What sizes are computed with stays on the host: reading it back would wait for the device.
            tensor = tensor if tensor.dtype == torch.int64 else tensor.to(self.device)
            if tensor.is_floating_point() and self.dtype is not None:
                tensor = tensor.to(getattr(torch, self.dtype))
            self._weights[value] = tensor
        for node in self.graph:
            if node.op_type == "Concat" and _one_batch(node):
                for index, read in enumerate(node.inputs):
                    above = read.producer() if read is not None else None
                    if above is not None and is_all_reduce(above) and above.inputs[0] is not None:
                        self._places[above.inputs[0]] = (node, index)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs → outputs by name, tensors on the device; the current stream has to be waited for.

        What is between them is kept until the call returns, so that no sum loses its memory.
        """
        values: dict[ir.Value | None, Any] = dict(self._weights.items())
        values |= {value: feeds[value.name or ""] for value in self.graph.inputs if value not in self._weights}
        values[None] = None
        waiting: dict[ir.Value, Callable[[], None]] = {}
        wholes: dict[ir.Node, Any] = {}
        for node in self.graph:
            for read in node.inputs:
                if read in waiting:
                    waiting.pop(read)()
            given = [values[value] for value in node.inputs]
            if is_all_reduce(node):
                addend = given[0] if _own(node.inputs[0]) else given[0].clone()
                waiting[node.outputs[0]] = self.reducer.begin(addend)
                values[node.outputs[0]] = addend
            elif node in wholes:
                values[node.outputs[0]] = wholes[node]
            elif node.outputs[0] in self._places:
                values[node.outputs[0]] = self._placed(node, given, wholes)
            else:
                results = OPS[node.domain, node.op_type](node, given, self.attend)
                values |= zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False)
        for value in self.graph.outputs:
            if value in waiting:
                waiting.pop(value)()
        return {value.name or "": values[value] for value in self.graph.outputs}

    def _placed(self, node: ir.Node, given: list[Any], wholes: dict[ir.Node, Any]) -> Any:
        """A product that is written to its rows of the whole, where its Concat would have copied it."""
        import torch

        concat, index = self._places[node.outputs[0]]
        if node.op_type != "MatMul" or given[0].dim() != 3:
            return OPS[node.domain, node.op_type](node, given, self.attend)
        sizes = [int(dims_of(value)[1]) for value in concat.inputs]  # type: ignore[index, arg-type]
        if concat not in wholes:
            wholes[concat] = given[0].new_empty(1, sum(sizes), given[1].shape[-1])
        rows = wholes[concat][:, sum(sizes[:index]) : sum(sizes[: index + 1])]
        torch.mm(given[0][0], given[1], out=rows[0])
        return rows


def _own(addend: ir.Value | None) -> bool:
    """Whether a sum may take the place of its addend: new memory, which nothing else reads."""
    producer = addend.producer() if addend is not None else None
    fresh = producer is not None and producer.op_type in ("MatMul", "Add")
    return fresh and addend is not None and len(addend.uses()) == 1 and not addend.is_graph_output()


def _one_batch(node: ir.Node) -> bool:
    """Whether a Concat joins chunks of one sequence, of known lengths: each is then one piece of memory."""
    shapes = [dims_of(value) for value in node.inputs]
    return node.attributes.get_int("axis") == 1 and all(
        s is not None and len(s) == 3 and s[0] == 1 and isinstance(s[1], int) for s in shapes
    )
