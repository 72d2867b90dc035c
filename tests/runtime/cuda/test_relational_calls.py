"""What operators of relational layers launch, with a stand-in for the driver: no GPU, and no compiler of CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from planish.ir.relational.models import rgat, rgcn
from planish.runtime.cuda.ort_ops.relational import _described
from planish.runtime.kernels.linker import compiler
from tests.runtime.cuda.test_relational_ops import optimized

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_LIBRARY_PATH")

#: Runs a layer on the CPU's provider, with no code in the place of kernels; says what is launched.
_SCRIPT = """
import sys
from pathlib import Path
import onnx_ir as ir, onnxruntime as ort
from planish.ir.relational.models import rgat, rgcn
from planish.runtime.cuda import ort_library
from planish.runtime.cuda.ort_ops import family, relational
from tests.runtime.cuda import test_relational_ops as ops

folder, name, constant = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
family.binary = relational.generated_binary = lambda *_: b"no code"
link = ort_library.link

def on_cpu(sources, objects, output, includes, defines):
    driver = next(path for path in sources if path.name == "driver.c")
    text = driver.read_text()
    changed = text.replace('"CUDAExecutionProvider"', "NULL")
    assert changed != text
    (folder / "driver.c").write_text(changed)
    link([folder / "driver.c" if path == driver else path for path in sources], objects, output, includes, defines)

ort_library.link = on_cpu
program = ops.optimized({"rgcn": rgcn(8, 8), "rgat": rgat(9, 7, 3), "parts": ops.parts(6, 4)}[name])
counts = (30, 20) if name == "parts" else (61,)
a, b, none = (ops.random_graph(seed, counts, 3, edges) for seed, edges in ((1, 900), (2, 900), (3, 0)))
hubs = ops.GRAPHS["power law"]
graphs = [hubs, hubs] if constant else [a, b, a, none] if name == "parts" else [a, b, a, none, hubs]
model = ops.model_of(program, graphs[0], constant)
settings = ort.SessionOptions()
settings.log_severity_level = 4
settings.register_custom_ops_library(str(ort_library.library_for([model]).path))
session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings)
for graph in graphs:
    print("call", flush=True)
    feeds = ops.feeds_of(program, graph, constant=constant)
    for output, value in zip(program.outputs, session.run(None, feeds), strict=True):
        assert value.shape == (graph.num_nodes, *program.variable(output).shape)
if graphs[-1].num_edges and not constant:
    feeds["edge_index"] = feeds["edge_index"].copy()
    feeds["edge_index"][1, 7] = 61
    print("call", flush=True)
    try:
        session.run(None, feeds)
    except Exception as error:
        print(str(error).splitlines()[0].rpartition("Message: ")[2], flush=True)
"""


def calls(tmp_path: Path, name: str, constant: bool) -> list[list[str]]:
    """Lines of each call."""
    source = Path(__file__).with_name("driver_stand_in.c")
    subprocess.run([*compiler(), "-shared", "-fPIC", "-w", "-o", tmp_path / "libcuda.so.1", source], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path), name, str(constant)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "race" not in done.stdout.splitlines()  # nothing runs before tables and zeros are there
    found: list[list[str]] = []
    for line in done.stdout.splitlines():
        if line == "call":
            found.append([])
        else:
            found[-1].append(line)
    return found


def names(lines: list[str]) -> list[str]:
    return [line.split()[1] for line in lines if line.startswith("launch ")]


def test_edges_that_change(tmp_path: Path) -> None:
    described = _described(str(optimized(rgcn(8, 8))))
    assert described is not None
    first, second = (g.symbol for g in described.kernels.values())
    new, other, old, none, hubs, wrong = calls(tmp_path, "rgcn", False)
    assert names(new) == [first, second] and new[0] == f"clear {61 * 8 * 4}"
    assert names(other) == ["relational_edges", first, second]  # compared with the first graph's, and not the same
    assert names(old) == ["relational_edges", "relational_edges", first, second]  # the one before, then the first
    assert names(none) == [second]
    assert names(hubs) == [f"{first}_parts", first, second]
    assert names(wrong) == ["relational_edges"] and wrong[-1] == "destinations: edge 7 has 61; there are 61, so 0 to 60"


def test_constant_edges_are_looked_at_once(tmp_path: Path) -> None:
    described = _described(str(optimized(rgat(9, 7, 3))))
    assert described is not None
    first, second = calls(tmp_path, "rgat", True)
    assert first == second and "relational_edges" not in names(first)
    assert names(first) == [g.symbol + launch.function for g in described.kernels.values() for launch in g.launches]


def test_nodes_of_several_types_are_joined(tmp_path: Path) -> None:
    first, *_ = calls(tmp_path, "parts", False)
    assert first[:3] == [f"copy {30 * 6 * 4}", f"copy {20 * 6 * 4}", f"clear {50 * 4 * 4}"]
