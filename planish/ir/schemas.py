"""Operator schemas in the form that checking needs: arities and attributes, cached, one call per node.

Three sources: onnx's registry, the planish dialect, and the model's own functions. Contrib operators of ONNX
Runtime have no schema outside its binary, so they are taken as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

#: Domains (with those below them) that ONNX Runtime implements and that no Python package describes.
OPAQUE_DOMAINS = ("com.microsoft", "com.ms.internal", "org.pytorch.aten")
DIALECT_DOMAIN = "planish"
#: What onnx gives as the number of inputs or outputs of operators that take any number.
VARIADIC = 2**31 - 1


@dataclass(frozen=True)
class OpRecord:
    """What a node must look like. `attributes`: name → type, or None where any type will do."""

    min_inputs: int
    max_inputs: int
    min_outputs: int
    max_outputs: int
    attributes: Mapping[str, ir.AttributeType | None]
    required: tuple[str, ...]
    needed_inputs: tuple[int, ...] = ()
    deprecated_since: int = 0


def is_opaque(domain: str) -> bool:
    """Whether nodes of this domain are taken as they are."""
    return domain in OPAQUE_DOMAINS or domain.startswith(tuple(f"{name}." for name in OPAQUE_DOMAINS))


@functools.lru_cache(maxsize=4096)
def onnx_record(domain: str, op_type: str, version: int) -> OpRecord | None:
    """The record of an operator at an opset version; None if onnx knows no such operator there."""
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    attributes = {name: ir.AttributeType(int(item.type.value)) for name, item in schema.attributes.items()}
    required = tuple(name for name, item in schema.attributes.items() if item.required)
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    needed = tuple(i for i, item in enumerate(schema.inputs) if item.option == single)
    return OpRecord(
        schema.min_input,
        schema.max_input,
        schema.min_output,
        schema.max_output,
        attributes,
        required,
        needed,
        schema.since_version if schema.deprecated else 0,
    )


def function_record(function: ir.Function) -> OpRecord:
    """The record of a model-local function: trailing inputs and outputs may be left out."""
    attributes = {
        name: None if item.type == ir.AttributeType.UNDEFINED else item.type
        for name, item in function.attributes.items()
    }
    return OpRecord(0, len(function.inputs), 0, len(function.outputs), attributes, ())


def min_ir_version(model: ir.Model) -> int:
    """The ir_version that the model's opset needs, and at least 10 (types of values in functions)."""
    opset = onnx.helper.make_opsetid("", model.graph.opset_imports.get("", 1))
    return max(10, int(onnx.helper.find_min_ir_version_for([opset], ignore_unknown=True)))
