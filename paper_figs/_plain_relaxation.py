"""Sharpness in the metric inv with the Gram matrices of each factor relaxed to M + eps I, as it is in print.

This relaxation keeps orthogonal gauge changes only, so the package does not have it: the package's own adds eps I in
the balanced gauge (M + eps (M_G # M_H^-1) elsewhere). Curves are straight lines, which both relaxations allow.
"""

import torch
from torch import Tensor

from symgeo import ParameterManifold
from symgeo.functional import Params
from symgeo.sharpness.ascent import auto_pgd
from symgeo.study import Candidate


class PlainChart:
    """Orthonormal coordinates at parameters as they are given, for

        <u, v> = sum_pairs Tr((M_G + eps I)^-1 u_G^T v_G) + Tr((M_H + eps I)^-1 u_H^T v_H) + sum_i u_i v_i / w_i^2.

    A pair has the coordinates z = u (M + eps I)^(-1/2) on either side.  The horizontal space is the orthogonal
    complement of the vectors (G L, -H L^T), of which ``vertical`` is an orthonormal basis.
    """

    def __init__(self, params: Params, manifold: ParameterManifold, eps: float) -> None:
        self.params, self.manifold = params, manifold
        self.packed = manifold.pack(params)
        self.sizes = {name: tensor.numel() for name, tensor in self.packed.items()}
        self.roots: dict[str, tuple[Tensor, Tensor]] = {}
        self.vertical: dict[str, Tensor] = {}
        for name, pair in manifold.pairs.items():
            sides = self.packed[name][:, : pair.rows], self.packed[name][:, pair.rows :]
            g_root, h_root = (_root(side.mT @ side + eps * torch.eye(side.shape[-1]).to(side)) for side in sides)
            self.roots[name] = g_root, h_root
            self.vertical[name] = _vertical(*sides, torch.linalg.inv(g_root), torch.linalg.inv(h_root))

    def project(self, z: Tensor) -> Tensor:
        """The horizontal part."""
        pieces = self._pieces(z)
        for name, basis in self.vertical.items():
            flat = pieces[name].flatten(1).unsqueeze(-1)
            pieces[name] = (flat - basis @ (basis.mT @ flat)).reshape(pieces[name].shape)
        return torch.cat([piece.reshape(-1) for piece in pieces.values()])

    def point(self, z: Tensor) -> Params:
        """The end of the straight line with the velocity ``z``."""
        pieces = self._pieces(z)
        moved = {"rest": self.packed["rest"] * (1 + pieces["rest"])}
        for name, (g_root, h_root) in self.roots.items():
            rows = self.manifold.pairs[name].rows
            step = torch.cat([pieces[name][:, :rows] @ g_root, pieces[name][:, rows:] @ h_root], dim=1)
            moved[name] = self.packed[name] + step
        return self.manifold.unpack(moved, self.params)

    def _pieces(self, z: Tensor) -> dict[str, Tensor]:
        flat = zip(self.sizes, z.split(list(self.sizes.values())))
        return {name: piece.view_as(self.packed[name]) for name, piece in flat}


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT


def _vertical(g: Tensor, h: Tensor, g_weight: Tensor, h_weight: Tensor) -> Tensor:
    """An orthonormal basis (pairs, (n + m) h, h^2) of the vertical space, in coordinates."""
    size = g.shape[-1]
    units = torch.eye(size * size, dtype=g.dtype).view(-1, 1, size, size)
    vectors = torch.cat([g @ units @ g_weight, -(h @ units.mT) @ h_weight], dim=-2)  # (h^2, pairs, n + m, h)
    return torch.linalg.qr(vectors.flatten(2).permute(1, 2, 0)).Q


def plain_sharpness(candidate: Candidate, manifold: ParameterManifold, eps: float, rho: float, steps: int) -> float:
    """The largest increase of the loss along straight lines of length ``rho``, by the package's search."""
    chart, batch = PlainChart(candidate.params, manifold, eps), candidate.batches[0]

    def objective(z: Tensor) -> tuple[float, Tensor]:
        z = z.detach().requires_grad_()
        value = candidate.loss(chart.point(z), batch)
        return float(value.detach()), chart.project(torch.autograd.grad(value, z)[0])

    start = torch.zeros(sum(chart.sizes.values()), dtype=chart.packed["rest"].dtype)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return chart.project(torch.randn(start.shape, generator=generator, dtype=start.dtype))

    found = auto_pgd(objective, start, rho, steps, draw)
    return found.value - found.history[0]
