"""From a Target to onnxruntime.SessionOptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime as ort

from planish.ir.errors import InputError, unknown
from planish.ir.target import Target

FLUSH = "session.set_denormal_as_zero"
APART = "session.use_device_allocator_for_initializers"
BUFFERS = "session.use_external_initializer_file_buffers_directly"
FOLDER = "session.model_external_initializers_file_folder_path"

#: Configuration entries that are handed to ONNX Runtime as they are (it ignores unknown ones without a word, so a
#: misspelt one has to be refused here).
CONFIG_ENTRIES = frozenset(
    (
        "session.disable_aot_function_inlining",
        "session.disable_double_qdq_remover",
        "session.disable_prepacking",
        "session.disable_qdq_constant_folding",
        "session.disable_quant_qdq",
        "session.dynamic_block_base",
        "session.enable_dq_matmulnbits_fusion",
        "session.enable_quant_qdq_cleanup",
        "session.force_spinning_stop",
        "session.graph_optimizations_loop_level",
        "session.inter_op.allow_spinning",
        "session.inter_op.spin_backoff_max",
        "session.inter_op.spin_duration_us",
        "session.intra_op.allow_spinning",
        "session.intra_op.spin_backoff_max",
        "session.intra_op.spin_duration_us",
        "session.intra_op_thread_affinities",
        "session.prepack.enable_parallel",
        "session.qdq_matmulnbits_accuracy_level",
        "session.qdq_matmulnbits_block_size",
        "session.qdqisint8allowed",
        "session.set_denormal_as_zero",
        "session.strict_shape_type_inference",
        "session.use_device_allocator_for_initializers",
        "session.x64quantprecision",
        "session.mlas.disable_kleidiai",
        "session.mlas.use_lut_gemm",
        "session.optimization.disable_specified_optimizers",
        "session.optimization.enable_cast_chain_elimination",
        "session.optimization.enable_gelu_approximation",
    )
)
_LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FLAGS = {"0": False, "false": False, "1": True, "true": True}
#: Options that are attributes of SessionOptions, by their name in a target string.
ATTRIBUTES = (
    "session.enable_cpu_mem_arena",
    "session.enable_mem_pattern",
    "session.enable_mem_reuse",
    "session.execution_mode",
    "session.graph_optimization_level",
    "session.inter_op_num_threads",
    "session.intra_op_num_threads",
    "session.log_severity_level",
    "session.use_deterministic_compute",
)


def session_options(target: Target, extra: Mapping[str, str] | None, optimize: bool) -> ort.SessionOptions:
    """Session options for a target; `extra` are further ``session.*`` options that win over the target's.

    Raises:
        InputError: an option that ONNX Runtime does not know (with a did-you-mean), or a value it can not take.
    """
    options = ort.SessionOptions()
    # What goes wrong is raised as an exception; the same text on stderr would only be noise.
    options.log_severity_level = 4
    options.intra_op_num_threads = target.threads
    options.graph_optimization_level = _LEVELS["all" if optimize else "disable"]
    given = dict(target.options)
    defaults = {FLUSH: "1"}
    # Weights in an arena that doubles take up to twice their size; but an arena is what a limit is of.
    if target.name == "ort-cuda" and target.memory is None and "cuda.gpu_mem_limit" not in given:
        defaults[APART] = "1"
    for key, value in {**defaults, **given, **(extra or {})}.items():
        if not key.startswith("cuda."):  # of a provider
            _set(options, key, str(value))
    return options


def _set(options: ort.SessionOptions, key: str, value: str) -> None:
    if key in CONFIG_ENTRIES:
        options.add_session_config_entry(key.removeprefix("session.") if _is_global(key) else key, value)
        return
    if key not in ATTRIBUTES:
        raise unknown("session option", key, (*CONFIG_ENTRIES, *ATTRIBUTES))
    name = key.removeprefix("session.")
    if name == "graph_optimization_level":
        setattr(options, name, _choice(key, value, _LEVELS))
    elif name == "execution_mode":
        modes = {"sequential": ort.ExecutionMode.ORT_SEQUENTIAL, "parallel": ort.ExecutionMode.ORT_PARALLEL}
        setattr(options, name, _choice(key, value, modes))
    elif name.startswith(("enable_", "use_")):
        setattr(options, name, _choice(key, value, _FLAGS))
    elif value.isascii() and value.isdigit() and len(value) < 5:
        setattr(options, name, int(value))
    else:
        raise InputError(f"session option '{key}' is '{value}'; it must be a number from 0 to 9999.")


def _is_global(key: str) -> bool:
    # A target string only takes names that begin with "session."; these have another prefix in ONNX Runtime.
    return key.startswith(("session.mlas.", "session.optimization."))


def _choice(key: str, value: str, choices: Mapping[str, Any]) -> Any:
    if value.lower() not in choices:
        raise InputError(f"session option '{key}' is '{value}'; it must be one of {', '.join(choices)}.")
    return choices[value.lower()]
