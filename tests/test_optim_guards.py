"""What must hold at the edges: degenerate sizes and scales, cost, memory, and what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from symgeo import Symmetry, SymmetryError
from symgeo.groups import Cyclic, GeneralLinear, Orthogonal, Permutation, SignFlip
from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets
from symgeo.optim.packed import hermitian_product, pack, unpack


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, offset: float = 0.0) -> None:
    for t in range(steps):
        for i, p in enumerate(params.values()):
            p.grad = draw(*p.shape, seed=100 * t + i).to(p.dtype) + offset
        optimizer.step()


GROUPS = {"permutation": Permutation(), "signs": SignFlip(), "orthogonal": Orthogonal()}


@pytest.mark.parametrize("estimator", ["gradient", "riccati", "secant"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_degenerate_sizes_stay_finite(n: int, group: str, estimator: str) -> None:
    """n = 1, 2, 3, more copies than dimensions, and weights that are zero."""
    shapes = {"w": (n, 11), "square": (n, n), "b": (n,)}
    for zero in (False, True):
        params = {k: nn.Parameter(draw(*s, seed=i) * (not zero)) for i, (k, s) in enumerate(shapes.items())}
        symmetry = Symmetry({"w": "h _", "square": "h h", "b": "h"}, {"h": GROUPS[group]})
        optimizer = SymO(params.items(), symmetry, lr=0.01, estimator=estimator)
        run(params, optimizer, 3)
        assert all(bool(torch.isfinite(p).all()) for p in params.values())


@pytest.mark.parametrize("roots", ["eigh", "newton"])
def test_means_a_thousand_deviations_away(roots: str) -> None:
    """The centred part of a float32 gradient with mean / std = 1e3 is preconditioned to float32 accuracy."""
    steps = {}
    for dtype in (torch.float32, torch.float64):
        w = nn.Parameter(torch.zeros(31, 3, dtype=dtype))
        symmetry = Symmetry({"w": "h _"}, {"h": Permutation()})
        optimizer = SymO([("w", w)], symmetry, lr=1.0, betas=(0.0, 0.9), roots=roots, damping=1e-9)
        w.grad = (1e3 + draw(31, 3, seed=1)).to(dtype)
        optimizer.step()
        steps[dtype] = (w - w.mean(0)).detach().double()
    gap = (steps[torch.float32] - steps[torch.float64]).norm() / steps[torch.float64].norm()
    assert gap < 1e-3


@pytest.mark.parametrize("options", [{"betas": (0.9, 0.0), "damping": 0.0}, {"betas": (0.9, 0.9), "damping": 1e-6}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("roots", ["eigh", "newton"])
@pytest.mark.parametrize("preset", ["muon", "shampoo"])
def test_scale_invariance_down_to_tiny_gradients(preset: str, roots: str, options: dict[str, Any]) -> None:
    def travel(scale: float) -> Tensor:
        net = nn.ParameterDict({"w": nn.Parameter(torch.zeros(13, 7))})
        symmetry = getattr(presets, preset)(net)
        optimizer = SymO(net.named_parameters(), symmetry, lr=0.1, roots=roots, **options)
        for t in range(3):
            net["w"].grad = scale * draw(13, 7, seed=t) / draw(13, 7, seed=t).norm()
            optimizer.step()
        return net["w"].detach()

    large, tiny = travel(1.0), travel(1e-12)
    assert float((large - tiny).norm() / large.norm()) < 1e-3


class Counter(TorchDispatchMode):
    """Counts operations that compute something, and those that make the host wait."""

    SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select")
    VIEWS = ("view", "select", "reshape", "permute", "transpose", "expand", "unbind", "slice", "t.default", "detach",
             "unsqueeze", "squeeze", "split", "alias", "as_strided", "unfold", "narrow", "diagonal")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.computed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.startswith(self.SYNCS):
            self.syncs.append(name)
        self.computed += not name.startswith(self.VIEWS)
        return func(*args, **(kwargs or {}))


def deep(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers)))


def counted(net: nn.Module, optimizer: torch.optim.Optimizer, warm: int = 2) -> Counter:
    params = dict(net.named_parameters())
    run(params, optimizer, warm)
    for i, p in enumerate(params.values()):
        p.grad = draw(*p.shape, seed=i)
    with Counter() as counter:
        optimizer.step()
    return counter


SPEED: dict[str, Any] = {
    "muon": lambda net: (presets.muon(net), {"update_every": 10}),
    "muon without eigh": lambda net: (presets.muon(net), {"roots": "newton"}),
    "muon without memory": lambda net: (presets.muon(net), {"roots": "newton", "betas": (0.9, 0.0), "damping": 0.0}),
    "adam": lambda net: (presets.adam(net), {}),
    "shampoo": lambda net: (presets.shampoo(net), {"update_every": 10, "graft": "adam"}),
    "mlp": lambda net: (presets.mlp(net), {"update_every": 10}),
    "group": lambda net: (presets.muon(net), {"roots": "group", "power": 1.0}),
    "tensor lr": lambda net: (presets.muon(net), {"update_every": 10, "lr": torch.tensor(0.01), "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", SPEED)
def test_no_step_waits_for_the_device_between_eighs(name: str) -> None:
    net = deep(3)
    symmetry, options = SPEED[name](net)
    counter = counted(net, SymO(net.named_parameters(), symmetry, **({"lr": 0.01} | options)))
    assert counter.computed > 0
    assert counter.syncs == []


def test_the_counter_sees_waiting() -> None:
    net = deep(3)
    assert counted(net, SymO(net.named_parameters(), presets.muon(net), lr=0.01)).syncs  # eigh checks its input


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("preset", ["muon", "adam", "shampoo"])
def test_the_number_of_calls_does_not_grow_with_equal_layers(preset: str, every: int) -> None:
    counts = []
    for layers in (2, 8):
        net = deep(layers)
        optimizer = SymO(net.named_parameters(), getattr(presets, preset)(net), lr=0.01, update_every=every)
        counts.append(counted(net, optimizer).computed)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("name", "every", "whole", "bound"), [
    ("muon", 1, False, 1.5), ("muon", 10, False, 2.0), ("muon", 10, True, 3.0), ("lora", 1, False, 3.0),
    ("lora", 10, False, 3.0), ("attention", 1, False, 3.0), ("attention", 1, True, 3.0), ("attention", 10, True, 3.0),
    ("attention", 10, False, 3.0 + 2.6 / 128),
])  # fmt: skip
def test_memory_of_one_sided_and_head_wise_statistics(name: str, every: int, whole: bool, bound: float) -> None:
    """Momentum, averages, and roots where they outlive a step, in units of the parameters: of all, or of those named.

    Of width d, the attention preset names 4 d^2 + 3 d, and a triangle of each of its two matrices, of 2 d + 2 and
    2 d + 1 rows, has 4 d^2 + 8 d + 4 together.
    """
    if name == "lora":
        net: nn.Module = nn.ParameterDict({"lora_A": torch.ones(8, 64), "lora_B": torch.ones(96, 8)})
    else:
        net = TinyLM(depth=1)
    symmetry = getattr(presets, name)(net)
    params = {k: p for k, p in net.named_parameters() if whole or k in symmetry.tensors}
    optimizer = SymO(params.items(), symmetry, lr=1e-3, update_every=every, compact=name != "muon")
    run(params, optimizer, 1)
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    assert held <= bound * sum(p.numel() for p in params.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("size", [1, 2, 3, 67, 131, 257])
def test_triangles_hold_hermitian_matrices(size: int, dtype: torch.dtype) -> None:
    """Also those that are a product in several slabs of rows, and transposed in memory."""
    x = torch.randn(2, 3, 5, size, dtype=dtype, generator=torch.Generator().manual_seed(size)).mT
    product = x @ x.mH
    t = 0.5 * (product + product.mH)
    assert pack(t).shape == (2, 3, size * (size + 1) // 2)
    assert torch.equal(unpack(pack(t), size), t)
    found = unpack(hermitian_product(x, x), size)
    assert torch.equal(found, found.mH)
    assert float((found - t).abs().max() / t.abs().max()) < 1e-14
    garbled = t + torch.ones_like(t).tril(-1)
    assert torch.equal(pack(garbled), pack(t))  # only the upper triangle is read


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("estimator", "group"), [
    ("gradient", Cyclic()), ("riccati", Cyclic()), ("secant", Permutation()),
])  # fmt: skip
def test_triangles_survive_saving_and_loading(estimator: str, group: Any, every: int) -> None:
    """The trajectory goes on to the last bit; real and complex kinds, and mixed moments, which are no triangles."""
    ends = []
    for reload in (False, True):
        params = {"w": nn.Parameter(draw(7, 3, seed=0)), "c": nn.Parameter(draw(7, 2, seed=1))}
        symmetry = Symmetry({"w": "h _", "c": "h _"}, {"h": group})
        optimizer = SymO(params.items(), symmetry, lr=0.01, estimator=estimator, update_every=every)
        run(params, optimizer, 2)
        if reload:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = SymO(params.items(), symmetry, lr=0.01, estimator=estimator, update_every=every)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        run(params, optimizer, 3)
        ends.append(torch.cat([p.detach().flatten() for p in params.values()]))
    assert torch.equal(*ends)


W = {"w": (5, 7)}
PAIR = Symmetry({"w": "_ n"}, {"n": Orthogonal()}), Symmetry({"w": "m _"}, {"m": Orthogonal()})


@pytest.mark.parametrize(("tensors", "group", "message"), [
    ({"w": "_ r"}, GeneralLinear(), "compact=True"),
    ({"w": "r r"}, Orthogonal(), "'w'"),
    ({"w": "r _", "gone": "r"}, Orthogonal(), "gone"),
])  # fmt: skip
def test_symmetries_that_do_not_fit(tensors: dict[str, str], group: Any, message: str) -> None:
    w = nn.Parameter(torch.ones(5, 7))
    with pytest.raises(SymmetryError, match=message):
        SymO([("w", w)], Symmetry(tensors, {"r": group}), lr=0.1)


def test_three_axes_of_one_group() -> None:
    w = nn.Parameter(torch.ones(3, 3, 3))
    with pytest.raises(ValueError, match="acts on 3 axes"):
        SymO([("w", w)], Symmetry({"w": "h h h"}, {"h": Permutation()}), lr=0.1)


@pytest.mark.parametrize(("pair", "message"), [
    ((PAIR[0], PAIR[0]), r"axes \[1\] and \[1\] of parameter 'w'"),
    ((PAIR[0], Symmetry({"w": "p _"}, {"p": Permutation()})), "second one does not act on 'w' by one irreducible"),
    ((PAIR[0], Symmetry({"w": "p _"}, {"p": SignFlip()})), "second one does not act on 'w' by one irreducible"),
    ((Symmetry({"w": "_ n", "v": "_ n"}, {"n": Orthogonal()}), PAIR[1]), "only the first names parameter 'v'"),
    ((Symmetry({"w": "_ n", "v": "_ n"}, {"n": Orthogonal()}),
      Symmetry({"w": "m _", "v": "k _"}, {"m": Orthogonal(), "k": Orthogonal()})), "'w' and 'v'"),
])  # fmt: skip
def test_pairs_that_do_not_commute(pair: tuple[Symmetry, Symmetry], message: str) -> None:
    params = {name: nn.Parameter(torch.ones(5, 7)) for name in ("w", "v")}
    with pytest.raises(SymmetryError, match=message):
        SymO(params.items(), pair, lr=0.1)


@pytest.mark.parametrize(("options", "message"), [
    ({"damping": -1.0}, "damping must be finite"),
    ({"estimator": "newton"}, "estimator must be one of"),
    ({"trivial": "none"}, "trivial must be one of"),
    ({"graft": "lion"}, "graft must be one of"),
    ({"roots": "qr"}, "roots must be one of"),
    ({"divergence": "js"}, "divergence must be one of"),
    ({"update_every": 0}, "update_every must be"),
    ({"power": 0.0}, "power must be finite"),
    ({"power": 1.0, "estimator": "riccati"}, "power must be 0.5"),
    ({"estimator": "secant", "roots": "newton"}, "needs eigenvalues"),
    ({"roots": "group"}, "needs power=1"),
    ({"roots": "newton", "power": 0.3}, "use roots='eigh'"),
    ({"compact": True, "graft": "adam"}, "graft='adam' depends on the gauge"),
    ({"lr": -0.1}, "lr must be finite"),
    ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
    ({"rest_lr": -1.0}, "rest_lr must be finite"),
])  # fmt: skip
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    w = nn.Parameter(torch.ones(5, 7))
    with pytest.raises(ValueError, match=message):
        SymO([("w", w)], PAIR[0], **({"lr": 0.1} | options))


@pytest.mark.parametrize(("options", "message"), [
    ({"divergence": "kl"}, "needs power=1"),
    ({"estimator": "riccati"}, "needs one symmetry"),
    ({"roots": "group", "power": 1.0}, "needs one symmetry"),
    ({"compact": True}, "needs one symmetry"),
])  # fmt: skip
def test_options_that_do_not_fit_a_pair(options: dict[str, Any], message: str) -> None:
    w = nn.Parameter(torch.ones(5, 7))
    with pytest.raises(ValueError, match=message):
        SymO([("w", w)], PAIR, **({"lr": 0.1} | options))


def test_parameters_and_gradients_that_do_not_fit() -> None:
    w = nn.Parameter(torch.ones(5, 7))
    with pytest.raises(ValueError, match="parameters without names"):
        SymO([w], PAIR[0], lr=0.1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="complex parameters"):
        SymO([("w", nn.Parameter(torch.ones(5, 7, dtype=torch.complex64)))], PAIR[0], lr=0.1)
    with pytest.raises(ValueError, match="'damping' is the same for all groups"):
        SymO([{"params": [("w", w)], "damping": 0.1}], PAIR[0], lr=0.1)
    with pytest.raises(ValueError, match="needed a symgeo.Symmetry"):
        SymO([("w", w)], "muon", lr=0.1)  # type: ignore[arg-type]
    table = nn.Embedding(3, 5, sparse=True)
    optimizer = SymO([("w", w), ("table", table.weight)], PAIR[0], lr=0.1)
    w.grad = torch.ones_like(w)
    table(torch.tensor([1])).sum().backward()
    before = w.detach().clone()
    with pytest.raises(ValueError, match="'table': sparse gradients"):
        optimizer.step()
    assert torch.equal(w.detach(), before)


def test_gradients_that_are_not_finite_are_named_and_spoil_nothing() -> None:
    params = {name: nn.Parameter(draw(5, 7, seed=i)) for i, name in enumerate(("w", "v"))}
    symmetry = Symmetry({"w": "_ n", "v": "_ k"}, {"n": Orthogonal(), "k": Orthogonal()})
    optimizer = SymO(params.items(), symmetry, lr=0.1)
    run(params, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    params["v"].grad = torch.full((5, 7), torch.nan)
    with pytest.raises(ValueError, match="gradient of 'v'"):
        optimizer.step()
    for old, new in zip(before["state"].values(), optimizer.state_dict()["state"].values()):
        assert all(torch.equal(old[k], new[k]) if isinstance(old[k], Tensor) else old[k] == new[k] for k in old)


@pytest.mark.parametrize("seed", range(4))
def test_secant_stays_symmetric_in_complex_blocks(seed: int) -> None:
    """More copies than steps: the sums of eigenvalues that the Lyapunov solution divides by are tiny."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.nn.Parameter(torch.randn(5, 7, generator=generator))
    optimizer = SymO([("w", w)], Symmetry({"w": "_ c"}, {"c": Cyclic()}), lr=1e-2, estimator="secant")
    for _ in range(8):
        w.grad = torch.randn(5, 7, generator=generator)
        optimizer.step()
    assert bool(torch.isfinite(w).all())
