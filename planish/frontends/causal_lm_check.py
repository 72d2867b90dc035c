"""A captured causal language model against the eager one, and inputs of its entries from prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from planish.frontends import causal_lm_model
from planish.frontends.torch_check import LIMIT, to_numpy
from planish.frontends.torch_errors import first_line
from planish.frontends.torch_export import eval_mode, quiet
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PARTS, PREFILL, CausalLM, past_name, present_name
from planish.ir.compare import compare_outputs, tolerance, worst_of
from planish.ir.errors import InputError
from planish.ir.ledger import ErrorStats
from planish.ir.program import Program
from planish.ir.prompts import pad_right, read_prompts

Batch = dict[str, np.ndarray]
#: Runs an entry of a program on arrays by input name; returns arrays by output name.
EntryRun = Callable[[Program, str, Batch], Mapping[str, Any]]
#: Free positions of the caches that are measured and compared with, after the new token.
_FREE = 7


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts: ids (batch, sequence) padded on the right, and lengths (batch), both int64."""

    ids: np.ndarray
    lengths: np.ndarray


@dataclass
class Expected:
    """What the eager model gives for prompts and one token after them: inputs and outputs of each entry."""

    inputs: dict[str, Batch] = field(default_factory=dict)
    outputs: dict[str, Batch] = field(default_factory=dict)


def read_examples(model: Any, given: Any) -> list[Prompts]:
    """Prompts from what a user gave: ids, a dict or tuple of ids and a mask, or a list of these; None: random ones."""
    if given is None:
        return [random_prompts(model, (16, 11), seed=0)]
    if isinstance(given, list) and given and not isinstance(given[0], int | list):
        return [prompts for item in given for prompts in read_examples(model, item)]
    if isinstance(given, Mapping):
        if unknown := [key for key in given if key not in (IDS, "attention_mask")]:
            raise InputError(f"example input '{unknown[0]}': task 'causal-lm' takes input_ids and attention_mask.")
        if IDS not in given:
            raise InputError("the examples hold no input_ids.")
        given = (given[IDS], given.get("attention_mask"))
    ids, mask = (*given, None)[:2] if isinstance(given, tuple) else (given, None)
    ids, mask = read_prompts(*(to_numpy(x) if isinstance(x, torch.Tensor) else x for x in (ids, mask)))
    limit, vocabulary = causal_lm_model.facts(model).positions, causal_lm_model.text_config(model).vocab_size
    prompts = Prompts(*pad_right(ids, mask))
    if limit is not None and prompts.ids.shape[1] >= limit:
        raise InputError(f"an example has {prompts.ids.shape[1]} tokens; the model has {limit} positions.")
    if prompts.ids.min() < 0 or prompts.ids.max() >= vocabulary:
        raise InputError(f"the examples hold the token {prompts.ids.max()}; the vocabulary has {vocabulary}.")
    return [prompts]


def random_prompts(model: Any, lengths: tuple[int, ...], seed: int) -> Prompts:
    """Random tokens; rows are shortened to what the model has positions for."""
    limit = causal_lm_model.facts(model).positions or max(lengths) + 1
    fitting = np.minimum(np.asarray(lengths, np.int64), max(1, limit - 1))
    vocabulary = causal_lm_model.text_config(model).vocab_size
    ids = np.random.default_rng(seed).integers(0, vocabulary, (len(lengths), int(fitting.max())), np.int64)
    ids[np.arange(ids.shape[1]) >= fitting[:, None]] = 0
    return Prompts(ids, fitting)


