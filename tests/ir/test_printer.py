"""The printer: short text that parses back to the same model, with large weights by digest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.errors import InputError
from planish.ir.hashing import structural_hash
from planish.ir.ops import import_functions
from planish.ir.printer import op_counts, parse_model, print_model
from planish.ir.program import Program
from planish.ir.verify import verify_model

TEXT = """<
   ir_version: 10,
   opset_import: ["" : 23]
>
g (float[B,4] x) => (float[B,4] y)
   <float[4] w =  {1,2,3,4}>
{
   [mul] a = Mul (x, w)
   [add] b = Add (a, w)
   [softmax] y = Softmax <axis: int = -1> (b)
}
"""


def test_text_is_a_fixed_point() -> None:
    assert print_model(parse_model(TEXT)) == TEXT


def test_comments_and_inferred_types() -> None:
    model = parse_model("# a comment\n" + TEXT)
    assert [str(n.outputs[0].shape) for n in model.graph] == ["[B,4]"] * 3
    assert all(n.outputs[0].shape is None for n in list(parse_model(TEXT, infer=False).graph)[:2])
    assert "float[B,4] a" in print_model(model, types=True)


def test_large_weights_are_declared_with_a_digest() -> None:
    model = parse_model(TEXT)
    tensor = ir.tensor(np.arange(400, dtype=np.float32).reshape(100, 4), name="big weight/0")
    model.graph.register_initializer(ir.Value(name="big weight/0", const_value=tensor))
    text = print_model(model)
    assert '# weight "big weight/0" float[100,4] 1.6 KiB digest ' in text
    assert len(text) < 600
    with pytest.raises(InputError, match="weight 'big weight/0' .* is not in the text"):
        parse_model(text)
    again = parse_model(text, weights={"big weight/0": tensor})
    assert print_model(again) == text
    assert structural_hash(again) == structural_hash(model)
    other = ir.tensor(np.zeros((100, 4), np.float32), name="big weight/0")
    with pytest.raises(InputError, match="the text was printed from"):
        parse_model(text, weights={"big weight/0": other})


def test_functions_and_subgraphs_round_trip() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    g (bool flag, float[4] x) => (float[4] y) {
      [glu] a = planish.SwiGLU (x, x)
      [choose] y = If (flag) <
        then_branch = yes () => (float[4] p) { [n] p = Neg (a) },
        else_branch = no () => (float[4] q) { [n] q = Abs (x) }
      >
    }
    """
    model = parse_model(text)
    import_functions(model)
    printed = print_model(model)
    again = parse_model(printed)
    assert print_model(again) == printed
    assert structural_hash(again) == structural_hash(model)
    verify_model(again)


def test_text_that_does_not_parse_names_the_place() -> None:
    with pytest.raises(InputError, match="line: 9"):
        parse_model(TEXT.replace("Mul (x, w)", "Mul (x, w"))


def test_op_counts() -> None:
    model = parse_model(TEXT.replace("Add (a, w)", "Mul (a, w)"))
    assert op_counts(model) == {"Mul": 2, "Softmax": 1}
    assert list(op_counts(Program.single(model)).items()) == [("Mul", 2), ("Softmax", 1)]


@settings(max_examples=40, deadline=None)
@given(
    name=st.text(st.characters(codec="ascii", exclude_categories=("Cc",), exclude_characters="\\\"'"), min_size=1),
    values=st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    alpha=st.floats(width=32, allow_nan=False, allow_infinity=False),
    strings=st.lists(st.text(st.characters(codec="ascii", exclude_categories=("Cc",))), min_size=1, max_size=3),
)
def test_any_name_and_number_round_trips(name: str, values: list[float], alpha: float, strings: list[str]) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N"]))
    weight = ir.Value(name=f"w {name}", const_value=ir.tensor(np.array(values, np.float32), name=f"w {name}"))
    relu = ir.node("LeakyRelu", [x], {"alpha": alpha}, name=name, outputs=[ir.Value(name=f"v {name}")])
    joined = ir.node("Concat", [relu.outputs[0], weight], {"axis": 0}, name="last", outputs=[ir.Value(name="y")])
    words = ir.node("Constant", [], {"value_strings": strings}, name="words", outputs=[ir.Value(name="s")])
    joined.outputs[0].type = x.type
    words.outputs[0].type = ir.TensorType(ir.DataType.STRING)
    outputs = [joined.outputs[0], words.outputs[0]]
    graph = ir.Graph([x], outputs, nodes=[relu, joined, words], initializers=[weight], opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10)
    text = print_model(model)
    assert print_model(parse_model(text, infer=False)) == text
