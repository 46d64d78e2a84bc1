"""Closed forms for the two small networks of "Hide & Seek" (arXiv 2505.05409), with its factors corrected.

**The scalar net** f = theta1 theta2 with loss (p - y)^2, p = theta1 theta2, has the metrics

    inv:  xi1^2 / theta1^2 + xi2^2 / theta2^2          mix:  theta2^2 xi1^2 + theta1^2 xi2^2.

**The diagonal net** f(x) = <x, u * v> has beta = u * v and loss L(beta) = |X beta - y|^2 / n. Its horizontal
tangents are xi = (u b, v b), so that |xi|^2 = 2 |b|^2 (inv) and 2 |beta0 b|^2 (mix), and its geodesics are

    inv:  beta(t) = beta0 exp(2 b t)          mix:  beta(t) = beta0 (1 + 2 b t)   while 1 + 2 b t > 0.

The ball |xi| <= rho is therefore |b| <= rho / sqrt(2) for inv (the paper prints |b| <= rho in its equation 8), and
|beta - beta0| <= sqrt(2) rho within the orthant of beta0 for mix.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def scalar_net(theta1: Array, theta2: Array, y: float) -> dict[str, Array]:
    """Gradient norms and Hessian traces of (theta1 theta2 - y)^2, elementwise over the grid.

        |grad|^2      Euclidean 4 (p - y)^2 (theta1^2 + theta2^2),   inv 8 p^2 (p - y)^2,   mix 8 (p - y)^2
        trace Hess    Euclidean 2 (theta1^2 + theta2^2),             inv 8 p^2 - 4 p y,     mix 4

    The inv trace is the Laplace-Beltrami operator, equal to the trace over the horizontal direction, since the
    orbits are geodesics. The mix trace is the horizontal one: |xi|^2 = dp^2 / 2, and 2 d^2L/dp^2 = 4.
    """
    p, squares = theta1 * theta2, theta1**2 + theta2**2
    return {
        "euclidean gradient norm": 2 * np.abs(p - y) * np.sqrt(squares),
        "inv gradient norm": np.sqrt(8) * np.abs(p * (p - y)),
        "mix gradient norm": np.sqrt(8) * np.abs(p - y),
        "euclidean hessian trace": 2 * squares,
        "inv hessian trace": 8 * p**2 - 4 * p * y,
        "mix hessian trace": np.full_like(p, 4.0),
    }


def loss(beta: Array, x: Array, y: Array) -> Array:
    """|X beta - y|^2 / n over the last axis of beta (..., d), with X (n, d) and y (n,)."""
    value: Array = np.mean((beta @ x.T - y) ** 2, axis=-1)
    return value


def gradient(beta: Array, x: Array, y: Array) -> Array:
    """2 X^T (X beta - y) / n, of the shape of beta (..., d)."""
    value: Array = 2 * (beta @ x.T - y) @ x / len(y)
    return value


def mix_orthonormal(beta0: Array, target: Array, rho: float) -> float:
    """Exact mix sharpness of |beta - target|^2 where no coordinate crosses zero:

    S = max over |d| <= sqrt(2) rho of |beta0 + d - target|^2 - |beta0 - target|^2
      = 2 sqrt(2) rho |beta0 - target| + 2 rho^2.
    """
    return float(2 * np.sqrt(2) * rho * np.linalg.norm(beta0 - target) + 2 * rho**2)


def inv_second_order(beta0: Array, target: Array, rho: float) -> float:
    """Inv sharpness of |beta - target|^2 to second order in b: a trust region, solved by its secular equation.

    S2 = max over |b| <= rho / sqrt(2) of 4 <b, r> + 4 <b, D b>,  r = beta0 (beta0 - target),
    D = beta0 (2 beta0 - target).
    """
    linear, curvature = 4 * beta0 * (beta0 - target), 4 * beta0 * (2 * beta0 - target)
    return trust_region(linear, curvature, rho / np.sqrt(2))


def trust_region(linear: Array, curvature: Array, radius: float) -> float:
    """max of <linear, b> + sum curvature b^2 over |b| <= radius.

    The maximiser is b = linear / (2 (mu - curvature)) with mu >= max(curvature, 0) and mu (radius - |b|) = 0; mu
    is the root of |b(mu)| = radius. In the hard case (no root above the largest curvature) the rest of the
    radius goes along that coordinate.
    """
    least = max(float(curvature.max()), 0.0)
    gap = np.linalg.norm(linear) / (2 * radius)  # |b(least + gap)| <= radius
    low, high = least + 1e-14 * max(gap, least, 1e-300), least + gap + 1e-300
    for _ in range(200):
        middle = (low + high) / 2
        too_long = np.linalg.norm(linear / (2 * (middle - curvature))) > radius
        low, high = (middle, high) if too_long else (low, middle)
    b = linear / (2 * (high - curvature))
    rest = radius**2 - b @ b
    spare = least * rest if curvature.max() > 0 and rest > 0 else 0.0
    return float(linear @ b + curvature @ b**2 + spare)


def mix_unbounded(beta0: Array, x: Array, y: Array, rho: float) -> float:
    """Mix sharpness for any X if signs could change: the trust region |d| <= sqrt(2) rho of a quadratic.

    With zero train loss this is 2 rho^2 lambda_max(X^T X / n), the same for every interpolating net.
    """
    eigenvalues, vectors = np.linalg.eigh(x.T @ x / len(y))
    return trust_region(vectors.T @ gradient(beta0, x, y), eigenvalues, float(np.sqrt(2) * rho))


def adaptive(beta0: Array, x: Array, y: Array, rho: float, starts: int = 8, seed: int = 0) -> float:
    """Adaptive sharpness: max of L(beta0 (1 + a)(1 + c)) - L(beta0) over |a|^2 + |c|^2 <= rho^2."""

    def rise(z: Array) -> tuple[Array, Array]:
        a, c = np.split(z, 2, axis=-1)
        beta = beta0 * (1 + a) * (1 + c)
        slope = gradient(beta, x, y) * beta0
        return loss(beta, x, y), np.concatenate([slope * (1 + c), slope * (1 + a)], axis=-1)

    radius = float(rho)
    return _maximise(rise, lambda g: _to_sphere(g, radius), _starts(2 * len(beta0), radius, starts, seed))


def inv(beta0: Array, x: Array, y: Array, rho: float, starts: int = 8, seed: int = 0) -> float:
    """Geodesic sharpness, metric inv: max of L(beta0 e^{2b}) - L(beta0) over |b| <= rho / sqrt(2)."""

    def rise(b: Array) -> tuple[Array, Array]:
        beta = beta0 * np.exp(2 * b)
        return loss(beta, x, y), 2 * beta * gradient(beta, x, y)

    radius = float(rho / np.sqrt(2))
    return _maximise(rise, lambda g: _to_sphere(g, radius), _starts(len(beta0), radius, starts, seed))


def mix(beta0: Array, x: Array, y: Array, rho: float, starts: int = 8, seed: int = 0) -> float:
    """Geodesic sharpness, metric mix: sup of L(beta0 + d) - L(beta0) over |d| <= sqrt(2) rho in beta0's orthant."""

    def rise(d: Array) -> tuple[Array, Array]:
        return loss(beta0 + d, x, y), gradient(beta0 + d, x, y)

    radius = float(np.sqrt(2) * rho)

    def farthest(g: Array) -> Array:
        return _to_orthant(g, beta0, radius)

    return _maximise(rise, farthest, farthest(_starts(len(beta0), radius, starts, seed)))


