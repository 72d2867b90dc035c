"""The command line: parses, calls the library, prints. What the commands do is in
`planish.cli.commands`, `planish.cli.debugging` and `planish.cli.benchmark`.

Exit codes: 0 done, 1 ran but a gate or a check failed, 2 bad input, 130 interrupted. With ``--json``, stdout holds
one JSON object and nothing else; everything for people goes to stderr.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

if TYPE_CHECKING:
    from planish.runtime.progress import Progress

Model = Annotated[str, typer.Argument(metavar="MODEL", help="An ONNX file.", show_default=False)]
Path_ = Annotated[str, typer.Argument(metavar="PATH", help="An ONNX file or an artifact folder.", show_default=False)]
Artifact = Annotated[str, typer.Argument(metavar="ARTIFACT", help="An artifact folder.", show_default=False)]
TargetText = Annotated[str, typer.Option("--target", "-t", help="What to compile for, e.g. ort-cpu:threads=2.")]
Threads = Annotated[int | None, typer.Option(help="Intra-op threads; 0 lets the runtime choose.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]
InputFiles = Annotated[
    list[str] | None,
    typer.Option("--inputs", help="Arrays by input name, .npz. Left out: made up.", show_default=False),
]
Dims = Annotated[
    list[str] | None, typer.Option("--dim", help="Size of a symbolic dimension, name=size.", show_default=False)
]
Pipeline = Annotated[
    str | None,
    typer.Option(
        "--passes", "-p", help="Pipeline, e.g. 'fuse-gelu,fold-constants'. Left out: the target's exact passes."
    ),
]
Approximate = Annotated[
    str | None,
    typer.Option(
        "--approximate", "-a", help="Approximate passes beside the exact ones, e.g. 'quantize-weights{bits=4}'."
    ),
]

app = typer.Typer(
    name="planish",
    help="A graph optimizer whose every pass is gated by a measured error and a measured gain.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from planish.version import __version__

        print(f"planish {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    if debug:
        os.environ["PLANISH_DEBUG"] = "1"


@app.command()
def optimize(
    model: Model,
    target: TargetText = "ort-cpu",
    passes: Pipeline = None,
    approximate: Approximate = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Artifact folder to make.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an artifact that is already there.")] = False,
    budget: Annotated[str | None, typer.Option(help="Limits: error=1e-3,min_gain=1.02,seconds=30.")] = None,
    no_gates: Annotated[bool, typer.Option("--no-gates", help="Apply the passes without measuring.")] = False,
    inputs: InputFiles = None,
    threads: Threads = None,
    report: Annotated[str | None, typer.Option(help="Also write the HTML report to this file.")] = None,
    journal: Annotated[str | None, typer.Option(help="Keep the decisions of the gates in this file.")] = None,
    resume: Annotated[bool, typer.Option("--continue", help="Go on from the --journal of an interrupted run.")] = False,
    print_after: Annotated[
        list[str] | None, typer.Option(help="Print the program after this pass; '*' for each that changed it.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Verify in full around every pass.")] = False,
    json: Json = False,
) -> int:
    """Optimizes a model and writes an artifact.

    Exits with 1 if a pass that -p or -a names was rolled back, or an exact pass raised or changed the numbers.
    """
    from pathlib import Path

    from planish.cli import commands, debugging, files, printing
    from planish.driver import Hooks, Interrupted, optimize
    from planish.passes.gates import DEFAULT_SECONDS
    from planish.runtime.artifact_writer import check_target

    wanted = commands.make_target(target, threads)
    limits = commands.parse_budget(budget, gates=not no_gates)
    debugging.check_pass_names(print_after or [])
    if output is not None:
        check_target(Path(output), overwrite)
    data = files.batches(inputs or [])
    seconds = (limits.seconds if limits.seconds is not None else DEFAULT_SECONDS) if limits.gates else None
    with _progress(f"optimizing {os.path.basename(model)}", json, seconds) as progress:
        hooks = Hooks(
            progress=progress,
            instruments=commands.instruments(print_after or [], verify, sys.stderr if json else sys.stdout),
            journal=commands.journal(journal, resume),
        )
        try:
            given: dict[str, Any] = {"passes": passes, "approximate": approximate, "calibration": data}
            exe, stopped = optimize(model, wanted, **given, budget=limits, hooks=hooks), False
        except Interrupted as interrupt:
            saved = commands.salvage(model, interrupt, wanted, passes, approximate, synthetic=data is None)
            if saved is None or output is None:
                raise
            exe, stopped = saved, True
        if output is not None:
            progress("writing the artifact")
            exe.export(output, overwrite=overwrite)
    assert exe.report is not None
    if report is not None:
        exe.report.to_html(report)
    failed = commands.failed_passes(exe.report, named=passes is not None, approximate=approximate is not None)
    if not json:
        printing.optimized(exe.report, output, failed)
    elif not stopped:
        _emit(exe.report.to_dict() | {"artifact": output, "failed": failed})
    if stopped:
        raise commands.StoppedError(f"interrupted; the best program so far is in '{output}'.")
    return int(bool(failed))


@app.command()
def run(
    artifact: Path_,
    inputs: InputFiles = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Write the outputs to this .npz file.")] = None,
    entry: Annotated[str | None, typer.Option(help="Entry to run, if there are several.")] = None,
    threads: Threads = None,
    dim: Dims = None,
    allow_native: Annotated[bool, typer.Option("--allow-native", help="Load native code of the artifact.")] = False,
    json: Json = False,
) -> int:
    """Runs an artifact (or an ONNX file on plain ONNX Runtime) once."""
    from planish.cli import commands, printing

    with _progress("running", json):
        result = commands.run_once(artifact, inputs or [], output, entry, threads, dim or [], allow_native)
    _emit(result) if json else printing.ran(result)
    return 0


@app.command()
def bench(
    paths: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="ONNX files and artifacts.", show_default=False)
    ],
    inputs: InputFiles = None,
    target: TargetText = "ort-cpu",
    threads: Threads = None,
    dim: Dims = None,
    entry: Annotated[str | None, typer.Option(help="Entry to time, if there are several.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for all of it.", min=0.0)] = 10.0,
    runs: Annotated[int, typer.Option(help="Rounds at most.", min=1)] = 200,
    clock: Annotated[str, typer.Option(help="wall, or process for processor time.")] = "wall",
    allow_native: Annotated[bool, typer.Option("--allow-native", help="Load native code of artifacts.")] = False,
    json: Json = False,
) -> int:
    """Times models and artifacts against each other, interleaved; ratios are against the first."""
    from planish.cli import benchmark, commands, printing

    given = commands.one_batch(inputs or [])
    with _progress("benchmark", json, seconds) as progress:
        found = benchmark.compare(
            paths,
            given,
            target=commands.make_target(target, threads),
            dims=commands.parse_dims(dim or []),
            entry=entry,
            seconds=seconds,
            max_runs=runs,
            clock=clock,
            allow_native=allow_native,
            progress=progress,
        )
    _emit(found.to_dict()) if json else printing.benched(found)
    return 0


@app.command()
def verify(
    artifact: Artifact,
    threads: Threads = None,
    allow_native: Annotated[bool, typer.Option("--allow-native", help="Load native code of the artifact.")] = False,
    json: Json = False,
) -> int:
    """Checks an artifact's files, and runs its golden inputs on this machine."""
    from planish.cli import commands, printing

    with _progress("verifying", json):
        result, ok = commands.verify(artifact, threads, allow_native)
    _emit(result) if json else printing.verified(result, ok)
    return 0 if ok else 1


