"""The rows of ``benchmarks/fusion.py``: which model, at which lengths. Needs no torch; the models need it."""

from __future__ import annotations

from dataclasses import dataclass

#: (batch, length) pairs at which the artifact of a row is compared with eager; all but the first few are padded.
LENGTHS = ((1, 1), (1, 2), (1, 7), (1, 63), (1, 64), (1, 65), (1, 129), (1, 300), (2, 16), (2, 128), (3, 33), (4, 9))
SMALL_LENGTHS = ((1, 1), (1, 2), (1, 7), (1, 16), (1, 17), (1, 31), (1, 33), (2, 8), (2, 16), (2, 33), (3, 9), (4, 5))
BATCHES = ((1, 0), (2, 0), (3, 0), (5, 0))


#: planish's own peers: with standard operators, and with generated kernels.
MINE = ("planish", "kernels")


@dataclass(frozen=True)
class Row:
    """A row of the benchmark.

    Attributes:
        name: as printed.
        model: a name in ``tests/architectures.py``, with ``decode`` after it for a step with a cache; rows of one
            model share a file.
        batch, length: of the timed inputs; the length is the past of a decode step, and 0 for images.
        small: length of the timed inputs of the small model.
        kind: ``"text"``, ``"decode"`` or ``"image"``.
        model_type: for ``onnxruntime.transformers.optimizer``; None if that has no type for the model.
        transformer: counts in the geometric mean.
        fusion: it is a row of ``benchmarks/fusion.py``, and not of ``benchmarks/precision.py`` alone.
    """

    name: str
    model: str
    batch: int
    length: int
    small: int = 12
    kind: str = "text"
    model_type: str | None = "bert"
    transformer: bool = True
    fusion: bool = True

    def pairs(self, small: bool) -> tuple[tuple[int, int], ...]:
        """The further (batch, length) pairs at which outputs are checked."""
        if self.kind == "image":
            return BATCHES
        return SMALL_LENGTHS if small else LENGTHS


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("BERT s128", "BERT", 1, 128),
        Row("BERT s512", "BERT", 1, 512, small=48),
        Row("ViT-B/16", "ViT", 1, 0, kind="image", model_type="vit"),
        Row("GPT-2 s512", "GPT-2", 1, 512, small=48, model_type="gpt2"),
        Row("GPT-2 decode p512", "GPT-2 decode", 1, 512, small=48, kind="decode", model_type="gpt2"),
        Row("Llama-4L decode p512", "Llama decode", 1, 512, small=48, kind="decode", model_type="gpt2", fusion=False),
        Row("Llama-4L s256", "Llama", 1, 256, model_type="gpt2"),
        Row("Llama-4L s1024", "Llama", 1, 1024, small=48, model_type="gpt2"),
        Row("MiniLM b1 s32", "MiniLM", 1, 32),
        Row("MiniLM b8 s128", "MiniLM", 8, 128, small=24),
        Row("ResNet-50", "ResNet", 1, 0, kind="image", model_type=None, transformer=False),
        Row("ConvNeXt-T", "ConvNeXt", 1, 0, kind="image", model_type=None, transformer=False),
    )
}


def slug(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-")
