"""PyG modules as relational programs. PyG is not imported: modules are known by the name of their class.

`read_call` reads one call of a layer; `layers` finds the layers of a net that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from planish.frontends.pyg.call import LayerCall
from planish.frontends.pyg.hgt import hgt
from planish.frontends.pyg.rgat import rgat
from planish.frontends.pyg.rgcn import rgcn
from planish.frontends.pyg.simple import gat, gcn, graph_conv, sage
from planish.ir.errors import InputError, UnsupportedError

_PACKAGE = "torch_geometric.nn.conv."
#: What a layer of each class computes. Subclasses are not among them: they may override anything.
READERS: dict[str, Callable[..., LayerCall]] = {
    "rgcn_conv.RGCNConv": rgcn,
    "rgcn_conv.FastRGCNConv": rgcn,
    "rgat_conv.RGATConv": rgat,
    "hgt_conv.HGTConv": hgt,
    "sage_conv.SAGEConv": sage,
    "graph_conv.GraphConv": graph_conv,
    "gcn_conv.GCNConv": gcn,
    "gat_conv.GATConv": gat,
}


def reader(module: torch.nn.Module) -> Callable[..., LayerCall] | None:
    """What reads calls of this layer: a function of the module and forward's arguments; None for other modules."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return READERS.get(name.removeprefix(_PACKAGE)) if name.startswith(_PACKAGE) else None


def layers(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers of a net that can be read, by name."""
    for name, part in module.named_modules():
        if reader(part) is not None:
            yield name, part


def read_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> LayerCall:
    """Reads ``module(*args, **kwargs)``.

    Raises:
        InputError: arguments that do not fit the layer.
        UnsupportedError: a module or an option that has no relational program.
    """
    read = reader(module)
    if read is None:
        known = ", ".join(name.split(".")[1] for name in READERS)
        raise UnsupportedError(f"{type(module).__name__} is no layer that planish reads; it reads PyG's {known}.")
    try:
        return read(module, *args, **kwargs)
    except TypeError as error:
        if "argument" not in str(error) or error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise
        raise InputError(f"{type(module).__name__}: {str(error).replace(read.__name__ + '()', 'forward')}.") from error


__all__ = ["READERS", "LayerCall", "layers", "read_call", "reader"]
