from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.hashing import structural_hash, tensor_digest
from planish.ir.program import Program

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}, float[4] v = {1, 2, 3, 5}>
{
  a = Add(x, w)
  b = Mul(a, v)
  s = Softmax<axis = 1>(b)
  y = If(c) <then_branch = t () => (float[N, 4] p) { p = Relu(s) },
             else_branch = e () => (float[N, 4] q) { q = Add(s, w) }>
}"""


def digest(text: str) -> str:
    return structural_hash(ir.from_onnx_text(text))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Add(x, w)", "Sub(x, w)"),
        ("Add(x, w)", "Add(w, x)"),
        ("Add(x, w)", "Add(x, v)"),
        ("axis = 1", "axis = 0"),
        ("{1, 2, 3, 5}", "{1, 2, 3, 6}"),
        ("Relu(s)", "Abs(s)"),
        ("Add(s, w)", "Add(s, v)"),
        ('"" : 21', '"" : 20'),
        ("float[N, 4] x", "float[M, 4] x"),
        ("float[N, 4] x", "float[3, 4] x"),
    ],
)
def test_any_change_of_meaning_changes_the_hash(old: str, new: str) -> None:
    assert old in TEXT
    assert digest(TEXT) != digest(TEXT.replace(old, new))


@given(st.permutations(["a", "b", "s", "w", "v"]))
def test_names_of_inner_values_and_weights_do_not_matter(order: list[str]) -> None:
    model = ir.from_onnx_text(TEXT)
    graph = model.graph
    for new, old in enumerate(order):
        values = {v.name: v for n in graph for v in n.outputs} | dict(graph.initializers)
        value = values[old]
        if old in graph.initializers:
            graph.initializers.pop(old)
            value.name = f"value_{new}"
            graph.initializers[value.name] = value
        else:
            value.name = f"value_{new}"
    for number, node in enumerate(graph):
        node.name = f"node_{number}"
        node.metadata_props["planish.pass"] = "some"
    assert structural_hash(model) == digest(TEXT)


def test_a_clone_has_the_same_hash_and_entries_count() -> None:
    model = ir.from_onnx_text(TEXT)
    assert structural_hash(model.clone()) == structural_hash(model)
    one, two = Program({"main": model}), Program({"prefill": model, "decode": model})
    assert structural_hash(one) == structural_hash(model) != structural_hash(two)


def test_tensor_digests_go_by_content_dtype_and_shape() -> None:
    a, b = ir.tensor(np.arange(6, dtype=np.float32)), ir.tensor(np.arange(6, dtype=np.float32))
    assert tensor_digest(a) == tensor_digest(b) == tensor_digest(a)
    assert tensor_digest(a) != tensor_digest(ir.tensor(np.arange(6, dtype=np.float32).reshape(2, 3)))
    assert tensor_digest(a) != tensor_digest(ir.tensor(np.arange(6, dtype=np.int32)))
    assert tensor_digest(ir.tensor(["a", "b"])) != tensor_digest(ir.tensor(["ab", ""]))
