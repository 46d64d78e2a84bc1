"""Merging one weight: invariance, closed forms, batches, dtypes and errors."""

from __future__ import annotations

import itertools
import json
import math
import time

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from updates import (
    GEODESIC,
    METHODS,
    RANK,
    SPREAD,
    WEIGHTS,
    M,
    N,
    change,
    commuting,
    delta,
    product,
    random,
    regauged,
    related,
    toy,
    unrelated,
)

from symgeo.merge.batch import merge_batch
from symgeo.merge.factors import merge_factors

# ---- invariance


@pytest.mark.parametrize("method, rank", [*itertools.product(("tsvd", "bures"), ("max", "sum", 2)),
                                          *itertools.product(GEODESIC, ("max",))])  # fmt: skip
def test_the_gauge_of_the_factors_does_not_matter(method, rank):
    pairs = related(SPREAD)
    other = regauged(pairs, 5)
    assert change(other[0][0], pairs[0][0]) > 0.1
    merged = merge_factors(pairs, WEIGHTS, method, rank)
    assert merged.report["converged"] and merged.report["fallback"] is None
    assert change(delta(other, method, rank=rank), product(merged)) <= 1e-9
    changed = [(0.9 * pairs[0][0], pairs[0][1]), *pairs[1:]]  # the negative controls
    assert change(delta(changed, method, rank=rank), product(merged)) > 1e-3
    assert change(delta(other, "linear"), delta(pairs, "linear")) > 0.1


@pytest.mark.parametrize("rank", ["max", "sum", 4])
@pytest.mark.parametrize("method", ["tsvd", "bures"])
def test_gauge_of_unrelated_adapters_of_different_ranks(method, rank):
    pairs = unrelated(2, 5, 3)
    assert change(delta(regauged(pairs, 5), method, rank=rank), delta(pairs, method, rank=rank)) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_splitting_a_scale_between_the_factors_changes_nothing(method):
    pairs = related(SPREAD)
    moved = [(7.0 * b, a / 7.0) for b, a in pairs]
    assert change(delta(moved, method), delta(pairs, method)) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_in_several_gauges_is_itself(method):
    pair = unrelated(RANK)[0]
    copies = regauged([pair] * 3, 7)
    assert change(delta(copies, method), pair[0] @ pair[1]) <= 1e-10
    assert change(delta([pair], method, None), pair[0] @ pair[1]) <= 1e-10
    if method in ("tsvd", "bures"):
        assert change(delta(copies, method, rank="sum"), pair[0] @ pair[1]) <= 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_the_order_does_not_matter(method):
    pairs, expected = related(SPREAD), delta(related(SPREAD), method)
    order = (2, 0, 1)
    found = delta([pairs[i] for i in order], method, tuple(WEIGHTS[i] for i in order))
    assert change(found, expected) <= 1e-10
    assert change(delta([pairs[i] for i in order], method), expected) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_weights(method):
    pairs = related(SPREAD)
    for i, (b, a) in enumerate(pairs):
        assert change(delta(pairs, method, tuple(float(j == i) for j in range(3))), b @ a) <= 1e-10
    equal = delta(pairs, method, None)
    assert change(delta(pairs, method, (1 / 3,) * 3), equal) <= 1e-12
    twice = delta(pairs, method, tuple(2 * w for w in WEIGHTS))
    factor = 2.0 if method == "tsvd" else 1.0  # the means normalise, a sum does not
    assert change(twice, factor * delta(pairs, method)) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_scale_and_negation(method):
    pairs = related(SPREAD)
    expected = delta(pairs, method)
    assert change(delta([(-b, a) for b, a in pairs], method), -expected) <= 1e-10
    merged = merge_factors(pairs, WEIGHTS, method, scale=-2.5)
    assert change(product(merged), -2.5 * expected) <= 1e-12
    assert change(merged.B.mT @ merged.B, merged.A @ merged.A.mT) <= 1e-12
    assert float(delta(pairs, method, scale=0).norm()) == 0.0


def test_a_sum_takes_weights_of_any_sign():
    pairs, w = unrelated(2, 5, 3), (0.7, -1.9, 0.4)
    exact = sum(wi * b @ a for wi, (b, a) in zip(w, pairs))
    assert change(delta(pairs, "tsvd", w, rank="sum"), exact) <= 1e-12


# ---- closed forms


