"""How many places of each architecture the lowerings must reach; a change that loses one fails here."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_lowerings_of_architectures(name: str) -> None:
    pytest.importorskip("transformers")
    from planish.frontends.torch import capture
    from tests.architectures import ARCHITECTURES

    architecture = ARCHITECTURES[name]
    module = architecture.build(True)
    program = capture(module, architecture.example(module), architecture.dynamic_shapes, "ort-cpu").program
    apply_pass(default_pipeline("ort-cpu"), program)
    counts = Counter(n.op_type for n in program.main.graph)
    # The last product of a block is the one that has an activation in front of it.
    blocks = sum(
        n.op_type == "Conv" and n.metadata_props.get(PASS_KEY) == "lower-feed-forward" and _is_last(n)
        for n in program.main.graph
    )
    # One If more chooses the masks, for all layers together.
    assert (blocks, max(0, counts["If"] - 1), counts["Sum"]) == EXPECTED[name]


def _is_last(node: ir.Node) -> bool:
    maker = node.inputs[0].producer()
    return maker is not None and maker.op_type not in ("Transpose", "Unsqueeze")
