"""The pieces of a decoder with the sessions that they share, and what a plan must know of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.causal_lm import IDS, LENGTHS, LOGITS
from planish.ir.errors import UnsupportedError
from planish.ir.target import Target
from planish.runtime.offload import host_attention
from planish.runtime.offload.bound import PieceSession, Place, reads_on_host
from planish.runtime.offload.device import COMPUTE, Device
from planish.runtime.offload.pieces import Piece
from planish.runtime.offload.plan import Facts, Plan
from planish.runtime.offload.split import Split
from planish.runtime.offload.weights import PackedWeights, value_bytes
from planish.runtime.offload.workspace import workspace
from planish.runtime.ort import OrtRunner, compile_ort


@dataclass(frozen=True)
class Part:
    """A piece that can run.

    Attributes:
        offsets: of its weights in the block of its unit.
        on_host: positions of the inputs that are read on the host.
        there: it runs on the host.
    """

    piece: Piece
    offsets: tuple[int, ...]
    on_host: frozenset[int]
    there: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.piece.inputs


@dataclass(frozen=True)
class LayerParts:
    """A layer, whole and cut around its attention."""

    whole: Part
    before: Part | None
    attention: Part | None
    after: Part | None
    queries: tuple[str, ...]
    mixed: str


class Parts:
    """A decoder in parts.

    Attributes:
        carried: for each boundary between units the names of the values that cross it.
        sides: values that layers read of the head.
        packed: the weights of each unit, the tail last.
        cache_values: for each layer, key and value as its model takes them.
        vocabulary: size of the logits.
    """

    def __init__(self, split: Split, device: Device, target: Target) -> None:
        self.device, self.target = device, target
        self.carried, self.sides = split.carried, split.sides
        self.packed = [PackedWeights(unit.pieces) for unit in split.layers] + [PackedWeights([split.tail])]
        self.layers = [
            LayerParts(
                _part(unit.whole, packed),
                None if unit.before is None else _part(unit.before, packed),
                None if unit.attention is None else _part(unit.attention, packed, there=True),
                None if unit.after is None else _part(unit.after, packed),
                unit.queries,
                unit.mixed,
            )
            for unit, packed in zip(split.layers, self.packed, strict=False)
        ]
        self.tail = _part(split.tail, self.packed[-1])
        self.cache_values = [list(layer.whole.piece.model.graph.inputs)[_caches(layer.whole)] for layer in self.layers]
        self._values = _values_of(split)
        last = self._values[LOGITS].shape
        if last is None or not isinstance(last[-1], int):
            raise UnsupportedError("the size of the vocabulary is not known.")
        self.vocabulary = int(last[-1])
        self._head_model = split.head.model
        #: Attention on the host by the kernel of this package, where it can be compiled, not by ONNX Runtime's.
        self.own_kernel = True
        self._sessions: dict[tuple[int, bool], PieceSession] = {}
        self._spaces: dict[tuple[int, bool], int] = {}  # what they may take on the device

    @functools.cached_property
    def _head(self) -> OrtRunner:
        # Its threads would spin where those of attention on the host want to run.
        cpu = Target("ort", "cpu", threads=self.target.threads, options=(("session.intra_op.allow_spinning", "0"),))
        return compile_ort(self._head_model, cpu)

    def head(self, ids: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
        """What the head gives for ids (batch, tokens) after `lengths` tokens, with ids and lengths, by name."""
        given = {IDS: ids, LENGTHS: lengths}
        names = {spec.name for spec in self._head.inputs}
        return {**given, **self._head.run({name: value for name, value in given.items() if name in names})}

    def value(self, name: str) -> ir.Value:
        """A value that goes from part to part."""
        return self._values[name]

    def is_total(self, name: str) -> bool:
        """Whether attention takes this for the length of the longest row: operand 6 of GroupQueryAttention."""
        return any(
            value.uses() and all(at == 6 for _, at in value.uses())
            for layer in self.layers
            if layer.attention is not None
            for known, value in zip(layer.attention.inputs, layer.attention.piece.model.graph.inputs, strict=False)
            if known == name
        )

    def nbytes(self, name: str, sizes: Mapping[str, int]) -> int:
        """The size of such a value."""
        return value_bytes(self._values[name], dict(sizes))

    def carried_sizes(self, sizes: Mapping[str, int]) -> list[int]:
        """Sizes of buffers that hold what crosses any boundary."""
        found = [[self.nbytes(name, sizes) for name in names] for names in self.carried]
        return [max((row[at] for row in found if at < len(row)), default=0) for at in range(max(map(len, found)))]

    def facts(self) -> Facts:
        """What a plan is made from."""
        one = {"batch": 1, "tokens": 1, "capacity": 1}
        exchange = max(
            (sum(self.nbytes(n, one) for n in (*p.queries, p.mixed)) for p in self.layers if p.mixed), default=0
        )
        return Facts(
            units=tuple(packed.nbytes for packed in self.packed),
            kv=tuple(sum(value_bytes(v, one) for v in pair) for pair in self.cache_values),
            carried=sum(self.carried_sizes(one)),
            sides=sum(self.nbytes(name, one) for name in self.sides),
            logits=self.nbytes(LOGITS, one) + exchange,
            splits=frozenset(k for k, layer in enumerate(self.layers) if layer.attention is not None),
            workspace=self.workspace,
            reserve=self.device.reserve,
        )

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - parts live as long as their engine
    def workspace(self, batch: int, tokens: int, capacity: int, split: bool) -> int:
        """What sessions take while they run, by liveness: a prompt goes row by row, a step is one token a row."""
        return sum(self._room(*item, batch, tokens, capacity) for item in self._models(split))

    def held(self, plan: Plan) -> int:
        """What all sessions take once a plan's are made: those that had more room keep it."""
        return sum((self._spaces | {key: room for key, (_, room) in self._wanted(plan).items()}).values())

    def prepare(self, plan: Plan) -> None:
        """Makes the sessions that a plan needs; those that had less room are made again."""
        for key, (piece, room) in self._wanted(plan).items():
            if key not in self._sessions or self._spaces[key] < room:
                if key in self._sessions:
                    self._settle()
                    del self._sessions[key]
                self._sessions[key] = PieceSession(piece, self.device, self.target, room)
                self._spaces[key] = room

    def forget(self) -> None:
        """Gives back the sessions on the device."""
        self._settle()
        self._sessions = {key: session for key, session in self._sessions.items() if key not in self._spaces}
        self._spaces.clear()

    def _settle(self) -> None:
        """Waits for what runs: memory that ONNX Runtime gives back in the stream must not be of a session that went."""
        self.device.synchronize(self.device.record(COMPUTE))

    def _wanted(self, plan: Plan) -> dict[tuple[int, bool], tuple[Piece, int]]:
        """Pieces with the room of their sessions, at least what these have."""
        ask, found = plan.request, {}
        for piece, steps in self._models(bool(plan.kv_host())):
            key = id(piece.model), False
            room = self._room(piece, steps, ask.batch, plan.chunk, ask.capacity)
            found[key] = piece, max(room, self._spaces.get(key, 0))
        return found

    def session(self, part: Part) -> PieceSession:
        """The session of a part; those on the host are made when they are first asked for."""
        key = id(part.piece.model), part.there
        if part.there and key not in self._sessions:
            cpu = Target("ort", "cpu", threads=self.target.threads)
            self._sessions[key] = PieceSession(part.piece, None, cpu)
        return self._sessions[key]

    def bind(
        self,
        part: Part,
        inputs: Sequence[Place],
        weights: Sequence[int],
        outputs: Sequence[Place],
        sizes: dict[str, int],
    ) -> Callable[[], None]:
        """A run of a part on addresses; attention on the host is our own kernel's, where there is one."""
        if part.there and self.own_kernel:
            places = [place.address for place in inputs], [place.address for place in outputs]
            found = host_attention.bind(part.piece.model, *places, sizes, self.target.threads)
            if found is not None:
                return found
        return self.session(part).bind(inputs, weights, outputs, sizes)

    def _models(self, split: bool) -> list[tuple[Piece, bool]]:
        """One piece of each structure that runs on the device, and whether it runs in steps only."""
        parts = [(self.tail, False), *((layer.whole, False) for layer in self.layers)]
        if split:
            parts += [(p, True) for layer in self.layers for p in (layer.before, layer.after) if p is not None]
        return list({id(part.piece.model): (part.piece, steps) for part, steps in parts}.values())

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _space(self, model: ir.Model, batch: int, tokens: int, capacity: int) -> int:
        try:
            return workspace(model, {"batch": batch, "tokens": tokens, "capacity": capacity})
        except ValueError as error:
            raise UnsupportedError(f"the memory of a layer can not be planned: {error}.") from error

    def _room(self, piece: Piece, steps: bool, batch: int, tokens: int, capacity: int) -> int:
        most = self._space(piece.model, batch, 1, capacity)
        if not steps:
            most = max(most, self._space(piece.model, 1, tokens, capacity))
        return self.device.room(most)


def _caches(part: Part) -> slice:
    given = len(part.piece.inputs)
    return slice(given - 2, given)


def _part(piece: Piece, packed: PackedWeights, there: bool = False) -> Part:
    offsets = () if there else tuple(packed.offsets(piece))
    given: Sequence[ir.Value] = list(piece.model.graph.inputs)[: len(piece.inputs)]
    where = range(len(given)) if there else (k for k, value in enumerate(given) if reads_on_host(value))
    return Part(piece, offsets, frozenset(where), there)


def _values_of(split: Split) -> dict[str, ir.Value]:
    """Name in the whole graph → a value of a piece, with its type and shape."""
    found: dict[str, ir.Value] = {}
    pieces = [split.head, split.tail]
    for unit in split.layers:
        pieces += [p for p in (unit.whole, unit.before, unit.attention, unit.after) if p is not None]
    for piece in pieces:
        graph = piece.model.graph
        for name, value in (
            *zip(piece.inputs, graph.inputs, strict=False),
            *zip(piece.outputs, graph.outputs, strict=True),
        ):
            known = found.get(name)
            if known is None or known.shape is None:
                found[name] = value
    return found
