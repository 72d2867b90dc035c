"""One model on several devices, in the way that is fastest there: what `planish.passes.parallel` makes, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planish.ir.errors import UnsupportedError
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.lowering.lower_cuda_normalization import LowerCudaNormalization
from planish.passes.parallel.pipeline_all_reduce import PipelineAllReduce
from planish.passes.parallel.split import tensor_parallel
from planish.runtime.parallel.exchange import KINDS
from planish.runtime.parallel.group import Choice, Group, fastest
from planish.runtime.parallel.torch_ops import Attend, contiguous_attention


@dataclass(frozen=True)
class Parallel:
    """What :func:`parallelize` made.

    Attributes:
        choice: the way that is taken, and how fast the others are relative to the first.
        left_out: ways that were not measured, with the reason.
    """

    choice: Choice
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> Group:
        """What runs the model."""
        return self.choice.group


def parallelize(
    program: Program,
    feeds: Mapping[str, Any],
    ranks: int = 2,
    *,
    devices: Sequence[str] | None = None,
    dtype: str | None = None,
    attend: Attend = contiguous_attention,
    chunks: Sequence[int] = (2,),
    least: int = 1024,
    gain: float = 1.02,
    seconds: float = 5.0,
) -> Parallel:
    """Shares a program out among devices of this process, in the fastest of several ways for inputs like `feeds`.

    The ways are each exchange of `Group` ("nccl" and "copy") with all rows at once, and with rows in chunks
    (`pipeline-all-reduce`). The first that runs here stays unless another is faster beyond doubt; all have one copy of
    the weights. The program is as the recognizing passes leave it, and is not changed.

    Args:
        devices, dtype, attend: as those of `Group`.
        chunks, least: how many chunks are tried, and the rows that one has at least.
        gain, seconds: as those of `fastest`.

    Raises:
        InputError: wrong numbers, or an input is missing.
        UnsupportedError: the program can not be shared out, or no way runs here; the message says why.
    """
    forms = _forms(tensor_parallel(program, ranks).programs, chunks, least)
    groups: dict[str, Group] = {}
    left_out = {name: form for name, form in forms.items() if isinstance(form, str)}
    for kind in reversed(KINDS):  # NCCL first: it is what others are held against
        for name, form in forms.items():
            if isinstance(form, str):
                continue
            like = next(iter(groups.values()), None)
            try:
                made = Group(form, devices, kind, dtype=dtype, attend=attend, like=like)
            except UnsupportedError as error:
                left_out[f"{kind}, {name}"] = str(error)
            else:
                groups[f"{kind}, {name}"] = made
    if not groups:
        raise UnsupportedError(f"no way runs here: {'; '.join(dict.fromkeys(left_out.values()))}")
    return Parallel(fastest(groups, feeds, gain=gain, seconds=seconds), left_out)


def _forms(programs: Sequence[Program], chunks: Sequence[int], least: int) -> dict[str, list[Program] | str]:
    """The programs of all ranks by form, or why there are none."""
    whole = []
    for program in programs:
        one = program.clone()
        one.target = Target.parse("ort-cuda")  # whose operators `Rank` has: the residual goes with the norm
        LowerCudaNormalization().apply(one, PassContext(one.target))
        whole.append(one)
    forms: dict[str, list[Program] | str] = {"all rows": whole}
    for count in chunks:
        made = [program.clone() for program in whole]
        results = [PipelineAllReduce(count, least).apply(program, PassContext()) for program in made]
        reasons = dict.fromkeys(item.reason for item in results[0].declined)
        forms[f"{count} chunks"] = made if results[0].fired else "; ".join(reasons) or "there are no sums"
    return forms
