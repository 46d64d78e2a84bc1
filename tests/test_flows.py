"""Compensated directions: each flow is an abelian group of symmetries, and with them the count is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from symgeo import Symmetry, SymmetryError, check
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, PositiveScaling
from symgeo.symmetry import Action, Compensation, Element, Flow, Reader, RowFreedom, Shear, Span

WIDTH, HIDDEN = 5, 7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def network(layers: int = 1) -> Params:
    """x -> down(gelu(up(norm(x)))), with `up` stored (in, out)."""
    shapes = {"gain": (WIDTH,), "shift": (WIDTH,), "up": (WIDTH, HIDDEN), "up_bias": (HIDDEN,), "down": (3, HIDDEN)}
    return {f"layers.{i}.{name}": normal(*shape, seed=10 * i + j)
            for i in range(layers) for j, (name, shape) in enumerate(shapes.items())}


def output(params: Params) -> Tensor:
    results = []
    for i in range(len(params) // 5):
        gain, shift, up, bias, down = (params[f"layers.{i}.{n}"] for n in ("gain", "shift", "up", "up_bias", "down"))
        x = nn.functional.layer_norm(normal(11, WIDTH, seed=99), (WIDTH,), gain, shift)
        results.append(nn.functional.gelu(x @ up + bias) @ down.mT)
    return torch.cat(results)


UP = Reader("up", Span("up_bias"), transposed=True)
FLOWS: dict[str, Flow] = {"bias": Compensation((Span("shift"),), (UP,)), "rows": RowFreedom(UP, "gain", "shift")}


def declaration() -> Symmetry:
    """Flows beside a group that does not commute with them."""
    return Symmetry({"gain": "c", "shift": "c", "up": "c* _"}, {"c": PositiveScaling()}, flows=FLOWS)


@dataclass(frozen=True)
class Flipped(Shear):
    """The flow with the wrong sign on one parameter."""

    inner: Shear
    parameter: str

    @property
    def moves(self) -> tuple[str, ...]:
        return self.inner.moves

    @property
    def reads(self) -> tuple[str, ...]:
        return self.inner.reads

    def renamed(self, rule: Callable[[str], str]) -> Flow:
        return Flipped(self.inner.renamed(rule), rule(self.parameter))

    def dimension(self, shapes: dict[str, tuple[int, ...]]) -> int:
        return self.inner.dimension(shapes)

    def displacement(self, t: Tensor, params: Params) -> Params:
        steps = self.inner.displacement(t, params)
        return {name: -x if name == self.parameter else x for name, x in steps.items()}


def distance(p: Params, q: Params) -> float:
    return max(float((p[name] - q[name]).abs().max()) for name in p)


def small() -> tuple[Symmetry, Params, Action]:
    symmetry, params = declaration().each("layers.*"), network()
    return symmetry, params, symmetry.bind(params)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_an_abelian_group(name: str) -> None:
    _, params, action = small()
    name = f"{name}[layers.0]"
    n = action.coordinates[name]
    s, t = normal(n, seed=1), normal(n, seed=2)

    def act(x: Tensor, p: Params) -> Params:
        return action.act(action.element({name: x}), p)

    assert distance(act(s, act(t, params)), act(s + t, params)) < 1e-13
    assert distance(act(-t, act(t, params)), params) < 1e-13 < 0.1 < distance(act(t, params), params)
    assert (output(act(t, params)) - output(params)).abs().max() < 1e-12


@pytest.mark.parametrize("name", FLOWS)
def test_a_wrong_sign_changes_the_output(name: str) -> None:
    flipped = Symmetry({}, {}, flows={name: Flipped(FLOWS[name], "up_bias")}).each("layers.*")
    report = check(flipped, output, network(), generator=generator())
    assert report.invariance > 1e-3 and report.moved > 0.05 and not report.ok
    report = check(declaration().each("layers.*"), output, network(), generator=generator())
    assert report.ok and report.invariance < 1e-12
    assert [(row.kind, row.copies, row.dimension) for row in report.groups] == [
        ("PositiveScaling", 1, WIDTH), ("Compensation", 1, WIDTH), ("RowFreedom", 1, HIDDEN)]


def test_vertical_vectors_are_velocities() -> None:
    _, params, action = small()
    xi = action.random_algebra(generator())
    velocity = action.vertical(xi, params)

    def along(t: float) -> Params:
        parts = {name: torch.exp(t * x) if name in action.groups else t * x for name, x in xi.items()}
        return action.act(Element(parts), params)

    for name in params:
        assert torch.allclose((along(1e-5)[name] - along(-1e-5)[name]) / 2e-5, velocity[name], atol=1e-8)
    at_zero = torch.func.jvp(output, (params,), (velocity,))[1]
    assert at_zero.abs().max() < 1e-12 < 0.1 < max(float(x.abs().max()) for x in velocity.values())


def test_elements_compose_and_invert() -> None:
    """Flows, groups and shifts do not commute; products are chains."""
    _, params, action = small()
    g, h, k = (action.random(generator(seed)) for seed in range(3))
    product = action.compose(g, h)
    assert distance(action.act(product, params), action.act(g, action.act(h, params))) < 1e-11
    assert distance(action.act(action.compose(h, g), params), action.act(product, params)) > 1e-2
    left, right = action.compose(action.compose(g, h), k), action.compose(g, action.compose(h, k))
    assert distance(action.act(left, params), action.act(right, params)) < 1e-11
    for element in (g, product, action.inverse(g), left):
        assert distance(action.act(action.inverse(element), action.act(element, params)), params) < 1e-10
    assert distance(action.act(action.identity(), params), params) == 0
    assert distance(action.act(action.inverse(Element({})), params), params) == 0


def test_without_flows_elements_stay_single() -> None:
    _, _, action = small()
    g = action.random(generator(), only=["c[layers.0]"])
    assert not action.compose(g, g).first and not action.inverse(g).first
    assert set(action.compose(g, g)) == {"c[layers.0]"}


def test_globs_and_joins() -> None:
    symmetry, params = declaration().each("layers.*"), network(3)
    action = symmetry.bind(params)
    assert list(symmetry.flows) == ["bias[layers.*]", "rows[layers.*]"] and len(action.flows) == 6
    assert action.flows["rows[layers.2]"].moves == ("layers.2.up", "layers.2.up_bias")
    assert check(symmetry, output, params, generator=generator()).invariance < 1e-12
    assert symmetry.dimension(params) == 3 * (2 * WIDTH + HIDDEN)
    parts = [Symmetry({}, {}, flows={name: flow}) for name, flow in FLOWS.items()]
    assert parts[0] | parts[1] | parts[0] == Symmetry({}, {}, flows=FLOWS) != parts[0]
    assert not parts[0].orthogonal
    with pytest.raises(SymmetryError, match="flow 'bias' is .*RowFreedom"):
        Symmetry({}, {}, flows={"bias": FLOWS["rows"]}) | parts[0]
    with pytest.raises(SymmetryError, match="'bias' is a flow, which is never shared"):
        parts[0].each("layers.*", shared=["bias"])
    inside = {f"net.{name.replace('.0', '')}": p for name, p in network().items()}
    nested = parts[0].each("layers").each("*").bind(inside)
    assert list(nested.flows) == ["bias[net.layers]"]


def test_frozen_parameters_are_read_and_not_moved() -> None:
    params = network()
    names = {"shift": ["rows"], "up": ["bias"], "gain": ["bias", "rows"], "up_bias": []}
    for frozen, kept in names.items():
        symmetry = Symmetry({}, {}, flows=FLOWS, frozen={frozen}).each("layers.*")
        assert list(symmetry.bind(params).flows) == [f"{name}[layers.0]" for name in kept]
        assert symmetry.dimension(params) == sum({"bias": WIDTH, "rows": HIDDEN}[name] for name in kept)


def test_dimension_counts_what_flows_share_once() -> None:
    """A translation of the source alone with another name is the same direction."""
    params = {"a": normal(4, seed=1), "b": normal(4, seed=2), "w": normal(4, 4, seed=3), "c": normal(4, seed=4)}
    exchange = Compensation((Span("a"),), (), (Span("b"),))
    twice = Symmetry({}, {}, flows={"x": exchange, "y": Compensation((Span("b"),), (), (Span("a"),))})
    assert twice.dimension(params) == 4
    other = Compensation((Span("a"),), (Reader("w", Span("c")),))
    assert Symmetry({}, {}, flows={"x": exchange, "y": other}).dimension(params) == 8


def test_zero_gains_have_their_own_direction() -> None:
    _, params, action = small()
    params["layers.0.gain"][torch.tensor([1, 3])] = 0
    moved = action.act(action.random(generator(), only=["rows[layers.0]"]), params)
    change = (moved["layers.0.up"] - params["layers.0.up"]).abs().sum(1)
    assert (output(moved) - output(params)).abs().max() < 1e-12 and change[1] > 0.1 and change.count_nonzero() == 1


def test_half_precision_is_rounded_once() -> None:
    symmetry, params, action = small()
    half = {name: p.to(torch.bfloat16) for name, p in params.items()}
    g = action.random(generator(), only=["bias[layers.0]", "rows[layers.0]"])
    moved = symmetry.bind(half).act(g, half)
    exact = action.act(g, {name: p.double() for name, p in half.items()})
    assert all(x.dtype == torch.bfloat16 for x in moved.values())
    assert distance({name: x.double() for name, x in moved.items()}, exact) < 0.05


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(SymmetryError, match="'up' has no bias that could compensate"):
        Compensation((Span("shift"),), (Reader("up", None),))
    with pytest.raises(SymmetryError, match="norm has the bias 'shift', but the map 'up' has none"):
        RowFreedom(Reader("up", None), "gain", "shift")
    with pytest.raises(SymmetryError, match="'up' would be moved and read"):
        Compensation((Span("up"),), (UP,))
    params = {name.removeprefix("layers.0."): p for name, p in network().items()}
    for flow in (Compensation((Span("gain"),), (Reader("up", Span("up_bias")),)), RowFreedom(UP, "up_bias")):
        with pytest.raises(SymmetryError, match="has length .*, needed"):
            Symmetry({}, {}, flows={"x": flow}).bind(params)
    with pytest.raises(SymmetryError, match="'x' is both a factor and a flow"):
        Symmetry({"up": "x _"}, {"x": GeneralLinear()}, flows={"x": FLOWS["bias"]})
    with pytest.raises(SymmetryError, match="'nothing', declared with pattern 'Compensation', is not among"):
        Symmetry({}, {}, flows={"x": Compensation((Span("nothing"),), (UP,))}).bind(params)


def test_slices_and_grouped_inputs() -> None:
    """The values of 2 key-value heads in a fused bias, each read by 3 query heads."""
    t, o = normal(4), normal(5, 12)
    reader = Reader("o", Span("b"), groups=2, repeat=3)
    flow = Compensation((Span("qkv", 2, (6, 2, 2)),), (reader,))
    shapes = {"qkv": (20,), "o": (5, 12), "b": (5,)}
    moved = flow.displacement(t, {"qkv": torch.zeros(20).double(), "o": o, "b": torch.zeros(5).double()})
    assert flow.dimension(shapes) == 4
    assert torch.equal(moved["qkv"], torch.cat([torch.zeros(16).double(), t]))
    assert torch.allclose(moved["b"], -o @ torch.cat([t[:2]] * 3 + [t[2:]] * 3))
