"""What all generated kernels have: parameters, the lanes of a group, and how the engine launches them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from planish.ir.relational.inter import Variable
from planish.ir.relational.intra import Access, Kernel, Loop, Lowered, Statement, View
from planish.runtime.cuda.relational.group import Group
from planish.runtime.cuda.relational.rows import Rows, apart
from planish.runtime.cuda.relational.values import SMALL, Code

THREADS = 256
#: Shared memory of a block that every GPU since Turing has.
MOST_SHARED = 64 << 10
#: Inner rows of a row from which on blocks work on it rather than a group of lanes.
LONG = 512
_HEADER = Path(__file__).parent.parent / "source" / "relational.cuh"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        function: the end of its name.
        grid: ``"groups"``: `per` rows in a block; ``"rows"``: a block for each row; ``"one"``: one block;
            ``"items"``: a block for each item of work; ``"listed"``: a block for each long row; ``"parts"``: one for
            each part of these.
        per: rows of a block.
        columns: blocks along y.
        shared: bytes of dynamic shared memory.
    """

    function: str
    grid: Literal["groups", "rows", "one", "items", "listed", "parts"]
    per: int = 1
    columns: int = 1
    shared: int = 0


@dataclass(frozen=True)
class Generated:
    """A kernel of the intra-operator IR as CUDA C++.

    Attributes:
        kernel: what it does.
        symbol: the start of the names of its functions.
        text: of the file, without the header `header()`.
        values, tables: what it takes, in order; then come ``work``: items, or for ``"parts"`` those of long rows;
            ``items``: where the items of each segment begin, or if there are long rows, the parts of each; ``listed``:
            the long rows; ``workspace``; and the number of rows, or where a kernel has items, of long ones.
        launches: in order.
        segments: the table whose segments are cut into items of work; ``""``: all rows are one; None: there are none.
        item_rows: rows of an item are a multiple of this.
        long: the table by which rows are listed, and cut into parts, that have many inner rows.
        room: numbers of the workspace for each item.
        long_room: numbers of the workspace for each part; `long_rows`: behind all of these, for each long row.
    """

    kernel: Kernel
    symbol: str
    text: str
    values: tuple[str, ...]
    tables: tuple[str, ...]
    launches: tuple[Launch, ...]
    segments: str | None = None
    long: str | None = None
    item_rows: int = 1
    room: int = 0
    long_room: int = 0
    long_rows: int = 0


@cache
def header() -> str:
    return _HEADER.read_text()


@dataclass
class Context:
    """A kernel that is being generated.

    Attributes:
        shapes: values in memory by name.
        written: names of values in memory that it writes, or that share memory with such.
        deterministic: nothing is added atomically.
        cached: chains of tables that are looked up for all rows of a tile at once.
    """

    kernel: Kernel
    shapes: Mapping[str, Variable]
    written: set[str]
    deterministic: bool
    cached: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def items(self) -> tuple[Statement | Loop, ...]:
        return (*self.kernel.before, *self.kernel.after)

    @property
    def adds(self) -> bool:
        return any(s.add for s in self.kernel.statements())

    def rows(self, group: Group, *, storing: bool = True, tile: bool = False, add: str = "add") -> Rows:
        cached = self.cached if tile else None
        return Rows(group, self.shapes, self.written, add=add, cached=cached, storing=storing)

    def shape(self, access: Access) -> tuple[int, ...]:
        """The trailing shape of a value that is in memory or of the row."""
        for statement in self.kernel.statements() if access.local else ():
            if statement.result.name == access.value:
                return statement.result.shape
        return self.shapes[access.value].shape


def context(kernel: Kernel, lowered: Lowered, deterministic: bool) -> Context:
    root = dict(lowered.aliases)
    root |= {
        step.result.name: step.parts[0] for step in lowered.steps if isinstance(step, View) and step.kind == "pick"
    }

    def memory_of(name: str) -> str:
        while name in root:
            name = root[name]
        return name

    targets = {memory_of(name) for name in kernel.writes()}
    written = {name for name in lowered.values if memory_of(name) in targets}
    return Context(kernel, lowered.values, written, deterministic)


def lanes_for(c: Context) -> int:
    """Lanes of a group: eight numbers for each; a loop whose lanes are at rows of their own has some."""
    gemm = c.kernel.gemm
    matrices = {gemm.weight, gemm.result.name if gemm.kind == "outer" else None} if gemm is not None else set()
    names = [name for name in (*c.kernel.reads(), *c.kernel.writes()) if name not in matrices]
    sizes = [math.prod(c.shapes[name].shape) for name in names]
    sizes += [math.prod(s.result.shape) for s in c.kernel.statements()]
    widest = max(sizes, default=1)
    if widest <= SMALL:
        return 8 if any(isinstance(item, Loop) and apart(item, c.shapes) for item in c.items) else 1
    return min(32, max(4, 1 << (-(-widest // 8) - 1).bit_length()))


def parameters(c: Context, values: Sequence[str], tables: Sequence[str]) -> str:
    given = [f"float* m_{name}" if name in c.written else f"const float* __restrict__ m_{name}" for name in values]
    given += [f"const int* __restrict__ t_{name}" for name in tables]
    given += [f"const int* __restrict__ {name}" for name in ("work", "items", "listed")]
    given += ["float* workspace", "int count"]
    return ", ".join(given)


def function(name: str, given: str, body: Code) -> str:
    head = f'extern "C" __global__ void __launch_bounds__({THREADS}) KERNEL{name}({given}) {{'
    return "\n".join([head, str(body), "}", ""])


def prologue(lanes: int, group: Group, scratch: str) -> list[str]:
    """The start of a kernel whose body `group` has emitted; `scratch` is where the shared memory of groups begins."""
    lines = [f"constexpr int G = {lanes};", *group.declarations()]
    lines += ["const int lane = threadIdx.x % G;", "const unsigned mask = group_mask<G>();"]
    if group.spilled:
        lines.append(f"float* scratch = {scratch} + threadIdx.x / G * {group.spilled};")
    lines.append("(void)lane, (void)mask;")
    return lines


def finish(
    c: Context, text: str, values: Sequence[str], tables: Sequence[str], launches: Sequence[Launch], **more: object
) -> Generated:
    digest = hashlib.sha256(f"{header()}\n{text}".encode()).hexdigest()[:16]
    symbol = f"relational_{digest}"
    return Generated(
        c.kernel,
        symbol,
        text.replace("KERNEL", symbol),
        tuple(values),
        tuple(tables),
        tuple(launches),
        **more,  # type: ignore[arg-type]
    )
