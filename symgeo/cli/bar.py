"""A progress bar on standard error, where that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(label: str, show: bool) -> Iterator[Callable[[int, int, object], None]]:
    """A function ``(done, total, what)`` that advances the bar; it does nothing without a terminal or ``show``."""
    if not (show and sys.stderr.isatty()):
        yield lambda done, total, what: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total)