def test_tsvd_is_the_best_approximation_of_its_rank():
    pairs = unrelated(2, 5, 3)
    mean = sum(w * b @ a for w, (b, a) in zip(WEIGHTS, pairs))
    s = torch.linalg.svdvals(mean)
    for rank in range(1, 11):
        merged = merge_factors(pairs, WEIGHTS, "tsvd", rank)
        best = float(s[rank:].square().sum().sqrt())
        assert abs(float((mean - product(merged)).norm()) - best) <= 1e-8 * float(mean.norm())
        assert merged.B.shape == (M, rank) and merged.A.shape == (rank, N)
        kept = float(s[:rank].square().sum() / s.square().sum())
        assert merged.report["retained_energy"] == pytest.approx(kept, rel=1e-12)
        gap = 1 - float(s[rank] / s[rank - 1]) if rank < 10 else 1.0
        assert merged.report["spectral_gap"] == pytest.approx(gap, abs=1e-10)


@pytest.mark.parametrize("method, tolerance", list(zip(METHODS, (1e-12, 1e-12, 1e-6, 1e-6))))
def test_commuting_adapters(method, tolerance):
    values = torch.tensor([[5.0, 3.0, 1.2], [4.0, 2.0, 0.7], [6.5, 2.5, 1.0]], dtype=torch.float64)
    pairs, u, v = commuting(values)
    w = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = {
        "tsvd": w @ values, "geodesic-mix": w @ values, "bures": (w @ values.sqrt()) ** 2,
        "geodesic-inv": torch.exp(w @ values.log()),
    }[method]  # fmt: skip
    assert change(delta(pairs, method), (u * expected) @ v.mT) <= tolerance


@pytest.mark.parametrize("method, expected", list(zip(METHODS, (4.0, 2 + math.sqrt(3), 4.0, math.sqrt(12)))))
def test_toy(method, expected):
    assert float(delta(toy((2.0, 3.0), (0.5, 4.0)), method, None)) == pytest.approx(expected, rel=1e-9)


def test_a_zero_adapter():
    b, a = unrelated(RANK)[0]
    pairs = [(b, a), (torch.zeros(M, RANK, dtype=torch.float64), random(9, RANK, N))]
    for method, factor in (("tsvd", 0.5), ("bures", 0.25)):
        merged = merge_factors(pairs, None, method)
        assert change(product(merged), factor * b @ a) <= 1e-12
        assert any("adapter 1 is zero" in warning for warning in merged.report["warnings"])
    for method in GEODESIC:
        merged = merge_factors(pairs, None, method)
        assert merged.report["fallback"]["method"] == "tsvd"
        assert "adapter 1 has rank 0 instead of 3" in merged.report["fallback"]["reason"]
        assert change(product(merged), 0.5 * b @ a) <= 1e-12
    nothing = [(0 * b, a) for b, a in pairs]
    for method in METHODS:
        merged = merge_factors(nothing, None, method)
        assert float(product(merged).abs().max()) == 0.0
        json.dumps(merged.report, allow_nan=False)


# ---- batches


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_modules_one_by_one(method):
    """Also where one module has no geodesic mean: the others do not notice."""
    modules = [related(SPREAD, seed=1), related(SPREAD, seed=2), related(SPREAD, seed=3)]
    modules[1][2] = (0 * modules[1][2][0], modules[1][2][1])
    stacked = [(torch.stack([m[i][0] for m in modules]), torch.stack([m[i][1] for m in modules])) for i in range(3)]
    batch = merge_batch(stacked, WEIGHTS, method, seeds=[0, 0, 0])
    for i, pairs in enumerate(modules):
        one = merge_factors(pairs, WEIGHTS, method)
        assert change(batch.B[i] @ batch.A[i], product(one)) <= 1e-10
        for key in ("converged", "fallback", "warnings", "rank", "method"):
            assert batch.reports[i][key] == one.report[key]
        if method == "bures":
            assert batch.reports[i]["iterations"] == one.report["iterations"]
    if method in GEODESIC:
        assert [report["fallback"] is None for report in batch.reports] == [True, False, True]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("method", ["tsvd", "bures"])
