"""How many places of each architecture the lowerings must reach; a change that loses one fails here."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest

from planish.ir.program import Program
from planish.ir.provenance import PASS_KEY
from planish.passes.defaults import default_pipeline
from planish.passes.testing import apply_pass

# (feed-forward blocks, causal attentions, residuals in front of a normalization)
EXPECTED: dict[str, tuple[int, int, int]] = {
    "BERT": (2, 0, 5),
    "DistilBERT": (2, 0, 5),
    "RoBERTa": (2, 0, 5),
    "ALBERT": (0, 0, 5),  # its layers share their weights, which a convolution would store again
    "MiniLM": (6, 0, 13),
    "GPT-2": (2, 2, 1),
    "Llama": (2, 2, 0),
    "Qwen2": (2, 2, 0),
    "T5 encoder": (2, 0, 0),
    "ViT": (2, 0, 1),
    "DeiT": (2, 0, 1),
    "CLIP text": (2, 2, 1),
    "CLIP vision": (2, 0, 1),
    "Whisper encoder": (2, 0, 1),
    "ConvNeXt": (3, 0, 2),  # the first stage is narrower than what pays
    "ResNet": (0, 0, 0),
}

# With generated kernels: (products, of these with an activation or a gate, attentions, norms)
KERNELS: dict[str, tuple[int, int, int, int]] = {
    "BERT": (13, 2, 2, 5),
    "DistilBERT": (12, 2, 2, 5),
    "RoBERTa": (13, 2, 2, 5),
    "ALBERT": (14, 2, 2, 5),
    "MiniLM": (36, 6, 6, 13),
    "GPT-2": (13, 2, 2, 5),
    "Llama": (13, 2, 2, 5),
    "Qwen2": (13, 2, 2, 5),
    "T5 encoder": (12, 2, 0, 5),  # position biases are no mask of keys
    "ViT": (13, 2, 2, 5),
    "DeiT": (13, 2, 2, 5),
    "CLIP text": (12, 2, 2, 5),
    "CLIP vision": (12, 2, 2, 6),
    "Whisper encoder": (12, 2, 2, 5),
    "ConvNeXt": (10, 5, 0, 10),
    "ResNet": (0, 0, 0, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_lowerings_of_architectures(name: str) -> None:
    program = _lowered(name, "ort-cpu")
    counts = Counter(n.op_type for n in program.main.graph)
    # The last product of a block is the one that has an activation in front of it.
    blocks = sum(
        n.op_type == "Conv" and n.metadata_props.get(PASS_KEY) == "lower-feed-forward" and _is_last(n)
        for n in program.main.graph
    )
    # One If more chooses the masks, for all layers together.
    assert (blocks, max(0, counts["If"] - 1), counts["Sum"]) == EXPECTED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_architectures(name: str) -> None:
    nodes = [n.op_type for n in _lowered(name, "ort-cpu:kernels").main.graph if n.domain == "planish"]
    products = [op for op in nodes if op.startswith("Linear")]
    activated = [op for op in products if op not in ("Linear", "LinearAdd")]
    attentions = [op for op in nodes if op.startswith("FlashAttention")]
    norms = [op for op in nodes if "Norm" in op]
    assert (len(products), len(activated), len(attentions), len(norms)) == KERNELS[name]
    assert len(nodes) == sum((len(products), len(attentions), len(norms)))


def _lowered(name: str, target: str) -> Program:
    pytest.importorskip("transformers")
    from planish.frontends.torch import capture
    from tests.architectures import ARCHITECTURES

    architecture = ARCHITECTURES[name]
    module = architecture.build(True)
    program = capture(module, architecture.example(module), architecture.dynamic_shapes, target).program
    apply_pass(default_pipeline(target), program)
    return program


def _is_last(node: ir.Node) -> bool:
    maker = node.inputs[0].producer()
    return maker is not None and maker.op_type not in ("Transpose", "Unsqueeze")
