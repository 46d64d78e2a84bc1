"""Laws that every quotient manifold obeys.  Each is a function of a case and asserts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import geoopt
import pytest
import torch
from cases import ManifoldCase
from torch import Tensor


def close(a: Tensor, b: Tensor, tol: float) -> None:
    """Asserts ``|a - b| <= tol (1 + |b|)`` in the largest entry, for finite tensors."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    error = float((a - b).abs().max() / (1 + b.abs().max()))
    assert error <= tol, f"off by {error:.1e}, allowed {tol:.0e}"


def law_christoffel(case: ManifoldCase) -> None:
    """``g Gamma(u, u) = D_u (g u) - 1/2 grad g(u, u)`` with the dense metric tensor ``g`` by autograd."""
    m, x, u = case.manifold, case.x, case.ambient()

    def lower(point: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(lambda v: case.metric(point, v, u), u, create_graph=True)

    metric = torch.autograd.functional.hessian(lambda v: 0.5 * case.metric(x, v, v), u).reshape(u.numel(), -1)
    change = torch.autograd.functional.jvp(lower, x, u)[1]
    slope = torch.autograd.functional.jacobian(lambda point: 0.5 * case.metric(point, u, u), x)
    expected = torch.linalg.solve(metric, (change - slope).flatten()).reshape(u.shape)
    v = case.ambient()
    close(m.inner(x, u, v), case.metric(x, u, v), 1e-10)
    close(m.christoffel(x, u), expected, 1e-10)


def law_exponential(case: ManifoldCase) -> None:
    """The exact geodesic against fine Runge-Kutta steps of ``c'' = -Gamma(c', c')``, for any velocity."""
    for u in (case.ambient(size=0.5), case.tangent(size=0.5)):
        expected = _runge_kutta(case.manifold.christoffel, case.x, u, 400)
        close(case.manifold.expmap(case.x, u), expected, 1e-9)
        close(case.manifold.retr(case.x, u), expected, 1e-9)


def _runge_kutta(christoffel: Callable[[Tensor, Tensor], Tensor], x: Tensor, u: Tensor, steps: int) -> Tensor:
    h = 1.0 / steps
    for _ in range(steps):
        a1, v1 = -christoffel(x, u), u
        a2, v2 = -christoffel(x + h / 2 * v1, u + h / 2 * a1), u + h / 2 * a1
        a3, v3 = -christoffel(x + h / 2 * v2, u + h / 2 * a2), u + h / 2 * a2
        a4, v4 = -christoffel(x + h * v3, u + h * a3), u + h * a3
        x, u = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4), u + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
    return x


def _velocity(curve: Callable[[float], Tensor], t: float, h: float = 1e-3) -> Tensor:
    return (8 * (curve(t + h) - curve(t - h)) - (curve(t + 2 * h) - curve(t - 2 * h))) / (12 * h)


def law_speed(case: ManifoldCase) -> None:
    """A geodesic has constant speed, starts as told, and stays horizontal if it starts so."""
    m, u = case.manifold, case.tangent(size=0.7)
    curve = m.geodesic(case.x, u)
    close(curve(0.0), case.x, 1e-14)
    close(_velocity(curve, 0.0), u, 1e-8)
    for t in (0.3, 1.0):
        v = _velocity(curve, t)
        close(m.norm(curve(t), v), m.norm(case.x, u), 1e-7)
        close(m.proju(curve(t), v), v, 1e-7)


def law_projection(case: ManifoldCase) -> None:
    """The horizontal projection is idempotent, self-adjoint and kills exactly the vertical vectors."""
    m, x, u, v = case.manifold, case.x, case.ambient(), case.ambient()
    vertical, horizontal = m.vertical(x, case.algebra()), m.proju(x, u)
    assert horizontal.shape == u.shape and vertical.shape == x.shape
    close(m.proju(x, horizontal), horizontal, 1e-10)
    close(m.inner(x, horizontal, v), m.inner(x, u, m.proju(x, v)), 1e-10)
    close(m.inner(x, horizontal, vertical), torch.zeros((), dtype=x.dtype), 1e-10)
    close(m.proju(x, vertical), torch.zeros_like(x), 1e-10)