def test_cost_of_a_large_weight(method):
    """Nothing larger than the stacked factors: 16384 x 32 numbers instead of 16384 x 16384."""
    size, rank = 16384, 8
    pairs = [(b.float(), a.float()) for b, a in unrelated(*(rank,) * 4, m=size, n=size)]
    started = time.perf_counter()
    with LargestTensor() as largest:
        merged = merge_factors(pairs, None, method)
    assert time.perf_counter() - started < 10
    assert merged.B.shape == (size, rank) and merged.B.dtype == torch.float32
    assert largest.elements <= 4 * rank * size


# ---- dtypes and errors


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16"),
        ("float16", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float16", "float64", "float64"),
    ],
)
def test_dtypes(first, second, expected):
    pairs = related(SPREAD, count=2)
    given = [tuple(x.to(getattr(torch, name)) for x in pair) for pair, name in zip(pairs, (first, second))]
    merged = merge_factors(given, None, "bures")
    assert merged.B.dtype == merged.A.dtype == getattr(torch, expected)
    exact = delta([(b.double(), a.double()) for b, a in given], "bures", None)
    tolerance = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-6, "float64": 1e-12}[expected]
    assert change(product(merged).double(), exact) <= tolerance


def test_no_gradient_and_no_change_of_the_inputs():
    pairs = [(b.requires_grad_(), a.requires_grad_()) for b, a in related(SPREAD)]
    before = [x.detach().clone() for pair in pairs for x in pair]
    for method in METHODS:
        merged = merge_factors(pairs, None, method)
        assert not merged.B.requires_grad and not merged.A.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(before, (x for pair in pairs for x in pair)))


def test_results_are_reproducible():
    for method in METHODS:
        first, second = (merge_factors(related(SPREAD), WEIGHTS, method) for _ in range(2))
        assert torch.equal(first.B, second.B) and torch.equal(first.A, second.A) and first.report == second.report


B, A = torch.ones(5, 2), torch.ones(2, 7)
BAD = torch.tensor([[float("nan"), 1.0]]).expand(5, 2)


@pytest.mark.parametrize(
    "factors, message",
    [
        ([], "at least one pair"),
        ([B], r"factors\[0\]: needed a pair"),
        ([(B, A), (B, A, A)], r"factors\[1\]: needed a pair"),
        ([(B, [1.0])], r"factors\[0\]: needed a pair"),
        ([(B[None], A[None])], "2 dimensions"),
        ([(B[0], A)], "2 dimensions"),
        ([(B, A.mT)], "must agree in number"),
        ([(B, A), (B[:4], A)], r"factors\[1\].*must update one weight"),
        ([(B, A), (B, A[:, :6])], r"factors\[1\].*must update one weight"),
        ([(B[:, :0], A[:0])], "may be empty"),
        ([(B.long(), A)], "B must be float64.*int64"),
        ([(B, A + 0j)], "A must be float64.*complex64"),
        ([(B, A), (BAD, A)], r"factors\[1\]: B has entries that are NaN"),
        ([(B, A / 0)], r"factors\[0\]: A has entries that are NaN"),
        ([(B, A), (B, A.to("meta"))], "A is on meta"),
    ],
)
def test_wrong_factors(factors, message):
    with pytest.raises(ValueError, match=message) as caught:
        merge_factors(factors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": [1.0]}, "one number per adapter, 2; got 1"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, float("inf")]}, "finite"),
        ({"weights": [0.0, 0.0]}, "differ from zero"),
        ({"weights": ["a", 1.0]}, "sequence of numbers"),
        ({"weights": 0.5}, "sequence of numbers"),
        ({"weights": [1.0, -0.5], "method": "bures"}, "needs numbers >= 0"),
        ({"weights": [1.0, -0.5], "method": "geodesic-mix"}, "needs numbers >= 0"),
        ({"method": "mean"}, "method must be one of tsvd, bures"),
        ({"rank": 0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"rank": 2.0}, "rank must be"),
        ({"rank": "all"}, "rank must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"scale": "2"}, "scale must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        merge_factors([(B, A), (B, A)], **options)
    assert "\n" not in str(caught.value)


def test_overflow_of_half_precision_is_an_error():
    with pytest.raises(ValueError, match="overflow torch.float16"):
        merge_factors([(B.half(), A.half())], scale=1e12)


def test_extreme_sizes():
    pairs = related(SPREAD)
    for method in ("tsvd", "bures", "geodesic-inv"):
        for factor in (1e-60, 1e60):
            assert change(delta([(factor * b, a) for b, a in pairs], method) / factor, delta(pairs, method)) <= 1e-9
