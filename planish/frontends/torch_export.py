"""torch.export and the ONNX exporter, run quietly, once, and without the decompositions that nothing needs."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch.export.graph_signature import SymIntArgument, TensorArgument

from planish.frontends.torch_attention import write_out_attention
from planish.frontends.torch_errors import failed_eagerly, translate
from planish.frontends.torch_inputs import Call
from planish.frontends.torch_shapes import DynamicShapes
from planish.ir.errors import InputError, UnsupportedError

OPSET = 23
_NOISY = ("torch", "onnxscript", "onnx_ir", "transformers")
_BITWISE = {"aten::__and__": "bitwise_and", "aten::__or__": "bitwise_or", "aten::__xor__": "bitwise_xor"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch and the exporter print, log and warn about: the caller gets our error or nothing."""
    # Loggers that exist are switched off one by one (many have a level of their own), those that an import
    # creates meanwhile inherit the level of their root.
    existing = list(logging.root.manager.loggerDict.items())
    loggers = [v for n, v in existing if isinstance(v, logging.Logger) and n.split(".")[0] in _NOISY]
    roots = [logging.getLogger(name) for name in _NOISY]
    flags, levels = [logger.disabled for logger in loggers], [root.level for root in roots]
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        for root in roots:
            root.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, flag in zip(loggers, flags, strict=True):
                logger.disabled = flag
            for root, level in zip(roots, levels, strict=True):
                root.setLevel(level)


@contextlib.contextmanager
def eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule's own training flag is restored."""
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, flag in flags:
            m.training = flag


def export_program(module: torch.nn.Module, call: Call, shapes: DynamicShapes) -> torch.export.ExportedProgram:
    """Runs torch.export (non-strict).

    Raises:
        InputError: the module can not be captured: data-dependent control flow, a dynamic dim that the module
            fixes, an output of an unknown type; the line says where.
    """
    try:
        with quiet(), _spread_forward(module, call):
            exported = torch.export.export(module, call.args, call.kwargs, dynamic_shapes=shapes.spec, strict=False)
    except Exception as error:
        raise _own_failure(module, call) or translate(error, module, "torch.export") from error
    if not any(isinstance(s.arg, TensorArgument | SymIntArgument) for s in exported.graph_signature.output_specs):
        raise InputError(f"{type(module).__name__}.forward returns no tensor; there is nothing to capture.")
    return exported


@contextlib.contextmanager
def _spread_forward(module: torch.nn.Module, call: Call) -> Iterator[None]:
    """Gives forward the call's signature meanwhile: torch.export does not take dynamic shapes with ``**kwargs``."""
    if call.signature == inspect.signature(module.forward):
        yield
        return
    own = module.__dict__.get("forward")
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    forward.__signature__ = call.signature  # type: ignore[attr-defined]
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _own_failure(module: torch.nn.Module, call: Call) -> InputError | None:
    """The error to report when the module fails on the example inputs without any capture."""
    copy = call.clone()
    try:
        with quiet():
            module(*copy.args, **copy.kwargs)
    except Exception as error:
        return failed_eagerly(error, module)
    return None


def to_onnx(module: torch.nn.Module, exported: torch.export.ExportedProgram) -> ir.Model:
    """Converts an exported program to ONNX. Weights share memory with the module.

    Raises:
        UnsupportedError: an operator without an ONNX counterpart (its name and the module that calls it).
    """
    _refuse_mutation(module, exported)
    # The exporter's own preparation traces the whole graph twice more to decompose it, although almost every
    # graph of a transformer holds only operators that it can translate as they are.
    simple = _simplify(exported.graph_module)
    original = exported.run_decompositions
    latest = exported

    def decompose(table: Any = None, **kwargs: Any) -> torch.export.ExportedProgram:
        nonlocal latest
        if not simple or table is None or _needs_decomposition(exported.graph_module, table):
            latest = original(table, **kwargs)
        return latest

    exported.run_decompositions = decompose  # type: ignore[method-assign]
    try:
        model = _convert(module, exported)
    except Exception as error:
        if latest is not exported:
            raise translate(error, module, "the ONNX exporter", latest) from error
        # An operator that only torch's decomposition takes apart: composite ones are in no table that could be asked.
        simple = False
        try:
            model = _convert(module, exported)
        except Exception as again:
            raise translate(again, module, "the ONNX exporter", latest) from again
    return model


def _convert(module: torch.nn.Module, exported: torch.export.ExportedProgram) -> ir.Model:
    with quiet():
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, verbose=False, verify=False, report=False, optimize=True
        )
    if program is None:
        raise UnsupportedError(f"the ONNX exporter returned nothing for {type(module).__name__}.")
    model: ir.Model = program.model
    return model


