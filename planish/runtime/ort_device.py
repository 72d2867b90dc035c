"""A session of ONNX Runtime whose inputs and outputs are on a device: bound without copies, or replayed as a graph."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from planish.ir.errors import InputError, UnsupportedError
from planish.ir.spec import TensorSpec
from planish.runtime.checks import InputChecks
from planish.runtime.empty import EmptyOutputs
from planish.runtime.ort import run_error
from planish.runtime.tensors import (
    EXTENDED,
    NATIVE,
    element_type,
    from_ortvalue,
    from_torch,
    is_torch,
    likeness,
    settle,
    to_ortvalue,
    to_torch,
    view_of,
)

if TYPE_CHECKING:
    from planish.runtime.cuda.ort_library import CudaLibrary

_NO_GRAPH = -1  # what ONNX Runtime takes as "run without one"
#: kDLCUDA and kDLCPU of DLPack.
_DEVICES = {1: "cpu", 2: "cuda"}


class DeviceRunner:
    """One entry of a program as a session on a device.

    Inputs are NumPy arrays, torch tensors, or anything with ``__dlpack__``. Those on the device are read where they
    lie. If one is a torch tensor on the device, outputs are torch tensors there, in memory that belongs to them; if one
    is a torch tensor, torch tensors; else NumPy arrays.

    Args:
        session: on the device's provider.
        inputs, outputs: what `run` takes and gives.
        index: the device's number.
        graphs: for how many sets of input shapes `run` keeps a graph; those used last are.
        capture: whether the session can capture graphs, for fixed memory (:meth:`buffers`), without `graphs` too.
        device: ``"cuda"``; ``"cpu"`` binds the same way, to memory of the host.

    Attributes:
        kept: memory that generations leave for the next ones (see :mod:`planish.runtime.ort_device_step`).
        notes: what a report should mention about this session.
        library: kernels that it uses, or None.
        host: inputs that ONNX Runtime reads on the host, as sizes are.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        index: int = 0,
        graphs: int = 0,
        capture: bool = False,
        device: str = "cuda",
        keep_alive: Sequence[Any] = (),
    ) -> None:
        self.session, self.inputs, self.outputs = session, list(inputs), list(outputs)
        self.index, self.device, self.graphs, self.capture = index, device, graphs, capture or graphs > 0
        self.kept: OrderedDict[Any, Any] = OrderedDict()
        self.notes: list[str] = []
        self.library: CudaLibrary | None = None
        self.host = read_on_host(session, device)
        if self.capture and self.host:
            self.graphs, self.capture = 0, False
            self.notes.append(f"no CUDA graph is used: {', '.join(sorted(self.host))} is read on the host.")
        self._keep_alive = list(keep_alive)
        self._checks = InputChecks(self.inputs, frozenset(v.name for v in session.get_overridable_initializers()))
        self._empty = EmptyOutputs(self.inputs, self.outputs)
        self._types = {spec.name: spec.dtype for spec in (*self.inputs, *self.outputs)}
        self._kept: OrderedDict[tuple[Any, ...], Buffers] = OrderedDict()
        self._made = 0
        self._lock = threading.Lock()
        self._on_device = all(spec.dtype in NATIVE for spec in (*self.inputs, *self.outputs))

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs on inputs by name; returns outputs by name. They are complete when this returns.

        Raises:
            InputError: an input is unknown, missing, on another device, or of another dtype or shape.
        """
        given, seen = self._taken(feeds)
        torch_in = [value for value in feeds.values() if is_torch(value)]
        on_device = any(value.device.type == self.device for value in torch_in) and self.device != "cpu"
        empty = self._empty.of(seen)
        if empty is not None:
            outputs: dict[str, Any] = dict(empty)
        else:
            settle(given.values())
            outputs = self._compute(given, seen, on_device)
        if not torch_in:
            return outputs
        return {name: value if is_torch(value) else to_torch(value) for name, value in outputs.items()}

    def check(self, arrays: Mapping[str, Any]) -> None:
        """Raises InputError if the inputs do not fit; shapes that were fine before are not checked again."""
        self._like({name: self._as_device(name, value) for name, value in arrays.items()})

    def _like(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Dtypes and shapes of inputs, checked."""
        seen = {name: likeness(value) for name, value in given.items()}
        self._checks(seen)
        return seen

    def _compute(self, given: Mapping[str, Any], seen: Mapping[str, np.ndarray], on_device: bool) -> dict[str, Any]:
        if self.graphs and self._on_device:
            with self._lock:  # of several threads, one at a time has the memory of a graph
                return self._replayed(given, seen).outputs(on_device)
        return self._bound(given, seen, on_device)

    def prepared(self, feeds: Mapping[str, Any]) -> Callable[[], Any]:
        """A function without arguments that runs on these inputs, which are on the device from now on; it waits."""
        given, seen = self._taken(feeds)
        empty = self._empty.of(seen)
        if empty is not None:
            return lambda: empty
        if not self._on_device:
            return lambda: self._bound(given, seen, False)
        buffers = self.buffers(given)
        return buffers.run

    def buffers(self, feeds: Mapping[str, Any]) -> Buffers:
        """Fixed memory on the device for inputs of these shapes, which it holds then, and for their outputs.

        For callers that write inputs and read outputs in place, run after run: see :class:`Buffers`.

        Raises:
            InputError: an input does not fit.
        """
        given, seen = self._taken(feeds)
        settle(given.values())
        return self._make(given, seen)

    # --- one run, bound -----------------------------------------------------------------------------------

    def _bound(self, given: Mapping[str, Any], seen: Mapping[str, np.ndarray], on_device: bool) -> dict[str, Any]:
        values = self._values(given, seen, on_device)
        if on_device:
            return {name: view_of(value) for name, value in values.items()}
        return {name: from_ortvalue(value, self._types[name] or 0) for name, value in values.items()}

    def _values(self, given: Mapping[str, Any], seen: Mapping[str, np.ndarray], there: bool) -> dict[str, ort.OrtValue]:
        binding = self.session.io_binding()
        held = [self._bind_input(binding, name, value, seen[name]) for name, value in given.items()]
        for spec in self.outputs:
            where = (self.device, self.index) if there else ("cpu", 0)
            binding.bind_output(spec.name, *where)
        self.call(binding)
        del held
        return dict(zip([spec.name for spec in self.outputs], binding.get_outputs(), strict=True))

    def run_there(self, feeds: Mapping[str, Any]) -> dict[str, ort.OrtValue]:
        """As :meth:`run`, with all outputs left on the device.

        Raises:
            InputError: an input does not fit.
        """
        given, seen = self._taken(feeds)
        settle(given.values())
        return self._values(given, seen, True)

    def graph(self) -> ort.RunOptions | None:
        """Options under which the first run on some memory is captured and later ones replay; None: there are none."""
        if not self.capture:
            return None
        self._made += 1
        return _options(self._made)

    def _bind_input(self, binding: ort.IOBinding, name: str, value: Any, like: np.ndarray) -> Any:
        """Binds an input; returns what must live until the run is over."""
        if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
            value = self._from_host(name, value)
            binding.bind_ortvalue_input(name, value)
            return value
        if is_torch(value):
            value = value.contiguous()
            element = _element(like)
            binding.bind_input(name, self.device, self.index, element, list(value.shape), value.data_ptr())
            return value
        known = ort.OrtValue(ort.capi._pybind_state.OrtValue.from_dlpack(value.__dlpack__(), like.dtype == np.bool_))
        binding.bind_ortvalue_input(name, known)
        return known

    def call(self, binding: ort.IOBinding, options: ort.RunOptions | None = None) -> None:
        """Runs what is bound, without a graph unless `options` name one, and waits.

        Raises:
            InputError: a node failed.
        """
        if options is None and self.capture:
            options = _options(_NO_GRAPH)
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            raise run_error(error) from error

    def _from_host(self, name: str, value: Any) -> ort.OrtValue:
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        return to_ortvalue(array, self._types.get(name) or int(element_type(array) or 0))  # type: ignore[no-any-return]

    # --- fixed buffers and graphs --------------------------------------------------------------------------

    def _replayed(self, given: Mapping[str, Any], seen: Mapping[str, np.ndarray]) -> Buffers:
        key = tuple((name, array.shape) for name, array in seen.items())
        buffers = self._kept.pop(key, None)
        if buffers is None:
            while len(self._kept) >= self.graphs:
                self._kept.popitem(last=False)
            buffers = self._make(given, seen)
        else:
            buffers.fill(given)
        self._kept[key] = buffers
        buffers.run()
        return buffers

    def _make(self, given: Mapping[str, Any], seen: Mapping[str, np.ndarray]) -> Buffers:
        inputs = {name: self._empty_on_device(_element(array), array.shape) for name, array in seen.items()}
        shapes = self._output_shapes(given, seen)
        outputs = {name: self._empty_on_device(element, shape) for name, (element, shape) in shapes.items()}
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        buffers = Buffers(self, binding, self.graph(), inputs, outputs)
        buffers.fill(given)
        return buffers

    def _output_shapes(self, given: Mapping[str, Any], seen: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, Any]]:
        """Element type and shape of each output: from the specs where they say it, else from a run."""
        sizes = {
            d: n
            for spec in self.inputs
            if spec.name in seen
            for d, n in zip(spec.shape or (), seen[spec.name].shape, strict=False)
            if isinstance(d, str)
        }
        found: dict[str, tuple[Any, Any]] = {}
        for spec in self.outputs:
            shape = None if spec.shape is None else [sizes.get(d) if isinstance(d, str) else d for d in spec.shape]
            if shape is None or None in shape or spec.dtype is None:
                return self._measured_shapes(given, seen)
            found[spec.name] = (element_of(spec.dtype), tuple(shape))
        return found

    def _measured_shapes(self, given: Mapping[str, Any], seen: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, Any]]:
        binding = self.session.io_binding()
        held = [self._bind_input(binding, name, value, seen[name]) for name, value in given.items()]
        for spec in self.outputs:
            binding.bind_output(spec.name, self.device, self.index)
        self.call(binding)
        del held
        values = zip(self.outputs, binding.get_outputs(), strict=True)
        return {spec.name: (element_of(value.element_type()), tuple(value.shape())) for spec, value in values}

    def _empty_on_device(self, element: Any, shape: Sequence[int]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), element, self.device, self.index)

    # --- what is given -------------------------------------------------------------------------------------

    def _taken(self, feeds: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs as something to bind, and arrays that are like them, which fit."""
        given = {name: self._as_device(name, value) for name, value in feeds.items()}
        seen = self._like(given)
        return given, seen

    def _as_device(self, name: str, value: Any) -> Any:
        """The input as something to bind: an array of the host, or a tensor on this device."""
        if isinstance(value, np.ndarray):
            return value
        if is_torch(value):
            if value.device.type == "cpu":
                return from_torch(name, value)
            value = value.detach()
            where = (value.device.type, value.device.index or 0)
        elif hasattr(value, "__dlpack_device__"):
            kind, number = value.__dlpack_device__()
            where = (_DEVICES.get(int(kind), f"device type {kind}"), number)
            if where[0] == "cpu":
                return np.from_dlpack(value)
        else:
            return value
        if where != (self.device, self.index):
            raise InputError(
                f"input '{name}' is on {where[0]}:{where[1]}, and this program on {self.device}:{self.index}: move it."
            )
        return value


@dataclass
class Buffers:
    """Memory on the device that a run reads and writes, always the same.

    Attributes:
        inputs, given: OrtValues by name; `data_ptr()` is their address, `view` a torch tensor over them.
        written: the part of each input that a caller wrote last, where the rest is padding.
    """

    runner: DeviceRunner
    binding: ort.IOBinding
    options: ort.RunOptions | None
    inputs: dict[str, ort.OrtValue]
    given: dict[str, ort.OrtValue]
    written: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _views: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Reads the inputs, writes the outputs, and waits for them."""
        for name in self.runner.host:  # they are copied when they are bound
            self.binding.bind_ortvalue_input(name, self.inputs[name])
        self.runner.call(self.binding, self.options)

    def fill(self, feeds: Mapping[str, Any]) -> None:
        """Copies inputs into their memory."""
        for name, value in feeds.items():
            if is_torch(value):
                self.view(name).copy_(value)
            elif isinstance(value, np.ndarray):
                self.inputs[name].update_inplace(np.ascontiguousarray(value).reshape(value.shape))
            elif "torch" in sys.modules:
                self.view(name).copy_(sys.modules["torch"].from_dlpack(value))
            else:
                raise UnsupportedError(f"input '{name}': to copy a {type(value).__name__} on a GPU takes torch.")
        settle(feeds.values())

    def view(self, name: str) -> Any:
        """An input or output as a torch tensor, without a copy."""
        if name not in self._views:
            self._views[name] = view_of(self.inputs[name] if name in self.inputs else self.given[name])
        return self._views[name]

    def outputs(self, on_device: bool) -> dict[str, Any]:
        """Copies of the outputs, as torch tensors on the device or as arrays."""
        if on_device:
            return {name: self.view(name).clone() for name in self.given}
        # From a GPU `numpy` copies, on the host it does not.
        return {name: np.array(value.numpy()) for name, value in self.given.items()}


def read_on_host(session: ort.InferenceSession, device: str) -> set[str]:
    """Names of the inputs that a session on a device reads on the host: if they are there, binding them copies them."""
    if device == "cpu":
        return set()
    try:
        infos = session.get_input_memory_infos()
    except (AttributeError, RuntimeError):  # an older version, or an input that nothing reads
        return set()
    host = ("cpu", "cudapinned")
    return {value.name for value, info in zip(session.get_inputs(), infos, strict=True) if info.name.lower() in host}


def _options(graph: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _element(array: np.ndarray) -> Any:
    """The same for a dtype: NumPy's own, or the number of the element type."""
    for number, dtype in EXTENDED.items():
        if array.dtype == dtype:
            return int(number)
    return array.dtype.type


def element_of(dtype: int) -> Any:
    """What ONNX Runtime's bindings take for an element type."""
    return NATIVE[dtype].type if dtype in NATIVE else int(dtype)
