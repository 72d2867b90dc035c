"""A step of decoding on a device: the caches stay there and are written in place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from planish.runtime.ort_device import DeviceRunner


class DeviceStep:
    """An entry bound to inputs on its device, some of which outputs are written over.

    An output that has the memory of an input is written in place by operators that allow it, and copied by others.

    Args:
        decode: the entry.
        inputs: arrays by name for every input; they are copied to the device.
        in_place: output → the input whose memory it is written to. Other outputs come to the host.
    """

    def __init__(self, decode: DeviceRunner, inputs: Mapping[str, np.ndarray], in_place: Mapping[str, str]) -> None:
        decode.check(inputs)
        self._decode = decode
        self._values = {name: self._there(np.ascontiguousarray(array)) for name, array in inputs.items()}
        self._binding = decode.session.io_binding()
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        for spec in decode.outputs:
            if spec.name in in_place:
                self._binding.bind_ortvalue_output(spec.name, self._values[in_place[spec.name]])
            else:
                self._binding.bind_output(spec.name)

    def __call__(self, changed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs after some inputs have changed; returns the outputs that come to the host."""
        for name, array in changed.items():
            self._values[name].update_inplace(array)
        self._decode.call(self._binding)
        outputs = zip(self._decode.outputs, self._binding.get_outputs(), strict=True)
        return {spec.name: value.numpy() for spec, value in outputs if value.device_name() == "cpu"}

    def _there(self, array: np.ndarray) -> ort.OrtValue:
        if self._decode.device == "cpu":
            array = array.copy()  # an OrtValue of the host has the array's memory
        return ort.OrtValue.ortvalue_from_numpy(array, self._decode.device, self._decode.index)
