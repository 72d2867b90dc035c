"""The driver of memory budgets: a captured decoder is cut along its layers, and its parts are lowered."""

from __future__ import annotations

import onnx_ir as ir

from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.defaults import lowering
from planish.passes.manager import PassManager
from planish.passes.pipeline import parse_pipeline
from planish.runtime.offload.pieces import Lower
from planish.runtime.offload.split import Split, split_decoder


def lower_for(target: Target) -> Lower:
    """What chooses the forms of one part for a target."""
    passes = parse_pipeline(",".join(("infer-shapes", *lowering(target))))

    def lower(model: ir.Model) -> ir.Model:
        program = Program.single(model, target)
        PassManager(passes).apply(program, PassContext(target))
        return program.main

    return lower


def split_for(decode: ir.Model, target: Target) -> Split:
    """The entry ``decode``, captured with chunks and not lowered, in parts that are.

    Raises:
        UnsupportedError: it can not be cut along its layers.
    """
    return split_decoder(decode, lower_for(target))
