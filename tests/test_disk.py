"""Declarations for the tensors of checkpoint files: moved files load into a model that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import params_of
from safetensors.torch import load_file, save_file
from zoo import ZOO

from symgeo import find_symmetry
from symgeo.models.disk import disk_name, on_disk
from symgeo.models.precision import full_double


@pytest.mark.parametrize("name", ["ViT classifier", "DeiT", "GPT-NeoX", "Mixtral", "LLaMA", "BERT classifier"])
def test_moved_files_load_into_the_same_function(name: str, tmp_path: Path) -> None:
    case = ZOO[name]()
    symmetry = find_symmetry(case.model)
    case.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    action = on_disk(symmetry, case.model).bind(tensors)
    moved = action.act(action.random(torch.Generator().manual_seed(1)), tensors)
    assert sum(float((moved[k] - x).norm()) for k, x in tensors.items()) > 1
    save_file({k: x.contiguous() for k, x in moved.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = type(case.model).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager",
                                              experts_implementation="eager").eval()
    for module, other in zip(loaded.modules(), case.model.modules()):
        for key in ("eps", "variance_epsilon"):
            if hasattr(other, key):
                setattr(module, key, getattr(other, key))
    with full_double():
        reference, found = (torch.cat([x.reshape(-1) for x in case.batches(model)]) for model in (case.model, loaded))
    assert (found - reference).abs().max() < 1e-9 * reference.abs().max()
    same = {name: p for name, p in loaded.named_parameters()}
    assert any(float((same[k].detach() - p).norm()) > 0.1 for k, p in params_of(case.model).items())
    dimension = symmetry.dimension(params_of(case.model))
    assert on_disk(symmetry, case.model).dimension(tensors) == dimension


def test_names() -> None:
    model = ZOO["ViT classifier"]().model
    assert disk_name(model, "vit.layers.1.mlp.fc2.bias") == "vit.encoder.layer.1.output.dense.bias"
