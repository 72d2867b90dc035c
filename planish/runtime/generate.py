"""Text generation with a causal language model: one run of `prefill`, then one run of `decode` for each token.

The caches are allocated once for each call and bound as input and output of `decode` at once, so a token is
written where it belongs and nothing else is touched: no run allocates or copies a cache. On a GPU they are there
(:mod:`planish.runtime.ort_device_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from planish.ir.block_sparsity.slots import SlotPlan, slots_of
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PREFILL, Facts, cache_layer
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.prompts import pad_right, read_prompts
from planish.runtime.sampling import Sampling
from planish.runtime.tensors import from_torch, is_torch, to_torch

if TYPE_CHECKING:
    from planish.runtime.executable import Executable
    from planish.runtime.ort import OrtRunner

#: Called after each step with the new tokens, (batch) int64.
Stream = Callable[[np.ndarray], object]


def generate(
    exe: Executable,
    input_ids: Any,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    attention_mask: Any,
    sampling: Sampling,
    seed: int | None,
    stream: Stream | None,
) -> Any:
    """Generates tokens; see :meth:`planish.Executable.generate`."""
    source = _source(exe)
    facts = Facts.from_provenance(exe.provenance)
    as_torch = is_torch(input_ids)
    ids, mask = read_prompts(_array(IDS, input_ids), _array("attention_mask", attention_mask))
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens!r}; it must be an integer of at least 1.")
    eos = _ends(eos_token_id, facts.eos)
    pad = _pad(pad_token_id, facts.pad, eos)
    prompts, lengths = pad_right(ids, mask)
    _check_fit(prompts.shape[1], int(max_new_tokens), facts.positions)
    random = np.random.default_rng(seed)
    _check_tokens(ids, mask, source.vocabulary)
    try:
        found = _tokens(source, ids, prompts, lengths, int(max_new_tokens), (eos, pad), sampling, random, stream)
    finally:
        source.close()
    return to_torch(found) if as_torch else found


def _tokens(
    source: _Source,
    ids: np.ndarray,
    prompts: np.ndarray,
    lengths: np.ndarray,
    new: int,
    ends: tuple[np.ndarray, int],
    sampling: Sampling,
    random: np.random.Generator,
    stream: Stream | None,
) -> np.ndarray:
    """The prompts as they were given, and what follows them."""
    (eos, pad), logits = ends, source.start(prompts, lengths, new)
    result = np.empty((len(ids), ids.shape[1] + new), np.int64)
    end = ids.shape[1]
    result[:, :end] = ids
    live = np.ones(len(ids), bool)
    while True:
        tokens = np.where(live, sampling.choose(logits, result[:, :end], random), pad)
        result[:, end] = tokens
        end += 1
        if stream is not None:
            stream(tokens.copy())
        live &= ~np.isin(tokens, eos)
        if end == result.shape[1] or not live.any():
            break
        logits = source.step(tokens)
    return result[:, :end].copy()


class _Source(Protocol):
    """What reads prompts, then token after token."""

    @property
    def vocabulary(self) -> int | None: ...
    def start(self, prompts: np.ndarray, lengths: np.ndarray, new: int) -> np.ndarray: ...
    def step(self, tokens: np.ndarray) -> np.ndarray: ...
    def close(self) -> None: ...


class _Entries:
    """`prefill` and `decode` of a program, the caches in ordinary memory."""

    def __init__(self, prefill: Any, decode: OrtRunner, slots: Mapping[int, SlotPlan]) -> None:
        self.prefill, self.decode, self.slots = prefill, decode, slots
        self._first: dict[str, np.ndarray] = {}
        self._step: _Step | None = None  # made after the first token, which does not have to wait for it

    @property
    def vocabulary(self) -> int | None:
        shape = next(spec.shape for spec in self.decode.outputs if spec.name == LOGITS)
        last = shape[-1] if shape else None
        return last if isinstance(last, int) else None

    def start(self, prompts: np.ndarray, lengths: np.ndarray, new: int) -> np.ndarray:
        self._first = self.prefill.run({IDS: prompts, LENGTHS: lengths})
        self._logits = _last(self._first.pop(LOGITS), lengths)
        self._lengths, self._capacity = lengths, prompts.shape[1] + new - 1
        return self._logits

    def step(self, tokens: np.ndarray) -> np.ndarray:
        if self._step is None:
            arguments = self._first, self._lengths, self._capacity, self._logits
            self._step = _Step(self.decode, *arguments, self.slots)
        self._step(tokens)
        return self._step.logits

    def close(self) -> None:
        self._first.clear()
        self._step = None


class _Step:
    """`decode` bound to its buffers.

    Args:
        decode: the entry.
        present: caches as `prefill` gave them, by name; those that `decode` does not read are let go.
        lengths: tokens of each row, (batch) int64.
        capacity: positions to allocate.
        logits: of the prompt, (batch, vocabulary); becomes the buffer that `logits` of later steps are written to.
        slots: layer → where its caches keep what they have not let go.
    """

    def __init__(
        self,
        decode: OrtRunner,
        present: dict[str, np.ndarray],
        lengths: np.ndarray,
        capacity: int,
        logits: np.ndarray,
        slots: Mapping[int, SlotPlan] = MappingProxyType({}),
    ) -> None:
        self.ids = np.zeros((len(lengths), 1), np.int64)
        self.lengths = lengths - 1  # a step counts the token before it as held
        self.logits = np.ascontiguousarray(logits)
        self.caches: dict[str, np.ndarray] = {}
        for spec in decode.inputs:
            layer = cache_layer(spec.name)
            if layer is None:
                continue
            prompt = present[spec.name.replace("past_", "present_", 1)]
            batch, heads, tokens, size = prompt.shape
            # Zeros, since what was never written is multiplied by nothing but is read: it must be no NaN.
            room = slots[layer].capacity(capacity) if layer in slots else capacity
            cache = np.zeros((batch, heads, room, size), prompt.dtype)
            cache[:, :, :tokens] = prompt[:, :, :room]
            self.caches[spec.name] = cache
        present.clear()
        outputs = {name.replace("past_", "present_", 1): cache for name, cache in self.caches.items()}
        inputs = {IDS: self.ids, LENGTHS: self.lengths, **self.caches}
        from planish.runtime.ort_bound import BoundRun

        self._bound = BoundRun(decode, inputs, {LOGITS: self.logits, **outputs})

    def __call__(self, tokens: np.ndarray) -> None:
        """Reads one token a row; `logits` are then those of the next."""
        self.ids[:, 0] = tokens
        self.lengths += 1
        self._bound()


def _source(exe: Executable) -> _Source:
    budgeted = exe.runners.get(PREFILL)
    if hasattr(budgeted, "engine"):  # under a memory budget; what that needs is not imported elsewhere
        return budgeted  # type: ignore[return-value]
    missing = [name for name in (PREFILL, DECODE) if name not in exe.runners]
    if missing:
        raise InputError(
            f"this program has the entries {', '.join(exe.runners)}; generate needs {PREFILL} and {DECODE}: optimize "
            "the model with task='causal-lm'."
        )
    decode = exe.runners[DECODE]
    if exe.target.name == "tvm-cuda":
        from planish.runtime.tvm_generate import TvmCudaEntries

        return TvmCudaEntries(exe.runners[PREFILL], decode, slots_of(exe.provenance))  # type: ignore[arg-type]
    if hasattr(decode, "offline"):
        raise UnsupportedError(f"this program is for '{exe.target}', which this machine has not: export it.")
    if hasattr(decode, "run_there"):  # on a device; what that needs is not imported elsewhere
        from planish.runtime.ort_device_step import DeviceEntries

        slots, positions = slots_of(exe.provenance), Facts.from_provenance(exe.provenance).positions
        return DeviceEntries(exe.runners[PREFILL], decode, slots, positions)  # type: ignore[arg-type]
    from planish.runtime.ort import OrtRunner

    if not isinstance(decode, OrtRunner):
        raise InputError(f"generate runs on ONNX Runtime and tvm-cuda; entry '{DECODE}' is a {type(decode).__name__}.")
    return _Entries(exe.runners[PREFILL], decode, slots_of(exe.provenance))


def _array(name: str, value: Any) -> Any:
    if is_torch(value):
        return from_torch(name, value)
    try:
        return None if value is None else np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} is no array ({error}); pad the rows, and give an attention_mask.") from error


def _last(logits: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Logits of each row's last token, from those or from all."""
    return logits if logits.ndim == 2 else logits[np.arange(len(lengths)), lengths - 1]