@dataclass(frozen=True)
class CausalCheck:
    """Compares both entries of a program with the model that they were captured from."""

    model: Any
    program: Program
    options: CausalLM
    examples: list[Prompts]

    def __call__(self, run: EntryRun, *, limit: float = LIMIT) -> ErrorStats:
        """Compares on the first example and on rows of other lengths.

        Raises:
            InputError: an entry fails, or an output is further off than `limit` (relative L2).
        """
        found = []
        for prompts in (self.examples[0], random_prompts(self.model, (5, 1, 9), seed=1)):
            expected = self.expect(prompts)
            found += [self._compare(run, entry, expected, limit) for entry in (PREFILL, DECODE)]
        return worst_of(found)

    def batches(self, examples: Any) -> dict[str, list[Batch]]:
        """Inputs of each entry for examples."""
        prompts = examples if _is_prompts(examples) else read_examples(self.model, examples)
        found = [self.expect(item).inputs for item in prompts]
        return {entry: [item[entry] for item in found] for entry in (PREFILL, DECODE)}

    def expect(self, prompts: Prompts) -> Expected:
        """Runs the eager model on each row, without padding: the prompt, and the likeliest token after it."""
        rows = [self._row(prompts.ids[i, :n]) for i, n in enumerate(prompts.lengths)]
        tokens, longest = prompts.ids.shape[1], int(prompts.lengths.max())
        capacity = longest + 1 + _FREE
        first = [row.prompt_logits if self.options.logits == "all" else row.prompt_logits[-1:] for row in rows]
        logits = np.zeros((len(rows), max(map(len, first)), first[0].shape[-1]), first[0].dtype)
        for i, row in enumerate(first):
            logits[i, : len(row)] = row
        prefill = {LOGITS: logits if self.options.logits == "all" else logits[:, 0]}
        past: Batch = {}
        decode: Batch = {LOGITS: np.stack([row.step_logits for row in rows])}
        for spec in self.program.inputs(DECODE):
            if not spec.name.startswith("past_"):
                continue
            assert spec.shape is not None
            heads, size = spec.shape[1], spec.shape[3]
            layer, part = int(spec.name.split("_")[1]), PARTS.index(spec.name.split("_")[2])
            assert isinstance(heads, int) and isinstance(size, int)
            shapes = [(len(rows), heads, n, size) for n in (tokens, capacity, capacity)]
            present, before, after = (np.zeros(shape, rows[0].cache[0][0].dtype) for shape in shapes)
            for i, result in enumerate(rows):
                kept, n = result.cache[layer][part], int(prompts.lengths[i])  # (heads, n + 1, size)
                present[i, :, :n, : kept.shape[-1]] = kept[:, :n]
                before[i, :, :n, : kept.shape[-1]] = kept[:, :n]
                after[i, :, : n + 1, : kept.shape[-1]] = kept
            prefill[present_name(layer, PARTS[part])] = present
            past[past_name(layer, PARTS[part])] = before
            decode[present_name(layer, PARTS[part])] = after
        step = np.array([[row.next] for row in rows], np.int64)
        return Expected(
            {
                PREFILL: {IDS: prompts.ids, LENGTHS: prompts.lengths},
                DECODE: {IDS: step, LENGTHS: prompts.lengths, **past},
            },
            {PREFILL: prefill, DECODE: decode},
        )

    def _row(self, ids: np.ndarray) -> _Row:
        from transformers import DynamicCache

        cache = DynamicCache()
        with eval_mode(self.model), quiet():
            prompt = self.model(input_ids=torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True)
            following = int(prompt.logits[0, -1].argmax())
            step = self.model(input_ids=torch.tensor([[following]]), past_key_values=cache, use_cache=True)
        layers: list[Any] = list(cache.layers)
        kept = [(to_numpy(layer.keys[0]), to_numpy(layer.values[0])) for layer in layers]
        return _Row(to_numpy(prompt.logits[0]), following, to_numpy(step.logits[0, -1]), kept)

    def _compare(self, run: EntryRun, entry: str, expected: Expected, limit: float) -> ErrorStats:
        inputs, wanted = expected.inputs[entry], expected.outputs[entry]
        lengths = inputs[LENGTHS]
        name, where = type(self.model).__name__, f"rows of {', '.join(map(str, lengths))} tokens"
        try:
            got = {k: np.array(v) for k, v in run(self.program, entry, inputs).items()}
        except Exception as error:
            raise InputError(f"entry '{entry}' captured from {name} fails on {where}: {first_line(error)}.") from error
        if entry == PREFILL:
            _clear_padding(got, lengths)
        stats = compare_outputs(wanted, got)
        bound = max(limit, tolerance(wanted))
        if not stats.relative_l2 <= bound:
            raise InputError(
                f"entry '{entry}' captured from {name} differs from the model on {where}: output '{stats.output}' "
                f"is off by {stats.relative_l2:.3g} relative L2 (limit {bound:.2g}); its attention has no form here."
            )
        return stats


@dataclass(frozen=True)
class _Row:
    prompt_logits: np.ndarray  # (tokens, vocabulary)
    next: int
    step_logits: np.ndarray  # (vocabulary)
    cache: list[tuple[np.ndarray, np.ndarray]]  # a layer: keys, values (heads, tokens + 1, size)


def _is_prompts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Prompts) for item in value)


def _clear_padding(got: dict[str, np.ndarray], lengths: np.ndarray) -> None:
    """Zeros what `prefill` gives for positions after a row's tokens, which nobody reads."""
    for name, value in got.items():
        axis = 2 if name != LOGITS else 1
        if value.ndim > 2:
            for row, n in enumerate(lengths):
                value[row][(slice(None),) * (axis - 1) + (slice(int(n), None),)] = 0
