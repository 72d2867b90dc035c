"""Sizes in buckets: padded runs give what exact ones give, for models that were made for ort-cuda, on the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planish
from planish.ir.buckets import Buckets
from planish.ir.errors import ArtifactError, InputError
from planish.ir.target import Target
from planish.passes.testing import program_of
from planish.runtime import ort_cuda
from planish.runtime.artifact import read_manifest
from planish.runtime.manifest import Manifest
from planish.runtime.ort import open_session
from planish.runtime.ort_buckets import BucketedRunner
from planish.runtime.ort_device import DeviceRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OFF = planish.Budget(gates=False)
SIZES = "batch:2/4+seq:8/16"
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
here = ort_cuda.PROVIDER in ort.get_available_providers() and torch.cuda.is_available()
gpu = pytest.mark.skipif(not here, reason="no GPU, or an ONNX Runtime without CUDA")


class First(torch.nn.Module):
    def __init__(self, module, *names, **options):
        super().__init__()
        self.module, self.names, self.options = module, names, options

    def forward(self, *values):
        return self.module(**dict(zip(self.names, values, strict=True)), **self.options)[0]


class Masked(First):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask)


class Single(First):
    def forward(self, x):
        return super().forward(x)


def bert():
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=24, **SMALL)
    model = Masked(transformers.BertModel(config, add_pooling_layer=False), "input_ids", "attention_mask")
    return model, (torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)), ({0: "batch", 1: "seq"},) * 2


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=24, bos_token_id=0, eos_token_id=0
    )
    model = Single(transformers.GPT2Model(config), "input_ids", use_cache=False)
    return model, (torch.randint(0, 50, (2, 9)),), ({0: "batch", 1: "seq"},)


def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SMALL)
    model = Single(transformers.ViTModel(config, add_pooling_layer=False), "pixel_values")
    return model, (torch.randn(2, 3, 16, 16),), ({0: "batch"},)


def convolutions():
    nn = torch.nn
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3), *head)
    return model, (torch.randn(2, 3, 16, 16),), ({0: "batch"},)


class Made:
    """A program for ort-cuda, on the memory of the host: exact, and in buckets."""

    def __init__(self, build) -> None:
        torch.manual_seed(0)
        model, example, shapes = build()
        sizes = SIZES if "seq" in str(shapes) else "batch:2/4"
        self.exe = planish.optimize(
            model.eval(), f"ort-cuda:sm_121,buckets={sizes}", example_inputs=example, dynamic_shapes=shapes, budget=OFF
        )
        offline = self.exe.runners["main"]
        self.buckets, self.notes = offline.buckets, offline.notes
        main = self.exe.program.main
        session, self.kept, _ = open_session(main, Target(), ["CPUExecutionProvider"])
        specs = self.exe.program.inputs(), self.exe.program.outputs()
        self.exact = DeviceRunner(session, *specs, device="cpu")
        self.padded = BucketedRunner(session, *specs, device="cpu", graphs=3, buckets=self.buckets)

    def feeds(self, batch: int, seq: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        found = {}
        for spec in self.exact.inputs:
            shape = [{"batch": batch, "seq": seq}.get(d, d) for d in spec.shape]
            if spec.name == "attention_mask":
                lengths = random.integers(1, seq + 1, (batch, 1))
                found[spec.name] = (np.arange(seq) < lengths).astype(np.int64)
            elif spec.dtype.name == "INT64":
                found[spec.name] = random.integers(0, 50, shape)
            else:
                found[spec.name] = random.standard_normal(shape).astype(np.float32)
        return found


MODELS = {build.__name__: build for build in (bert, gpt2, vit, convolutions)}


@pytest.fixture(scope="module")
def made():
    return {name: Made(build) for name, build in MODELS.items()}


def test_what_is_padded(made):
    assert made["bert"].buckets.sizes == {"batch": (2, 4), "seq": (8, 16)}
    assert made["bert"].buckets.fills == {"input_ids": 0.0, "attention_mask": 0.0}
    assert "each query sees a key that is no padding" in " ".join(made["bert"].notes)
    assert made["gpt2"].buckets.sizes == {"batch": (2, 4), "seq": (8, 16)}
    assert made["vit"].buckets.fills == {"pixel_values": None} or list(made["vit"].buckets.fills.values()) == [None]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 5), st.integers(2, 18), st.integers(0, 2**32))
def test_padding_changes_nothing(made, name, batch, seq, seed):
    model = made[name]
    feeds = model.feeds(batch, seq, np.random.default_rng(seed))
    want, got = model.exact.run(feeds), model.padded.run(feeds)
    for output, array in want.items():
        assert got[output].shape == array.shape and np.isfinite(array).all()
        np.testing.assert_allclose(got[output], array, rtol=1e-5, atol=1e-6)


def test_poison_where_anything_may_be(made):
    """Fills that are left open hold what a run before left there: here no numbers."""
    for name in ("vit", "convolutions"):
        model = made[name]
        random = np.random.default_rng(0)
        wide, feeds = model.feeds(4, 9, random), model.feeds(3, 9, random)
        model.padded.run({key: np.full_like(value, np.nan) for key, value in wide.items()})
        tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
        for output, array in model.exact.run(feeds).items():
            np.testing.assert_allclose(model.padded.run(feeds)[output], array, rtol=1e-5, atol=1e-6)
            assert isinstance(model.padded.run(tensors)[output], torch.Tensor)


def test_a_wrong_fill_shows(made):
    model = made["bert"]
    wrong = replace(model.buckets, fills=model.buckets.fills | {"attention_mask": 1.0})
    runner = BucketedRunner(model.exact.session, model.exact.inputs, model.exact.outputs, device="cpu", graphs=1,
                            buckets=wrong)  # fmt: skip
    feeds = model.feeds(2, 5, np.random.default_rng(0))
    assert np.abs(runner.run(feeds)["output_0"] - model.exact.run(feeds)["output_0"]).max() > 1e-3


def test_the_proof_is_measured(made):
    model, random = made["bert"], np.random.default_rng(0)
    for batch, seq in ((3, 5), (4, 16)):
        assert "differ from those without padding by" in model.padded.confirm(model.feeds(batch, seq, random), 1e-5)
    assert "not measured" in model.padded.confirm(model.feeds(5, 16, random), 1e-5)
    wrong = replace(model.buckets, fills=model.buckets.fills | {"attention_mask": 1.0})
    runner = BucketedRunner(model.exact.session, model.exact.inputs, model.exact.outputs, device="cpu", graphs=1,
                            buckets=wrong)  # fmt: skip
    feeds = model.feeds(2, 8, random)
    assert "not padded after all" in runner.confirm(feeds, 1e-5) and runner.buckets is None
    np.testing.assert_array_equal(runner.run(feeds)["output_0"], model.exact.run(feeds)["output_0"])


def test_few_sizes_are_kept(made):
    model, random = made["bert"], np.random.default_rng(1)
    for batch, seq in ((1, 2), (2, 8), (1, 5), (3, 16), (4, 12)):
        model.padded.run(model.feeds(batch, seq, random))
    assert len(model.padded._kept) <= 3
    shapes = [dict(key)["input_ids"] for key in model.padded._kept]
    assert set(shapes) <= {(b, s) for b in (2, 4) for s in (8, 16)} and (4, 16) in shapes and (2, 8) in shapes
    before = len(model.padded._kept)
    model.padded.run(model.feeds(5, 17, random))  # beyond the largest: as it is
    assert len(model.padded._kept) == before
    model.padded.prepared(model.feeds(3, 5, random))()
    with pytest.raises(InputError, match="attention_mask"):
        model.padded.run(model.feeds(2, 5, random) | {"attention_mask": np.ones((2, 6), np.int64)})


def test_artifacts_hold_the_proof(made, tmp_path):
    exe = made["bert"].exe
    exe.export(tmp_path / "a")
    manifest = read_manifest(tmp_path / "a")
    assert manifest.entries["main"].buckets == made["bert"].buckets
    assert manifest.target == "ort-cuda:sm_121,buckets=batch:2/4+seq:8/16"
    raw = manifest.to_bytes()
    assert Manifest.from_bytes(raw, "it").entries["main"].buckets == made["bert"].buckets
    for change in ({"seq": (0, 3)}, {"seq": (4, 3)}, {"length": (4,)}, {}):
        entry = replace(manifest.entries["main"], buckets=replace(made["bert"].buckets, sizes=change))
        broken = replace(manifest, entries={"main": entry})
        with pytest.raises(ArtifactError, match="does not follow the schema"):
            Manifest.from_bytes(broken.to_bytes(), "it")


def test_what_a_target_asks_for():
    text = "ort-cuda:buckets=batch:1/2/4+seq:32..100"
    assert Target.parse(text).buckets == (("batch", (1, 2, 4)), ("seq", (32, 64, 100)))
    assert Target.parse(str(Target.parse(text))) == Target.parse(text)
    for wrong in ("8", "batch", "batch:0", "batch:4..2", "batch:1+batch:2", "batch:x"):
        with pytest.raises(InputError, match="is not a list such as batch:1/2/4/8"):
            Target.parse(f"ort-cuda:buckets={wrong}")
    for other in ("ort-cpu", "tvm-cuda"):
        with pytest.raises(InputError, match="on 'ort-cuda' only"):
            Target.parse(f"{other}:buckets=batch:1")
    specs = program_of(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n] x) => (float[n] y) { y = Exp(x) }'
    ).inputs()
    buckets = Buckets({"n": (1, 2, 4)}, {"x": None}, {"y": ((0, "n", 0),)})
    assert ort_cuda.wants_graph(Target.parse("ort-cuda"), specs, buckets) == 3
    assert ort_cuda.wants_graph(Target.parse("ort-cuda:graphs=2"), specs, buckets) == 2
    assert (
        buckets.padded({"n": 3}) == {"n": 4} and buckets.padded({"n": 5}) is None and buckets.padded({"n": 0}) is None
    )
    assert buckets.kept("y", 2, {"n": 3}) == (slice(0, 3), slice(None))


@gpu
@pytest.mark.parametrize("dtype", ["", ",dtype=float16"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_on_a_gpu(name, dtype, tmp_path):
    torch.manual_seed(0)
    model, example, shapes = MODELS[name]()
    sizes = SIZES if "seq" in str(shapes) else "batch:2/4"
    target = f"ort-cuda:buckets={sizes}{dtype}"
    exe = planish.optimize(model.eval(), target, example_inputs=example, dynamic_shapes=shapes, budget=OFF)
    exe.export(tmp_path / "a")
    random = np.random.default_rng(0)
    for ran in (exe, planish.load(tmp_path / "a")):
        runner = ran.runners["main"]
        assert isinstance(runner, BucketedRunner) and runner.graphs == runner.buckets.count
        for _ in range(8):
            feeds = Made.feeds(
                type("M", (), {"exact": runner}), int(random.integers(1, 6)), int(random.integers(2, 18)), random
            )
            tensors = {key: torch.from_numpy(value).cuda() for key, value in feeds.items()}
            want = model(*(torch.from_numpy(v) for v in feeds.values())).detach().numpy()
            for got in (ran.run(feeds), ran.run(tensors)):
                array = next(iter(got.values()))
                array = array.cpu().numpy() if isinstance(array, torch.Tensor) else array
                assert array.shape == want.shape
                assert np.linalg.norm(array - want) / np.linalg.norm(want) < (3e-3 if dtype else 1e-5)
