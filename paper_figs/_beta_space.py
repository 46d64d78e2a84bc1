"""Sharpness of diagonal linear nets u * v = beta for any data, maximised numerically over beta.

The loss L(beta) = |X beta - y|^2 / n and the geodesics from beta0 depend on the product only, so that the search
over perturbations of (u, v) is one over a d-dimensional set around beta0. "mix" is the geodesic as it is, which
ends where a coordinate of beta reaches zero. "mix_taylor2" replaces it by the polynomial of second order that
the paper's algorithm follows, and with it leaves the domain of the geodesic where a coordinate is small.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def loss(beta: Array, x: Array, y: Array) -> Array:
    """|X beta - y|^2 / n over the last axis of beta (..., d), with X (n, d) and y (n,)."""
    value: Array = np.mean((beta @ x.T - y) ** 2, axis=-1)
    return value


def gradient(beta: Array, x: Array, y: Array) -> Array:
    """2 X^T (X beta - y) / n, of the shape of beta (..., d)."""
    value: Array = 2 * (beta @ x.T - y) @ x / len(y)
    return value


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
    """Geodesic sharpness, metric mix: the same over |d| <= sqrt(2) rho with beta0 + d in the orthant of beta0."""

    def rise(d: Array) -> tuple[Array, Array]:
        return loss(beta0 + d, x, y), gradient(beta0 + d, x, y)

    radius = float(np.sqrt(2) * rho)

    def farthest(g: Array) -> Array:
        return _to_orthant(g, beta0, radius)

    return _maximise(rise, farthest, farthest(_starts(len(beta0), radius, starts, seed)))


def mix_taylor2(beta0: Array, x: Array, y: Array, rho: float, starts: int = 8, seed: int = 0) -> float:
    """Sharpness along u (1 + b - b^2 / 2), v likewise: the mix geodesic sqrt(1 + 2 b) to second order.

    The ball is |beta0 b| <= rho / sqrt(2): b is unbounded where beta0 is zero, and the polynomial explodes.
    """
    if not np.all(beta0):
        raise ValueError("beta0: needed no zero coordinate, where the mix metric is degenerate")

    def rise(z: Array) -> tuple[Array, Array]:
        b = z / beta0
        bend = 1 + b - b**2 / 2
        beta = beta0 * bend**2
        return loss(beta, x, y), gradient(beta, x, y) * 2 * bend * (1 - b)

    radius = float(rho / np.sqrt(2))
    axes = radius * np.eye(len(beta0))
    points = np.concatenate([axes, -axes, _starts(len(beta0), radius, starts, seed)])
    return _maximise(rise, lambda g: _to_sphere(g, radius), points)


def _starts(size: int, radius: float, starts: int, seed: int) -> Array:
    draws = np.random.default_rng(seed).standard_normal((starts, size))
    return _to_sphere(np.concatenate([draws, -draws]), radius)


def _to_sphere(direction: Array, radius: float) -> Array:
    length = np.linalg.norm(direction, axis=-1, keepdims=True)
    scaled: Array = radius * direction / np.maximum(length, 1e-300)
    return scaled


def _to_orthant(direction: Array, beta0: Array, radius: float) -> Array:
    """argmax of <direction, d> over |d| <= radius, beta0 and beta0 + d of one sign, by bisection on a factor."""
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
        shift = np.where(better, 0.7 * shift, np.clip(2 * shift, 0.1 * scale, 1e8 * scale))
        gain = np.max(new_height - height)
        points, slope = np.where(better, proposal, points), np.where(better, new_slope, slope)
        height = np.where(better[:, 0], new_height, height)
        if not better.any() and np.all(shift > 1e6 * scale):
            break
        if 0 < gain < 1e-15 * np.max(np.abs(height)):
            break
    return float(max(height.max() - origin, 0.0))
