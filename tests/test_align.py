"""Alignment of whole models: exact recovery, brute force, invariance, activations, bad inputs."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from laws import close
from mlps import gap, mlp, mlp_symmetry, normal_params
from networks import MODELS, params_of
from torch import Tensor, nn

from manifolds import BuresWasserstein
from manifolds.linalg import balance
from symgeo import Symmetry, SymmetryError, find_symmetry
from symgeo.groups import (
    Cyclic,
    GeneralLinear,
    Group,
    Orthogonal,
    Permutation,
    PositiveScaling,
    Rotary,
    SignFlip,
)
from symgeo.merge.align_gauge import balanced_gauge
from symgeo.merge.alignment import align, align_report

KINDS = ("gelu", "tanh", "relu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def check_recovery(symmetry: Symmetry, target: dict[str, Tensor], seed: int = 0) -> None:
    """A random element of the whole group is undone; what is returned is the element's action, to the bit."""
    action = symmetry.bind(target)
    source = action.act(action.random(seeded(seed)), target)
    assert gap(source, target) > 1e-2
    moved, element = align(symmetry, source, target)
    assert gap(moved, target) < 1e-8
    again = action.act(element, source)
    assert all(torch.equal(again[name], moved[name]) for name in moved)


# ---- exact recovery


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(3, 17, 13, 2), (3, 13, 11, 7, 2)], ids=("two", "three"))
def test_mlp_in_another_gauge(kind: str, widths: tuple[int, ...]) -> None:
    check_recovery(mlp_symmetry(kind, len(widths) - 2), normal_params(mlp(kind, widths), 1))


@pytest.mark.parametrize("name", ["tiny_vit", "llama", "encoder_layer", "bert", "multihead"])
def test_transformer_in_another_gauge(name: str) -> None:
    """Heads, GL and rotary pairs, gains, translations and compensated directions, all at once."""
    model = MODELS[name]()
    check_recovery(find_symmetry(model), params_of(model))


