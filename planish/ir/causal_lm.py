"""A causal language model as a program: its two entries, and the names of what goes in and comes out. Pure data.

``prefill`` reads whole prompts: `input_ids` (batch, sequence) int64, rows padded on the right, and `lengths` (batch)
int64, the tokens of each row. It gives the logits and, for every layer, `present_<layer>_key` and
`present_<layer>_value` (batch, key-value heads, sequence, head size).

``decode`` reads one token a row: `input_ids` (batch, 1) int64, `lengths` (batch) int64, the tokens that the cache
holds of each row, and `past_<layer>_key`, `past_<layer>_value` (batch, key-value heads, capacity, head size), of which
the first `lengths` positions of each row count. It gives `logits` (batch, vocabulary) and the caches with the
new token at position `lengths`; bound to the same buffers, the caches are updated in place. With
``CausalLM(chunks=True)`` it reads one or more tokens of one row, (1, tokens), or one token of each of several rows, and
gives the logits of the last: a prompt can then be read in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from planish.ir.errors import InputError, unknown

PREFILL, DECODE = "prefill", "decode"
IDS, LENGTHS, LOGITS = "input_ids", "lengths", "logits"
PARTS = ("key", "value")
#: What a program's provenance says under "task".
TASK = "causal-lm"
#: Metadata of a cache that `decode` reads: which of the model's own key-value heads it holds, if not all.
KEPT_HEADS = "planish.kept_heads"
#: Metadata of a cache that `decode` reads: how many tokens `prefill` drops before its layer.
PRUNED_TOKENS = "planish.pruned_tokens"
_CACHE = re.compile(r"(?:past|present)_(\d+)_(?:key|value)(?:_scale)?")


@dataclass(frozen=True)
class CausalLM:
    """Options of the task ``"causal-lm"``.

    Attributes:
        logits: ``"last"``: `prefill` gives the logits of each row's last token, (batch, vocabulary); ``"all"``: of
            every position, (batch, sequence, vocabulary).
        chunks: `decode` reads any number of tokens of one row at once. What has a memory budget is captured so.
    """

    logits: str = "last"
    chunks: bool = False

    def __post_init__(self) -> None:
        if self.logits not in ("last", "all"):
            raise unknown("choice of logits", str(self.logits), ("last", "all"))

    @classmethod
    def parse(cls, task: str | CausalLM) -> CausalLM:
        """Reads ``"causal-lm"``, or takes an instance.

        Raises:
            InputError: another task (with a did-you-mean).
        """
        if isinstance(task, CausalLM):
            return task
        if not isinstance(task, str):
            raise InputError(f"task is a {type(task).__name__}; give 'causal-lm', or planish.CausalLM(logits='all').")
        if task != TASK:
            raise unknown("task", task, (TASK,))
        return cls()


@dataclass(frozen=True)
class Facts:
    """What a runtime must know of a model beyond its graphs; kept in the program's provenance.

    Attributes:
        positions: how many tokens a row may have; None where nothing limits it.
        eos: ids of the tokens that end a row.
        pad: id that fills ended rows; None: the first of `eos`.
    """

    positions: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None

    def to_provenance(self) -> dict[str, str]:
        """The facts as text by key."""
        found = {"task": TASK, "eos_token_id": " ".join(map(str, self.eos))}
        if self.positions is not None:
            found["max_positions"] = str(self.positions)
        if self.pad is not None:
            found["pad_token_id"] = str(self.pad)
        return found

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, str]) -> Facts:
        """The facts that :meth:`to_provenance` wrote; an artifact may hold anything, so what is no number is an error.

        Raises:
            InputError: a value that is no number.
        """
        try:
            positions, pad = (provenance.get(key) for key in ("max_positions", "pad_token_id"))
            eos = tuple(int(text) for text in provenance.get("eos_token_id", "").split())
            return cls(None if positions is None else int(positions), eos, None if pad is None else int(pad))
        except ValueError as error:
            raise InputError(f"the program's provenance is damaged: {error}.") from error


def past_name(layer: int, part: str) -> str:
    """The name of a cache that `decode` reads."""
    return f"past_{layer}_{part}"


def present_name(layer: int, part: str) -> str:
    """The name of a cache that `prefill` or `decode` gives."""
    return f"present_{layer}_{part}"


def scale_name(cache: str) -> str:
    """The name of the scales of a cache in 8 bits, (batch, key-value heads, capacity, 1), from the cache's own."""
    return f"{cache}_scale"


def cache_layer(name: str) -> int | None:
    """The layer whose cache an input or output of that name is; None for other names."""
    match = _CACHE.fullmatch(name)
    return int(match[1]) if match else None
