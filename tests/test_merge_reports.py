"""What the report of a merge says."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import scipy.linalg
import torch
from torch import Tensor
from updates import (
    METHODS,
    RANK,
    SPREAD,
    WEIGHTS,
    M,
    N,
    balanced,
    random,
    regauged,
    related,
    unrelated,
)

from symgeo.merge.factors import merge_factors

REPORTED = {
    "method", "rank", "converged", "iterations", "objective", "gradient_norm", "retained_energy", "spectral_gap",
    "principal_angles", "gauge_condition", "overlap", "warnings", "fallback",
}  # fmt: skip


# ---- the report


@pytest.mark.parametrize("method", METHODS)
def test_the_report_is_complete_and_plain(method):
    for pairs in (related(SPREAD), unrelated(2, 5, 3), related(SPREAD)[:1]):
        report = merge_factors(pairs, None, method).report
        assert set(report) == REPORTED
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        assert type(report["converged"]) is bool and type(report["iterations"]) is int


def test_diagnostics_against_dense_computations():
    pairs = related(0.4)
    deltas = [b @ a for b, a in pairs]
    report = merge_factors(regauged(pairs, 1), WEIGHTS, "tsvd").report
    couples = list(itertools.combinations(deltas, 2))
    cosines = [abs(float((x * y).sum() / (x.norm() * y.norm()))) for x, y in couples]
    assert report["overlap"] == pytest.approx(max(cosines), rel=1e-10)

    def angles(turn) -> list[float]:
        found = [scipy.linalg.subspace_angles(*(scipy.linalg.orth(turn(x).numpy(), 1e-9) for x in c)) for c in couples]
        return [math.degrees(min(f.min() for f in found)), math.degrees(max(f.max() for f in found))]

    assert report["principal_angles"]["columns"] == pytest.approx(angles(lambda x: x), rel=1e-6)
    assert report["principal_angles"]["rows"] == pytest.approx(angles(lambda x: x.mT), rel=1e-6)


def test_principal_angles_of_different_ranks_and_of_deficient_adapters():
    b, a = unrelated(RANK)[0]
    inside = (b[:, :1].expand(M, 2), random(8, 2, N))  # rank 1, in the column space of the first
    angles = merge_factors([(b, a), inside], None).report["principal_angles"]
    assert angles["columns"] == pytest.approx([0.0, 0.0], abs=1e-5) and angles["rows"][0] > 1
    assert merge_factors([(b, a)], None).report["principal_angles"] is None
    assert merge_factors([(b, a), (0 * b, a)], None).report["overlap"] is None


def test_gauge_condition():
    pairs = [(b, a) for b, a in (_balanced_pair(i) for i in range(3))]
    assert merge_factors(pairs, None).report["gauge_condition"] == pytest.approx(1.0, rel=1e-9)
    moved = regauged(pairs, 3, condition=37.0)
    assert merge_factors([pairs[0], moved[1], pairs[2]], None).report["gauge_condition"] == pytest.approx(37.0)
    assert merge_factors([(0 * pairs[0][0], pairs[0][1])], None).report["gauge_condition"] is None


def _balanced_pair(seed: int) -> tuple[Tensor, Tensor]:
    z = balanced(random(seed, M, N), RANK)
    return z[:M], z[M:].mT


@pytest.mark.parametrize("method", ["tsvd", "bures", "geodesic-mix", "geodesic-inv"])
def test_tied_spectra_are_reported(method):
    u, v = torch.linalg.qr(random(0, M, 2)).Q, torch.linalg.qr(random(1, N, 2)).Q
    pairs = [(u[:, [i]], v[:, [i]].mT) for i in range(2)]  # two orthogonal tasks of equal norm
    report = merge_factors(pairs, None, method).report
    assert report["spectral_gap"] < 1e-9 and any("nearly tied" in warning for warning in report["warnings"])
    clear = merge_factors([pairs[0], (0.5 * pairs[1][0], pairs[1][1])], None, method).report
    assert clear["spectral_gap"] == pytest.approx(0.5) and not any("tied" in w for w in clear["warnings"])
