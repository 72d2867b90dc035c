"""The models that ``benchmarks/fusion.py`` measures, their inputs, and their ONNX files.

Every model is a module that is called with named tensors (a list of tensors for a key-value cache). One
``torch.onnx.export`` of it writes the file that all peers read that take ONNX. Importable without the benchmark.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.fusion_rows import ROWS, Row, slug
from tests.architectures import ARCHITECTURES, text

Feeds = dict[str, np.ndarray]


class Decode(torch.nn.Module):
    """One step of a causal language model of ``transformers``, with the key-value cache as inputs and outputs.

    Takes ``input_ids`` (batch, 1) int64, ``attention_mask`` (batch, past + 1) int64 and `past`: key, value of every
    layer, each (batch, heads, past, head size) float32. Gives the logits, then key, value of every layer at past + 1.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        pairs = list(zip(past[0::2], past[1::2], strict=True))
        result = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=DynamicCache(pairs), use_cache=True
        )
        layers = result.past_key_values.layers
        return (result.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def build(row: Row, small: bool) -> Any:
    """The module of a row in eval mode: the same weights in every process."""
    name, _, step = row.model.partition(" ")
    module = ARCHITECTURES[name].build(small)
    return Decode(module).eval() if step else module


def feeds(row: Row, module: Any, batch: int, length: int, *, padded: bool) -> Feeds:
    """Inputs by the names of the ONNX file.

    Args:
        row: the row.
        module: its module.
        batch: number of sequences or images.
        length: tokens, or the past of a decode step.
        padded: sequences after the first are padded on the right; else the mask is all ones.
    """
    if row.kind == "image":
        inputs = ARCHITECTURES[row.model].inputs(module, batch, length)
        return {name: tensor.numpy() for name, tensor in inputs.items()}
    tokens = length + 1 if row.kind == "decode" else length
    result = {name: tensor.numpy() for name, tensor in text(module, batch, tokens).items()}
    if not padded:
        result["attention_mask"] = np.ones_like(result["attention_mask"])
    if row.kind != "decode":
        return result
    result["input_ids"] = result["input_ids"][:, -1:].copy()
    config, random = module.config, np.random.default_rng(batch * 7919 + length)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (batch, heads, length, config.hidden_size // config.num_attention_heads)
    for name in past_names(config.num_hidden_layers):
        result[name] = random.standard_normal(shape, dtype=np.float32)
    return result


def past_names(layers: int) -> list[str]:
    return [f"past_{layer}_{part}" for layer in range(layers) for part in ("key", "value")]


def arguments(given: Feeds) -> dict[str, Any]:
    """The module's keyword arguments for inputs by the names of the ONNX file."""
    result: dict[str, Any] = {}
    for name, array in given.items():
        tensor = torch.from_numpy(array)
        if name.startswith("past_"):
            result.setdefault("past", []).append(tensor)
        else:
            result[name] = tensor
    return result


def outputs(result: Any) -> list[torch.Tensor]:
    """What a module of a row gave, in the order of the file's outputs."""
    values = result.values() if hasattr(result, "values") else result
    return [value for value in values if value is not None]


def output_names(row: Row, module: Any, result: Any) -> list[str]:
    """Names of the file's outputs."""
    if row.kind == "decode":
        return ["logits", *(name.replace("past_", "present_") for name in past_names(module.config.num_hidden_layers))]
    return [name for name, value in result.items() if value is not None]


def dynamic_shapes(row: Row, module: Any) -> dict[str, Any]:
    """Batch and lengths are symbols."""
    if row.kind == "image":
        return {"pixel_values": {0: "batch"}}
    if row.kind == "text":
        return {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
    past: Any = [{0: "batch", 2: "past"} for _ in past_names(module.config.num_hidden_layers)]
    return {"input_ids": {0: "batch"}, "attention_mask": {0: "batch", 1: "total"}, "past": past}


def export(row: Row, path: Path, *, small: bool) -> Any:
    """Writes the file of a row, with its weights beside it, and gives the module.

    The example has batch 2 so that the exporter keeps the batch a symbol; opset and attention are the defaults of the
    exporter and of ``transformers`` (scaled dot product attention).
    """
    module = build(row, small)
    example = feeds(row, module, 2, 16, padded=True)
    with torch.no_grad():
        names = output_names(row, module, module(**arguments(example)))
        program = torch.onnx.export(
            module,
            kwargs=arguments(example),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(row, module),
            input_names=list(example),
            output_names=names,
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=True)
    return module


def ladder(layers: int, folder: Path) -> None:
    """Writes a BERT of small width and many layers, for the optimizer's cost: ``model.onnx`` and ``timed.npz``."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=100,
        max_position_embeddings=64,
    )
    module = BertModel(config).eval()
    shapes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
    ids = torch.randint(4, 100, (2, 16))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = torch.onnx.export(module, kwargs=example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(str(folder / "model.onnx"), external_data=True)
    np.savez(folder / "timed.npz", **{name: tensor.numpy() for name, tensor in example.items()})  # type: ignore[arg-type]


def prepare(rows: list[Row], folder: Path, *, small: bool) -> None:
    """Writes the file of the rows' common model and the inputs of each row: timed ones, and those that are checked.

    ``model.onnx``; ``about.json``; ``<row>/timed.npz``; ``<row>/<batch>x<length>.npz``.
    """
    module = export(rows[0], folder / "model.onnx", small=small)
    config = module.config
    shape = {"num_heads": "num_attention_heads", "hidden_size": "hidden_size"}
    about = {key: getattr(config, name, 0) for key, name in shape.items()}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    for row in rows:
        place = folder / slug(row.name)
        place.mkdir()
        length = row.small if small else row.length
        np.savez(place / "timed.npz", **feeds(row, module, row.batch, length, padded=False))  # type: ignore[arg-type]
        for batch, other in row.pairs(small):
            given = feeds(row, module, batch, other, padded=True)
            np.savez(place / f"{batch}x{other}.npz", **given)  # type: ignore[arg-type]


def main() -> int:
    """``fusion_models.py rows FOLDER small|full ROW...`` or ``fusion_models.py ladder FOLDER LAYERS``."""
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    if what == "ladder":
        ladder(int(rest[0]), Path(folder))
    else:
        prepare([ROWS[name] for name in rest[1:]], Path(folder), small=rest[0] == "small")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
