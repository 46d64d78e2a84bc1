"""The named competitors: cat, linear, ties, dare, core, knots, tsv, iso."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from symgeo.merge.batch import merge_batch
from symgeo.merge.elementwise import elect
from symgeo.merge.factors import merge_factors

ROWS, COLUMNS, RANKS = 19, 23, (3, 5, 2)
WEIGHTS = (0.7, -0.4, 0.5)
INVARIANT = ("cat", "ties", "dare", "core", "knots", "tsv", "iso")
ELEMENTWISE = ("ties", "dare", "core", "knots")
Pairs = list[tuple[Tensor, Tensor]]


def adapters(seed: int = 0, ranks: tuple[int, ...] = RANKS, rows: int = ROWS, columns: int = COLUMNS) -> Pairs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return [(draw(rows, r), draw(r, columns)) for r in ranks]


def regauged(pairs: Pairs, seed: int) -> Pairs:
    """Other factors of the same deltas: ``(B G^-1, G A)`` with independent random ``G`` of condition number 10."""
    generator, result = torch.Generator().manual_seed(seed), []
    for b, a in pairs:
        r = b.shape[1]
        u, _, vh = torch.linalg.svd(torch.randn(r, r, dtype=torch.float64, generator=generator))
        gauge = (u * torch.logspace(0, 1, r, dtype=torch.float64)) @ vh
        result.append((b @ torch.linalg.inv(gauge), gauge @ a))
    return result


def delta(pairs: Pairs, method: str, weights: tuple[float, ...] | None = WEIGHTS, **options) -> Tensor:
    merged = merge_factors(pairs, weights, method, **options)
    return merged.B @ merged.A


def change(x: Tensor, y: Tensor) -> float:
    assert bool(torch.isfinite(x).all() and torch.isfinite(y).all())
    return float((x - y).norm() / y.norm())


# invariance


@pytest.mark.parametrize("rank", [2, "max", "sum"])
@pytest.mark.parametrize("method", INVARIANT)
def test_the_gauge_of_the_factors_does_not_matter(method, rank):
    pairs = adapters()
    other = regauged(pairs, 1)
    assert change(other[0][0], pairs[0][0]) > 0.1
    assert change(delta(other, method, rank=rank, seed=5), delta(pairs, method, rank=rank, seed=5)) <= 1e-9


def test_linear_depends_on_the_gauge():
    pairs = adapters(ranks=(3, 3, 3))
    assert change(delta(regauged(pairs, 1), "linear"), delta(pairs, "linear")) > 0.1


def test_ties_in_the_basis_of_the_stored_factors_depends_on_the_gauge():
    """The published Core Space recipe: the reason for balancing first."""

    def naive(pairs: Pairs) -> Tensor:
        left = torch.linalg.svd(torch.cat([b for b, _ in pairs], 1), full_matrices=False).U
        right = torch.linalg.svd(torch.cat([a for _, a in pairs], 0), full_matrices=False).Vh
        cores = torch.stack([left.T @ b @ a @ right.T for b, a in pairs])
        return left @ elect(cores[None], WEIGHTS, 0.2, torch.tensor([cores[0].numel()]))[0] @ right

    pairs = adapters()
    assert change(naive(regauged(pairs, 1)), naive(pairs)) > 0.1


@pytest.mark.parametrize("method", [*(m for m in INVARIANT if m != "dare"), "linear"])
def test_the_order_does_not_matter(method):
    pairs = adapters(ranks=(3, 3, 3) if method == "linear" else RANKS)
    order = (2, 0, 1)
    permuted = delta([pairs[i] for i in order], method, tuple(WEIGHTS[i] for i in order), rank=4)
    assert change(permuted, delta(pairs, method, rank=4)) <= 1e-10


@pytest.mark.parametrize("method", ["cat", "ties", "core", "knots", "iso", "tsv"])
def test_a_delta_written_with_more_columns_is_the_same_delta(method):
    pairs = adapters()
    spread = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    b, a = pairs[0]
    wide = [(b @ spread, torch.linalg.pinv(spread) @ a), *pairs[1:]]
    assert change(delta(wide, method, rank="sum"), delta(pairs, method, rank="sum")) <= 1e-9


# dense oracles


def dense(pairs: Pairs) -> list[np.ndarray]:
    return [(b @ a).numpy() for b, a in pairs]


def truncated(x: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(x)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def dense_ties(tasks: list[np.ndarray], weights: tuple[float, ...], density: float) -> np.ndarray:
    """Entry by entry, as the three steps are told."""
    keep = int(density * tasks[0].size)
    trimmed = []
    for task in tasks:
        largest = np.argsort(-np.abs(task), axis=None)[:keep]
        flat = np.zeros(task.size)
        flat[largest] = task.flat[largest]
        trimmed.append(flat.reshape(task.shape))
    result = np.zeros_like(tasks[0])
    for index in np.ndindex(result.shape):
        entries = [w * task[index] for w, task in zip(weights, trimmed)]
        sign = np.sign(sum(entries))
        agreeing = [x for x in entries if x != 0 and np.sign(x) == sign]
        result[index] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def dense_bases(deltas: list[np.ndarray], power: float) -> tuple[np.ndarray, np.ndarray]:
    def eigenvectors(symmetric: list[np.ndarray]) -> np.ndarray:
        total = np.zeros_like(symmetric[0])
        for x in symmetric:
            values, vectors = np.linalg.eigh(x)
            values = np.where(values > 1e-9 * values.max(), values, 0.0)
            total += (vectors * values**power) @ vectors.T
        return np.linalg.eigh(total)[1][:, ::-1][:, : sum(RANKS)]

    return eigenvectors([d @ d.T for d in deltas]), eigenvectors([d.T @ d for d in deltas])


def dense_elementwise(pairs: Pairs, power: float, density: float) -> np.ndarray:
    left, right = dense_bases(dense(pairs), power)
    return left @ dense_ties([left.T @ d @ right for d in dense(pairs)], WEIGHTS, density) @ right.T


def dense_dare(pairs: Pairs, density: float, seed: int) -> np.ndarray:
    left, right = dense_bases(dense(pairs), 1.0)
    shape = (len(pairs), left.shape[1], right.shape[1])
    masks = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).numpy()
    parts = [w * mask * (left.T @ d @ right) for w, mask, d in zip(WEIGHTS, masks, dense(pairs))]
    return left @ sum(parts) @ right.T / density


def dense_knots(pairs: Pairs, density: float) -> np.ndarray:
    u, s, vh = np.linalg.svd(np.hstack(dense(pairs)), full_matrices=False)
    support = s > 1e-9 * s[0]
    parts = [block[support] for block in np.split(vh, len(pairs), axis=1)]
    return (u[:, support] * s[support]) @ dense_ties(parts, WEIGHTS, density)


def dense_tsv(pairs: Pairs, rank: int) -> np.ndarray:
    parts = []
    for weight, d, r in zip(WEIGHTS, dense(pairs), RANKS):
        u, s, vh = np.linalg.svd(d)
        share = -(-rank * r // sum(RANKS))
        parts.append((u[:, :share], weight * s[:share], vh[:share]))
    left = scipy.linalg.polar(np.hstack([u for u, _, _ in parts]))[0]
    right = scipy.linalg.polar(np.vstack([vh for _, _, vh in parts]).T)[0]
    return (left * np.concatenate([s for _, s, _ in parts])) @ right.T


def dense_iso(pairs: Pairs, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(sum(w * d for w, d in zip(WEIGHTS, dense(pairs))))
    return s[:rank].mean() * u[:, :rank] @ vh[:rank]


ORACLES = {
    "cat": lambda pairs, rank: sum(w * d for w, d in zip(WEIGHTS, dense(pairs))),
    "ties": lambda pairs, rank: truncated(dense_elementwise(pairs, 1.0, 0.2), rank),
    "core": lambda pairs, rank: truncated(dense_elementwise(pairs, 0.5, 0.2), rank),
    "dare": lambda pairs, rank: truncated(dense_dare(pairs, 0.5, 7), rank),
    "knots": lambda pairs, rank: truncated(dense_knots(pairs, 0.2), rank),
    "tsv": lambda pairs, rank: truncated(dense_tsv(pairs, rank), rank),
    "iso": dense_iso,
}


@pytest.mark.parametrize("rank", [2, 5, 10])
@pytest.mark.parametrize("method", list(ORACLES))
def test_against_a_dense_implementation(method, rank):
    pairs = adapters(3)
    expected = torch.from_numpy(ORACLES[method](pairs, rank))
    assert change(delta(regauged(pairs, 4), method, rank=rank, seed=7), expected) <= 1e-9


@pytest.mark.parametrize("method, oracle", [("ties", 1.0), ("core", 0.5)])
def test_density_is_the_users(method, oracle):
    pairs = adapters(3)
    expected = torch.from_numpy(dense_elementwise(pairs, oracle, 0.6))
    assert change(delta(pairs, method, rank="sum", density=0.6), expected) <= 1e-9
    assert change(delta(pairs, method, rank="sum"), expected) > 1e-3


@pytest.mark.parametrize("density", [0, 1.5, -0.1, True, "half", float("nan")])
def test_wrong_densities(density):
    with pytest.raises(ValueError, match=r"density must be a number in \(0, 1\]"):
        merge_factors(adapters(), method="ties", density=density)


# the sums


def test_cat_is_the_weighted_sum():
    pairs = adapters()
    expected = sum(w * (b @ a) for w, (b, a) in zip(WEIGHTS, pairs))
    merged = merge_factors(pairs, WEIGHTS, "cat", rank=1)
    assert change(merged.B @ merged.A, expected) <= 1e-12
    assert merged.B.shape == (ROWS, sum(RANKS)) and merged.report["rank"] == sum(RANKS)


@pytest.mark.parametrize("method", ["cat", "ties", "core", "knots", "iso"])
def test_an_adapter_minus_itself_is_nothing(method):
    pair = adapters(ranks=(3,))
    both = [*pair, *regauged(pair, 1)]
    assert float(delta(both, method, (1.0, -1.0), rank="sum").norm()) <= 1e-11 * float((pair[0][0] @ pair[0][1]).norm())


@pytest.mark.parametrize("method", INVARIANT)
def test_a_negative_weight_is_the_negated_adapter(method):
    pairs = adapters()
    negated = [pairs[0], (-pairs[1][0], pairs[1][1]), pairs[2]]
    assert change(delta(negated, method, (0.7, 0.4, 0.5)), delta(pairs, method)) <= 1e-10


def test_linear_has_cross_terms_and_needs_equal_ranks():
    pair = adapters(ranks=(3,))
    b, a = pair[0]
    assert change(delta([*pair, *pair], "linear", (0.5, 0.5)), 2 * b @ a) <= 1e-12
    with pytest.raises(ValueError, match=r"needs adapters of one rank; got ranks \[3, 5, 2\]"):
        merge_factors(adapters(), method="linear")


@pytest.mark.parametrize("method", [*INVARIANT, "linear"])
def test_zero_adapters_are_harmless(method):
    pairs = adapters(ranks=(3, 3, 3) if method == "linear" else RANKS)
    zero = (torch.zeros(ROWS, 3, dtype=torch.float64), pairs[0][1][:3])
    assert bool(torch.isfinite(delta([*pairs, zero], method, (*WEIGHTS, 0.3), rank="sum")).all())
    assert float(delta([zero, zero], method, (0.5, 0.5)).norm()) == 0.0
    if method not in ("dare", "linear"):  # their draws, and their cross terms
        with_zero = delta([*pairs, zero], method, (*WEIGHTS, 0.3), rank="sum")
        assert change(with_zero, delta(pairs, method, rank="sum")) <= 1e-10


# the rule of TIES


def test_the_election_commutes_with_signs_and_permutations_of_rows_and_columns():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, generator=generator)
    rows, columns = (torch.randn(n, dtype=torch.float64, generator=generator).sign() for n in (7, 5))
    size, order = torch.tensor([35, 20]), torch.randperm(7, generator=generator)
    plain = elect(x, WEIGHTS, 0.4, size)
    flipped = elect((rows[:, None] * x * columns)[..., order, :], WEIGHTS, 0.4, size)
    assert torch.equal(flipped, (rows[:, None] * plain * columns)[..., order, :])


def test_a_draw_gives_zero_and_a_majority_its_mean():
    x = torch.tensor([[[3.0, -1.0]], [[-3.0, 2.0]], [[0.0, 4.0]]], dtype=torch.float64)[None]
    assert elect(x, [1.0, 1.0, 1.0], 1.0, torch.tensor([2])).tolist() == [[[0.0, 3.0]]]
    assert elect(x, [1.0, 0.5, 1.0], 1.0, torch.tensor([2])).tolist() == [[[3.0, 2.5]]]


def test_rounding_noise_has_no_vote():
    x = torch.tensor([[[5.0, 1e-17]], [[2e-16, 2.0]]], dtype=torch.float64)[None]
    assert elect(x, [1.0, 1.0], 1.0, torch.tensor([2])).tolist() == [[[5.0, 2.0]]]


@pytest.mark.parametrize("method", ["ties", "core", "knots", "dare"])
def test_one_adapter_at_full_density_is_itself(method):
    pair = adapters(ranks=(5,))
    assert change(delta(pair, method, (1.0,), density=1.0), pair[0][0] @ pair[0][1]) <= 1e-12


# DARE


def test_dare_is_drawn_from_the_seed():
    pairs = adapters()
    assert torch.equal(delta(pairs, "dare", seed=3), delta(pairs, "dare", seed=3))
    assert change(delta(pairs, "dare", seed=4), delta(pairs, "dare", seed=3)) > 1e-3


def test_dare_is_unbiased():
    pairs = adapters(ranks=(2, 3), rows=7, columns=5)
    seeds = range(2000)
    batch = [(b.expand(len(seeds), -1, -1), a.expand(len(seeds), -1, -1)) for b, a in pairs]
    merged = merge_batch(batch, (0.6, -0.5), "dare", rank="sum", seeds=seeds, density=0.3)
    draws = merged.B @ merged.A
    expected = delta(pairs, "cat", (0.6, -0.5))
    error = draws.mean(0) - expected
    assert bool((error.abs() <= 4 * draws.std(0) / len(seeds) ** 0.5).all())
    assert change(draws[0], expected) > 0.1


# batches, reports


@pytest.mark.parametrize("method", INVARIANT)
def test_a_batch_is_its_modules(method):
    modules = [adapters(seed) for seed in range(3)]
    modules[1][0] = (modules[1][0][0] * torch.tensor([1.0, 1.0, 0.0]), modules[1][0][1])  # one of rank 2
    modules[2][2] = (torch.zeros(ROWS, 2, dtype=torch.float64), modules[2][2][1])
    stacked = [tuple(torch.stack([module[i][side] for module in modules]) for side in (0, 1)) for i in range(3)]
    merged = merge_batch(stacked, WEIGHTS, method, rank=4, seeds=(11, 12, 13))
    for i, module in enumerate(modules):
        alone = delta(module, method, rank=4, seed=11 + i)
        assert change(merged.B[i] @ merged.A[i], alone) <= 1e-11


def orthogonal_pair(sizes: tuple[float, float]) -> Pairs:
    """Two adapters of rank one with orthogonal columns and rows."""
    eye = torch.eye(23, dtype=torch.float64)
    return [(size * eye[:ROWS, [i]], eye[[i]]) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_equal_singular_values_are_reported(method):
    tied = merge_factors(orthogonal_pair((1.0, 1.0)), method=method, rank="sum").report["warnings"]
    told_apart = merge_factors(orthogonal_pair((1.0, 1.1)), method=method, rank="sum").report["warnings"]
    assert any("equal singular values" in x for x in tied)
    assert not any("equal singular values" in x for x in told_apart)


def test_parallel_singular_vectors_are_reported_and_finite():
    pair = adapters(ranks=(3,))
    merged = merge_factors([*pair, *regauged(pair, 1)], (1.0, 1.0), "tsv", rank="sum")
    assert any("parallel" in x for x in merged.report["warnings"])
    assert change(merged.B @ merged.A, pair[0][0] @ pair[0][1]) <= 1e-10
    assert not any("parallel" in x for x in merge_factors(adapters(), method="tsv").report["warnings"])


def test_iso_has_one_singular_value_of_the_same_sum():
    merged = merge_factors(adapters(), WEIGHTS, "iso", rank=4)
    found = torch.linalg.svdvals(merged.B @ merged.A)[:4]
    expected = torch.linalg.svdvals(delta(adapters(), "tsvd", rank=4))[:4]
    assert float(found[0] - found[3]) <= 1e-12 and abs(float(found.sum() - expected.sum())) <= 1e-12


# PEFT


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -0.7)])
@pytest.mark.parametrize("method, theirs", [("linear", "linear"), ("cat", "cat"), ("tsvd", "svd")])
def test_parity_with_peft(method, theirs, weights):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(23, 19, bias=False))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    model.add_weighted_adapter(["one", "two"], list(weights), "merged", combination_type=theirs)
    layer = model.base_model.model[0]
    root = (6 / 4) ** 0.5  # the scaling, half of it in each factor
    pairs = [(root * layer.lora_B[x].weight.detach(), root * layer.lora_A[x].weight.detach()) for x in ("one", "two")]
    assert change(delta(pairs, method, weights), layer.get_delta_weight("merged").detach()) <= 1e-5
