"""The nodes of a program grouped by block: by module scope where the model has scopes, else in runs of 64.

A block is what a person calls a layer: ``encoder.layer.3``, ``embeddings``, ``lm_head``. It is what the report
and ``planish inspect`` show instead of a list of ten thousand nodes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planish.ir.provenance import FROM_KEY, MAX_SOURCES, PASS_KEY, SCOPES_KEY

if TYPE_CHECKING:  # a report is read where nothing else of the IR is needed
    import onnx_ir as ir

    from planish.ir.program import Program

#: The scope that torch writes for nodes which belong to no module.
_NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"
#: Nodes that one listing holds at most, and letters of a name: a report must open whatever the model is.
LISTED_NODES = 20_000
NAME_LENGTH = 160
RUN_LENGTH = 64
_SCOPES_LENGTH = 20_000


@dataclass(frozen=True)
class BlockNode:
    """A node as listings show it. `origin` is the pass that made it, `sources` the nodes it was made from."""

    name: str
    op: str
    origin: str | None = None
    sources: tuple[str, ...] = ()


@dataclass
class Block:
    """A named group of nodes, in graph order. `hidden` counts the nodes beyond the limit of the listing."""

    name: str
    nodes: list[BlockNode] = field(default_factory=list)
    hidden: int = 0

    @property
    def count(self) -> int:
        return len(self.nodes) + self.hidden

    def to_dict(self) -> dict[str, Any]:
        """Nodes as lists ``[name, op, origin, sources]``: a large graph stays a small file."""
        nodes = [[n.name, n.op, n.origin, list(n.sources)] for n in self.nodes]
        return {"name": self.name, "nodes": nodes, "hidden": self.hidden}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Block:
        nodes = [BlockNode(name, op, origin, tuple(sources)) for name, op, origin, sources in data["nodes"]]
        return cls(data["name"], nodes, data.get("hidden", 0))


def op_name(node: ir.Node) -> str:
    """``Gelu`` for the standard domain, ``planish::SwiGLU`` for any other."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def module_path(node: ir.Node) -> tuple[str, ...] | None:
    """The module that a node came from, as path components; None when nothing in the model says.

    The torch exporter leaves the chain of scopes as metadata, the last of which is the operation itself; its
    older form left the path in the node's name: ``/encoder/layer.0/attention/MatMul``.
    """
    text = node.metadata_props.get(SCOPES_KEY)
    if text and len(text) <= _SCOPES_LENGTH:
        try:
            scopes = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            scopes = None
        if isinstance(scopes, list) and all(isinstance(s, str) for s in scopes):
            named = len(scopes) > 1 and scopes[-2] and scopes[-2] != _NO_SCOPE
            return tuple(scopes[-2].split(".")) if named else ()
    path = _path_in_name(node.name or "")
    if path is not None:
        return path
    # A node that a pass made from others belongs where they all did.
    sources = node.metadata_props.get(FROM_KEY, "")
    paths = [found for name in sources.split(",")[:MAX_SOURCES] if (found := _path_in_name(name)) is not None]
    if not paths:
        return None
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return paths[0][:shared]


def _path_in_name(name: str) -> tuple[str, ...] | None:
    if not name.startswith("/") or "/" not in name[1:]:
        return None
    return tuple(part for piece in name[1:].split("/")[:-1] for part in piece.split("."))


def graph_blocks(program: Program, *, limit: int = LISTED_NODES) -> list[Block]:
    """Groups the nodes of all entries by block, in the order in which blocks first occur.

    Args:
        program: what to group; a program of several entries has the entry's name before the block's.
        limit: nodes listed at most over all blocks; further ones are only counted.
    """
    blocks: dict[str, Block] = {}
    left = limit
    for entry, model in program.entries.items():
        prefix = f"{entry}: " if len(program.entries) > 1 else ""
        nodes = list(model.graph.all_nodes())
        for node, name in zip(nodes, _block_names(nodes), strict=True):
            block = blocks.setdefault(prefix + name, Block(prefix + name))
            if left > 0:
                block.nodes.append(_listed(node))
                left -= 1
            else:
                block.hidden += 1
    return list(blocks.values())


def _listed(node: ir.Node) -> BlockNode:
    sources = node.metadata_props.get(FROM_KEY, "")
    return BlockNode(
        (node.name or "")[:NAME_LENGTH],
        op_name(node)[:NAME_LENGTH],
        (node.metadata_props.get(PASS_KEY) or "")[:NAME_LENGTH] or None,
        tuple(s[:NAME_LENGTH] for s in sources.split(",")[:MAX_SOURCES] if s),
    )


def _block_names(nodes: Sequence[ir.Node]) -> Iterator[str]:
    paths = [module_path(node) for node in nodes]
    if sum(path is not None for path in paths) * 2 < len(paths):
        for index in range(len(nodes)):
            start = index // RUN_LENGTH * RUN_LENGTH
            yield f"nodes {start + 1} to {min(start + RUN_LENGTH, len(nodes))}"
        return
    cut = _Cut({path for path in paths if path})
    names = {path: cut.block(path) for path in set(paths) if path is not None}
    for path in paths:
        yield "(no module)" if path is None else names[path] or "(top level)"


class _Cut:
    """Where to cut module paths so that a repeated layer is one block and what stands beside it is another.

    A path with a number in it (``vit.encoder.layer.3.attention``) is cut after its first number. Another one
    (``vit.embeddings.patches``) is cut one component after it leaves the numbered paths: ``vit.embeddings``.
    Without numbers anywhere, the path is cut one component after what all paths share.
    """

    def __init__(self, paths: set[tuple[str, ...]]) -> None:
        self.numbered: set[tuple[str, ...]] = set()
        for path in paths:
            end = _first_number(path)
            if end is not None:
                self.numbered.update(path[:k] for k in range(end + 1))
        self.shared = 0
        if paths and not self.numbered:
            ordered = sorted(paths)
            for a, b in zip(ordered[0], ordered[-1], strict=False):
                if a != b:
                    break
                self.shared += 1

    def block(self, path: tuple[str, ...]) -> str:
        end = _first_number(path)
        if end is None:
            end = self.shared
            while self.numbered and path[: end + 1] in self.numbered and end < len(path):
                end += 1
        return ".".join(path[: end + 1])


def _first_number(path: tuple[str, ...]) -> int | None:
    return next((k for k, part in enumerate(path) if part.isdigit()), None)
