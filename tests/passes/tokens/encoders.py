"""Encoders as ONNX text: pre-norm layers of Attention and a feed-forward network, with one token or more in front."""

from __future__ import annotations

from tests.layer_stacks import weight

WIDTH = 8


def encoder(
    layers: int = 3,
    *,
    tokens: int | str = 12,
    front: int = 1,
    behind: int = 0,
    tail: str = "y = Identity(last)",
    outputs: str = "float[B, N, 8] y",
    mask: str = "",
    inputs: str = "",
    attributes: str = "",
    opset: int = 24,
    parallel: bool = False,
    windows: bool = False,
    raw: bool = False,
) -> str:
    """The text of a model with `layers` layers.

    Args:
        front, behind: tokens that are put around those of the input.
        tail: nodes behind the last hidden state, `last`.
        mask: the fourth input of each attention.
        attributes: of each attention besides its heads.
        parallel: attention and feed-forward network side by side.
        windows: attention over 4 tokens at a time.
        raw: attention as exporters of old write it.
    """
    parts = [f"float[B, {n}, {WIDTH}] {name}" for n, name in ((front, "c"), (tokens, "x"), (behind, "z")) if n]
    names = ", ".join(part.split()[-1] for part in parts)
    nodes, weights = [f"h0 = Concat<axis = 1>({names})"], []
    for i in range(layers):
        weights += [weight(f"{w}{i}", WIDTH, WIDTH) for w in ("wq", "wk", "wv", "wo", "wa", "wb")]
        weights += [weight(f"g{i}", WIDTH), weight(f"e{i}", WIDTH)]
        source = f"n{i}"
        nodes.append(f"n{i} = LayerNormalization<axis = -1>(h{i}, g{i})")
        if windows:
            nodes.append(f"w{i} = Reshape(n{i}, windows)")
            source = f"w{i}"
        nodes += [f"{x}{i} = MatMul({source}, w{x}{i})" for x in "qkv"]
        more = f", {mask}" if mask else ""
        given = f", {attributes}" if attributes else ""
        if raw:
            nodes += _raw(i)
        else:
            nodes.append(f"t{i} = Attention<q_num_heads = 2, kv_num_heads = 2{given}>(q{i}, k{i}, v{i}{more})")
        if windows:
            nodes.append(f"u{i} = Reshape(t{i}, whole)")
        nodes.append(f"o{i} = MatMul({'u' if windows else 't'}{i}, wo{i})")
        end = "last" if i == layers - 1 else f"h{i + 1}"
        if parallel:
            nodes += [f"f{i} = MatMul(n{i}, wa{i})", f"r{i} = Relu(f{i})", f"b{i} = MatMul(r{i}, wb{i})"]
            nodes += [f"s{i} = Add(o{i}, b{i})", f"{end} = Add(s{i}, h{i})"]
            continue
        nodes += [f"a{i} = Add(h{i}, o{i})", f"m{i} = LayerNormalization<axis = -1>(a{i}, e{i})"]
        nodes += [f"f{i} = MatMul(m{i}, wa{i})", f"r{i} = Relu(f{i})", f"b{i} = MatMul(r{i}, wb{i})"]
        nodes.append(f"{end} = Add(a{i}, b{i})")
    if windows:
        total = front + behind + int(tokens)
        weights += [f"int64[3] windows = {{-1, 4, {WIDTH}}}", f"int64[3] whole = {{-1, {total}, {WIDTH}}}"]
    weights += ["int64[4] heads = {0, 0, 2, 4}", f"int64[3] joined = {{0, 0, {WIDTH}}}", "float half = {0.5}"]
    weights += ["int64 i0 = {0}", "int64 i3 = {3}", "int64[1] one = {1}", "int64[1] end = {9223372036854775807}"]
    weights += [f"float[{WIDTH}] ones = {{{', '.join('1' * WIDTH)}}}"]
    weights.append(f"float[13, 1] table = {{{', '.join(map(str, range(13)))}}}")
    given = ", ".join([*parts, *([inputs] if inputs else [])])
    body = "\n".join([*nodes, tail])
    return f"""<ir_version: 10, opset_import: ["" : {opset}]>
    g ({given}) => ({outputs}) <{", ".join(weights)}> {{ {body} }}"""


def _raw(i: int) -> list[str]:
    perms = {"q": "0, 2, 1, 3", "k": "0, 2, 3, 1", "v": "0, 2, 1, 3"}
    nodes = [f"{x}r{i} = Reshape({x}{i}, heads)  {x}h{i} = Transpose<perm = [{p}]>({x}r{i})" for x, p in perms.items()]
    nodes += [f"s{i} = MatMul(qh{i}, kh{i})", f"sc{i} = Mul(s{i}, half)", f"p{i} = Softmax<axis = -1>(sc{i})"]
    nodes += [f"ph{i} = MatMul(p{i}, vh{i})", f"pt{i} = Transpose<perm = [0, 2, 1, 3]>(ph{i})"]
    return [*nodes, f"t{i} = Reshape(pt{i}, joined)"]
