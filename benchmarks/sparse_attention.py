"""Block-sparse attention against dense attention, by itself and in whole models.

    python benchmarks/sparse_attention.py [--seconds S] [--only TEXT] [--json FILE]

Float32, one thread, processor time, all sides of a row interleaved in one process; every side is checked against
float64 masked attention (in one head) or the eager module before it is timed. A ratio is the time of the dense form
over that of the sparse one, with a 95 % bootstrap interval; `ideal` is the ratio of the pairs of a query and a key,
relative to causal ones where both are causal. Dense forms: ONNX Runtime's flash kernel (MultiHeadAttention) where
nothing is causal, else planish's own: the generated causal kernel, or lower-causal-attention in standard operators.
Whole models are planish's default pipeline with and without the sparse passes. "kernels" is the target
ort-cpu:kernels, "standard" ort-cpu.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[1]))

from planish.ir.block_sparsity import S2, Heads
from planish.ir.infer import infer_shapes
from planish.ir.ops import import_functions
from planish.ir.ops.block_sparse_attention import layout_mask
from planish.ir.ops.flash_attention import attention, causal
from planish.ir.ops.window_attention import window_mask, window_pairs
from planish.ir.target import Target
from planish.passes.testing import apply_pass, program_of
from planish.runtime.measure import interleave, noise, ratio
from planish.runtime.ort import compile_ort

Run = Callable[[], object]
SIZE, BLOCK = 64, 64
#: Of the largest difference from float64, relative to the largest result.
TOLERANCE = 1e-5
LOWER = "lower-window-attention,lower-block-sparse,lower-causal-attention,eliminate-dead-code"


class Row:
    """Sides of one row: the first is the dense one.

    Attributes:
        ideal: by side, how many times fewer pairs it has.
    """

    def __init__(self, length: int, heads: int) -> None:
        self.length, self.heads = length, heads
        rng = np.random.default_rng(length)
        self.feeds = {n: rng.standard_normal((1, length, heads * SIZE), np.float32) for n in "qkv"}
        self.runs: dict[str, Run] = {}
        self.ideal: dict[str, float] = {}
        self.error = 0.0

    def side(
        self, name: str, call: str, target: str, seen: np.ndarray | None, ideal: float = 1.0, lists: Any = None
    ) -> None:
        """A graph of one `call`; `seen` (queries, keys) is the mask of the first head, None: all."""
        width = self.heads * SIZE
        inputs = ", ".join(f"float[1, {self.length}, {width}] {n}" for n in "qkv")
        weights = [ir.tensor(array, name=n) for n, array in (lists or {}).items()]
        kinds = ", ".join(f"int32[{', '.join(map(str, w.shape))}] {w.name}" for w in weights)
        text = (
            '<ir_version: 10, opset_import: ["" : 23, "planish" : 1, "com.microsoft" : 1]> '
            f"f ({inputs}) => (float[1, {self.length}, {width}] y) <{kinds}> {{ y = {call} }}"
        )
        target = one_thread(target)
        program = program_of(ir.from_onnx_text(text, initializers=weights), target)
        import_functions(program.main)
        infer_shapes(program.main)
        if not Target.parse(target).kernels:
            apply_pass(LOWER, program)
        runner = compile_ort(program.main, Target.parse(target))
        one = [a[..., :SIZE] for a in self.feeds.values()]
        some = np.sort(np.random.default_rng(0).choice(self.length, 64, replace=False))  # enough to see a wrong mask
        rows = np.ones((64, self.length), bool) if seen is None else seen[some]
        want = attention((one[0][:, some], *one[1:]), (1, 1), SIZE**-0.5, rows)
        got = runner.run(self.feeds)["y"][:, some, :SIZE]
        error = float(np.abs(got - want).max() / np.abs(want).max())
        if error > TOLERANCE:
            raise SystemExit(f"{name} is wrong: error {error:.1e}")
        self.error = max(self.error, error)
        self.runs[name], self.ideal[name] = runner.prepared(self.feeds), ideal


def one_thread(target: str) -> str:
    """Processor time counts every thread, and those that wait too."""
    return f"{target}{',' if ':' in target else ':'}threads=1"


def attributes(heads: int, **more: int) -> str:
    given = {"q_num_heads": heads, "kv_num_heads": heads, "scale": SIZE**-0.5, **more}
    return ", ".join(f"{n} = {v}" for n, v in given.items())


def lists_row(row: Row, layout: Any, is_causal: int, targets: dict[str, str]) -> None:
    """Adds a side with a BlockSparseAttention for each target."""
    heads = row.heads
    lists = {n: getattr(layout, n).astype(np.int32) for n in ("indptr", "indices", "head_layout")}
    blocks = row.length // BLOCK
    listed = sum(np.diff(lists["indptr"][index]).sum() for index in lists["head_layout"]) / heads
    ideal = (blocks * (blocks + 1) / 2 if is_causal else blocks**2) / float(listed)
    first = lists["head_layout"][0]
    seen = layout_mask(lists["indptr"][first : first + 1], lists["indices"], BLOCK, row.length, row.length)[0]
    if is_causal:
        seen &= causal(row.length, row.length, 0)
    given = attributes(heads, block_size=BLOCK, is_causal=is_causal)
    call = f"planish.BlockSparseAttention<{given}>(q, k, v, indptr, indices, head_layout)"
    for name, target in targets.items():
        row.side(name, call, target, seen, ideal, lists)


class Lists:
    """Layouts as the operator reads them."""

    def __init__(self, masks: np.ndarray, head_layout: list[int]) -> None:
        rows = masks.shape[1]
        ends = np.concatenate([[0], np.cumsum(masks.sum(-1).ravel())])
        self.indptr = np.stack([ends[n * rows : (n + 1) * rows + 1] for n in range(len(masks))])
        self.indices = np.nonzero(masks)[2]
        self.head_layout = np.array(head_layout)


BOTH = {"standard": "ort-cpu", "kernels": "ort-cpu:kernels"}


def flash(length: int, heads: int = 12) -> Row:
    row = Row(length, heads)
    row.side("dense", f"com.microsoft.MultiHeadAttention<num_heads = {heads}>(q, k, v)", "ort-cpu", None)
    return row


def shards_row(length: int) -> Row:
    """S2's shards of a quarter, not causal: 4 groups of 3 heads, each with its stride of blocks."""
    row, blocks = flash(length), length // BLOCK
    masks = np.stack([np.broadcast_to(np.arange(blocks) % 4 == g, (blocks, blocks)) for g in range(4)])
    lists_row(row, Lists(masks, [h // 3 for h in range(12)]), 0, BOTH)
    return row


def random_row(length: int) -> Row:
    """Each block of queries sees a quarter of the blocks of keys, its own among them, in each of 12 heads others."""
    row, blocks = flash(length), length // BLOCK
    rng = np.random.default_rng(1)
    masks = np.zeros((12, blocks, blocks), bool)
    for h in range(12):
        for r in range(blocks):
            others = np.delete(np.arange(blocks), r)
            masks[h, r, [r, *rng.choice(others, blocks // 4 - 1, replace=False)]] = True
    lists_row(row, Lists(masks, list(range(12))), 0, {"kernels": "ort-cpu:kernels"})
    return row


def causal_row(length: int, heads: int, kernels: bool) -> Row:
    row = Row(length, heads)
    seen = causal(length, length, 0)
    call = f"{'planish.Flash' if kernels else ''}Attention<{attributes(heads, is_causal=1)}>(q, k, v)"
    row.side("dense", call, "ort-cpu:kernels" if kernels else "ort-cpu", seen)
    return row


def s2_row(length: int, kernels: bool) -> Row:
    row = causal_row(length, 4, kernels)
    layout = S2(block=BLOCK, local=16, stride=8).layout(length, Heads(4, 4))
    lists_row(row, layout, 1, {"kernels": "ort-cpu:kernels"} if kernels else {"standard": "ort-cpu"})
    return row


def window_row(length: int, window: int, kernels: bool) -> Row:
    row = causal_row(length, 4, kernels)
    shape = {"left": window - 1, "right": -1, "global_keys": 0, "global_queries": 0, "is_causal": 1}
    ideal = length * (length + 1) / 2 / window_pairs(length, length, shape)
    call = f"planish.WindowAttention<{attributes(4, left=window - 1, is_causal=1)}>(q, k, v)"
    name, target = ("kernels", "ort-cpu:kernels") if kernels else ("standard", "ort-cpu")
    row.side(name, call, target, window_mask(length, length, window - 1, is_causal=1), ideal)
    return row


def rows() -> dict[str, Callable[[], Any]]:
    made: dict[str, Callable[[], Any]] = {}
    for length in (1024, 2048, 4096, 8192):
        made[f"S2 shards, 25 % of all keys, {length}"] = lambda length=length: shards_row(length)
    for length in (2048, 4096, 8192):
        made[f"25 % of blocks at random, {length}"] = lambda length=length: random_row(length)
    for length in (8192, 16384):
        made[f"causal S2 (64, 16, 8), {length}, kernels"] = lambda length=length: s2_row(length, True)
    made["causal S2 (64, 16, 8), 8192, standard"] = lambda: s2_row(8192, False)
    for window in (1024, 4096):
        for kernels in (True, False):
            name = f"window of {window}, 8192, {'kernels' if kernels else 'standard'}"
            made[name] = lambda window=window, kernels=kernels: window_row(8192, window, kernels)
    from benchmarks.sparse_models import MODELS

    return made | MODELS


def measure(row: Any, seconds: float) -> dict[str, Any]:
    times = interleave(row.runs, seconds=seconds, clock="process")
    sides = {}
    for name in list(row.runs)[1:]:
        found = ratio(times["dense"], times[name])
        share = found.median / row.ideal[name] if row.ideal.get(name) else None
        sides[name] = {"median": found.median, "low": found.low, "high": found.high, "ideal": row.ideal.get(name)}
        sides[name]["fraction"] = share
    dense = float(np.median(times["dense"])) * 1e3
    return {"dense_ms": dense, "sides": sides, "error": row.error, "noise": noise(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each row")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    print("| attention | side | times as fast as dense | ideal | share of ideal | dense, ms | error |")
    print("|---|---|---|---|---|---|---|")
    for name, make in rows().items():
        if options.only not in name:
            continue
        results[name] = found = measure(make(), options.seconds)
        for side, item in found["sides"].items():
            gain = f"{item['median']:.2f} [{item['low']:.2f}, {item['high']:.2f}]"
            ideal = "– | –" if not item["ideal"] else f"{item['ideal']:.2f} | {item['fraction']:.2f}"
            print(
                f"| {name} | {side} | {gain} | {ideal} | {found['dense_ms']:.0f} | {found['error']:.0e} |", flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
