"""Program: what passes see. One or more ONNX graphs over one weight store, a target, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.ir.errors import InputError, VerifyError, unknown
from planish.ir.spec import TensorSpec
from planish.ir.target import Target

__all__ = ["Calibration", "Program", "TensorSpec"]


@dataclass
class Calibration:
    """Inputs to measure with: a list of dicts by input name. `synthetic` when planish made them up.

    `others` are inputs of further entries of the same program; :attr:`parts` are all of them, the first one first.
    """

    batches: list[dict[str, np.ndarray]]
    synthetic: bool = False
    entry: str = "main"
    others: list[Calibration] = field(default_factory=list)

    @property
    def parts(self) -> list[Calibration]:
        """This one and the calibrations of further entries."""
        return [self, *self.others]


@dataclass
class Program:
    """Entries (name → ONNX model) over one weight store.

    A plain model has the entry ``"main"``. Entries that use the same weight hold the same tensor object under
    the same initializer name, so a weight is stored once in memory and on disk.
    """

    entries: dict[str, ir.Model]
    target: Target = field(default_factory=Target)
    provenance: dict[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None

    @classmethod
    def single(cls, model: ir.Model, target: Target | str = "ort-cpu", **provenance: str) -> Program:
        """A program with the one entry ``"main"``."""
        return cls({"main": model}, Target.parse(target), dict(provenance))

    @property
    def main(self) -> ir.Model:
        """The only entry, or the one named ``"main"``."""
        if len(self.entries) == 1:
            return next(iter(self.entries.values()))
        if "main" in self.entries:
            return self.entries["main"]
        raise InputError(f"the program has the entries {', '.join(self.entries)}; name one of them.")

    @property
    def default_entry(self) -> str:
        """The name of the entry that is looked at when none is named: ``"main"``, else the first."""
        return "main" if "main" in self.entries else next(iter(self.entries))

    def entry(self, name: str) -> ir.Model:
        if name not in self.entries:
            raise unknown("entry", name, self.entries)
        return self.entries[name]

    def inputs(self, entry: str = "main") -> list[TensorSpec]:
        """What a caller must give: graph inputs that are not initializers with a default."""
        graph = self.entry(entry).graph
        return [TensorSpec.of(v) for v in graph.inputs if v.name not in graph.initializers]

    def outputs(self, entry: str = "main") -> list[TensorSpec]:
        return [TensorSpec.of(v) for v in self.entry(entry).graph.outputs]

    @property
    def weights(self) -> dict[str, ir.TensorProtocol]:
        """The weight store: initializer name → tensor, over all entries.

        Raises:
            VerifyError: two entries hold different tensors under one name.
        """
        store: dict[str, ir.TensorProtocol] = {}
        for entry, model in self.entries.items():
            for name, value in model.graph.initializers.items():
                if value.const_value is None:
                    continue
                if store.setdefault(name, value.const_value) is not value.const_value:
                    raise VerifyError(
                        f"entry '{entry}': initializer '{name}' is not the tensor that another entry stores."
                    )
        return store

    def weight_bytes(self) -> int:
        """Size of the distinct weight tensors, in bytes."""
        distinct = {
            id(v.const_value): v.const_value.nbytes
            for graph in self.graphs()
            for v in graph.initializers.values()
            if v.const_value is not None
        }
        return sum(distinct.values())

    def sizes(self) -> dict[str, int]:
        """Sizes of the symbols of the calibrated entries, read off their first batches; empty without any."""
        sizes: dict[str, int] = {}
        for part in reversed(self.calibration.parts if self.calibration is not None else []):
            for spec in self.inputs(part.entry) if part.batches else ():
                value = part.batches[0].get(spec.name)
                if spec.shape is not None and isinstance(value, np.ndarray):
                    sizes |= {d: n for d, n in zip(spec.shape, value.shape, strict=False) if isinstance(d, str)}
        return sizes

    def graphs(self) -> Iterator[ir.Graph]:
        """Every graph of every entry, subgraphs of control flow included, bodies of functions not."""
        for model in self.entries.values():
            yield from model.graphs()

    def nodes(self) -> Iterator[ir.Node]:
        """Every node of every entry, nodes in subgraphs included, bodies of functions not."""
        for model in self.entries.values():
            yield from model.graph.all_nodes()

    def node_count(self) -> int:
        return sum(1 for _ in self.nodes())

    def clone(self) -> Program:
        """A copy whose graphs are its own; weight tensors and calibration data are shared, not copied."""
        entries = {name: model.clone() for name, model in self.entries.items()}
        return Program(entries, self.target, dict(self.provenance), self.calibration)
