"""Fresh names for what passes add to a program."""

from __future__ import annotations

from planish.ir.program import Program


class Names:
    """Names that are taken in a program, over all its entries; filled at the first question, then kept up."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._taken: set[str] | None = None
        self._next: dict[str, int] = {}

    def _all(self) -> set[str]:
        if self._taken is None:
            taken: set[str] = set()
            for graph in self._program.graphs():
                taken.update(v.name for v in graph.inputs if v.name)
                taken.update(graph.initializers)
                for node in graph:
                    taken.update(v.name for v in node.outputs if v.name)
                    if node.name:
                        taken.add(node.name)
            self._taken = taken
        return self._taken

    def fresh(self, wish: str) -> str:
        """`wish`, or `wish` with the first free number behind it; taken from now on."""
        taken = self._all()
        name, number = wish, self._next.get(wish, 1)
        while name in taken:
            name, number = f"{wish}_{number}", number + 1
        self._next[wish] = number  # so that the thousandth node of one rule does not count up from one
        taken.add(name)
        return name
