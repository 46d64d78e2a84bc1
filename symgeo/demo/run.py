"""The demo: train or load the models, measure them, and write a report a person can read in two minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from symgeo import report
from symgeo.data import Digits, batches, digits
from symgeo.demo.checkpoints import Checkpoint, inspect
from symgeo.demo.orbit import Orbit, follow
from symgeo.demo.output import folder
from symgeo.demo.page import page, summary
from symgeo.demo.runner import train_all
from symgeo.demo.training import Recipe
from symgeo.demo.training import full as full_recipe
from symgeo.demo.training import quick as quick_recipe
from symgeo.functional import Params, functional_loss
from symgeo.models import find_symmetry
from symgeo.models.tiny_vit import TinyViT
from symgeo.plots import plot_orbit, plot_scatter, plot_tau
from symgeo.study import Candidate, Lazy, Study, study

Bar = Callable[[str], AbstractContextManager[Callable[[int, int, object], None]]]
# half-decade grids, from where the loss of the median model rises by about 0.01 to where most models are lost
RADII = {
    "euclidean": (0.01, 0.03, 0.1, 0.3),
    "adaptive": (0.1, 0.3, 1.0, 3.0),
    "geodesic inv": (0.03, 0.1, 0.3, 1.0),
    "geodesic mix": (0.03, 0.1, 0.3, 1.0),
}


@dataclass(frozen=True)
class Plan:
    """What is measured: the models, radii by measure, images, steps, and the points of the orbit."""

    recipe: Recipe
    radii: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: dict(RADII))
    images: int = 256
    steps: int = 12
    orbit_conditions: tuple[float, ...] = (1.0, 2.2, 4.6, 10.0, 22.0, 46.0, 100.0)
    orbit_images: int = 64
    orbit_rho: float = 0.1


def full(seed: int = 0) -> Plan:
    """The plan of ``symgeo demo``."""
    return Plan(full_recipe(seed))


def quick(seed: int = 0) -> Plan:
    """The plan of ``symgeo demo --quick``: every part of the demo, too few models to conclude from."""
    radii = {"euclidean": (0.1,), "adaptive": (1.0,), "geodesic inv": (0.3,), "geodesic mix": (0.3,)}
    return Plan(quick_recipe(seed), radii, images=128, steps=6, orbit_conditions=(1.0, 10.0, 100.0), orbit_images=32)


@dataclass(frozen=True)
class Demo:
    """What the demo found, and the folder of its report."""

    folder: Path
    study: Study
    orbit: Orbit
    text: str
    result: dict[str, Any]


@dataclass(frozen=True)
class LoadModel:
    """Makes the candidate for a trained model, in whichever process it is measured."""

    path: Path
    train: int
    split_seed: int
    images: int
    dtype: torch.dtype

    def __call__(self) -> Candidate:
        """Read the checkpoint, whose metrics are the gaps, and take the first training images as the one batch."""
        checkpoint = inspect(self.path)
        model, data = checkpoint.model().to(self.dtype).eval(), _digits(self.train, self.split_seed)
        gaps = {"loss gap": checkpoint.metrics.loss_gap, "error gap": checkpoint.metrics.error_gap}
        images, labels = data.train_images[: self.images].to(self.dtype), data.train_labels[: self.images]
        params = {name: parameter.detach() for name, parameter in model.named_parameters()}
        loss = functional_loss(model, cross_entropy)
        return Candidate(self.path.stem, loss, params, [(images, labels)], gaps, find_symmetry(model))


@cache
def _digits(train: int, seed: int) -> Digits:
    return digits(train, seed)


def splits() -> dict[str, Any]:
    """The digits as the demo's models were trained and tested on them: ``--data symgeo.demo.run:splits``."""
    data = digits()
    return {
        "train": batches(data.train_images, data.train_labels, 128),
        "test": batches(data.test_images, data.test_labels, 512),
    }


@contextmanager
def silent(label: str) -> Iterator[Callable[[int, int, object], None]]:
    """No progress bar."""
    yield lambda done, total, what: None


