"""``adapter_config.json`` of a merged adapter: plain LoRA with scale one everywhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from symgeo.merge.peft.keys import owner
from symgeo.merge.peft.reader import Adapter


def merged_config(
    ranks: Mapping[str, int], adapters: Sequence[Adapter], inherited: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration for merged modules with the given ranks.

    ``alpha = r`` for every module, so that its update is ``B A`` itself.  ``r`` is the most common rank, the others
    stand in ``rank_pattern`` and ``alpha_pattern``.
    """
    owned: dict[str, int] = {}
    for module, own in ranks.items():
        if owned.setdefault(owner(module), own) != own:
            raise ValueError(f"module {owner(module)}: its projections need one rank; choose another rank or method")
    counts = Counter(owned.values())
    rank = max(counts, key=lambda r: (counts[r], r))
    pattern = {exact_key(module, list(owned)): r for module, r in owned.items() if r != rank}
    return {
        **inherited,
        "alpha_pattern": dict(pattern),
        "bias": "none",
        "exclude_modules": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(pattern),
        "target_modules": target_modules(sorted(owned), adapters),
        "use_dora": False,
        "use_rslora": False,
    }


def target_modules(modules: Sequence[str], adapters: Sequence[Adapter]) -> list[str] | str:
    """A selection of exactly these modules: a list of their names, or a regular expression.

    PEFT takes a name in a list for every module that ends with it.  That is exact where an adapter with such a list
    of its own adapts the module, since it would have adapted those others as well; where modules were chosen more
    narrowly, only an expression is.
    """
    by_suffix = {owner(m) for adapter in adapters if adapter.config.selects_by_suffix for m in adapter.pairs}
    if by_suffix.issuperset(modules):
        return list(modules)
    return "(?:" + "|".join(re.escape(module) for module in modules) + ")"


def exact_key(module: str, modules: Sequence[str]) -> str:
    """A key of ``rank_pattern`` for one module alone: its name, or an anchored expression if that fits others too.

    >>> exact_key("0.q", ["0.q", "0.k"]), exact_key("0.q", ["0.q", "1.0.q"])
    ('0.q', '^0\\\\.q')
    """
    if re.fullmatch(r"[\w.]+", module):
        fitting = re.findall(rf"^(?:.*\.)?(?:{module})$", "\n".join(modules), re.MULTILINE)
        if len(fitting) == 1:
            return module
    return f"^{re.escape(module)}"
