"""Metrics for merging: the diagonal one that Adam leaves behind, and Kronecker products of two Gram matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifolds.linalg import gram, widen

Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class DiagonalMetric(dict[str, Tensor]):
    """``<u, v> = sum F_j u_j v_j``, as the ``Params`` of its diagonal: usable wherever Fisher diagonals are expected.

    A diagonal is tied to the coordinates.  It is carried along by permutations, and by positive scalings if it is
    rescaled with the parameters; it is **not** invariant under the general linear groups of LoRA factors and of
    attention, nor under rotations, so a merge with it depends on the gauge of the models.
    """

    @classmethod
    def from_adam(
        cls, optimizer: torch.optim.Optimizer, named_params: Named | None = None, *, batch_size: int
    ) -> DiagonalMetric:
        """The diagonal of the Fisher information from the state of Adam or AdamW: no data, no backward pass.

            ``F = batch_size * exp_avg_sq / (1 - beta_2^step)``

        (Squisher, arXiv 2507.18807), for losses that are means over ``batch_size`` examples.  At fixed parameters its
        expectation is ``F + (batch_size - 1) mu^2`` with ``mu`` the mean gradient (derived here): exact where the
        model has converged, too large where it has not.  A factor common to all models does not change a merge, so
        ``batch_size`` matters when it differs between them.  ``weight_decay`` of Adam (not of AdamW) is part of the
        gradients that were averaged.  With ``amsgrad`` the mean ``exp_avg_sq`` is used all the same: the running
        maximum ``max_exp_avg_sq`` is no estimate of an expectation.

        named_params : the parameters with their names, a mapping or ``model.named_parameters()``; may be left out if
        the optimizer was built from named parameters.

        Raises ``ValueError`` naming the parameter that the optimizer does not hold, or has not stepped, or whose
        state is not Adam's.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, the size of the batches; got {batch_size!r}")
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        result = cls()
        for name, param in _names(optimizer, named_params):
            if id(param) not in groups:
                raise ValueError(f"named_params: the optimizer does not hold {name!r}; pass only what it trains")
            result[name] = batch_size * _second_moment(name, optimizer.state.get(param, {}), groups[id(param)])
        if not result:
            raise ValueError("named_params: needed at least one parameter; got none")
        return result

    def inner(self, u: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensor:
        """``sum F_j u_j v_j`` over all entries of all parameters.

        >>> DiagonalMetric(w=torch.tensor([2.0, 3.0])).inner({"w": torch.ones(2)}, {"w": torch.ones(2)})
        tensor(5.)
        """
        return torch.stack([(f * u[name] * v[name]).sum() for name, f in self.items()]).sum()


def _names(optimizer: torch.optim.Optimizer, named: Named | None) -> list[tuple[str, Tensor]]:
    if named is not None:
        return list(named.items() if isinstance(named, Mapping) else named)
    pairs = []
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise ValueError(
                "named_params: the optimizer does not know the names of its parameters; "
                "pass model.named_parameters() here or to the optimizer"
            )
        pairs += list(zip(group["param_names"], group["params"]))
    return pairs


def _second_moment(name: str, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """``exp_avg_sq / (1 - beta_2^step)``; ``step`` and the betas may be tensors (``capturable``)."""
    if not state:
        raise ValueError(f"{name!r} has no optimizer state: it never received a gradient; leave it out or train it")
    missing = [key for key in ("exp_avg_sq", "step") if key not in state]
    missing += [] if "betas" in group else ["betas"]
    if missing:
        wanted, found = ", ".join(missing), ", ".join(sorted(state))
        raise ValueError(f"{name!r}: needed the state and betas of Adam; {wanted} missing, found {found}")
    step, beta = float(state["step"]), float(group["betas"][1])
    weight = 1.0 - beta**step
    if step < 1 or weight <= 0:
        raise ValueError(f"{name!r}: needed at least one step and beta_2 < 1; got step {step:g} and beta_2 {beta:g}")
    moment: Tensor = state["exp_avg_sq"].detach()
    if not bool(torch.isfinite(moment).all()):
        raise ValueError(f"{name!r}: exp_avg_sq has entries that are not finite; the run has diverged")
    return moment / weight


@dataclass(frozen=True)
class KroneckerMetric:
    """``<X, Y> = Tr(X^T L Y R)`` on weights ``(..., m, n)``: ``left`` L ``(..., m, m)``, ``right`` R ``(..., n, n)``.

    Both symmetric and positive semidefinite; ``left=None`` is the identity, which makes it RegMean's metric.  It is
    equivariant: ``W -> M W N^-1`` with ``L -> M^-T L M^-1``, ``R -> N R N^T`` keeps every inner product.

    Raises ``ValueError`` for matrices that are not square, not finite or not symmetric.

    >>> eye = torch.eye(2); KroneckerMetric(2 * eye, 3 * eye).inner(eye, eye)
    tensor(12.)
    """

    left: Tensor | None
    right: Tensor

    def __post_init__(self) -> None:
        for name, x in (("left", self.left), ("right", self.right)):
            if x is None:
                continue
            if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
                raise ValueError(f"{name}: needed a square matrix (..., n, n); got shape {tuple(x.shape)}")
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"{name}: has entries that are not finite")
            asymmetry = float((x - x.mT).abs().max())
            if asymmetry > 1e-3 * float(x.abs().max()):
                raise ValueError(f"{name}: needed a symmetric matrix; x - x^T is as large as {asymmetry:.1e}")

    @classmethod
    def from_samples(cls, inputs: Tensor, jacobians: Tensor | None = None) -> KroneckerMetric:
        """KFAC of one linear layer: ``R = mean a a^T`` and ``L = mean J^T J``.

        inputs : the layer's inputs ``a``, ``(samples, n)``;  jacobians : ``J``, ``(samples, outputs, m)``, those of
        the network's outputs by the layer's outputs, which gives the Gauss-Newton matrix of the loss
        ``1/2 |f - y|^2``, exactly for one sample and for a network that is linear behind the layer; None for a layer
        that is the output itself, where ``L = I``.
        """
        right = gram(inputs) / inputs.shape[-2]
        left = None if jacobians is None else gram(jacobians).mean(-3)
        return cls(left, right)

    def lower(self, x: Tensor) -> Tensor:
        """``L X R``, the covector ``<X, .>``."""
        return x @ self.right if self.left is None else self.left @ x @ self.right

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """``Tr(X^T L Y R)``, shape ``(...)``."""
        return (x * self.lower(y)).sum((-2, -1))

    def restrict(self, left: Tensor, right: Tensor) -> KroneckerMetric:
        """The metric of ``X`` in ``left X right^T``, for bases with orthonormal columns; in double precision."""
        rows = None if self.left is None else _symmetric(left.mT @ widen(self.left) @ left)
        return KroneckerMetric(rows, _symmetric(right.mT @ widen(self.right) @ right))


def _symmetric(x: Tensor) -> Tensor:
    return 0.5 * (x + x.mT)
