"""Where a node came from, as metadata on it: the pass that made it, and the nodes it was made from.

Imports no onnx_ir: a report is read where nothing else of the IR is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

PASS_KEY = "planish.pass"
FROM_KEY = "planish.from"
#: What torch's exporter leaves: the chain of module scopes of a node.
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
#: Nodes that one node names as its sources at most.
MAX_SOURCES = 8


def provenance(pass_name: str, sources: Iterable[ir.Node]) -> dict[str, str]:
    """Metadata of a node that a pass made from `sources`.

    A source that a pass made itself stands for the nodes it was made from, so the names are those of the user's model.
    """
    names: dict[str, None] = {}
    for node in sources:
        origin = node.metadata_props.get(FROM_KEY)
        names.update(dict.fromkeys(origin.split(",") if origin else [node.name or node.op_type]))
    return {PASS_KEY: pass_name, FROM_KEY: ",".join(list(names)[:MAX_SOURCES])}
