"""The part of TVM's runtime that is for CUDA, and the libraries that it needs: found and loaded."""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

from planish.ir.errors import UnsupportedError
from planish.runtime.kernels.linker import compiler
from planish.runtime.tvm import import_runtime

# The functions of the driver that TVM's runtime is linked with; on a machine without a driver they are never called.
_DRIVER = (
    "cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuLaunchKernelEx", "cuModuleGetFunction",
    "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled", "cuInit", "cuDeviceGetCount", "cuDriverGetVersion",
)  # fmt: skip
_NO_DRIVER = """
int cuGetErrorString(int code, const char **text) { *text = "no NVIDIA driver is installed"; return code ? 0 : 1; }
"""


@functools.cache
def load_runtime(stand_in: bool = False) -> None:
    """Loads the part of TVM's runtime that is for CUDA, and what it needs.

    Args:
        stand_in: on a machine without a driver, put functions in its place that only say so.

    Raises:
        UnsupportedError: a part is missing.
    """
    tvm = import_runtime()
    if tvm.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    if not _loaded("libcuda.so.1"):
        if not stand_in:
            raise UnsupportedError("target tvm-cuda: this machine has no NVIDIA driver (libcuda is not found).")
        _stand_in()
    if not _loaded("libcudart.so.13", *_packaged("libcudart.so.13")):
        raise UnsupportedError(
            "target tvm-cuda: the CUDA runtime (libcudart.so.13) is not found: pip install 'planish[cuda]'."
        )
    _loaded("libcublasLt.so.13", *_packaged("libcublasLt.so.13"))  # it is asked for when a product runs
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UnsupportedError(f"target tvm-cuda: TVM's runtime for CUDA does not load: {error}.") from error


def _loaded(*names: str) -> bool:
    for name in names:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            return True
        except OSError:
            continue
    return False


def _packaged(name: str) -> list[str]:
    """Where packages of NVIDIA, and toolkits, have a library."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = [path for folder in folders for path in sorted(glob.glob(f"{folder}/*/lib/{name}"), reverse=True)]
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return [*found, f"{home}/lib64/{name}"]


def _stand_in() -> None:
    """A library of the driver's name without anything in it, which satisfies the loader."""
    functions = "".join(f"int {name}(void) {{ return 100; }}\n" for name in _DRIVER)  # 100: there is no device
    with tempfile.TemporaryDirectory(prefix="planish-cuda-") as scratch:
        source, library = Path(scratch) / "driver.c", Path(scratch) / "libcuda.so.1"
        source.write_text(functions + _NO_DRIVER)
        run([*compiler(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)])
        ctypes.CDLL(str(library))


def run(command: list[str]) -> None:
    """Runs a compiler; raises UnsupportedError with its first error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        first = next((line for line in said if "error" in line), said[0] if said else "no message")
        raise UnsupportedError(f"target tvm-cuda: {command[0]} fails: {first}.")
