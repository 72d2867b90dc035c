"""The description of a target: pure data. What implements one is in `planish.runtime`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from planish.ir.errors import InputError, unknown

RUNTIMES = ("ort", "tvm")
DEVICES = ("cpu", "cuda")
# Names that this version can compile for; the others parse, so that artifacts of later versions can be read.
IMPLEMENTED = ("ort-cpu", "ort-cuda", "tvm-cpu", "tvm-cuda")
_UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Target:
    """Where a program runs. Parses from and prints as a string: ``"ort-cpu:threads=2,memory=4GiB"``.

    Attributes:
        runtime: ``"ort"`` or ``"tvm"``.
        device: ``"cpu"`` or ``"cuda"``.
        arch: GPU architecture such as ``"sm_75"``; for ``tvm-cpu`` a level of instructions such as ``"avx2"``; or None.
        threads: intra-op threads; 0 lets the runtime choose.
        memory: memory budget in bytes, or None.
        kernels: generated kernels may be used; a program then holds native code.
        dtype: preferred floating dtype (``"float32"``, ``"float16"``, ``"bfloat16"``), or None for the model's own.
        graphs: for how many sets of input shapes a CUDA graph is kept; 0: none is made; None: one, where the shapes of
            all inputs are fixed.
        buckets: the sizes that dimensions of inputs are padded to, each with a CUDA graph: (name, ascending sizes).
        options: further options of the runtime, as sorted (name, value) pairs.
    """

    runtime: str = "ort"
    device: str = "cpu"
    arch: str | None = None
    threads: int = 0
    memory: int | None = None
    dtype: str | None = None
    kernels: bool = False
    graphs: int | None = None
    buckets: tuple[tuple[str, tuple[int, ...]], ...] = ()
    options: tuple[tuple[str, str], ...] = field(default=())

    @property
    def name(self) -> str:
        """The short name without features: ``"ort-cpu"``."""
        return f"{self.runtime}-{self.device}"

    @property
    def capability(self) -> int | None:
        """Of ``sm_90a``: 90."""
        match = re.fullmatch(r"sm_(\d+)[a-z]?", self.arch or "")
        return int(match[1]) if match else None

    @property
    def generates(self) -> bool:
        """Whether programs for it may use generated kernels."""
        return self.runtime == "tvm" or self.kernels

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """Reads a target string.

        Raises:
            InputError: unknown name or feature (with a did-you-mean), or a value that does not parse.
        """
        if isinstance(text, Target):
            return text
        if not isinstance(text, str):
            raise InputError(f"target must be a string such as 'ort-cpu', not {type(text).__name__}.")
        name, _, features = text.strip().partition(":")
        known = [f"{r}-{d}" for r in RUNTIMES for d in DEVICES]
        if name not in known:
            raise unknown("target", name, known)
        runtime, device = name.split("-")
        values: dict[str, object] = {}
        options: list[tuple[str, str]] = []
        for item in filter(None, (part.strip() for part in features.split(","))):
            key, equals, value = item.partition("=")
            if not equals and re.fullmatch(r"sm_\d+[a-z]?", key):
                values["arch"] = key
            elif not equals and key == "kernels":
                values["kernels"] = True
            elif key == "threads":
                values["threads"] = _integer(text, key, value)
            elif key == "graphs" and device == "cuda":
                values["graphs"] = _integer(text, key, value)
            elif key == "buckets" and (runtime, device) == ("ort", "cuda"):
                values["buckets"] = _buckets(text, value)
            elif key == "buckets":
                raise InputError(
                    f"target '{text}': buckets= pads inputs to sizes with a CUDA graph, on 'ort-cuda' only."
                )
            elif key == "memory":
                values["memory"] = _bytes(text, value)
            elif key in ("arch", "dtype"):
                values[key] = value
            elif key.startswith(("session.", "cuda.") if device == "cuda" else "session.") and equals:
                options.append((key, value))
            else:
                known = ["threads", "memory", "arch", "dtype", "kernels"]
                known += ["graphs", "buckets"] if device == "cuda" else []
                raise unknown(f"feature in target '{text}':", key, known)
        return cls(runtime, device, options=tuple(sorted(options)), **values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        parts = [self.arch] if self.arch else []
        if self.threads:
            parts.append(f"threads={self.threads}")
        if self.memory is not None:
            gib, rest = divmod(self.memory, 1 << 30)
            parts.append(f"memory={gib}GiB" if not rest else f"memory={self.memory}")
        if self.dtype:
            parts.append(f"dtype={self.dtype}")
        if self.kernels:
            parts.append("kernels")
        if self.graphs is not None:
            parts.append(f"graphs={self.graphs}")
        if self.buckets:
            listed = (f"{name}:{'/'.join(map(str, sizes))}" for name, sizes in self.buckets)
            parts.append(f"buckets={'+'.join(listed)}")
        parts += [f"{key}={value}" for key, value in self.options]
        return self.name + (":" + ",".join(parts) if parts else "")


def _integer(text: str, key: str, value: str) -> int:
    if not re.fullmatch(r"\d{1,4}", value):
        raise InputError(f"target '{text}': {key}='{value}' is not a number from 0 to 9999.")
    return int(value)


def _bytes(text: str, value: str) -> int:
    match = re.fullmatch(r"(\d{1,15})\s*([kmg]i?b)?", value.strip().lower())
    if not match:
        raise InputError(f"target '{text}': memory='{value}' is not a size such as 512MiB or 4GiB.")
    return int(match[1]) * _UNITS[match[2] or ""]


def _buckets(text: str, value: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """``"batch:1/2/4+seq:32..512"``: sizes, or powers of two times the first of a range up to its last."""
    found: dict[str, tuple[int, ...]] = {}
    for part in value.split("+"):
        name, colon, listed = part.strip().partition(":")
        sizes: set[int] = set()
        for item in listed.split("/"):
            match = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", item.strip())
            low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= low <= high or not colon or not name or name in found:
                raise InputError(
                    f"target '{text}': buckets='{value}' is not a list such as batch:1/2/4/8 or seq:32..512, for each "
                    "dimension one, joined by '+'."
                )
            sizes |= {low << k for k in range(20) if low << k <= high} | {high}
        found[name] = tuple(sorted(sizes))
    return tuple(found.items())
