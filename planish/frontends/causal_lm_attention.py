"""Attention of a transformers decoder, as each entry has it: causal over the prompt, or one token over a cache.

During a capture the model's attention is replaced, through the interface that transformers has for this, by
functions that record each layer's keys and values and emit one operator a layer. Rows have no padding before their
tokens, so neither entry needs a padding mask: in `prefill` a row's padding comes after its tokens, where causal
attention does not look, and in `decode` every row has its own length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from planish.ir.errors import UnsupportedError

INTERFACE = "planish"
#: ONNX Runtime's GroupQueryAttention takes heads of a multiple of this size; smaller ones are filled up with zeros.
HEAD_MULTIPLE = 8
#: Arguments that some models hand to attention, and that change what it computes in a way not written here.
_REFUSED = ("s_aux", "position_bias", "head_mask", "block_mask", "indexer")

Cache = dict[int, tuple[torch.Tensor, torch.Tensor]]


class Recorder:
    """What one run of the model under capture attends to.

    Stands for the model's cache: `update` hands keys and values on as they are.

    Args:
        past: layer → keys and values (batch, heads, capacity, size), for `decode`; None for `prefill`.
        lengths: tokens that the caches hold of each row, (batch) int64.
        tokens: new tokens of each row.
    """

    is_compileable = False
    is_sliding: list[bool] = []

    def __init__(self, past: Cache | None, lengths: torch.Tensor, tokens: Any = 1) -> None:
        self.past, self.lengths, self.tokens = past, lengths, tokens
        self.present: Cache = {}
        self.updated: int | None = None
        self._shared: dict[Any, Any] = {}

    # --- what models ask of a cache ----------------------------------------------------------------------

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Takes a layer's new keys and values and gives them back."""
        if self.updated is not None:
            raise UnsupportedError(f"layer {self.updated} does not attend through transformers' attention interface")
        if layer_idx in self.present:
            raise UnsupportedError(f"layer {layer_idx} writes its cache twice")
        self.updated = layer_idx
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    # --- attention ---------------------------------------------------------------------------------------

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a layer whose keys and values were given to :meth:`update` just before.

        Args:
            query: (batch, heads, new tokens, size).
            keys, values: (batch, key-value heads, new tokens, size).
            scale: of the scores.
            window: how many positions, its own included, a token looks back at most.
            softcap: scores are bounded to plus or minus this by tanh.
            slopes: (heads) of a bias that grows with the position of a key (ALiBi).

        Returns:
            (batch, new tokens, heads, size).
        """
        layer, self.updated = self.updated, None
        if layer is None:
            raise UnsupportedError("a layer attends to keys of another layer, or to none of its own")
        if keys.shape[-1] != values.shape[-1]:
            raise UnsupportedError(f"layer {layer}: keys of size {keys.shape[-1]}, values of size {values.shape[-1]}")
        size = query.shape[-1]
        fill = -size % HEAD_MULTIPLE
        if fill:
            query, keys, values = (F.pad(x, (0, fill)) for x in (query, keys, values))
        options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "slopes": slopes}
        result = (self._prompt if self.past is None else self._step)(layer, query, keys, values, **options)
        return result[..., :size] if fill else result

    def _prompt(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        self.present[layer] = keys, values
        mask = self._mask(query.shape[-2], window, slopes)
        if softcap:
            given = {"scale": scale, "softcap": softcap, "is_causal": mask is None}
            result = torch.onnx.ops.attention(query, keys, values, mask, **given)[0]
        else:
            grouped = query.shape[1] != keys.shape[1]
            result = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        return result.transpose(1, 2)

    def _mask(self, tokens: Any, window: int | None, slopes: torch.Tensor | None) -> torch.Tensor | None:
        """What a token may see beyond that it sees no later one; layers share it. None if nothing limits it."""
        if window is None and slopes is None:
            return None
        key = (window, slopes is None)
        if key not in self._shared:
            at = torch.arange(tokens)
            back = at[:, None] - at[None, :]
            seen = back >= 0
            if window is not None:
                seen = seen & (back < window)
            if slopes is not None:
                bias = slopes[None, :, None, None] * at.to(slopes.dtype)[None, None, None, :]
                self._shared[key] = torch.where(seen[None, None], bias, torch.finfo(slopes.dtype).min)
            else:
                self._shared[key] = seen[None, None]
        return self._shared[key]  # type: ignore[no-any-return]

    def _step(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self.past is not None
        heads, groups, size = query.shape[1], keys.shape[1], query.shape[-1]
        rows = [x.transpose(1, 2).flatten(2) for x in (query, keys, values)]
        past = self.past[layer]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": groups, "scale": float(scale)}
        if window is not None:
            attributes["local_window_size"] = int(window)
        if softcap:
            attributes["softcap"] = float(softcap)
        held, total = self._sizes()
        inputs: list[torch.Tensor | None] = [*rows, *past, held, total]
        if slopes is not None:
            if not isinstance(self.tokens, int):
                raise UnsupportedError("attention with a bias by position (ALiBi) reads one token at a time")
            inputs += [None, None, None, self._bias(slopes, total, past[0].shape[2])]
        result, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=[query.dtype] * 3,
            shapes=[rows[0].shape, past[0].shape, past[1].shape],
            version=1,
        )
        self.present[layer] = present[0], present[1]
        return result.unflatten(2, (heads, size))

    def _sizes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of each row but the last new one, (batch) int32, and of the longest row, (1) int32."""
        if "sizes" not in self._shared:
            held = self.lengths.to(torch.int32)
            if isinstance(self.tokens, torch.SymInt) or self.tokens != 1:
                held = held + (self.tokens - 1)
            self._shared["sizes"] = held, held.max(dim=0, keepdim=True).values + 1
        return self._shared["sizes"]  # type: ignore[no-any-return]

    def _bias(self, slopes: torch.Tensor, total: torch.Tensor, capacity: Any) -> torch.Tensor:
        """(1, heads, 1, total). Its size depends on a value, which torch can not say: the capacity stands for it."""
        if "bias" not in self._shared:
            limit = total.to(slopes.dtype).reshape(())
            zero, one = torch.zeros_like(limit), torch.ones_like(limit)
            at = torch.onnx.ops.symbolic(
                "Range", [zero, limit, one], dtype=slopes.dtype, shape=[capacity], metadata_props={UNSIZED: "1"}
            )
            self._shared["bias"] = slopes[None, :, None, None] * at[None, None, None, :]
        return self._shared["bias"]  # type: ignore[no-any-return]


#: Metadata of a node whose declared size, and that of all that is computed from it elementwise, is not its own.
UNSIZED = "planish.unsized"

_active: list[Recorder] = []


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Makes `recorder` the one that models attend through."""
    _active.append(recorder)
    try:
        yield
    finally:
        _active.pop()


def current() -> Recorder:
    """The recorder of the capture that is going on."""
    return _active[-1]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form that transformers' ``AttentionInterface`` asks for."""
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"its attention takes '{name}', which has no form here")
    if attention_mask is not None:
        raise UnsupportedError("its attention takes a mask of its own making")
    if not (getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]):
        raise UnsupportedError("its attention is not causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(scale, int | float):
        raise UnsupportedError("the scale of its attention is computed, not a number")
    return current().attend(query, key, value, scale=scale, window=sliding_window, softcap=softcap), None
