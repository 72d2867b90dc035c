"""One rank of a tensor-parallel program on a device of torch: nodes in their order, sums on a stream of their own.

The order is the program's: an AllReduce is begun behind the node that makes its addend, and the device waits for it
where something reads the sum. What comes between overlaps with it; `tile-all-reduce` and `pipeline-all-reduce` put
something there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir

from planish.ir.errors import UnsupportedError
from planish.ir.graphs import dims_of
from planish.ir.parallel import is_all_reduce
from planish.ir.program import Program
from planish.runtime.parallel.torch_ops import ADDENDS, OPS, Attend, add, contiguous_attention

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Received:
    """What is still to be added to this rank's addend.

    Attributes:
        tensor: the other rank's addend.
        release: called when what reads the tensor has been begun: its memory may then be written again.
    """

    tensor: torch.Tensor
    release: Callable[[], None]


class Reducer(Protocol):
    """Begins a sum over ranks, in place, behind what the current stream holds."""

    def begin(self, tensor: torch.Tensor) -> Callable[[], Received | None]:
        """Returns what makes the current stream wait for the sum, or for what is missing of it."""
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
        like: a rank on the same device, whose weights are used where both programs have the same.

    Raises:
        UnsupportedError: an operator that this executor does not have.
    """

    program: Program
    reducer: Reducer
    entry: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    attend: Attend = contiguous_attention
    like: Rank | None = None
    _weights: dict[ir.Value, Any] = field(default_factory=dict)
    #: Product of a chunk → (the whole, chunk): chunks are written where their Concat wants them.
    _places: dict[ir.Value, tuple[ir.Node, int]] = field(default_factory=dict)
    #: Node → what nothing reads behind it.
    _last: dict[ir.Node, list[ir.Value]] = field(default_factory=dict)
    _tensors: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.program.entry(self.entry or self.program.default_entry).graph
        for node in self.graph:
            if not is_all_reduce(node) and (node.domain, node.op_type) not in OPS:
                raise UnsupportedError(f"{node.op_type} '{node.name}' has no form in this executor.")
        for value in self.graph.initializers.values():
            self._weights[value] = self._loaded(value.const_value)
        self._plan()

    def _loaded(self, constant: Any) -> Any:
        """A weight on the device; once for all ranks that are like each other."""
        import torch

        # What it was made from is kept with it, so that nothing else gets its identity.
        if self.like is not None and id(constant) in self.like._tensors:
            self._tensors[id(constant)] = self.like._tensors[id(constant)]
            return self._tensors[id(constant)][1]
        tensor = torch.from_numpy(np.array(np.asarray(constant.numpy())))
        # What sizes are computed with stays on the host: reading it back would wait for the device.
        tensor = tensor if tensor.dtype == torch.int64 else tensor.to(self.device)
        if tensor.is_floating_point() and self.dtype is not None:
            tensor = tensor.to(getattr(torch, self.dtype))
        self._tensors[id(constant)] = constant, tensor
        return tensor

    def _plan(self) -> None:
        for node in self.graph:
            if node.op_type == "Concat" and _one_batch(node):
                for index, read in enumerate(node.inputs):
                    above = read.producer() if read is not None else None
                    if above is not None and is_all_reduce(above):
                        self._places[above.inputs[0]] = (node, index)  # type: ignore[index]
                    else:
                        self._places[read] = (node, index)  # type: ignore[index]
        readers = {value: node for node in self.graph for value in node.inputs if value is not None}
        for value, node in readers.items():
            if value not in self._weights and not value.is_graph_output():
                self._last.setdefault(node, []).append(value)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs → outputs by name, tensors on the device; the current stream has to be waited for."""
        outputs: dict[str, Any] = {}
        for _ in self.steps(feeds, outputs):
            pass
        return outputs

    def steps(self, feeds: Mapping[str, Any], outputs: dict[str, Any]) -> Iterator[None]:
        """As `run`, but stops behind every node, and puts the outputs into a dictionary.

        A value is let go behind the last node that reads it. Its memory may then be used again on this stream, which
        has waited for every sum in it.
        """
        values: dict[ir.Value | None, Any] = dict(self._weights.items())
        values |= {value: feeds[value.name or ""] for value in self.graph.inputs if value not in self._weights}
        values[None] = None
        waiting: dict[ir.Value, Callable[[], Received | None]] = {}
        wholes: dict[ir.Node, Any] = {}
        for node in self.graph:
            given = [values[value] for value in node.inputs]
            held = self._summed(node, given, waiting)
            if is_all_reduce(node):
                addend = given[0] if _own(node.inputs[0]) else given[0].clone()
                waiting[node.outputs[0]] = self.reducer.begin(addend)
                values[node.outputs[0]] = addend
            elif node in wholes:
                values[node.outputs[0]] = wholes.pop(node)
            elif node.outputs[0] in self._places:
                values[node.outputs[0]] = self._placed(node, given, wholes)
            else:
                results = OPS[node.domain, node.op_type](node, given, self.attend)
                values |= zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False)
            for received in held:
                received.release()
            for value in self._last.get(node, ()):
                if value not in waiting:
                    values.pop(value, None)
            yield
        for value in self.graph.outputs:
            if value in waiting:
                _add(values[value], waiting.pop(value)())
        outputs |= {value.name or "": values[value] for value in self.graph.outputs}

    def _summed(self, node: ir.Node, given: list[Any], waiting: dict[ir.Value, Any]) -> list[Received]:
        """Waits for the sums among a node's operands. Where one has not been added up, a node that can adds it while it
        reads it, and gets both addends.
        """
        held = []
        for index, read in enumerate(node.inputs):
            if read is None or read not in waiting:
                continue
            received = waiting.pop(read)()
            takes = ADDENDS.get((node.domain, node.op_type), ())
            if received is not None and index in takes and len(read.uses()) == 1 and not read.is_graph_output():
                given[index] = (given[index], received.tensor)
                held.append(received)
            else:
                _add(given[index], received)
        return held

    def _placed(self, node: ir.Node, given: list[Any], wholes: dict[ir.Node, Any]) -> Any:
        """A product or sum that is written to its rows of the whole, where its Concat would have copied it."""
        import torch

        concat, index = self._places[node.outputs[0]]
        sizes = [int(dims_of(value)[1]) for value in concat.inputs]  # type: ignore[index, arg-type]
        product = node.op_type == "MatMul" and given[0].dim() == 3 and given[1].dim() == 2
        addends = [item[0] if isinstance(item, tuple) else item for item in given]
        alike = node.op_type == "Add" and addends[0].shape == addends[1].shape
        result = None if product or alike else OPS[node.domain, node.op_type](node, given, self.attend)
        if concat not in wholes:
            width = (addends[1] if result is None else result).shape[-1]
            wholes[concat] = addends[0].new_empty(1, sum(sizes), width)
        rows = wholes[concat][:, sum(sizes[:index]) : sum(sizes[: index + 1])]
        if product:
            torch.mm(given[0][0], given[1], out=rows[0])
        elif alike:
            add(given[0], given[1], rows)
        else:
            rows.copy_(result)
        return rows


def _add(own: torch.Tensor, received: Received | None) -> None:
    if received is not None:
        own.add_(received.tensor)
        received.release()


def _own(addend: ir.Value | None) -> bool:
    """Whether a sum may take the place of its addend: new memory, which nothing else reads."""
    producer = addend.producer() if addend is not None else None
    fresh = producer is not None and producer.op_type in ("MatMul", "Add")
    return fresh and addend is not None and len(addend.uses()) == 1 and not addend.is_graph_output()


def _one_batch(node: ir.Node) -> bool:
    """Whether a Concat joins chunks of one sequence, of known lengths: each is then one piece of memory.

    All of them must be written there, since what is not would be missing.
    """
    shapes = [dims_of(value) for value in node.inputs]
    return (
        node.attributes.get_int("axis") == 1
        and all(s is not None and len(s) == 3 and s[0] == 1 and isinstance(s[1], int) for s in shapes)
        and all(_product(value) for value in node.inputs)
    )


def _product(value: ir.Value | None) -> bool:
    """Whether a value is new memory, of a product or a sum, that its Concat alone reads."""
    producer = value.producer() if value is not None else None
    if value is None or producer is None or value.is_graph_output() or len(value.uses()) != 1:
        return False
    if is_all_reduce(producer):
        return _product(producer.inputs[0])
    return producer.op_type in ("MatMul", "Add") and not producer.domain
