"""What ONNX Runtime fuses into convolutions (activations, sums) it still fuses after our passes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from planish.passes.defaults import default_pipeline
from planish.passes.testing import apply_pass, program_of
from tests.passes.fusion.linear_models import model, normal, statistics


class Net:
    """Builds a net of images line by line."""

    def __init__(self, channels: int) -> None:
        self.lines: list[str] = []
        self.weights: dict[str, np.ndarray] = {"six": np.array(6, np.float32), "zero": np.array(0, np.float32)}
        self.value, self.channels, self.count = "x", channels, 0

    def add(self, call: str) -> str:
        self.count += 1
        self.value = f"t{self.count}"
        self.lines.append(f"{self.value} = {call}")
        return self.value

    def conv(self, out: int, size: int = 1, *, group: int = 1, stride: int = 1, norm: bool = True) -> str:
        name, pad = f"w{self.count}", size // 2
        self.weights[name] = normal(out, self.channels // group, size, size, seed=100 * self.count) / np.sqrt(
            size * size * self.channels
        )
        self.channels = out
        options = f"group={group}, pads=[{pad},{pad},{pad},{pad}], strides=[{stride},{stride}]"
        self.add(f"Conv<{options}>({self.value}, {name})")
        if norm:
            parameters = {f"{n}{self.count}": a for n, a in statistics(out, self.count).items()}
            self.weights |= parameters
            self.add(f"BatchNormalization({self.value}, {', '.join(parameters)})")
        return self.value

    def squeeze_excite(self, gate: str) -> str:
        """Factors for the channels, from their means (Hu et al., arXiv:1709.01507)."""
        whole, channels = self.value, self.channels
        self.add(f"GlobalAveragePool({whole})")
        self.conv(16, norm=False)
        self.add(f"Relu({self.value})")
        self.conv(channels, norm=False)
        self.add(f"{gate}({self.value})")
        return self.add(f"Mul({whole}, {self.value})")

    def build(self, *size: str | int) -> ir.Model:
        self.lines.append(f"y = Identity({self.value})")
        return model(self.lines, self.weights, ["B", 32, *size])


def resnet() -> Net:
    net = Net(32)
    for stride in (1, 2):
        start, channels = net.value, net.channels
        net.conv(32, 3, stride=stride)
        net.add(f"Relu({net.value})")
        end = net.conv(32, 3)
        if stride == 2:
            net.value, net.channels = start, channels
            start = net.conv(32, 1, stride=stride)
        net.add(f"Add({end}, {start})")
        net.add(f"Relu({net.value})")
    return net


def mobilenet_v2() -> Net:
    net = Net(32)
    for _ in range(2):
        start = net.value
        for size, group in ((1, 1), (3, 64)):
            net.conv(64, size, group=group)
            net.add(f"Clip({net.value}, zero, six)")
        net.conv(32)
        net.add(f"Add({net.value}, {start})")
    return net


def mobilenet_v3() -> Net:
    net = Net(32)
    start = net.value
    net.conv(64)
    net.add(f"HardSwish({net.value})")
    net.conv(64, 3, group=64)
    net.add(f"HardSwish({net.value})")
    net.squeeze_excite("HardSigmoid")
    net.conv(32)
    net.add(f"Add({net.value}, {start})")
    return net


def efficientnet() -> Net:
    net = Net(32)
    start = net.value
    for size, group in ((1, 1), (3, 64)):
        whole = net.conv(64, size, group=group)
        net.add(f"Sigmoid({whole})")
        net.add(f"Mul({whole}, {net.value})")
    net.squeeze_excite("Sigmoid")
    net.conv(32)
    net.add(f"Add({net.value}, {start})")
    return net


NETS = {"ResNet": resnet, "MobileNetV2": mobilenet_v2, "MobileNetV3": mobilenet_v3, "EfficientNet": efficientnet}


def session(built: ir.Model, path: Path) -> tuple[onnxruntime.InferenceSession, Counter[str]]:
    """A session with all of ONNX Runtime's optimizations, and the nodes that it runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(
        ir.to_proto(built).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return made, Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", NETS)
def test_as_few_nodes_as_without_us(name: str, tmp_path: Path) -> None:
    built = NETS[name]().build("H", "W")
    program = program_of(built)
    apply_pass(default_pipeline("ort-cpu"), program)
    assert "BatchNormalization" not in {node.op_type for node in program.main.graph}
    plain, before = session(built, tmp_path / "plain.onnx")
    ours, after = session(program.main, tmp_path / "ours.onnx")
    more = {op: (before[op], n) for op, n in after.items() if n > before[op]}
    assert not more, f"operators of which ONNX Runtime runs more: {more}"
    for batch, height, width in ((1, 8, 8), (3, 7, 9)):
        feed = {"x": normal(batch, 32, height, width)}
        (expected,), (got,) = (s.run(None, feed) for s in (plain, ours))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_activations_and_sums_are_in_the_convolutions(tmp_path: Path) -> None:
    """Of two residual blocks of a known size nothing is left but convolutions and what changes the layout."""
    found: dict[str, Any] = {}
    for name in ("ResNet", "MobileNetV2"):
        program = program_of(NETS[name]().build(8, 8))
        apply_pass(default_pipeline("ort-cpu"), program)
        _, found[name] = session(program.main, tmp_path / f"{name}.onnx")
        if "ReorderInput" not in found[name]:
            pytest.skip("this processor has no blocked layout")
    # The first block adds the input of the net, which is not in the layout: that sum, and its Relu, stay.
    assert found["ResNet"]["Conv"] == 5 and found["ResNet"]["Add"] == found["ResNet"]["Relu"] == 1
    assert not {"Clip", "BatchNormalization"} & set(found["MobileNetV2"]) and found["MobileNetV2"]["Conv"] == 6
