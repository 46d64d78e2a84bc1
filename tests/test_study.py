"""Studies of candidates whose sharpness is known in closed form."""

from functools import partial

import pytest
import torch

from symgeo import Symmetry, groups
from symgeo.study import MEASURES, Candidate, Lazy, study

SLOPES = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0}
GAPS = {"a": 0.1, "b": 0.2, "c": 0.4, "d": 0.3, "e": 0.5}  # one pair of ten disagrees: tau = 8 / 10


def candidate(name: str, slope: float, gap: float) -> Candidate:
    """A linear loss of this slope at w = 1, where Euclidean and adaptive length are the same."""
    def loss(params, batch):
        return slope * params["w"].sum() * batch / 5**0.5

    return Candidate(name, loss, {"w": torch.ones(5, dtype=torch.float64)}, [1.0, 1.0], {"gap": gap, "minus": -gap})


def candidates(**changes: Candidate) -> list[Candidate]:
    return [changes.get(name) or candidate(name, SLOPES[name], GAPS[name]) for name in SLOPES]


def test_known_sharpness_and_tau():
    found = study(candidates(), rhos=[0.1, 0.2], steps=8)
    assert found.failures == [] and len(found.measurements) == 5 * 4 * 2 and len(found.correlations) == 4 * 2 * 2
    for name, slope in SLOPES.items():
        assert found.values("euclidean", 0.2)[name] == pytest.approx(0.2 * slope, rel=1e-6)
        assert found.values("adaptive", 0.1)[name] == pytest.approx(0.1 * slope, rel=1e-6)
        # along exp, the coordinates 0.1 / sqrt(5) each
        exact = slope * 5**0.5 * (torch.tensor(0.1 / 5**0.5, dtype=torch.float64).expm1().item())
        assert found.values("geodesic inv", 0.1)[name] == pytest.approx(exact, rel=1e-6)
    for c in found.correlations:
        assert c.tau == pytest.approx(0.8 if c.gap == "gap" else -0.8) and c.n == 5
        assert c.low <= c.tau <= c.high
    assert "euclidean" in str(found) and "+0.80" in str(found) and found.to_dict()["models"][2]["gaps"]["gap"] == 0.4


def test_failures_are_named_and_counted():
    bad = candidate("b", float("nan"), 0.2)
    unknown = candidate("d", 4.0, float("nan"))
    found = study(candidates(b=bad, d=unknown), rhos=[0.1], measures=["adaptive"], steps=2)
    assert [(c.gap, c.n, c.tau) for c in found.correlations] == [("gap", 3, 1.0), ("minus", 3, -1.0)]
    assert any(line.startswith("b: the loss at the parameters is nan") for line in found.failures)
    assert any(line.startswith("d, gap: nan") for line in found.failures)
    row = next(row for row in found.to_dict()["measurements"] if row["model"] == "b")
    assert row["value"] is None and "nan" in row["reason"]


def test_too_few_models_have_no_tau():
    found = study(candidates()[:2], rhos=[0.1], measures=["euclidean"], steps=2)
    assert [c.tau for c in found.correlations] == [None, None]
    assert "at least 3" in found.correlations[0].reason and "euclidean" in str(found)


def test_a_model_that_does_not_load_is_recorded():
    def load() -> Candidate:
        raise ValueError("cut off")

    found = study([*candidates(), Lazy("lost", load)], rhos=[0.1], measures=["euclidean"], steps=2)
    assert found.failures == ["lost: cut off"] and found.correlations[0].n == 5


def test_radii_by_measure_and_progress():
    seen = []
    found = study(
        candidates(), {"euclidean": [0.1], "adaptive": [0.3, 1.0]}, ("euclidean", "adaptive"), steps=2,
        progress=lambda done, total, name: seen.append((done, total, name)),
    )  # fmt: skip
    plan = {("euclidean", 0.1), ("adaptive", 0.3), ("adaptive", 1.0)}
    assert {(m.measure, m.rho) for m in found.measurements} == plan
    assert seen == [(i + 1, 5, name) for i, name in enumerate(SLOPES)]


def test_geodesic_measures_quotient_the_symmetry():
    pair = Symmetry({"B": "_ r", "A": "r* _"}, {"r": groups.GeneralLinear()})
    g = torch.Generator().manual_seed(0)
    start = {"B": torch.randn(5, 2, generator=g).double(), "A": torch.randn(2, 3, generator=g).double()}
    moved = (action := pair.bind(start)).act(action.random(g), start)
    models = [
        Candidate(name, lambda p, batch: (p["B"] @ p["A"]).square().sum(), params, [0], {"gap": 1.0}, pair)
        for name, params in (("start", start), ("moved", moved))
    ]
    found = study(models, [0.2], steps=5)
    same = {measure: found.values(measure, 0.2) for measure in MEASURES}
    for measure, values in same.items():
        change = abs(values["moved"] / values["start"] - 1)
        assert change < 1e-9 if measure.startswith("geodesic") else change > 1e-3


@pytest.mark.slow
def test_workers_give_the_same_numbers():
    lazy = [Lazy(name, partial(lazily, name)) for name in SLOPES]
    one, two = (study(lazy, [0.1], ("euclidean", "geodesic mix"), steps=3, workers=n) for n in (1, 2))
    assert one.measurements == two.measurements and one.correlations == two.correlations


def lazily(name: str) -> Candidate:
    """Made in the worker: a loss that is a closure cannot be sent there."""
    return candidate(name, SLOPES[name], GAPS[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": []}, "models: needed at least one"),
        ({"models": [candidate("a", 1, 1), candidate("a", 2, 2)]}, "all with different names; found a, a"),
        ({"measures": ["flat"]}, "measures: needed some of euclidean, adaptive"),
        ({"measures": []}, "found none"),
        ({"rhos": []}, "rhos: needed at least one radius"),
        ({"rhos": [-1.0]}, "rho must be a finite number >= 0; got -1"),
        ({"workers": 0}, "workers: needed at least 1, found 0"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        study(**({"models": candidates(), "rhos": [0.1]} | arguments))
