"""Which parameters the presets take, how they name their groups, and that true symmetries are true."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import symgeo
from symgeo import SymmetryError
from symgeo.curvature import Decomposition
from symgeo.functional import functional_loss
from symgeo.groups import Orthogonal, SignFlip
from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets


def test_matrices_are_neither_embeddings_nor_tied_to_them_nor_heads() -> None:
    for tie in (False, True):
        lm = TinyLM(width=6, heads=2, mlp_width=7, depth=1, tie=tie)
        found = presets.muon(lm, exclude=["position"]).tensors
        linear = {f"blocks.0.{name}.weight" for name in (
            "attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")}
        assert found.keys() == linear
    for name in ("lm_head", "classifier", "score", "head"):
        assert presets.muon(nn.ModuleDict({name: nn.Linear(3, 5), "body": nn.Linear(3, 5)})).tensors.keys() == {
            "body.weight"}
    assert presets.muon(nn.ModuleDict({"classifier": nn.Sequential(nn.Linear(3, 5))})).tensors == {}
    assert presets.muon(nn.ModuleDict({"ahead": nn.Linear(3, 5)})).tensors.keys() == {"ahead.weight"}


def test_muon_takes_the_longer_axis() -> None:
    symmetry = presets.muon(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    assert symmetry.tensors == {"0.weight": "n[0.weight] _", "1.weight": "_ n[1.weight]"}
    assert set(symmetry.groups.values()) == {Orthogonal()}


def test_exclude_takes_names_and_modules() -> None:
    lm = TinyLM(width=6, heads=2, mlp_width=7, depth=2)
    everything = presets.adam(lm).tensors.keys()
    assert everything == dict(lm.named_parameters()).keys()
    part = presets.adam(lm, exclude=["position", "blocks.0", lm.blocks[1].mlp, lm.head]).tensors.keys()
    assert {name.split(".")[0] for name in everything - part} == {"position", "blocks", "head"}
    assert not any(name.startswith(("blocks.0", "blocks.1.mlp.", "head")) for name in part)
    assert any(name.startswith("blocks.1.attention") for name in part)
    for wrong in ("nothing", nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="exclude"):
            presets.muon(lm, exclude=[wrong])
    layer = {name for name in everything if name.startswith("blocks.1.attention.")}
    assert presets.attention(lm, exclude=["blocks.0"]).tensors.keys() == layer - {"blocks.1.attention.output.bias"}


def test_frozen_parameters_are_not_taken() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    net[0].weight.requires_grad_(False)
    assert presets.muon(net).tensors.keys() == {"1.weight"}
    with pytest.raises(SymmetryError, match="found no MLP"):
        presets.mlp(net)


def test_statistics_of_attention_are_two_matrices_for_each_layer() -> None:
    width = 6
    lm = TinyLM(width=width, heads=2, mlp_width=7, depth=3)
    symmetry = presets.attention(lm)
    params = {name: p for name, p in lm.named_parameters() if name in symmetry.tensors}
    copies = [(len(b.kinds), b.copies) for b in Decomposition(symmetry, params, compact=True).buckets]
    assert copies == [(3, 2 * width + 2), (3, 2 * width + 1)]
    with pytest.raises(SymmetryError, match="no trainable attention"):
        presets.attention(nn.Linear(3, 5))


class Plain(nn.Module):
    """No nn.Sequential: linear children in the order in which they are applied."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 7), nn.Linear(7, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


@pytest.mark.parametrize("signed", [False, True])
def test_mlp_symmetries_are_true(signed: bool) -> None:
    sequential = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Dropout(0.0), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))
    for net in (Plain().double(), sequential.double(), nn.Sequential(Plain()).double()):
        symmetry = presets.mlp(net, signed=signed)
        params = {name: p.detach() for name, p in net.named_parameters()}
        x = torch.randn(11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        f = functional_loss(net, lambda out, _: out.square().sum())
        report = symgeo.check(symmetry, lambda p, f=f, x=x: f(p, (x, x)), params)
        assert report.ok, report
        assert len(symmetry.groups) == 2 * (1 + signed)
        first = next(iter(symmetry.tensors))
        wrong = symgeo.Symmetry(symmetry.tensors | {first: "_ _"}, symmetry.groups, symmetry.sizes)
        assert not symgeo.check(wrong, lambda p, f=f, x=x: f(p, (x, x)), params).ok


def test_lora_pairs_of_peft() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.Embedding(13, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "2", "3"], use_dora=False)
    model = peft.get_peft_model(base, config)
    symmetry = presets.lora(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert symmetry.tensors.keys() == trained
    assert sum(isinstance(group, SignFlip) for group in symmetry.groups.values()) == 6
    optimizer = SymO(model.named_parameters(), symmetry, lr=1e-2, compact=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for t in range(2):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 + t) * torch.randn(p.shape, generator=torch.Generator().manual_seed(t)) \
                if p.requires_grad else None
        optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(before[name], p)} == trained
    with pytest.raises(SymmetryError, match="found no pair"):
        presets.lora(nn.Linear(3, 5))
