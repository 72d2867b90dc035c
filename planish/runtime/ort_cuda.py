"""What ONNX Runtime's CUDA provider needs: whether it is there, its options, and sessions on it."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from planish.ir.buckets import Buckets
from planish.ir.causal_lm import cache_layer
from planish.ir.errors import InputError, PlanishError, UnsupportedError, unknown
from planish.ir.machine import Machine, Needs, unmet
from planish.ir.spec import TensorSpec
from planish.ir.target import Target
from planish.runtime.ort_buckets import BucketedRunner
from planish.runtime.ort_device import DeviceRunner

if TYPE_CHECKING:
    import onnx_ir as ir

    from planish.ir.program import Program
    from planish.runtime.cuda.ort_library import CudaLibrary
    from planish.runtime.manifest import Manifest
    from planish.runtime.shared_weights import EntryWeights

PROVIDER = "CUDAExecutionProvider"
#: The first architecture with bfloat16.
_BFLOAT16 = 80
#: Options of the provider that a target string can give as ``cuda.<name>=<value>``; ONNX Runtime checks the values.
OPTIONS = (
    "arena_extend_strategy",
    "cudnn_conv1d_pad_to_nc1d",
    "cudnn_conv_algo_search",
    "cudnn_conv_use_max_workspace",
    "device_id",
    "do_copy_in_default_stream",
    "enable_skip_layer_norm_strict_mode",
    "fuse_conv_bias",
    "gpu_mem_limit",
    "prefer_nhwc",
    "sdpa_kernel",
    "use_tf32",
)


def require(target: Target, machine: Machine | None = None) -> None:
    """Asks for what a session needs, before anything is created.

    Args:
        machine: None for the one at hand.

    Raises:
        UnsupportedError: this build of ONNX Runtime has no CUDA provider, or the machine no driver, no GPU, or one of
            an older architecture than the target's.
        InputError: an unknown option of the target.
    """
    provider_options(target)
    if target.capability is not None:
        _require_bfloat16(target, f"sm_{target.capability}", target.capability, InputError)
    if machine is None:
        from planish.runtime.machine import machine as this_machine

        machine = this_machine()
    if PROVIDER not in machine.providers:
        has = ", ".join(machine.providers) or "none"
        raise UnsupportedError(
            f"target '{target}' needs ONNX Runtime with {PROVIDER}, and this build has {has}: install onnxruntime-gpu "
            "in the place of onnxruntime."
        )
    lacking = unmet(Needs(gpus=1), machine, device_index(target))
    if lacking:
        raise UnsupportedError(f"target '{target}' {lacking[0]}.")
    gpu = machine.gpus[device_index(target)]
    if target.arch and not gpu.runs([target.arch]):
        raise UnsupportedError(f"target '{target}' is for {target.arch}, and {gpu.name} is sm_{gpu.arch}.")
    _require_bfloat16(target, f"{gpu.name} is sm_{gpu.arch}, which", gpu.arch)


def _require_bfloat16(target: Target, what: str, arch: int, error: type[PlanishError] = UnsupportedError) -> None:
    if target.dtype == "bfloat16" and arch < _BFLOAT16:
        raise error(f"target '{target}': {what} has no bfloat16, sm_{_BFLOAT16} is the first; use float16.")


def is_elsewhere(target: Target) -> bool:
    """Whether a target names an architecture and this machine can not run for it: what is made is exported only."""
    if target.name != "ort-cuda" or target.arch is None:
        return False
    try:
        require(target)
    except UnsupportedError:
        return True
    return False


def kernels_of(program: Program, target: Target) -> CudaLibrary | None:
    """The library of kernels for all entries of a program, where the target has them and there is a use.

    Raises:
        UnsupportedError: what compiles them is not installed.
    """
    if not target.kernels:
        return None
    from planish.runtime.cuda.ort_library import library_for

    return library_for(program.entries.values())


def needs(program: Program, target: Target, libraries: Iterable[Any] = ()) -> Needs:
    """What a machine must have for a program: a GPU with room for weights and activations, a driver, code for it.

    Activations are those that are live at once at the sizes of the calibration inputs; what kernels and libraries need
    inside is not counted.
    """
    from planish.ir.analyses.liveness import liveness

    sizes = program.sizes()
    peak = max(int(liveness(program, dims=sizes, entry=entry).peak_bytes) for entry in program.entries)
    found = [library for library in libraries if library is not None]
    return Needs(
        gpus=1,
        providers=(PROVIDER,),
        code=tuple(dict.fromkeys(code for library in found for code in library.code)),
        cuda=max((library.cuda for library in found), default=None),
        memory=program.weight_bytes() + peak,
    )


def require_memory(program: Program, target: Target) -> None:
    """Asks whether weights and activations, at the sizes of the calibration inputs, fit the target's ``memory=``.

    Raises:
        MemoryBudgetError: they do not; says by how much, and what would help.
    """
    if target.memory is None:
        return
    from planish.runtime.offload.account import MemoryBudgetError, size_text

    weights, planned = program.weight_bytes(), needs(program, target).memory
    if planned <= target.memory:
        return
    fewer = "" if target.dtype else " dtype=float16 halves most of it;"
    smaller = " smaller inputs take less;" if weights < target.memory else " quantize-weights makes weights smaller;"
    raise MemoryBudgetError(
        f"target '{target}': weights take {size_text(weights)} and activations {size_text(planned - weights)}, "
        f"{size_text(planned - target.memory)} more than the budget of {size_text(target.memory)};{fewer}{smaller} "
        f"memory={-(-planned // (1 << 20))}MiB is the least for it as it is."
    )


def refuse(manifest: Manifest, machine: Machine, where: str) -> None:
    """Compares what an artifact needs with a machine, before anything of it is loaded.

    Raises:
        UnsupportedError: something is missing: says all that is, with what there is in its place.
    """
    from planish.runtime.machine import needs_of

    target = Target.parse(manifest.target)
    lacking = unmet(needs_of(manifest), machine, device_index(target))
    if lacking:
        raise UnsupportedError(f"'{where}' can not run on this machine: it {'; it '.join(lacking)}.")
    gpu = machine.gpus[device_index(target)]
    _require_bfloat16(target, f"{gpu.name} is sm_{gpu.arch}, which", gpu.arch)


def device_index(target: Target) -> int:
    """The GPU that a target uses, in CUDA's order."""
    text = dict(target.options).get("cuda.device_id", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 4):
        raise InputError(f"target '{target}': cuda.device_id='{text}' is not the number of a GPU.")
    return int(text)


