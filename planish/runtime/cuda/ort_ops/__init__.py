"""Operators for ONNX Runtime's CUDA provider by family: one file and one ``native/cuda_<family>.c`` each."""

from __future__ import annotations

from planish.runtime.cuda.ort_ops.attention import Attention
from planish.runtime.cuda.ort_ops.family import Family
from planish.runtime.cuda.ort_ops.merge import Merge
from planish.runtime.cuda.ort_ops.packed_attention import PackedAttention
from planish.runtime.cuda.ort_ops.swiglu import SwiGLU

FAMILIES: tuple[Family, ...] = (Attention(), Merge(), PackedAttention(), SwiGLU())
