"""Merging whole models: invariance, closed forms, Fisher merging, trained digits, bad inputs."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from laws import close
from mlps import gap, mlp, mlp_symmetry, normal_params, output
from networks import MODELS, params_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manifolds import BuresWasserstein, frechet_mean
from manifolds.linalg import balance
from symgeo import Symmetry, SymmetryError, find_symmetry, functional_loss
from symgeo.data import digits
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, Orthogonal, Rotary
from symgeo.merge.alignment import align
from symgeo.merge.barrier import barrier
from symgeo.merge.model_mean import quotient_mean
from symgeo.merge.models import merge_models

KINDS = ("gelu", "tanh", "relu")
LORA = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def moved(symmetry: Symmetry, models: list[Params]) -> list[Params]:
    """Every model in a random gauge of its own."""
    action = symmetry.bind(models[0])
    return [action.act(action.random(seeded(30 + i)), model) for i, model in enumerate(models)]


def logits(name: str, model: nn.Module, params: Params) -> Tensor:
    if name == "tiny_vit":
        return torch.func.functional_call(model, params, (normal(0, 5, 8, 8),))
    if name == "encoder_layer":
        return torch.func.functional_call(model, params, (normal(0, 7, 5, 12),))
    ids = torch.randint(0, 41, (3, 7), generator=seeded(0))
    return torch.func.functional_call(model, params, (), {"input_ids": ids}).logits


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# ---- copies of one network, and any network in any gauge


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(3, 17, 13, 2), (3, 13, 11, 7, 2)], ids=("two", "three"))
def test_copies_of_an_mlp_merge_into_it(kind: str, widths: tuple[int, ...]) -> None:
    model, symmetry = mlp(kind, widths), mlp_symmetry(kind, len(widths) - 2)
    params = normal_params(model, 0)
    copies = moved(symmetry, [params] * 3)
    assert difference(output(model, merge_models(copies, [1, 2, 3], symmetry)), output(model, params)) < 1e-8
    assert difference(output(model, merge_models(copies, [1, 2, 3], method="mean")), output(model, params)) > 1e-2


@pytest.mark.parametrize("name", ["tiny_vit", "encoder_layer", "gpt2"])
def test_copies_of_a_transformer_merge_into_it(name: str) -> None:
    model = MODELS[name]()
    params = params_of(model)
    symmetry = find_symmetry(model)
    copies = moved(symmetry, [params] * 2)
    base = logits(name, model, params)
    merged = merge_models(copies, symmetry=symmetry)
    assert difference(logits(name, model, merged), base) < 1e-8
    assert gap(merged, copies[0]) < 1e-8  # in the gauge of the reference
    assert difference(logits(name, model, merge_models(copies, method="mean")), base) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_every_mlp_may_have_its_own_gauge(kind: str) -> None:
    model, symmetry = mlp(kind, (3, 13, 11, 2)), mlp_symmetry(kind, 2)
    models = [normal_params(model, i) for i in range(3)]
    for reference in (0, 2):
        first, second = (
            merge_models(each, [1, 2, 3], symmetry, reference=reference)
            for each in (models, moved(symmetry, models))
        )
        assert difference(output(model, second), output(model, first)) < 1e-8
    plain = merge_models(moved(symmetry, models), [1, 2, 3], method="mean")
    assert difference(output(model, plain), output(model, first)) > 1e-2


def near(params: Params, count: int, size: float) -> list[Params]:
    return [
        {name: p + size * normal(97 * i + k, *p.shape) for k, (name, p) in enumerate(params.items())}
        for i in range(count)
    ]


@pytest.mark.parametrize("metric", ["bures", "inv", "mix"])
def test_every_transformer_may_have_its_own_gauge(metric: str) -> None:
    """GL pairs, permutations, gains, translations and compensated directions at once."""
    model = MODELS["encoder_layer"]()
    symmetry = find_symmetry(model)
    models = near(params_of(model), 2, 0.02)
    results = [merge_models(each, [1, 2], symmetry, metric=metric) for each in (models, moved(symmetry, models))]
    first, second = (logits("encoder_layer", model, p) for p in results)
    assert difference(second, first) < 1e-8
    plain = merge_models(moved(symmetry, models), [1, 2], method="mean")
    assert difference(logits("encoder_layer", model, plain), first) > 1e-2


def test_units_matched_by_activations_in_any_gauge() -> None:
    model, symmetry = mlp("relu", (3, 13, 11, 2)), mlp_symmetry("relu", 2)
    models, batches = [normal_params(model, i) for i in range(2)], [(normal(5, 41, 3), None)]
    first, second = (
        merge_models(each, symmetry=symmetry, model=model, batches=batches)
        for each in (models, moved(symmetry, models))
    )
    assert difference(output(model, second), output(model, first)) < 1e-8
    weights = merge_models(models, symmetry=symmetry)
    assert difference(output(model, first), output(model, weights)) > 1e-3  # another matching


# ---- what a mean is


def test_one_model_unit_weights_and_scale_of_weights() -> None:
    model, symmetry = mlp("tanh", (3, 13, 7, 2)), mlp_symmetry("tanh", 2)
    models = [normal_params(model, i) for i in range(2)]
    assert gap(merge_models(models[:1], symmetry=symmetry), models[0]) < 1e-12
    assert gap(merge_models([models[0]] * 3, [1, 2, 5], symmetry), models[0]) < 1e-12
    assert gap(merge_models(models, [1, 0], symmetry), models[0]) < 1e-12
    assert gap(merge_models(models, [0, 1], symmetry, reference=1), models[1]) < 1e-12
    other = merge_models(models, [0, 1], symmetry)  # in the gauge of the first
    assert difference(output(model, other), output(model, models[1])) < 1e-12
    assert gap(other, align(symmetry, models[1], models[0])[0]) < 1e-12
    assert gap(merge_models(models, [2, 1], symmetry), merge_models(models, torch.tensor([4.0, 2.0]), symmetry)) < 1e-12


def lift(p: Params) -> Tensor:
    """The balanced factors, one above the other."""
    b, a = p["B"], p["A"].mT
    found = balance(a, b)
    return torch.cat([b @ found.gauge.mT, a @ found.inverse])


@pytest.mark.parametrize("count", [2, 4])
def test_a_pair_has_its_bures_wasserstein_mean(count: int) -> None:
    """Against Karcher's iteration on the quotient manifold."""
    models = [{"B": normal(i, 11, 3), "A": normal(i + 50, 3, 7)} for i in range(count)]
    weights = [1.0 + i for i in range(count)]
    merged = merge_models(models, weights, LORA)
    points = [lift(p) for p in models]
    x = frechet_mean(BuresWasserstein(), points, weights, start=points[0], tol=1e-9, max_iter=2000).point
    close(merged["B"] @ merged["A"], x[:11] @ x[11:].mT, 1e-6)
    plain = merge_models(models, weights, method="mean")
    assert difference(plain["B"] @ plain["A"], merged["B"] @ merged["A"]) > 1e-2


