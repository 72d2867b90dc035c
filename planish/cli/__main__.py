"""``python -m planish.cli``."""

from __future__ import annotations

from planish.cli.app import main

main()
