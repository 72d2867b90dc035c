"""Made-up inputs: right sizes, values that the operators accept, the same for the same seed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.errors import InputError, UnsupportedError
from planish.ir.inputs import synthesize
from planish.ir.printer import parse_model
from planish.ir.program import Program


def program(signature: str, body: str, weights: str = "") -> Program:
    head = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
    return Program.single(parse_model(f"{head}\ng ({signature}) {f'<{weights}>' if weights else ''} {{ {body} }}"))


def run(p: Program, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    data = ir.to_proto(p.main).SerializeToString()
    return list(ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, batch))


TABLES = "float[7, 2] words = {1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6}, float[2, 2] types = {1, 2, 3, 4}"


def encoder() -> Program:
    return program(
        "int64[batch, seq] input_ids, int32[batch, seq] token_type_ids, int64[s3, seq] attention_mask, "
        "int64[batch, seq] position_ids) => (float[batch, seq, 2] y",
        """
        two = Constant <value_int = 2> ()
        ids = Add (input_ids, two)
        wide = Cast <to = 7> (token_type_ids)
        a = Gather (words, ids)
        b = Gather (types, wide)
        c = Gather (words, position_ids)
        m = Cast <to = 1> (attention_mask)
        last = Constant <value_ints = [-1]> ()
        n = Unsqueeze (m, last)
        d = Add (a, b)
        e = Add (d, c)
        y = Mul (e, n)
        """,
        TABLES,
    )


def test_encoder_inputs() -> None:
    p = encoder()
    batch = synthesize(p)
    assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(batch, (2, 16))
    assert batch["input_ids"].max() <= 4  # seven rows, and the graph adds two
    assert set(batch["token_type_ids"].ravel()) <= {0, 1} and batch["token_type_ids"].dtype == np.int32
    assert batch["attention_mask"].tolist() == [[1] * 16, [1] * 12 + [0] * 4]
    assert batch["position_ids"][0].tolist() == [i % 7 for i in range(16)]
    run(p, batch)


def test_dims_and_seed() -> None:
    p = encoder()
    batch = synthesize(p, dims={"seq": 5, "batch": 1, "s3": 1})
    assert {v.shape for v in batch.values()} == {(1, 5)}
    assert batch["attention_mask"].all()
    same, other = synthesize(p, seed=3), synthesize(p, seed=4)
    assert all(np.array_equal(same[k], synthesize(p, seed=3)[k]) for k in same)
    assert not np.array_equal(same["input_ids"], other["input_ids"])
    with pytest.raises(InputError, match="unknown dimension 'sek'. Did you mean 'seq'"):
        synthesize(p, dims={"sek": 5})
    with pytest.raises(InputError, match="size of dimension 'seq' is 0; it must be"):
        synthesize(p, dims={"seq": 0})


def test_causal_decoder_sizes_agree() -> None:
    p = program(
        "int64[batch, seq] input_ids, int64[batch, total_len] attention_mask, float[batch, 2, past_len, 4] past_key, "
        "float[batch, 2, kv, 4] cache) => (int64[batch, seq] y, int64[batch, total_len] m, float[a, b, c, d] k, "
        "float[batch, 2, kv, 4] v",
        "y = Identity (input_ids) m = Identity (attention_mask) k = Identity (past_key) v = Identity (cache)",
    )
    shapes = {k: v.shape for k, v in synthesize(p).items()}
    assert shapes["input_ids"] == (2, 16) and shapes["past_key"] == (2, 2, 8, 4)
    assert shapes["attention_mask"] == (2, 24)
    p = program(
        'int64[batch, seq] ids, int64[batch, "past + seq"] mask, float[batch, 2, past, 4] kv) => (float[a, b, c, d] y',
        "y = Identity (kv)",
    )
    assert synthesize(p, dims={"past": 3})["mask"].shape == (2, 19)


@pytest.mark.parametrize(("rows", "side"), [(17, 64), (5, 32), (18, 64), (196, 224)])
def test_image_side_fits_the_position_embeddings(rows: int, side: int) -> None:
    p = program(
        "float[batch, channels, height, width] pixels, float[4, 3, 16, 16] w) => (float[a, b, c] y",
        """
        c = Conv <strides = [16, 16], kernel_shape = [16, 16]> (pixels, w)
        shape = Constant <value_ints = [0, 4, -1]> ()
        f = Reshape (c, shape)
        t = Transpose <perm = [0, 2, 1]> (f)
        y = Add (t, positions)
        """,
        f"float[1, {rows}, 4] positions = {{{', '.join(['0'] * (rows * 4))}}}",
    )
    batch = synthesize(p)
    assert batch["pixels"].shape == (2, 3, side, side)
    assert np.abs(batch["pixels"]).max() <= 3


def test_dtypes_and_domains() -> None:
    p = program(
        "float16[2] h, bfloat16[2] b, bool flag, bool[2] bits, string[3] s, uint8[1, 4, 4, 3] image, int64 length, "
        "float[50] positive, float[1, 1, 4, 4] attention_mask, int4[4] nibbles) => (float[50] y, float[1, 1, 4, 4] m",
        "y = Log (positive) one = Constant <value_float = 1.0> () m = Add (one, attention_mask)",
    )
    batch = synthesize(p)
    assert batch["h"].dtype == np.float16 and batch["b"].dtype == ml_dtypes.bfloat16
    assert batch["flag"].shape == () and batch["flag"].dtype == bool
    assert batch["s"].dtype == object and all(isinstance(w, str) for w in batch["s"])
    assert batch["image"].max() > 5 and batch["image"].dtype == np.uint8
    assert batch["length"].shape == () and batch["length"] > 0
    assert batch["positive"].min() > 0
    assert not batch["attention_mask"].any()  # added to scores: zeros mask nothing
    assert batch["nibbles"].dtype == ml_dtypes.int4


def test_operators_that_index() -> None:
    p = program(
        "int64[N, 2] pairs, int64[N] hot, int64[N, 3] ids, int64[4] through) => "
        "(float[N] y, float[N, 3] h, float[e, f] g, float[c, d] z",
        """
        y = GatherND (table, pairs)
        depth = Constant <value_int = 3> ()
        v = Constant <value_floats = [0.0, 1.0]> ()
        h = OneHot (hot, depth, v)
        z = GatherElements (table, ids)
        two = Constant <value_ints = [2, 2]> ()
        r = Reshape (through, two)
        s = Squeeze (r)
        first = Constant <value_int = 0> ()
        row = Gather (s, first)
        g = Gather (table, row)
        """,
        "float[5, 4] table = {" + ", ".join(["1"] * 20) + "}",
    )
    for seed in range(5):
        batch = synthesize(p, seed=seed)
        assert batch["pairs"].max() < 4 and batch["hot"].max() < 3
        run(p, batch)


def test_tables_are_found_inside_functions() -> None:
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 23, "my" : 1]>
        g (int64[N] ids) => (float[N, 2] y) <float[3, 2] t = {1, 2, 3, 4, 5, 6}> { y = my.Embed (t, ids) }
        <domain: "my", opset_import: ["" : 23]>
        Embed (table, i) => (r) { z = Constant <value_floats = [0.0, 0.0]> () u = Constant <value_ints = [3, 2]> ()
          w = Reshape (table, u) r = Gather (w, i) }
        """
    )
    table = next(n for n in model.functions["my", "Embed", ""] if n.op_type == "Reshape").outputs[0]
    table.shape = ir.Shape([3, 2])
    assert synthesize(Program.single(model))["ids"].max() < 3


