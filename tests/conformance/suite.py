"""The ONNX backend test suite, run twice: by ONNX Runtime alone, and through `planish.optimize`.

The cases are those of the installed `onnx` package: its node tests, simple models, and models converted from
torch. A case that ONNX Runtime does not pass says nothing about us and only counts as such.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

import planish
from planish.runtime.tensors import from_ortvalue, to_ortvalue

# Cases of opsets newer than ONNX Runtime releases for run as far as its kernels go, on both sides.
os.environ.setdefault("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")

#: Newest file format that the pinned ONNX Runtime reads; the cases hold nothing that needs a later one.
IR_VERSION = 13
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")


@dataclass
class Result:
    """Counts over some cases, and each case that passes without us and fails with us."""

    total: int = 0
    plain: int = 0
    optimized: int = 0
    changed: int = 0
    regressions: list[tuple[str, str]] = field(default_factory=list)
    plain_failures: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Result) -> Result:
        return Result(
            self.total + other.total,
            self.plain + other.plain,
            self.optimized + other.optimized,
            self.changed + other.changed,
            self.regressions + other.regressions,
            self.plain_failures + other.plain_failures,
        )


@functools.cache
def cases() -> list[Any]:
    """All cases, in one fixed order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [case for kind in KINDS for case in load_model_tests(kind=kind)]
    return sorted(found, key=lambda case: (case.kind, case.name))


def run_cases(some: Iterable[Any], *, gates: bool = False) -> Result:
    """Runs cases both ways. `gates`: with the error and gain gates, on made-up inputs, as a user gets it."""
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    ort.set_default_logger_severity(4)
    result = Result()
    for case in some:
        result.total += 1
        model, sets = _load(case)
        model.ir_version = min(model.ir_version, IR_VERSION)
        failure = _attempt(lambda: _check(case, sets, _plain(model)))  # noqa: B023 - called at once
        if failure:
            result.plain_failures[failure.partition(":")[0]] += 1
            continue
        result.plain += 1
        executables: list[Any] = []
        failure = _attempt(lambda: _check(case, sets, _optimized(model, gates, executables)))  # noqa: B023
        if failure:
            result.regressions.append((f"{case.kind}/{case.name}", failure))
        else:
            result.optimized += 1
            result.changed += any(e.fired for exe in executables for e in exe.report.ledger.entries)
    return result


def _attempt(check: Callable[[], None]) -> str:
    """What went wrong, or an empty string."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    except Exception as error:  # any failure of a case is its result
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def _plain(model: onnx.ModelProto) -> Callable[[Sequence[Any]], list[Any]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    types = [item.type for item in (*session.get_inputs(), *session.get_outputs())]
    outputs = [item.name for item in session.get_outputs()]

    def run(values: Sequence[Any]) -> list[Any]:
        feeds = dict(zip(names, values, strict=False))
        if not any(kind in name for name in types for kind in ("bfloat16", "float8")):
            return list(session.run(None, feeds))
        # NumPy has no such dtypes, so these cross as OrtValues.
        items = {k: to_ortvalue(v, onnx.helper.np_dtype_to_tensor_dtype(v.dtype)) for k, v in feeds.items()}
        return [from_ortvalue(v, v.element_type()) for v in session.run_with_ort_values(outputs, items)]

    return run


def _optimized(model: onnx.ModelProto, gates: bool, kept: list[Any]) -> Callable[[Sequence[Any]], list[Any]]:
    budget = planish.Budget(seconds=0.2) if gates else planish.Budget(gates=False)
    exe = planish.optimize(model, "ort-cpu:threads=1", budget=budget)
    kept.append(exe)
    weights = {item.name for item in model.graph.initializer}
    names = [item.name for item in model.graph.input if item.name not in weights]
    outputs = [item.name for item in model.graph.output]

    def run(values: Sequence[Any]) -> list[Any]:
        results = exe.run(dict(zip(names, values, strict=False)))
        return [results[name] for name in outputs]

    return run


def _check(case: Any, sets: Sequence[Any], run: Callable[[Sequence[Any]], list[Any]]) -> None:
    for inputs, expected in sets:
        outputs = run([_array(v) for v in inputs])
        Runner.assert_similar_outputs([_array(v) for v in expected], outputs, case.rtol, case.atol)


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _load(case: Any) -> tuple[onnx.ModelProto, Sequence[tuple[list[Any], list[Any]]]]:
    if case.model is not None:
        return case.model, case.data_sets
    model = onnx.load(os.path.join(case.model_dir, "model.onnx"))
    sets = []
    for folder in sorted(glob.glob(os.path.join(case.model_dir, "test_data_set*"))):
        inputs = _read(folder, "input", [item.type for item in model.graph.input])
        sets.append((inputs, _read(folder, "output", [item.type for item in model.graph.output])))
    return model, sets


def _read(folder: str, kind: str, types: Sequence[onnx.TypeProto]) -> list[np.ndarray | list[Any] | None]:
    values: list[Any] = []
    for index in range(len(glob.glob(os.path.join(folder, f"{kind}_*.pb")))):
        with open(os.path.join(folder, f"{kind}_{index}.pb"), "rb") as file:
            content = file.read()
        which = types[index].WhichOneof("value")
        if which == "sequence_type":
            values.append(onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(content)))
        elif which == "optional_type":
            values.append(onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(content)))
        else:
            values.append(onnx.numpy_helper.to_array(onnx.TensorProto.FromString(content)))
    return values
