"""One attention on ONNX Runtime's CPU provider by the form it is written in: prefill and one decode step.

    python benchmarks/attention_forms.py [--json FILE] [--seconds N] [--rounds prefill,decode]

The figures behind `fuse-attention`, `fuse-kv-cache` and `merge-attention-heads`. Heads of 64, batch 1, one thread,
processor time, interleaved, denormals flushed; every form gives the values of the first one. Prefill forms read
(1, length, heads * 64); decode forms read one new token in that layout over a cache (1, heads, past, 64), and give
the grown cache as well. `decomposed` is MatMul, Softmax, MatMul.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from planish.runtime.measure import Timing, interleave

ROOT = Path(__file__).resolve().parents[1]
DEPTH = 64
HEADS = ((12, 12), (16, 4))
PREFILL = (128, 512, 1024, 2048)
PAST = (512, 2048)

_SPLIT = """
    hs = Constant<value_ints = [0, 0, {h}, 64]>() gs = Constant<value_ints = [0, 0, {g}, 64]>()
    q4 = Reshape(q, hs) k4 = Reshape(k, gs) v4 = Reshape(v, gs)
    qh = Transpose<perm = [0, 2, 1, 3]>(q4) kh = Transpose<perm = [0, 2, 1, 3]>(k4)
    vh = Transpose<perm = [0, 2, 1, 3]>(v4)
"""
_JOIN = " ot = Transpose<perm = [0, 2, 1, 3]>(o) js = Constant<value_ints = [0, 0, -1]>() y = Reshape(ot, js)"
_PLAIN = """
    kt = Transpose<perm = [0, 1, 3, 2]>({k}) s = MatMul(qh, kt)
    scale = Constant<value_float = 0.125>() sc = Mul(s, scale)
    {mask} p = Softmax<axis = -1>(sm) o = MatMul(p, {v})
