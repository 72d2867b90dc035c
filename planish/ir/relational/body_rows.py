"""Rows of relational programs in ONNX: how many each domain has, and which rows of one are which of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from planish.ir.errors import UnsupportedError
from planish.ir.relational.domains import EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, PAIRS, SRC_PAIR, Domain
from planish.ir.relational.inter import Program
from planish.ir.relational.ops import full_end

#: Inputs of the function before those of the program.
EDGE_INPUTS = ("edge_index", "edge_type")
ONLY = "it can run only compiled (planish.relational.compile)"
JOIN = "give the nodes of each type as an input over node[k], and join them"


class Level:
    """A graph under construction: the nodes of one level."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix

    def add(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node; its output. A list is an attribute of ints."""
        return self.several(op, 1, *inputs, **attributes)[0]

    def several(self, op: str, outputs: int, *inputs: ir.Value | None, **attributes: Any) -> list[ir.Value]:
        """A node with several outputs."""
        label = f"{self._prefix}{op.lower()}_{len(self.nodes)}"
        results = [ir.Value(name=f"{label}_{i}") for i in range(outputs)]
        self.nodes.append(ir.node(op, list(inputs), attributes=attributes, name=label, outputs=results))
        return results

    def ints(self, *numbers: int) -> ir.Value:
        return self.add("Constant", value_ints=list(numbers))

    def number(self, value: float) -> ir.Value:
        return self.add("Constant", value_float=float(value))

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        return self.add("Unsqueeze", x, self.ints(*axes)) if axes else x


class Rows(Level):
    """The inputs of a program, and as they are asked for: rows of domains, and the maps between them."""

    def __init__(self, program: Program, opset: int) -> None:
        super().__init__()
        self.program, self.opset = program, opset
        self.variables = program.variables()
        self.edge_index, self.edge_type = (ir.Value(name=name) for name in EDGE_INPUTS)
        self.arguments = {v.name: ir.Value(name=f"arg_{v.name}") for v in program.arguments}
        #: By name, with a row axis in front: of size 1 for the domain none.
        self.known: dict[str, ir.Value] = {}
        self._memo: dict[Any, ir.Value] = {}
        for variable in program.arguments:
            value = self.arguments[variable.name]
            self.known[variable.name] = self.unsqueeze(value, 0) if variable.domain == NONE else value
            if variable.domain in PAIRS:
                raise UnsupportedError(f"'{variable}': values over pairs have no ONNX form; {ONLY}.")

    # ---- rows of domains, and the maps between them

    def once(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def rows(self, domain: Domain) -> ir.Value:
        """(1,) int64: rows of values over `domain`."""
        return self.once(("rows", domain), lambda: self._rows(domain))

    def _rows(self, domain: Domain) -> ir.Value:
        for variable in self.program.arguments:
            if variable.domain == domain:
                return self._first_size(self.arguments[variable.name])
        if domain == NONE:
            return self.ints(1)
        if domain == EDGE:
            return self._first_size(self.edge_type)
        if domain in PAIRS:
            return self._first_size(self._pairs(domain)[0])
        if domain == NODE and self._parts():
            total = self.rows(self._parts()[0])
            for part in self._parts()[1:]:
                total = self.add("Add", total, self.rows(part))
            return total
        raise UnsupportedError(f"'{self.program.name}': no input says how many rows there are over {domain}; {ONLY}.")

    def _first_size(self, value: ir.Value) -> ir.Value:
        return self.add("Shape", value, start=0, end=1)

    def _parts(self) -> list[Domain]:
        """The domains of the node types whose nodes come as inputs of their own."""
        found = {v.domain for v in self.program.arguments if v.domain.index is not None}
        return sorted(found, key=lambda d: d.index or 0)

    def map(self, fine: Domain, coarse: Domain, end: str) -> ir.Value | None:
        """The row of `coarse` for each row of `fine`; None where rows are the same, or where there is one for all."""
        if fine == coarse or coarse == NONE:
            return None
        end = full_end(fine, coarse, end)
        return self.once(("map", fine, coarse, end), lambda: self._map(fine, coarse, end))

    def _map(self, fine: Domain, coarse: Domain, end: str) -> ir.Value:
        if fine == EDGE and coarse == EDGE_TYPE:
            return self._types()
        if fine == EDGE and coarse == NODE:
            return self._end(end)
        if fine == EDGE and coarse in PAIRS:
            return self._pairs(coarse)[1]
        if fine == EDGE and coarse == NODE_TYPE:
            return self.add("Gather", self._need(self.map(NODE, NODE_TYPE, "")), self._end(end))
        if fine in PAIRS and coarse in (NODE, EDGE_TYPE):
            keys, nodes = self._pairs(fine)[0], self._node_scalar()
            return self.add("Mod" if coarse == NODE else "Div", keys, nodes)
        if fine == NODE and coarse == NODE_TYPE:
            return self._node_types()
        if fine.index is not None and coarse == NODE_TYPE:
            return self.add("Expand", self.ints(fine.index), self.rows(fine))
        raise UnsupportedError(f"'{self.program.name}': rows of {coarse} by rows of {fine} have no ONNX form; {ONLY}.")

    def _end(self, end: str) -> ir.Value:
        which = 0 if end == "src" else 1

        def make() -> ir.Value:
            return self._checked(self.add("Gather", self.edge_index, self._scalar(which), axis=0), self.rows(NODE))

        return self.once(("end", which), make)

    def _types(self) -> ir.Value:
        if all(variable.domain != EDGE_TYPE for variable in self.program.arguments):
            return self.edge_type  # how many there are is not known
        return self.once("types", lambda: self._checked(self.edge_type, self.rows(EDGE_TYPE)))

    def _checked(self, index: ir.Value, count: ir.Value) -> ir.Value:
        """`index`, for which a runtime fails where it is not in 0 … count - 1; by itself, -1 would be the last row."""
        wrong = self.add("Less", index, self._scalar(0))
        rows = self.add("Range", self._scalar(0), self.add("Squeeze", count), self._scalar(1))
        return self.add("Gather", rows, self.add("Where", wrong, count, index))

    def _scalar(self, value: int) -> ir.Value:
        return self.add("Constant", value_int=value)

    def _node_scalar(self) -> ir.Value:
        """The number of nodes, at least 1: what edge types are multiplied by in the keys of pairs."""
        return self.once("nodes", lambda: self.add("Max", self.add("Squeeze", self.rows(NODE)), self._scalar(1)))

    def _pairs(self, domain: Domain) -> tuple[ir.Value, ir.Value]:
        """The keys of the distinct pairs, type · nodes + node, in ascending order; and the pair of each edge."""
        if ("pairs", domain) not in self._memo:
            node = self._end("src" if domain == SRC_PAIR else "dst")
            key = self.add("Add", self.add("Mul", self._types(), self._node_scalar()), node)
            keys, _, inverse, _ = self.several("Unique", 4, key, sorted=1)
            self._memo[("pairs", domain)], self._memo[("of", domain)] = keys, inverse
        return self._memo[("pairs", domain)], self._memo[("of", domain)]

    def _node_types(self) -> ir.Value:
        parts = self._parts()
        if not parts:
            raise UnsupportedError(f"'{self.program.name}' reads node types of nodes that come as one input; {JOIN}.")
        each = [self.add("Expand", self.ints(part.index or 0), self.rows(part)) for part in parts]
        return self.add("Concat", *each, axis=0)

    def _need(self, value: ir.Value | None) -> ir.Value:
        assert value is not None
        return value