@pytest.mark.parametrize("metric, expected", [("bures", 3.7320508), ("inv", 3.4641016), ("mix", 4.0)])
def test_the_two_parameter_model(metric: str, expected: float) -> None:
    """f = b a x with predictors 6 and 2: the mean of square roots, the geometric and the arithmetic mean."""
    models = [{"B": torch.tensor([[b]]).double(), "A": torch.tensor([[a]]).double()} for b, a in ((2, 3), (-0.5, -4))]
    merged = merge_models(models, symmetry=LORA, metric=metric)
    assert float(merged["B"] * merged["A"]) == pytest.approx(expected, rel=1e-7)
    assert float(merge_models(models, method="mean")["B"] * merge_models(models, method="mean")["A"]) < 0


@pytest.mark.parametrize("metric, power", [("mix", 1.0), ("bures", 0.5), ("inv", 0.0)])
def test_commuting_pairs_have_power_means_of_singular_values(metric: str, power: float) -> None:
    u, v = torch.linalg.qr(normal(0, 11, 3)).Q, torch.linalg.qr(normal(1, 7, 3)).Q
    s, w = torch.tensor([[3.0, 1.0, 0.5], [2.0, 1.5, 0.4]]).double(), torch.tensor([0.25, 0.75]).double()
    models = [{"B": u * x, "A": v.mT} for x in s]
    merged = merge_models(models, w, LORA, metric=metric)
    mean = (w @ s**power) ** (1 / power) if power else torch.exp(w @ s.log())
    close(merged["B"] @ merged["A"], (u * mean) @ v.mT, 1e-7)