def _ends(given: int | Sequence[int] | None, own: tuple[int, ...]) -> np.ndarray:
    if given is None:
        return np.array(own, np.int64)
    ends = np.atleast_1d(np.asarray(given if not isinstance(given, set) else sorted(given)))
    if ends.size and (ends.dtype.kind not in "iu" or ends.ndim != 1):
        raise InputError(f"eos_token_id is {given!r}; give an integer, a list of integers, or None.")
    return ends.astype(np.int64)


def _pad(given: int | None, own: int | None, eos: np.ndarray) -> int:
    pad = given if given is not None else own if own is not None else int(eos[0]) if eos.size else 0
    if isinstance(pad, bool) or not isinstance(pad, int | np.integer):
        raise InputError(f"pad_token_id is {pad!r}; give an integer.")
    return int(pad)


def _check_fit(tokens: int, more: int, positions: int | None) -> None:
    if positions is None or tokens + more <= positions:
        return
    what = "it leaves none for new ones" if tokens >= positions else f"at most {positions - tokens} more fit"
    raise InputError(
        f"the longest prompt has {tokens} tokens and max_new_tokens is {more}, {tokens + more} together; the model has "
        f"{positions} positions: {what}."
    )


def _check_tokens(ids: np.ndarray, mask: np.ndarray, vocabulary: int | None) -> None:
    if vocabulary is None:
        return
    wrong = ids[mask & ((ids < 0) | (ids >= vocabulary))]
    if wrong.size:
        raise InputError(f"input_ids holds the token {int(wrong[0])}; the vocabulary has {vocabulary}.")
