from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.ir.program import Program
from planish.ir.sharing import unify_weights
from planish.ir.verify import verify


def entry(**weights: np.ndarray) -> ir.Model:
    """A model that adds its weights to its input, one after the other."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = last = ir.Value(name="x", type=kind, shape=ir.Shape([3]))
    values, nodes = [], []
    for number, (name, array) in enumerate(weights.items()):
        value = ir.Value(name=name, type=kind, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
        node = ir.node("Add", [last, value], name=f"n{number}")
        last = node.outputs[0]
        last.name, last.type, last.shape = f"sum{number}", kind, ir.Shape([3])
        values.append(value)
        nodes.append(node)
    graph = ir.Graph([x], [last], nodes=nodes, initializers=values, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def program(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> Program:
    return Program({"a": entry(**one), "b": entry(**two)})


def names(p: Program, entry: str) -> list[str]:
    return sorted(p.entries[entry].graph.initializers)


def test_equal_contents_become_one_tensor_under_one_name() -> None:
    w, v = np.arange(3, dtype=np.float32), np.ones(3, np.float32)
    p = program({"w": w, "v": v}, {"q": w.copy(), "r": v.copy()})
    assert unify_weights(p) == 2
    assert names(p, "a") == names(p, "b") == ["v", "w"]
    assert p.weight_bytes() == 24
    verify(p, full=True)
    assert unify_weights(p) == 0


def test_one_name_for_different_contents_is_made_two() -> None:
    p = program({"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)})
    unify_weights(p)
    assert names(p, "a") == ["w"] and names(p, "b") == ["w.1"]
    verify(p, full=True)


def test_names_that_cross_over() -> None:
    w, v = np.zeros(3, np.float32), np.ones(3, np.float32)
    p = program({"w": w, "v": v}, {"w": v.copy(), "v": w.copy()})
    unify_weights(p)
    verify(p, full=True)
    assert p.weight_bytes() == 24
    for model in p.entries.values():
        assert all(name == value.name for name, value in model.graph.initializers.items())


def test_a_name_that_a_node_of_the_other_entry_has() -> None:
    one, two = {"v": np.ones(3, np.float32)}, {"w": np.ones(3, np.float32)}
    p = program(one, two)
    p.entries["b"].graph.node(0).outputs[0].name = "v"
    unify_weights(p)
    assert names(p, "b") == ["v.1"]
    assert p.weight_bytes() == 12
    verify(p, full=True)


def test_signed_zeros_and_views() -> None:
    base = np.zeros((3, 2), np.float32)
    p = program({"w": np.zeros(3, np.float32)}, {"v": -np.zeros(3, np.float32)})
    assert unify_weights(p) == 0
    p = program({"w": base[:, 0]}, {"v": base[:, 0]})
    assert unify_weights(p) == 1