def law_vertical(case: ManifoldCase) -> None:
    """Vertical vectors do not move what the group leaves alone."""
    x = case.x
    _, change = torch.func.jvp(case.invariant, (x,), (case.manifold.vertical(x, case.algebra()),))
    close(change, torch.zeros_like(change), 1e-12)


def law_gradient(case: ManifoldCase) -> None:
    """``<grad f, u>_x = df(u)`` for horizontal ``u``, and the gradient is horizontal."""
    m, x, u = case.manifold, case.x, case.tangent()
    covector = case.ambient(size=1.0)
    gradient = m.egrad2rgrad(x, covector)
    close(m.inner(x, gradient, u), (covector * u).sum(), 1e-10)
    close(m.proju(x, gradient), gradient, 1e-10)


def law_taylor2(case: ManifoldCase) -> None:
    """The second-order geodesic has a third-order error, and the straight line a second-order one (or none)."""
    m, u = case.manifold, case.ambient(size=1.0)
    for method, order in (("taylor2", 3), ("linear", 2)):
        errors = [float((m.geodesic(case.x, u, method)(t) - m.geodesic(case.x, u)(t)).norm()) for t in (0.02, 0.01)]
        slope = math.log2(errors[0] / errors[1]) if errors[0] > 1e-14 else math.inf
        assert abs(slope - order) < 0.2 or max(errors) < 1e-14, (method, slope, errors)


def law_methods(case: ManifoldCase) -> None:
    """An unknown geodesic is refused by name."""
    with pytest.raises(ValueError, match="'cubic'"):
        case.manifold.geodesic(case.x, case.tangent(), "cubic")


def law_logarithm(case: ManifoldCase) -> None:
    """``log(exp(u)) = u`` for horizontal ``u``; ``dist`` is its length, symmetric, and one of orbits."""
    m, x, u = case.manifold, case.x, case.tangent(size=0.3)
    y = m.expmap(x, u)
    close(m.logmap(x, y), u, 1e-8)
    close(m.dist(x, y), m.norm(x, u), 1e-8)
    close(m.dist(y, x), m.norm(x, u), 1e-8)
    close(m.dist(case.act(x), case.act(y)), m.norm(x, u), 1e-8)
    close(m.dist(x, x), torch.zeros((), dtype=x.dtype), 1e-7)
    close(case.invariant(m.expmap(x, m.logmap(x, y))), case.invariant(y), 1e-8)


def law_isometry(case: ManifoldCase) -> None:
    """The group acts by isometries that carry geodesics, projections and connection along."""
    m, x, u, v = case.manifold, case.x, case.ambient(), case.ambient()
    gx, gu, gv = case.act(x), case.act(u), case.act(v)
    assert float((gx - x).norm() / x.norm()) > 1e-3
    close(m.inner(gx, gu, gv), m.inner(x, u, v), 1e-12)
    close(m.proju(gx, gu), case.act(m.proju(x, u)), 1e-10)
    close(m.christoffel(gx, gu), case.act(m.christoffel(x, u)), 1e-10)
    for method in ("exact", "taylor2", "linear"):
        close(m.geodesic(gx, gu, method)(1.0), case.act(m.geodesic(x, u, method)(1.0)), 1e-9)
    moved = m.inner(case.control(x), case.control(u), case.control(v))
    assert abs(float(moved - m.inner(x, u, v))) > 1e-3 * 0.09, "the negative control is an isometry too"


def law_transport(case: ManifoldCase) -> None:
    """Transport gives horizontal vectors, linearly, and the identity when the point stays."""
    m, x, u, v = case.manifold, case.x, case.tangent(), case.tangent()
    y = m.expmap(x, u)
    close(m.proju(y, m.transp(x, y, v)), m.transp(x, y, v), 1e-10)
    close(m.transp(x, y, 2 * v - u), 2 * m.transp(x, y, v) - m.transp(x, y, u), 1e-10)
    close(m.transp(x, x, v), v, 1e-10)


