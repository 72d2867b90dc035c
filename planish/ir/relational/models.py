"""RGCN, RGAT and HGT written in the relational language.

Each returns a program; sizes are those of one layer. Frontends have programs of their own for the options of PyG's
modules.
"""

from __future__ import annotations

import math

from planish.ir.relational.domains import EDGE_TYPE, NODE, NODE_TYPE, NONE
from planish.ir.relational.dsl import Layer
from planish.ir.relational.functions import (
    concat,
    count,
    dot,
    edge_softmax,
    gelu,
    leaky_relu,
    linear,
    sigmoid,
    tanh,
)
from planish.ir.relational.inter import Program


def rgcn(inputs: int, outputs: int) -> Program:
    """The relational graph convolution (Schlichtkrull et al. 2017, arXiv:1703.06103).

    ``y_v = sum over edges e into v of x_src W_type / |edges into v of that type| + x_v W0 + b``.

    Args:
        inputs, outputs: sizes of features.
    """
    g = Layer("rgcn")
    g.input("x", NODE, inputs)
    W = g.weight("W", EDGE_TYPE, inputs, outputs)
    root = g.weight("root", NONE, inputs, outputs)
    bias = g.weight("bias", NONE, outputs)
    for n in g.nodes():
        for e in n.incoming():
            n.h += linear(e.src.x, W[e.type]) / count(e, "dst_pair")
        n.y = n.h + linear(n.x, root) + bias
    return g.build(n.y)


def rgat(inputs: int, outputs: int, heads: int = 1) -> Program:
    """Relational graph attention (Busbridge et al. 2019, arXiv:1904.05811), additive and across relations.

    ``z = x W_type`` at both ends, ``a = softmax over edges into v of leaky_relu(<att_type, [z_src; z_dst]>)``,
    ``y_v = sum a z_src``. The result is (heads, outputs).
    """
    g = Layer("rgat")
    g.input("x", NODE, inputs)
    W = g.weight("W", EDGE_TYPE, inputs, heads * outputs)
    att = g.weight("att", EDGE_TYPE, heads, 2 * outputs)
    for e in g.edges():
        e.z = linear(e.src.x, W[e.type]).reshape(heads, outputs)
        e.z_dst = linear(e.dst.x, W[e.type]).reshape(heads, outputs)
        e.a = edge_softmax(leaky_relu(dot(concat(e.z, e.z_dst), att[e.type])))
    for n in g.nodes():
        for e in n.incoming():
            n.y += e.a.reshape(heads, 1) * e.z
    return g.build(n.y)


def hgt(inputs: int, outputs: int, heads: int = 1) -> Program:
    """The heterogeneous graph transformer (Hu et al. 2020, arXiv:2003.01332).

    Keys, queries and values are linears by node type, attention and messages go through a matrix by edge type and
    head; the softmax is over all edges into a node. The result, (heads * outputs), goes through gelu, a linear by node
    type, and a gate to x where sizes are the same.

    Args:
        inputs: size of features of all node types.
        outputs: size of one head.
        heads: how many.
    """
    g = Layer("hgt")
    wide = heads * outputs
    g.input("x", NODE, inputs)
    K, Q, V = (g.weight(name, NODE_TYPE, inputs, wide) for name in ("K", "Q", "V"))
    bk, bq, bv = (g.weight(name, NODE_TYPE, wide) for name in ("bk", "bq", "bv"))
    A, M = (g.weight(name, EDGE_TYPE, heads, outputs, outputs) for name in ("W_att", "W_msg"))
    mu = g.weight("mu", EDGE_TYPE, heads)
    out, b_out, skip = (
        g.weight("out", NODE_TYPE, wide, wide),
        g.weight("b_out", NODE_TYPE, wide),
        g.weight("skip", NODE_TYPE),
    )
    for n in g.nodes():
        n.k = linear(n.x, K[n.type], bk[n.type]).reshape(heads, outputs)
        n.q = linear(n.x, Q[n.type], bq[n.type]).reshape(heads, outputs)
        n.v = linear(n.x, V[n.type], bv[n.type]).reshape(heads, outputs)
    for e in g.edges():
        e.a = edge_softmax(dot(linear(e.src.k, A[e.type]), e.dst.q) * mu[e.type] / math.sqrt(outputs))
        e.m = linear(e.src.v, M[e.type])
    for n in g.nodes():
        for e in n.incoming():
            n.h += e.a.reshape(heads, 1) * e.m
        n.y = linear(gelu(n.h.reshape(wide)), out[n.type], b_out[n.type])
        if inputs == wide:
            gate = sigmoid(skip[n.type])
            n.y = gate * n.y + (1.0 - gate) * n.x
    return g.build(n.y)


def tanh_rgcn(inputs: int, outputs: int) -> Program:
    """RGCN as in the paper on Hector: no bias, one factor an edge given as data, and tanh."""
    g = Layer("tanh_rgcn")
    g.input("x", NODE, inputs)
    W, W0 = g.weight("W", EDGE_TYPE, inputs, outputs), g.weight("W0", NONE, inputs, outputs)
    for n in g.nodes():
        for e in n.incoming():
            n.h += linear(e.src.x, W[e.type]) / count(e, "dst_pair")
        n.y = tanh(n.h + linear(n.x, W0))
    return g.build(n.y)
