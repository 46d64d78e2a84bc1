"""Normalisations, told apart by trying them: is the mean removed, is the gain stored less one, is there an eps."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from symgeo.models.structure import Norm

_TOLERANCE = 1e-4  # some compute in single precision


def norm(module: nn.Module, name: str) -> Norm | None:
    """The normalisation ``name`` of ``module``; None where it has no learned gain, or is none of the known kinds.

    Known are, with a gain g = weight or 1 + weight and a bias b or none,

        LayerNorm  g (x - mean x) / std x + b,     RMSNorm  g x / rms x + b
    """
    child = module.get_submodule(name)
    weight, bias = getattr(child, "weight", None), getattr(child, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    kind = _kind(child, weight.numel(), isinstance(bias, Tensor))
    if kind is None:
        return None
    centred, offset, scale_free = kind
    return Norm(f"{name}.weight", f"{name}.bias" if isinstance(bias, Tensor) else None, centred, offset, scale_free)


def _kind(child: nn.Module, width: int, biased: bool) -> tuple[bool, float, bool] | None:
    """(centred, offset, scale free) of the normalisation that a copy with random weights computes."""
    probe = copy.deepcopy(child).to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in probe.parameters():
            p.copy_(0.5 + torch.rand(p.shape, generator=generator, dtype=p.dtype))
        x = torch.randn(4, width, generator=generator, dtype=torch.float64)
        try:
            y, small = probe(x), probe(1e-7 * x)
        except (RuntimeError, TypeError):
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return None
        gain, shift = probe.get_parameter("weight"), probe.get_parameter("bias") if biased else torch.zeros_like(x[0])
        for centred in (True, False):
            z = x - x.mean(-1, keepdim=True) if centred else x
            z = z / (z.square().mean(-1, keepdim=True) + _eps(child)).sqrt()
            for offset in (0.0, 1.0):
                if torch.allclose(y, (gain + offset) * z + shift, atol=_TOLERANCE, rtol=_TOLERANCE):
                    return centred, offset, bool(torch.allclose(small, y, atol=_TOLERANCE, rtol=_TOLERANCE))
    return None


def _eps(child: nn.Module) -> float:
    """What it adds to the mean square, by any of the usual names."""
    found = (getattr(child, name, None) for name in ("eps", "variance_epsilon", "epsilon"))
    return float(next((x for x in found if isinstance(x, int | float)), 0.0))