def _starts(size: int, radius: float, starts: int, seed: int) -> Array:
    draws = np.random.default_rng(seed).standard_normal((starts, size))
    return _to_sphere(np.concatenate([draws, -draws]), radius)


def _to_sphere(direction: Array, radius: float) -> Array:
    length = np.linalg.norm(direction, axis=-1, keepdims=True)
    scaled: Array = radius * direction / np.maximum(length, 1e-300)
    return scaled


def _to_orthant(direction: Array, beta0: Array, radius: float) -> Array:
    """argmax of <direction, d> over |d| <= radius with beta0 and beta0 + d of one sign: max(m direction, -beta0)."""
    sign = np.where(beta0 < 0, -1.0, 1.0)
    outward, room = direction * sign, -np.abs(beta0)
    low, high = np.zeros((len(direction), 1)), np.full((len(direction), 1), 1e12)
    for _ in range(120):
        middle = np.sqrt(np.maximum(low, 1e-12) * high)
        too_long = np.linalg.norm(np.maximum(middle * outward, room), axis=-1, keepdims=True) > radius
        low, high = np.where(too_long, low, middle), np.where(too_long, middle, high)
    farthest: Array = sign * np.maximum(low * outward, room)
    return farthest


def _maximise(
    rise: Callable[[Array], tuple[Array, Array]],
    farthest: Callable[[Array], Array],
    points: Array,
    iterations: int = 2000,
) -> float:
    """Best rise over the starts by the shifted power iteration z <- farthest(gradient + shift z).

    It increases the function once the shift exceeds the largest negative curvature, so the shift of a start
    grows whenever its step would lose height. The origin of every search set is no perturbation.
    """
    origin = rise(np.zeros_like(points[:1]))[0][0]
    height, slope = rise(points)
    shift = np.zeros((len(points), 1))
    for _ in range(iterations):
        proposal = farthest(slope + shift * points)
        new_height, new_slope = rise(proposal)
        better = (new_height > height)[:, None]
        scale = np.linalg.norm(slope, axis=-1, keepdims=True) / np.linalg.norm(points, axis=-1, keepdims=True)
        shift = np.where(better, 0.7 * shift, np.maximum(2 * shift, 0.1 * scale))
        gain = np.max(new_height - height)
        points, slope = np.where(better, proposal, points), np.where(better, new_slope, slope)
        height = np.where(better[:, 0], new_height, height)
        if not better.any() and np.all(shift > 1e6 * scale):
            break
        if 0 < gain < 1e-15 * np.max(np.abs(height)):
            break
    return float(max(height.max() - origin, 0.0))
