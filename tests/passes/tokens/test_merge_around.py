"""merge-around against torch: a diffusion transformer and a net that segments, each branch merged and unmerged."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from planish.frontends.torch import capture  # noqa: E402
from planish.ir.errors import InputError  # noqa: E402
from planish.ir.graphs import dims_of  # noqa: E402
from planish.ir.names import ensure_names  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.passes.base import PassContext, PassResult  # noqa: E402
from planish.passes.defaults import default_pipeline  # noqa: E402
from planish.passes.manager import PassManager  # noqa: E402
from planish.passes.pipeline import parse_pipeline  # noqa: E402
from planish.passes.testing import apply_pass, check_declines, run_reference  # noqa: E402
from tests.passes.tokens.tome_torch import Tokens, merge  # noqa: E402

BEFORE = default_pipeline("ort-cpu").split(",lower-feed-forward,")[0]
WIDTH = 32


def around(branch: Any, x: Tensor, inner: Tensor, r: int, protected: int) -> Tensor:
    """A branch on merged tokens of `inner`, matched by `x`; every token gets the result of the one it is in."""
    if not r or x.shape[1] < 2:
        return branch(inner)
    tokens = Tokens()
    tokens.start(x)
    return tokens.unmerge(branch(merge(inner, x, tokens, r, protected)))


class Block(nn.Module):
    """A layer of DiT (arXiv 2212.09748): scales, shifts and gates come from the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.condition = nn.Linear(WIDTH, 6 * WIDTH)

    def attend(self, y: Tensor) -> Tensor:
        q, k, v = (p(y).unflatten(2, (4, -1)).transpose(1, 2) for p in self.qkv)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def feed(self, y: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(y), approximate="tanh"))

    def forward(self, x: Tensor, c: Tensor, r: tuple[int, int] = (0, 0), protected: int = 0) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c)[:, None].chunk(6, 2)
        y = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * around(self.attend, x, y, r[0], protected)
        y = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * around(self.feed, x, y, r[1], protected)


class Diffusion(nn.Module):
    """Patches and a condition to noise, dense."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.noise = nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor, c: Tensor, r: tuple[int, int] = (0, 0), protected: int = 0) -> Tensor:
        for block in self.blocks:
            x = block(x, c, r, protected)
        return self.noise(x)


class Segments(nn.Module):
    """A ViT that says of each pixel what it is, from an image of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.condition = nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, image: Tensor, r: tuple[int, int] = (0, 0)) -> Tensor:
        x = self.patches(image)
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, self.condition, r)
        return self.head(x).transpose(1, 2).unflatten(2, (height, width))


