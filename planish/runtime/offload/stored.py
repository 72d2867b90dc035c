"""A decoder that was cut along its layers, as files of an artifact: models of its pieces, and what weights each takes.

``pieces/split.json`` says how the pieces follow each other. A model is stored once for all layers of one structure, and
every weight once, in the artifact's weights file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from planish.ir.errors import ArtifactError
from planish.ir.external import tensor_bytes, tensor_from_buffer
from planish.runtime.offload.pieces import Piece
from planish.runtime.offload.plan import Rates, Request
from planish.runtime.offload.split import LayerUnit, Split

if TYPE_CHECKING:
    from planish.runtime.offload.engine import Engine

#: The file that an entry of such an artifact names.
SPLIT = "pieces/split.json"
_VERSION = 1
_PARTS = ("whole", "before", "attention", "after")

Store = Callable[[str, Mapping[str, ir.TensorProtocol]], dict[str, str]]
"""Takes in tensors by name, under a name of who brings them; returns their names in the file of weights."""


class Writer:
    """Gathers the pieces of a split.

    Attributes:
        models: the message of each model, and its weights' names in the file of weights, by their names there.
    """

    def __init__(self, engine: Engine, request: Request, store: Store) -> None:
        self.models: list[tuple[onnx.ModelProto, dict[str, str]]] = []
        self._numbers: dict[int, int] = {}
        self._weights: dict[str, dict[str, Any]] = {}
        self._store = store
        split = engine.split
        layers = []
        for unit in split.layers:
            parts = {part: self._piece(getattr(unit, part)) for part in _PARTS}
            named = {"name": unit.name, "number": unit.number, "queries": unit.queries, "mixed": unit.mixed}
            layers.append(named | parts)
        self._data = {
            "version": _VERSION,
            "head": self._piece(split.head),
            "layers": layers,
            "tail": self._piece(split.tail),
            "carried": split.carried,
            "sides": split.sides,
            "weights": self._weights,
            "request": asdict(request),
            "rates": asdict(engine.rates) if engine.measured else None,
        }

    def description(self) -> bytes:
        """The file :data:`SPLIT`."""
        return json.dumps(self._data, indent=1, sort_keys=True, allow_nan=False).encode()

    def _piece(self, piece: Piece | None) -> dict[str, Any] | None:
        from planish.ir.serialize import to_proto_without_weights
        from planish.runtime.ort import with_bodies

        if piece is None:
            return None
        number = self._numbers.get(id(piece.model))
        if number is None:
            number = self._numbers[id(piece.model)] = len(self.models)
            proto, constants = to_proto_without_weights(with_bodies(piece.model))
            self.models.append((proto, self._store(f"pieces/{number}", constants)))
        weights = [self._weight(tensor) for tensor in piece.weights]
        return {"model": number, "inputs": piece.inputs, "outputs": piece.outputs, "weights": weights}

    def _weight(self, tensor: ir.TensorProtocol) -> str:
        name = tensor.name or "weight"
        key = self._store("pieces", {name: tensor})[name]
        self._weights[key] = {"dtype": tensor.dtype.name, "shape": [int(d) for d in tensor.shape.numpy()]}
        return key


class Reader:
    """Reads what :class:`Writer` wrote.

    Args:
        where: the folder, for messages.
        contents: the small files of the artifact by name, as their hashes were checked.
        weights: the arrays of its weights file, by name.
        data: the bytes of that file; the caller has checked that models refer to nothing else, nor past its end.

    Attributes:
        split: the pieces.
        request: that a plan was checked with when the artifact was made.
        rates: of the machine that made it; None: it had no GPU.

    Raises:
        ArtifactError: a piece or a weight is missing, or is not what the description says.
    """

    def __init__(self, where: str, contents: Mapping[str, bytes], weights: Mapping[str, np.ndarray], data: Any) -> None:
        self.where, self._contents, self._weights, self._bytes = where, contents, weights, data
        self._models: dict[int, ir.Model] = {}
        self._tensors: dict[str, ir.TensorProtocol] = {}
        try:
            self._data = json.loads(contents[SPLIT])
            if self._data["version"] != _VERSION:
                raise ArtifactError(
                    f"'{where}/{SPLIT}' has version {self._data['version']}; this version of planish reads {_VERSION}."
                )
            self.split = self._split()
            self.request = Request(**self._data["request"])
            rates = self._data["rates"]
            self.rates = None if rates is None else Rates(**rates)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ArtifactError(f"'{where}/{SPLIT}' is damaged: {type(error).__name__}: {error}.") from error

    def _split(self) -> Split:
        data = self._data
        layers = []
        for item in data["layers"]:
            before, attention, after = (self._piece(item[part]) for part in _PARTS[1:])
            whole, queries = self._needed(item["whole"]), tuple(map(str, item["queries"]))
            names = str(item["name"]), int(item["number"])
            layers.append(LayerUnit(*names, whole, before, attention, after, queries, str(item["mixed"])))
        carried = [tuple(map(str, names)) for names in data["carried"]]
        if not layers or len(carried) != len(layers) + 1:
            raise ValueError(f"{len(layers)} layers with {len(carried)} boundaries")
        head, tail = self._needed(data["head"]), self._needed(data["tail"])
        return Split(head, layers, tail, carried, tuple(map(str, data["sides"])))

    def _needed(self, data: Any) -> Piece:
        piece = self._piece(data)
        if piece is None:
            raise ValueError("a piece is missing")
        return piece

    def _piece(self, data: Any) -> Piece | None:
        if data is None:
            return None
        model = self._model(int(data["model"]))
        inputs, outputs = (tuple(map(str, data[role])) for role in ("inputs", "outputs"))
        weights = [self._weight(name) for name in data["weights"]]
        slots = [value.name or "" for value in list(model.graph.inputs)[len(inputs) :]]
        if len(slots) != len(weights) or len(outputs) != len(model.graph.outputs):
            raise ValueError(f"a piece of model {data['model']} does not have the inputs and outputs of its model")
        for value, tensor in zip(list(model.graph.inputs)[len(inputs) :], weights, strict=True):
            if value.dtype != tensor.dtype or value.shape is None or value.shape.numpy() != tensor.shape.numpy():
                raise ValueError(f"'{tensor.name}' is {tensor.dtype.name}{tensor.shape}, not what '{value.name}' takes")
        return Piece(model, inputs, outputs, weights, slots)

    def _weight(self, name: str) -> ir.TensorProtocol:
        if name in self._tensors:
            return self._tensors[name]
        info = self._data["weights"][name]
        dtype, shape = ir.DataType[info["dtype"]], tuple(int(d) for d in info["shape"])
        raw = self._weights[name].reshape(-1).view(np.uint8)
        if raw.size != tensor_bytes(dtype, shape):
            raise ValueError(
                f"'{name}' has {raw.size} bytes in the weights file, {dtype.name}{list(shape)} takes others"
            )
        self._tensors[name] = tensor_from_buffer(raw, dtype, shape, name)
        return self._tensors[name]

    def _model(self, number: int) -> ir.Model:
        if number not in self._models:
            proto = onnx.ModelProto.FromString(self._contents[f"pieces/{number}.onnx"])
            model = ir.from_proto(proto)
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = self._external(tensor, name)
            self._models[number] = model
        return self._models[number]

    def _external(self, tensor: ir.ExternalTensor, name: str) -> ir.TensorProtocol:
        shape = tuple(int(d) for d in tensor.shape.numpy())
        size = tensor_bytes(tensor.dtype, shape)
        raw = np.frombuffer(self._bytes, np.uint8, size, tensor.offset or 0)
        return tensor_from_buffer(raw, tensor.dtype, shape, name)
