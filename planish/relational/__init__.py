"""Relational graph neural networks: write a layer in a small language, look at it, run it.

>>> from planish import relational as rel
>>> g = rel.Layer("rgcn")
>>> g.input("x", rel.NODE, 16)
>>> W = g.weight("W", rel.EDGE_TYPE, 16, 8)
>>> for n in g.nodes():
...     for e in n.incoming():
...         n.h += rel.linear(e.src.x, W[e.type])
...     n.y = rel.relu(n.h)
>>> program = g.build(n.y)
"""

from planish.ir.relational.autodiff import Differentiated, differentiate
from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, SRC_PAIR
from planish.ir.relational.dsl import Layer
from planish.ir.relational.dsl_rows import Weight
from planish.ir.relational.dsl_values import Value
from planish.ir.relational.functions import (
    absolute,
    accumulate,
    concat,
    count,
    dot,
    edge_softmax,
    elu,
    erf,
    exp,
    expand,
    gelu,
    leaky_relu,
    linear,
    log,
    maximum,
    minimum,
    part,
    relu,
    sigmoid,
    silu,
    sqrt,
    step,
    tanh,
)
from planish.ir.relational.graph import Graph
from planish.ir.relational.inter import Program
from planish.ir.relational.interpret import interpret
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.pipeline import run_passes
from planish.relational.compiled import CompiledProgram, compile

__all__ = [
    "DST_PAIR",
    "EDGE",
    "EDGE_TYPE",
    "NODE",
    "NODE_TYPE",
    "NONE",
    "SRC_PAIR",
    "CompiledProgram",
    "Differentiated",
    "Graph",
    "Layer",
    "Program",
    "Statistics",
    "Value",
    "Weight",
    "absolute",
    "accumulate",
    "compile",
    "concat",
    "count",
    "differentiate",
    "dot",
    "edge_softmax",
    "elu",
    "erf",
    "exp",
    "expand",
    "gelu",
    "interpret",
    "leaky_relu",
    "linear",
    "log",
    "maximum",
    "minimum",
    "part",
    "relu",
    "run_passes",
    "sigmoid",
    "silu",
    "sqrt",
    "step",
    "tanh",
]
