"""lower-cuda-relational: what it makes of layers, that results stay, and where it does nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish import relational as rel
from planish.ir.ops.relational import PROGRAM, relational_name
from planish.ir.program import Program
from planish.ir.relational.models import rgat, rgcn
from planish.ir.relational.text import parse_program
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode
from planish.passes.lowering.lower_cuda_relational import LowerCudaRelational
from tests.ir.relational.graphs import random_graph
from tests.runtime.cuda.test_relational_ops import feeds_of, model_of, wanted

KERNELS = PassContext(target=Target.parse("ort-cuda:kernels"))


def lowered(model: ir.Model, target: PassContext = KERNELS):
    program = Program({"main": model})
    result = LowerCudaRelational().apply(program, target)
    EliminateDeadCode().apply(program, target)
    return program.entries["main"], result


@pytest.mark.parametrize("program", [rgcn(8, 8), rgat(5, 4, 2)], ids=lambda p: p.name)
@pytest.mark.parametrize("constant", [False, True])
def test_results_stay(program: rel.Program, constant: bool) -> None:
    ort = pytest.importorskip("onnxruntime")
    graph = random_graph(3, (40,), 5, 300)
    model, result = lowered(model_of(program, graph, constant, fixed=constant))
    assert result.modified and result.fired == 1 and not result.declined
    (node,) = model.graph
    text = node.attributes.get_string(PROGRAM, "")
    assert node.op_type == relational_name(text) != relational_name(str(program))
    assert [key[1] for key in model.functions] == [node.op_type]
    rows = rel.Statistics.of(graph) if constant else rel.Statistics(10_000, 40_000, 20_000, 20_000, 50)
    assert parse_program(text) == rel.run_passes(program, rows).program
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = feeds_of(program, graph, constant=constant)
    found = dict(zip(program.outputs, session.run(None, feeds), strict=True))
    for name, want in wanted(program, graph, feeds).items():
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_constant_edges_are_counted() -> None:
    """Each edge with a source of its own: nothing is gained by products at sources."""
    graph = random_graph(1, (2000,), 50, 300)
    texts = []
    for constant in (False, True):
        model, _ = lowered(model_of(rgat(8, 8), graph, constant, fixed=True))
        texts.append(next(iter(model.graph)).attributes.get_string(PROGRAM, ""))
    assert ": src_pair" in texts[0] and ": src_pair" not in texts[1]


def test_where_it_does_nothing() -> None:
    graph = random_graph(3, (40,), 5, 300)
    model, result = lowered(model_of(rgcn(8, 8), graph), PassContext(target=Target.parse("ort-cuda")))
    assert not result.modified and "has no kernels for relational layers" in result.declined[0].reason
    model, _ = lowered(model_of(rgcn(8, 8), graph))
    _, again = lowered(model)
    assert not again.modified and "as the relational passes leave it" in again.declined[0].reason
