"""Progress bars: on a terminal only, on standard error only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], label: str, show: bool) -> Iterable[T]:
    """The items, with a bar while they are consumed if ``show`` and standard error is a terminal."""
    if not (show and sys.stderr.isatty()):
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description=label, console=Console(stderr=True), transient=True)