def wants_graph(target: Target, inputs: Sequence[TensorSpec], buckets: Buckets | None = None) -> int:
    """How many CUDA graphs a session for these inputs keeps."""
    if target.graphs is not None:
        return target.graphs
    if buckets is not None:
        return buckets.count
    return int(all(spec.shape is not None and all(isinstance(d, int) for d in spec.shape) for spec in inputs))


def provider_options(target: Target, *, graph: bool = False) -> dict[str, str]:
    """Options of the provider for a target.

    Raises:
        InputError: an option that planish does not know; the message suggests the closest name.
    """
    options = {"device_id": str(device_index(target)), "use_tf32": "0"}  # float32 stays float32
    if target.memory is not None:
        # An arena that doubles asks for more than there is long before it is full.
        options |= {"gpu_mem_limit": str(target.memory), "arena_extend_strategy": "kSameAsRequested"}
    if graph:
        options["enable_cuda_graph"] = "1"
    for key, value in target.options:
        name = key.removeprefix("cuda.")
        if name == key:
            continue
        if name not in OPTIONS:
            raise unknown("CUDA option", key, [f"cuda.{option}" for option in OPTIONS])
        options[name] = value
    return options


def providers(target: Target, *, graph: bool = False) -> list[tuple[str, dict[str, str]] | str]:
    """For ``InferenceSession(providers=...)``: CUDA, and the CPU for what has no kernel there."""
    return [(PROVIDER, provider_options(target, graph=graph)), "CPUExecutionProvider"]


@functools.cache
def load_libraries() -> None:
    """Loads cuBLAS, cuDNN and the rest from the packages that brought them, where the system has none."""
    if not hasattr(ort, "preload_dlls"):
        return
    # It prints what it does not find; if that is needed, the session says so.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        ort.preload_dlls()


