"""For tests of kernels that run on AMX."""

import pytest

from planish.runtime.kernels import cpu


def require_tiles() -> None:
    """Skips where the processor has no tiles, or the system does not permit their use."""
    if cpu.detect("amx") is None:
        pytest.skip("this processor lacks AMX")
    if not cpu.permit_tiles():
        pytest.skip("the system does not permit the use of AMX tiles")