def test_what_can_not_be_made_up() -> None:
    p = program("seq(float[2]) x) => (float[2] y", "zero = Constant <value_int = 0> () y = SequenceAt (x, zero)")
    with pytest.raises(UnsupportedError, match="input 'x' is no tensor"):
        synthesize(p)
    p = program("float[N, 100000] x) => (float[N, 100000] y", "y = Relu (x)")
    with pytest.raises(InputError, match="give smaller sizes by dims"):
        synthesize(p, dims={"N": 100_000})


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(
        st.sampled_from(["batch", "seq", "past_len", "s72", "height", "N", "?", "3"]), min_size=1, max_size=4
    ),
    kind=st.sampled_from(["float", "int64", "bool", "uint8", "float16"]),
    name=st.sampled_from(["x", "attention_mask", "position_ids", "lengths", "timestep", "pixel_values"]),
)
def test_any_signature_gets_the_declared_shape_and_dtype(names: list[str], kind: str, name: str) -> None:
    p = program(f"{kind}[{', '.join(names)}] {name}, {kind}[seq] other) => ({kind}[seq] y", "y = Identity (other)")
    batch = synthesize(p)
    specs = {spec.name: spec for spec in p.inputs()}
    sizes: dict[str, int] = {}
    for key, value in batch.items():
        spec = specs[key]
        assert spec.dtype is not None and value.dtype == ir.DataType(int(spec.dtype)).numpy()
        for dim, size in zip(spec.shape or (), value.shape, strict=True):
            assert size > 0
            if isinstance(dim, int):
                assert size == dim
            elif dim is not None:
                assert sizes.setdefault(dim, size) == size


def test_inputs_without_dimensions_are_arrays_too() -> None:
    p = program("float a, int64 b, bool c) => (float y", "d = Cast <to = 1> (b) y = Add (a, d)")
    for value in synthesize(p).values():
        assert type(value) is np.ndarray and value.shape == ()
