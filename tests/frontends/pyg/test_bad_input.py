"""What layers refuse: one line that says what, where and what to do, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

from planish.frontends.pyg import read_call  # noqa: E402
from planish.ir.errors import InputError, PlanishError, UnsupportedError  # noqa: E402

X, INDEX, TYPES = torch.randn(6, 8), torch.randint(0, 6, (2, 20)), torch.randint(0, 3, (20,))


def _refused(kind: type[PlanishError], text: str, module: Any, *arguments: Any, **named: Any) -> None:
    with pytest.raises(kind, match=text) as caught:
        read_call(module, *arguments, **named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("edge_index has shape \\(3, 20\\); it must be \\(2, edges\\)", (X, torch.zeros(3, 20).long(), TYPES)),
        ("edge_index is torch.float32; it must be int64", (X, INDEX.float(), TYPES)),
        ("edge_type is torch.float32; it must be int64", (X, INDEX, TYPES.float())),
        ("there must be one type for each edge", (X, INDEX, TYPES[:-1])),
        ("x has shape \\(6, 7\\); it must be \\(rows, 8\\)", (X[:, :7], INDEX, TYPES)),
        ("x is torch.float64; it must be float32", (X.double(), INDEX, TYPES)),
        ("edge_type is missing", (X, INDEX)),
        ("missing 1 required positional argument", (X,)),
    ],
)
def test_rgcn_and_rgat(text: str, arguments: Any) -> None:
    from torch_geometric.nn import RGATConv, RGCNConv

    for module in (RGCNConv(8, 5, 3), RGATConv(8, 5, 3)):
        _refused(InputError, text, module, *arguments)


def test_options_that_have_no_program() -> None:
    from torch_geometric.nn import FastRGCNConv, GATConv, GCNConv, RGATConv, RGCNConv, SAGEConv

    _refused(UnsupportedError, "edge_index is sparse", RGCNConv(8, 5, 3), X, INDEX.float().to_sparse(), TYPES)
    _refused(UnsupportedError, "aggr is 'max'", FastRGCNConv(8, 5, 3, aggr="max"), X, INDEX, TYPES)
    _refused(UnsupportedError, "dropout", RGATConv(8, 5, 3, dropout=0.5).train(), X, INDEX, TYPES)
    _refused(UnsupportedError, "return_attention_weights", RGATConv(8, 5, 3), X, INDEX, TYPES,
             return_attention_weights=True)  # fmt: skip
    _refused(UnsupportedError, "cached=True", GCNConv(8, 5, cached=True), X, INDEX)
    _refused(UnsupportedError, "edge weights together with self-loops", GCNConv(8, 5), X, INDEX, torch.rand(20))
    _refused(UnsupportedError, "edge features together", GATConv(8, 5, edge_dim=2), X, INDEX, torch.rand(20, 2))
    _refused(UnsupportedError, "aggr is 'softmax'", SAGEConv(8, 5, aggr="softmax"), X, INDEX)
    _refused(UnsupportedError, "without destination features", SAGEConv((8, 8), 5), (X, None), INDEX)
    _refused(UnsupportedError, "no layer that planish reads", torch.nn.Linear(8, 5), X)
    _refused(UnsupportedError, "float64", RGCNConv(8, 5, 3).double(), X, INDEX, TYPES)
    hooked = RGCNConv(8, 5, 3)
    hooked.register_message_forward_hook(lambda *_: None)
    _refused(UnsupportedError, "hooks on its messages", hooked, X, INDEX, TYPES)


def test_a_subclass_may_override_anything() -> None:
    from torch_geometric.nn import RGCNConv

    class Mine(RGCNConv):
        pass

    _refused(UnsupportedError, "Mine is no layer", Mine(8, 5, 3), X, INDEX, TYPES)


def test_hgt() -> None:
    from torch_geometric.nn import HGTConv

    module = HGTConv(8, 8, (["a", "b"], [("a", "r", "b")]))
    x, edges = {"a": X, "b": X}, {("a", "r", "b"): INDEX}
    _refused(InputError, "x_dict has no features of node type 'b'", module, {"a": X}, edges)
    _refused(InputError, "has type 'bb'.*did you mean|has type 'bb'", module, {"a": X, "bb": X}, edges)
    _refused(InputError, "metadata has not", module, x, {("b", "r", "a"): INDEX})
    _refused(InputError, "must be \\(rows, 8\\)", module, {"a": X, "b": X[:, :3]}, edges)
    _refused(InputError, "edges \\('a', 'r', 'b'\\).*int64", module, x, {("a", "r", "b"): INDEX.float()})
    _refused(InputError, "give a dict", module, X, edges)


def test_uninitialized() -> None:
    from torch_geometric.nn import HGTConv, SAGEConv

    _refused(InputError, "not initialized yet", SAGEConv(-1, 5), X, INDEX)
    _refused(InputError, "not initialized yet", HGTConv(-1, 8, (["a"], [("a", "r", "a")])), {"a": X}, {})
