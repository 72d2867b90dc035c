"""Capture of a transformers decoder: the entries `prefill` and `decode` over one store of weights.

Each entry is one torch.export of the same model. See :mod:`planish.ir.causal_lm` for what they take and give, and
:mod:`planish.frontends.causal_lm_attention` for the form of attention in each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from planish.frontends import causal_lm_model, torch_export
from planish.frontends.causal_lm_attention import UNSIZED, Cache, Recorder, recording
from planish.frontends.causal_lm_check import Batch, CausalCheck, EntryRun, read_examples
from planish.frontends.torch import Progress, capture, check_module
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PARTS, PREFILL, CausalLM, past_name, present_name
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.ledger import ErrorStats
from planish.ir.program import Program
from planish.ir.sharing import unify_weights
from planish.ir.target import Target


@dataclass(frozen=True)
class CapturedLM:
    """A captured causal language model.

    Attributes:
        program: entries ``"prefill"`` and ``"decode"``.
        check: ``check(run) -> ErrorStats`` compares both entries, run by `run(program, entry, inputs)`, with the
            eager model, row by row without padding, at two shapes; raises InputError where they differ.
        batches: turns examples (as `example_inputs`) into inputs of each entry, by the eager model.
        example: what the examples give: entry → list of inputs by name.
        synthetic: whether the examples were made up.
    """

    program: Program
    check: Callable[[EntryRun], ErrorStats]
    batches: Callable[[Any], dict[str, list[Batch]]]
    example: dict[str, list[Batch]]
    synthetic: bool


def capture_causal_lm(
    model: Any,
    example_inputs: Any = None,
    target: Target | str = "ort-cpu",
    *,
    options: CausalLM | None = None,
    progress: Progress | None = None,
) -> CapturedLM:
    """Captures a decoder of transformers, with batch, lengths and the capacity of the cache dynamic.

    Args:
        model: a ``…ForCausalLM`` on the CPU; left as it was. Its weights are not copied.
        example_inputs: prompts to compare and measure with: ``input_ids`` (batch, sequence), or a dict or tuple of
            these and an ``attention_mask``. None: random tokens.
        target: where the program will run.
        options: which logits `prefill` gives.
        progress: called with the name of each stage.

    Raises:
        InputError: the model is no causal language model, or its attention has no form here; one line says what.
    """
    report = progress or (lambda stage: None)
    check_module(model)
    causal_lm_model.check_model(model)
    options = options or CausalLM()
    examples = read_examples(model, example_inputs)
    with torch_export.eval_mode(model), causal_lm_model.attention_replaced(model):
        shapes = _cache_shapes(model)
        report(f"{PREFILL}: torch.export")
        prefill = _capture(_named(_Prefill, model)(model, options), *_prefill_example(), target)
        report(f"{DECODE}: torch.export")
        wrapper, tokens = (_Chunk, 3) if options.chunks else (_Decode, 1)
        decode = _capture(_named(wrapper, model)(model), *_decode_example(shapes, tokens), target)
    _unsize(decode)
    entries = {PREFILL: prefill.main, DECODE: decode.main}
    provenance = {**prefill.provenance, "module": _qualified(model), **causal_lm_model.facts(model).to_provenance()}
    program = Program(entries, prefill.target, provenance)
    unify_weights(program)
    check = CausalCheck(model, program, options, examples)
    return CapturedLM(program, check, check.batches, check.batches(examples), example_inputs is None)


class _Entry(torch.nn.Module):  # type: ignore[misc]
    """The model with a recorder in the place of its cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.positioned = causal_lm_model.accepts_positions(model)

    def logits(self, recorder: Recorder, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = {"position_ids": positions} if self.positioned else {}
        with recording(recorder):
            result = self.model(
                input_ids=input_ids, past_key_values=recorder, use_cache=True, return_dict=True, **given
            )
        expected = causal_lm_model.layer_count(self.model)
        if len(recorder.present) != expected:
            raise UnsupportedError(
                f"{len(recorder.present)} of {expected} layers attend through transformers' attention interface "
                "with a cache of their own"
            )
        logits: torch.Tensor = result.logits
        return logits

    def present(self, recorder: Recorder) -> dict[str, torch.Tensor]:
        return {
            present_name(layer, part): tensor
            for layer, pair in sorted(recorder.present.items())
            for part, tensor in zip(PARTS, pair, strict=True)
        }

    @contextlib.contextmanager
    def last_only(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Lets the head see what `pick` takes of the hidden states: logits of a whole prompt are its largest tensor."""
        head = causal_lm_model.head(self.model)
        assert head is not None
        handle = head.register_forward_pre_hook(lambda module, args: (pick(args[0]), *args[1:]))
        try:
            yield
        finally:
            handle.remove()


class _Prefill(_Entry):
    def __init__(self, model: Any, options: CausalLM) -> None:
        super().__init__(model)
        self.last = options.logits == "last"

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        recorder = Recorder(None, lengths)
        positions = torch.arange(input_ids.shape[1])[None]

        def pick(hidden: torch.Tensor) -> torch.Tensor:
            return hidden[torch.arange(hidden.shape[0]), lengths - 1][:, None]

        with self.last_only(pick) if self.last else contextlib.nullcontext():
            logits = self.logits(recorder, input_ids, positions)
        return {LOGITS: logits[:, 0] if self.last else logits, **self.present(recorder)}


class _Decode(_Entry):
    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, past: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tensors = list(past.values())
        pairs: Cache = dict(enumerate(zip(tensors[0::2], tensors[1::2], strict=True)))
        recorder = Recorder(pairs, lengths)
        logits = self.logits(recorder, input_ids, lengths[:, None])
        return {LOGITS: logits[:, 0], **self.present(recorder)}


class _Chunk(_Entry):
    """Several tokens of one row after what the cache holds, or one token of each row."""

    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, past: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tensors, tokens = list(past.values()), input_ids.shape[1]
        pairs: Cache = dict(enumerate(zip(tensors[0::2], tensors[1::2], strict=True)))
        recorder = Recorder(pairs, lengths, tokens)
        with self.last_only(lambda hidden: hidden[:, -1:]):
            logits = self.logits(recorder, input_ids, lengths[:, None] + torch.arange(tokens)[None])
        return {LOGITS: logits[:, 0], **self.present(recorder)}


def _named(cls: type[Any], model: Any) -> type[Any]:
    """The class under the model's name, which messages and the graph then show."""
    return type(type(model).__name__, (cls,), {})


def _capture(wrapper: Any, example: dict[str, Any], shapes: dict[str, Any], target: Target | str) -> Program:
    try:
        return capture(wrapper, example, shapes, target).program
    except UnsupportedError as error:
        cause = error.__cause__ if isinstance(error.__cause__, UnsupportedError) else error
        text = str(cause)
        if "can not be captured" not in text and "fails on the example" not in text:
            text = f"task 'causal-lm': {type(wrapper).__name__} can not be captured: {text}."
        raise UnsupportedError(text) from error


def _prefill_example() -> tuple[dict[str, Any], dict[str, Any]]:
    ids = torch.arange(2 * 7).reshape(2, 7) % 3 + 1
    example = {IDS: ids, LENGTHS: torch.tensor([7, 5])}
    return example, {IDS: {0: "batch", 1: "sequence"}, LENGTHS: {0: "batch"}}


def _decode_example(caches: list[tuple[int, int, torch.dtype]], tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    past, shapes = {}, {}
    for layer, (heads, size, dtype) in enumerate(caches):
        for part in PARTS:
            key = past_name(layer, part).removeprefix("past_")
            past[key] = torch.zeros(2, heads, 11, size, dtype=dtype)
            shapes[key] = {0: "batch", 2: "capacity"}
    example = {IDS: torch.ones(2, tokens, dtype=torch.int64), LENGTHS: torch.tensor([5, 3]), "past": past}
    ids = {0: "batch"} | ({1: "tokens"} if tokens > 1 else {})
    return example, {IDS: ids, LENGTHS: {0: "batch"}, "past": shapes}


def _cache_shapes(model: Any) -> list[tuple[int, int, torch.dtype]]:
    """Key-value heads, head size (as kept in the cache) and dtype of each layer, found by reading two tokens."""
    ids, lengths = torch.tensor([[1, 2]]), torch.tensor([2])
    recorder = Recorder(None, lengths)
    try:
        with torch_export.quiet():
            _Entry(model).logits(recorder, ids, torch.arange(2)[None])
    except UnsupportedError as error:
        text = f"task 'causal-lm': {type(model).__name__} can not be captured: {str(error).rstrip('.')}."
        raise UnsupportedError(text) from error
    except InputError:
        raise
    except Exception as error:
        from planish.frontends.torch_errors import first_line

        raise UnsupportedError(
            f"task 'causal-lm': {type(model).__name__} can not be captured: its attention does not go through "
            f"transformers' attention interface, or its forward fails with a cache of planish's: "
            f"{type(error).__name__}: {first_line(error)}."
        ) from error
    return [(k.shape[1], k.shape[3], k.dtype) for _, (k, _) in sorted(recorder.present.items())]


def _unsize(program: Program) -> None:
    """Takes the declared size off what stands for a size that depends on a value; inference finds the others."""
    import onnx_ir as ir

    graph = program.main.graph
    marked = [node for node in graph if node.metadata_props.pop(UNSIZED, None)]
    pending = [value for node in marked for value in node.outputs]
    while pending:
        value = pending.pop()
        if value.shape is None:
            continue
        value.shape = ir.Shape([*list(value.shape)[:-1], None])
        for node in {id(n): n for n in value.consumers()}.values():
            if node.op_type not in ("GroupQueryAttention",):
                pending += node.outputs


def _qualified(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