@app.command()
def inspect(
    path: Annotated[
        str | None,
        typer.Argument(metavar="[PATH]", help="An ONNX file or an artifact folder; without one: the machine."),
    ] = None,
    target: TargetText = "ort-cpu",
    dim: Dims = None,
    json: Json = False,
) -> int:
    """Shows inputs, operators, costs, blocks, and which operators the target has kernels for; of an artifact also what
    it needs of a machine, and whether this one has it. Without a path: what this machine has for the target.
    """
    from planish.cli import commands, printing

    with _progress("inspecting", json):
        found = commands.inspect(path, commands.make_target(target, None), commands.parse_dims(dim or []))
    _emit(found) if json else printing.inspected(found)
    return 0


@app.command("passes")
def list_passes(json: Json = False) -> int:
    """Lists every pass with its kind and options."""
    from planish.cli import debugging, printing

    found = debugging.describe_passes()
    _emit({"passes": found}) if json else printing.passes(found)
    return 0


@app.command()
def explain(
    model: Path_,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[PASS]", help="A pass, with options if need be; without one: all.", show_default=False),
    ] = None,
    target: TargetText = "ort-cpu",
    raw: Annotated[bool, typer.Option("--raw", help="Do not run the passes that usually come before.")] = False,
    limit: Annotated[int, typer.Option(help="Near misses of a pass to show.", min=1)] = 20,
    json: Json = False,
) -> int:
    """Shows where a pass fires, and every place where it nearly does, with the reason; or all passes, in order."""
    from planish.cli import commands, debugging, printing
    from planish.ir.errors import InputError

    where = commands.make_target(target, None)
    if name is None and raw:
        raise InputError("--raw is for one pass: all passes are shown where the pipeline runs them.")
    with _progress("explaining", json):
        found = debugging.explain_all(model, where) if name is None else None
        one = debugging.explain_pass(model, name, where, raw) if name is not None else None
    if json:
        _emit(found or one or {})
    elif found is not None:
        printing.explained_all(found, limit)
    elif one is not None:
        printing.explained(one, limit)
    return 0


