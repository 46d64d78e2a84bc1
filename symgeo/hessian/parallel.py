"""Curvature of the mean loss of several processes, each of which has data of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from symgeo.distributed import processes
from symgeo.hessian.operator import HessianOperator


def data_parallel(operator: HessianOperator, process_group: Any = None) -> HessianOperator:
    """The mean of one operator of every process: that of the mean loss, each process having its share of the data.

    Hessians (Euclidean, covariant or in any metric that does not depend on the data), Gauss-Newton and Fisher
    matrices are linear in the loss, connection terms included, so that means of products are products of the mean.
    Every process makes its operator from its own batches, at the same parameters, and all of them take the same
    products in the same order; functionals (eigenvalues, traces, ...) do so where they have the same arguments.
    Vectors are replicas.  What one process raises in a product all raise.

    With one process it is the operator itself.

    >>> import torch
    >>> from symgeo.hessian import euclidean_hessian
    >>> operator = euclidean_hessian(lambda p, b: (p["w"] ** 2).sum() * b, {"w": torch.ones(2)}, [3.0])
    >>> data_parallel(operator).dense().tolist()
    [[6.0, 0.0], [0.0, 6.0]]
    """
    team = processes(process_group)
    if team is None:
        return operator

    def product(v: Tensor) -> Tensor:
        with team.together():
            mine = operator.product(v)
        return team.mean_(mine.contiguous())

    return HessianOperator(product, operator.space, f"{operator.name} over {team.size} processes", operator.chunk)
