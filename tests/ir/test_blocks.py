"""Blocks: how module scopes, old node names and graphs without either are cut."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.blocks import Block, BlockNode, graph_blocks, module_path
from planish.ir.program import Program
from planish.ir.provenance import SCOPES_KEY


def program(paths: list[str | None], old: bool = False) -> Program:
    """A chain of Relu nodes from modules at `paths`; None says nothing. `old` writes paths into names."""
    value = source = ir.val("x", ir.DataType.FLOAT, [2])
    nodes = []
    for index, path in enumerate(paths):
        metadata, name = {}, f"n{index}"
        if path is not None and old:
            name = "/" + "/".join([*filter(None, path.split(".")), f"Relu_{index}"])
        elif path is not None:
            parts = path.split(".") if path else []
            metadata[SCOPES_KEY] = repr(["", *(".".join(parts[: k + 1]) for k in range(len(parts))), f"relu_{index}"])
        value = ir.val(f"v{index}", ir.DataType.FLOAT, [2])
        previous = nodes[-1].outputs[0] if nodes else source
        nodes.append(ir.Node("", "Relu", [previous], outputs=[value], name=name, metadata_props=metadata))
    graph = ir.Graph([source], [value], nodes=nodes, opset_imports={"": 23})
    return Program.single(ir.Model(graph, ir_version=10))


def shape(blocks: list[Block]) -> list[tuple[str, int]]:
    return [(block.name, block.count) for block in blocks]


def test_a_repeated_layer_is_one_block() -> None:
    paths = ["embeddings.word", "embeddings.norm"]
    paths += [f"encoder.layer.{i}.{part}" for i in range(2) for part in ("attention.self", "mlp")] + ["pooler.dense"]
    blocks = graph_blocks(program(list(paths)))
    assert shape(blocks) == [("embeddings", 2), ("encoder.layer.0", 2), ("encoder.layer.1", 2), ("pooler", 1)]


def test_what_stands_beside_the_layers_is_cut_where_it_leaves_them() -> None:
    paths = ["vit.embeddings.patches", "vit.encoder.layer.0.mlp", "vit.encoder.norm", "vit.norm", "classifier", "vit"]
    names = [name for name, _ in shape(graph_blocks(program(list(paths))))]
    assert names == ["vit.embeddings", "vit.encoder.layer.0", "vit.encoder.norm", "vit.norm", "classifier", "vit"]


def test_without_numbers_the_common_part_is_skipped() -> None:
    assert shape(graph_blocks(program(["net.a.x", "net.a.y", "net.b"]))) == [("net.a", 2), ("net.b", 1)]
    assert shape(graph_blocks(program(["net", "net"]))) == [("net", 2)]


def test_old_exporters_left_the_path_in_the_name() -> None:
    found = shape(graph_blocks(program(["encoder.layer.0.mlp", "encoder.layer.1.mlp"], old=True)))
    assert found == [("encoder.layer.0", 1), ("encoder.layer.1", 1)]


def test_a_graph_without_scopes_is_cut_into_runs() -> None:
    assert shape(graph_blocks(program([None] * 70))) == [("nodes 1 to 64", 64), ("nodes 65 to 70", 6)]


def test_a_few_nodes_without_a_module_have_their_own_block() -> None:
    assert shape(graph_blocks(program(["a", "b", None, ""]))) == [
        ("a", 1),
        ("b", 1),
        ("(no module)", 1),
        ("(top level)", 1),
    ]


def test_an_empty_graph_has_no_blocks() -> None:
    x = ir.val("x", ir.DataType.FLOAT, [2])
    model = ir.Model(ir.Graph([x], [x], nodes=[], opset_imports={"": 23}), ir_version=10)
    assert graph_blocks(Program.single(model)) == []


def test_the_listing_is_bounded_and_counts_the_rest() -> None:
    blocks = graph_blocks(program(["a", "a", "b"]), limit=1)
    assert [(len(b.nodes), b.hidden, b.count) for b in blocks] == [(1, 1, 2), (0, 1, 1)]


def test_entries_have_their_own_blocks() -> None:
    one, two = program(["a", "b"]), program(["a", "b"])
    both = Program({"prefill": one.main, "decode": two.main})
    assert [b.name for b in graph_blocks(both)] == ["prefill: a", "prefill: b", "decode: a", "decode: b"]


@pytest.mark.parametrize("text", ["", "[", "1", "[1, 2]", "__import__('os')", "[" * 5000, "['a'" + ", 'a'" * 9999])
def test_damaged_scopes_say_nothing(text: str) -> None:
    node = program(["a"]).main.graph[0]
    node.metadata_props[SCOPES_KEY] = text
    assert module_path(node) is None


@given(st.lists(st.lists(st.sampled_from(["a", "b", "layer", "0", "1"]), max_size=5).map(".".join), max_size=20))
def test_every_node_is_in_exactly_one_block(paths: list[str]) -> None:
    if not paths:
        return
    built = program(list(paths))
    blocks = graph_blocks(built)
    assert sum(b.count for b in blocks) == len(paths)
    assert len({b.name for b in blocks}) == len(blocks)
    assert [Block.from_dict(b.to_dict()) for b in blocks] == blocks


def test_origin_and_sources_come_from_metadata() -> None:
    built = program(["a"])
    node = built.main.graph[0]
    node.metadata_props["planish.pass"] = "fuse-gelu"
    node.metadata_props["planish.from"] = ",".join(f"n{i}" for i in range(20))
    assert graph_blocks(built)[0].nodes == [BlockNode("n0", "Relu", "fuse-gelu", tuple(f"n{i}" for i in range(8)))]


def test_a_node_that_a_pass_made_belongs_where_its_sources_did() -> None:
    built = program(["layers.0.a", "layers.0.b", "layers.1.a"], old=True)
    node = built.main.graph[1]
    node.name = "gelu"
    node.metadata_props["planish.from"] = "/layers.0/mlp/Erf,/layers.0/norm/Add"
    assert module_path(node) == ("layers", "0")
    assert shape(graph_blocks(built)) == [("layers.0", 2), ("layers.1", 1)]


def test_a_node_of_no_module_belongs_to_the_top() -> None:
    node = ir.node("Relu", [ir.val("x")], name="n")
    node.metadata_props[SCOPES_KEY] = "['', '_empty_nn_module_stack_from_metadata_hook', 'relu']"
    assert module_path(node) == ()
