"""From an entry of a program to what runs it, by target."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from planish.ir.errors import UnsupportedError
from planish.ir.target import Target
from planish.runtime.executable import CompiledEntry

if TYPE_CHECKING:
    from planish.ir.program import Program
    from planish.runtime.shared_weights import SharedWeights


def shared_weights(program: Program, target: Target) -> SharedWeights | None:
    """What :func:`compile_entry` is given for each entry of a program, so that they hold weights once on a GPU.

    None for programs and targets where each has its own, or where there is one memory for all anyway.
    """
    if target.name != "ort-cuda":
        return None
    from planish.runtime.shared_weights import for_target

    return for_target(program, target)


def compile_entry(program: Program, entry: str, target: Target, shared: SharedWeights | None = None) -> CompiledEntry:
    """Compiles an entry of a program for a target.

    Args:
        shared: of :func:`shared_weights`, the same for all entries.

    Raises:
        UnsupportedError: an operator has no code there, or what compiles it is not installed.
        InputError: an unknown option of the target.
    """
    if target.name == "ort-cpu":
        from planish.runtime.ort import compile_ort, kernel_library

        # One library for all entries, since an artifact has one.
        generated = kernel_library(list(program.entries.values()), target)
        return compile_ort(program.entry(entry), target, library=generated)
    if target.name == "ort-cuda":
        from planish.runtime.ort_cuda import compile_ort_cuda, kernels_of

        specs = [spec for name in program.entries for spec in program.inputs(name)] if target.buckets else []
        dims = {d for spec in specs for d in spec.shape or () if isinstance(d, str)}
        held = None if shared is None else shared.of(entry)
        library = kernels_of(program, target)
        return compile_ort_cuda(program.entry(entry), target, library=library, dims=dims, shared=held)
    if target.name == "tvm-cpu":
        from planish.runtime.tvm import compile_tvm

        return compile_tvm(program.entry(entry), target)
    if target.name == "tvm-cuda":
        from planish.runtime.tvm_cuda import compile_tvm_cuda

        return compile_tvm_cuda(program.entry(entry), target)
    raise UnsupportedError(f"target '{target.name}' is not implemented yet.")


def measured_on(program: Program, target: Target) -> Target:
    """The target to measure on: without the limit of memory where the program, as it is given, is beyond it.

    Passes may make it fit, and what they gain is relative to the program before them.
    """
    if target.name != "ort-cuda" or target.memory is None:
        return target
    from planish.runtime.ort_cuda import needs

    return target if needs(program, target).memory <= target.memory else replace(target, memory=None)


def require_memory(program: Program, target: Target) -> None:
    """Asks whether a program fits the memory that a target allows.

    Raises:
        MemoryBudgetError: it does not; the message says by how much. (Target tvm-cuda asks when it compiles.)
    """
    if target.name == "ort-cuda":
        from planish.runtime import ort_cuda

        ort_cuda.require_memory(program, target)


def for_another_machine(target: Target, *, measured: bool) -> bool:
    """Whether the program is made for another machine than this; says what is missing before anything is made.

    Raises:
        UnsupportedError: this machine can not run what the target is, or not measure it.
    """
    if target.device != "cuda":
        return False
    if target.runtime == "tvm":
        from planish.runtime.tvm_cuda import require

        may_be_elsewhere = True  # what it compiles is the same wherever it does
    else:
        from planish.runtime.ort_cuda import is_elsewhere, require

        may_be_elsewhere = is_elsewhere(target)
    try:
        require(target)
        return False
    except UnsupportedError as error:
        if not may_be_elsewhere:
            raise
        if measured:
            raise UnsupportedError(
                f"{str(error).rstrip('.')}; to make an artifact for another machine without measuring, say "
                "budget=planish.Budget(gates=False) (--no-gates)."
            ) from error
    return True
