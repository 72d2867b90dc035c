"""A report as a run on a small encoder would make it: every kind of verdict, no optimizer needed."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import onnx_ir as ir

from planish.ir.blocks import Block, BlockNode, graph_blocks
from planish.ir.ledger import Declined, ErrorStats, Ledger, LedgerEntry, Ratio
from planish.ir.program import Program
from planish.runtime.report import Report

_LAYER = re.split(
    " ",
    "attention.query/MatMul attention.query/Add attention.query/Reshape attention.query/Transpose "
    "attention.key/MatMul attention.key/Add attention.key/Reshape attention.key/Transpose "
    "attention.value/MatMul attention.value/Add attention.value/Reshape attention.value/Transpose "
    "attention/MatMul attention/Div attention/Add attention/Softmax attention/MatMul attention/Transpose "
    "attention/Reshape output/MatMul output/Add output/Add output.norm/ReduceMean output.norm/Sub output.norm/Pow "
    "output.norm/ReduceMean output.norm/Add output.norm/Sqrt output.norm/Div output.norm/Mul output.norm/Add "
    "mlp/MatMul mlp/Add mlp.act/Div mlp.act/Erf mlp.act/Add mlp.act/Mul mlp.act/Mul mlp/MatMul mlp/Add mlp/Add",
)
_FUSED = re.split(
    " ",
    "attention.query/Gemm:fuse-matmul-add attention.query/Reshape attention.key/Gemm:fuse-matmul-add "
    "attention.key/Reshape attention.value/Gemm:fuse-matmul-add attention.value/Reshape "
    "attention/Attention:fuse-attention attention/Reshape output/Gemm:fuse-matmul-add output/Add "
    "output.norm/LayerNormalization:fuse-layer-norm mlp/Gemm:fuse-matmul-add mlp.act/Gelu:fuse-gelu "
    "mlp/Gemm:fuse-matmul-add mlp/Add",
)


def chain(layers: int, items: list[str], prefix: str = "encoder.layer") -> Program:
    """A program whose nodes stand in a row, scoped and marked like the exporter and the rewriter do."""
    source = ir.val("x", ir.DataType.FLOAT, ["batch", 64])
    value, nodes = source, []
    for layer in range(layers):
        for index, item in enumerate(items):
            path, _, op = item.partition("/")
            op, _, origin = op.partition(":")
            scopes = ["", f"{prefix}.{layer}", f"{prefix}.{layer}.{path}", f"{op.lower()}_{index}"]
            metadata = {"pkg.torch.onnx.name_scopes": repr(scopes)}
            if origin:
                metadata["planish.pass"] = origin
                metadata["planish.from"] = f"{op}_{layer}_{index},gone_{index}"
            out = ir.val(f"v{layer}_{index}", ir.DataType.FLOAT, ["batch", 64])
            node = ir.Node("", op, [value], outputs=[out], name=f"{op}_{layer}_{index}", metadata_props=metadata)
            nodes.append(node)
            value = out
    graph = ir.Graph([source], [value], nodes=nodes, opset_imports={"": 23}, name="main")
    return Program.single(ir.Model(graph, ir_version=10), "ort-cpu:threads=2")


def ratio(median: float, spread: float = 0.02, base: float = 12.4) -> Ratio:
    return Ratio(median, median - spread, median + spread, 40, baseline_ms=base, candidate_ms=base / median)


def sample_ledger(nodes: tuple[int, int] = (492, 180)) -> Ledger:
    """Exact passes as a group, one rolled back; approximate ones, one kept and one not; all together."""
    counts = [nodes[0], nodes[0] - 30, nodes[0] - 34, nodes[0] - 106, nodes[0] - 202, nodes[0] - 254, nodes[1] + 8]
    names = [
        "fold-constants",
        "eliminate-dead-code",
        "fuse-matmul-add",
        "fuse-layer-norm",
        "fuse-gelu",
        "fuse-attention",
    ]
    entries = []
    for index, name in enumerate(names):
        declined = []
        if name == "fuse-attention":
            declined = [Declined("gqa", f"node_{i}", "the mask has an unknown rank") for i in range(3)]
            declined.append(Declined("sdpa", "node_17", "Softmax runs over axis 1, not the last"))
        entries.append(
            LedgerEntry(
                name, "exact", counts[index], counts[index + 1], 12 + index, declined, seconds=0.12 * (index + 1)
            )
        )
    for name in ("fuse-rms-norm", "fuse-swiglu", "eliminate-common-subexpressions", "remove-no-ops"):
        entries.append(LedgerEntry(name, "exact", counts[-1], counts[-1], verdict="nothing to do", seconds=0.004))
    last = counts[-1]
    wrong = LedgerEntry("fuse-squeeze", "exact", last, last, kept=False)
    wrong.error_original = ErrorStats(3.1e-2, 0.4, 0.999, None, "y")
    wrong.verdict = "rolled back: error 3.1e-02 > 1.0e-04 at output 'y'"
    wrong.reproducer = "planish-reproducers/fuse-squeeze"
    entries.append(wrong)
    error = ErrorStats(3.1e-7, 2.4e-6, 1.0, None, "last_hidden_state")
    group = LedgerEntry("exact passes", "composition", nodes[0], last, 87, [], error, error, ratio(1.142))
    entries.append(replace(group, seconds=6.2))
    loose = ErrorStats(4.2e-3, 0.02, 0.9999, None, "last_hidden_state")
    slow = LedgerEntry("merge-tokens{r=13}", "approximate", last, last + 24, 12, [], loose, loose, ratio(0.97))
    slow.verdict = "rolled back: no measurable gain, 0.970x [0.950, 0.990]"
    entries.append(replace(slow, kept=False, seconds=2.1))
    loose = ErrorStats(3.9e-3, 0.03, 0.9998, None, "last_hidden_state")
    fast = ratio(1.08, 0.03)
    entries.append(LedgerEntry("skip-layers{layers=[7]}", "approximate", last, nodes[1], 1, [], loose, loose, fast))
    total = LedgerEntry("all passes", "composition", *nodes, 0, [], loose, loose, ratio(1.23, 0.03), seconds=1.0)
    entries.append(total)
    return Ledger(entries, synthetic=True, tolerance=1e-4, notes=["error not measured for outputs that differ: noise"])


def sample_report(layers: int = 12) -> Report:
    before, after = chain(layers, _LAYER), chain(layers, _FUSED)
    ledger = sample_ledger((before.node_count(), after.node_count()))
    return Report.build(
        model="models/all-MiniLM-L6-v2.onnx",
        before=before,
        after=after,
        pipeline=",".join(e.name for e in ledger.entries if e.kind != "composition"),
        ledger=ledger,
        error=ledger.entries[-1].error_original,
        speedup=ledger.entries[-1].speedup,
        cost_before=2.76e9,
        cost_after=2.71e9,
        peak_before=14_200_000,
        peak_after=9_100_000,
        seconds=21.3,
        error_budget=1e-2,
    )


def large_blocks(count: int, seed: int = 0) -> list[Block]:
    """Blocks that hold `count` nodes together."""
    rng = random.Random(seed)
    ops = ["MatMul", "Add", "Reshape", "Transpose", "Softmax", "Mul"]
    nodes = [
        BlockNode(
            f"/model/layers.{i // 50}/self_attn/op_{i}", rng.choice(ops), rng.choice([None, None, "fuse-gelu"]), ()
        )
        for i in range(count)
    ]
    return [Block(f"layers.{i}", nodes[50 * i : 50 * i + 50]) for i in range((count + 49) // 50)]


__all__ = ["chain", "graph_blocks", "large_blocks", "ratio", "sample_ledger", "sample_report"]
