"""Native code of an artifact, loaded from the bytes that were hashed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def private_copies(code: Mapping[str, bytes]) -> Iterator[dict[str, Path]]:
    """Files with these contents, by name, in a folder that nobody else can write to; gone when the block ends.

    A loader wants a path, and what is at the artifact's own path may have been replaced since it was hashed.
    """
    with tempfile.TemporaryDirectory(prefix="planish-native-", ignore_cleanup_errors=True) as folder:
        copies = {}
        for number, (name, data) in enumerate(code.items()):
            copies[name] = path = Path(folder) / f"{number}-{Path(name).name}"
            path.write_bytes(data)
        yield copies