def test_rotary_pairs_average_modulus_and_phase() -> None:
    symmetry = Symmetry({"q": "e* _", "k": "e _"}, {"e": Rotary()})
    target = {"q": normal(0, 4, 3), "k": normal(1, 4, 5)}
    (first, second), factor = moved(symmetry, [target, target]), 4.0
    scaled = {"q": second["q"] * factor, "k": second["k"]}
    merged = merge_models([first, scaled], symmetry=symmetry)
    q, k = ([torch.complex(p[name][:2], p[name][2:]) for p in (target, merged)] for name in ("q", "k"))
    z = [a.conj().unsqueeze(-1) * b.unsqueeze(-2) for a, b in zip(q, k)]
    close(torch.view_as_real(z[1]), torch.view_as_real(z[0]) * (0.5 + 0.5 * factor**0.5) ** 2, 1e-12)


def test_three_models_are_aligned_with_their_mean() -> None:
    """Stationary by brute force: no signed permutation brings any model closer to the mean."""
    model, symmetry = mlp("tanh", (2, 4, 3)), mlp_symmetry("tanh", 1)
    models = [normal_params(model, i) for i in range(3)]
    found = quotient_mean(models, [0.2, 0.3, 0.5], symmetry)
    assert found.converged and all(b <= a for a, b in zip(found.history, found.history[1:]))

    def rows(p: Params) -> Tensor:
        return torch.cat([p["0.weight"], p["0.bias"][:, None], p["2.weight"].mT], 1)

    signs = [torch.tensor(s)[:, None] for s in product((-1.0, 1.0), repeat=4)]
    mean, orders = rows(found.params), list(permutations(range(4)))
    images = [[s * rows(x)[list(p)] for p in orders for s in signs] for x in models]
    closest = [min(each, key=lambda y: float((y - mean).norm())) for each in images]
    close(0.2 * closest[0] + 0.3 * closest[1] + 0.5 * closest[2], mean, 1e-12)


def test_without_a_symmetry_and_other_methods_are_plain() -> None:
    models = [{"w": normal(i, 5)} for i in range(2)]
    close(merge_models(models, [1, 3])["w"], 0.25 * models[0]["w"] + 0.75 * models[1]["w"], 1e-15)
    symmetry = Symmetry({"w": "x"}, {"x": Orthogonal()})
    close(merge_models(models, [1, 3], symmetry, "mean")["w"], merge_models(models, [1, 3])["w"], 0.0)
    assert float((merge_models(models, [1, 3], symmetry)["w"] - merge_models(models, [1, 3])["w"]).norm()) > 1e-3


def test_dtype_is_kept_and_inputs_stay() -> None:
    symmetry = mlp_symmetry("relu", 1)
    for dtype in (torch.float32, torch.bfloat16):
        models = [{n: p.to(dtype) for n, p in normal_params(mlp("relu", (3, 5, 2)), i).items()} for i in range(2)]
        before = [{n: p.clone() for n, p in model.items()} for model in models]
        for merged in (merge_models(models, symmetry=symmetry), merge_models(models, method="mean")):
            assert list(merged) == list(models[0]) and all(p.dtype == dtype for p in merged.values())
        assert all(torch.equal(model[n], old[n]) for model, old in zip(models, before) for n in model)


# ---- Fisher merging


