"""Graphs as TorchScript's exporter wrote them: shapes by Gather, norms and activations in parts, eager attention.

Hidden size 16, two heads of 8, weights at random; versions are converted up, so the opset is 23.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.ir.infer import infer_shapes
from planish.ir.printer import parse_model

HIDDEN, HEADS, DEPTH = 16, 2, 8
_CONSTANTS = """<int64 i0 = {0}, int64 i1 = {1}, int64[1] a0 = {0}, int64[1] last = {-1}, int64[1] heads = {2},
 int64[1] depth = {8}, int64[1] hidden = {16}, float root_depth = {2.8284270763397217}, float one = {1},
 float two = {2}, float three = {3}, float half = {0.5}, float root2 = {1.4142135381698608},
 float cubic = {0.044714998453855515}, float rate = {0.7978845834732056}, float eps = {1e-5}>"""


def bert(layers: int = 2, masking: str = "-10000.0") -> ir.Model:
    """Post-norm encoder; ids are embedded already; (1 - mask) * `masking` is added to the scores."""
    body = _padding(masking)
    h = "x"
    for i in range(layers):
        body += "".join(_linear(f"{r}{i}", h) + _heads(f"{r}{i}", perm) for r, perm in _ROLES)
        body += f"""
            s{i} = MatMul(q{i}_h, k{i}_h)
            sd{i} = Div(s{i}, root_depth)
            sm{i} = Add(sd{i}, mask)
            p{i} = Softmax<axis = 3>(sm{i})
            o{i} = MatMul(p{i}, v{i}_h)
        """
        body += _join(f"o{i}") + _linear(f"d{i}", f"o{i}_f") + f"r{i} = Add(d{i}, {h})\n" + _norm(f"n{i}", f"r{i}")
        body += _linear(f"u{i}", f"n{i}") + _gelu_erf(f"u{i}") + _linear(f"w{i}", f"u{i}_g")
        body += f"t{i} = Add(w{i}, n{i})\n" + _norm(f"y{i}", f"t{i}")
        h = f"y{i}"
    return _model(body + f"y = Identity({h})", "float[batch, seq, 16] x, int64[batch, seq] attention_mask")


def vit(layers: int = 2) -> ir.Model:
    """Pre-norm encoder of a fixed length, 5, without mask."""
    body, h = "", "x"
    for i in range(layers):
        body += _norm(f"n{i}", h) + "".join(_linear(f"{r}{i}", f"n{i}") + _heads(f"{r}{i}", p) for r, p in _ROLES)
        body += f"""
            s{i} = MatMul(q{i}_h, k{i}_h)
            sd{i} = Div(s{i}, root_depth)
            p{i} = Softmax<axis = -1>(sd{i})
            o{i} = MatMul(p{i}, v{i}_h)
        """
        body += _join(f"o{i}") + _linear(f"d{i}", f"o{i}_f") + f"r{i} = Add(d{i}, {h})\n" + _norm(f"l{i}", f"r{i}")
        body += _linear(f"u{i}", f"l{i}") + _gelu_erf(f"u{i}") + _linear(f"w{i}", f"u{i}_g")
        body += f"y{i} = Add(w{i}, r{i})\n"
        h = f"y{i}"
    return _model(body + f"y = Identity({h})", "float[batch, 5, 16] x", "float[batch, 5, 16] y")


def gpt2(layers: int = 2, fill: str = "-10000.0", padding: str = "") -> ir.Model:
    """Pre-norm decoder; one projection split in three; the causal mask is a slice of a constant, filled by Where.

    With `padding`, (1 - attention_mask) * `padding` is added to the filled scores.
    """
    body = (
        f"fill = Constant<value_float = {fill}>()\n triangle = Constant<value = bool[1, 1, 8, 8] {{{_TRIANGLE}}}>()\n"
    )
    body += _padding(padding) if padding else ""
    h = "x"
    for i in range(layers):
        body += (
            _norm(f"n{i}", h)
            + f"""
            qkv{i} = MatMul(n{i}, w_qkv{i})
            qkvb{i} = Add(qkv{i}, w_qkvb{i})
            q{i}, k{i}, v{i} = Split<axis = 2, num_outputs = 3>(qkvb{i})
        """
        )
        body += "".join(_heads(f"{r}{i}", perm) for r, perm in _ROLES)
        body += f"""
            len{i} = Shape(q{i}_h)
            i2_{i} = Constant<value_ints = [2]>()
            ns{i} = Gather(len{i}, i2_{i})
            i3_{i} = Constant<value_ints = [3]>()
            rows{i} = Slice(triangle, a0, ns{i}, i2_{i})
            part{i} = Slice(rows{i}, a0, ns{i}, i3_{i})
            s{i} = MatMul(q{i}_h, k{i}_h)
            sd{i} = Div(s{i}, root_depth)
            sf{i} = Where(part{i}, sd{i}, fill)
            sm{i} = {f"Add(sf{i}, mask)" if padding else f"Identity(sf{i})"}
            p{i} = Softmax<axis = -1>(sm{i})
            o{i} = MatMul(p{i}, v{i}_h)
        """
        body += _join(f"o{i}") + _linear(f"d{i}", f"o{i}_f") + f"r{i} = Add({h}, d{i})\n" + _norm(f"l{i}", f"r{i}")
        body += _linear(f"u{i}", f"l{i}") + _gelu_tanh(f"u{i}") + _linear(f"w{i}", f"u{i}_g")
        body += f"y{i} = Add(r{i}, w{i})\n"
        h = f"y{i}"
    mask = ", int64[batch, seq] attention_mask" if padding else ""
    return _model(body + f"y = Identity({h})", f"float[batch, seq, 16] x{mask}")


def distilbert(layers: int = 2, fill: str = "-3.4028234663852886e38") -> ir.Model:
    """Post-norm encoder; queries scaled, the scores filled where an expanded mask is zero; 4-D targets with -1."""
    body = f"fill = Constant<value_float = {fill}>()\n i2 = Constant<value_ints = [2]>()\n"
    body += "ones = Constant<value_ints = [1]>()\n zero_id = Constant<value_int = 0>()\n"
    h = "x"
    for i in range(layers):
        body += "".join(_linear(f"{r}{i}", h) for r, _ in _ROLES)
        for role, perm in _ROLES:
            body += _dims(f"{role}{i}")
            body += f"""
                {role}{i}_to = Concat<axis = 0>({role}{i}_b, last, heads, depth)
                {role}{i}_r = Reshape({role}{i}, {role}{i}_to)
                {role}{i}_h = Transpose<perm = [{perm}]>({role}{i}_r)
            """
        body += f"""
            qd{i} = Div(q{i}_h, root_depth)
            s{i} = MatMul(qd{i}, k{i}_h)
            off{i} = Equal(attention_mask, zero_id)
            to{i} = Concat<axis = 0>(q{i}_b, ones, ones, k{i}_l)
            view{i} = Reshape(off{i}, to{i})
            full{i} = Shape(s{i})
            wide{i} = Expand(view{i}, full{i})
            sm{i} = Where(wide{i}, fill, s{i})
            p{i} = Softmax<axis = -1>(sm{i})
            o{i} = MatMul(p{i}, v{i}_h)
            o{i}_t = Transpose<perm = [0, 2, 1, 3]>(o{i})
        """
        body += _dims(f"o{i}_t")
        body += f"""
            o{i}_to = Concat<axis = 0>(o{i}_t_b, last, hidden)
            o{i}_f = Reshape(o{i}_t, o{i}_to)
        """
        body += _linear(f"d{i}", f"o{i}_f") + f"r{i} = Add(d{i}, {h})\n" + _norm(f"n{i}", f"r{i}")
        body += _linear(f"u{i}", f"n{i}") + _gelu_erf(f"u{i}") + _linear(f"w{i}", f"u{i}_g")
        body += f"t{i} = Add(w{i}, n{i})\n" + _norm(f"y{i}", f"t{i}")
        h = f"y{i}"
    return _model(body + f"y = Identity({h})", "float[batch, seq, 16] x, int64[batch, seq] attention_mask")


def _padding(low: str) -> str:
    return f"""
        low = Constant<value_float = {low}>()
        axes = Constant<value_ints = [1]>()
        m1 = Unsqueeze(attention_mask, axes)
        axes2 = Constant<value_ints = [2]>()
        m2 = Unsqueeze(m1, axes2)
        m3 = Cast<to = 1>(m2)
        m4 = Sub(one, m3)
        mask = Mul(m4, low)
    """


_ROLES = (("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("v", "0, 2, 1, 3"))
_TRIANGLE = ", ".join("1" if column <= row else "0" for row in range(8) for column in range(8))


def _linear(name: str, x: str) -> str:
    return f"{name}_m = MatMul({x}, w_{name})\n {name} = Add(w_{name}b, {name}_m)\n"


def _dims(name: str) -> str:
    return f"""
        {name}_s0 = Shape({name})
        {name}_b0 = Gather<axis = 0>({name}_s0, i0)
        {name}_b = Unsqueeze({name}_b0, a0)
        {name}_l0 = Gather<axis = 0>({name}_s0, i1)
        {name}_l = Unsqueeze({name}_l0, a0)
    """


def _heads(name: str, perm: str) -> str:
    return (
        _dims(name)
        + f"""
        {name}_to = Concat<axis = 0>({name}_b, {name}_l, heads, depth)
        {name}_r = Reshape({name}, {name}_to)
        {name}_h = Transpose<perm = [{perm}]>({name}_r)
    """
    )


def _join(name: str) -> str:
    return (
        f"{name}_t = Transpose<perm = [0, 2, 1, 3]>({name})\n"
        + _dims(f"{name}_t")
        + f"""
        {name}_to = Concat<axis = 0>({name}_t_b, {name}_t_l, hidden)
        {name}_f = Reshape({name}_t, {name}_to)
    """
    )


def _norm(name: str, x: str) -> str:
    return f"""
        {name}_mu = ReduceMean({x}, last)
        {name}_d = Sub({x}, {name}_mu)
        {name}_sq = Pow({name}_d, two)
        {name}_var = ReduceMean({name}_sq, last)
        {name}_ve = Add({name}_var, eps)
        {name}_sd = Sqrt({name}_ve)
        {name}_n = Div({name}_d, {name}_sd)
        {name}_g = Mul({name}_n, w_{name}g)
        {name} = Add({name}_g, w_{name}b)
    """


def _gelu_erf(name: str) -> str:
    return f"""
        {name}_d = Div({name}, root2)
        {name}_e = Erf({name}_d)
        {name}_a = Add({name}_e, one)
        {name}_x = Mul({name}, {name}_a)
        {name}_g = Mul({name}_x, half)
    """


def _gelu_tanh(name: str) -> str:
    return f"""
        {name}_h = Mul({name}, half)
        {name}_p = Pow({name}, three)
        {name}_c = Mul({name}_p, cubic)
        {name}_s = Add({name}, {name}_c)
        {name}_a = Mul({name}_s, rate)
        {name}_t = Tanh({name}_a)
        {name}_1 = Add({name}_t, one)
        {name}_g = Mul({name}_h, {name}_1)
    """


def _model(body: str, inputs: str, output: str = "float[batch, seq, 16] y") -> ir.Model:
    import re

    sizes = {"qkv": "[16, 48]", "qkvb": "[48]", "u": "[16, 32]", "ub": "[32]", "w": "[32, 16]"}
    weights = ""
    for name in sorted(set(re.findall(r"\bw_(\w+)", body))):
        kind = re.sub(r"\d+", "", name)
        vector = kind.endswith("b") or kind in ("ng", "lg", "yg")
        weights += f", float{sizes.get(kind, '[16]' if vector else '[16, 16]')} w_{name}"
    text = f'<ir_version: 10, opset_import: ["" : 23]> old ({inputs}{weights}) => ({output}) {_CONSTANTS} {{ {body} }}'
    model = parse_model(text, infer=False)
    rng = np.random.default_rng(0)
    for value in [v for v in model.graph.inputs if (v.name or "").startswith("w_")]:
        model.graph.inputs.remove(value)
        assert value.shape is not None
        value.const_value = ir.tensor(rng.standard_normal(value.shape.numpy(), dtype=np.float32) * 0.3)
        model.graph.register_initializer(value)
    infer_shapes(model)
    return model
