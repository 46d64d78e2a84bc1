"""geoopt's optimizers on these manifolds: trajectories that do not depend on the gauge."""

import copy

import geoopt
import pytest
import torch
from laws import close
from torch import Tensor, nn

from manifolds import Elementwise, FactorPair, Product, ScaleQuotient
from manifolds.momentum import seed_momentum

STEPS = 10


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


START, INPUTS, TARGETS = random(0, 12, 3), random(1, 17, 5), random(2, 17, 7)
GAUGE = torch.eye(3, dtype=torch.float64) + 0.5 * random(3, 3, 3)


def product(x: Tensor) -> Tensor:
    return x[..., :7, :] @ x[..., 7:, :].mT


def train(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """The products ``G H^T`` after each step of a least-squares fit."""
    path = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (INPUTS @ product(parameter).mT - TARGETS).square().mean().backward()
        optimizer.step()
        path.append(product(parameter).detach().clone())
    return torch.stack(path)


def drift(make, metric: str = "inv", prepare=None) -> float:
    """How far two runs from gauge-equivalent starts drift apart, relative to how far they move."""
    manifold, paths = FactorPair(7, metric), []
    for start in (START, FactorPair(7).act(START, GAUGE)):
        p = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
        optimizer = make(p)
        if prepare is not None:
            prepare(p, optimizer)
        paths.append(train(p, optimizer))
    assert float((paths[0][-1] - product(START)).norm()) > 1e-2, "the runs stand still"
    return float((paths[0] - paths[1]).norm() / (paths[0][-1] - product(START)).norm())


def sgd(**options):
    return lambda p: geoopt.optim.RiemannianSGD([p], lr=0.01, **options)


RIEMANNIAN = {
    "sgd": sgd(),
    "momentum": sgd(momentum=0.9),
    "dampened": sgd(momentum=0.9, dampening=0.5),
    "nesterov": sgd(momentum=0.9, nesterov=True),
    "adam": lambda p: geoopt.optim.RiemannianAdam([p], lr=0.05),
    "amsgrad": lambda p: geoopt.optim.RiemannianAdam([p], lr=0.05, amsgrad=True),
}


@pytest.mark.parametrize("metric", ["inv", "mix"])
@pytest.mark.parametrize("name", RIEMANNIAN)
def test_trajectories_do_not_depend_on_the_gauge(name, metric):
    assert drift(RIEMANNIAN[name], metric) < 1e-10


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_the_seed_momentum_depends_on_the_gauge(nesterov):
    """The buffer that geoopt makes by itself is the Euclidean gradient at the first step."""

    def euclidean_buffer(p, optimizer):
        (INPUTS @ product(p).mT - TARGETS).square().mean().backward()
        optimizer.state[p]["momentum_buffer"] = p.grad.clone()

    assert drift(sgd(momentum=0.9, nesterov=nesterov), prepare=euclidean_buffer) > 1e-3


def test_euclidean_optimizers_depend_on_the_gauge():
    assert drift(lambda p: torch.optim.SGD([p], lr=0.01, momentum=0.9)) > 1e-3
    assert drift(lambda p: torch.optim.Adam([p], lr=0.01)) > 1e-3


def test_seed_touches_nothing_else():
    on = geoopt.ManifoldParameter(START.clone(), manifold=FactorPair(7))
    sphere = geoopt.ManifoldParameter(torch.eye(3), manifold=geoopt.Sphere())
    plain = nn.Parameter(torch.ones(3))
    optimizers = [
        geoopt.optim.RiemannianSGD([on, sphere, plain], lr=0.1, momentum=0.9),
        geoopt.optim.RiemannianSGD([on], lr=0.1),
        geoopt.optim.RiemannianAdam([on]),
        torch.optim.SGD([on, plain], lr=0.1, momentum=0.9),
    ]
    for optimizer in optimizers:
        seed_momentum(optimizer)
    assert [len(optimizer.state) for optimizer in optimizers] == [1, 0, 0, 0]
    buffer = optimizers[0].state[on]["momentum_buffer"]
    close(buffer, torch.zeros_like(START), 0.0)
    buffer.add_(1.0)
    seed_momentum(optimizers[0])
    assert optimizers[0].state[on]["momentum_buffer"] is buffer and float(buffer.sum()) == 36


def test_sparse_sgd_is_seeded():
    p = geoopt.ManifoldParameter(random(0, 4, 3), manifold=ScaleQuotient())
    optimizer = geoopt.optim.SparseRiemannianSGD([p], lr=0.1, momentum=0.9)
    before = p.detach().clone()
    p.grad = torch.sparse_coo_tensor([[2]], random(1, 1, 3), (4, 3), check_invariants=True)
    optimizer.step()
    expected = -0.1 * ScaleQuotient().egrad2rgrad(before[2], random(1, 1, 3)[0])
    close(p.detach()[2], ScaleQuotient().expmap(before[2], expected), 1e-14)
    close(p.detach()[:2], before[:2], 0.0)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = geoopt.ManifoldParameter(START.clone(), manifold=FactorPair(7))
        parts = Product({"gain": Elementwise(), "direction": ScaleQuotient()}, {"gain": (7,), "direction": (5,)})
        self.rest, self.parts = geoopt.ManifoldParameter(random(5, 12), manifold=parts), parts

    def forward(self, x: Tensor) -> Tensor:
        rest = self.parts.unpack_tensor(self.rest)
        unit = rest["direction"] / rest["direction"].norm()
        return ((x * unit) @ product(self.pair).mT) * rest["gain"]


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(INPUTS) - TARGETS).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def test_modules_train_copy_save_and_call_functionally():
    model = Head()
    twin = copy.deepcopy(model)
    assert isinstance(twin.pair.manifold, FactorPair)
    losses = fit(model, geoopt.optim.RiemannianAdam(model.parameters(), lr=0.05), 50)
    assert losses[-1] < 0.9 * losses[0]
    assert twin.state_dict().keys() == model.state_dict().keys()
    twin.load_state_dict({k: v.detach().clone() for k, v in model.state_dict().items()})
    close(twin(INPUTS).detach(), model(INPUTS).detach(), 0.0)
    doubled = {"pair": 2 * model.pair.detach(), "rest": model.rest.detach()}
    close(torch.func.functional_call(model, doubled, (INPUTS,)), 4 * model(INPUTS).detach(), 1e-14)


@pytest.mark.parametrize("name, tol", [("momentum", 1e-13), ("adam", 1e-5)])  # Adam loads its step in float32
def test_optimizer_state_resumes(name, tol):
    make = RIEMANNIAN[name]
    whole = geoopt.ManifoldParameter(START.clone(), manifold=FactorPair(7))
    expected = train(whole, make(whole))
    first = geoopt.ManifoldParameter(START.clone(), manifold=FactorPair(7))
    optimizer = make(first)
    for _ in range(4):
        optimizer.zero_grad()
        (INPUTS @ product(first).mT - TARGETS).square().mean().backward()
        optimizer.step()
    second = geoopt.ManifoldParameter(first.detach().clone(), manifold=FactorPair(7))
    resumed = make(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    close(train(second, resumed)[: STEPS - 4], expected[4:], tol)