def test_fisher_merging_is_its_formula_and_minimises_the_frozen_metric() -> None:
    models = [{"a": normal(i, 5), "b": normal(i + 9, 2, 3)} for i in range(3)]
    fishers = [{"a": normal(70 + i, 5).square(), "b": normal(80 + i, 2, 3).square()} for i in range(3)]
    w = [0.5, 1.0, 2.5]
    merged = merge_models(models, w, method="fisher", fishers=fishers)
    flat = [torch.cat([p.flatten() for p in m.values()]) for m in models]
    dense = [torch.diag(torch.cat([f.flatten() for f in each.values()])) for each in fishers]
    expected = torch.linalg.solve(
        sum(x * f for x, f in zip(w, dense)), sum(x * f @ t for x, f, t in zip(w, dense, flat))
    )
    point = torch.cat([p.flatten() for p in merged.values()]).requires_grad_()
    close(point.detach(), expected, 1e-12)
    objective = sum(x * (point - t) @ f @ (point - t) for x, f, t in zip(w, dense, flat))
    (gradient,) = torch.autograd.grad(objective, point)
    assert float(gradient.abs().max()) < 1e-12
    assert gap(merged, merge_models(models, w, method="mean")) > 1e-3


def test_without_any_fisher_information_the_mean_is_plain() -> None:
    models = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}]
    fishers = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([0.0, 5.0])}]
    close(merge_models(models, method="fisher", fishers=fishers)["w"], torch.tensor([2.0, 6.0]), 0.0)


# ---- trained networks


def train(kind: str, x: Tensor, y: Tensor, seed: int) -> tuple[nn.Module, Params]:
    torch.manual_seed(seed)
    activation = {"gelu": nn.GELU, "relu": nn.ReLU}[kind]
    model = nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(30):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_digits_trained_apart(kind: str, seed: int) -> None:
    """Two networks from two seeds on two halves: aligned, their mean is nearly as good as they are."""
    data = digits(train=1200, seed=seed)
    x, y = data.train_images.flatten(1), data.train_labels
    model, a = train(kind, x[:600], y[:600], 2 * seed)
    b = train(kind, x[600:], y[600:], 2 * seed + 1)[1]
    test, symmetry = (data.test_images.flatten(1), data.test_labels), mlp_symmetry(kind, 2)
    loss = functional_loss(model, cross_entropy)

    def accuracy(params: Params) -> float:
        return float((torch.func.functional_call(model, params, (test[0],)).argmax(-1) == test[1]).float().mean())

    plain = merge_models([a, b], method="mean")
    heights = {"plain": barrier(loss, a, b, [test]).height}
    found = {"a": accuracy(a), "b": accuracy(b), "plain": accuracy(plain)}
    for name, options in (("weights", {}), ("activations", {"model": model, "batches": [(x, y)]})):
        merged = merge_models([a, b], symmetry=symmetry, **options)
        found[name] = accuracy(merged)
        heights[name] = barrier(loss, a, align(symmetry, b, a, **options)[0], [test]).height
        assert float(loss(merged, test)) < 0.85 * float(loss(plain, test))
        assert heights[name] < 0.5 * heights["plain"]
        assert found[name] > found["plain"] + 0.01
        assert found[name] > min(found["a"], found["b"]) - 0.05
    print(kind, seed, *(f"{name} {value:.3f}" for name, value in found.items()), "barriers", heights)


# ---- bad inputs

GOOD = {"w": torch.ones(3), "v": torch.ones(2)}
TWO = [GOOD, GOOD]


def fisher(**changed: Tensor) -> dict[str, object]:
    return {"method": "fisher", "fishers": [GOOD | changed]}