def check_provider(session: ort.InferenceSession) -> None:
    """Raises UnsupportedError if ONNX Runtime went on without the provider, which it does with a warning only."""
    if PROVIDER not in session.get_providers():
        raise UnsupportedError(
            f"ONNX Runtime {ort.__version__} could not start {PROVIDER}: cuDNN and cuBLAS of the CUDA version that it "
            "was built for must be on the library path (pip install 'onnxruntime-gpu[cuda,cudnn]')."
        )


def compile_ort_cuda(
    model: ir.Model,
    target: Target,
    *,
    optimize: bool = True,
    options: Mapping[str, str] | None = None,
    library: CudaLibrary | None = None,
    dims: Collection[str] = (),
    shared: EntryWeights | None = None,
) -> DeviceRunner | Offline:
    """A session on a GPU for a model; for a target that names an architecture, on a machine without: an `Offline`.

    Args:
        dims: symbols of other entries of the program, which a target's buckets may name.
        shared: weights that other entries have too.

    Raises:
        UnsupportedError: there is no GPU or no CUDA provider, or ONNX Runtime has no kernel for a node.
        InputError: an unknown option.
    """
    from planish.runtime import ort as common

    inputs = [TensorSpec.of(v) for v in model.graph.inputs if v.name not in model.graph.initializers]
    outputs = [TensorSpec.of(v) for v in model.graph.outputs]
    buckets, notes = None, []  # type: Buckets | None, list[str]
    if target.buckets:
        from planish.ir.analyses.bucket_plan import plan_buckets

        buckets, notes = plan_buckets(model, target.buckets, dims)
    if is_elsewhere(target):
        made = Offline(inputs, outputs, target, library)
        made.buckets, made.notes = buckets, [*made.notes, *notes]
        return made
    require(target)
    kept: list[Any] = []

    def session(wanted: Sequence[Any]) -> ort.InferenceSession:
        made, kept[:], _ = common.open_session(model, target, wanted, optimize, options, library, shared)
        return made

    runner = on_gpu(session, target, inputs, outputs, kept, buckets)
    runner.library = library
    runner.notes = [*notes, *runner.notes]
    return runner


def on_gpu(
    session: Callable[[Sequence[Any]], ort.InferenceSession],
    target: Target,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    kept: Sequence[Any] = (),
    buckets: Buckets | None = None,
) -> DeviceRunner:
    """A runner on the GPU of a target; without a CUDA graph where a part of the model runs on the CPU.

    Args:
        session: makes one from providers.
        kept: what must live as long as the session, after `session` was called.
        buckets: sizes that inputs are padded to, if they may be.

    Raises:
        UnsupportedError: the provider does not start, or ONNX Runtime does not take the model.
    """
    load_libraries()

    def attempt(graphs: int, capture: bool) -> DeviceRunner:
        made = session(providers(target, graph=capture))
        check_provider(made)
        settings: dict[str, Any] = {"index": device_index(target), "graphs": graphs, "capture": capture}
        if buckets is None:
            return DeviceRunner(made, inputs, outputs, **settings, keep_alive=kept)
        return BucketedRunner(made, inputs, outputs, buckets=buckets, **settings, keep_alive=kept)

    graphs = wants_graph(target, inputs, buckets)
    # A step over caches runs on fixed memory whatever its shapes are.
    capture = graphs > 0 or (target.graphs is None and any(cache_layer(spec.name) is not None for spec in inputs))
    try:
        return attempt(graphs, capture)
    except UnsupportedError as error:
        if not capture or "capture" not in str(error):
            raise
        runner = attempt(0, False)
        runner.notes.append("no CUDA graph is used, since ONNX Runtime runs a part of this model on the CPU.")
        return runner


class Offline:
    """An entry that was made for a GPU of another machine: it can be exported, and not run.

    Attributes:
        inputs, outputs, notes, library, buckets: as of a runner.
        offline: always true.
    """

    offline = True

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], target: Target, library: CudaLibrary | None
    ) -> None:
        self.inputs, self.outputs, self.target, self.library = list(inputs), list(outputs), target, library
        self.buckets: Buckets | None = None
        self.notes = [f"made for {target} on a machine without such a GPU: nothing was run or measured"]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Raises UnsupportedError."""
        raise UnsupportedError(f"this program is for '{self.target}', which this machine has not: export it.")

    def prepared(self, feeds: Mapping[str, Any]) -> Callable[[], Any]:
        """Raises UnsupportedError."""
        return lambda: self.run(feeds)