def _simplify(graph_module: torch.fx.GraphModule) -> bool:
    """Rewrites the few composite operators that have a one-to-one counterpart.

    Returns False when the graph has nested graphs or writes in place: then only torch's own decomposition will do.
    """
    nodes = [n for n in graph_module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    writes = any(n.target._schema.is_mutable and n.target.name() != "aten::detach_" for n in nodes)
    for node in nodes:
        name, _, overload = node.target.name().partition(".")
        if name in ("aten::to", "aten::detach_"):
            _simplify_to(graph_module.graph, node)
        elif name == "aten::clamp":
            _one_kind_of_bounds(node)
        elif name in _BITWISE and overload in ("Tensor", "Scalar"):
            node.target = getattr(getattr(torch.ops.aten, _BITWISE[name]), overload)
    write_out_attention(graph_module.graph)
    _leave_out_assertions(graph_module.graph)
    _leave_out_constants(graph_module.graph)
    return not writes and not any(isinstance(m, torch.fx.GraphModule) for m in graph_module.children())


def _simplify_to(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    source = node.args[0]
    if not isinstance(source, torch.fx.Node):
        return
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        if node in _outputs(graph):  # the signature has its name
            node.target, node.args, node.kwargs = torch.ops.aten.alias.default, (source,), {}
            return
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    else:
        node.target = torch.ops.aten._to_copy.default
        node.args, node.kwargs = (source,), {"dtype": dtype}


def _one_kind_of_bounds(node: torch.fx.Node) -> None:
    """The exporter refuses an integer bound of a float tensor next to a float bound."""
    if not node.meta["val"].dtype.is_floating_point:
        return
    node.args = tuple(float(x) if isinstance(x, int) else x for x in node.args)
    node.kwargs = {key: float(x) if isinstance(x, int) else x for key, x in node.kwargs.items()}


def _leave_out_assertions(graph: torch.fx.Graph) -> None:
    """Removes assertions about values, and what only they read: ONNX has no form of them, and they compute nothing."""
    for node in [n for n in graph.nodes if n.target is torch.ops.aten._assert_scalar.default]:
        pending = list(node.all_input_nodes)
        graph.erase_node(node)
        while pending:
            above = pending.pop()
            if above.op == "call_function" and not above.users:
                pending += above.all_input_nodes
                graph.erase_node(above)


def _leave_out_constants(graph: torch.fx.Graph) -> None:
    """Turns numbers and text among the outputs into None, which the exporter leaves out; it fails on the others."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    output.args = (tuple(x if isinstance(x, torch.fx.Node) else None for x in output.args[0]), *output.args[1:])


def _outputs(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    return set(next(n for n in reversed(graph.nodes) if n.op == "output").all_input_nodes)


def _needs_decomposition(graph_module: torch.fx.GraphModule, table: Any) -> bool:
    names = {op.name() for op in table if isinstance(op, torch._ops.OpOverload)}
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        if isinstance(node.target, torch._ops.OpOverload) and node.target.name() in names:
            return True
    return False


def _refuse_mutation(module: torch.nn.Module, exported: torch.export.ExportedProgram) -> None:
    """A program is a function: a module that keeps state between calls would silently lose it."""
    signature = exported.graph_signature
    written = list(signature.buffers_to_mutate.values())
    written += [
        str(target.args[0].target if isinstance(target.args[0], torch.fx.Node) else target.args[0])
        for target in exported.graph_module.graph.nodes
        if _writes_placeholder(target, signature)
    ]
    if written:
        raise UnsupportedError(
            f"{type(module).__name__} changes its buffer '{_buffer(written[0], signature)}' in forward; "
            "a captured program keeps no state between calls: return the new value as an output instead."
        )


def _writes_placeholder(node: torch.fx.Node, signature: Any) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if not node.target._schema.is_mutable or not node.args or not isinstance(node.args[0], torch.fx.Node):
        return False
    return node.args[0].name in signature.inputs_to_buffers


def _buffer(name: str, signature: Any) -> str:
    return str(signature.inputs_to_buffers.get(name, name))


def register_caches() -> None:
    """Lets a transformers key-value cache be an input or an output (its tensors become inputs and outputs)."""
    import sys

    if "transformers.cache_utils" not in sys.modules:
        return
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        from transformers.integrations import executorch

        executorch.register_dynamic_cache_export_support()  # type: ignore[no-untyped-call]
