"""Tiny models, and LoRA adapters of them written to folders by PEFT itself."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
Deltas = dict[str, Tensor]


class Net(nn.Module):
    """One layer of every kind that carries adapters; all sizes differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(13, 7)
        self.down = nn.Linear(7, 11)
        self.blocks = nn.ModuleList([nn.Linear(11, 11), nn.Linear(11, 11)])
        self.conv = nn.Conv2d(3, 5, (3, 2))
        self.conv1d = nn.Conv1d(3, 5, 4)
        self.table = nn.Embedding(19, 17)
        self.attention = nn.MultiheadAttention(6, 2)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.up(x)))
        for block in self.blocks:
            x = x + block(x)
        return x


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=23, hidden_size=12, intermediate_size=17, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=12, n_layer=2, n_head=2, n_positions=32)).eval()


def write(
    folder: Path, base: Callable[[], nn.Module] = Net, seed: int = 1, dtype: torch.dtype = torch.float32, **config: Any
) -> PeftModel:
    """A LoRA adapter with random factors, saved by PEFT; the model with this adapter."""
    with warnings.catch_warnings():  # PEFT remarks on embeddings and on Conv1D when an adapter is made
        warnings.simplefilter("ignore")
        model = get_peft_model(base(), LoraConfig(**{"target_modules": ["up", "down"], **config}))
        randomise(model, seed)
        model.to(dtype).save_pretrained(folder)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def load(folder: Path, base: Callable[[], nn.Module] = Net, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The model with an adapter from disk; every warning, missing or unexpected key is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # PEFT asks it
        model = PeftModel.from_pretrained(base().to(dtype), folder)
        result = model.load_adapter(folder, adapter_name="again")
    assert result.missing_keys == [] and result.unexpected_keys == []
    model.delete_adapter("again")
    return model.eval()


def deltas(model: PeftModel, adapter: str = "default") -> Deltas:
    """The update of every adapted module, as PEFT computes it from the factors, in float64."""
    return {
        name.removeprefix(PREFIX): module.double().get_delta_weight(adapter).detach().double()
        for name, module in model.named_modules()
        if adapter in (*getattr(module, "lora_A", ()), *getattr(module, "lora_embedding_A", ()))
    }


def combine(weights: list[float], terms: list[Deltas]) -> Deltas:
    """The exact weighted sum; a module that an adapter lacks counts as zero."""
    names = {name for term in terms for name in term}
    return {name: sum(w * t[name] for w, t in zip(weights, terms) if name in t) for name in names}


def distance(one: Deltas, other: Deltas) -> float:
    """The largest relative difference between modules; they must be the same ones."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).norm() / other[k].norm()) for k in other)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of ``adapter_config.json``; None removes one."""
    path = folder / "adapter_config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Rewrite ``adapter_model.safetensors``."""
    path = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, {"format": "pt"})


def blur(folder: Path, seed: int, size: float = 0.05) -> None:
    """Add noise to the factors."""
    generator = torch.Generator().manual_seed(seed)
    edit_tensors(folder, lambda t: {k: v + size * torch.randn(v.shape, generator=generator) for k, v in t.items()})


def regauge(folder: Path, seed: int) -> float:
    """``(B G^-1, G A)`` in place of ``(B, A)`` with a random G for every linear module; how far the factors moved."""
    generator = torch.Generator().manual_seed(seed)
    moved: list[float] = []

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(tensors)
        for key in [k for k in tensors if k.endswith("lora_A.weight") and tensors[k].ndim == 2]:
            a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            u, v = (torch.linalg.qr(torch.randn(len(a), len(a), generator=generator).double())[0] for _ in "uv")
            g = u * torch.linspace(0.4, 3.0, len(a)).double() @ v
            out[key], out[key.replace("lora_A", "lora_B")] = (g @ a).to(tensors[key].dtype), (b @ g.inverse()).to(
                tensors[key].dtype
            )
            moved.append(float((g @ a - a).norm() / a.norm()))
        return out

    edit_tensors(folder, change)
    return min(moved)
