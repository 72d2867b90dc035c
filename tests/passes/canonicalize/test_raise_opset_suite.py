"""The operator cases of the onnx package at every older opset they are valid at: loaded and raised, same outputs.

A case is taken back by its opset import alone; where plain ONNX Runtime runs that, so must the raised program.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import defs

from planish.frontends.onnx import load_onnx
from planish.ir.compare import compare_outputs
from planish.ir.serialize import inline, to_proto_without_weights
from planish.passes.base import PassContext
from planish.passes.canonicalize.raise_opset import RaiseOpset

RANDOM = ("bernoulli", "random", "training_dropout")


def run(proto: onnx.ModelProto, feed: dict[str, object]) -> dict[str, object]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


def older(proto: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model at its own opset and at each older one where some operator is of another version."""
    current = next((o.version for o in proto.opset_import if o.domain == ""), None)
    seen = set()
    for version in range(current or 0, 6, -1):
        try:
            versions = tuple(defs.get_schema(n.op_type, version, n.domain).since_version for n in proto.graph.node)
        except defs.SchemaError:
            return
        if versions in seen or (proto.functions and version != current):
            continue
        seen.add(versions)
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        for entry in changed.opset_import:
            if entry.domain == "":
                entry.version = version
        yield changed


def check(stride: int) -> tuple[int, int, list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    same, raised, wrong = 0, 0, []
    for case in cases:
        skip = zlib.crc32(case.name.encode()) % stride or any(word in case.name for word in RANDOM)
        if skip or case.model is None or len(case.model.graph.input) != len(case.data_sets[0][0]):
            continue
        values = [onnx.numpy_helper.to_array(a) if hasattr(a, "dims") else a for a in case.data_sets[0][0]]
        feed = dict(zip([i.name for i in case.model.graph.input], values, strict=True))
        for proto in older(case.model):
            try:
                expected = run(proto, feed)
            except Exception:  # plain ORT does not run it: nothing to hold
                continue
            shown = f"{case.name} at {[o.version for o in proto.opset_import]}"
            try:
                program = load_onnx(proto)
                raised += RaiseOpset().apply(program, PassContext()).modified
                whole, weights = to_proto_without_weights(program.main)
                inline(whole, weights)
                error = compare_outputs(expected, run(whole, feed)).relative_l2
            except Exception as failure:
                wrong.append(f"{shown}: {failure}")
                continue
            same += error <= 1e-6
            if not np.isfinite(error) or error > 1e-6:
                wrong.append(f"{shown}: error {error}")
    return same, raised, wrong


# Some cases, taken back to an older opset, declare shapes that strict inference refuses and runtimes do not mind.
@pytest.mark.no_verify
def test_a_share_of_the_operator_cases() -> None:
    same, raised, wrong = check(stride=12)
    assert not wrong
    assert same > 100 and raised > 80


@pytest.mark.slow
@pytest.mark.no_verify
def test_all_operator_cases() -> None:
    same, raised, wrong = check(stride=1)
    assert not wrong
    assert same > 3000 and raised > 2500
