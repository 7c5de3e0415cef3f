"""Progress of slow work: a moving line in a terminal, one plain line per piece of work elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """Shows one piece of work after the other; a new name ends the one before."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
        )
        self.bars = Bars(*columns, console=self.console, transient=True)
        self.current: TaskID | None = None
        self.what = ""
        self.since = time.monotonic()

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def say(self, what: str, share: float) -> None:
        """`what` is being done, and `share` (0 to 1) of it is done."""
        if what != self.what:
            self._tick()
            self.what, self.since = what, time.monotonic()
            if self.console.is_terminal:
                self.current = self.bars.add_task(what, total=1.0)
        if self.current is not None:
            self.bars.update(self.current, completed=share, total=1.0 if share else None)

    def end(self) -> None:
        self._tick()
        self.what = ""
        self.bars.stop()

    def _tick(self) -> None:
        """The piece of work that is over, with the time it took."""
        if self.current is not None:
            self.bars.remove_task(self.current)
            self.current = None
        if self.what and self.what != "ready":
            took = time.monotonic() - self.since
            self.console.print(f"  [green]✓[/] {self.what} [dim]{took:.1f} s[/]", highlight=False)