GROUPS: dict[str, Group] = {
    "permutation": Permutation(),
    "signs": SignFlip(),
    "cyclic": Cyclic(),
    "scaling": PositiveScaling(),
    "orthogonal": Orthogonal(),
    "linear": GeneralLinear(),
    "rotary half": Rotary(),
    "rotary interleaved": Rotary(pairing="interleaved"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_every_group_alone_and_in_copies(name: str) -> None:
    target = {"a": normal(0, 7, 6), "b": normal(1, 6, 11)}
    check_recovery(Symmetry({"a": "_ x", "b": "x* _"}, {"x": GROUPS[name]}), target)
    if not isinstance(GROUPS[name], SignFlip | PositiveScaling):  # with `per` these are single numbers
        target = {"a": normal(0, 7, 18), "b": normal(1, 18, 11)}
        copies = type(GROUPS[name])(**{**vars(GROUPS[name]), "per": "H"})
        for outer in ({}, {"H": Permutation()}):
            check_recovery(Symmetry({"a": "_ (H x)", "b": "(H x*) _"}, {"x": copies, **outer}, {"H": 3}), target)


def test_three_levels_of_permutations() -> None:
    groups = {"K": Permutation(), "G": Permutation(per="K"), "e": Orthogonal(per="G"), "s": SignFlip(per="K")}
    symmetry = Symmetry({"q": "(K G e) _", "o": "_ (K G e)", "k": "(K s) _"}, groups, {"K": 3, "G": 5})
    check_recovery(symmetry, {"q": normal(0, 30, 7), "o": normal(1, 11, 30), "k": normal(2, 3, 13)})


def test_groups_on_two_axes_of_one_tensor() -> None:
    """A recurrent weight is quadratic in the element; the input weight anchors it."""
    symmetry = Symmetry({"in": "(h s) _", "recurrent": "(h s) (h* s*)"}, {"h": Permutation(), "s": SignFlip(per="h")})
    check_recovery(symmetry, {"in": normal(0, 11, 2), "recurrent": normal(1, 11, 11)})
    free = Symmetry({"w": "h h*"}, {"h": Permutation()})  # nothing anchors this one: never worse than the start
    a, b = {"w": normal(2, 7, 7)}, {"w": normal(3, 7, 7)}
    report = align_report(free, a, b)
    assert report.distance <= float((a["w"] - b["w"]).norm()) + 1e-12


def test_single_precision_and_half() -> None:
    target = {name: p.float() for name, p in normal_params(mlp("relu", (3, 7, 2)), 0).items()}
    symmetry = mlp_symmetry("relu", 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        cast = {name: p.to(dtype) for name, p in target.items()}
        action = symmetry.bind(cast)
        source = action.act(action.random(seeded(0)), cast)
        moved, _ = align(symmetry, source, cast)
        assert all(p.dtype == dtype for p in moved.values())
        assert gap(moved, cast) < tolerance


# ---- brute force


def test_signed_permutations_against_all_of_them() -> None:
    model, symmetry = mlp("tanh", (3, 5, 2)), mlp_symmetry("tanh", 1)
    for seed in range(4):
        source, target = normal_params(model, 2 * seed), normal_params(model, 2 * seed + 1)
        rows = [torch.cat([p["0.weight"], p["0.bias"][:, None], p["2.weight"].mT], 1) for p in (source, target)]
        best = min(
            float((torch.tensor(signs)[:, None] * rows[0][list(p)] - rows[1]).square().sum())
            for p in permutations(range(5))
            for signs in product((-1.0, 1.0), repeat=5)
        )
        constant = float((source["2.bias"] - target["2.bias"]).square().sum())
        report = align_report(symmetry, source, target)
        assert report.distance**2 == pytest.approx(best + constant, rel=1e-12)
        assert gap(report.params, target) > 1e-2  # independent models do not coincide


def test_two_hidden_layers_against_all_permutations() -> None:
    """With restarts the best of 24 x 24 pairs of permutations is found."""
    model, symmetry = mlp("gelu", (2, 4, 4, 3)), mlp_symmetry("gelu", 2)
    source, target = normal_params(model, 0), normal_params(model, 1)
    action = symmetry.bind(target)
    everything = [
        action.act(action.element({"h0": torch.tensor(p), "h1": torch.tensor(q)}), source)
        for p in permutations(range(4)) for q in permutations(range(4))
    ]  # fmt: skip
    best = min(sum(float((x[k] - target[k]).square().sum()) for k in x) for x in everything) ** 0.5
    single, many = (align_report(symmetry, source, target, restarts=n).distance for n in (0, 30))
    assert best - 1e-12 <= many <= single
    assert many == pytest.approx(best, rel=1e-12)


def test_heads_against_all_permutations_of_quotient_distances() -> None:
    symmetry = Symmetry({"q": "(H e*) _", "k": "(H e) _"}, {"H": Permutation(), "e": GeneralLinear(per="H")}, {"H": 4})
    source, target = ({"q": normal(i, 12, 7), "k": normal(i + 9, 12, 5)} for i in (0, 1))

    def lift(p: dict[str, Tensor]) -> Tensor:
        g, h = (p[name].unflatten(0, (4, 3)).mT for name in ("q", "k"))
        found = balance(g, h)
        return torch.cat([g @ found.inverse, h @ found.gauge.mT], dim=-2)

    x, y = lift(source), lift(target)
    squares = torch.stack([BuresWasserstein().dist(x[i].expand_as(y), y) for i in range(4)]).square()
    best = min(sum(float(squares[p[j], j]) for j in range(4)) for p in permutations(range(4)))
    report = align_report(symmetry, source, target)
    assert report.distance**2 == pytest.approx(best, rel=1e-10)
    products = [
        torch.einsum("hea,heb->hab", *(p[n].unflatten(0, (4, 3)) for n in ("q", "k"))) for p in (source, report.params)
    ]
    close(products[1], products[0][report.element["H"]], 1e-10)


# ---- the balanced gauge


def test_balanced_relu_columns_have_one_norm_and_are_shortest() -> None:
    symmetry, params = mlp_symmetry("relu", 2), normal_params(mlp("relu", (3, 11, 7, 2)), 0)
    action = symmetry.bind(params)
    gauge = balanced_gauge(action, params)
    assert gauge.converged and not gauge.deficient
    for i in (0, 1):
        plain, dual = (x.squeeze(-1) for x in action.stack(f"s{i}", gauge.params))
        close(plain.square().sum(-1), dual.square().sum(-1), 1e-12)
    length = sum(float(p.square().sum()) for p in gauge.params.values())
    for seed in range(5):
        moved = action.act(action.random(seeded(seed), only=["s0", "s1"]), params)
        assert length < sum(float(p.square().sum()) for p in moved.values())
        assert gap(balanced_gauge(action, moved).params, gauge.params) < 1e-11


def test_gauges_of_pairs_without_full_rank_stay_finite_and_are_reported() -> None:
    lora = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
    fresh, trained = {"B": torch.zeros(5, 2), "A": torch.randn(2, 7)}, {"B": torch.randn(5, 2), "A": torch.randn(2, 7)}
    report = align_report(lora, fresh, trained)
    assert report.deficient == ("r",)
    assert all(bool(torch.isfinite(p).all()) for p in report.params.values())
    close(report.params["B"], torch.zeros(5, 2), 0.0)
    relu, params = mlp_symmetry("relu", 1), normal_params(mlp("relu", (3, 5, 2)), 0)
    params["2.weight"][:, 1] = 0.0
    assert align_report(relu, params, normal_params(mlp("relu", (3, 5, 2)), 1)).deficient == ("s0",)


def test_a_group_with_one_side() -> None:
    scale = Symmetry({"w": "(x _) _"}, {"x": PositiveScaling()}, {"x": 1})
    moved, element = align(scale, {"w": torch.full((3, 2), 4.0)}, {"w": torch.full((3, 2), 0.5)})
    close(moved["w"], torch.full((3, 2), 0.5), 1e-6)
    close(element["x"], torch.tensor([0.125], dtype=torch.float64), 1e-6)
    with pytest.raises(SymmetryError, match=r"'e' is declared, but nothing carries 'e\*'"):
        align(Symmetry({"w": "e _"}, {"e": GeneralLinear()}), {"w": torch.eye(2)}, {"w": torch.eye(2)})


# ---- invariance


@pytest.mark.parametrize("kind", KINDS)
def test_equivariance(kind: str) -> None:
    """align(a source, b target) = b align(source, target), for two unrelated models."""
    model, symmetry = mlp(kind, (3, 13, 11, 2)), mlp_symmetry(kind, 2)
    source, target = normal_params(model, 0), normal_params(model, 1)
    action = symmetry.bind(target)
    a, b = action.random(seeded(5)), action.random(seeded(6))
    moved, _ = align(symmetry, source, target)
    other, _ = align(symmetry, action.act(a, source), action.act(b, target))
    assert gap(other, action.act(b, moved)) < 1e-8
    assert gap(other, moved) > 1e-3
    assert gap(moved, target) > 1e-3


@pytest.mark.parametrize("name", ["tiny_vit", "llama"])
def test_equivariance_of_a_transformer(name: str) -> None:
    model = MODELS[name]()
    symmetry, target = find_symmetry(model), params_of(model)
    source = {name: p + 0.1 * normal(i, *p.shape) for i, (name, p) in enumerate(target.items())}
    action = symmetry.bind(target)
    a, b = action.random(seeded(5)), action.random(seeded(6))
    first = align_report(symmetry, source, target)
    second = align_report(symmetry, action.act(a, source), action.act(b, target))
    assert second.distance == pytest.approx(first.distance, rel=1e-10)
    assert gap(second.params, first.params) > 1e-3
    if not action.flows:  # which depend on parameters in which source and target differ
        assert gap(second.params, action.act(b, first.params)) < 1e-8


def test_sweeps_never_lose_and_runs_repeat() -> None:
    model, symmetry = mlp("tanh", (3, 13, 11, 2)), mlp_symmetry("tanh", 2)
    source, target = normal_params(model, 0), normal_params(model, 2)
    first, second = (align_report(symmetry, source, target, restarts=2, seed=3) for _ in range(2))
    assert first.converged and first.sweeps > 1
    assert all(b <= a * (1 + 1e-14) for a, b in zip(first.history, first.history[1:]))
    assert first.history == second.history
    assert all(torch.equal(first.params[name], second.params[name]) for name in target)
    assert set(first.to_dict()) == {"distance", "history", "sweeps", "converged", "deficient"}
    assert not align_report(symmetry, source, target, max_sweeps=1).converged


def test_frozen_parameters_stay() -> None:
    model = MODELS["tiny_vit"]()
    for name, p in model.named_parameters():
        p.requires_grad_("blocks.0.mlp" not in name)
    symmetry, target = find_symmetry(model), params_of(model)
    check_recovery(symmetry, target)
    source = {name: p + 0.1 * normal(i, *p.shape) for i, (name, p) in enumerate(target.items())}
    moved, _ = align(symmetry, source, target)
    kept = [name for name in target if "blocks.0.mlp." in name]
    assert kept and all(torch.equal(moved[name], source[name]) for name in kept)


# ---- activations


@pytest.mark.parametrize("kind", KINDS)
def test_activations_recover_another_gauge(kind: str) -> None:
    model, symmetry = mlp(kind, (3, 11, 7, 2)), mlp_symmetry(kind, 2)
    target = normal_params(model, 0)
    action = symmetry.bind(target)
    source = action.act(action.random(seeded(1)), target)
    batches = [(normal(i, 29, 3), None) for i in range(2)]
    moved, _ = align(symmetry, source, target, model=model, batches=batches)
    assert gap(moved, target) < 1e-8


@pytest.mark.parametrize("name", ["tiny_vit", "llama", "gpt2"])
def test_activations_of_transformers(name: str) -> None:
    model = MODELS[name]()
    symmetry, target = find_symmetry(model), params_of(model)
    action = symmetry.bind(target)
    source = action.act(action.random(seeded(1)), target)
    ids = {"input_ids": torch.randint(0, 41, (5, 11), generator=seeded(0))}
    batches = [(normal(0, 5, 8, 8), None)] if name == "tiny_vit" else [ids]
    moved, _ = align(symmetry, source, target, model=model, batches=batches)
    assert gap(moved, target) < 1e-5  # norms and softmax of transformers compute in single precision


def test_activations_of_channels_against_correlations() -> None:
    """Channels of a convolution: the assignment with the largest sum of correlations, of all 120."""
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.GELU(), nn.Conv2d(5, 2, 3)).double()
    symmetry = Symmetry({"0.weight": "h _ _ _", "0.bias": "h", "2.weight": "_ h* _ _"}, {"h": Permutation()})
    source, target = normal_params(model, 0), normal_params(model, 1)
    x = normal(2, 3, 1, 7, 7)
    units = [nn.functional.conv2d(x, p["0.weight"], p["0.bias"]) for p in (source, target)]
    both = torch.cat([u.movedim(1, 0).flatten(1) for u in units])
    scores = torch.corrcoef(both)[:5, 5:]
    best = max(permutations(range(5)), key=lambda p: float(sum(scores[p[j], j] for j in range(5))))
    _, element = align(symmetry, source, target, model=model, batches=[(x, None)])
    assert element["h"].tolist() == list(best)


def test_a_batch_may_be_the_input_itself() -> None:
    model, symmetry, x = mlp("gelu", (3, 5, 2)), mlp_symmetry("gelu", 1), normal(2, 29, 3)
    source, target = normal_params(model, 0), normal_params(model, 1)
    found = [align(symmetry, source, target, model=model, batches=[b])[1] for b in ((x, None), x)]
    assert found[0]["h0"].tolist() == found[1]["h0"].tolist()
    with pytest.raises(ValueError, match="a mapping of arguments; got str"):
        align(symmetry, source, target, model=model, batches=["x"])


class Broken(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("broken on purpose")


def test_hooks_are_removed_and_modes_kept() -> None:
    model, symmetry = mlp("gelu", (3, 5, 2)), mlp_symmetry("gelu", 1)
    params, broken = normal_params(model, 0), Broken(*model)
    broken.train()
    with pytest.raises(RuntimeError, match="on purpose"):
        align(symmetry, params, params, model=broken, batches=[(normal(0, 7, 3), None)])
    align(symmetry, params, params, model=model, batches=[(normal(0, 7, 3), None)])
    assert not any(m._forward_hooks for m in (*broken.modules(), *model.modules()))
    assert broken.training and all(m.training for m in broken.modules())


# ---- bad inputs


def test_bad_inputs_are_named() -> None:
    model, symmetry = mlp("gelu", (3, 5, 2)), mlp_symmetry("gelu", 1)
    good = normal_params(model, 0)
    bad = {
        "source: parameter '0.bias' of target is missing": {k: p for k, p in good.items() if k != "0.bias"},
        "source: parameter 'extra' is not in target": {**good, "extra": torch.ones(2)},
        r"source: parameter '0.bias' has shape \(7,\), but shape \(5,\) in target": {**good, "0.bias": torch.ones(7)},
        "source: parameter '0.bias' has dtype torch.float32, but": {**good, "0.bias": torch.ones(5)},
        "source: parameter '0.bias' must be a floating-point": {**good, "0.bias": torch.ones(5, dtype=torch.int64)},
        "source: parameter '0.bias' has entries that are not finite": {**good, "0.bias": good["0.bias"] / 0},
    }
    for message, source in bad.items():
        with pytest.raises(ValueError, match=message):
            align(symmetry, source, good)
    for message, settings in {
        "restarts: needed at least 0": {"restarts": -1},
        "max_sweeps: needed at least 1": {"max_sweeps": 0},
        "model and batches belong together": {"model": model},
        "batches: activations need at least one batch": {"model": model, "batches": []},
        "no output of a linear or convolution layer of Sequential": {
            "model": nn.Sequential(nn.GELU()), "batches": [(normal(0, 7, 3), None)]},
    }.items():
        with pytest.raises(ValueError, match=message):
            align(symmetry, good, good, **settings)
