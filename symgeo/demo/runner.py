"""Training all models of a recipe, on worker processes, into a folder that keeps what is already done."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from symgeo.data import Digits, digits
from symgeo.demo.checkpoints import Checkpoint, CheckpointError, cache_folder, fingerprint, inspect, save
from symgeo.demo.training import Recipe, Setting, evaluate, full, train
from symgeo.parallel import spread

Progress = Callable[[int, int, Checkpoint], None]


@dataclass(frozen=True)
class Job:
    """One model to train: where it goes, how and on which split it is trained, and the fingerprint of that."""

    path: Path
    setting: Setting
    steps: int
    train: int
    split_seed: int
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
    missing = {str(job.path): job for job in jobs if job.path not in done}
    for _, checkpoint in spread(_train_one, missing, workers):
        record(checkpoint)
    return [done[job.path] for job in jobs]


def _jobs(folder: Path, recipe: Recipe) -> list[Job]:
    return [
        Job(folder / f"model-{i:02d}.safetensors", setting, recipe.steps, recipe.train, recipe.split_seed,
            fingerprint(recipe, (setting,)))
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


@lru_cache(maxsize=1)
def _data(images: int, seed: int) -> Digits:
    return digits(images, seed)


def _train_one(job: Job) -> Checkpoint:
    data = _data(job.train, job.split_seed)
    params = train(job.setting, data, job.steps)
    return save(job.path, params, job.setting, evaluate(params, data), job.fingerprint)
