"""What torch raises during a capture, as one line that says what, where, and what to do."""

from __future__ import annotations

import linecache
import re
import traceback
from typing import Any

import torch

from planish.ir.errors import InputError, UnsupportedError

_TORCH = re.compile(
    r"[/\\](torch|onnxscript|onnx_ir|onnx|planish[/\\]frontends|contextlib\.py|functools\.py)([/\\]|$|\.py)"
)
_DATA_DEPENDENT = (
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "UnsupportedOperatorException",
    "DynamicOutputShapeException",
)


def translate(
    error: BaseException,
    module: torch.nn.Module,
    stage: str,
    exported: torch.export.ExportedProgram | None = None,
) -> InputError:
    """The InputError for an exception of torch.export or of the ONNX exporter."""
    if isinstance(error, InputError):
        return error
    chain = _chain(error)
    text = "\n".join(str(e) for e in chain)
    where = _where(chain)
    name = type(module).__name__
    if "Constraints violated" in text or "specialized it to be a constant" in text:
        return InputError(f"dynamic_shapes do not fit {name}: {_constraints(text)}.")
    if any(type(e).__name__ in _DATA_DEPENDENT for e in chain):
        return UnsupportedError(
            f"{name} can not be captured: data-dependent control flow{where}: the path taken depends on the values "
            "of a tensor; compute it with torch.where or torch.cond, or move it out of forward."
        )
    if "dynamic_shapes" in text or "_check_dynamic_shapes" in text:
        return InputError(f"dynamic_shapes do not fit {name}: {first_line(chain[-1])}.")
    operator = _operator(text)
    if operator:
        path = _module_path(operator, exported)
        return UnsupportedError(
            f"{name} can not be captured: {stage} has no ONNX form of operator '{operator}'{path or where}; "
            "write it with supported operators, or move it out of the module."
        )
    unknown_type = re.search(r"Found <class '([^']+)'> in output", text)
    if unknown_type:
        return InputError(
            f"{name} can not be captured: forward returns a {unknown_type[1].split('.')[-1]}; return tensors, or "
            "tuples, lists and dicts of them."
        )
    if "not a known type" in text or "unexpected type" in text.lower() or "pytree" in text:
        return InputError(
            f"{name} can not be captured: {first_line(chain[-1])}. Return tensors, or tuples, lists and dicts of them."
        )
    return UnsupportedError(
        f"{name} can not be captured: {stage} failed{where}: {type(chain[-1]).__name__}: {first_line(chain[-1])}."
    )


def failed_eagerly(error: BaseException, module: torch.nn.Module) -> InputError:
    """The InputError for a module that raises on the example inputs by itself."""
    name, where = type(module).__name__, _where(_chain(error))
    return InputError(
        f"{name}.forward fails on the example inputs{where}: {type(error).__name__}: {first_line(error)}."
    )


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return chain


def first_line(error: BaseException, limit: int = 240) -> str:
    """The first line of an exception's text, cut to `limit` characters; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\s+", " ", lines[0] if lines else type(error).__name__).rstrip(".:")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _where(chain: list[BaseException]) -> str:
    """The innermost line outside of torch in the traceback: `` at file:line, in function: `code```."""
    for error in reversed(chain):
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if _is_users(frame.filename):
                code = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
                return f" at {frame.filename}:{frame.lineno}, in {frame.name}: `{code}`"
    return ""


def _is_users(filename: str) -> bool:
    return not filename.startswith("<") and not _TORCH.search(filename)


def _constraints(text: str) -> str:
    """Torch's findings and its suggestion, without the advice about logs."""
    found = [re.sub(r"\s+", " ", m).strip().rstrip(".") for m in re.findall(r"^\s*- (.+)$", text, re.M)]
    found = [re.sub(r"\. If you're using mark_dynamic.*", "", f) for f in dict.fromkeys(found)]
    fixes: list[str] = []
    if "Suggested fixes:" in text:
        tail = text.split("Suggested fixes:")[1].strip("\n").split("\n\n")[0]
        fixes = list(dict.fromkeys(line.strip() for line in tail.splitlines() if line.strip()))
    parts = "; ".join(found[:2]) or first_line(Exception(text))
    parts = re.sub(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", r"'\1' dim \2", parts)
    return parts + (f"; torch suggests: {', '.join(fixes)}" if fixes else "")


def _operator(text: str) -> str | None:
    for pattern in (
        r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>",
        r"No ONNX function found for ([\w.:<> ]+)",
        r"No decompositions registered for the (?:real|complex)-valued input.*?([\w.]+)",
        r"Unsupported FX nodes?: \{[^}]*'([\w.:]+)'",
    ):
        match = re.search(pattern, text)
        if match:
            return ".".join(g for g in match.groups() if g and g != "default").strip()
    return None


def _module_path(operator: str, exported: Any) -> str:
    if exported is None:
        return ""
    for node in exported.graph_module.graph.nodes:
        if node.op == "call_function" and operator in str(node.target):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path = stack[-1][0] if stack else ""
            source = user_source(node.meta.get("stack_trace"))
            return (f" in module '{path}'" if path else "") + (f" at {source}" if source else "")
    return ""


def user_source(stack_trace: str | None) -> str:
    """``file:line`` of the innermost frame outside of torch in a stack trace text."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack_trace or "")
    for filename, line in reversed(frames):
        if _is_users(filename):
            return f"{filename}:{line}"
    return ""