def run_demo(
    out: str | Path = "symgeo-demo",
    quick_look: bool = False,
    seed: int = 0,
    workers: int = 2,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = print,
    bar: Bar = silent,
    plan: Plan | None = None,
) -> Demo:
    """Train (or load) the models, measure sharpness, and write the report into the folder ``out``.

    Args:
        out: replaced if it is an earlier report; otherwise it must not exist, or be empty.
        quick_look: the plan :func:`quick` in place of :func:`full`; ``plan`` overrides both.
        workers: processes, of one thread each; scripts that ask for more than one are guarded by
            ``if __name__ == "__main__"``.

    Raises:
        ValueError: ``out`` holds something else, or no model could be measured.
        ImportError: scikit-learn, whose wheel holds the images, is not installed.
    """
    plan = plan or (quick(seed) if quick_look else full(seed))
    clock = Clock()
    with folder(out) as temporary:
        say(f"training {len(plan.recipe.settings)} models, or reading them from the cache")
        with bar("training") as advance:
            checkpoints = train_all(workers=workers, progress=advance, recipe=plan.recipe)
        clock.lap("training")
        say("measuring sharpness")
        kept = [c for c in checkpoints if not c.metrics.excluded]
        if not kept:
            raise ValueError("no model of the demo fits its training data; train more steps, or take another seed")
        with bar("measuring") as advance:
            found = study(
                [_lazy(c, plan, dtype) for c in kept],
                plan.radii,
                steps=plan.steps,
                seed=seed,
                workers=workers,
                progress=advance,
            )
        clock.lap("sharpness")
        say("following one model along its orbit")
        orbit = _orbit(kept[0], plan, seed, workers)
        clock.lap("orbit")
        demo = _report(Path(out), temporary, plan, checkpoints, found, orbit, clock, seed)
    return demo


class Clock:
    """Seconds spent in each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Attribute the time since the last lap to a part."""
        now = time.perf_counter()
        self.seconds[part], self._last = round(now - self._last, 2), now


def _lazy(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, images: int | None = None) -> Lazy:
    recipe = plan.recipe
    load = LoadModel(checkpoint.path, recipe.train, recipe.split_seed, images or plan.images, dtype)
    return Lazy(checkpoint.path.stem, load)


def _orbit(checkpoint: Checkpoint, plan: Plan, seed: int, workers: int) -> Orbit:
    load = _lazy(checkpoint, plan, torch.float64, plan.orbit_images).load
    return follow(load, _logits, plan.orbit_conditions, plan.orbit_rho, plan.steps, seed, workers)


def _logits(candidate: Candidate, params: Params) -> Tensor:
    return torch.func.functional_call(TinyViT(), params, (candidate.batches[0][0],))


def _report(
    out: Path,
    temporary: Path,
    plan: Plan,
    checkpoints: list[Checkpoint],
    found: Study,
    orbit: Orbit,
    clock: Clock,
    seed: int,
) -> Demo:
    plot_tau(found.correlations, temporary / "tau.png")
    plot_scatter(
        found, {measure: radii[len(radii) // 2] for measure, radii in plan.radii.items()}, temporary / "scatter.png"
    )
    plot_orbit(orbit, temporary / "orbit.png")
    clock.lap("figures")
    models = [
        {"name": c.path.stem, "excluded": c.metrics.excluded, **asdict(c.setting), **asdict(c.metrics)}
        for c in checkpoints
    ]
    result = {"models": models, "study": found.to_dict(), "orbit": asdict(orbit), "timings": clock.seconds}
    settings = {"plan": asdict(plan), "seed": seed}
    document = report.document("demo", settings, result, sum(clock.seconds.values()))
    report.write_json(temporary / "report.json", document)
    (temporary / "report.html").write_text(page(temporary, document, found, orbit), encoding="utf-8")
    text = f"{summary(found, orbit)}\n\nreport: {out / 'report.html'}"
    return Demo(out, found, orbit, text, result)