def built(cls: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return cls().eval()


def fused(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> Program:
    program = capture(module, inputs, shapes).program
    PassManager(parse_pipeline(BEFORE)).apply(program, PassContext(program.target))
    return program


def merged(program: Program, options: str) -> tuple[Program, PassResult]:
    copy = program.clone()
    return copy, apply_pass(f"merge-around{{{options}}}", copy)


@pytest.fixture(scope="module")
def diffusion() -> Program:
    shapes = {"x": {0: "batch", 1: "tokens"}, "c": {0: "batch"}}
    return fused(built(Diffusion), (torch.randn(2, 12, WIDTH), torch.randn(2, WIDTH)), shapes)


@pytest.mark.parametrize(
    "options, r, protected, fired",
    [("r=5", (5, 0), 0, 3), ("r=4,parts=['attention', 'ffn'],protected=1", (4, 4), 1, 6), ("r=99", (99, 0), 0, 3)],
)
@pytest.mark.parametrize("batch, tokens", [(2, 15), (1, 12), (3, 1)])
def test_diffusion_transformer(
    diffusion: Program, options: str, r: tuple[int, int], protected: int, fired: int, batch: int, tokens: int
) -> None:
    program, result = merged(diffusion, options)
    assert result.fired == fired and not result.declined
    model, x, c = built(Diffusion), torch.randn(batch, tokens, WIDTH), torch.randn(batch, WIDTH)
    with torch.no_grad():
        want = model(x, c, r, protected)
    (got,) = run_reference(program, {"x": x.numpy(), "c": c.numpy()}).values()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_only_some_layers(diffusion: Program) -> None:
    program, result = merged(diffusion, "ratio=0.25,layers=[1]")
    assert result.fired == 1 and result.notes == ["main: blocks: 25% of the tokens merge around 1 branches"]
    kinds = ("Attention", "MergeTokens", "UnmergeTokens", "MatMul", "LayerNormalization")
    before, after = ({k: sum(n.op_type == k for n in p.nodes()) for k in kinds} for p in (diffusion, program))
    assert after == before | {"MergeTokens": 1, "UnmergeTokens": 1}


def test_segmentation_of_images_of_any_size() -> None:
    model = built(Segments)
    shapes = {"image": {0: "batch", 2: torch.export.Dim("rows", min=1) * 4, 3: torch.export.Dim("columns", min=1) * 4}}
    program, result = merged(fused(model, (torch.randn(2, 3, 16, 20),), shapes), "ratio=0.5")
    assert result.fired == 2 and not result.declined
    for rows, columns in ((16, 20), (12, 12)):
        image = torch.randn(1, 3, rows, columns)
        with torch.no_grad():
            want = model(image, (rows * columns // 32, 0))
        (got,) = run_reference(program, {"image": image.numpy()}).values()
        assert got.shape == (1, 5, rows // 4, columns // 4)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_sizes_are_known() -> None:
    inputs = (torch.randn(2, 12, WIDTH), torch.randn(2, WIDTH))
    program, _ = merged(fused(built(Diffusion), inputs, None), "ratio=0.5,protected=2")
    attention = [node for node in program.nodes() if node.op_type == "Attention"]
    assert [dims_of(node.outputs[0]) for node in attention] == [(2, 7, WIDTH)] * 3


# --- what is declined ------------------------------------------------------------------------------------------------

HEADER = '<ir_version: 10, opset_import: ["" : 23]> g (float[n, 8, 4] h0, float[8, 1] places) => (float[n, 8, 4] h2)'
BODY = """a{i} = MatMul(h{i}, q{i})  b{i} = MatMul(h{i}, k{i})
        c{i} = Attention <q_num_heads = 2, kv_num_heads = 2CAUSAL> (a{i}, b{i}, b{i})
        d{i} = MatMul(c{i}, o{i})  SCALE  h{j} = Add(h{i}, e{i})"""


def text(causal: str = "", scale: str = "e{i} = Tanh(d{i})") -> Program:
    """Two layers of an attention alone."""
    body = BODY.replace("CAUSAL", causal).replace("SCALE", scale)
    source = f"{HEADER} {{ {body.format(i=0, j=1)} {body.format(i=1, j=2)} }}"
    rng = np.random.default_rng(0)
    names = [f"{kind}{i}" for i in range(2) for kind in "qko"]
    weights = [ir.tensor(rng.normal(size=(4, 4)).astype("f4"), name=name) for name in names]
    model = ir.from_onnx_text(source, initializers=weights)
    ensure_names(model)
    program = Program.single(model)
    apply_pass("infer-shapes", program)
    return program


def test_declines() -> None:
    assert apply_pass("merge-around{r=2}", text()).fired == 2
    check_declines(
        "merge-around{r=2}", text(causal=", is_causal = 1"), "is causal: a token must not learn of later ones"
    )
    check_declines(
        "merge-around{r=2}", text(scale="e{i} = Mul(d{i}, places)"), "reads 'places' by the places of tokens"
    )
    check_declines(
        "merge-around{r=2}", text(scale="e{i} = Softmax <axis = 1> (d{i})"), "Softmax 'Softmax_0' reads tokens"
    )
    check_declines("merge-around{r=2,protected=8}", text(), "of 8 tokens none is to merge")


def test_options() -> None:
    for options, message in {
        "": "give ratio= or r=; neither is given",
        "r=3,ratio=0.5": "both are given",
        "ratio=0.6": "ratio is 0.6; it is above 0 and at most 0.5",
        "r=0": "r is 0",
        "r=1,parts=['mlp']": "unknown part 'mlp'",
    }.items():
        with pytest.raises(InputError, match=message):
            parse_pipeline(f"merge-around{{{options}}}")
    with pytest.raises(Exception, match="layers names layer 2; 'stack 1' has the layers 0 to 1"):
        apply_pass("merge-around{r=1,layers=[2]}", text())