"""
_UNMASKED, _ADDED = "sm = Identity(sc)", "sm = Add(sc, mask)"
_HEADS = "q_num_heads = {h}, kv_num_heads = {g}"
_GROW = " pk = Concat<axis = 2>(past_k, kh) pv = Concat<axis = 2>(past_v, vh)"

#: name -> body; forms whose name ends in "mask" read a float mask, those with "causal" a causal one.
PREFILL_FORMS = {
    "": {
        "decomposed": _SPLIT + _PLAIN.format(k="kh", v="vh", mask=_UNMASKED, h="{h}", g="{g}") + _JOIN,
        "Attention, 4-D": _SPLIT + " o = Attention(qh, kh, vh)" + _JOIN,
        "Attention, 3-D": f"y = Attention<{_HEADS}>(q, k, v)",
        "MultiHeadAttention": "y = com.microsoft.MultiHeadAttention<num_heads = {h}>(q, k, v)",
    },
    "mask": {
        "decomposed": _SPLIT + _PLAIN.format(k="kh", v="vh", mask=_ADDED, h="{h}", g="{g}") + _JOIN,
        "Attention, 4-D": _SPLIT + " o = Attention(qh, kh, vh, mask)" + _JOIN,
        "Attention, 3-D": f"y = Attention<{_HEADS}>(q, k, v, mask)",
        "MultiHeadAttention": "y = com.microsoft.MultiHeadAttention<num_heads = {h}>(q, k, v, , , mask)",
    },
    "causal": {
        "decomposed": _SPLIT + _PLAIN.format(k="kh", v="vh", mask=_ADDED, h="{h}", g="{g}") + _JOIN,
        "Attention, mask": f"y = Attention<{_HEADS}>(q, k, v, mask)",
        "Attention, is_causal": f"y = Attention<{_HEADS}, is_causal = 1>(q, k, v)",
        "MultiHeadAttention": "y = com.microsoft.MultiHeadAttention<num_heads = {h}, unidirectional = 1>(q, k, v)",
        "GroupQueryAttention": "y, pk, pv = com.microsoft.GroupQueryAttention<num_heads = {h}, kv_num_heads = {g}>"
        "(q, k, v, , , last, total)",
    },
}


def _decode(masked: bool) -> dict[str, str]:
    mask = ", mask" if masked else ""
    plain = _PLAIN.format(k="pk", v="pv", mask=_ADDED if masked else _UNMASKED, h="{h}", g="{g}")
    bias = ", mask" if masked else ","
    forms = {
        "decomposed": _SPLIT + _GROW + plain + _JOIN,
        "Concat, Attention": _SPLIT + _GROW + f" o = Attention(qh, pk, pv{mask})" + _JOIN,
        "Attention, past, 4-D": _SPLIT + f" o, pk, pv = Attention(qh, kh, vh, {mask[2:]}, past_k, past_v)" + _JOIN,
        "Attention, past, 3-D": f"y, pk, pv = Attention<{_HEADS}>(q, k, v, {mask[2:]}, past_k, past_v)",
        "MultiHeadAttention": "y, pk, pv = com.microsoft.MultiHeadAttention<num_heads = {h}>"
        f"(q, k, v, , {bias}, past_k, past_v)",
    }
    if not masked:
        forms["GroupQueryAttention"] = (
            "y, pk, pv = com.microsoft.GroupQueryAttention<num_heads = {h}, kv_num_heads = {g}>"
            "(q, k, v, past_k, past_v, last, total)"
        )
    return forms


DECODE_FORMS = {"": _decode(False), "mask": _decode(True)}


class Form:
    """One form as a session and its inputs; a call runs it."""

    def __init__(self, body: str, heads: int, groups: int, feed: dict[str, np.ndarray], cache: bool) -> None:
        kinds = {"f": "float", "i": "int32"}
        inputs = ", ".join(f"{kinds[a.dtype.kind]}[{', '.join(map(str, a.shape))}] {n}" for n, a in feed.items())
        outputs = "float[b, s, d] y" + (", float[b, g, t, 64] pk, float[b, g, t, 64] pv" if cache else "")
        body = body.format(h=heads, g=groups)
        text = (
            f'<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> f ({inputs}) => ({outputs}) {{ {body} }}'
        )
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 4
        settings.add_session_config_entry("session.set_denormal_as_zero", "1")
        proto = ir.to_proto(ir.from_onnx_text(text)).SerializeToString()
        self.session = ort.InferenceSession(proto, settings, providers=["CPUExecutionProvider"])
        self.feed = {item.name: feed[item.name] for item in self.session.get_inputs()}

    def __call__(self) -> None:
        self.session.run(None, self.feed)

    def result(self) -> np.ndarray:
        first: np.ndarray = self.session.run(["y"], self.feed)[0]
        return first


def feed(heads: int, groups: int, length: int, past: int | None, mask: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    total = length + (past or 0)
    found = {"q": draw(1, length, heads * 64), "k": draw(1, length, groups * 64), "v": draw(1, length, groups * 64)}
    if past is not None:
        found |= {"past_k": draw(1, groups, past, 64), "past_v": draw(1, groups, past, 64)}
    allowed = np.ones((length, total), bool)
    if mask == "causal":
        allowed = np.tril(allowed, total - length)
    elif mask:
        allowed[:, : max(1, total // 16)] = False
    return found | {
        "mask": np.where(allowed, 0, -1e9).astype(np.float32)[None, None],
        "last": np.array([total - 1], np.int32),
        "total": np.array([total], np.int32),
    }


def measure(
    forms: dict[str, str], heads: int, groups: int, inputs: dict[str, np.ndarray], *, cache: bool, seconds: float
) -> dict[str, Any]:
    """Microseconds by form; a text where a form does not run or gives other values."""
    sessions: dict[str, Callable[[], object]] = {}
    result: dict[str, Any] = {}
    expected: np.ndarray | None = None
    for name, body in forms.items():
        if groups != heads and name in ("decomposed", "MultiHeadAttention"):
            result[name] = "no groups"
            continue
        try:
            form = Form(body, heads, groups, inputs, cache)
            got = form.result()
        except Exception as error:  # a form that this version refuses is a row of the table
            result[name] = str(error).splitlines()[0][:60]
            continue
        expected = got if expected is None else expected
        if not np.allclose(got, expected, rtol=1e-3, atol=1e-4):
            result[name] = "other values"
            continue
        sessions[name] = form
    times = interleave(sessions, seconds=seconds, clock="process")
    return result | {name: round(Timing.of(t).median * 1e3, 1) for name, t in times.items()}


def show(title: str, row: dict[str, Any]) -> None:
    figures = [v for v in row.values() if isinstance(v, float)]
    best = min(figures, default=0.0)
    print(title)
    for name, value in row.items():
        shown = f"{value:>12.1f} us  x{best / value:.2f}" if isinstance(value, float) else f"{value:>12}"
        print(f"    {name:24}{shown}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "attention_forms.json")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each table")
    parser.add_argument("--rounds", default="prefill,decode")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for heads, groups in HEADS:
        for mask, forms in DECODE_FORMS.items() if "decode" in arguments.rounds else ():
            for past in PAST:
                inputs = feed(heads, groups, 1, past, mask)
                row = measure(forms, heads, groups, inputs, cache=True, seconds=arguments.seconds)
                rows.append({"kind": "decode", "heads": heads, "groups": groups, "past": past, "mask": mask, "us": row})
                show(f"decode, {heads}/{groups} heads, past {past}, {mask or 'no mask'}", row)
        for mask, forms in PREFILL_FORMS.items() if "prefill" in arguments.rounds and heads == groups else ():
            for length in PREFILL:
                inputs = feed(heads, groups, length, None, mask)
                row = measure(forms, heads, groups, inputs, cache=False, seconds=arguments.seconds)
                rows.append({"kind": "prefill", "heads": heads, "length": length, "mask": mask, "us": row})
                show(f"prefill, {heads} heads, {length} tokens, {mask or 'no mask'}", row)
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
