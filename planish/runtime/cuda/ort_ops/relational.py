"""Relational layers in float32: kernels that are generated for a program, and what launches them for any graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planish.ir.errors import PlanishError
from planish.ir.ops.relational import PROGRAM, relational_name
from planish.ir.relational.domains import PAIRS
from planish.ir.relational.intra import Kernel, View
from planish.ir.relational.lowering import lower
from planish.ir.relational.text import parse_program
from planish.runtime.cuda.cache import generated_binary
from planish.runtime.cuda.ort_ops.family import FLOAT, INT64, Code, types
from planish.runtime.cuda.relational.engine import CudaEngine
from planish.runtime.cuda.relational.text import LONG, Generated, header
from planish.runtime.cuda.relational.work import LONG_UNIT, MOST_ROWS, cut
from planish.runtime.relational.plan import merged_starts, touched

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAINS = ("none", "node", "edge", "src_pair", "dst_pair", "edge_type", "node_type")
#: As relational_graph.h numbers them.
_TABLES = (
    "order place src dst type edge_ptr "
    "dst_pair_node dst_pair_type dst_pair_ptr dst_pair_type_ptr dst_pair_of "
    "src_pair_node src_pair_type src_pair_ptr src_pair_type_ptr src_pair_of src_pair_edges "
    "in_ptr in_edges out_ptr out_edges dst_node_ptr dst_node_pairs src_node_ptr src_node_pairs "
    "node_ptr node_type edge_ends src_kind dst_kind"
)
TABLES = tuple(_TABLES.split())
_GRIDS = ("groups", "rows", "one", "items", "listed", "parts")
_NO_TABLE, _ALL_ROWS = -1, -2
_CALL, _CLEAR, _COPY = range(3)
#: Arguments of a kernel, at most, as cuda_relational.c has it, five of which are not values or tables.
_MOST_SLOTS = 128


@dataclass(frozen=True)
class GeneratedCode(Code):
    """A fat binary of a text in place of a file."""

    text: str = ""

    def binary(self) -> bytes:
        """Raises UnsupportedError if it has to be compiled and there is no nvcc."""
        return generated_binary(self.label, self.text)


class Relational:
    """``Relational…``, an operator for each program, whose text is the form."""

    native = "cuda_relational"
    operators: frozenset[str] = frozenset()  # their names end in a hash: see `is_relational`

    def form(self, node: ir.Node) -> str | None:
        """The program; None where rows do not fit into shared memory, or a table is not one of `TABLES`."""
        text = node.attributes.get_string(PROGRAM, "")
        wanted = [INT64, INT64, *[FLOAT] * (len(node.inputs) - 2)]
        for value, dtype in zip(node.inputs, wanted, strict=True):
            if value is None or (value.dtype is not None and int(value.dtype) != dtype):
                return None
        try:
            return text if relational_name(text) == node.op_type and _described(text) else None
        except PlanishError:
            return None

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """All kernels of the program, and the one that compares edges."""
        (text,) = forms
        made = {g.symbol: GeneratedCode(g.symbol, "", (), header() + g.text) for g in _engine(text).kernels.values()}
        return [Code("relational_edges", "relational_edges.cu", ()), *made.values()]

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """As launch_relational.h has it."""
        (text,) = forms
        program = _described(text)
        assert program is not None
        table, base = types(op, [INT64] * 2 + [FLOAT] * program.arguments, [FLOAT] * program.outputs)
        return [
            table,
            *program.lines(op),
            f"static cuda_relational_op op_{op} = {{{base}, &program_{op}, codes_{op}, "
            '{"relational_edges", code_relational_edges, 0, 0, 0}, '
            '{"relational_refuse", code_relational_edges, 0, 0, 0}};',
        ]


@functools.lru_cache(maxsize=64)
def _engine(text: str) -> CudaEngine:
    """Raises UnsupportedError for a kernel that does not fit into shared memory, InputError for a text that is none."""
    return CudaEngine(lower(parse_program(text), recompute=True))


@functools.lru_cache(maxsize=64)
def _described(text: str) -> Described | None:
    """What launches the kernels of a program; None if launch_relational.h has no form for it."""
    engine = _engine(text)
    program = parse_program(text)
    arguments = {v.name for v in program.arguments}
    kinds = [v.domain.index for v in program.arguments if v.domain.kind == "node"]
    numbers = sorted({k for k in kinds if k is not None})
    known = numbers == list(range(len(numbers))) if numbers else None in kinds
    if not known or arguments & set(program.outputs):
        return None
    described = Described(engine, len(numbers) or 1, len(program.arguments), len(program.outputs))
    tables = {t for g in engine.kernels.values() for t in (*g.tables, g.segments or "", g.long or "")} - {""}
    fits = all(len(g.values) + len(g.tables) + 5 <= _MOST_SLOTS for g in engine.kernels.values())
    return described if fits and tables <= set(TABLES) and described.owners() is not None else None


class Described:
    """A lowered program as the C structures of launch_relational.h.

    Attributes:
        node_types, arguments, outputs: how many.
    """

    def __init__(self, engine: CudaEngine, node_types: int, arguments: int, outputs: int) -> None:
        self.kernels, self.lowered = engine.kernels, engine.lowered
        self.node_types, self.arguments, self.outputs = node_types, arguments, outputs

    def owners(self) -> dict[str, tuple[str, int]] | None:
        """For each value the one whose memory it is in, and the node type whose rows it is of that, or -1.

        None where a part is taken of a part, or a result is in the memory of another value.
        """
        lowered = self.lowered
        fixed = {v.name for v in lowered.arguments} | set(lowered.outputs)
        owner: dict[str, tuple[str, int]] = {name: (source, -1) for name, source in lowered.aliases.items()}
        for step in lowered.steps:
            if isinstance(step, View) and step.kind == "pick" and step.result.name not in fixed:
                owner[step.result.name] = (step.parts[0], step.result.domain.index or 0)
        for name in merged_starts(lowered):
            owner[lowered.start[name] or ""] = (name, -1)
        found = {}
        for name in lowered.values:
            base, kinds = name, []
            while base in owner:
                base, kind = owner[base]
                kinds += [kind] if kind >= 0 else []
            if len(kinds) > 1 or (name in lowered.outputs and base != name):
                return None
            found[name] = (base, kinds[0] if kinds else -1)
        return found

    def lines(self, op: str) -> list[str]:
        """C that defines ``program_<op>`` and ``codes_<op>``."""
        numbers = {name: i for i, name in enumerate(self.lowered.values)}
        steps, lists, codes = self._steps(op, numbers)
        values = self._values(op, numbers)
        arguments = [numbers[v.name] for v in self.lowered.arguments]
        outputs = [numbers[name] for name in self.lowered.outputs]
        return [
            *values,
            *lists,
            f"static const cuda_code codes_{op}[] = {{", *codes, "};",
            f"static const relational_step steps_{op}[] = {{", *steps, "};",
            _array("int", f"arguments_{op}", arguments), _array("int", f"outputs_{op}", outputs),
            f'static const relational_program program_{op} = {{"{op}", values_{op}, {len(numbers)}, {self.arguments}, '
            f"{self.outputs}, {self.node_types}, arguments_{op}, outputs_{op}, steps_{op}, {len(steps)}}};",
        ]  # fmt: skip

    def _values(self, op: str, numbers: Mapping[str, int]) -> list[str]:
        lowered, owners = self.lowered, self.owners()
        assert owners is not None
        ends: dict[str, list[int]] = {}
        for at, step in enumerate(lowered.steps):
            for name in touched(lowered, step):
                ends.setdefault(owners[name][0], []).append(at)
        arguments = {v.name: i for i, v in enumerate(lowered.arguments)}
        outputs = {name: i for i, name in enumerate(lowered.outputs)}
        shapes, rows = [], []
        for name, v in lowered.values.items():
            shapes.append(_array("int64_t", f"shape_{op}_{numbers[name]}", v.shape))
            base, kind = owners[name]
            index = -1 if v.domain.index is None else v.domain.index
            life = ends.get(base, [-1])
            rows.append(
                f"  {{{_DOMAINS.index(v.domain.kind)}, {index}, {len(v.shape)}, {math.prod(v.shape)}, "
                f"shape_{op}_{numbers[name]}, {numbers[base]}, {kind}, {arguments.get(name, -1)}, "
                f"{outputs.get(name, -1)}, {life[0]}, {life[-1]}}},  /* {name} */"
            )
        return [*shapes, f"static const relational_value values_{op}[] = {{", *rows, "};"]

    def _steps(self, op: str, numbers: Mapping[str, int]) -> tuple[list[str], list[str], list[str]]:
        """Steps, the lists that they point to, and the code that their launches name by number."""
        steps: list[str] = []
        lists: list[str] = []
        codes: list[str] = []
        begun: set[str] = set()
        for step in self.lowered.steps:
            if isinstance(step, View):
                steps += self._view(step, numbers)
                continue
            g = self.kernels[step.name]
            steps += self._starts(step, begun, numbers)
            at = f"{op}_{len(steps)}"
            launches = []
            for launch in g.launches:
                launches.append(f"{{{len(codes)}, {_GRIDS.index(launch.grid)}, {launch.per}, {launch.columns}}}")
                shared = ", ".join([str(launch.shared)] * 3)
                codes.append(f'  {{"{g.symbol}{launch.function}", code_{g.symbol}, {shared}}},')
            lists += [
                _array("int", f"values_{at}", [numbers[name] for name in g.values]),
                _array("int", f"tables_{at}", [TABLES.index(name) for name in g.tables]),
                f"static const relational_launch launches_{at}[] = {{{', '.join(launches)}}};",
            ]
            steps.append(_call(g, at))
        return steps, lists, codes

    def _view(self, step: View, numbers: Mapping[str, int]) -> list[str]:
        result = numbers[step.result.name]
        if step.kind == "join":
            return [_move(_COPY, result, numbers[part], to_type=kind) for kind, part in enumerate(step.parts)]
        if step.result.name not in self.lowered.outputs:
            return []
        return [_move(_COPY, result, numbers[step.parts[0]], from_type=step.result.domain.index or 0)]

    def _starts(self, kernel: Kernel, begun: set[str], numbers: Mapping[str, int]) -> list[str]:
        """Clears or copies what this kernel is the first to add to."""
        made, merged = [], merged_starts(self.lowered)
        for name, adds in kernel.writes().items():
            outer = kernel.gemm is not None and kernel.gemm.kind == "outer" and kernel.gemm.result.name == name
            if not adds or outer or name in begun:
                continue
            begun.add(name)
            origin = self.lowered.start.get(name)
            if origin is None:
                made.append(_move(_CLEAR, numbers[name], 0))
            elif name not in merged:
                made.append(_move(_COPY, numbers[name], numbers[origin]))
        return made


def _move(kind: int, to: int, origin: int, to_type: int = -1, from_type: int = -1) -> str:
    return f"  {{.kind = {kind}, .to = {to}, .from = {origin}, .to_type = {to_type}, .from_type = {from_type}}},"


def _call(g: Generated, at: str) -> str:
    rows = g.kernel.rows
    segments = _NO_TABLE if g.segments is None else TABLES.index(g.segments) if g.segments else _ALL_ROWS
    by_node = TABLES.index(f"{rows.kind}_node") if g.segments is not None and rows in PAIRS else _NO_TABLE
    unit, most = cut(g)
    long = TABLES.index(g.long) if g.long else _NO_TABLE
    return (
        f"  {{.kind = {_CALL}, .domain = {_DOMAINS.index(rows.kind)}, .index = "
        f"{-1 if rows.index is None else rows.index}, .values = values_{at}, .tables = tables_{at}, "
        f".value_count = {len(g.values)}, .table_count = {len(g.tables)}, .launches = launches_{at}, "
        f".launch_count = {len(g.launches)}, .segments = {segments}, .unit = {unit}, .most = {most}, "
        f".by_node = {by_node}, .long_table = {long}, .long_from = {LONG}, .long_most = {MOST_ROWS // LONG_UNIT}, "
        f".room = {g.room}, .long_room = {g.long_room}, .long_rows = {g.long_rows}}},"
    )


def _array(kind: str, name: str, numbers: Iterable[int]) -> str:
    return f"static const {kind} {name}[] = {{{', '.join([*map(str, numbers), '0'])}}};"
