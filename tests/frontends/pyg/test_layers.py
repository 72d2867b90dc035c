"""PyG layers with every option, read as programs: the interpreter and the ONNX body give what PyG gives."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

import onnxruntime as ort  # noqa: E402

from planish.frontends.pyg import LayerCall, read_call  # noqa: E402
from planish.ir.ops import dialect_op, import_functions  # noqa: E402
from planish.ir.ops.relational import PROGRAM, relational_name  # noqa: E402
from planish.ir.verify import verify_model  # noqa: E402
from tests.frontends.pyg.cases import (  # noqa: E402
    graphs,
    hgt_layers,
    randomize,
    relative_error,
    rgat_layers,
    rgcn_layers,
    simple_layers,
    typed_graphs,
)

LAYERS = [*rgcn_layers(), *rgat_layers(), *simple_layers()]
_SESSIONS: dict[str, ort.InferenceSession] = {}


def arrays(call: LayerCall) -> list[np.ndarray]:
    return [t.detach().numpy() for t in (call.edge_index, call.edge_type, *call.operands)]


def model_of(call: LayerCall) -> ir.Model:
    """A model of the one operator, with symbolic sizes."""
    text = str(call.program)
    inputs = []
    for number, array in enumerate(arrays(call)):
        dtype = ir.DataType.INT64 if number < 2 else ir.DataType.FLOAT
        variable = call.program.arguments[number - 2] if number >= 2 else None
        rows = array.ndim - (len(variable.shape) if variable else 1 if number == 0 else 0)
        dims = [None if axis < rows and not (number == 0 and axis == 0) else n for axis, n in enumerate(array.shape)]
        dims = dims if number else [2, None]
        inputs.append(ir.Value(name=f"i{number}", type=ir.TensorType(dtype), shape=ir.Shape(dims)))
    name = relational_name(text)
    node = ir.Node(
        "planish", name, inputs, [ir.AttrString(PROGRAM, text)], num_outputs=len(call.program.outputs), name="n"
    )
    for number, value in enumerate(node.outputs):
        value.name, value.type = f"o{number}", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23, "planish": 1}, name="g")
    model = ir.Model(graph, ir_version=10)
    import_functions(model)
    return model


def by_onnx(call: LayerCall) -> Any:
    key = relational_name(str(call.program))
    if key not in _SESSIONS:
        model = model_of(call)
        verify_model(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        data = ir.to_proto(model).SerializeToString()
        _SESSIONS[key] = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    session = _SESSIONS[key]
    feeds = {item.name: array for item, array in zip(session.get_inputs(), arrays(call), strict=True)}
    return call.result([torch.from_numpy(y) for y in session.run(None, feeds)])


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def by_interpreter(call: LayerCall) -> Any:
    text = str(call.program)
    results = dialect_op(relational_name(text)).reference(*arrays(call), program=text)
    return call.result([torch.from_numpy(np.asarray(y, np.float32)) for y in results])


@pytest.mark.parametrize("case", graphs(), ids=lambda case: case.name)
def test_layers_equal_pyg(case: Any) -> None:
    compared = 0
    for layer in LAYERS:
        module, arguments = randomize(layer.make(case)), layer.arguments(case)
        with torch.no_grad():
            expected = module(*arguments)
            call = read_call(module, *arguments)
            assert relative_error(by_onnx(call), expected) < 1e-5, layer.name
            if case.edges < 400:  # in float64: f-additive jumps where a weight underflows
                exact = deepcopy(module).double()(*(_double(a) for a in arguments))
                assert relative_error(by_interpreter(call), exact) < 1e-5, layer.name
        compared += 1
    assert compared == len(LAYERS) > 90


@pytest.mark.parametrize("graph", typed_graphs(), ids=lambda graph: graph.name)
def test_hgt_equals_pyg(graph: Any) -> None:
    for name, module, arguments in hgt_layers(graph):
        with torch.no_grad():
            expected = module(*arguments)
            call = read_call(module, *arguments)
            assert relative_error(by_interpreter(call), expected) < 1e-5, name
            assert relative_error(by_onnx(call), expected) < 1e-5, name


def test_bipartite_calls() -> None:
    from torch_geometric.nn import FastRGCNConv, GATConv, GraphConv, RGCNConv, SAGEConv

    torch.manual_seed(0)
    for sources, destinations in ((9, 4), (4, 9)):
        index = torch.stack([torch.randint(0, sources, (30,)), torch.randint(0, destinations, (30,))])
        types = torch.randint(0, 3, (30,))
        x = (torch.randn(sources, 8), torch.randn(destinations, 6))
        for module, more in (
            *((kind((8, 6), 5, 3), (types,)) for kind in (RGCNConv, FastRGCNConv)),
            (SAGEConv((8, 6), 5), ()),
            (GraphConv((8, 6), 5), (torch.rand(30),)),
            (GATConv((8, 6), 5, heads=2), ()),
            (GATConv((8, 6), 5, heads=2, edge_dim=3, add_self_loops=False), (torch.randn(30, 3),)),
        ):
            randomize(module)
            with torch.no_grad():
                expected = module(x, index, *more)
                assert relative_error(by_onnx(read_call(module, x, index, *more)), expected) < 1e-5, module


def test_flow_and_edge_weights() -> None:
    from torch_geometric.nn import GCNConv, GraphConv, RGATConv, RGCNConv

    torch.manual_seed(0)
    index, types, x = torch.randint(0, 12, (2, 40)), torch.randint(0, 3, (40,)), torch.randn(12, 8)
    for module, more in (
        (RGCNConv(8, 5, 3, flow="target_to_source"), (types,)),
        (RGATConv(8, 5, 3, flow="target_to_source", aggr="mean"), (types,)),
        (GCNConv(8, 5, add_self_loops=False), (torch.rand(40),)),
        (GCNConv(8, 5, normalize=False), (torch.rand(40),)),
        (GraphConv(8, 5, aggr="max"), (torch.rand(40),)),
    ):
        randomize(module)
        with torch.no_grad():
            expected = module(x, index, *more)
            assert relative_error(by_onnx(read_call(module, x, index, *more)), expected) < 1e-5, module


def test_edge_types_in_any_order_or_left_out() -> None:
    """PyG takes the order of the dict for that of the metadata; what the layer means is the same in any order."""
    graph = typed_graphs()[0]
    name, module, (x, edges) = next(iter(hgt_layers(graph)))
    with torch.no_grad():
        expected = module(x, edges)
        turned = dict(reversed(list(edges.items())))
        assert relative_error(by_interpreter(read_call(module, x, turned)), expected) < 1e-5, name
        fewer = dict(list(edges.items())[:2])
        assert relative_error(by_interpreter(read_call(module, x, fewer)), module(x, fewer)) < 1e-5
