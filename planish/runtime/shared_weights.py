"""Weights on a device that several sessions read: entries of one program hold the same ones, once.

A session copies its weights to its device. One that is given an OrtValue there under the name of an initializer
(`SessionOptions.add_initializer`) reads that in its place. ONNX Runtime folds no constants of such an initializer, so
only weights are shared that nothing is folded of. It is given their bytes as well, as always, for optimizers that read
them, and for a node that runs on another device than the OrtValue is on: there it takes the bytes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from planish.ir.spec import ElementType
from planish.runtime.device_memory import Block
from planish.runtime.dlpack import TYPES, value_at

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from planish.ir.program import Program
    from planish.ir.target import Target

#: Smaller ones are left to each session: they may be scalars and shapes that are folded, and are no memory to speak of.
LEAST = 1 << 20
_ALIGNED = 256
#: Inputs that are weights, by operator. No kernel of these rearranges them on a GPU, and ONNX Runtime's optimizer of
#: transpositions changes none of them in place, under its name (as it may do to those of Add, and of others).
_SLOTS = {
    ("", "MatMul"): (1,),
    ("", "Gemm"): (1,),
    ("", "Gather"): (0,),
    ("com.microsoft", "MatMulNBits"): (1, 2, 3),
    ("com.microsoft", "GatherBlockQuantized"): (0, 2, 3),
}
#: Ours, where there are kernels for them: else they are functions, of whose constants ONNX Runtime folds some.
_OURS = re.compile(r"Quantized(Linear|SwiGLU)[48]\w*")


@dataclass(frozen=True)
class Weight:
    """An initializer of an entry.

    Attributes:
        key: equal for those of other entries that are the same tensor.
        element: its type, one of :data:`planish.runtime.dlpack.TYPES`.
    """

    key: Hashable
    element: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TYPES[ElementType(self.element)][1] // 8


def why_not(model: onnx.ModelProto, *, kernels: bool = False, least: int = LEAST) -> dict[str, str]:
    """Initializer → why sessions can not share it; an empty text for those that they can.

    Args:
        kernels: whether the session has kernels for our operators.
        least: the size in bytes from which on it is worth it.
    """
    graph = model.graph
    listed = {value.name for value in (*graph.input, *graph.output)}
    inner = {name for node in graph.node for body in _bodies(node) for name in _names(body)}
    found = {}
    for tensor in graph.initializer:
        width = dict(TYPES).get(tensor.data_type, (0, 0))[1]
        if not width:
            found[tensor.name] = f"elements of type {tensor.data_type} do not cross"
        elif math.prod(tensor.dims) * width // 8 < max(least, 1):
            found[tensor.name] = f"it has less than {max(least, 1)} bytes"
        elif tensor.name in listed:
            found[tensor.name] = "it is an input or output of the entry"
        elif tensor.name in inner:
            found[tensor.name] = "a subgraph reads it"
        else:
            found[tensor.name] = ""
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if not found.get(name, "-") and not _is_weight(node, slot, kernels):
                found[name] = f"it is input {slot} of {node.op_type} '{node.name}'"
    return found


def _is_weight(node: onnx.NodeProto, slot: int, kernels: bool) -> bool:
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain == "planish":
        return kernels and slot > 0 and _OURS.fullmatch(node.op_type) is not None
    return slot in _SLOTS.get((domain, node.op_type), ())


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for body in _bodies(node):
            yield from _names(body)


class SharedWeights:
    """The weights that more than one entry of a program has, in one block on a device.

    The block is made when the first session asks, and goes with the last reference to this.

    Args:
        entries: entry → the weights that its session can share, by name.
        read: gives the bytes of one, as ONNX stores them; let go once the block is made.
        device, index: ``"cuda"`` and the number of the GPU; ``"cpu"`` is memory of the host.

    Attributes:
        entries: of those that were given, the weights that another entry has too.
        nbytes: the size of the block.
    """

    def __init__(
        self,
        entries: Mapping[str, Mapping[str, Weight]],
        read: Callable[[Weight], np.ndarray],
        device: str = "cuda",
        index: int = 0,
    ) -> None:
        self.device, self.index = device, index
        self._read: Callable[[Weight], np.ndarray] | None = read
        count = Counter(key for weights in entries.values() for key in {w.key for w in weights.values()})
        self.entries = {
            entry: {name: weight for name, weight in weights.items() if count[weight.key] > 1}
            for entry, weights in entries.items()
        }
        self.nbytes = 0
        self._offsets: dict[Hashable, int] = {}
        for weight in self._each():
            if weight.key not in self._offsets:
                self._offsets[weight.key] = self.nbytes
                self.nbytes += -(-weight.nbytes // _ALIGNED) * _ALIGNED
        self._there: tuple[Block, dict[Hashable, ort.OrtValue]] | None = None

    def _each(self) -> Iterator[Weight]:
        return (weight for weights in self.entries.values() for weight in weights.values())

    def of(self, entry: str) -> EntryWeights | None:
        """What to give the session of an entry; None if there is nothing."""
        return EntryWeights(self, entry) if self.entries.get(entry) else None

    def values(self, entry: str) -> dict[str, ort.OrtValue]:
        """The weights of an entry on the device, by name; on it from now on.

        Raises:
            UnsupportedError: they do not fit there.
        """
        if self._read is not None:
            block = Block(self.nbytes, self.device, self.index, "weights that entries share")
            made = {}
            for key, weight in {weight.key: weight for weight in self._each()}.items():
                block.write(self._offsets[key], self._read(weight))
                place = block.address + self._offsets[key], weight.element, weight.shape
                made[key] = value_at(*place, self.device, self.index)
            self._there, self._read = (block, made), None
        assert self._there is not None
        return {name: self._there[1][weight.key] for name, weight in self.entries[entry].items()}


@dataclass(frozen=True)
class EntryWeights:
    """What one session is given of :class:`SharedWeights`."""

    shared: SharedWeights
    entry: str

    def give(self, settings: ort.SessionOptions, held: Mapping[str, Hashable] | None = None) -> list[Any]:
        """Puts the weights into the settings of a session; returns what must live as long as the session.

        Args:
            held: the keys of the weights that the session's model has; what is not the same is left to it. None: all.

        Raises:
            UnsupportedError: they do not fit on the device.
        """
        known = self.shared.entries[self.entry]
        for name, value in self.shared.values(self.entry).items():
            if held is None or held.get(name) == known[name].key:
                settings.add_initializer(name, value)
        return [self.shared]  # which has the values: the settings keep an address only


def of_program(
    program: Program, *, kernels: bool = False, device: str = "cuda", index: int = 0, least: int = LEAST
) -> SharedWeights:
    """The weights that entries of a program share; nothing is copied yet.

    Args:
        kernels, least: as of :func:`why_not`.
        device, index: as of :class:`SharedWeights`.
    """
    from planish.ir.external import stored_bytes
    from planish.ir.serialize import to_proto_without_weights

    tensors: dict[Hashable, ir.TensorProtocol] = {}  # by identity
    entries: dict[str, dict[str, Weight]] = {}
    for entry, model in program.entries.items():
        proto, held = to_proto_without_weights(model)
        reasons = why_not(proto, kernels=kernels, least=least)
        found = {name: tensor for name, tensor in held.items() if not reasons.get(name, "-")}
        tensors |= {id(tensor): tensor for tensor in found.values()}
        entries[entry] = {
            name: Weight(id(tensor), int(tensor.dtype), tuple(int(d) for d in tensor.shape.numpy()))
            for name, tensor in found.items()
        }
    return SharedWeights(entries, lambda weight: stored_bytes(tensors[weight.key]), device, index)


def for_target(program: Program, target: Target) -> SharedWeights | None:
    """The weights that entries of a program share on a target; None where each session has its own."""
    if not wanted(target, len(program.entries)):
        return None
    from planish.runtime.ort_cuda import device_index

    return of_program(program, kernels=target.kernels, index=device_index(target))


def wanted(target: Target, entries: int) -> bool:
    """Whether entries share their weights on a target.

    Under a limit of memory they do not: it is one of ONNX Runtime's allocator, which would know nothing of them.
    """
    limited = target.memory is not None or "cuda.gpu_mem_limit" in dict(target.options)
    return target.name == "ort-cuda" and entries > 1 and not limited
