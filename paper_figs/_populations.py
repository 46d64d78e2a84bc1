"""Small trained transformers in numbers, each with its generalization gaps: vision transformers, language models.

The vision transformers are those of `symgeo demo`: they learn the digits for a number of steps, and the full ones are
kept in the demo's cache. The language models learn a piece of the source of Python's standard library character by
character, until their loss on the whole piece is at most a target: sharpness depends on how far training went, and so
does the gap.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from symgeo import find_symmetry, functional_loss
from symgeo.data import Text, digits, python_source
from symgeo.demo.runner import train_all
from symgeo.demo.training import GATE, Recipe, grid
from symgeo.functional import Params
from symgeo.models.tiny_lm import TinyLM
from symgeo.models.tiny_vit import TinyViT
from symgeo.study import Candidate


@dataclass(frozen=True)
class Population:
    """Trained models, and a row for each that was tried: its setting, losses, and whether it was kept."""

    name: str
    candidates: list[Candidate]
    rows: list[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {"kept": len(self.candidates), "tried": len(self.rows), "models": self.rows}


def vision_transformers(
    recipe: Recipe, images: int, dtype: torch.dtype, gate: float = GATE, keep: bool = True
) -> Population:
    """Transformers whose accuracy on the training images is at least ``gate``; one batch of training images each.

    With ``keep`` they are in the demo's cache, from where they are read the next time.
    """
    data, model = digits(recipe.train, recipe.split_seed), TinyViT().to(dtype).eval()
    loss, symmetry = functional_loss(model, cross_entropy), find_symmetry(model)
    batch = data.train_images[:images].to(dtype), data.train_labels[:images]
    kept, rows = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for checkpoint in train_all(None if keep else temporary, workers=1, recipe=recipe):
            setting, found = checkpoint.setting, checkpoint.metrics
            name, fits = f"vit-{setting.seed:04d}", found.train_accuracy >= gate
            rows.append({"name": name, "kept": fits} | asdict(setting) | asdict(found))
            if fits:
                gaps = {"loss gap": found.loss_gap, "error gap": found.error_gap}
                params = {key: p.to(dtype) for key, p in checkpoint.params().items()}
                kept.append(Candidate(name, loss, params, [batch], gaps, symmetry))
    return Population("vision transformers", kept, rows)


def handful(seed: int, dtype: torch.dtype) -> Population:
    """Three transformers hardly trained, for the small sizes."""
    settings = grid(lrs=(5e-3,), weight_decays=(0.0,), init_scales=(1.0,), batch_sizes=(8, 16, 32), seed=seed)
    return vision_transformers(Recipe(settings, 50, split_seed=seed), 16, dtype, gate=0.0, keep=False)


@dataclass(frozen=True)
class Reading:
    """How language models are made: sizes, what they read, and the loss at which training ends."""

    width: int = 32
    depth: int = 2
    heads: int = 4
    mlp_width: int = 64
    context: int = 32
    characters: int = 8000
    target: float = 1.0
    limit: int = 2000
    every: int = 20
    windows: int = 32  # of the sharpness
    validation: int = 1024
    pretraining: int = 1000

    def model(self, seed: int) -> TinyLM:
        """A model with its initial values."""
        return TinyLM(context=self.context, width=self.width, depth=self.depth, heads=self.heads,
                      mlp_width=self.mlp_width, generator=torch.Generator().manual_seed(seed))  # fmt: skip


TINY = Reading(width=16, depth=1, heads=2, mlp_width=16, context=16, characters=400, target=2.8, limit=60, every=10,
               windows=8, validation=32, pretraining=10)  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """What the language models differ in; ``seed`` decides initial values and the order of the data."""

    lr: float
    weight_decay: float
    batch: int
    seed: int


def paces(
    lrs: tuple[float, ...], weight_decays: tuple[float, ...], batches: tuple[int, ...], repeats: int, seed: int
) -> list[Pace]:
    """All combinations, each with ``repeats`` seeds of its own."""
    combinations = product(range(repeats), lrs, weight_decays, batches)
    return [Pace(lr, decay, batch, 1000 * seed + i) for i, (_, lr, decay, batch) in enumerate(combinations)]


def next_symbol(logits: Tensor, following: Tensor) -> Tensor:
    """Mean cross entropy over all positions, in nats."""
    return cross_entropy(logits.flatten(0, -2), following.flatten())


def _windows(symbols: Tensor, count: int, context: int) -> tuple[Tensor, Tensor]:
    return Text(symbols, symbols).examples(count, context)


def _steps(model: TinyLM, text: Text, pace: Pace, context: int, limit: int) -> Iterator[int]:
    """AdamW at a rate that rises over 50 steps and then stays; the numbers of the steps done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=pace.lr, weight_decay=pace.weight_decay, fused=True)
    for step, (symbols, following) in enumerate(text.batches(pace.seed, limit, pace.batch, context), start=1):
        optimizer.param_groups[0]["lr"] = pace.lr * min(1.0, step / 50)
        optimizer.zero_grad()
        next_symbol(model(symbols), following).backward()
        optimizer.step()
        yield step


@torch.no_grad()
def _judge(model: TinyLM, windows: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Loss and error."""
    logits = model(windows[0])
    return float(next_symbol(logits, windows[1])), float((logits.argmax(-1) != windows[1]).double().mean())


def pretrained(reading: Reading, text: Text, seed: int) -> Params:
    """A model that has read the training text for a while."""
    model = reading.model(seed)
    for _ in _steps(model, text, Pace(5e-3, 0.0, 64, seed), reading.context, reading.pretraining):
        pass
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def language_models(
    reading: Reading, settings: list[Pace], seed: int, dtype: torch.dtype, fine_tuned: bool = False
) -> Population:
    """Models that reach the target on their piece of text: from scratch, or all from one pretrained model.

    From scratch the piece is the beginning of the training text and the gap is to the validation text; fine-tuning
    reads the beginning of the validation text, which pretraining has not seen, and the gap is to its end.
    """
    text = python_source()
    start = pretrained(reading, text, seed) if fine_tuned else None
    source, half = (text.validation, len(text.validation) // 2) if fine_tuned else (text.train, 0)
    piece, held_out = source[: reading.characters], text.validation[half:]
    inside = _windows(piece, len(piece) // reading.context, reading.context)
    outside = _windows(held_out, reading.validation, reading.context)
    name = "fine-tuned language models" if fine_tuned else "language models"
    template = reading.model(0).to(dtype).eval()
    loss, symmetry = functional_loss(template, next_symbol), find_symmetry(template)
    batch = _windows(piece, reading.windows, reading.context)
    kept, rows = [], []
    for i, pace in enumerate(settings):
        model = reading.model(pace.seed)
        if start is not None:
            model.load_state_dict(start)
        taken, found = 0, (float("inf"), 1.0)
        training = _steps(model, Text(piece, piece), pace, reading.context, reading.limit)
        while found[0] > reading.target and (step := next(islice(training, reading.every - 1, None), None)):
            taken, found = step, _judge(model, inside)
        rows.append({"name": f"lm-{i:02d}", "kept": found[0] <= reading.target, "steps": taken} | asdict(pace))
        if rows[-1]["kept"]:
            gaps = {gap: b - a for gap, a, b in zip(("loss gap", "error gap"), found, _judge(model, outside))}
            rows[-1] |= {"train_loss": found[0], "train_error": found[1]} | gaps
            params = {key: p.detach().to(dtype) for key, p in model.named_parameters()}
            kept.append(Candidate(rows[-1]["name"], loss, params, [batch], gaps, symmetry))
    return Population(name, kept, rows)
