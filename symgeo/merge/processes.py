"""A merge on several processes, each with a share of the modules, which fill one file together.

The workers are plain child processes, ``python -m symgeo.merge.worker``: nothing is forked, and the caller's script
is not imported again, so that neither threads, CUDA nor a script without ``if __name__ == "__main__"`` disturbs.
Tensors go from the input files into the output file; only the plan and the rows of the report travel.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from symgeo.merge.messages import READY, Failure, Finished, Message, Rows, Share
from symgeo.merge.peft.plan import MergePlan, ModulePlan
from symgeo.merge.peft.tensors import TensorFile
from symgeo.merge.streaming import Row, named

Progress = Callable[[int, int, str], None]
COMMAND = ("-P", "-m", "symgeo.merge.worker")  # -P: no module of the working directory may take the place of another
PATIENCE = 1.0  # seconds without a message before the processes are looked at themselves
TAIL = 4096  # bytes of standard error in which a worker's last words are looked for


class _Worker:
    """A child process with its share; a thread of this process hands on what it says, None when it has ended."""

    def __init__(self, share: Share, number: int, inbox: queue.SimpleQueue[tuple[_Worker, Message | None]]) -> None:
        self.number, self.merged, self.finished = number, 0, False
        self._share, self._inbox, self._given = share, inbox, pickle.dumps(share)
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(
                [sys.executable, *COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(),
                process_group=0,  # Ctrl-C is for the parent alone, which then ends its workers
            )
        except BaseException:
            self._errors.close()
            raise
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def take(self) -> list[ModulePlan]:
        """The batch that it has just merged."""
        self.merged += 1
        return self._share.batches[self.merged - 1]

    def epitaph(self) -> str:
        """How it ended without having said so: by what, what it was working on, and its last words."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            how, why = "does not answer any more", ""
        else:
            by = _signal(-code) if code < 0 else ""
            how = f"was killed by {by}" if by else f"ended with exit code {code}"
            why = "; the system may have run out of memory" if by == "SIGKILL" else ""
        if self.merged < len(self._share.batches):
            how += f" before it had merged {named(self._share.batches[self.merged])}"
        words = self._last_words()
        return f"worker process {self.number} {how}{why}{words and f' ({words})'}; take fewer processes (--processes)"

    def close(self) -> None:
        """Wait until nothing is left of it; it has been killed."""
        self.process.wait()
        self._listener.join(PATIENCE)
        self._errors.close()

    def _listen(self) -> None:
        message: Message | None = None
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            with self.process.stdin as stdin, self.process.stdout as stdout:  # an open stdin: the parent is alive
                stdin.write(self._given)
                stdin.flush()
                while stdout.readline() not in (READY, b""):
                    pass
                while not isinstance(message, Finished):
                    message = pickle.load(stdout)
                    self._inbox.put((self, message))
        except (OSError, EOFError, pickle.UnpicklingError):
            self._inbox.put((self, None))

    def _last_words(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - TAIL))
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def merge_on_processes(
    plan: MergePlan, shares: Sequence[Share], file: TensorFile, progress: Progress | None = None
) -> list[Row]:
    """Merge every share in a process of its own, into its places of ``file``; the rows of all reports.

    Raises ``ValueError`` where a process cannot be started, fails or ends before its time.  None of them is left
    when this returns or raises.
    """
    inbox: queue.SimpleQueue[tuple[_Worker, Message | None]] = queue.SimpleQueue()
    rows: list[Row] = []
    with _started(shares, inbox) as workers:
        while not all(worker.finished for worker in workers):
            worker, message = _next(inbox, workers)
            if isinstance(message, Rows):
                batch = worker.take()
                file.written(key for module in batch for key in module.pair.keys)
                rows += message.rows
                if progress is not None:
                    progress(len(rows), len(plan.kept), batch[-1].module)
            elif isinstance(message, Finished):
                worker.finished = True
            elif not worker.finished:
                raise _error(worker, message)
    return rows


@contextmanager
def _started(
    shares: Sequence[Share], inbox: queue.SimpleQueue[tuple[_Worker, Message | None]]
) -> Iterator[list[_Worker]]:
    if not sys.executable:
        raise ValueError("processes: this Python does not know its own executable to start workers; take processes=1")
    workers: list[_Worker] = []
    try:
        try:
            for number, share in enumerate(shares, 1):
                workers.append(_Worker(share, number, inbox))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"processes: worker {len(workers) + 1} did not start ({reason}); take fewer") from error
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()  # of one that has finished everything is in the file
        for worker in workers:
            worker.close()


def _next(
    inbox: queue.SimpleQueue[tuple[_Worker, Message | None]], workers: Sequence[_Worker]
) -> tuple[_Worker, Message | None]:
    """The next message; None from a process that has ended, also where its stream was left open by another one."""
    while True:
        try:
            return inbox.get(timeout=PATIENCE)
        except queue.Empty:
            ended = [w for w in workers if not w.finished and w.process.poll() is not None]
            if ended and inbox.empty():
                return ended[0], None


def _error(worker: _Worker, message: Message | None) -> ValueError:
    if not isinstance(message, Failure):
        return ValueError(worker.epitaph())
    error = ValueError(message.message)
    error.add_note(f"In worker process {worker.number}:\n{message.trace}")
    return error


def _environment() -> dict[str, str]:
    """The environment for a worker: it finds modules where this process does."""
    paths = [path or os.getcwd() for path in sys.path if isinstance(path, str)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
