"""One function over many inputs, on worker processes of one thread each."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

import torch

Input = TypeVar("Input")
Output = TypeVar("Output")


def spread(
    work: Callable[[Input], Output], inputs: Mapping[str, Input], workers: int = 1
) -> Iterator[tuple[str, Output]]:
    """``(name, work(input))`` for every input, in order of completion; in this process when ``workers`` is 1.

    Every worker has one thread, so that results do not depend on how many there are.  With more than one, the
    processes are spawned: ``work`` and the inputs are pickled (keep them small), and a script has to be guarded
    by ``if __name__ == "__main__"``.  Raises ``ValueError`` for ``workers`` < 1, ``RuntimeError`` if one dies.
    """
    if workers < 1:
        raise ValueError(f"workers: needed at least 1, found {workers}")
    if min(workers, len(inputs)) < 2:
        with one_thread():
            yield from ((name, work(given)) for name, given in inputs.items())
        return
    pool = ProcessPoolExecutor(min(workers, len(inputs)), get_context("spawn"), _start)
    try:
        names = {pool.submit(work, given): name for name, given in inputs.items()}
        for future in as_completed(names):
            yield names[future], future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died; in a script, call under if __name__ == '__main__', or set workers=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the number of threads changes the order of sums, and small models want no more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C end at once, and leave it to the parent to speak
    torch.set_num_threads(1)
