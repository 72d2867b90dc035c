"""Operators for ONNX Runtime's CUDA provider by family: one file and one ``native/cuda_<family>.c`` each."""

from __future__ import annotations

from planish.ir.ops.relational import is_relational
from planish.runtime.cuda.ort_ops.attention import Attention
from planish.runtime.cuda.ort_ops.family import Family
from planish.runtime.cuda.ort_ops.merge import Merge
from planish.runtime.cuda.ort_ops.packed_attention import PackedAttention
from planish.runtime.cuda.ort_ops.quantized_linear import QuantizedLinear
from planish.runtime.cuda.ort_ops.relational import Relational
from planish.runtime.cuda.ort_ops.sparse_step import SparseStep
from planish.runtime.cuda.ort_ops.swiglu import SwiGLU

FAMILIES: tuple[Family, ...] = (Attention(), Merge(), PackedAttention(), QuantizedLinear(), SparseStep(), SwiGLU())

#: Of layers, whose operators are named after their programs.
_RELATIONAL: Family = Relational()
_BY_OPERATOR = {op: family for family in FAMILIES for op in family.operators}


def family_of(op: str) -> Family | None:
    """The family of an operator of planish's domain; None if it has no kernel."""
    return _RELATIONAL if is_relational(op) else _BY_OPERATOR.get(op)
