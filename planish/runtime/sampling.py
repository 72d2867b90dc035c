"""The next token from logits: greedy, or drawn after temperature, top-k and top-p. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the order of steps and their meaning are those of ``transformers``.

    Attributes:
        do_sample: draw; False takes the likeliest token, and the three below do not count.
        temperature: logits are divided by it; above 0.
        top_k: only the k likeliest tokens are kept, and those as likely as the last of them; 0 keeps all.
        top_p: only the likeliest tokens are kept that together reach this probability, at least one; 1 keeps all.
        repetition_penalty: positive logits of tokens already in the row are divided by it, negative ones multiplied.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, "above 0", lambda x: 0 < x < np.inf)
        _number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _number("repetition_penalty", self.repetition_penalty, "above 0", lambda x: 0 < x < np.inf)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise InputError(f"top_k is {self.top_k!r}; it must be an integer of at least 0 (0 keeps all tokens).")

    def choose(self, logits: np.ndarray, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The next token of each row.

        Args:
            logits: (batch, vocabulary), float; not changed.
            rows: tokens so far, (batch, length).
            random: what draws are made with.

        Returns:
            (batch) int64.
        """
        if self.repetition_penalty != 1.0:
            logits = _penalized(logits, rows, self.repetition_penalty)
        if not self.do_sample:
            best: np.ndarray = logits.argmax(axis=-1)
            return best.astype(np.int64)
        chances = self.probabilities(logits)
        sums = np.cumsum(chances, axis=-1)
        drawn = random.random((len(chances), 1)) * sums[:, -1:]
        # The first token whose sum passes the draw; a token of no chance never is.
        chosen: np.ndarray = np.minimum((sums <= drawn).sum(axis=-1), chances.shape[-1] - 1)
        return chosen.astype(np.int64)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The chance of each token, (batch, vocabulary) float64, after temperature, top-k and top-p."""
        scores = logits.astype(np.float64) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = np.partition(scores, -self.top_k, axis=-1)[:, -self.top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        chances = _softmax(scores)
        if self.top_p < 1.0:
            order = np.argsort(chances, axis=-1, kind="stable")  # the least likely first
            sums = np.cumsum(np.take_along_axis(chances, order, -1), axis=-1)
            dropped = sums <= 1.0 - self.top_p
            dropped[:, -1] = False
            np.put_along_axis(chances, order, np.where(dropped, 0.0, np.take_along_axis(chances, order, -1)), -1)
            chances /= chances.sum(axis=-1, keepdims=True)
        return chances


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return result


def _penalized(logits: np.ndarray, rows: np.ndarray, penalty: float) -> np.ndarray:
    logits = logits.copy()
    seen = np.take_along_axis(logits, rows, axis=-1)
    np.put_along_axis(logits, rows, np.where(seen < 0, seen * penalty, seen / penalty).astype(logits.dtype), axis=-1)
    return logits


def _number(name: str, value: Any, span: str, fits: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not fits(value):
        raise InputError(f"{name} is {value!r}; it must be a number {span}.")
