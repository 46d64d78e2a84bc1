"""Curvature from one gradient and the symmetries of the loss, and the step that it suggests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from manifolds.linalg import widen
from symgeo.curvature.average import coordinates, decompose, outer
from symgeo.curvature.decomposition import Decomposition
from symgeo.curvature.estimators import ESTIMATORS, TRIVIAL, Moments, hessian, trivial_block
from symgeo.curvature.gauge import balance, dual
from symgeo.curvature.operator import InvariantOperator
from symgeo.functional import Params
from symgeo.symmetry import Action, Element, Symmetry


def estimate(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    symmetry: Symmetry | Decomposition,
    estimator: str = "gradient",
    trivial: str = "diagonal",
    damping: float = 0.0,
    center: Mapping[str, Tensor] | None = None,
    compact: bool = False,
) -> InvariantOperator:
    r"""The Hessian of a loss with this symmetry, estimated from one gradient.

    An invariant loss has the gradient ``A g`` at ``A w``, so that one gradient is known on a whole orbit.  With
    ``dw = w - center``, ``dg`` both without their orbit means, ``S_w = R2(dw, dw)`` and ``S_g = R2(dg, dg)`` satisfy
    ``S_g = H S_w H`` for an invariant quadratic loss (arXiv 2606.00442).  See `hessian` for the three estimators.

    Parameters
    ----------
    estimator: "gradient" (Eq. 11), "riccati" (Eq. 10) or "secant"
    trivial: the squared block of the trivial kind, about which orbits say nothing, from the uncentred gradient x:
        "drop" 0, "uncentred" or "dense" x x^T, "diagonal" diag(x^2); H has its square root
    damping: relative to the largest eigenvalue, as in `InvariantOperator`
    center: the point from which weights are measured; by default their orbit mean. Only its non-trivial part matters
    compact: for non-compact groups: parameters and gradient are carried into the balanced gauge (`balance`), and
        the operator that is returned acts there, where the maximal compact subgroup is averaged over
    symmetry: or its `Decomposition` at these shapes, which saves time when there are many calls (not with compact)

    Raises ValueError for unknown names, other shapes, entries that are not finite, and SymmetryError for groups
    without an average; see `Decomposition`.

    >>> from symgeo.groups import SignFlip
    >>> w, g = {"b": torch.tensor([1.0, 2.0])}, {"b": torch.tensor([-3.0, 8.0])}
    >>> estimate(w, g, Symmetry({"b": "h"}, {"h": SignFlip()}), "secant").dense()
    tensor([[-3.,  0.],
            [ 0.,  4.]], dtype=torch.float64)
    """
    return _Problem(params, grads, symmetry, compact, center).hessian(estimator, trivial, damping)


def precondition(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    symmetry: Symmetry | Decomposition,
    estimator: str = "gradient",
    damping: float = 0.0,
    trivial: str = "diagonal",
    compact: bool = False,
) -> Params:
    """H^-1 g with H as in `estimate`: its exact inverse at equal damping, the pseudo-inverse without.

    With compact=True the step is computed in the balanced gauge and carried back, so that it moves along with the
    parameters under every element of the non-compact groups.  Frozen parameters have a zero step.
    The step has the dtypes of the gradient.  Raises as `estimate`.

    >>> from symgeo.groups import SignFlip
    >>> w, g = {"b": torch.tensor([1.0, 2.0])}, {"b": torch.tensor([-3.0, 8.0])}
    >>> precondition(w, g, Symmetry({"b": "h"}, {"h": SignFlip()}))
    {'b': tensor([-1.,  1.])}
    """
    problem = _Problem(params, grads, symmetry, compact, None)
    step = problem.hessian(estimator, trivial, damping, inverse=True) @ problem.grads
    step = problem.back(step)
    return {name: step[name].to(g.dtype) for name, g in grads.items()}


class _Problem:
    """Parameters and gradient in double precision, in the balanced gauge if asked for."""

    def __init__(
        self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], symmetry: Symmetry | Decomposition,
        compact: bool, center: Mapping[str, Tensor] | None,
    ) -> None:
        if compact and isinstance(symmetry, Decomposition):
            raise ValueError("compact=True needs the Symmetry itself, whose gauge depends on the parameters")
        self.decomposition = decompose(symmetry, params, compact)
        self.action: Action | None = None
        self.params, self.grads = self._wide(params, "params"), self._wide(grads, "grads")
        self.center = None if center is None else self._wide(center, "center")
        if isinstance(symmetry, Symmetry) and compact:
            self.action = symmetry.bind(params)
            self.params, self.element = balance(symmetry, self.params)
            self.grads = self._moved(dual(self.action, self.element), self.grads)
            if self.center is not None:
                self.center = self._moved(self.element, self.center)

    def hessian(self, estimator: str, trivial: str, damping: float, inverse: bool = False) -> InvariantOperator:
        """The operator of an estimator, or its inverse."""
        for what, value, known in (("estimator", estimator, ESTIMATORS), ("trivial", trivial, TRIVIAL)):
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}; got {value!r}")
        decomposition = self.decomposition
        x = coordinates(decomposition, self.grads, "grads")
        at = decomposition.trivial
        block = None if at is None else trivial_block(trivial, x[at].flatten())
        moments = Moments(outer(decomposition, x, trivial=block), drop=trivial == "drop")
        if estimator != "gradient":
            center = self.center or {}
            moved = {name: w - center[name] if name in center else w for name, w in self.params.items()}
            y = coordinates(decomposition, moved, "params")
            moments = replace(moments, weight=outer(decomposition, y), mixed=outer(decomposition, x, y))
        return hessian(estimator, moments, damping, inverse)

    def back(self, step: Params) -> Params:
        """A step in the gauge of the parameters that were given."""
        return step if self.action is None else self._moved(self.action.inverse(self.element), step)

    def _wide(self, tensors: Mapping[str, Tensor], what: str) -> Params:
        self.decomposition.check(tensors, what)
        return {name: widen(x.detach()) for name, x in tensors.items()}

    def _moved(self, g: Element, tensors: Params) -> Params:
        """Tensors moved by an element; frozen ones that are not among them stay out."""
        assert self.action is not None
        whole = {name: tensors[name] if name in tensors else torch.zeros_like(x) for name, x in self.params.items()}
        moved = self.action.act(g, whole)
        return {name: moved[name] for name in tensors}
