"""Corrected eigenvalues: SOAP and KL-SOAP written out, their symmetries, state, edges and refusals."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim_guards import counted, deep
from torch import Tensor, nn

from symgeo import Symmetry
from symgeo.groups import GeneralLinear, Orthogonal, Permutation, SignFlip
from symgeo.optim import SymO, presets

TOLERANCE = 1e-8
Params = dict[str, Tensor]
Make = Callable[[nn.Module], torch.optim.Optimizer]

#: sizes that differ by at most 1: the first gradient has no null space in which eigenvectors are arbitrary
SHAPES = {"square": (7, 7), "wide": (2, 3), "tall": (3, 2), "other": (7, 7)}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(shapes: dict[str, tuple[int, ...]] = SHAPES) -> Params:
    return {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def gradients(steps: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Params]:
    """With different scales along the axes, and smaller over time."""
    found = []
    for t in range(steps):
        found.append({name: draw(*s, seed=100 * (t + 1) + i) * torch.linspace(0.5, 2, s[-1]).double() / (t + 1)
                      for i, (name, s) in enumerate(shapes.items())})  # fmt: skip
    return found


def follow(make: Make, params: Params, grads: list[Params]) -> Params:
    net = nn.ParameterDict({name: nn.Parameter(x.clone()) for name, x in params.items()})
    optimizer = make(net)
    for gradient in grads:
        for name, p in net.items():
            p.grad = gradient[name].to(p.dtype, copy=True)
        optimizer.step()
    return {name: p.detach() for name, p in net.items()}


def soap(**options: Any) -> Make:
    settings = {"lr": 0.03, "betas": (0.8, 0.9), "damping": 1e-9, "corrected": True} | options
    return lambda net: SymO(net.named_parameters(), presets.shampoo(net), **settings)


def gap(a: Params, b: Params, way: float) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a) / way


def distance(a: Params, b: Params) -> float:
    found = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert found > 1e-2
    return found


class Reference:
    """SOAP of one matrix: one gradient at a time, eigh of both sides when they are renewed."""

    def __init__(self, w: Tensor, kl: bool, nesterov: bool = False) -> None:
        m, n = w.shape
        self.w, self.m, self.v, self.t = w.clone(), torch.zeros_like(w), torch.zeros_like(w), 0
        self.left, self.right = torch.zeros(m, m).double(), torch.zeros(n, n).double()
        self.left_basis, self.right_basis = torch.zeros(m, m).double(), torch.zeros(n, n).double()
        self.kl, self.nesterov = kl, nesterov

    def average(self, g: Tensor, b1: float, b2: float) -> Tensor:
        """V without its bias."""
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        rotated = self.left_basis.T @ g @ self.right_basis
        self.v = b2 * self.v + (1 - b2) * rotated**2
        return self.v / (1 - b2 ** max(1, self.t - 1))

    def move(self, g: Tensor, v: Tensor, largest: Tensor, b1: float, b2: float, every: int) -> None:
        mean = self.m / (1 - b1**self.t)
        if self.nesterov:
            mean = (b1 * self.m + (1 - b1) * g) / (1 - b1 ** (self.t + 1))
        scaled = self.left_basis.T @ mean @ self.right_basis / (v + 1e-9 * largest).sqrt()
        if self.t > 1:
            self.w = self.w - 0.03 * self.left_basis @ scaled @ self.right_basis.T
        left, right = (torch.eye(len(s)).double() for s in (self.left, self.right))
        if self.kl and self.t > 1:
            left = inverse(self.left, self.left_basis, b2 ** (self.t - 1))
            right = inverse(self.right, self.right_basis, b2 ** (self.t - 1))
        self.left = b2 * self.left + (1 - b2) * g @ right @ g.T
        self.right = b2 * self.right + (1 - b2) * g.T @ left @ g
        if (self.t - 1) % every == 0:
            self.left_basis = torch.linalg.eigh(self.left).eigenvectors
            self.right_basis = torch.linalg.eigh(self.right).eigenvectors


def inverse(s: Tensor, q: Tensor, prior: float) -> Tensor:
    d = (q.T @ s @ q).diagonal()
    d = ((1 - prior) * d / d.mean() + prior).clamp_min(1 / len(d) ** 2)
    return q @ torch.diag(1 / d) @ q.T


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("divergence", ["frobenius", "kl"])
def test_a_pair_is_soap_written_out(divergence: str, every: int, nesterov: bool) -> None:
    grads, (b1, b2) = gradients(8), (0.8, 0.9)
    expected = {name: Reference(w, divergence == "kl", nesterov) for name, w in start().items()}
    for t, gradient in enumerate(grads, start=1):
        squares = {name: r.average(gradient[name], b1, b2) for name, r in expected.items()}
        largest = torch.stack([v.max() for v in squares.values()]).max()
        for name, r in expected.items():
            r.move(gradient[name], squares[name], largest, b1, b2, every)
        end = follow(soap(divergence=divergence, update_every=every, nesterov=nesterov), start(), grads[:t])
        if t == 1:
            assert all(torch.equal(end[name], w) for name, w in start().items())
    result = {name: r.w for name, r in expected.items()}
    assert gap(end, result, distance(result, start())) < TOLERANCE
    other = follow(soap(divergence="kl" if divergence == "frobenius" else "frobenius", update_every=every,
                        nesterov=nesterov), start(), grads)  # fmt: skip
    assert gap(other, result, distance(result, start())) > 1e-3


@pytest.mark.parametrize("divergence", ["frobenius", "kl"])
def test_soap_moves_along_with_rotations_of_both_sides(divergence: str) -> None:
    turns = {name: (torch.linalg.qr(draw(m, m, seed=m)).Q, torch.linalg.qr(draw(n, n, seed=50 + n)).Q)
             for name, (m, n) in SHAPES.items()}  # fmt: skip

    def turned(params: Params) -> Params:
        return {name: turns[name][0] @ x @ turns[name][1] for name, x in params.items()}

    def error(make: Make) -> float:
        grads = gradients(8)
        end = follow(make, start(), grads)
        there = follow(make, turned(start()), [turned(g) for g in grads])
        return gap(there, turned(end), distance(end, start()))

    assert error(soap(divergence=divergence, update_every=2, weight_decay=0.1)) < TOLERANCE
    assert error(lambda net: torch.optim.AdamW(net.parameters(), lr=0.03)) > 1e-3


UNITS = {"up": (7, 3), "bias": (7,), "down": (5, 7), "mix": (7, 7)}
PATTERNS = {"up": "h _", "bias": "h", "down": "_ h", "mix": "h h"}


@pytest.mark.parametrize("group", [Permutation(), SignFlip(), Orthogonal()], ids=lambda g: type(g).__name__)
def test_one_symmetry_moves_along_with_its_group(group: Any) -> None:
    """Also while the statistics have null spaces, in which any eigenvectors may be found."""
    symmetry, grads = Symmetry(PATTERNS, {"h": group}), gradients(6, UNITS)
    action = symmetry.bind(start(UNITS))
    g = action.random(torch.Generator().manual_seed(5))

    def error(make: Make) -> float:
        end = follow(make, start(UNITS), grads)
        there = follow(make, action.act(g, start(UNITS)), [action.act(g, x) for x in grads])
        return gap(there, action.act(g, end), distance(end, start(UNITS)))

    def make(net: nn.Module) -> SymO:
        return SymO(net.named_parameters(), symmetry, lr=0.03, betas=(0.8, 0.9), trivial="dense", update_every=2,
                    corrected=True)  # fmt: skip

    assert error(make) < TOLERANCE
    if isinstance(group, Orthogonal):
        assert error(lambda net: torch.optim.AdamW(net.parameters(), lr=0.03)) > 1e-3


def test_one_side_is_its_eigenvalues_renewed_at_every_step() -> None:
    """Q diag(V)^(-1/2) Q^T, V the mean over the columns of the squares of Q^T G; both sides of rotations."""
    w = draw(5, 7, seed=1)
    m, v, s, q = torch.zeros(5, 7).double(), torch.zeros(5).double(), torch.zeros(5, 5).double(), None
    grads = gradients(8, {"w": (5, 7)})
    end = follow(lambda net: SymO(net.named_parameters(), presets.muon(net), lr=0.03, betas=(0.8, 0.9), damping=0.0,
                                  update_every=3, corrected=True), {"w": w}, grads)  # fmt: skip
    for t, g in enumerate((gradient["w"] for gradient in grads), start=1):
        m = 0.8 * m + 0.2 * g
        if q is not None:
            v = 0.9 * v + 0.1 * (q.T @ g).square().mean(1)
            w = w - 0.03 * q @ (q.T @ m / (1 - 0.8**t) / (v / (1 - 0.9 ** (t - 1))).sqrt()[:, None])
        s = 0.9 * s + 0.1 * g @ g.T
        if t % 3 == 1:
            q = torch.linalg.eigh(s).eigenvectors
    assert gap(end, {"w": w}, distance({"w": w}, {"w": draw(5, 7, seed=1)})) < TOLERANCE


def test_signs_are_adam() -> None:
    def adam(net: nn.Module) -> SymO:
        return SymO(net.named_parameters(), presets.adam(net), 0.03, (0.8, 0.9), 0.0, corrected=True)

    shapes = {"w": (5, 7), "b": (3,)}
    ours = follow(adam, start(shapes), gradients(8, shapes))
    theirs = follow(lambda net: torch.optim.Adam(net.parameters(), 0.03, (0.8, 0.9), eps=0.0), start(shapes),
                    gradients(8, shapes))  # fmt: skip
    assert gap(ours, theirs, distance(ours, start(shapes))) < TOLERANCE


def test_the_balanced_gauge_goes_with_it() -> None:
    """Low-rank factors, from B = 0: the product does not depend on the gauge."""
    symmetry = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
    a, x, y = draw(3, 7, seed=1), draw(17, 7, seed=2), draw(17, 5, seed=3)

    def travel(make: Make, gauge: Tensor) -> Tensor:
        net = nn.ParameterDict({"B": nn.Parameter(torch.zeros(5, 3).double()),
                                "A": nn.Parameter(torch.linalg.solve(gauge, a))})  # fmt: skip
        optimizer = make(net)
        for _ in range(12):
            optimizer.zero_grad()
            (x @ (net["B"] @ net["A"]).T - y).square().mean().backward()
            optimizer.step()
        return (net["B"] @ net["A"]).detach()

    def ours(net: nn.Module) -> SymO:
        return SymO(net.named_parameters(), symmetry, 0.03, compact=True, update_every=2, corrected=True)

    eye, other = torch.eye(3).double(), draw(3, 3, seed=4)
    end = travel(ours, eye)
    assert end.abs().max() > 1e-2
    assert (travel(ours, other) - end).abs().max() / end.abs().max() < TOLERANCE
    adamw: Make = lambda net: torch.optim.AdamW(net.parameters(), 0.03)  # noqa: E731
    assert (travel(adamw, other) - travel(adamw, eye)).abs().max() > 1e-3


MAKERS: dict[str, Make] = {
    "soap": soap(update_every=2),
    "kl": soap(divergence="kl", update_every=2),
    "one side": lambda net: SymO(net.named_parameters(), presets.muon(net), 0.03, corrected=True, update_every=3),
}


@pytest.mark.parametrize("name", MAKERS)
def test_resume_is_the_uninterrupted_run_to_the_last_bit(name: str) -> None:
    grads, first = gradients(9), {key: x.float() for key, x in start().items()}
    whole = follow(MAKERS[name], first, grads)
    net = nn.ParameterDict({key: nn.Parameter(x.clone()) for key, x in first.items()})
    saved = None
    for part in (grads[:4], grads[4:]):
        optimizer = MAKERS[name](net)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for gradient in part:
            for key, p in net.items():
                p.grad = gradient[key].float()
            optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    assert all(torch.equal(net[key].detach(), x) for key, x in whole.items())


@pytest.mark.parametrize("damping", [0.0, 1e-8])
@pytest.mark.parametrize("name", MAKERS)
def test_zero_gradients_and_weights_half_precision_and_thin_matrices(name: str, damping: float) -> None:
    shapes = {"w": (5, 7), "row": (1, 7), "column": (5, 1), "one": (1, 1), "new": (5, 7)}
    net = nn.ParameterDict({key: nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for key, s in shapes.items()})
    optimizer = MAKERS[name](net)
    for gradient in [{key: torch.zeros(s) for key, s in shapes.items()}] * 3:
        for key, p in net.items():
            p.grad = gradient[key].bfloat16()
        optimizer.step()
        assert all(not bool(p.any()) for p in net.values())
    for t, gradient in enumerate(gradients(5, shapes)):
        for key, p in net.items():
            p.grad = None if key == "new" and t < 3 else gradient[key].bfloat16()
        optimizer.step()
        assert not bool(net["new"].any()) or t >= 3
    assert all(bool(torch.isfinite(p).all()) and bool(p.any()) for p in net.values())
    state = optimizer.state[net["w"]]
    assert all(v.dtype == torch.float32 for v in state.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("name", MAKERS)
def test_cost_does_not_grow_with_equal_layers_and_nothing_waits(name: str) -> None:
    found = [counted(net, MAKERS[name](net), warm=3 if name != "one side" else 4) for net in (deep(2), deep(8))]
    due = [counted(net, MAKERS[name](net), warm=2 if name != "one side" else 3) for net in (deep(2), deep(8))]
    assert found[0].computed == found[1].computed and due[0].computed == due[1].computed
    assert not found[0].syncs and due[0].syncs


@pytest.mark.parametrize("name", MAKERS)
def test_momentum_without_a_second_moment_moves_nothing(name: str) -> None:
    """The first gradient is in no average of squares; then none follows."""
    grads = [gradients(1)[0], {key: torch.zeros(s).double() for key, s in SHAPES.items()}]
    end = follow(MAKERS[name], start(), grads)
    assert all(torch.equal(end[key], x) for key, x in start().items())


def test_parameters_added_later() -> None:
    net = {f"layers.{i}.w": nn.Parameter(draw(5, 7, seed=i)) for i in range(2)}
    sides = Symmetry({"w": "_ n"}, {"n": Orthogonal()}), Symmetry({"w": "m _"}, {"m": Orthogonal()})
    pair = sides[0].each("layers.*"), sides[1].each("layers.*")
    one, other = ({"params": [pair]} for pair in net.items())
    optimizer = SymO([one], pair, lr=0.1, corrected=True, divergence="kl", update_every=4)
    new = net["layers.1.w"]
    for t in range(8):
        if t == 3:
            optimizer.add_param_group(other)
        before = new.detach().clone()
        for i, p in enumerate(net.values()):
            p.grad = draw(5, 7, seed=10 * t + i)
        optimizer.step()
        assert torch.equal(new.detach(), before) == (t <= 3)
        assert all(bool(torch.isfinite(p).all()) for p in net.values())


@pytest.mark.parametrize(("options", "message"), [
    ({"graft": "adam"}, "got graft='adam'"),
    ({"estimator": "riccati"}, "needs estimator='gradient'"),
    ({"roots": "newton"}, "roots='newton' does not find"),
    ({"roots": "group", "power": 1.0}, "roots='group' does not find"),
    ({"betas": (0.9, 0.0)}, r"needs betas\[1\] > 0; got 0 for 'w'"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    net = nn.ParameterDict({"w": nn.Parameter(torch.ones(5, 7))})
    with pytest.raises(ValueError, match=message):
        SymO(net.named_parameters(), presets.muon(net), lr=0.1, corrected=True, **options)
    with pytest.raises(ValueError, match="needs one symmetry"):
        SymO(net.named_parameters(), presets.shampoo(net), lr=0.1, corrected=True, compact=True)
