"""Captures that tests share: the same module with the same inputs is captured once a process.

Most tests that capture a model are about what comes after, and many take the same small models. A capture is known by
everything that it is made from, weights and configuration included; what has no such description (a class inside of
a function) is captured each time. The tests of capturing itself do not use this.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import pickle
import sys
from collections import OrderedDict
from typing import Any

from planish.ir.target import Target

_HOME = "planish.frontends.torch"
_MOST = 64
_STAGES = ("torch.export", "onnx", "names")

_enabled = False
_original: Any = None
_kept: OrderedDict[bytes, tuple[Any, bytes, Any]] = OrderedDict()


def use(enabled: bool) -> None:
    """Switches sharing on or off; called before each test, as the frontend may have been imported meanwhile."""
    global _enabled, _original
    _enabled = enabled
    if _HOME not in sys.modules:
        return
    _original = _original or sys.modules[_HOME].capture
    for name, module in list(sys.modules.items()):
        # Modules hold the function by name.
        if name.startswith(("planish.frontends.", "tests.")) and vars(module).get("capture") is _original:
            module.capture = _capture  # type: ignore[attr-defined]


def _capture(
    module: Any,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    target: Any = "ort-cpu",
    *,
    kwargs: Any = None,
    progress: Any = None,
) -> Any:
    def key() -> bytes | None:
        return _digest((module, example_inputs, dynamic_shapes, kwargs)) if _enabled else None

    before = key()
    if before in _kept:
        held, then, fresh = _kept[before]
        # The program reads the memory of the module that was captured, which its test may have changed since.
        if _digest(held) == then:
            _kept.move_to_end(before)
            for stage in _STAGES if progress else ():
                progress(stage)
            return _copy(fresh, target)
        del _kept[before]
    captured = _original(module, example_inputs, dynamic_shapes, target, kwargs=kwargs, progress=progress)
    if before is not None and (after := key()) is not None:
        _kept[before] = (module, example_inputs, dynamic_shapes, kwargs), after, _copy(captured, target)
        if len(_kept) > _MOST:
            _kept.popitem(last=False)
    return captured


def _copy(captured: Any, target: Any) -> Any:
    program = dataclasses.replace(captured.program.clone(), target=Target.parse(target))
    check = dataclasses.replace(captured.check, program=program)
    return dataclasses.replace(
        captured, program=program, check=check, example={name: array.copy() for name, array in captured.example.items()}
    )


def _digest(item: Any) -> bytes | None:
    """A hash of everything that `item` holds; None where a part has no description."""
    stream = io.BytesIO()
    try:
        _Pickler(stream, protocol=5).dump(item)
    except Exception:
        return None
    return hashlib.sha256(stream.getbuffer()).digest()


class _Pickler(pickle.Pickler):
    """Tensors by their contents, and classes that are another one under a new name."""

    def reducer_override(self, obj: Any) -> Any:
        import torch

        if isinstance(obj, torch.Tensor):
            data = obj.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            facts = (type(obj).__qualname__, str(obj.dtype), tuple(obj.shape), obj.stride(), obj.requires_grad)
            return tuple, ((facts, hashlib.sha256(data.data).digest()),)
        if isinstance(obj, type) and set(vars(obj)) <= {"__module__", "__doc__", "__qualname__"} and not _found(obj):
            return type, (obj.__name__, obj.__bases__, {})
        return NotImplemented


def _found(cls: type) -> bool:
    return getattr(importlib.import_module(cls.__module__), cls.__qualname__, None) is cls
