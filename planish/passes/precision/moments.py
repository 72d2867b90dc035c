"""Second moments xᵀx of what weights are multiplied with, over the calibration inputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.ir.errors import InputError
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.layers.importance import observe
from planish.passes.precision.products import FLOATS, Product, products

#: (id of the weight's tensor, whether it has a row for each output) → (k, k) float64.
Moments = dict[tuple[int, bool], npt.NDArray[np.float64]]
_OBSERVED = "planish_multiplied_{}"


def moments_of(program: Program, entries: list[str], ctx: PassContext) -> Moments:
    """The moments for every product of the entries; entries that share a weight add up.

    Raises:
        InputError: there is nothing to run with.
    """
    if ctx.run is None:
        raise InputError("method='gptq' measures on calibration inputs, and there is nothing to run them with.")
    found: Moments = {}
    for entry in entries:
        # Clones share the tensors, so that their ids serve as keys.
        trial = Program({entry: program.entry(entry).clone()}, program.target, dict(program.provenance))
        graph = trial.entry(entry).graph
        sites = [item for item in products(graph, FLOATS) if isinstance(item, Product) and item.node.graph is graph]
        names: dict[ir.Value, str] = {}
        for site in sites:
            if site.x not in names:
                names[site.x] = _OBSERVED.format(len(names))
                observe(graph, site.x, names[site.x])
        for batch in ctx.run(trial, entry):
            sums = {name: _moment(np.asarray(batch[name], np.float32)) for name in names.values()}
            for site in sites:
                key = (id(site.tensor), site.rows)
                moment = sums[names[site.x]]
                found[key] = found[key] + moment if key in found else moment
    return found


def _moment(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    rows = x.reshape(-1, x.shape[-1])
    moment: npt.NDArray[np.float64] = (rows.T @ rows).astype(np.float64)
    return moment
