"""Capture of nets with PyG layers: each layer becomes one operator of the dialect while torch.export traces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from planish.frontends.pyg import LayerCall, layers, read_call
from planish.ir.errors import UnsupportedError
from planish.ir.ops import DIALECT_DOMAIN, DIALECT_VERSION
from planish.ir.ops.relational import PROGRAM, relational_name
from planish.ir.relational.domains import EDGE, NODE, NONE
from planish.ir.relational.inter import Variable


@contextlib.contextmanager
def opaque_layers(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile each layer of `module` that planish reads is one opaque operator to torch.export.

    The module is not changed but for the attribute ``forward`` of these layers, which is as it was afterwards. A layer
    with an option that has no relational program is left alone: it is traced as torch traces it.
    """
    found = [part for _, part in layers(module)]
    own = [part.__dict__.get("forward") for part in found]
    try:
        for part in found:
            part.__dict__["forward"] = _forward(part, part.forward)
        yield
    finally:
        for part, forward in zip(found, own, strict=True):
            if forward is None:
                part.__dict__.pop("forward", None)
            else:
                part.__dict__["forward"] = forward


def _forward(part: torch.nn.Module, original: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            call = read_call(part, *args, **kwargs)
        except UnsupportedError:
            return original(*args, **kwargs)
        return call.result(symbolic(call))

    return forward


def symbolic(call: LayerCall) -> list[Tensor]:
    """The outputs of the operator of a call, as torch's tracing sees them: shapes and dtypes, and one node."""
    text = str(call.program)
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{DIALECT_DOMAIN}::{relational_name(text)}",
        [call.edge_index, call.edge_type, *call.operands],
        {PROGRAM: text},
        dtypes=[torch.float32] * len(call.program.outputs),
        shapes=[_shape(call, call.program.variable(name)) for name in call.program.outputs],
        version=DIALECT_VERSION,
    )
    return list(outputs)


def _shape(call: LayerCall, variable: Variable) -> list[Any]:
    if variable.domain == NONE:
        return list(variable.shape)
    if variable.domain == NODE:
        rows = call.node_counts[0]
        for count in call.node_counts[1:]:
            rows = rows + count
    elif variable.domain == EDGE:
        rows = call.edge_type.shape[0]
    else:
        raise UnsupportedError(f"output '{variable}': only values over nodes and edges leave a layer.")
    return [rows, *variable.shape]
