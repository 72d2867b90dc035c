"""The exact pipeline that each target gets when the user names none."""

from __future__ import annotations

from collections.abc import Sequence

from planish.ir.errors import InputError
from planish.ir.target import Target
from planish.passes.base import ApproximatePass, Pass
from planish.passes.pipeline import parse_pipeline

# Cleaning comes first, so that fusions see one form of a thing; fusions come largest first, since a small one
# would take apart what a larger one looks for; and what they leave behind is cleaned at the end.
CLEAN = (
    "lift-constants",
    "fold-constants",
    "remove-no-ops",
    "simplify-shapes",
    "compose-views",
    "eliminate-common-subexpressions",
    "eliminate-dead-code",
)
# With Attention the sizes around it are known, which the shape arithmetic of older exporters hides.
_VIEWS = ("infer-shapes", "simplify-shapes", "remove-no-ops", "compose-views", "eliminate-dead-code")
_FUSE = (
    "fuse-rotary-embedding",
    "fuse-attention",
    "share-kv-heads",
    *_VIEWS,
    "fuse-kv-cache",
    "split-packed-heads",
    "merge-attention-heads",
    "fuse-layer-norm",
    "fuse-rms-norm",
    "fuse-gelu",
    "fuse-silu",
    "fuse-swiglu",
    "fuse-matmul-add",
    "unflatten-gemm",
    "unpack-qkv",
    "fold-batch-norm",
    "fold-scale-shift",
)
# Files often carry no types of inner values, and most rules ask for them; more follow once shapes are simplified.
_LOWER = (
    "lower-feed-forward",
    "compose-views",
    "cancel-transposes",
    "compose-views",
    "eliminate-dead-code",
    "lower-residual-add",
    "lower-flash-attention",
    # All layers share the masks of blocks, and the conditions.
    "fuse-block-sparse",
    "lower-window-attention",
    "lower-block-sparse",
    "lower-causal-attention",
    "eliminate-common-subexpressions",
    "eliminate-dead-code",
)
# Numbers that are computed from sizes, the scale of attention among them, are known then.
_TYPES = ("infer-shapes", "simplify-shapes", "fold-constants")
# With generated kernels a product takes what follows it along; what has no kernel is lowered as without them.
_KERNELS = ("lower-linear", "lower-normalization", "fuse-block-sparse", "lower-attention", "eliminate-dead-code")
#: Cleaning and recognition: everything before a form is chosen for the runtime.
RECOGNIZE = ("raise-opset", "infer-shapes", *CLEAN, *_TYPES, *_FUSE, *CLEAN)
# What the CUDA provider has one kernel for; there is nothing to choose by length.
_CUDA = (
    "lower-patch-embedding",
    "lower-cuda-cache",
    "lower-cuda-step",
    "lower-cuda-prompt",
    "lower-cuda-attention",
    "lower-cuda-normalization",
    "lower-cuda-activation",
    "eliminate-dead-code",  # rotations that an operator does itself read the projections too
    "pack-quantized-projections",
    "eliminate-common-subexpressions",
    "eliminate-dead-code",
    "lower-cuda-opset",
)
#: Target → what lowers the recognized program.
_LOWERINGS = {
    "ort-cpu": _LOWER,
    "ort-cpu:kernels": (*_KERNELS, *_LOWER),
    "ort-cuda": _CUDA,
    "ort-cuda:kernels": (
        "lower-cuda-relational",
        "lower-cuda-merging",
        "eliminate-dead-code",
        *_CUDA,
        "lower-cuda-quantized",
    ),
    "tvm-cpu": ("lower-linear", "lower-normalization", "eliminate-dead-code"),
    # Products take what is added behind them along when they are translated, in any dtype.
    "tvm-cuda": ("narrow-attention-mask", "eliminate-dead-code"),
}


def default_pipeline(target: Target | str) -> str:
    """The pipeline string of a target's exact passes."""
    return ",".join(_parts(target)[0] + _parts(target)[1])


def lowering(target: Target | str) -> tuple[str, ...]:
    """The passes that choose forms for a target, after recognition."""
    return _parts(target)[1]


def with_approximate(target: Target | str, approximate: Sequence[Pass]) -> list[Pass]:
    """The target's exact passes with approximate ones where they belong, in the order that the passes declare.

    Raises:
        InputError: one of them is exact.
    """
    for item in approximate:
        if not isinstance(item, ApproximatePass):
            raise InputError(f"'{item.name}' is an exact pass; approximate= takes approximate ones, passes= takes any.")
    given = sorted((item for item in approximate if isinstance(item, ApproximatePass)), key=lambda item: item.order)
    recognize, lower = (parse_pipeline(",".join(part)) for part in _parts(target))
    early, late = ([item for item in given if item.lowered == lowered] for lowered in (False, True))
    return [*recognize, *early, *lower, *late]


def _parts(target: Target | str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What recognizes, and what lowers."""
    target = Target.parse(target)
    name = f"{target.name}:kernels" if target.runtime == "ort" and target.kernels else target.name
    return (RECOGNIZE, _LOWERINGS[name]) if name in _LOWERINGS else (CLEAN, ())
