"""Criteria with what curvature needs of them, in closed form: the loss as a weighted sum of terms, one per row.

    L = sum_r w_r l_r(f_r),    H_f = blockdiag(w_r d2 l_r),    score q_r = d l_r / d f_r.

For losses that are negative log-likelihoods ``E[q q^T] = d2 l`` when the label is drawn from the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def target_of(batch: Any, key: str) -> Tensor:
    """``y`` of a batch ``(x, y)``, ``batch[key]`` of a mapping."""
    if isinstance(batch, Mapping):
        if key not in batch:
            raise ValueError(f"batch: needed the key {key!r} for the criterion; found {sorted(batch)}")
        return batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    raise ValueError(f"a batch must be (x, y) or a mapping; got {type(batch).__name__}")


class Criterion(ABC):
    """``criterion(output, batch) -> scalar``, with its curvature in the outputs."""

    @abstractmethod
    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """The loss of a batch."""

    @abstractmethod
    def curvature(self, output: Tensor, batch: Any) -> Callable[[Tensor], Tensor]:
        """``u -> H_f u`` at ``output``; ``u`` has its shape."""

    @abstractmethod
    def score(self, output: Tensor, batch: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``(q, w)``: the scores of the labels of the batch or, with a generator, of labels drawn from the model.

        ``q`` can be summed over its last axis against outputs; ``w`` has size 1 there.
        """

    def scatter(self, scores: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """``u -> sum_s w q_s <q_s, u> / S`` for scores ``(S, *q)``: the sum over terms of their outer products."""
        count = scores.shape[0]

        def product(u: Tensor) -> Tensor:
            rows = u.reshape(weights.shape[:-1] + scores.shape[-1:])
            inner = (scores * rows).sum(-1, keepdim=True)
            return ((weights / count) * (scores * inner).sum(0)).reshape(u.shape)

        return product


@dataclass(frozen=True)
class CrossEntropy(Criterion):
    """Softmax cross-entropy, the mean over the labels that are not ``ignore_index``; classes on axis ``axis``.

        H_f u = w (p * u - p <p, u>),    q = p - onehot(label)

    No matrix of classes by classes is formed.  ``shift`` compares each position with the next label, as causal
    language models do.  A term is one label: one token, not one sequence.
    """

    target: str = "labels"
    shift: bool = False
    ignore_index: int = -100
    axis: int = -1

    def _labels(self, output: Tensor, batch: Any) -> Tensor:
        labels = target_of(batch, self.target)
        shape = output.movedim(self.axis, -1).shape[:-1]
        if labels.shape != shape or labels.is_floating_point():
            raise ValueError(
                f"cross-entropy of outputs {tuple(output.shape)} needs integer labels of shape {tuple(shape)}; "
                f"got {tuple(labels.shape)} of {labels.dtype}"
            )
        if self.shift:
            labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], self.ignore_index)], dim=-1)
        return labels

    def _known(self, output: Tensor, batch: Any) -> Tensor:
        """The labels, all of which must be classes or ignored."""
        labels, classes = self._labels(output, batch), output.shape[self.axis]
        strange = (labels != self.ignore_index) & ((labels < 0) | (labels >= classes))
        if bool(strange.any()):
            raise ValueError(f"cross-entropy: needed labels 0 to {classes - 1} or {self.ignore_index}; "
                             f"found {int(labels[strange][0])}")
        return labels

    def _weights(self, labels: Tensor, like: Tensor) -> Tensor:
        kept = (labels != self.ignore_index).to(like.dtype)
        return (kept / kept.sum()).unsqueeze(-1)

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """The mean negative log-probability of the labels."""
        labels = self._labels(output, batch)
        logits = output.movedim(self.axis, -1).flatten(0, -2)
        return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=self.ignore_index)

    def curvature(self, output: Tensor, batch: Any) -> Callable[[Tensor], Tensor]:
        """``u -> w (p * u - p <p, u>)``."""
        labels = self._known(output, batch)
        p = output.movedim(self.axis, -1).softmax(-1)
        weighted = p * self._weights(labels, p)

        def product(u: Tensor) -> Tensor:
            rows = u.movedim(self.axis, -1)
            return (weighted * (rows - (p * rows).sum(-1, keepdim=True))).movedim(-1, self.axis)

        return product

    def score(self, output: Tensor, batch: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``p - onehot``."""
        labels = self._known(output, batch)
        p = output.movedim(self.axis, -1).softmax(-1)
        if generator is None:
            drawn = labels.clamp(0, p.shape[-1] - 1)
        else:
            flat = p.detach().flatten(0, -2).to(generator.device)
            drawn = torch.multinomial(flat, 1, generator=generator).view(labels.shape).to(p.device)
        return p - nn.functional.one_hot(drawn, p.shape[-1]), self._weights(labels, p)

    def scatter(self, scores: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """See :meth:`Criterion.scatter`; classes are moved to the last axis and back."""
        inner = super().scatter(scores, weights)
        return lambda u: inner(u.movedim(self.axis, -1)).movedim(-1, self.axis)


@dataclass(frozen=True)
class SquaredError(Criterion):
    """The mean of ``(f - y)^2`` over all entries; a term is a row of the last axis, ``|f_r - y_r|^2 / C``.

    Its likelihood is the normal distribution of variance ``C / 2``.  ``H_f = 2 / (R C)``.
    """

    target: str = "labels"

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """The mean squared difference."""
        return (output - self._target(output, batch)).square().mean()

    def _target(self, output: Tensor, batch: Any) -> Tensor:
        return _like(target_of(batch, self.target), output, "squared error")

    def curvature(self, output: Tensor, batch: Any) -> Callable[[Tensor], Tensor]:
        """``u -> 2 u / (R C)``."""
        self._target(output, batch)
        return lambda u: u * (2.0 / output.numel())

    def score(self, output: Tensor, batch: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``2 (f - y) / C``."""
        rows = output if output.ndim > 1 else output.unsqueeze(-1)
        classes = rows.shape[-1]
        weights = torch.full_like(rows[..., :1], classes / rows.numel())
        if generator is None:
            return (2.0 / classes) * (output - self._target(output, batch)).reshape(rows.shape), weights
        return (2.0 / classes) ** 0.5 * _normal_like(rows, generator), weights


@dataclass(frozen=True)
class BinaryCrossEntropy(Criterion):
    """Logistic loss of logits, the mean over all entries, each of which is a term: ``H_f = p (1 - p) / N``."""

    target: str = "labels"

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """The mean logistic loss."""
        return nn.functional.softplus(output).sub(output * self._target(output, batch)).mean()

    def _target(self, output: Tensor, batch: Any) -> Tensor:
        return _like(target_of(batch, self.target), output, "binary cross-entropy")

    def curvature(self, output: Tensor, batch: Any) -> Callable[[Tensor], Tensor]:
        """``u -> p (1 - p) u / N``."""
        self._target(output, batch)
        p = output.sigmoid()
        return lambda u: u * (p * (1 - p) / output.numel())

    def score(self, output: Tensor, batch: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``p - y``."""
        p = output.sigmoid()
        if generator is None:
            labels = self._target(output, batch)
        else:
            uniform = torch.rand(p.shape, dtype=p.dtype, device=generator.device, generator=generator)
            labels = (uniform.to(p.device) < p).to(p.dtype)
        scores = (p - labels).unsqueeze(-1)
        return scores, torch.full_like(scores, 1.0 / output.numel())


def _like(target: Tensor, output: Tensor, what: str) -> Tensor:
    if target.shape != output.shape:
        raise ValueError(f"{what} of outputs {tuple(output.shape)} needs targets of that shape; "
                         f"got {tuple(target.shape)}")
    return target.to(output.dtype)


def _normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=generator.device, generator=generator).to(x.device)
