"""Completions of orthonormal columns, and vectors without their zeros."""

from __future__ import annotations

import pytest
import torch
from hessian_cases import error, generator, normal
from torch import Tensor

from symgeo.hessian.horizontal import Completion, Kept


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rows", [3, 5, 11])
def test_a_completion_is_unitary_and_starts_with_its_columns(rows: int, kind: torch.dtype) -> None:
    """Also of a square matrix, and of unit vectors, where a reflection is the identity."""
    eye = torch.eye(rows, dtype=kind)
    random = torch.linalg.qr(torch.randn(2, rows, 3, dtype=kind, generator=generator())).Q
    for q in (random, eye[:, :3].expand(2, -1, -1)):
        completion = Completion.of(q)
        full = completion.apply(eye.expand(1, 2, rows, rows), adjoint=False)
        assert error(full.mH @ full, eye.expand_as(full)) <= 1e-13
        assert error(completion.apply(full, adjoint=True), eye.expand_as(full)) <= 1e-13
        z = torch.randn(4, 2, rows, 7, dtype=kind, generator=generator(1))
        a, rest = completion.split(z)
        assert error(a, q.mH @ z) <= 1e-13 and rest.shape == (4, 2, rows - 3, 7)
        assert error(completion.join(a, rest), z) <= 1e-13


def scattered() -> Tensor:
    """More runs of zeros than are copied one by one."""
    return torch.arange(10_001, dtype=torch.float64) % 2


@pytest.mark.parametrize("vector", [
    torch.tensor([0.0, 0, 1, 2, 0, 3, 0]), torch.tensor([1.0, 0, 0, -2]), torch.zeros(3), torch.zeros(0), scattered(),
], ids=["blocks", "ends", "zeros", "empty", "scattered"])
def test_entries_that_are_not_zero_are_taken_and_put_back(vector: Tensor) -> None:
    kept, rows, mask = Kept(vector), normal(3, vector.numel()), vector != 0
    taken = torch.cat([rows[:, :0], *kept.take(rows)], dim=1)
    assert kept.size == int(mask.sum())
    assert torch.equal(taken, rows[:, mask])
    assert torch.equal(kept.put(taken), torch.where(mask, rows, 0.0))
