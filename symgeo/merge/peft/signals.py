"""A termination signal as an exception, so that what was begun is cleaned up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """The process was asked to end."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises :class:`Terminated`; once that has left it, the process ends by the signal.

    Nothing changes outside the main thread, or where the program handles the signal itself.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not ours:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    asked = False
    try:
        yield
    except Terminated:
        asked = True
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
