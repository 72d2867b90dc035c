"""What is being done now, and how much of it is left: a line on stderr once something takes over two seconds.

Silent unless stderr is a terminal, so that logs and pipes stay clean. The library itself never turns it on.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

#: Seconds that pass before a line is shown: what is quicker needs none.
PATIENCE = 2.0
#: Seconds between two drawings: seldom, because what is being timed runs beside it.
_TICK = 0.4


class Progress:
    """A status line with the time spent and, where the number of steps or the time is known, what is left.

    Use as a context manager; call it with what is being done now, like the driver's progress hook.

    Args:
        title: shown before the step.
        total: number of steps, if known: each call is then one step.
        seconds: about how long it takes at most, if known: used for the estimate when there is no `total`.
        enabled: None shows the line when stderr is a terminal.
        patience: seconds before anything is shown.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int | None = None,
        seconds: float | None = None,
        enabled: bool | None = None,
        patience: float = PATIENCE,
        console: Any = None,
    ) -> None:
        self.title, self.total, self.seconds = title, total, seconds
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.patience, self.step, self.done = patience, "", 0
        self.shown = False
        self._console = console
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = time.monotonic()

    def __call__(self, step: str = "") -> None:
        """Says what begins now; with a `total`, the step before it is done."""
        self.done += 1
        self.step = step

    def set(self, step: str, done: int, total: int | None = None) -> None:
        """Says what is going on, and how many of how many steps are done."""
        self.step, self.done = step, done + 1
        self.total = self.total if total is None else total

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self.enabled:
            self._thread = threading.Thread(target=self._show, name="planish-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def fraction(self) -> float | None:
        """The share that is done, from the steps or from the time; None when neither is known."""
        if self.total:
            return min(1.0, max(0, self.done - 1) / self.total)
        if self.seconds:
            return min(0.99, (time.monotonic() - self._started) / self.seconds)
        return None

    def remaining(self) -> float | None:
        """Estimated seconds left, or None."""
        share, spent = self.fraction(), time.monotonic() - self._started
        if not share:
            return None
        return spent * (1 - share) / share

    def _show(self) -> None:
        if self._stop.wait(self.patience):
            return
        from rich.console import Console
        from rich.live import Live

        console = self._console or Console(stderr=True)
        self.shown = True
        options: dict[str, Any] = {"transient": True, "auto_refresh": False}
        options |= {"redirect_stdout": False, "redirect_stderr": False}  # what the command prints is its own
        with Live(self.line(), console=console, **options) as live:
            while not self._stop.wait(_TICK):
                live.update(self.line(), refresh=True)

    def line(self) -> Any:
        """The line as rich shows it."""
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        from planish.runtime.units import duration, printable

        spent, share, left = time.monotonic() - self._started, self.fraction(), self.remaining()
        row = Table.grid(padding=(0, 1))
        for _ in range(4):
            row.add_column(no_wrap=True, overflow="ellipsis")
        clock = duration(spent) + (f", {duration(left)} left" if left is not None and left >= 1 else "")
        bar = Spinner("dots") if share is None else ProgressBar(total=1.0, completed=share, width=16)
        row.add_row(bar, Text(self.title, style="bold"), Text(printable(self.step, 40)), Text(clock, style="dim"))
        return row
