"""One decode step's attention on ONNX Runtime's CPU provider, by the form of its key-value cache.

    python benchmarks/kv_cache.py [--json FILE] [--seconds N]

The figures behind the `decode` entry of causal language models: one new token per row over a cache of some length;
the cache is grown by Concat, by Attention itself, or preallocated and bound as input and output at once. One thread,
processor time, interleaved; all forms give the same values. `capacity` is what the preallocated forms hold.

A second table has TensorScatter alone: it writes in place exactly when its output is bound to the buffer of its input,
and copies the whole cache with any other output.
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
BATCHES = (1, 8)
LENGTHS = (64, 256, 1024, 2048)

#: name -> (declared inputs and outputs beside q, k, v, past_k, past_v; body). {h} heads, {g} key-value heads.
_GROWN = "float[b, {g}, t, 64] pk, float[b, {g}, t, 64] pv"
_HELD = "float[b, {g}, c, 64] pk, float[b, {g}, c, 64] pv"
_SCATTER = "pk = TensorScatter(past_k, k, at) pv = TensorScatter(past_v, v, at)"
_GQA = (
    "f = Shape(q) hd = Constant<value = int64[3] {{0, 1, -1}}>() qt = Transpose<perm = [0, 2, 1, 3]>(q) "
    "kt = Transpose<perm = [0, 2, 1, 3]>(k) vt = Transpose<perm = [0, 2, 1, 3]>(v) "
    "q3 = Reshape(qt, hd) k3 = Reshape(kt, hd) v3 = Reshape(vt, hd) "
    "y3, pk, pv = com.microsoft.GroupQueryAttention<num_heads = {h}, kv_num_heads = {g}{more}>"
    "(q3, k3, v3, past_k, past_v, last, total{caches}) y = Reshape(y3, f)"
)
_ROTARY = ", float[2304, 32] cos, float[2304, 32] sin"
FORMS: dict[str, tuple[str, str, str]] = {
    "concat": (
        "",
        _GROWN,
        "pk = Concat<axis = 2>(past_k, k) pv = Concat<axis = 2>(past_v, v) y = Attention(q, pk, pv)",
    ),
    "attention past": ("", _GROWN, "y, pk, pv = Attention(q, k, v, , past_k, past_v)"),
    "scatter, mask": (", int64[b] at, bool[b, 1, 1, c] mask", _HELD, _SCATTER + " y = Attention(q, pk, pv, mask)"),
    "scatter, lengths": (
        ", int64[b] at, int64[b] lengths",
        _HELD,
        _SCATTER + " y = Attention(q, pk, pv, , , , lengths)",
    ),
    "gqa": (", int32[b] last, int32[1] total", _HELD, _GQA.replace("{more}", "").replace("{caches}", "")),
    "gqa, rotary": (
        ", int32[b] last, int32[1] total" + _ROTARY,
        _HELD,
        _GQA.replace("{more}", ", do_rotary = 1").replace("{caches}", ", cos, sin"),
    ),
}
GROWS = ("concat", "attention past")


def model(form: str, heads: int, groups: int) -> bytes:
    more, outputs, body = FORMS[form]
    size = "t" if form in GROWS else "c"
    past = "p" if form in GROWS else "c"
    text = (
        '<ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1]> g '
        "(float[b, {h}, 1, 64] q, float[b, {g}, 1, 64] k, float[b, {g}, 1, 64] v, "
        f"float[b, {{g}}, {past}, 64] past_k, float[b, {{g}}, {past}, 64] past_v{more}) "
        f"=> (float[b, {{h}}, 1, 64] y, {outputs.replace(' t,', f' {size},')}) {{{{ {body} }}}}"
    )
    return ir.to_proto(ir.from_onnx_text(text.format(h=heads, g=groups))).SerializeToString()


class Step:
    """One form, bound to its buffers; a call is one decode step at the same position."""

    def __init__(self, form: str, heads: int, groups: int, feed: dict[str, np.ndarray], *, shared: bool = True) -> None:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 4
        settings.add_session_config_entry("session.set_denormal_as_zero", "1")
        self.session = ort.InferenceSession(model(form, heads, groups), settings, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.values: dict[str, Any] = {}
        for item in self.session.get_inputs():
            self.values[item.name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(feed[item.name]))
            self.binding.bind_ortvalue_input(item.name, self.values[item.name])
        self.binding.bind_output("y", "cpu")
        for name in ("k", "v"):
            if form in GROWS or not shared:
                self.binding.bind_output(f"p{name}", "cpu")
            else:
                self.binding.bind_ortvalue_output(f"p{name}", self.values[f"past_{name}"])

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def result(self) -> np.ndarray:
        self()
        first: np.ndarray = self.binding.get_outputs()[0].numpy()
        return first


def feeds(heads: int, groups: int, batch: int, length: int, capacity: int) -> tuple[dict[str, np.ndarray], ...]:
    """Inputs of the growing forms, and of the preallocated ones."""
    random = np.random.default_rng(length)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    feed = {"q": draw(batch, heads, 1, DEPTH), "k": draw(batch, groups, 1, DEPTH), "v": draw(batch, groups, 1, DEPTH)}
    pasts = {f"past_{name}": draw(batch, groups, length, DEPTH) for name in "kv"}
    held = {name: np.zeros((batch, groups, capacity, DEPTH), np.float32) for name in pasts}
    for name, past in pasts.items():
        held[name][:, :, :length] = past
    mask = np.arange(capacity) <= length
    fixed = {
        "at": np.full(batch, length, np.int64),
        "mask": np.broadcast_to(mask, (batch, 1, 1, capacity)),
        "lengths": np.full(batch, length + 1, np.int64),
        "last": np.full(batch, length, np.int32),
        "total": np.full(1, length + 1, np.int32),
        "cos": np.ones((2304, 32), np.float32),
        "sin": np.zeros((2304, 32), np.float32),
    }
    return feed | pasts, feed | held | fixed


def measure(heads: int, groups: int, batch: int, length: int, capacity: int, seconds: float) -> dict[str, Timing]:
    grown, held = feeds(heads, groups, batch, length, capacity)
    steps: dict[str, Callable[[], object]] = {}
    expected: np.ndarray | None = None
    for form in FORMS:
        step = Step(form, heads, groups, grown if form in GROWS else held)
        got = step.result()
        expected = got if expected is None else expected
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=form)
        steps[form] = step
    apart = Step("gqa", heads, groups, held, shared=False)
    steps["gqa, not shared"] = apart
    np.testing.assert_allclose(apart.result(), expected, rtol=1e-4, atol=1e-5)
    times = interleave(steps, seconds=seconds, clock="process")
    return {form: Timing.of(t) for form, t in times.items()}


def scatter(capacity: int, seconds: float) -> dict[str, float]:
    """Microseconds of TensorScatter alone, 12 heads of 64, in place and with an output of its own."""
    text = (
        '<ir_version: 10, opset_import: ["" : 24]> g (float[b, 12, c, 64] past, float[b, 12, 1, 64] new, int64[b] at) '
        "=> (float[b, 12, c, 64] y) { y = TensorScatter(past, new, at) }"
    )
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4  # it warns of every copy
    session = ort.InferenceSession(
        ir.to_proto(ir.from_onnx_text(text)).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    past, new = np.zeros((1, 12, capacity, 64), np.float32), np.ones((1, 12, 1, 64), np.float32)
    held = {"past": past, "new": new, "at": np.array([3])}
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in held.items()}
    runs: dict[str, Callable[[], object]] = {}
    for name in ("shared", "copied"):
        binding = session.io_binding()
        for key, value in values.items():
            binding.bind_ortvalue_input(key, value)
        if name == "shared":
            binding.bind_ortvalue_output("y", values["past"])
        else:
            binding.bind_output("y", "cpu")
        runs[name] = lambda binding=binding: session.run_with_iobinding(binding)  # type: ignore[misc]
    times = interleave(runs, seconds=seconds, clock="process")
    return {name: round(1e3 * Timing.of(t).median, 1) for name, t in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "kv_cache.json")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    arguments = parser.parse_args()
    names = [*FORMS, "gqa, not shared"]
    print(f"{'heads':>7} {'batch':>5} {'cache':>5} {'capacity':>8} " + " ".join(f"{n + ', us':>21}" for n in names))
    rows = []
    for heads, groups in HEADS:
        for batch in BATCHES:
            for length in LENGTHS:
                for capacity in (length + 1, 2 * length):
                    found = measure(heads, groups, batch, length, capacity, arguments.seconds)
                    us = {name: round(1e3 * t.median, 1) for name, t in found.items()}
                    row = {"heads": heads, "groups": groups, "batch": batch, "cache": length, "capacity": capacity}
                    rows.append(row | {"us": us})
                    print(
                        f"{f'{heads}/{groups}':>7} {batch:>5} {length:>5} {capacity:>8} "
                        + " ".join(f"{us[n]:>21.1f}" for n in names),
                        flush=True,
                    )
    print(f"TensorScatter alone: {'capacity':>8} {'shared, us':>11} {'copied, us':>11}")
    for capacity in (256, 1024, 4096):
        us = scatter(capacity, arguments.seconds)
        rows.append({"scatter": capacity, "us": us})
        print(f"{capacity:>29} {us['shared']:11.1f} {us['copied']:11.1f}")
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
