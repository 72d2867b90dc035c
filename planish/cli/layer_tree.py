"""The stacks of repeated layers as a tree, for `planish inspect`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rich.text import Text
from rich.tree import Tree

from planish.runtime.units import count_text, printable

_FORMS = {
    "residual": "",
    "normed": "a norm or an activation stands in the residual stream",
    "plain": "no residual stream",
}


def layer_tree(found: Mapping[str, Any], entry: str = "") -> Tree:
    """A branch for each stack: how many layers, how wide, of how many parameters, and what a layer is made of.

    Args:
        found: one entry of ``Inspection.layers``.
        entry: its name, if it is not the only one.
    """
    tree = Tree(Text(f"Layers of {entry}" if entry else "Layers", style="bold"))
    for stack in found["stacks"]:
        branch = tree.add(_line(_title(stack)))
        # Layers of one make-up are one line.
        for make, group in groupby(stack["layers"], key=_make):
            layers = list(group)
            first, last = layers[0], layers[-1]
            names = first["name"] if first is last else f"{first['name']} to {re.split('[. ]', last['name'])[-1]}"
            node = branch.add(_line(f"{names}: {_words(*make)}"))
            for part in first["parts"]:
                how = ", parallel" if part["parallel"] else ""
                node.add(_line(f"{part['kind']}: {_words(part['nodes'], part['parameters'])}{how}"))
            if first["side_inputs"]:
                node.add(_line("reads " + ", ".join(first["side_inputs"][:6])))
            if first["cache_outputs"] or first["cache_inputs"]:
                kept = [*first["cache_inputs"][:2], "→", *first["cache_outputs"][:2]]
                node.add(_line("cache " + " ".join(kept)))
    for reason in found["declined"]:
        tree.add(Text("no layers: " + printable(reason, 300), style="dim"))
    return tree


def _line(text: str) -> Text:
    return Text(printable(text, 200))


def _title(stack: Mapping[str, Any]) -> str:
    width = f", hidden {stack['width']}" if stack["width"] else ""
    tied = ", one set of weights for all" if stack["tied"] else ""
    form = _FORMS.get(stack["layers"][0]["form"], "")
    how = f"by {stack['route']}" + (f"; {form}" if form else "")
    size = f"{len(stack['layers'])} layers{width}, {count_text(stack['parameters'])} parameters{tied}"
    return f"{stack['name']}: {size} ({how})"


def _make(layer: Mapping[str, Any]) -> tuple[int, int]:
    return layer["nodes"], layer["parameters"]


def _words(nodes: int, parameters: int) -> str:
    return f"{nodes} nodes, {count_text(parameters)} parameters" if parameters else f"{nodes} nodes"
