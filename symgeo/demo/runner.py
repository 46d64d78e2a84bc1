"""Training all models of a recipe, on worker processes, into a folder that keeps what is already done."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch

from symgeo.data import Digits, digits
from symgeo.demo.checkpoints import Checkpoint, CheckpointError, cache_folder, fingerprint, inspect, save
from symgeo.demo.training import Recipe, Setting, evaluate, full, train

Progress = Callable[[int, int, Checkpoint], None]


@dataclass(frozen=True)
class Job:
    """One model to train: where it goes, how it is trained, and the fingerprint of that."""

    path: Path
    setting: Setting
    steps: int
    fingerprint: str


def train_all(
    folder: str | Path | None = None,
    workers: int = 2,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
) -> list[Checkpoint]:
    """Train the models of a recipe that ``folder`` does not hold yet, and return all of them in order.

    A file that is damaged, or was trained in another way, is trained again; the others are kept. Models
    below the gate on train accuracy are among the result, with ``metrics.excluded`` set.

    Args:
        folder: where the checkpoints are; the recipe's folder in the user's cache when None.
        workers: processes of one thread each. With 1 the training runs in this process. The processes are
            spawned, so a script that asks for more has to be guarded by ``if __name__ == "__main__"``.
        progress: called as ``progress(done, total, checkpoint)`` for every model, cached ones first.
        recipe: settings, steps and split; ``full()`` when None.

    Raises:
        ValueError: ``workers`` is not positive.
        RuntimeError: a worker process died.
        ImportError: scikit-learn, which brings the digits, is missing.
    """
    if workers < 1:
        raise ValueError(f"workers: needed at least 1, found {workers}")
    recipe = recipe or full()
    folder = Path(folder) if folder is not None else cache_folder(recipe)
    jobs = _jobs(folder, recipe)
    done: dict[Path, Checkpoint] = {}

    def record(checkpoint: Checkpoint) -> None:
        done[checkpoint.path] = checkpoint
        if progress is not None:
            progress(len(done), len(jobs), checkpoint)

    for job in jobs:
        cached = _cached(job)
        if cached is not None:
            record(cached)
    missing = [job for job in jobs if job.path not in done]
    for checkpoint in _run(missing, recipe, min(workers, len(missing))):
        record(checkpoint)
    return [done[job.path] for job in jobs]


def _jobs(folder: Path, recipe: Recipe) -> list[Job]:
    return [
        Job(folder / f"model-{i:02d}.safetensors", setting, recipe.steps, fingerprint(recipe, (setting,)))
        for i, setting in enumerate(recipe.settings)
    ]


def _cached(job: Job) -> Checkpoint | None:
    if not job.path.exists():
        return None
    try:
        checkpoint = inspect(job.path)
    except CheckpointError:
        return None
    return checkpoint if checkpoint.fingerprint == job.fingerprint else None


def _run(jobs: list[Job], recipe: Recipe, workers: int) -> Iterator[Checkpoint]:
    if not jobs:
        return
    if workers == 1:
        with _one_thread():
            yield from (_train_one(job, recipe.train, recipe.split_seed) for job in jobs)
        return
    # Nothing large may be handed to a process as it starts: if it dies, the parent waits for ever to be read.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start)
    try:
        futures = [pool.submit(_train_one, job, recipe.train, recipe.split_seed) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a training process died; in a script, call under if __name__ == '__main__', or set workers=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread, as a worker does: the number of threads changes the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C only the parent speaks
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _data(images: int, seed: int) -> Digits:
    return digits(images, seed)


def _train_one(job: Job, images: int, split_seed: int) -> Checkpoint:
    data = _data(images, split_seed)
    params = train(job.setting, data, job.steps)
    return save(job.path, params, job.setting, evaluate(params, data), job.fingerprint)
