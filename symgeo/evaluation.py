"""How well a model does, and the generalization gaps: test minus training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.batches import naming_the_data, supervised


def gaps(model: nn.Module, train: Sequence[Any], test: Sequence[Any]) -> dict[str, float]:
    """ "loss gap", and "error gap" for classification: test minus training, each a mean over examples."""
    before, after = evaluate(model, train), evaluate(model, test)
    return {f"{name} gap": after[name] - before[name] for name in before if name in after}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Any]) -> dict[str, float]:
    """ "loss", and "error" (the share of wrong labels) where every batch has one integer label per example."""
    total, losses, errors = 0, 0.0, 0.0
    classified = True
    for batch in batches:
        with naming_the_data(model):
            loss, wrong, size = _one(model, batch)
        total += size
        losses += loss * size
        errors += wrong or 0.0
        classified = classified and wrong is not None
    return {"loss": losses / total} | ({"error": errors / total} if classified else {})


def _one(model: nn.Module, batch: Any) -> tuple[float, float | None, int]:
    """(mean loss, number of wrong labels or None, number of examples) of a batch."""
    if isinstance(batch, Mapping):
        output, labels = model(**batch), batch.get("labels")
        if labels is None or getattr(output, "loss", None) is None:
            raise ValueError(f"data: a dictionary needs labels that the model takes; found {', '.join(batch)}")
        return float(output.loss), _wrong(getattr(output, "logits", None), labels), len(labels)
    output, labels = model(batch[0]), batch[1]
    return float(supervised(output, labels)), _wrong(getattr(output, "logits", output), labels), len(labels)


def _wrong(logits: Any, labels: Tensor) -> float | None:
    if not isinstance(logits, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        return None
    if logits.shape[:-1] != labels.shape:
        return None
    return float((logits.argmax(-1) != labels).sum())
