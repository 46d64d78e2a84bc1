"""``adapter_config.json``: what it says about every module, and what a merge has to refuse.

A LoRA module changes its weight by ``s B A``.  The scale ``s`` is not stored but follows from the configuration:
``alpha / r``, or ``alpha / sqrt(r)`` with rank stabilisation (arXiv 2312.03732).  Everything that makes the change
of the weights something else than ``s B A`` is refused here by name: merging it as if it were plain LoRA would be
wrong without a sign of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"

# fields that no value of which changes the meaning of the factors
HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path corda_config enable_lora eva_config exclude_modules fan_in_fan_out "
    "inference_mode layers_pattern layers_to_transform lora_dropout lora_dtype lora_ga_config lorap_emb_lr "
    "lorap_lr_ratio megatron_core merge_weights peft_type peft_version qalora_group_size revision runtime_config "
    "target_modules task_type velora_config".split()
)
READ = frozenset("alpha_pattern bias init_lora_weights lora_alpha r rank_pattern use_rslora".split())
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # these leave the base weights alone
# every other field is refused where it is set; these with their own remedy
ONLY_FACTORS = "only the factors lora_A and lora_B can be merged"
REFUSED = {
    "use_dora": "the magnitudes of DoRA cannot be merged; train without use_dora",
    "lora_bias": f"{ONLY_FACTORS}; train with lora_bias=false",
    "modules_to_save": f"{ONLY_FACTORS}, not whole modules; train without modules_to_save",
    "trainable_token_indices": f"{ONLY_FACTORS}, not single tokens; train without trainable_token_indices",
    "target_parameters": "factors of stacked experts cannot be merged; adapt modules (target_modules) instead",
    "layer_replication": "the adapter belongs to a model with replicated layers; train without layer_replication",
    "loftq_config": "LoftQ changes the base weights, so that B A is not the update; use another initialisation",
    "ensure_weight_tying": "tied adapters cannot be merged; set it to false if no tied layer is adapted",
}
CONVERT = (
    "this start changes the base weights, so that B A is not the update; save the adapter again with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain one of it"
)


@dataclass(frozen=True)
class AdapterConfig:
    """The part of a configuration that a merge needs; ``raw`` is all of it."""

    folder: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    raw: Mapping[str, Any]

    def rank_of(self, module: str) -> int:
        """The rank that PEFT gives to a module."""
        return int(self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.rank))

    def scale_of(self, module: str) -> float:
        """The scale ``s`` in ``s B A``: ``alpha / r``, or ``alpha / sqrt(r)`` with rank stabilisation."""
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return float(alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def text(self, field: str) -> str | None:
        """A field that holds a name, or None where it is absent or empty."""
        value = self.raw.get(field)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise refusal(self.folder, field, value, "needed a string or null")
        return value

    @property
    def selects_by_suffix(self) -> bool:
        """Whether every module whose name ends with that of an adapted one is adapted as well."""
        narrowed = any(self.raw.get(field) for field in ("exclude_modules", "layers_pattern"))
        listed = isinstance(self.raw.get("target_modules"), list)
        return listed and not narrowed and self.raw.get("layers_to_transform") is None


def pattern_key(keys: Iterable[str], module: str) -> str:
    """The first of the ``keys`` that matches a module's name, or the name itself: the rule of PEFT.

    >>> pattern_key(["k_proj", "0.q_proj"], "layers.10.q_proj"), pattern_key(["^q"], "layers.q")
    ('layers.10.q_proj', 'layers.q')
    >>> pattern_key(["q_proj", "0.q_proj"], "layers.0.q_proj")
    'q_proj'
    """
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", module)), module)


def refusal(folder: Path, field: str, found: object, remedy: str) -> ValueError:
    """The error for a field whose value cannot be merged."""
    shown = json.dumps(found, default=str)
    return ValueError(f"{folder}: {CONFIG}: {field} is {shown if len(shown) < 80 else shown[:76] + ' ...'}; {remedy}")


def read_config(folder: Path) -> AdapterConfig:
    """Read and check the ``adapter_config.json`` of a folder.

    Raises ``ValueError`` naming the folder, the field and what to do, for a file that is missing or no JSON object,
    and for everything but plain LoRA.
    """
    raw = _load(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise refusal(folder, "peft_type", raw.get("peft_type"), 'only "LORA" adapters can be merged')
    _refuse_variants(folder, raw)
    rank_pattern, alpha_pattern = (_pattern(folder, raw, field) for field in ("rank_pattern", "alpha_pattern"))
    for field, values in (("r", [raw.get("r")]), ("rank_pattern", rank_pattern.values())):
        if not all(type(value) is int and value >= 1 for value in values):
            raise refusal(folder, field, raw.get(field), "needed integers >= 1")
    for field, values in (("lora_alpha", [raw.get("lora_alpha")]), ("alpha_pattern", alpha_pattern.values())):
        if not all(_finite(value) for value in values):
            raise refusal(folder, field, raw.get(field), "needed finite numbers")
    return AdapterConfig(
        folder, raw["r"], float(raw["lora_alpha"]), rank_pattern, alpha_pattern, bool(raw.get("use_rslora")), raw
    )


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: {path.name} is missing; give a folder written by save_pretrained") from None
    except ValueError as error:
        raise ValueError(f"{path.parent}: {path.name} is not valid JSON ({error}); save the adapter again") from None
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path.parent}: {path.name} holds a JSON {type(raw).__name__}, needed an object; save the adapter again"
        )
    return raw


def _refuse_variants(folder: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("bias", "none") != "none":
        raise refusal(folder, "bias", raw["bias"], f'{ONLY_FACTORS}, not biases; train with bias="none"')
    start = raw.get("init_lora_weights", True)
    if not any(start is plain or (isinstance(plain, str) and start == plain) for plain in PLAIN_STARTS):
        raise refusal(folder, "init_lora_weights", start, CONVERT)
    if not isinstance(raw.get("use_rslora", False), bool):
        raise refusal(folder, "use_rslora", raw["use_rslora"], "needed true or false")
    for field in sorted(set(raw) - HARMLESS - READ):
        if raw[field]:
            remedy = "only plain LoRA can be merged, and this field may change what the factors mean; train without it"
            raise refusal(folder, field, raw[field], REFUSED.get(field, remedy))


def _pattern(folder: Path, raw: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = raw.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refusal(folder, field, value, "needed an object from names of modules to numbers")
    for key in value:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise refusal(folder, field, value, f"{key!r} is no regular expression ({error}); correct it") from None
    return value
