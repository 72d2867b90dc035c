"""The two routes to the layers of a stream: the scopes of modules, and repeats of its segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from planish.ir.analyses.layer_parts import Signature, attends, is_view, residual, signature
from planish.ir.analyses.layers import Span
from planish.ir.analyses.stream import Stream
from planish.ir.blocks import module_path
from planish.ir.graphs import dims_of

Path = tuple[str, ...]
_NO_WEIGHTS = "holds no weights"
_SHARED = "shared keys and values, norms across layers, or states of others"

# --- scopes ------------------------------------------------------------------------------------------------


def by_scopes(stream: Stream) -> tuple[list[Span], dict[str, str]]:
    """Stacks of a stream by the module lists that its nodes come from, and by list why it is no stack.

    A segment belongs to the list member that most of its nodes come from: rewrites may leave the odd one elsewhere.
    Outer lists come first; a list inside of a member of a found stack is what that member is made of.
    """
    paths = [[p for node in core if (p := module_path(node))] for core in stream.core]
    families: dict[Path, None] = {}
    for group in paths:
        for path in group:
            families.update(dict.fromkeys(path[:k] for k, part in enumerate(path) if part.isdigit()))
    spans: list[Span] = []
    reasons: dict[str, str] = {}
    found: list[Path] = []
    for family in sorted(families, key=len):
        if any(family[: len(outer)] == outer for outer in found):
            continue
        span, reason = _family(stream, family, paths)
        if span is not None and not _uniform(span):
            inner = (f for f in families if len(f) > len(family) and f[: len(family)] == family)
            # The lists of sub-blocks inside of a layer are not uniform: attention is not a feed-forward network.
            if any(nested is not None and _uniform(nested) for nested, _ in (_family(stream, f, paths) for f in inner)):
                span, reason = None, "its modules differ, and are stacks of layers themselves"
        if span is not None:
            spans.append(span)
            found.append(family)
        if reason:
            reasons[".".join(family)] = reason
    return spans, reasons


def _uniform(span: Span) -> bool:
    """Whether the layers of a span have the same weight matrices and attentions, by shape and in order."""
    words = {tuple(word for k in range(a, b) if (word := signature(span.stream, k))) for a, b in pairwise(span.bounds)}
    return len(words) == 1


def _member(family: Path, paths: Sequence[Path]) -> int | None:
    """The number in `family` that most nodes of a segment have; None where most have none."""
    size = len(family)
    counts = Counter(int(p[size]) for p in paths if p[:size] == family and len(p) > size and p[size].isdigit())
    if not counts:
        return None
    number, count = counts.most_common(1)[0]
    return number if 2 * count >= len(paths) else None


def _uncut(stream: Stream, family: Path, paths: Sequence[Sequence[Path]]) -> str:
    """A list of modules of which several lie in one segment: more than a hidden state goes between them."""
    size = len(family)
    for k, group in enumerate(paths):
        inside = {p[size] for p in group if p[:size] == family and len(p) > size and p[size].isdigit()}
        if len(inside) > 1 and _attentions(stream, k) > 1:
            return f"more than a hidden state goes from layer to layer ({_SHARED})"
    return ""


def _attentions(stream: Stream, k: int) -> int:
    return sum(attends(stream, k, node) is not None for node in stream.core[k])


def entangled(streams: Sequence[Stream]) -> str:
    """Why several attentions of a model without scopes are no layers: they lie in one segment; else nothing."""
    for stream in streams:
        for k, (before, after) in enumerate(pairwise(stream.cuts)):
            if (count := _attentions(stream, k)) > 1:
                where = f"between '{before.name}' and '{after.name}' {count} attentions lie in a row"
                return f"{where}, and more than a hidden state goes from one to the next ({_SHARED})"
    return ""


def _family(stream: Stream, family: Path, paths: Sequence[Sequence[Path]]) -> tuple[Span | None, str]:
    """The stack that a list of modules is, or why it is none; neither where nothing speaks for one."""
    name = ".".join(family)
    members = [_member(family, group) for group in paths]
    uncut = _uncut(stream, family, paths)
    if uncut or len({m for m in members if m is not None}) < 2:
        return None, uncut
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for k, member in enumerate(members):
        if member is not None:
            if member in last and any(m not in (None, member) for m in members[last[member] : k]):
                return None, f"module {member} is run more than once"
            first.setdefault(member, k)
            last[member] = k
    order = sorted(first, key=first.__getitem__)
    runs: list[list[int]] = []
    reason = ""
    for member in order:
        problem = _not_a_layer(stream, first[member], last[member] + 1)
        if problem:
            reason = reason or (f"module {member} {problem}" if problem != _NO_WEIGHTS else "")
            continue
        if runs and _joins(stream, last[runs[-1][-1]] + 1, first[member]):
            runs[-1].append(member)
        else:
            runs.append([member])
    best = max(runs, key=len, default=[])
    if len(best) < 2:
        return None, reason
    bounds = (*(first[m] for m in best), last[best[-1]] + 1)
    return Span(stream, bounds, name, tuple(f"{name}.{m}" for m in best), "scopes"), reason


def _joins(stream: Stream, end: int, start: int) -> bool:
    """Whether nothing but segments without weights lies between two members; they count to the first."""
    return all(not signature(stream, k) for k in range(end, start))


def _not_a_layer(stream: Stream, start: int, end: int) -> str:
    if not any(signature(stream, k) for k in range(start, end)):
        return _NO_WEIGHTS
    problem = _changes_shape(stream, start, end)
    return f"changes the shape of the hidden state, {problem}" if problem else ""


def _changes_shape(stream: Stream, start: int, end: int) -> str:
    a, b = dims_of(stream.cuts[start]), dims_of(stream.cuts[end])
    if a is None or b is None or (len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))):
        return ""
    return f"{list(a)} to {list(b)}"


def _equal(a: int | str | None, b: int | str | None) -> bool:
    return not (isinstance(a, int) and isinstance(b, int)) or a == b


# --- structure ---------------------------------------------------------------------------------------------


def by_structure(stream: Stream) -> list[Span]:
    """Stacks of a stream by tandem repeats of its segments alone.

    Segments without weights count to the segment before them, so what repeats is a word over segments with weights.
    """
    heads, signatures = _words(stream)
    spans = []
    for start, period, count in _repeats(stream, heads, signatures, 0, len(heads)):
        bounds = [heads[start + i * period] for i in range(count)]
        bounds.append(_end(stream, heads, start, period, count))
        while bounds[0] > 0 and all(stream.core[b - 1] and is_view(stream, b - 1) for b in bounds):
            bounds = [b - 1 for b in bounds]  # every layer begins with a view or a cast of the stream
        shapes = [_changes_shape(stream, a, b) for a, b in pairwise(bounds)]
        if not any(shapes):
            spans.append(Span(stream, tuple(bounds), "", (), "structure"))
    return spans


def _words(stream: Stream) -> tuple[list[int], list[Signature]]:
    heads, signatures = [], []
    for k in range(len(stream.core)):
        if found := signature(stream, k):
            heads.append(k)
            signatures.append(found)
    return heads, signatures


def _end(stream: Stream, heads: Sequence[int], start: int, period: int, count: int) -> int:
    """The cut where the last repeat ends: it keeps as many weightless segments as the one before it has."""
    last = heads[start + count * period - 1]
    limit = heads[start + count * period] if start + count * period < len(heads) else len(stream.core)
    before = heads[start + (count - 1) * period - 1]
    next_to_before = heads[start + (count - 1) * period]
    end = last + 1
    for k in range(before + 1, next_to_before):
        if end >= limit or _ops(stream, end) != _ops(stream, k):
            break
        end += 1
    return end


def _ops(stream: Stream, k: int) -> list[str]:
    return sorted(node.op_type for node in stream.core[k])


def _repeats(
    stream: Stream, heads: Sequence[int], words: Sequence[Signature], low: int, high: int
) -> list[tuple[int, int, int]]:
    """(start, period, count) of the repeats between two positions that cover the most, the shortest period first."""
    best: tuple[int, int, int] | None = None  # covered, start, period
    for period in range(1, (high - low) // 2 + 1):
        start = low
        while start < high - period:
            end = start
            while end < high - period and words[end] == words[end + period]:
                end += 1
            length = end + period - start
            covered = length - length % period
            if covered >= 2 * period and (best is None or covered > best[0]):
                best = (covered, _phase(stream, heads, start, period, length), period)
            start = max(end, start + 1)
    if best is None:
        return []
    covered, start, period = best
    return [
        *_repeats(stream, heads, words, low, start),
        (start, period, covered // period),
        *_repeats(stream, heads, words, start + covered, high),
    ]


def _phase(stream: Stream, heads: Sequence[int], start: int, period: int, length: int) -> int:
    """Where a layer starts, if the repeat leaves a choice: at a residual stream that goes into self-attention."""

    def rank(offset: int) -> tuple[bool, bool, int]:
        head = heads[start + offset]
        kinds = [attends(stream, head, node) for node in stream.core[head]]
        return (False not in kinds, residual(stream, head) is None, offset)

    return start + min(range(length % period + 1), key=rank)
