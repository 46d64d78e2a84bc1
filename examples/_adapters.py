"""LoRA adapters as PEFT folders: trained, read as weight updates, and written in another gauge, for `merge_lora.py`."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from _digit_domains import DOMAINS
from _training import train
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from symgeo.data import Digits

Deltas = dict[str, Tensor]

TARGETS = ["query", "key", "value", "output", "up", "down"]


def fine_tune(base: nn.Module, data: Digits, folder: Path, steps: int, seed: int, shared: bool) -> list[Path]:
    """One adapter for each shift, saved as PEFT folders."""
    folders = []
    for k, (name, shift) in enumerate(DOMAINS.items()):
        torch.manual_seed(100 * seed + (0 if shared else k))  # peft draws A from the global generator
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
        model = get_peft_model(copy.deepcopy(base), config)
        train(model, shift(data.train_images), data.train_labels, steps, 5e-3, 100 * seed + k)
        model.save_pretrained(str(folder / name))
        folders.append(folder / name)
    return folders


def deltas(model: PeftModel, adapter: str = "default") -> Deltas:
    """What an adapter adds to each weight of the base."""
    prefix = "base_model.model."
    return {
        f"{name.removeprefix(prefix)}.weight": module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def loaded(base: nn.Module, folder: Path) -> Deltas:
    """Those of a folder, as PEFT reads it."""
    return deltas(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)))


def regauged(folder: Path, out: Path, generator: torch.Generator) -> Path:
    """A copy of an adapter with ``(B G^-1, G A)`` in each module, G random of condition number at most 10."""
    target = Path(shutil.copytree(folder, out / folder.name))
    tensors = load_file(target / "adapter_model.safetensors")
    for name in [n for n in tensors if n.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        rank = len(tensors[name])
        u, _, vh = torch.linalg.svd(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
        stretch = 10 ** torch.rand(rank, generator=generator, dtype=torch.float64)
        tensors[name] = (((u * stretch) @ vh) @ tensors[name].double()).float()
        tensors[other] = (tensors[other].double() @ ((vh.mT / stretch) @ u.mT)).float()
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def change(a: Deltas, b: Deltas) -> float:
    """``|a - b| / |a|`` over all modules together."""
    gap = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return float((gap / sum(float(x.double().square().sum()) for x in a.values())) ** 0.5)
