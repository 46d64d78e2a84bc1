"""Sharpness of a module where it stands, against the functional one; what it leaves behind."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import symgeo
from symgeo import Symmetry, groups, in_place_sharpness
from symgeo.models.tiny_vit import TinyViT
from symgeo.sharpness.chunks import Chunks, Metric

CROSS_ENTROPY = nn.functional.cross_entropy


def vit(dtype: torch.dtype = torch.float64) -> TinyViT:
    torch.manual_seed(0)
    return TinyViT(width=12, depth=2, heads=2, mlp_width=16).eval().to(dtype)


def data(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 8, 8, generator=generator, dtype=torch.float64).to(dtype), torch.arange(6) + i)
            for i in range(2)]


def functional(model: nn.Module, symmetry: Symmetry | None, metric: str, geodesic: str, rho: float = 0.2) -> Any:
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    manifold = symgeo.ParameterManifold(params, symmetry, metric=metric)
    loss = symgeo.functional_loss(model, CROSS_ENTROPY)
    return symgeo.geodesic_sharpness(loss, params, data(), manifold, rho, steps=6, geodesic=geodesic)


@pytest.mark.parametrize("size", [1, 20_000, 2**30])
@pytest.mark.parametrize(("metric", "geodesic"), [("inv", "exact"), ("mix", "taylor2")])
def test_is_the_functional_sharpness_for_any_chunks(metric: str, geodesic: str, size: int) -> None:
    model = vit()
    symmetry = symgeo.find_symmetry(model)
    wanted = functional(model, symmetry, metric, geodesic)
    found = in_place_sharpness(model, data(), 0.2, symmetry, CROSS_ENTROPY, metric, steps=6, geodesic=geodesic,
                               chunk_bytes=size)
    assert found.value == pytest.approx(wanted.value, rel=1e-10)
    assert found.per_batch == pytest.approx(wanted.per_batch, rel=1e-10)
    assert (found.pairs, found.kind, found.zeros) == (wanted.pairs, wanted.kind, wanted.zeros)
    assert len(found.history[0]) == 7
    straight = in_place_sharpness(model, data(), 0.2, symmetry, CROSS_ENTROPY, metric, steps=6, geodesic="linear")
    assert abs(straight.value / wanted.value - 1) > 1e-3


def test_without_a_symmetry_it_is_adaptive_or_euclidean() -> None:
    model = vit()
    params = {name: p.detach() for name, p in model.named_parameters()}
    loss = symgeo.functional_loss(model, CROSS_ENTROPY)
    for rest, measure in (("adaptive", symgeo.adaptive_sharpness), ("euclidean", symgeo.euclidean_sharpness)):
        found = in_place_sharpness(model, data(), 0.1, None, CROSS_ENTROPY, rest=rest, steps=5, geodesic="linear")
        assert found.value == pytest.approx(measure(loss, params, data(), 0.1, steps=5).value, rel=1e-10)
        assert found.kind == rest


def test_gives_back_every_bit_and_the_gradients(dtype: torch.dtype = torch.float32) -> None:
    model = vit(dtype)
    symmetry = symgeo.find_symmetry(model)
    CROSS_ENTROPY(model(data(dtype)[0][0]), data()[0][1]).backward()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    calls = 0

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise RuntimeError("the machine is out of patience")
        return CROSS_ENTROPY(output, target)

    limit = 5
    with pytest.raises(RuntimeError, match="patience"):
        in_place_sharpness(model, data(dtype), 0.3, symmetry, criterion, steps=20)
    limit = 1000
    assert in_place_sharpness(model, data(dtype), 0.3, symmetry, criterion, steps=4).value > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, values[name])
        if name in grads:
            assert p.grad is grads[name][0] and torch.equal(p.grad, grads[name][1])


class LowRank(nn.Module):
    """A frozen linear map with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(20, 10).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(3, 20)), nn.Parameter(torch.randn(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


def test_adapters_alone_move_over_a_frozen_base() -> None:
    torch.manual_seed(0)
    model = LowRank().double()
    adapter = Symmetry({"A": "r* _", "B": "_ r"}, {"r": groups.GeneralLinear()})
    both = adapter | Symmetry({"base.weight": "_ h"}, {"h": groups.Permutation()})  # of no use: its base is frozen
    batches = [(torch.randn(9, 20).double(), torch.randint(0, 10, (9,)))]

    def measure(symmetry: Symmetry | None) -> float:
        found = in_place_sharpness(model, batches, 0.2, symmetry, CROSS_ENTROPY, steps=6, rest="euclidean")
        return found.value

    value, plain = measure(adapter), measure(None)
    assert measure(both) == value
    assert model.base.weight.grad is None
    g = torch.randn(3, 3).double() + 2 * torch.eye(3).double()
    with torch.no_grad():
        model.A.copy_(g @ model.A)
        model.B.copy_(model.B @ torch.linalg.inv(g))
    assert measure(adapter) == pytest.approx(value, rel=1e-10)
    assert abs(measure(None) / plain - 1) > 1e-2
    params = {"A": model.A.detach(), "B": model.B.detach()}
    chunks = Chunks(params, {"base.weight": model.base.weight}, Metric(both, "inv", "adaptive", 0.0), None)
    assert chunks.origin().numel() == 90


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in the backward pass; counts forward passes."""

    def __init__(self, model: TinyViT) -> None:
        super().__init__()
        self.model, self.passes = model, 0
        for block in model.blocks:
            plain = block.forward

            def counted(x: Tensor, plain: Any = plain) -> Tensor:
                self.passes += 1
                return plain(x)

            block.forward = lambda x, counted=counted: checkpoint(counted, x, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_activation_checkpoints_are_honoured() -> None:
    symmetry = symgeo.find_symmetry(vit())
    wanted = in_place_sharpness(vit(), data(), 0.2, symmetry, CROSS_ENTROPY, steps=4).value
    wrapped = Checkpointed(vit())
    found = in_place_sharpness(wrapped.model, data(), 0.2, symmetry, CROSS_ENTROPY, steps=4)
    assert found.value == pytest.approx(wanted, rel=1e-12)
    assert wrapped.passes == 2 * 2 * (2 + 2 * 5)  # two batches, two blocks: two checks, and twice for each of 5 points


class Noisy(nn.Module):
    """In training mode it keeps statistics and draws random numbers; one buffer is there from the first pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().mean() if self.seen is None else self.seen + 1
        return self.last(nn.functional.dropout(self.norm(self.first(x)), 0.1, self.training))


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_and_the_random_state_are_given_back(fails: bool) -> None:
    model, passes = Noisy().double().train(), 0
    x, y = torch.randn(7, 5).double(), torch.arange(7) % 3

    def loss(_: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal passes
        passes += 1
        if fails and passes == 4:
            raise RuntimeError("the machine is out of patience")
        return CROSS_ENTROPY(model(batch[0]), batch[1])

    def state() -> list[Tensor]:
        return [torch.get_rng_state(), *(x.clone() for x in model.buffers())]

    before, objects = state(), [id(x) for x in model.buffers()]
    with pytest.raises(RuntimeError, match="patience") if fails else nullcontext():
        assert in_place_sharpness(model, [(x, y), (x + 1, y)], 0.1, loss=loss, steps=3).value > 0
    assert len(before) == 4 and passes == (4 if fails else 10) and model.seen is None
    assert all(map(torch.equal, before, state())) and objects == [id(x) for x in model.buffers()]
    CROSS_ENTROPY(model(x), y)
    assert not any(map(torch.equal, before, state())) and model.seen is not None


def test_a_backward_pass_that_leaves_no_gradients_is_an_error() -> None:
    model = vit()
    handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in model.parameters()]
    with pytest.raises(ValueError, match="the backward pass left no parameter a gradient"):
        in_place_sharpness(model, data(), 0.1, None, CROSS_ENTROPY, steps=3)
    for handle in handles:
        handle.remove()
    assert in_place_sharpness(model, data(), 0.1, None, CROSS_ENTROPY, steps=3).value > 0


@pytest.mark.parametrize(("name", "value"), [
    ("chunk_bytes", -5), ("chunk_bytes", 0), ("eps", -1.0), ("eps", float("nan")), ("process_group", "x"),
    ("process_group", 0), ("criterion", CROSS_ENTROPY),
])
def test_arguments_without_a_meaning_are_refused(name: str, value: Any) -> None:
    model = nn.Linear(2, 1)

    def measure(**arguments: Any) -> float:
        loss = lambda _, batch: model(batch).square().mean()  # noqa: E731
        return in_place_sharpness(model, [torch.ones(3, 2)], 0.1, loss=loss, steps=2, **arguments).value

    with pytest.raises(ValueError, match=f"^{name}"):
        measure(**{name: value})
    assert measure(chunk_bytes=1, eps=0.0, process_group=False) > 0


def test_mixed_precision_and_bad_input() -> None:
    model = vit(torch.float32)
    symmetry = symgeo.find_symmetry(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(data(torch.float32)[0][0])
        low = in_place_sharpness(model, data(torch.float32), 0.3, symmetry, CROSS_ENTROPY, steps=4).value
        assert torch.equal(model(data(torch.float32)[0][0]), before)  # no cast of a moved parameter is left
    high = in_place_sharpness(model, data(torch.float32), 0.3, symmetry, CROSS_ENTROPY, steps=4).value
    assert low == pytest.approx(high, rel=0.2)
    for arguments, message in (
        ({"rho": -1.0}, "rho must be"), ({"rho": 0.1, "geodesic": "round"}, "geodesic must be one of"),
        ({"rho": 0.1, "metric": "max"}, "metric must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            in_place_sharpness(model, data(torch.float32), symmetry=symmetry, criterion=CROSS_ENTROPY, **arguments)
    wrong = Symmetry({"blocks.0.attention.query.weight": "(H e) _", "blocks.0.attention.key.weight": "(H e) _"},
                     {"e": groups.GeneralLinear(per="H")}, {"H": 2})
    with pytest.raises(ValueError, match="a factor pair needs both sides"):
        in_place_sharpness(model, data(torch.float32), 0.1, wrong, CROSS_ENTROPY)
    bent = Symmetry({"blocks.0.mlp.up.weight": "h _", "blocks.0.mlp.down.weight": "_ h*"},
                    {"h": groups.GeneralLinear()})
    with pytest.raises(ValueError, match="not invariant under the declared symmetry"):
        in_place_sharpness(model, data(torch.float32), 0.1, bent, CROSS_ENTROPY)
