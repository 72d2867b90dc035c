"""What a family of operators for ONNX Runtime's CUDA provider is: which nodes it takes, its code, and its C tables."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from planish.runtime.cuda.cache import binary

if TYPE_CHECKING:
    import onnx_ir as ir

#: Element types as ONNX numbers them, for tables.
FLOAT, INT32, INT64, FLOAT16 = 1, 6, 7, 10


@dataclass(frozen=True)
class Code:
    """A fat binary in a library.

    Attributes:
        label: its symbol in C is ``code_<label>``.
        source: a file of ``cuda/source``.
        macros: what it is compiled with, sorted by name.
    """

    label: str
    source: str
    macros: tuple[tuple[str, int], ...]

    def binary(self) -> bytes:
        """Raises UnsupportedError if it has to be compiled and there is no nvcc."""
        return binary(self.source, self.macros)


class Family(Protocol):
    """Operators that share C glue.

    Attributes:
        native: of ``<native>.c`` and ``<native>.h`` in ``cuda/native``; ``planish_<native>(&op)`` completes an operator
        operators: names in planish's domain.
        one_form: present and true if an operator can have one form in a library, such as a type of its elements.
    """

    native: str
    operators: frozenset[str]

    def form(self, node: ir.Node) -> Hashable | None:
        """What distinguishes the code that a node needs; None if its types, sizes or attributes have no kernel."""

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """All code for an operator; what several operators ask for under the same label is in a library once."""

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """C that defines ``op_<op>``, a structure whose first member is ``planish_op base``."""


def types(op: str, inputs: Iterable[int], outputs: Iterable[int]) -> tuple[str, str]:
    """C of an operator's element types, and of the ``planish_op`` that starts its structure."""
    first, last = list(inputs), list(outputs)
    table = f"static const int types_{op}[] = {{{', '.join(map(str, first + last))}}};"
    return table, f'{{{{0}}, "{op}", {len(first)}, {len(last)}, types_{op}}}'