@app.command()
def bisect(
    model: Model,
    passes: Pipeline = None,
    check: Annotated[
        str | None,
        typer.Option(help="Shell command: exits with 0 for a good model, else 1. {model} is the ONNX file."),
    ] = None,
    target: TargetText = "ort-cpu",
    inputs: InputFiles = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder for a reproducer.")] = None,
    json: Json = False,
) -> int:
    """Finds the pass of a pipeline that breaks a model. Without --check, by comparing outputs.

    Exits with 1 if a pass breaks it, 0 if none does.
    """
    from planish.cli import commands, debugging, printing

    with _progress("bisecting", json) as progress:
        result = debugging.bisect(
            model, passes, check, commands.make_target(target, None), commands.one_batch(inputs or []), progress
        )
    folder = debugging.save_found(result, output) if output is not None and result.culprit is not None else None
    found = debugging.bisected(result, folder)
    _emit(found) if json else printing.bisected(found)
    return 2 if result.broken_before else int(result.culprit is not None)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="An ONNX file or an artifact.", show_default=False)],
    after: Annotated[str, typer.Argument(metavar="B", help="An ONNX file or an artifact.", show_default=False)],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if they differ.")] = False,
    json: Json = False,
) -> int:
    """Shows what differs between two models: operators, blocks, nodes, weights, interface."""
    from planish.cli import files, printing
    from planish.ir.diff import diff_programs

    with _progress("comparing", json) as progress:
        progress(before)
        first = files.open_program(before)
        progress(after)
        found = diff_programs(first, files.open_program(after))
    _emit(found.to_dict()) if json else printing.diffed(found)
    return int(exit_code and not found.same)


# --- the end of every command ------------------------------------------------------------------------------


def _progress(title: str, json: bool, seconds: float | None = None) -> Progress:
    """A status line; off with --json, else up to the terminal."""
    from planish.runtime.progress import Progress

    return Progress(title, seconds=seconds, enabled=False if json else None)


def _emit(data: dict[str, Any]) -> None:
    import json

    from planish.runtime.report import encode

    print(json.dumps({"schema": 1} | encode(data), allow_nan=False), flush=True)


def main() -> NoReturn:
    """Runs the command line of this process and exits."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """Runs a command line and returns the exit code; nothing that a user can do raises."""
    # click's base of usage errors, wherever this version of typer keeps it
    usage_error = cast("type[Exception]", typer.BadParameter.__mro__[2])
    try:
        code = int(app(arguments, prog_name="planish", standalone_mode=False) or 0)
        return code if code != 130 else _fail(arguments, "interrupted.", 130)  # typer makes Ctrl-C an exit code
    except (KeyboardInterrupt, typer.Abort):
        return _fail(arguments, "interrupted.", 130)
    except usage_error as error:
        return _fail(arguments, f"{error.format_message()} See 'planish --help'.", 2)  # type: ignore[attr-defined]
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("PLANISH_DEBUG"):
            raise
        return _fail(arguments, *_explain(error))


def _explain(error: Exception) -> tuple[str, int]:
    from planish.ir.errors import PlanishError

    if isinstance(error, PlanishError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory.", 1
    where = "run again with --debug for the traceback, and please report it"
    return f"this is a bug in planish: {type(error).__name__}: {error}; {where}.", 1


def _fail(arguments: list[str], message: str, code: int) -> int:
    """The one line of an error on stderr, and with --json the same as an object on stdout."""
    from planish.runtime.units import printable

    lines = [printable(line, 2000) for line in message.splitlines()] or [""]
    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    print("\n".join([f"{red}error:{plain} {lines[0]}", *lines[1:]]), file=sys.stderr)
    if "--json" in arguments:
        _emit({"error": message, "exit_code": code})
    return code
