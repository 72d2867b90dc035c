"""Executable: what `planish.optimize` and `planish.load` return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from planish.ir.errors import InputError, unknown
from planish.ir.spec import TensorSpec
from planish.ir.target import Target

if TYPE_CHECKING:
    from planish.ir.program import Program
    from planish.runtime.report import Report


class Runner(Protocol):
    """One compiled entry."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]: ...


class CompiledEntry(Runner, Protocol):
    """What a target's compiler gives: a runner that can be measured and exported."""

    notes: list[str]

    def prepared(self, feeds: Mapping[str, Any]) -> Callable[[], Any]: ...


class Executable:
    """An optimized program, compiled for its target.

    Call it with inputs in order or by name; one output comes as an array, several as a tuple in output order.
    :meth:`run` takes and gives dicts by name. NumPy arrays in, NumPy arrays out; if any input is a torch tensor,
    the outputs are torch tensors. Arrays are shared with the runtime, not copied.

    Args:
        program: what was compiled; None when only the compiled form is at hand (a loaded artifact).
        runners: compiled entries by name.
        report: what was done (see :class:`planish.runtime.report.Report`), or a function that reads it.
        pipeline: the passes, as a string that parses back.
        provenance: where the program came from.
        target: by default the program's.
        source: the artifact folder this was loaded from, if any.
    """

    def __init__(
        self,
        program: Program | None,
        runners: Mapping[str, Runner],
        *,
        report: Report | Callable[[], Report | None] | None = None,
        pipeline: str = "",
        provenance: Mapping[str, str] | None = None,
        target: Target | None = None,
        source: Path | None = None,
    ) -> None:
        if not runners:
            raise InputError("an executable needs at least one entry.")
        self.program = program
        self.runners = dict(runners)
        self.pipeline = pipeline
        self.provenance = dict(provenance if provenance is not None else program.provenance if program else {})
        self.target = target or (program.target if program is not None else Target())
        self.source = source
        self._report = report

    @property
    def report(self) -> Report | None:
        """What was done, what it cost and what it gained; None if nothing recorded it."""
        if callable(self._report):
            self._report = self._report()
        return self._report

    @property
    def entries(self) -> list[str]:
        """Names of the entries; a plain model has ``["main"]``."""
        return list(self.runners)

    @property
    def inputs(self) -> list[TensorSpec]:
        """Inputs of the only entry, or of ``"main"``; of another entry: ``exe.runners[name].inputs``."""
        return self._runner(None).inputs

    @property
    def outputs(self) -> list[TensorSpec]:
        """Outputs of the only entry, or of ``"main"``."""
        return self._runner(None).outputs

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Runs on inputs in order, by name, or both; returns one array, or a tuple of several.

        Raises:
            InputError: an input is unknown, missing, given twice, or of another dtype or shape.
        """
        runner = self._runner(None)
        feeds = _bind(runner.inputs, args, named) if args else named
        named_outputs = runner.run(feeds)
        outputs = tuple([named_outputs[spec.name] for spec in runner.outputs])  # a graph may list an output twice
        return outputs[0] if len(outputs) == 1 else outputs

    def run(self, inputs: Mapping[str, Any], entry: str | None = None) -> dict[str, Any]:
        """Runs an entry on inputs by name; returns outputs by name."""
        if not isinstance(inputs, Mapping):
            raise InputError(f"run takes a dict of arrays by input name, not {type(inputs).__name__}.")
        return self._runner(entry).run(inputs)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 20,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        attention_mask: Any = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stream: Callable[[Any], object] | None = None,
    ) -> Any:
        """Continues prompts; for programs of the task ``"causal-lm"``.

        Without `do_sample` the result is, token for token, that of ``generate(do_sample=False)`` of transformers.

        Args:
            input_ids: integers (batch, sequence), an array or a torch tensor.
            max_new_tokens: how many tokens to add at most.
            eos_token_id: tokens that end a row; None: the model's own; ``[]``: none.
            pad_token_id: fills rows that have ended; None: the model's own, else its first end token.
            attention_mask: (batch, sequence), 1 for tokens and 0 for padding on either side of a row.
            do_sample: draw tokens by their probability instead of taking the likeliest.
            temperature: logits are divided by it; above 0.
            top_k: draw among the k likeliest tokens; 0: among all.
            top_p: draw among the likeliest tokens that together have this probability; 1: among all.
            repetition_penalty: above 1 makes tokens that are already in the row less likely.
            seed: the same seed draws the same tokens; None: different ones each time.
            stream: called after each step with the new tokens, (batch) int64.

        Returns:
            the prompts and what was added, (batch, sequence + added) int64; a torch tensor if `input_ids` is one.

        Raises:
            InputError: an argument is wrong, or prompt and new tokens together are longer than the model allows.
        """
        from planish.runtime.generate import generate
        from planish.runtime.sampling import Sampling

        return generate(
            self,
            input_ids,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            attention_mask=attention_mask,
            sampling=Sampling(do_sample, temperature, top_k, top_p, repetition_penalty),
            seed=seed,
            stream=stream,
        )

    def export(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes an artifact folder that :func:`planish.load` reads; all of it, or nothing.

        Args:
            path: the folder to make; its parent must exist.
            overwrite: replace an artifact that is already there. Anything else there is never replaced.

        Raises:
            InputError: the folder exists, can not be written, or the disk is full.
        """
        from planish.runtime.artifact import export_artifact

        return export_artifact(self, path, overwrite=overwrite)

    def __repr__(self) -> str:
        entries = "; ".join(
            f"{name}({', '.join(map(str, r.inputs))}) -> ({', '.join(map(str, r.outputs))})"
            for name, r in self.runners.items()
        )
        return f"<planish.Executable for {self.target}: {entries}>"

    def _runner(self, entry: str | None) -> Runner:
        if entry is not None:
            if entry not in self.runners:
                raise unknown("entry", entry, self.runners)
            return self.runners[entry]
        if len(self.runners) == 1:
            return next(iter(self.runners.values()))
        if "main" in self.runners:
            return self.runners["main"]
        raise InputError(
            f"this program has the entries {', '.join(self.runners)}; run(inputs, entry=...) picks one, "
            "--entry on the command line."
        )


def _bind(specs: Sequence[TensorSpec], args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(specs):
        listed = "; ".join(map(str, specs)) or "none"
        raise InputError(f"{len(args)} inputs were given, but there are {len(specs)}: {listed}.")
    feeds = {spec.name: value for spec, value in zip(specs, args, strict=False)}
    for name in named:
        if name in feeds:
            raise InputError(f"input '{name}' was given twice: at position {list(feeds).index(name)} and by name.")
    return feeds | named
