"""Closed forms for the two small networks of "Hide & Seek" (arXiv 2505.05409), with its factors corrected.

**The scalar net** f = theta1 theta2 with loss (p - y)^2, p = theta1 theta2, has the metrics

    inv:  xi1^2 / theta1^2 + xi2^2 / theta2^2          mix:  theta2^2 xi1^2 + theta1^2 xi2^2.

**The diagonal net** f(x) = <x, u * v> has beta = u * v and loss L(beta). Its horizontal tangents are
xi = (u b, v b), so that |xi|^2 = 2 |b|^2 (inv) and 2 |beta0 b|^2 (mix), and its geodesics are

    inv:  beta(t) = beta0 exp(2 b t)          mix:  beta(t) = beta0 (1 + 2 b t)   while 1 + 2 b t > 0.

The ball |xi| <= rho is therefore |b| <= rho / sqrt(2) for inv (the paper prints |b| <= rho in its equation 8),
and |beta - beta0| <= sqrt(2) rho within the orthant of beta0 for mix.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def scalar_net(theta1: Array, theta2: Array, y: float) -> dict[str, Array]:
    """Gradient norms and Hessian traces of (theta1 theta2 - y)^2, elementwise over the grid.

        |grad|^2      Euclidean 4 (p - y)^2 (theta1^2 + theta2^2),   inv 8 p^2 (p - y)^2,   mix 8 (p - y)^2
        trace Hess    Euclidean 2 (theta1^2 + theta2^2),             inv 8 p^2 - 4 p y,     mix 4

    The inv trace is the Laplace-Beltrami operator, equal to the trace over the horizontal direction, since
    the orbits are geodesics. The mix trace is the horizontal one: |xi|^2 = dp^2 / 2, and 2 d^2L/dp^2 = 4.
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


def mix_orthonormal(beta0: Array, target: Array, rho: float) -> float:
    """Exact mix sharpness of |beta - target|^2 where no coordinate crosses zero:

    S = max over |d| <= sqrt(2) rho of |beta0 + d - target|^2 - |beta0 - target|^2
      = 2 sqrt(2) rho |beta0 - target| + 2 rho^2.
    """
    return float(2 * np.sqrt(2) * rho * np.linalg.norm(beta0 - target) + 2 * rho**2)


def inv_second_order(beta0: Array, target: Array, rho: float) -> float:
    """Inv sharpness of |beta - target|^2 to second order in b, by the secular equation of a trust region:

    S2 = max over |b| <= rho / sqrt(2) of 4 <b, r> + 4 <b, D b>,  r = beta0 (beta0 - target),
    D = beta0 (2 beta0 - target).
    """
    linear, curvature = 4 * beta0 * (beta0 - target), 4 * beta0 * (2 * beta0 - target)
    return trust_region(linear, curvature, rho / np.sqrt(2))


def trust_region(linear: Array, curvature: Array, radius: float) -> float:
    """max of <linear, b> + sum curvature b^2 over |b| <= radius.

    The maximiser is b = linear / (2 (mu - curvature)) with mu >= max(curvature, 0) and mu (radius - |b|) = 0;
    mu is the root of |b(mu)| = radius. In the hard case (no root above the largest curvature) the rest of the
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
    """Mix sharpness of |X beta - y|^2 / n if signs could change: a trust region |d| <= sqrt(2) rho.

    With zero train loss this is 2 rho^2 lambda_max(X^T X / n), the same for every interpolating net.
    """
    eigenvalues, vectors = np.linalg.eigh(x.T @ x / len(y))
    slope = 2 * x.T @ (x @ beta0 - y) / len(y)
    return trust_region(vectors.T @ slope, eigenvalues, float(np.sqrt(2) * rho))
