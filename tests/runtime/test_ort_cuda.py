"""Target ort-cuda: what is refused without a GPU, bindings on the memory of the host, and runs where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

import planish
from planish.ir.errors import ArtifactError, InputError, UnsupportedError
from planish.ir.machine import Gpu, Machine
from planish.ir.target import Target
from planish.passes.testing import program_of
from planish.runtime import ort_cuda
from planish.runtime.artifact import read_manifest
from planish.runtime.ort_device import DeviceRunner

torch = pytest.importorskip("torch")

CUDA, CPU = ort_cuda.PROVIDER, "CPUExecutionProvider"
MACHINE = Machine(
    gpus=(Gpu("a GPU", 75, 4 << 30, 3 << 30),), driver="580.82", cuda=(13, 0), providers=(CUDA, CPU),
    software={"onnxruntime": "1.31.1"},
)  # fmt: skip
OFF = planish.Budget(gates=False)
TEXT = """<ir_version: 10, opset_import: ["" : 23]>
g (float[n, 4] x, int64[1] k, bool[n, 4] b) => (float[n, 4] y, float[m] z)
{ t = Where(b, x, x)  y = Mul(t, t)  s = Reshape(x, k)  z = Exp(s) }"""
here = CUDA in ort.get_available_providers() and torch.cuda.is_available()
gpu = pytest.mark.skipif(not here, reason="no GPU, or an ONNX Runtime without CUDA")


def test_what_is_missing_is_one_line():
    cases = {
        "needs ONNX Runtime with CUDAExecutionProvider, and this build has CPU": replace(MACHINE, providers=(CPU,)),
        "needs a GPU; there are 0": replace(MACHINE, gpus=()),
        "needs a GPU; no driver": replace(MACHINE, gpus=(), no_gpu="no driver."),
        "is for sm_80, and a GPU is sm_75": MACHINE,
    }
    for message, machine in cases.items():
        with pytest.raises(UnsupportedError, match=message) as caught:
            ort_cuda.require(Target.parse("ort-cuda:sm_80"), machine)
        assert "\n" not in str(caught.value)
    ort_cuda.require(Target.parse("ort-cuda:sm_70"), MACHINE)
    with pytest.raises(UnsupportedError, match="GPU 1 would be the first"):
        ort_cuda.require(Target.parse("ort-cuda:cuda.device_id=1"), MACHINE)


def test_target_strings():
    text = "ort-cuda:memory=4GiB,dtype=float16,graphs=2,cuda.sdpa_kernel=8"
    target = Target.parse(text)
    assert str(target) == text and target.graphs == 2
    options = ort_cuda.provider_options(target, graph=True)
    assert options["gpu_mem_limit"] == str(4 << 30) and options["sdpa_kernel"] == "8"
    assert options["use_tf32"] == "0" and options["enable_cuda_graph"] == "1"
    with pytest.raises(InputError, match=r"unknown CUDA option 'cuda.sdpa_kernl'.*cuda.sdpa_kernel"):
        ort_cuda.provider_options(Target.parse("ort-cuda:cuda.sdpa_kernl=1"))
    with pytest.raises(InputError, match="graphs"):
        Target.parse("ort-cpu:graphs=2")
    specs = program_of(TEXT).inputs()
    assert ort_cuda.wants_graph(target, specs) == 2 and ort_cuda.wants_graph(Target.parse("ort-cuda"), specs) == 0
    assert ort_cuda.wants_graph(Target.parse("ort-cuda"), specs[1:2]) == 1


@pytest.mark.skipif(here, reason="there is a GPU")
def test_without_a_gpu_nothing_is_made(tmp_path):
    model = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match=r"^target 'ort-cuda' needs [^\n]*$"):
        planish.optimize(model, "ort-cuda", example_inputs=(torch.randn(2, 4),))
    with pytest.raises(UnsupportedError, match=r"without measuring, say budget=planish.Budget\(gates=False\)"):
        planish.optimize(model, "ort-cuda:sm_80", example_inputs=(torch.randn(2, 4),))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(32, 32) for _ in range(4))
        self.up, self.down, self.norm = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32), torch.nn.LayerNorm(32)

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.norm(x + self.o(y))
        return self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def elsewhere(block, tmp_path_factory):
    """An artifact for a GPU that this machine has not."""
    exe = planish.optimize(block, "ort-cuda:sm_121,dtype=float16", example_inputs=(torch.randn(2, 16, 32),), budget=OFF)
    with pytest.raises(UnsupportedError, match="which this machine has not: export it"):
        exe(torch.randn(2, 16, 32))
    return exe.export(tmp_path_factory.mktemp("artifact") / "made")


def test_made_for_another_machine(elsewhere):
    manifest = read_manifest(elsewhere)
    assert "no golden data" in manifest.notes[0]
    assert manifest.needs["gpus"] == 1 and manifest.needs["providers"] == [CUDA] and manifest.needs["memory"] > 10000
    ort_cuda.refuse(manifest, MACHINE, "it")


def test_loading_refuses_in_words(elsewhere):
    manifest = read_manifest(elsewhere)
    manifest.needs |= {"code": ["sm_80", "compute_80"], "cuda": [13, 0], "memory": 3 << 30}
    ort_cuda.refuse(manifest, replace(MACHINE, gpus=(Gpu("B", 86, 4 << 30),)), "it")
    for machine, message in (
        (MACHINE, r"needs a GPU for which it has code \(sm_80, compute_80\); GPU 0 \(a GPU, sm_75\) runs none of it"),
        (replace(MACHINE, cuda=(12, 4)), r"needs a driver for CUDA 13.0; driver 580.82 takes up to CUDA 12.4"),
        (replace(MACHINE, gpus=(Gpu("B", 90, 4 << 30, 1 << 30),)), r"3.00 GiB of GPU memory; .* 2.00 GiB too little"),
        (replace(MACHINE, gpus=(), no_gpu="no driver"), "needs a GPU; no driver"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            ort_cuda.refuse(manifest, machine, "it")
    if not here:
        with pytest.raises(UnsupportedError, match="can not run on this machine: it needs"):
            planish.load(elsewhere)


def test_needs_of_a_later_version(elsewhere):
    manifest = read_manifest(elsewhere)
    manifest.needs["qubits"] = 3
    with pytest.raises((InputError, ArtifactError), match="qubits"):
        ort_cuda.refuse(manifest, MACHINE, "it")


def on_host(graphs: int = 0, text: str = TEXT) -> DeviceRunner:
    """The runner of devices, on the memory of the host."""
    program = program_of(text)
    from planish.runtime.ort import open_session

    session, kept, _ = open_session(program.main, Target(), [CPU])
    return DeviceRunner(session, program.inputs(), program.outputs(), device="cpu", graphs=graphs, keep_alive=kept)


def feeds(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, 4)).astype("f4")
    return {"x": x, "k": np.array([4 * n]), "b": random.random((n, 4)) < 0.5}


@pytest.mark.parametrize("graphs", [0, 2])
def test_binding(graphs):
    runner = on_host(graphs)
    results = []
    for n, seed in ((3, 0), (5, 1), (3, 2), (1, 3), (3, 4)):  # with two graphs, the one for 3 is used again
        given = feeds(n, seed)
        got = runner.run(given)
        np.testing.assert_allclose(got["y"], given["x"] ** 2, rtol=1e-6)
        np.testing.assert_allclose(got["z"], np.exp(given["x"].ravel()), rtol=1e-5)
        results.append((got["y"], given["x"] ** 2))
    for got, want in results:  # outputs belong to the caller
        np.testing.assert_allclose(got, want, rtol=1e-6)
    as_torch = runner.run({name: torch.from_numpy(value) for name, value in feeds(2).items()})
    assert isinstance(as_torch["y"], torch.Tensor) and as_torch["y"].shape == (2, 4)
    assert len(runner._kept) == (2 if graphs else 0)


def test_buffers():
    runner = on_host()
    buffers = runner.buffers(feeds(3))
    buffers.run()
    x = buffers.view("x")
    x.fill_(3.0)
    buffers.view("b").fill_(True)
    buffers.run()
    assert (buffers.view("y") == 9).all() and buffers.view("b").dtype == torch.bool
    buffers.fill(feeds(3, 7))
    runner.prepared(feeds(4))()
    buffers.run()
    np.testing.assert_allclose(buffers.outputs(False)["y"], feeds(3, 7)["x"] ** 2, rtol=1e-6)


def test_wrong_inputs():
    runner = on_host()
    with pytest.raises(InputError, match="missing"):
        runner.run({"x": feeds(1)["x"]})
    with pytest.raises(InputError, match="x"):
        runner.run(feeds(2) | {"x": np.zeros((2, 5), "f4")})
    with pytest.raises(InputError, match="float64"):
        runner.run(feeds(2) | {"x": np.zeros((2, 4))})
    with pytest.raises(InputError, match="input 'x' is on meta"):
        runner.run(feeds(2) | {"x": torch.zeros(2, 4, device="meta")})
    assert runner.run(feeds(0))["y"].shape == (0, 4)


class _Info:
    name = "Cpu"


def test_inputs_that_are_read_on_the_host():
    """ONNX Runtime copies these when they are bound, so that they are bound again for each run."""
    runner = on_host()

    class Session:
        get_overridable_initializers = runner.session.get_overridable_initializers
        get_inputs, io_binding = runner.session.get_inputs, runner.session.io_binding

        def get_input_memory_infos(self):
            return [_Info(), _Info(), _Info()]

    there = DeviceRunner(Session(), runner.inputs, runner.outputs, graphs=3)  # type: ignore[arg-type]
    assert there.graphs == 0 and "read on the host" in there.notes[0] and there.host == {"x", "k", "b"}
    assert runner.host == set() and on_host(2).graphs == 2


def relative(got, want) -> float:
    got, want = (np.asarray(v.detach().cpu() if isinstance(v, torch.Tensor) else v, np.float64) for v in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@gpu
@pytest.mark.parametrize("options", ["graphs=0", "graphs=1", "graphs=2,memory=2GiB", "dtype=float16"])
def test_on_a_gpu(block, options, tmp_path):
    shape = ({0: "batch"},) if "graphs=2" in options else None
    x = torch.randn(2, 16, 32)
    exe = planish.optimize(block, f"ort-cuda:{options}", example_inputs=(x,), dynamic_shapes=shape, budget=OFF)
    limit = 2e-3 if "float16" in options else 1e-5
    exe.export(tmp_path / "a")
    for made in (exe, planish.load(tmp_path / "a")):
        assert made.runners["main"].notes == []
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(2 + seed * bool(shape), 16, 32)
            want = block(x)
            got = made(x.cuda())
            assert got.device.type == "cuda" and relative(got, want) < limit
            assert relative(made(x), want) < limit and made(x).device.type == "cpu"
            assert relative(made(x.numpy()), want) < limit and isinstance(made(x.numpy()), np.ndarray)
            again = made(torch.randn_like(x).cuda())
            assert relative(got, want) < limit and relative(again, want) > 0.1  # the first is the caller's own
    assert planish.verify(tmp_path / "a").ok if hasattr(planish, "verify") else True


@gpu
def test_gates_on_a_gpu(block):
    exe = planish.optimize(block, "ort-cuda:dtype=float16", example_inputs=(torch.randn(2, 16, 32),))
    print(exe.report.verdict)
    assert relative(exe(torch.ones(2, 16, 32).cuda()), block(torch.ones(2, 16, 32))) < 1e-2


@gpu
def test_bindings_on_a_gpu():
    program = program_of(TEXT, "ort-cuda:graphs=0")
    runner = ort_cuda.compile_ort_cuda(program.main, program.target)
    given = feeds(5)
    there = {name: torch.from_numpy(value).cuda() for name, value in given.items()}
    got = runner.run(there)
    assert got["z"].device.type == "cuda"
    assert relative(got["z"], np.exp(given["x"].ravel())) < 1e-5 and relative(got["y"], given["x"] ** 2) < 1e-6
    assert relative(runner.run(given | {"x": there["x"]})["y"], given["x"] ** 2) < 1e-6
    strided = torch.from_numpy(given["x"].T.copy()).cuda().T
    assert relative(runner.run(there | {"x": strided})["y"], given["x"] ** 2) < 1e-6