def law_batched(case: ManifoldCase) -> None:
    """Leading dimensions give what a loop gives, and ``keepdim`` keeps the point's dimensions."""
    m = case.manifold
    x = torch.stack([case.points(2), case.points(2), case.points(2)])  # (3, 2, ...)
    u, v = case.tangent(x), case.ambient(x)
    y = m.expmap(x, u)
    assert m.inner(x, u, keepdim=True).shape == (3, 2) + (1,) * m.ndim
    calls = (
        (m.inner, (x, u, v)), (m.norm, (x, u)), (m.proju, (x, v)), (m.egrad2rgrad, (x, v)), (m.expmap, (x, u)),
        (m.christoffel, (x, v)), (m.logmap, (x, y)), (m.dist, (x, y)), (m.transp, (x, y, u)), (m.projx, (x,)),
    )  # fmt: skip
    for method, arguments in calls:
        loop = [[method(*(a[i, j] for a in arguments)) for j in range(2)] for i in range(3)]
        close(method(*arguments), torch.stack([torch.stack(row) for row in loop]), 1e-9)


def law_derivatives(case: ManifoldCase) -> None:
    """The exponential map has right first and second derivatives at ``u = 0`` and elsewhere."""
    weight = case.ambient(size=1.0)
    for u in (torch.zeros_like(case.x), case.tangent(size=0.2)):
        u = u.requires_grad_()
        x = case.x.clone().requires_grad_()
        assert torch.autograd.gradcheck(case.manifold.expmap, (x, u))
        assert torch.autograd.gradgradcheck(lambda u: (weight * case.manifold.expmap(case.x, u)).sum(), (u,))


def law_dtype(case: ManifoldCase) -> None:
    """Single precision in, single precision out, close to double."""
    m, x, u = case.manifold, case.x, case.tangent()
    y = m.expmap(x, u)
    single = [a.float() for a in (x, y, u)]
    calls = (m.inner, (0, 2)), (m.proju, (0, 2)), (m.expmap, (0, 2)), (m.logmap, (0, 1)), (m.dist, (0, 1))
    for method, pick in calls:
        out = method(*(single[i] for i in pick))
        assert out.dtype == torch.float32
        close(out.double(), method(*((x, y, u)[i] for i in pick)), 1e-4)


def law_optimizer(case: ManifoldCase) -> None:
    """geoopt's optimizers bring the loss down on a ``ManifoldParameter``."""
    target = case.invariant(case.manifold.expmap(case.x, case.tangent(size=0.5)))
    optimizers = (
        lambda p: geoopt.optim.RiemannianAdam([p], lr=0.02),
        lambda p: geoopt.optim.RiemannianSGD([p], lr=1e-3, momentum=0.9),
    )
    for make in optimizers:
        p = geoopt.ManifoldParameter(case.x.clone(), manifold=case.manifold)
        optimizer, losses = make(p), []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (case.invariant(p) - target).square().sum()
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
        assert losses[-1] < 0.7 * losses[0], losses


def law_module(case: ManifoldCase) -> None:
    """Copies keep the manifold, and the state of a module loads into another."""
    p = geoopt.ManifoldParameter(case.x.clone(), manifold=case.manifold)
    other = copy.deepcopy(p)
    assert type(other.manifold) is type(case.manifold)
    close(other.manifold.inner(other, other).detach(), case.manifold.inner(case.x, case.x), 1e-14)
    case.manifold.assert_check_point_on_manifold(case.x)
    case.manifold.assert_check_vector_on_tangent(case.x, case.tangent())


LAWS = (
    law_christoffel, law_exponential, law_speed, law_projection, law_vertical, law_gradient, law_taylor2,
    law_methods, law_logarithm, law_isometry, law_transport, law_batched, law_derivatives, law_dtype,
    law_optimizer, law_module,
)  # fmt: skip
