"""Folding norms: the same function, and back; rotations of the folded stream as a rep on axes."""

from __future__ import annotations

import pytest
import torch
from networks import params_of, tiny_vit
from zoo import ZOO

from symgeo import Symmetry, SymmetryError, check
from symgeo.groups import Orthogonal
from symgeo.models import fold_norms
from symgeo.models.precision import full_double

FOLDED = {"LLaMA": 3, "LLaMA, tied": 2, "GPT-2": 2, "GPT-2, untied": 3, "GPT-NeoX": 3, "GPT-NeoX, no attention bias": 3,
          "Phi": 2, "Mixtral": 3, "Gemma 2": 2, "ViT classifier": 5, "T5": 6, "Whisper": 6, "timm ViT": 5,
          "nn.TransformerDecoder, pre-norm": 3, "nn.Transformer, pre-norm": 6}


def outputs(name: str, model: torch.nn.Module) -> torch.Tensor:
    case = ZOO[name]()
    with full_double():
        return torch.cat([x.reshape(-1) for x in case.batches(lambda **call: model(**call))])


@pytest.mark.parametrize("name", FOLDED)
def test_the_function_stays_and_the_gains_go(name: str) -> None:
    model = ZOO[name]().model
    before = params_of(model)
    folded, unfold = fold_norms(model)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert len(unfold.folds) == FOLDED[name]
    for fold in unfold.folds:
        assert bool((folded.get_parameter(fold.norm.weight) + fold.norm.offset == 1).all())
        assert float((before[fold.norm.weight] + fold.norm.offset - 1).abs().max()) > 0.1
    reference = outputs(name, model)
    assert (outputs(name, folded) - reference).abs().max() < 1e-12 * reference.abs().max().clamp(min=1)
    back = params_of(unfold(folded))
    assert all(torch.allclose(back[key], before[key], rtol=1e-11, atol=1e-13) for key in before)
    assert any(float((params_of(folded)[key] - before[key]).norm()) > 0.1 for key in before)
    moved = unfold({key: 1.01 * p for key, p in params_of(folded).items()})
    assert set(moved) == set(before)


def test_a_zero_gain_comes_back() -> None:
    model = ZOO["LLaMA"]().model
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0.0
    before = params_of(model)
    folded, unfold = fold_norms(model)
    assert bool((folded.model.layers[0].self_attn.q_proj.weight[:, 3] == 0).all())
    back = unfold(params_of(folded))
    assert all(torch.allclose(back[key], before[key], rtol=1e-11, atol=1e-13) for key in before)


def test_folded_streams_turn_as_a_whole() -> None:
    """One orthogonal group on all writers and readers; with the gains it is not a symmetry."""
    case = ZOO["LLaMA"]()
    folded, unfold = fold_norms(case.model)
    layer = "model.layers.0"
    reads = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    tensors = {"model.embed_tokens.weight": "_ d", "lm_head.weight": "_ d"}
    tensors |= {f"{layer}.{name}.weight": "_ d" for name in reads}
    tensors |= {f"{layer}.self_attn.o_proj.weight": "d _", f"{layer}.mlp.down_proj.weight": "d _"}
    turned = Symmetry(tensors, {"d": Orthogonal()})
    with full_double():
        report = check(turned, case.function(), params_of(folded), 1, torch.Generator().manual_seed(0))
        assert report.invariance < 1e-12 and report.moved > 0.5
        assert check(turned, case.function(), params_of(case.model), 1).invariance > 1e-2
        action = turned.bind(params_of(folded))
        moved = unfold(action.act(action.random(torch.Generator().manual_seed(1)), params_of(folded)))
        f = case.function()
        for a, b in zip(f(moved), f(params_of(case.model))):
            assert (a - b).abs().max() < 1e-11


def test_nothing_to_fold_is_an_error() -> None:
    with pytest.raises(SymmetryError, match="fold_norms: Linear has no norm"):
        fold_norms(torch.nn.Linear(2, 3))
    with pytest.raises(SymmetryError, match="no norm that only known linear maps read"):
        fold_norms(ZOO["nn.TransformerEncoderLayer"]().model)
    assert len(fold_norms(tiny_vit())[1].folds) == 5
