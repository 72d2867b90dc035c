"""The command line: parsing in `app`, what the commands do in `commands`, `debugging` and `benchmark`, reading and
writing of files in `files`, tables for people in `printing`.
"""

from __future__ import annotations

from planish.cli.app import invoke, main

__all__ = ["invoke", "main"]
