"""The optimizers that are compared.  A new one is a builder and a line in ``METHODS``.

A builder gets the model, the matrices of its blocks by name, and the learning rate, and returns an optimizer of
these; parameters that the optimizer does not hold are stepped by the AdamW that all methods share.
"""

from __future__ import annotations

import torch
from _baselines import SOAP, GraftedShampoo, KLShampoo
from _protocol import Method
from torch import nn

from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets

Matrices = dict[str, nn.Parameter]


def adamw(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """AdamW of torch, its fastest implementation."""
    return torch.optim.AdamW(matrices.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def adamw_loop(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """AdamW of torch, the implementation it chooses on a CPU."""
    return torch.optim.AdamW(matrices.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)


def muon(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """Muon of torch."""
    return torch.optim.Muon(matrices.values(), lr=lr, weight_decay=0.0)


def shampoo_half(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """Shampoo with exponent 1/2 on each side."""
    return GraftedShampoo(matrices.values(), lr=lr)


def shampoo_quarter(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """Shampoo with exponent 1/4 on each side."""
    return GraftedShampoo(matrices.values(), lr=lr, exponent=0.25)


def soap(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """SOAP with its authors' defaults."""
    return SOAP(matrices.values(), lr=lr)


def kl_shampoo(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """KL-Shampoo."""
    return KLShampoo(matrices.values(), lr=lr)


def symo_muon(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """SymO, one side without memory: Muon with exact polar factors."""
    symmetry = presets.muon(model, exclude=["position"])
    return SymO(matrices.items(), symmetry, lr, betas=(0.95, 0.0), damping=1e-9, nesterov=True)


def symo_one_sided(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """SymO, one side with memory: one-sided Shampoo."""
    symmetry = presets.muon(model, exclude=["position"])
    return SymO(matrices.items(), symmetry, lr, damping=1e-6, update_every=10, graft="adam")


def symo_shampoo(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """SymO, the pair of both sides."""
    pair = presets.shampoo(model, exclude=["position"])
    return SymO(matrices.items(), pair, lr, betas=(0.9, 0.95), damping=1e-6, update_every=5, nesterov=True, power=1.0,
                graft="adam")


def rates(centre: float) -> tuple[float, ...]:
    """Five learning rates around the middle one, a factor of 2 apart.

    >>> rates(0.002)
    (0.0005, 0.001, 0.002, 0.004, 0.008)
    """
    return tuple(centre * 2.0**power for power in range(-2, 3))


REFERENCE = "adamw"

METHODS: dict[str, Method] = {
    "adamw": Method(adamw, rates(1e-3), "torch.optim.AdamW, fused, betas 0.9, 0.99"),
    "muon": Method(muon, rates(1e-2), "torch.optim.Muon, momentum 0.95, nesterov"),
    "shampoo_half": Method(
        shampoo_half, rates(4e-3), "exponent 1/2 each side, Adam graft, betas 0.9, 0.99, eigh every 10"),
    "shampoo_quarter": Method(
        shampoo_quarter, rates(4e-3), "exponent 1/4 each side, Adam graft, betas 0.9, 0.99, eigh every 10"),
    "soap": Method(soap, rates(4e-3), "betas 0.95, 0.95, qr every 10"),
    "kl_shampoo": Method(kl_shampoo, rates(4e-3), "betas 0.95, 0.95, qr every 10"),
    "symo_muon": Method(symo_muon, rates(1e-3), "preset muon, betas 0.95, 0, damping 1e-9, nesterov"),
    "symo_one_sided": Method(
        symo_one_sided, rates(4e-3), "preset muon, betas 0.9, 0.99, damping 1e-6, Adam graft, eigh every 10"),
    "symo_shampoo": Method(
        symo_shampoo, rates(6e-3), "preset shampoo, betas 0.9, 0.95, damping 1e-6, power 1, Adam graft, nesterov, eigh"
        " every 5"),
}

# what is only timed: the same trajectory as a method above, at another cost
TIMED: dict[str, Method] = {"adamw_loop": Method(adamw_loop, rates(1e-3), "torch.optim.AdamW, betas 0.9, 0.99")}
