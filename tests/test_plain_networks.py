"""Plain networks: every flat direction of a chain of maps is found, and no random element changes the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import or_

import pytest
import torch
from networks import params_of
from torch import Tensor, nn

from symgeo import Symmetry, check, count
from symgeo.errors import SymmetryError
from symgeo.groups import GeneralLinear, Permutation, PositiveScaling, SignFlip
from symgeo.models.plain import plain_symmetries
from symgeo.symmetry.channels import ChannelScale, ChannelShift
from symgeo.symmetry.slack import LinearSlack, RowTrade

Params = dict[str, Tensor]
Case = tuple[nn.Module, Tensor]
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**2


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() ** 2


class Mixer(nn.Module):
    """Unknown: it mixes numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, -1)


def chain(*modules: nn.Module) -> nn.Sequential:
    """Float64, evaluation mode, everything random, running statistics too."""
    model = nn.Sequential(*modules).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, p in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if p.is_floating_point():
                    p.copy_(0.6 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
                    if isinstance(module, NORMS):
                        p.mul_(0.5).add_(1 if name == "weight" else 0)
                    p.abs_().add_(0.3) if name == "running_var" else None
    return model


def inputs(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def mlp(*modules: nn.Module, width: int = 5, samples: int = 300) -> Case:
    return chain(*modules), inputs(samples, width)


def images(*modules: nn.Module, side: int = 5, samples: int = 100, channels: int = 2) -> Case:
    return chain(*modules), inputs(samples, channels, side, side)


def linears(*widths: int, biases: str = "") -> Case:
    """No activations; `biases` has a 0 for every map without a bias."""
    flags = biases or "1" * (len(widths) - 1)
    maps = [nn.Linear(a, b, bias=flag == "1") for a, b, flag in zip(widths, widths[1:], flags)]
    return mlp(*maps, width=widths[0], samples=80)


L, C = nn.Linear, nn.Conv2d
CASES: dict[str, tuple[Callable[[], Case], int]] = {
    # scalings of hidden units
    "ReLU": (lambda: mlp(L(5, 7), nn.ReLU(), L(7, 11), nn.LeakyReLU(0.2), L(11, 3)), 7 + 11),
    "PReLU": (lambda: mlp(L(5, 7), nn.PReLU(7), L(7, 3)), 7),
    "squared ReLU": (lambda: mlp(L(5, 7), SquaredReLU(), L(7, 3)), 7),
    "square": (lambda: mlp(L(5, 3), Square(), L(3, 7)), 3),
    "tanh": (lambda: mlp(L(5, 7), nn.Tanh(), L(7, 11), nn.Softsign(), L(11, 3)), 0),
    "GELU": (lambda: mlp(L(5, 7), nn.GELU(), L(7, 11), nn.Softplus(), L(11, 3)), 0),
    "softmax": (lambda: mlp(L(5, 7), nn.GELU(), L(7, 3), nn.LogSoftmax(dim=1)), 7 + 1),
    # all parameters less those of one map between the ends, whose rank is the smallest width
    "linear": (lambda: linears(5, 7, 3), 66 - 18),
    "linear, narrowing": (lambda: linears(7, 5, 3, 2), 66 - 16),
    "linear, widening": (lambda: linears(2, 3, 5, 7), 71 - 7 - 14),
    "linear, waist": (lambda: linears(7, 2, 5, 3), 49 - 3 - (2 * 10 - 4)),
    "linear, waist and wings": (lambda: linears(5, 7, 3, 11, 2), 134 - 2 - 10),
    "linear, no biases": (lambda: linears(3, 5, 7, 2, biases="000"), 64 - 6),
    "linear, no bias in between": (lambda: linears(7, 5, 3, 2, biases="101"), 63 - 16),
    "linear, no bias at the end": (lambda: linears(7, 5, 3, biases="10"), 55 - 24),
    # means that norms remove; gains against readers; biases of norms; rows of readers; rotations before the norm
    "LayerNorm": (lambda: mlp(L(5, 7), nn.LayerNorm(7), nn.GELU(), L(7, 3)), 6),
    "LayerNorm, ReLU": (lambda: mlp(L(5, 7), nn.LayerNorm(7), nn.ReLU(), L(7, 3)), 6 + 7),
    "LayerNorm behind": (lambda: mlp(L(5, 7), nn.GELU(), nn.LayerNorm(7), L(7, 3)), 7 + 7 + 3),
    "LayerNorm first and last": (lambda: mlp(nn.LayerNorm(5), L(5, 7), nn.GELU(), L(7, 3), nn.LayerNorm(3)),
                                 5 + 5 + 7 + 8),
    "LayerNorm, no bias behind": (lambda: mlp(L(5, 7), nn.GELU(), nn.LayerNorm(7), L(7, 3, bias=False)), 7 + 7),
    "LayerNorm, no biases": (
        lambda: mlp(L(5, 7), nn.GELU(), nn.LayerNorm(7, bias=False), L(7, 5, bias=False), nn.ELU(), L(5, 3)), 7 + 5),
    "LayerNorm and linear maps": (lambda: mlp(L(5, 7), nn.GELU(), nn.LayerNorm(7), L(7, 3, bias=False), L(3, 2)),
                                  7 + 7 + 3 + 9 - 1 + 4),
    "LayerNorm between": (lambda: mlp(L(11, 5), nn.LayerNorm(5), L(5, 3), width=11), 12 + 5 + 5 + 3 + 6),
    "LayerNorm between, no gains": (
        lambda: mlp(L(11, 5), nn.LayerNorm(5, elementwise_affine=False), L(5, 3), width=11), 12 + 3 + 6),
    "LayerNorm between, eps 0": (lambda: mlp(L(11, 5), nn.LayerNorm(5, eps=0), L(5, 3), width=11), 31 + 1),
    "RMSNorm between": (lambda: mlp(L(11, 5), nn.RMSNorm(5, eps=0.1), L(5, 3), width=11), 5 + 10),
    "GroupNorm of features": (lambda: mlp(L(5, 14), nn.GroupNorm(2, 14), nn.GELU(), L(14, 3)), 2 * 6),
    # rows of the writer against gains; its bias against that of the norm; gains and biases against the reader
    "BatchNorm1d": (lambda: mlp(L(5, 7), nn.BatchNorm1d(7), nn.ReLU(), L(7, 3)), 7 + 7 + 7),
    "BatchNorm1d, tanh": (lambda: mlp(L(5, 7), nn.BatchNorm1d(7), nn.Tanh(), L(7, 3)), 7 + 7),
    "BatchNorm1d behind": (lambda: mlp(L(5, 7), nn.ReLU(), nn.BatchNorm1d(7), L(7, 3)), 7 + 7 + 7),
    "BatchNorm1d first and last": (
        lambda: mlp(nn.BatchNorm1d(5), L(5, 7), nn.GELU(), L(7, 3, bias=False), nn.BatchNorm1d(3)), 5 + 5 + 3),
    "BatchNorm1d, no gains": (lambda: mlp(L(5, 7), nn.BatchNorm1d(7, affine=False), nn.ReLU(), L(7, 3)), 7),
    "BatchNorm1d, constants in the way": (
        lambda: mlp(L(5, 7, bias=False), nn.BatchNorm1d(7, affine=False), nn.ReLU(), L(7, 3)), 0),
    "BatchNorm1d, no bias behind": (lambda: mlp(nn.BatchNorm1d(5), L(5, 3, bias=False), nn.GELU(), L(3, 2)), 5 + 2),
    "conv, BatchNorm": (lambda: images(
        C(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), C(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(5, 7)), 3 * 3 + 2 * 5),
    "conv, GroupNorm": (lambda: images(
        C(2, 6, 2, padding=1), nn.GroupNorm(2, 6, eps=0.1), nn.ReLU(), C(6, 5, 3), nn.GroupNorm(1, 5, eps=0.1),
        nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), L(20, 7)), 2 + 6 + 1),
    "conv, GroupNorm, eps 0": (lambda: images(
        C(2, 6, 2), nn.GroupNorm(2, 6, eps=0), nn.ReLU(), C(6, 5, 3), nn.GroupNorm(1, 5, eps=0), nn.GELU(),
        nn.Flatten(), L(20, 7)), 9 + 2 + 1),
    "conv, InstanceNorm": (lambda: images(
        C(2, 3, 2), nn.InstanceNorm2d(3, affine=True, eps=0), nn.ReLU(), C(3, 5, 3), samples=50), 3 + 3 + 3),
    "conv, norm, conv": (lambda: images(C(2, 5, 2), nn.GroupNorm(1, 5, eps=0.1), C(5, 3, 2), nn.GELU(), C(3, 2, 2),
                                        samples=50), 1 + 5 + 5 + 6),
    "conv, pools, Flatten": (lambda: images(
        C(2, 3, 2), nn.MaxPool2d(2), nn.ReLU(), C(3, 5, 2, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        L(5, 3)), 3),
    "conv, max, conv": (lambda: images(C(2, 3, 2), nn.MaxPool2d(2), C(3, 5, 2), nn.Tanh(), nn.Flatten(), L(5, 3)), 6),
    "conv, conv": (lambda: images(C(2, 3, 3), C(3, 5, 2), nn.GELU(), C(5, 3, 2), samples=150), 9 + 3),
    "conv, padded conv": (lambda: images(C(2, 3, 3), C(3, 5, 2, padding=1), nn.GELU(), C(5, 3, 2), samples=40), 9),
    "depthwise": (lambda: images(
        C(2, 3, 1), nn.ReLU(), C(3, 3, 3, groups=3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), C(3, 5, 1), nn.GELU(),
        C(5, 2, 2), samples=50), 4 * 3),
    "separable": (lambda: images(C(3, 3, 3, groups=3), C(3, 5, 1), nn.GELU(), C(5, 2, 2), channels=3, samples=50),
                  3 + 3),
    "transposed": (lambda: images(C(2, 3, 2), nn.ReLU(), nn.ConvTranspose2d(3, 5, 2), nn.Tanh(), C(5, 2, 2),
                                  samples=50), 3),
    "one-dimensional": (lambda: (chain(nn.Conv1d(2, 3, 3), nn.PReLU(3), nn.Conv1d(3, 5, 2), nn.ReLU(), nn.Flatten(),
                                       L(15, 2)), inputs(150, 2, 6)), 3 + 5),
}


def symmetry_of(model: nn.Module, approximate: bool = False) -> Symmetry:
    found = [symmetry for _, symmetry in plain_symmetries(model, approximate=approximate)]
    return reduce(or_, found, Symmetry({}, {}))


def outputs(model: nn.Module, x: Tensor) -> Callable[[Params], tuple[Tensor, ...]]:
    return lambda p: tuple(torch.func.functional_call(model, p, (part,)) for part in x.split(10))


@pytest.mark.parametrize("name", CASES)
def test_the_dimension_is_the_nullity(name: str) -> None:
    make, expected = CASES[name]
    model, x = make()
    report = count(symmetry_of(model), outputs(model, x), params_of(model), generic=False)
    assert report.declared == report.measured == expected and report.reliable


@pytest.mark.parametrize("name", CASES)
def test_random_elements_leave_the_output_alone(name: str) -> None:
    model, x = CASES[name][0]()
    symmetry, generator = symmetry_of(model), torch.Generator().manual_seed(1)
    report = check(symmetry, lambda p: torch.func.functional_call(model, p, (x[:20],)), params_of(model),
                   generator=generator)
    nothing = name == "BatchNorm1d, constants in the way"
    assert report.invariance < 1e-12
    assert nothing or (report.moved > 0.05 and report.ok)
    for row in report.groups:
        assert row.moved > 1e-3, row.name


def broken(symmetry: Symmetry) -> list[Symmetry]:
    """Without duals where they matter, otherwise with groups that are too large; and flows that forget the running
    statistics."""
    kinds = {type(group) for group in symmetry.groups.values()}
    if kinds & {GeneralLinear, PositiveScaling}:
        tensors = {key: text.replace("*", "") for key, text in symmetry.tensors.items()}
        twins = [Symmetry(tensors, symmetry.groups, symmetry.sizes)]
    elif kinds:
        wrong = {SignFlip: PositiveScaling} if SignFlip in kinds else {Permutation: SignFlip}
        groups = {key: wrong[type(g)](per=g.per) if type(g) in wrong and not (g.per and type(g) is Permutation) else g
                  for key, g in symmetry.groups.items()}
        twins = [Symmetry(symmetry.tensors, groups, symmetry.sizes)]
    else:
        twins = []
    flows = {key: replace(flow, behind=None, before=None, reader=replace(flow.reader, bias=None))
             for key, flow in symmetry.flows.items() if isinstance(flow, ChannelScale) and (flow.behind or flow.before)}
    return [*twins, *([Symmetry({}, {}, flows=flows)] if flows else [])]


@pytest.mark.parametrize("name", [name for name in CASES if name != "BatchNorm1d, constants in the way"])
def test_broken_twins_fail(name: str) -> None:
    model, x = CASES[name][0]()
    twins = broken(symmetry_of(model))
    assert twins
    for twin in twins:
        report = check(twin, lambda p: torch.func.functional_call(model, p, (x[:20],)), params_of(model),
                       generator=torch.Generator().manual_seed(1))
        assert report.invariance > 1e-2 and not report.ok


@pytest.mark.parametrize("name", [
    "linear, narrowing", "linear, waist and wings", "linear, no bias in between", "linear, no bias at the end",
    "LayerNorm, no bias behind", "LayerNorm and linear maps", "BatchNorm1d", "BatchNorm1d behind",
    "conv, BatchNorm", "depthwise", "separable"])
def test_flows_are_families_with_their_vertical_fields(name: str) -> None:
    model, _ = CASES[name][0]()
    params = params_of(model)
    action = symmetry_of(model).bind(params)
    assert action.flows
    for key, flow in action.flows.items():
        t = torch.randn(action.coordinates[key], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        there = flow.act(t, params)
        assert set(there) == set(flow.moves)
        back = flow.act(-t, params | there)
        assert all(torch.allclose(back[k], params[k], atol=1e-11) for k in flow.moves), key
        _, velocity = torch.func.jvp(lambda s, f=flow, t=t: f.act(s * t, params),  # type: ignore[misc]
                                     (torch.zeros(()).double(),), (torch.ones(()).double(),))
        field = flow.vertical(t, params)
        assert all(torch.allclose(velocity[k], field[k], atol=1e-11) for k in flow.moves), key


def test_what_activations_allow() -> None:
    def groups(activation: nn.Module) -> set[type]:
        return {type(group) for group in symmetry_of(chain(L(5, 7), activation, L(7, 3))).groups.values()}

    assert groups(nn.ReLU(inplace=True)) == groups(SquaredReLU()) == {Permutation, PositiveScaling}
    assert groups(nn.Tanh()) == groups(nn.Hardshrink()) == {Permutation, SignFlip}
    assert groups(Square()) == {Permutation, PositiveScaling, SignFlip}
    assert groups(nn.GELU()) == groups(nn.ReLU6()) == groups(nn.Hardtanh(0, 1e5)) == {Permutation}
    assert groups(nn.Dropout()) == groups(nn.Identity()) == {GeneralLinear}
    assert groups(nn.Softmax(dim=-1)) == {Permutation}
    assert groups(nn.LayerNorm(7)) == {Permutation, PositiveScaling, SignFlip}  # of the gains
    assert groups(Mixer()) == groups(nn.GLU()) == set()


def test_the_patterns_of_a_convolutional_network() -> None:
    (prefix, symmetry), = plain_symmetries(nn.ModuleDict({"net": nn.Sequential(
        C(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), L(54, 7))}))
    assert prefix == "net."
    assert symmetry.tensors == {
        "net.0.weight": "(G0[net] h0[net]) _ _ _", "net.0.bias": "(G0[net] h0[net])",
        "net.1.weight": "(G0[net] h0[net] u1[net])", "net.1.bias": "(G0[net] h0[net] u1[net])",
        "net.4.weight": "_ (G0[net] h0[net] u1[net]* _)",
    }
    assert symmetry.groups["h0[net]"] == Permutation(per="G0[net]") and symmetry.shifts == {
        "mean0[net]": {"net.0.bias": "(_ 1)"}}


def test_channels_with_equal_statistics_may_be_permuted() -> None:
    net = chain(L(5, 7), nn.BatchNorm1d(7), nn.GELU(), L(7, 3))
    assert not any(isinstance(group, Permutation) for group in symmetry_of(net).groups.values())
    net[1].reset_running_stats()
    symmetry = symmetry_of(net)
    assert isinstance(symmetry.groups["h0"], Permutation)
    x = inputs(20, 5)
    report = check(symmetry, lambda p: torch.func.functional_call(net, p, (x,)), params_of(net))
    assert report.invariance < 1e-12 and report.moved > 0.05
    net[1].running_var[2] += 1
    assert check(symmetry, lambda p: torch.func.functional_call(net, p, (x,)), params_of(net)).invariance > 1e-2


def test_scales_that_hold_up_to_an_eps_are_asked_for() -> None:
    model, x = images(C(2, 6, 2), nn.GroupNorm(2, 6, eps=1e-5), nn.GELU(), C(6, 5, 3), nn.GroupNorm(1, 5),
                      samples=20)
    params = params_of(model)
    assert symmetry_of(model).dimension(params) == 2 + 1
    symmetry = symmetry_of(model, approximate=True)
    assert symmetry.dimension(params) == 3 + 3
    report = check(symmetry, lambda p: torch.func.functional_call(model, p, (x,)), params, tolerance=1e-2)
    assert report.ok and report.invariance > 1e-9


def test_what_is_left_alone() -> None:
    """Containers within unknown modules are found, with nothing moved at their ends; what is shared is not moved."""
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(L(5, 7), nn.ReLU(), L(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.body(x)
            return out

    net = chain(L(3, 5), nn.ReLU(), Residual(), nn.ReLU(), nn.Sequential(L(5, 7), nn.Tanh(), L(7, 2)))
    found = dict(plain_symmetries(net))
    assert list(found) == ["", "2.body."] and found[""].tensors.keys() == {"4.0.weight", "4.0.bias", "4.2.weight"}
    x, params = inputs(20, 3), params_of(net)
    report = check(reduce(or_, found.values()), lambda p: torch.func.functional_call(net, p, (x,)), params)
    assert report.invariance < 1e-12 and report.moved > 0.05
    assert list(dict(plain_symmetries(net, skip=["2"]))) == [""]
    assert list(dict(plain_symmetries(net, skip=["2.body.", "4"]))) == []
    shared = L(5, 5)
    assert plain_symmetries(chain(L(3, 5), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), L(5, 2))) == []
    tied = chain(L(5, 5), nn.ReLU(), L(5, 5), nn.ReLU(), L(5, 2))
    tied[2].weight = tied[0].weight
    assert {"0.weight", "0.bias"}.isdisjoint(symmetry_of(tied).tensors)
    block = nn.Sequential(L(5, 7), nn.ReLU(), L(7, 5))
    twice = chain(L(3, 5), nn.Tanh(), block, nn.Tanh(), block, L(5, 2))
    assert [prefix for prefix, _ in plain_symmetries(twice)] == ["2."]
    count_twice = count(symmetry_of(twice), outputs(twice, inputs(200, 3)), params_of(twice), generic=False)
    assert count_twice.declared == 7


def test_what_does_not_fit_is_cut() -> None:
    """A linear map behind an image that was not flattened reads pixels, a norm over images is not known."""
    for modules in ([C(2, 3, 2), nn.ReLU(), L(4, 3)], [C(2, 3, 2), nn.LayerNorm([3, 4, 4]), C(3, 5, 2)],
                    [C(2, 4, 2), nn.ReLU(), C(4, 4, 2, groups=2)], [C(2, 3, 2), nn.ReLU(), nn.Flatten(2), L(16, 3)],
                    [nn.utils.parametrizations.weight_norm(L(5, 7)), nn.ReLU(), L(7, 3)], [nn.LazyLinear(5), L(5, 3)]):
        assert not symmetry_of(nn.Sequential(*modules)).groups


def test_flows_that_do_not_fit_are_refused() -> None:
    shapes = {"w": (3, 5), "b": (3,), "v": (7, 3), "g": (3,), "d": (7,)}
    model, _ = CASES["BatchNorm1d"][0]()
    scale = next(flow for flow in symmetry_of(model).flows.values() if isinstance(flow, ChannelScale))
    with pytest.raises(SymmetryError, match="7 constants for 3 channels"):
        replace(scale).renamed(lambda name: name).dimension({"0.weight": (3, 5)})
    with pytest.raises(SymmetryError, match="'b': needed maps of which the last one alone has a bias"):
        ChannelShift("b", ())
    with pytest.raises(SymmetryError, match="no bias compensates what 'v'"):
        LinearSlack(("w", "v"), 1, ("b",))
    with pytest.raises(SymmetryError, match="'v' needs less outputs than inputs, has 7 and 3"):
        RowTrade("v", "g", "b").dimension(shapes)
