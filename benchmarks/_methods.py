"""The optimizers that are compared.  A new one is a builder and a line in ``METHODS``.

A builder gets the model, the matrices of its blocks by name, and the learning rate, and returns an optimizer of
these; parameters that the optimizer does not hold are stepped by the AdamW that all methods share.
"""

from __future__ import annotations

from importlib.util import find_spec

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


def adamw_default(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """AdamW of torch for the whole model, in the implementation that it chooses on a CPU: a loop over parameters."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)


def heavyball_soap(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """SOAP of HeavyBall, not compiled, renewed every 10 steps."""
    import heavyball

    heavyball.utils.compile_mode = None
    return heavyball.SOAP(list(matrices.values()), lr=lr, precondition_frequency=10)


def muon(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """Muon of torch."""
    return torch.optim.Muon(matrices.values(), lr=lr, weight_decay=0.0)


def shampoo_half(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """Shampoo with exponent 1/2 on each side."""
    return GraftedShampoo(matrices.values(), lr=lr)


def shampoo_tuned(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """The same with the settings of `symo_shampoo`."""
    return GraftedShampoo(matrices.values(), lr=lr, betas=(0.9, 0.95), every=5, nesterov=True)


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


def symo_soap(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """SymO, the pair of both sides with corrected eigenvalues: SOAP."""
    return _corrected(model, matrices, lr, "frobenius")


def symo_kl_soap(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """SymO, the pair fitted in the Kullback-Leibler divergence with corrected eigenvalues: KL-SOAP."""
    return _corrected(model, matrices, lr, "kl")


def _corrected(model: TinyLM, matrices: Matrices, lr: float, divergence: str) -> SymO:
    pair = presets.shampoo(model, exclude=["position"])
    return SymO(matrices.items(), pair, lr, betas=(0.95, 0.95), damping=1e-10, update_every=10, divergence=divergence,
                corrected=True)


def one_sided_plain(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """SymO, one side with memory, without graft."""
    return SymO(matrices.items(), presets.muon(model, exclude=["position"]), lr, damping=1e-6, update_every=10)


def shampoo_every_10(model: TinyLM, matrices: Matrices, lr: float) -> torch.optim.Optimizer:
    """SymO, the pair of both sides, renewed as rarely as the peers, without graft."""
    return SymO(matrices.items(), presets.shampoo(model, exclude=["position"]), lr, damping=1e-6, update_every=10)


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
    "shampoo_tuned": Method(
        shampoo_tuned, rates(6e-3), "exponent 1/2 each side, Adam graft, betas 0.9, 0.95, nesterov, eigh every 5"),
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
    "symo_soap": Method(
        symo_soap, rates(4e-3), "preset shampoo, corrected, betas 0.95, 0.95, damping 1e-10, eigh every 10"),
    "symo_kl_soap": Method(
        symo_kl_soap, rates(4e-3), "preset shampoo, corrected, divergence kl, betas 0.95, 0.95, damping 1e-10, eigh"
        " every 10"),
}

# what is only timed: AdamW as most people run it, presets without graft, and a peer where it is installed
# (``pip install heavyball``)
TIMED: dict[str, Method] = {
    "adamw_default": Method(adamw_default, rates(1e-3), "torch.optim.AdamW, betas 0.9, 0.99, whole model"),
    "symo_one_sided, no graft": Method(one_sided_plain, rates(1e-4), "preset muon, eigh every 10"),
    "symo_shampoo, no graft": Method(shampoo_every_10, rates(1e-4), "preset shampoo, eigh every 10"),
}
if find_spec("heavyball"):
    TIMED["heavyball_soap"] = Method(heavyball_soap, rates(3e-3), "heavyball.SOAP, not compiled, qr every 10")
