"""How `planish inspect` draws stacks of layers."""

from __future__ import annotations

import io
import json

from rich.console import Console

from planish.cli.layer_tree import layer_tree
from planish.ir.infer import infer_shapes
from planish.ir.inspect import inspect_program
from planish.passes.testing import program_of
from tests.layer_stacks import stack


def drawn(text: str, entry: str = "") -> list[str]:
    program = program_of(text)
    infer_shapes(program.main)
    layers = json.loads(json.dumps(inspect_program(program).to_dict()))["layers"]["main"]
    console = Console(file=io.StringIO(), width=240, highlight=False)
    with console.capture() as captured:
        console.print(layer_tree(layers, entry))
    return captured.get().splitlines()


def test_a_stack_of_like_layers() -> None:
    assert drawn(stack(3, cache=True)) == [
        "Layers",
        "└── stack 1: 3 layers, hidden 4, 204 parameters (by structure)",
        "    └── layer 0 to 2: 15 nodes, 68 parameters",
        "        ├── attention: 9 nodes, 36 parameters",
        "        ├── ffn: 3 nodes, 32 parameters",
        "        ├── reads mask",
        "        └── cache past0 → present0",
    ]


def test_parallel_post_norm_and_tied() -> None:
    lines = drawn(stack(2, "parallel"), "decode")
    assert lines[0] == "Layers of decode"
    assert lines[3].endswith("attention: 8 nodes, 32 parameters, parallel")
    assert lines[4].endswith("ffn: 3 nodes, 32 parameters, parallel")
    lines = drawn(stack(3, "post", tied=True))
    assert (
        ", one set of weights for all (by structure; a norm or an activation stands in the residual stream)" in lines[1]
    )


def test_no_layers_and_why() -> None:
    why = "between 'h' and 'x3' 4 attentions lie in a row, and more than a hidden state goes from one to the next"
    assert drawn(stack(4, shared=True)) == [
        "Layers",
        f"└── no layers: {why} (shared keys and values, norms across layers, or states of others)",
    ]
