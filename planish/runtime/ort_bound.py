"""An entry bound to buffers: runs that allocate no output and copy no cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from planish.ir.errors import InputError
from planish.runtime import flush
from planish.runtime.ort import OrtRunner, run_error


class BoundRun:
    """Runs an entry on fixed buffers: what the caller writes to an input is read by the next run.

    An output that is given the array of an input is written in place by operators that allow it: TensorScatter and
    GroupQueryAttention see that both are one buffer and write the new position alone. With any other buffer they
    copy the whole cache first.

    Args:
        runner: the entry.
        inputs, outputs: contiguous arrays by name, for every input and output; the caller keeps their shapes right.

    Raises:
        InputError: an input or output is missing, or of another dtype or shape.
    """

    def __init__(self, runner: OrtRunner, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        runner.check(inputs)
        missing = [spec.name for spec in runner.outputs if spec.name not in outputs]
        if missing:
            raise InputError(f"output '{missing[0]}' has no buffer.")
        self._runner, self._flush = runner, runner.flushes
        self._kept = dict(inputs), dict(outputs)
        self._binding = runner.session.io_binding()
        values: dict[int, ort.OrtValue] = {}
        for arrays, bind in (
            (inputs, self._binding.bind_ortvalue_input),
            ({spec.name: outputs[spec.name] for spec in runner.outputs}, self._binding.bind_ortvalue_output),
        ):
            for name, array in arrays.items():
                if id(array) not in values:
                    if not array.flags.c_contiguous:
                        raise InputError(f"the buffer of '{name}' is not contiguous.")
                    values[id(array)] = ort.OrtValue.ortvalue_from_numpy(array)
                bind(name, values[id(array)])

    def __call__(self) -> None:
        """Reads the inputs and writes the outputs.

        Raises:
            InputError: a node failed on the inputs.
        """
        try:
            if self._flush:
                flush.begin()
            self._runner.session.run_with_iobinding(self._binding)
        except Exception as error:
            raise run_error(error) from error
        finally:
            if self._flush:
                flush.end()
