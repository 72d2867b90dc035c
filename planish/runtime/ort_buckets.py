"""Runs of sizes that vary as replays of few CUDA graphs: inputs are padded to the next size that has one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from planish.ir.buckets import Buckets
from planish.runtime.ort_device import Buffers, DeviceRunner, settle
from planish.runtime.tensors import is_torch


class BucketedRunner(DeviceRunner):
    """A session whose inputs are padded, where that is proved to change nothing that is kept; outputs are cut.

    Sizes beyond the largest run as they are, without a graph. `buffers` gives memory for exact shapes.

    Args:
        session: as of a :class:`DeviceRunner`, and so are the other arguments.
        buckets: sizes and fills.
    """

    def __init__(self, *args: Any, buckets: Buckets, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.buckets = buckets
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

    def _shapes(self, seen: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, tuple[int, ...]] | None]:
        """The real sizes, and the padded shapes of all inputs; None where they are not padded."""
        places = [(name, axis, dim) for name, places in self._places.items() for axis, dim in places]
        real: dict[str, int] = {str(dim): seen[name].shape[axis] for name, axis, dim in places if name in seen}
        sizes = self.buckets.padded(real) if real.keys() == self.buckets.sizes.keys() else None
        if sizes is None:
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
        fill = self.buckets.fills.get(name) or 0
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
            view, fill = buffers.view(name), self.buckets.fills.get(name)
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
        for name, value in buffers.given.items():
            kept = self.buckets.kept(name, len(value.shape()), real)
            if on_device:
                found[name] = buffers.view(name)[kept].clone(memory_format=sys.modules["torch"].contiguous_format)
            elif self.device != "cpu" and "torch" in sys.modules:
                found[name] = buffers.view(name)[kept].contiguous().cpu().numpy()
            else:
                found[name] = np.array(value.numpy()[kept])
        return found