@pytest.mark.parametrize(
    ("message", "models", "settings"),
    [
        ("models: needed a list of at least one dict of parameters, found an empty list", [], {}),
        ("models: needed a list .* found a single dict", GOOD, {}),
        ("reference: needed the position of one of the 1 models, found 1", [GOOD], {"reference": 1}),
        ("method: must be one of frechet, mean, fisher; found 'median'", [GOOD], {"method": "median"}),
        ("metric: must be one of bures, inv, mix; found 'flat'", [GOOD], {"metric": "flat"}),
        ("models.1.: parameter 'v' of models.0. is missing", [GOOD, {"w": torch.ones(3)}], {}),
        ("models.1.: parameter 'u' is not in models.0.", [GOOD, {**GOOD, "u": torch.ones(1)}], {}),
        (r"models.1.: parameter 'v' has shape \(5,\)", [GOOD, {**GOOD, "v": torch.ones(5)}], {}),
        ("models.1.: parameter 'v' has dtype torch.float64", [GOOD, {**GOOD, "v": torch.ones(2).double()}], {}),
        ("models.0.: parameter 'n' must be a floating-point .* found torch.int64", [{"n": torch.tensor([1])}], {}),
        ("models.0.: parameter 'w' has entries that are not finite", [{"w": torch.tensor([float("nan")])}], {}),
        ("weights: needed one number for each of the 2 models, found 1", TWO, {"weights": [1]}),
        ("weights: a mean needs finite numbers >= 0", TWO, {"weights": [1, -1]}),
        ("weights: a mean needs finite numbers >= 0", TWO, {"weights": [0, 0]}),
        ("weights: a mean needs finite numbers >= 0", TWO, {"weights": [1, float("nan")]}),
        ("fishers: belong to .* which needs them; found method 'fisher' without", TWO, {"method": "fisher"}),
        ("fishers: belong to .* found method 'mean' with", [GOOD], {"method": "mean", "fishers": [GOOD]}),
        ("fishers: needed one for each of the 2 models, found 1", TWO, fisher()),
        ("fishers.0.: parameter 'u' is missing", [{**GOOD, "u": torch.ones(1)}], fisher()),
        (r"fishers.0.: 'v' must have shape \(2,\)", [GOOD], fisher(v=torch.ones(5))),
        ("fishers.0.: 'v' must be finite and >= 0", [GOOD], fisher(v=-torch.ones(2))),
        ("fishers.0.: 'v' must be finite and >= 0", [GOOD], fisher(v=torch.tensor([1.0, float("nan")]))),
    ],
)
def test_bad_inputs_are_named(message: str, models: list[Params], settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        merge_models(models, **settings)


def test_pairs_without_a_mean_are_named() -> None:
    opposite = [{"B": torch.full((1, 1), b), "A": torch.ones(1, 1)} for b in (2.0, -3.0)]
    with pytest.raises(ValueError, match="pair 0 of 'B' with 'A': no geodesic .* for the metric 'inv'"):
        merge_models(opposite, symmetry=LORA, metric="inv")
    fresh = [{"B": torch.zeros(5, 2), "A": torch.randn(2, 7)}, {"B": torch.randn(5, 2), "A": torch.randn(2, 7)}]
    with pytest.raises(ValueError, match=r"models\[0\]: a pair of group 'r' does not have full rank"):
        merge_models(fresh, symmetry=LORA, metric="mix")
    merged = merge_models(fresh, symmetry=LORA)  # half of the square roots of the singular values: a quarter
    close(merged["B"] @ merged["A"], 0.25 * fresh[1]["B"] @ fresh[1]["A"], 1e-3)
    with pytest.raises(SymmetryError, match="'B', declared with pattern"):
        merge_models([GOOD], symmetry=LORA)


def test_pairs_of_a_batch_without_a_mean_are_named() -> None:
    symmetry = Symmetry({"q": "(H e*) _", "k": "(H e) _"}, {"e": GeneralLinear(per="H")}, {"H": 3})
    one = {"q": torch.ones(3, 1).double(), "k": torch.ones(3, 1).double()}
    two = {"q": torch.tensor([[2.0], [-2.0], [3.0]]).double(), "k": one["k"]}
    with pytest.raises(ValueError, match="pair 1 of 'k' with 'q': no geodesic"):
        merge_models([one, two], symmetry=symmetry, metric="inv")
