"""Small graphs of which a dimension may be padded, and such of which it may not."""

from __future__ import annotations

HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> g '
WEIGHT = "float[4, 4] w = {1, -2, 3, 1, 0.5, 2, -1, 0, 1, 1, 2, -3, 0, 1, -1, 2}"
LOW = "float zero = {0}, float low = {-3.4e38}"


def text(signature: str, body: str, constants: str = "") -> str:
    return f"{HEADER} {signature} <{constants}> {{ {body} }}" if constants else f"{HEADER} {signature} {{ {body} }}"


MASKED = """q = MatMul(x, w) t = Transpose<perm = [0, 2, 1]>(x) s = MatMul(q, t) b = Cast<to = 9>(mask)
  u = Unsqueeze(b, one) a = Where(u, zero, low) f = Add(s, a) p = Softmax<axis = -1>(f) y = MatMul(p, x)"""
#: name → (signature, body, constants, dimension): what may be padded.
HOLDS = {
    "rows of products": ("(float[n, 4] x) => (float[n, 4] y)", "h = MatMul(x, w) y = Relu(h)", WEIGHT, "n"),
    "columns of products": ("(float[4, n] x) => (float[4, n] y)", "y = MatMul(w, x)", WEIGHT, "n"),
    "attention with a mask": (
        "(float[b, n, 4] x, int64[b, n] mask) => (float[b, n, 4] y)",
        MASKED,
        f"{WEIGHT}, {LOW}, int64[1] one = {{1}}",
        "n",
    ),
    "the same, its batch": (
        "(float[b, n, 4] x, int64[b, n] mask) => (float[b, n, 4] y)",
        MASKED,
        f"{WEIGHT}, {LOW}, int64[1] one = {{1}}",
        "b",
    ),
    "a causal mask of positions": (
        "(float[b, n, 4] x) => (float[b, n, 4] y)",
        """sh = Shape<start = 1, end = 2>(x) l = Squeeze(sh) r = Range(c0, l, c1) k = Unsqueeze(r, a0)
        q = Unsqueeze(r, a1)
        m = LessOrEqual(k, q)
        t = Transpose<perm = [0, 2, 1]>(x) s = MatMul(x, t) f = Where(m, s, low)
        p = Softmax<axis = -1>(f) y = MatMul(p, x)""",
        f"int64 c0 = {{0}}, int64 c1 = {{1}}, int64[1] a0 = {{0}}, int64[1] a1 = {{1}}, {LOW}",
        "n",
    ),
    "causal by Trilu": (
        "(float[b, n, 4] x) => (float[b, n, 4] y)",
        """sh = Shape<start = 1, end = 2>(x) d = Concat<axis = 0>(sh, sh) o = ConstantOfShape<value = float[1] {1}>(d)
        m = Trilu<upper = 0>(o) c = Cast<to = 9>(m) t = Transpose<perm = [0, 2, 1]>(x) s = MatMul(x, t)
        f = Where(c, s, low) p = Softmax<axis = -1>(f) y = MatMul(p, x)""",
        LOW,
        "n",
    ),
    "mean of what a mask keeps": (
        "(float[b, n, 4] x, int64[b, n] mask) => (float[b, 4] y)",
        """m = Cast<to = 1>(mask) u = Unsqueeze(m, two) h = Mul(x, u) s = ReduceSum<keepdims = 0>(h, one)
        c = ReduceSum<keepdims = 0>(u, one) y = Div(s, c)""",
        "int64[1] one = {1}, int64[1] two = {2}",
        "n",
    ),
    "running sums": ("(float[n, 4] x) => (float[n, 4] y)", "y = CumSum(x, axis)", "int64 axis = {0}", "n"),
    "a recurrent layer": (
        "(float[n, b, 2] x) => (float[n, 1, b, 2] y)",
        "y = RNN<hidden_size = 2>(x, v, r)",
        "float[1, 2, 2] v = {1, 0.5, -1, 2}, float[1, 2, 2] r = {0.1, 0.5, 0.2, -1}",
        "n",
    ),
    "its batch": (
        "(float[n, b, 2] x) => (float[n, 1, b, 2] y, float[1, b, 2] z)",
        "y, z = RNN<hidden_size = 2>(x, v, r)",
        "float[1, 2, 2] v = {1, 0.5, -1, 2}, float[1, 2, 2] r = {0.1, 0.5, 0.2, -1}",
        "b",
    ),
    "the first token": ("(float[b, n, 4] x) => (float[b, 4] y)", "y = Gather<axis = 1>(x, i)", "int64 i = {0}", "n"),
    "positions from a table": (
        "(float[b, n, 4] x) => (float[b, n, 4] y)",
        """sh = Shape<start = 1, end = 2>(x) t = Slice(table, a0, sh, a1) i = Gather(w, t) y = Add(x, i)""",
        f"{WEIGHT}, int64[1, 4] table = {{0, 1, 2, 3}}, int64[1] a0 = {{0}}, int64[1] a1 = {{1}}",
        "n",
    ),
    "ids that count what is no padding": (
        "(int64[b, n] ids) => (float[b, n, 4] y)",
        """e = Equal(ids, pad) k = Not(e) i = Cast<to = 7>(k) s = CumSum(i, one) m = Mul(s, i) y = Gather(w, m)""",
        f"{WEIGHT}, int64 pad = {{3}}, int64 one = {{1}}",
        "n",
    ),
    "axes side by side": (
        "(float[b, n, 4] x) => (float[b, n, 2, 2] y)",
        "f = Reshape(x, rows) h = MatMul(f, w) g = Shape<end = 2>(x) t = Concat<axis = 0>(g, heads) y = Reshape(h, t)",
        f"{WEIGHT}, int64[2] rows = {{-1, 4}}, int64[2] heads = {{2, 2}}",
        "b",
    ),
    "a token in front": (
        "(float[b, n, 4] x) => (float[b, m, 4] y)",
        "c = Slice(x, z, o, o) d = Concat<axis = 1>(c, x) y = Relu(d)",
        "int64[1] z = {0}, int64[1] o = {1}",
        "n",
    ),
    "images": (
        "(float[n, 1, 4, 4] x) => (float[n, 1, 1, 1] y)",
        """c = Conv<kernel_shape = [2, 2]>(x, k) b = BatchNormalization(c, s, z, z, s)
        p = MaxPool<kernel_shape = [2, 2]>(b)
        y = ReduceMean(p, hw)""",
        "float[1, 1, 2, 2] k = {1, 2, -1, 1}, float[1] s = {2}, float[1] z = {1}, int64[2] hw = {2, 3}",
        "n",
    ),
    "operators of ONNX Runtime": (
        "(float[b, n, 4] x, int64[b, n] mask) => (float[b, n, 4] y)",
        """m = Cast<to = 6>(mask)
        a = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x, , m)
        y = com.microsoft.SkipLayerNormalization(a, x, g, g)""",
        "float[4] g = {1, 2, 1, 0.5}",
        "n",
    ),
    "the token with the largest number": (
        "(float[b, n] x, float[b, n, 4] z) => (float[b, 4] y)",
        """a = ArgMax<axis = 1, keepdims = 0>(x) s = Shape<end = 1>(x) l = Squeeze(s) r = Range(c0, l, c1)
        i = Unsqueeze(r, one) j = Unsqueeze(a, one) k = Concat<axis = 1>(i, j) y = GatherND(z, k)""",
        "int64 c0 = {0}, int64 c1 = {1}, int64[1] one = {1}",
        "b",
    ),
    "two layers of causal attention in a window": (
        "(float[b, n, 4] x) => (float[b, n, 4] z)",
        """sh = Shape<start = 1, end = 2>(x) l = Squeeze(sh) r = Range(c0, l, c1) k = Unsqueeze(r, a0)
        q = Unsqueeze(r, a1) f = Sub(q, c2) m1 = LessOrEqual(k, q) m2 = Greater(k, f) m3 = And(m1, m2)
        m = Unsqueeze(m3, a01) y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, m)
        z = Attention<q_num_heads = 2, kv_num_heads = 2>(y, y, y, m)""",
        "int64 c0 = {0}, int64 c1 = {1}, int64 c2 = {2}, int64[1] a0 = {0}, int64[1] a1 = {1}, int64[2] a01 = {0, 1}",
        "n",
    ),
    "causal attention": (
        "(float[b, n, 4] x) => (float[b, n, 4] y)",
        "y = Attention<is_causal = 1, q_num_heads = 2, kv_num_heads = 2>(x, x, x)",
        "",
        "n",
    ),
}
#: name → (signature, body, constants, dimension, the reason).
DECLINED = {
    "mean over tokens": (
        "(float[b, n, 4] x) => (float[b, 4] y)",
        "y = ReduceMean<keepdims = 0>(x, one)",
        "int64[1] one = {1}",
        "n",
        "ReduceMean 'ReduceMean_0': averages over n",
    ),
    "sum": (
        "(float[n, 4] x) => (float[4] y)",
        "h = Exp(x) y = ReduceSum<keepdims = 0>(h, z)",
        "int64[1] z = {0}",
        "n",
        "reduces over n, and its operand is not known in the padding",
    ),
    "maximum": (
        "(float[n, 4] x) => (float[4] y)",
        "y = ReduceMax<keepdims = 0>(x, z)",
        "int64[1] z = {0}",
        "n",
        "its operand is 0 in the padding",
    ),
    "softmax over the batch": (
        "(float[n, 4] x) => (float[n, 4] y)",
        "y = Softmax<axis = 0>(x)",
        "",
        "n",
        "spreads over n",
    ),
    "attention without a mask": (
        "(float[b, n, 4] x) => (float[b, n, 4] y)",
        "y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x)",
        "",
        "n",
        "sees keys in the padding of n",
    ),
    "the same by products": (
        "(float[b, n, 4] x) => (float[b, n, 4] y)",
        "t = Transpose<perm = [0, 2, 1]>(x) s = MatMul(x, t) p = Softmax<axis = -1>(s) y = MatMul(p, x)",
        "",
        "n",
        "Softmax 'Softmax_0': spreads over n",
    ),
    "hidden keys whose values may be no numbers": (
        "(float[b, n, 4] x, int64[b, n] mask) => (float[b, n, 4] y)",
        "l = Log(x) m = Cast<to = 6>(mask) y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, l, , m)",
        "",
        "n",
        "may be no numbers",
    ),
    "a window, and padding in front": (
        "(float[b, n, 4] x, bool[b, 1, 1, n] mask) => (float[b, n, 4] z)",
        """sh = Shape<start = 1, end = 2>(x) l = Squeeze(sh) r = Range(c0, l, c1) k = Unsqueeze(r, a0)
        q = Unsqueeze(r, a1) f = Sub(q, c2) m1 = LessOrEqual(k, q) m2 = Greater(k, f) m3 = And(m1, m2)
        m4 = Unsqueeze(m3, a01) m = And(m4, mask) y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, m)
        z = Attention<q_num_heads = 2, kv_num_heads = 2>(y, y, y, m)""",
        "int64 c0 = {0}, int64 c1 = {1}, int64 c2 = {2}, int64[1] a0 = {0}, int64[1] a1 = {1}, int64[2] a01 = {0, 1}",
        "n",
        "may be no numbers",
    ),
    "a mask that does not hide enough": (
        "(float[b, n, 4] x, int64[b, n] mask) => (float[b, n, 4] y)",
        MASKED,
        f"{WEIGHT}, float zero = {{0}}, float low = {{-100}}, int64[1] one = {{1}}",
        "n",
        "not known to be hidden",
    ),
    "statistics of the batch": (
        "(float[n, 2, 4] x) => (float[n, 2, 4] y)",
        "y, m, v = BatchNormalization<training_mode = 1>(x, s, s, s, s)",
        "float[2] s = {1, 1}",
        "n",
        "statistics of this batch",
    ),
    "flip": (
        "(float[n, 4] x) => (float[n, 4] y)",
        "y = Slice(x, s, e, a, s)",
        "int64[1] s = {-1}, int64[1] e = {-9999}, int64[1] a = {0}",
        "n",
        "does not begin at its start",
    ),
    "the last token": (
        "(float[b, n, 4] x) => (float[b, 4] y)",
        "y = Gather<axis = 1>(x, i)",
        "int64 i = {-1}",
        "n",
        "may be padding",
    ),
    "the largest token": (
        "(float[b, n] x) => (int64[b] y)",
        "y = ArgMax<axis = 1, keepdims = 0>(x)",
        "",
        "n",
        "picks among all of n",
    ),
    "sums from the end": (
        "(float[n, 4] x) => (float[n, 4] y)",
        "h = Exp(x) y = CumSum<reverse = 1>(h, z)",
        "int64 z = {0}",
        "n",
        "from the end of n",
    ),
    "a size as a number": (
        "(float[n, 4] x) => (float[n, 4] y)",
        "s = Shape<end = 1>(x) f = Cast<to = 1>(s) y = Div(x, f)",
        "",
        "n",
        "reads the size of n",
    ),
    "a recurrent layer backwards": (
        "(float[n, b, 2] x) => (float[n, 1, b, 2] y)",
        'y = RNN<hidden_size = 2, direction = "reverse">(x, v, v)',
        "float[1, 2, 2] v = {1, 0.5, -1, 2}",
        "n",
        "goes back from the end",
    ),
    "its last state": (
        "(float[n, b, 2] x) => (float[1, b, 2] z)",
        "y, z = RNN<hidden_size = 2>(x, v, v)",
        "float[1, 2, 2] v = {1, 0.5, -1, 2}",
        "n",
        "behind the padding of n",
    ),
    "something behind it": (
        "(float[n, 4] x) => (float[m, 4] y)",
        "y = Concat<axis = 0>(x, w)",
        WEIGHT,
        "n",
        "puts something behind n",
    ),
    "an index of unknown numbers": (
        "(float[n, 4] x) => (float[n, 4] y)",
        "e = Exp(x) h = ReduceMax<keepdims = 0>(e, one) i = Cast<to = 7>(h) y = Gather(w, i)",
        f"{WEIGHT}, int64[1] one = {{1}}",
        "n",
        "may lie outside",
    ),
    "an axis with both": (
        "(float[b, n, 4] x) => (float[m, 4] y)",
        "y = Reshape(x, s)",
        "int64[2] s = {-1, 4}",
        "n",
        "output 'y' has it in an axis with other things",
    ),
    "over images": (
        "(float[1, 1, n, 4] x) => (float[1, 1, m, 3] y)",
        "y = Conv<kernel_shape = [2, 2]>(x, k)",
        "float[1, 1, 2, 2] k = {1, 2, -1, 1}",
        "n",
        "works across n",
    ),
    "noise": (
        "(float[n, 4] x) => (float[n, 4] y)",
        "r = RandomNormalLike(x) y = Add(x, r)",
        "",
        "n",
        "RandomNormalLike 'RandomNormalLike_0': has no rule",
    ),
}
