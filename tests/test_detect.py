"""Models that no table knows: what is guessed is tried, what fails is said, what is strange is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import params_of, randomise
from torch import Tensor, nn

from symgeo import SymmetryError, check, find_symmetry
from symgeo.groups import GeneralLinear, Rotary
from symgeo.models.find import examine
from symgeo.models.precision import full_double
from symgeo.models.probe import inputs, output_function

SIZES: dict[str, Any] = {
    "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 7, "vocab_size": 19,
    "max_position_embeddings": 16, "attn_implementation": "eager",
}


def starcoder() -> nn.Module:
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    return randomise(Starcoder2ForCausalLM(Starcoder2Config(num_key_value_heads=1, **SIZES)))


def gptj() -> nn.Module:
    from transformers import GPTJConfig, GPTJForCausalLM

    return randomise(GPTJForCausalLM(GPTJConfig(
        n_embd=12, n_head=3, n_layer=2, n_inner=7, vocab_size=19, n_positions=16, rotary_dim=4,
        attn_implementation="eager")))


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return randomise(Dinov2Model(Dinov2Config(hidden_size=12, num_attention_heads=3, num_hidden_layers=2, mlp_ratio=2,
                                              image_size=8, patch_size=4, num_channels=1, attn_implementation="eager")))


def granite() -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    return randomise(GraniteForCausalLM(GraniteConfig(num_key_value_heads=3, **SIZES)))


@pytest.mark.parametrize(("make", "attention", "group", "refused"), [
    (starcoder, "guessed rotary, halves", Rotary(pairing="half"), "GL"),
    (gptj, "guessed rotary, interleaved", Rotary(pairing="interleaved"), "rotary, halves"),
    (dinov2, "guessed GL", GeneralLinear(), "units, scaled"),
    (granite, "guessed rotary, halves", Rotary(pairing="half"), "GL"),
])
def test_the_largest_group_that_survives(make: Any, attention: str, group: Any, refused: str) -> None:
    model = make()
    findings = examine(model)
    assert [what for _, what in findings.found][:2] == [attention] * 2 and not findings.unknown
    assert {what for _, what in findings.found} == {attention, "guessed units"}
    assert refused in [what for _, what in findings.refused]
    kinds = [g for name, g in findings.symmetry.groups.items() if name.startswith("e[")]
    assert len(kinds) == 2 and all(type(g) is type(group) for g in kinds)
    assert all(getattr(g, "pairing", "") == getattr(group, "pairing", "") for g in kinds)
    symmetry, params = find_symmetry(model), params_of(model)
    with full_double():
        f = output_function(model, inputs(model, torch.Generator().manual_seed(5)))
        report = check(symmetry, f, params, 1, torch.Generator().manual_seed(1))
    assert report.invariance < 1e-11 and report.moved > 0.05


def test_what_is_strange_is_named_with_what_was_tried() -> None:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    model = randomise(CodeGenForCausalLM(CodeGenConfig(
        n_embd=8, n_head=4, n_layer=1, vocab_size=19, n_positions=16, rotary_dim=2, n_inner=6)))
    with pytest.raises(SymmetryError, match=r"h\.0\.attn \(CodeGenAttention\).*refuted: CodeGenAttention as GL"):
        find_symmetry(model)
    with pytest.warns(UserWarning, match="CodeGenAttention"):
        symmetry = find_symmetry(model, strict=False)
    assert not any(".attn." in name for name in symmetry.tensors) and any("mlp" in name for name in symmetry.tensors)


def test_a_guess_that_cannot_be_tried_is_not_believed() -> None:
    class Mixer(nn.Module):
        """Attention by name and shape, in a model whose inputs nobody knows."""

        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor, secret: Tensor) -> Tensor:
            return self.o_proj(x) * secret

    class MyAttention(Mixer):
        pass

    with pytest.raises(SymmetryError, match=r"MyAttention"):
        find_symmetry(nn.ModuleDict({"one": MyAttention()}))
