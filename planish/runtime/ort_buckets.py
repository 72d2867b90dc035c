"""Runs of sizes that vary as replays of few CUDA graphs: inputs are padded to the next size that has one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.buckets import Buckets
from planish.runtime.ort_device import Buffers, DeviceRunner
from planish.runtime.tensors import is_torch, settle

if TYPE_CHECKING:
    from planish.ir.program import Program


class BucketedRunner(DeviceRunner):
    """A session whose inputs are padded, where that is proved to change nothing that is kept; outputs are cut.

    Sizes beyond the largest run as they are, without a graph. `buffers` gives memory for exact shapes.

    Args:
        session: as of a :class:`DeviceRunner`, and so are the other arguments.
        buckets: sizes and fills.
    """

    def __init__(self, *args: Any, buckets: Buckets, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.buckets: Buckets | None = buckets
        self._places = {
            spec.name: tuple((axis, d) for axis, d in enumerate(spec.shape or ()) if d in buckets.sizes)
            for spec in self.inputs
        }

    def _compute(self, given: Mapping[str, Any], seen: Mapping[str, Any], on_device: bool) -> dict[str, Any]:
        real, shapes = self._shapes(seen)
        if shapes is None or not self.graphs or not self._on_device:
            return self._bound(given, seen, on_device)
        with self._lock:
            key = tuple(shapes.items())
            buffers = self._kept.pop(key, None)
            if buffers is None:
                while len(self._kept) >= self.graphs:
                    self._kept.popitem(last=False)
                buffers = self._padded(given, seen, shapes)
            else:
                self._refill(buffers, given, seen)
            self._kept[key] = buffers
            buffers.run()
            return self._cut(buffers, real, on_device)

    def prepared(self, feeds: Mapping[str, Any]) -> Callable[[], Any]:
        """A function without arguments that runs on these inputs, padded, which are on the device from now on."""
        given, seen = self._taken(feeds)
        _, shapes = self._shapes(seen)
        if shapes is None or not self.graphs or not self._on_device or self._empty.of(seen) is not None:
            return super().prepared(feeds)
        settle(given.values())
        return self._padded(given, seen, shapes).run

    def confirm(self, feeds: Mapping[str, Any], limit: float) -> str:
        """Runs inputs with padding and without, and gives padding up where outputs differ more than by rounding.

        Args:
            feeds: arrays; where they have the sizes of a bucket, one entry less of them is run.
            limit: relative L2 that rounding may cost.

        Returns:
            What a report should say.
        """
        from planish.ir.compare import compare_outputs

        _, shapes = self._shapes(self._taken(feeds)[1])
        if shapes is None:
            return "padding was proved and not measured: the inputs at hand are larger than the largest bucket."
        given, seen = self._taken({name: self._shortened(name, value, shapes[name]) for name, value in feeds.items()})
        error = compare_outputs(self._bound(given, seen, False), self._compute(given, seen, False)).relative_l2
        if error <= limit:
            return f"outputs for padded inputs differ from those without padding by {error:.1e} (relative L2)."
        self.buckets = None
        return f"inputs are not padded after all: their outputs differed by {error:.1e} (relative L2), not by rounding."

    def _shortened(self, name: str, value: Any, shape: Sequence[int]) -> Any:
        """An input with one entry less where it fills its bucket."""
        spec = next(spec for spec in self.inputs if spec.name == name)
        kept = [slice(None)] * len(shape)
        for axis, _ in self._places[name]:
            less = value.shape[axis] - 1
            if value.shape[axis] == shape[axis] and less > 0 and spec.clamp(axis, less) == less:
                kept[axis] = slice(0, less)
        return value[tuple(kept)]

    def _fill(self, name: str) -> float | None:
        return None if self.buckets is None else self.buckets.fills.get(name)

    def _shapes(self, seen: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, tuple[int, ...]] | None]:
        """The real sizes, and the padded shapes of all inputs; None where they are not padded."""
        places = [(name, axis, dim) for name, places in self._places.items() for axis, dim in places]
        real: dict[str, int] = {str(dim): seen[name].shape[axis] for name, axis, dim in places if name in seen}
        buckets = self.buckets
        if buckets is None or real.keys() != buckets.sizes.keys() or (sizes := buckets.padded(real)) is None:
            return real, None
        shapes = {}
        for name, array in seen.items():
            shape = list(array.shape)
            for axis, dim in self._places.get(name, ()):
                shape[axis] = sizes[str(dim)]
            shapes[name] = tuple(shape)
        return real, shapes

    def _padded(
        self, given: Mapping[str, Any], seen: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
    ) -> Buffers:
        """Memory for padded inputs, filled."""
        wide = {name: self._widened(name, value, seen[name], shapes[name]) for name, value in given.items()}
        buffers = self._make(wide, self._like(wide))
        buffers.written.update({name: array.shape for name, array in seen.items()})
        return buffers

    def _widened(self, name: str, value: Any, like: np.ndarray, shape: Sequence[int]) -> Any:
        if like.shape == tuple(shape):
            return value
        inner = tuple(map(slice, like.shape))
        fill = self._fill(name) or 0
        if isinstance(value, np.ndarray):
            made = np.full(shape, fill, value.dtype)
            made[inner] = value
            return made
        tensor = value if is_torch(value) else sys.modules["torch"].from_dlpack(value)
        wide = tensor.new_full(tuple(shape), fill)
        wide[inner] = tensor
        return wide

    def _refill(self, buffers: Buffers, given: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
        """Writes inputs into padded memory, and the padding where the run before wrote something else."""
        whole: dict[str, Any] = {}
        for name, value in given.items():
            shape, before = seen[name].shape, buffers.written[name]
            buffers.written[name] = shape
            held = tuple(buffers.inputs[name].shape())
            if isinstance(value, np.ndarray) and (self.device == "cpu" or "torch" not in sys.modules):
                whole[name] = self._widened(name, value, seen[name], held)
                continue
            if shape == held:
                whole[name] = value
                continue
            view, fill = buffers.view(name), self._fill(name)
            if fill is not None and any(new < old for new, old in zip(shape, before, strict=True)):
                view.fill_(fill)
            torch = sys.modules["torch"]
            tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            tensor = tensor if is_torch(tensor) else torch.from_dlpack(tensor)
            view[tuple(map(slice, shape))].copy_(tensor)
        buffers.fill(whole)
        if self.device != "cpu" and "torch" in sys.modules:
            sys.modules["torch"].cuda.current_stream(self.index).synchronize()

    def _cut(self, buffers: Buffers, real: Mapping[str, int], on_device: bool) -> dict[str, Any]:
        """Copies of what is kept of the outputs."""
        found: dict[str, Any] = {}
        assert self.buckets is not None
        for name, value in buffers.given.items():
            kept = self.buckets.kept(name, len(value.shape()), real)
            if on_device:
                found[name] = buffers.view(name)[kept].clone(memory_format=sys.modules["torch"].contiguous_format)
            elif self.device != "cpu" and "torch" in sys.modules:
                found[name] = buffers.view(name)[kept].contiguous().cpu().numpy()
            else:
                found[name] = np.array(value.numpy()[kept])
        return found


def confirm_padding(program: Program, runners: Mapping[str, Any]) -> list[str]:
    """Measures what was proved, where inputs are padded and there are some to run; says what came of it."""
    from planish.ir.compare import inner_tolerance, tolerance

    notes = []
    for part in program.calibration.parts if program.calibration is not None else ():
        runner = runners[part.entry]
        if isinstance(runner, BucketedRunner) and part.batches:
            notes.append(runner.confirm(part.batches[0], max(inner_tolerance(program), tolerance({}))))
    return notes
