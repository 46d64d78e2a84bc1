"""``README.md`` of a merged adapter: what it is made of, readable for people and for the model hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def model_card(
    settings: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    base_model: str | None,
    versions: Mapping[str, str | None],
    summary: str,
) -> str:
    """The text of the card, with front matter in YAML.

    ``base_model`` stands in the front matter where it can be the id of a model on the hub, which refuses anything
    else, and in the text in any case.
    """
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "merge", "symgeo"]}
    if base_model and HUB_ID.fullmatch(base_model) and not os.path.exists(base_model):
        front["base_model"] = base_model
    rows = [f"| {row['name']} | {row['weight']:g} | `{row['sha256']}` |" for row in inputs]
    versions_line = ", ".join(f"{name} {versions[name]}" for name in ("symgeo", "torch", "peft") if versions.get(name))
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        "# Merged LoRA adapter",
        "",
        f"Merged with symgeo, method `{settings['method']}`, from {len(inputs)} LoRA adapters of "
        f"{f'`{base_model}`' if base_model else 'a base model that they do not name'}.",
        "",
        "| adapter | weight | sha256 of adapter_model.safetensors |",
        "|---|---|---|",
        *rows,
        "",
        f"Rank {settings['rank']}, scale {settings['scale']:g}, dtype {settings['dtype']}, seed {settings['seed']}; "
        f"{versions_line}.",
        "",
        "```",
        summary,
        "```",
        "",
        "`symgeo_report.json` has the numbers of every module.  Load it with",
        "",
        "```python",
        "from peft import PeftModel",
        "model = PeftModel.from_pretrained(base_model, folder)",
        "```",
        "",
    ]
    return "\n".join(lines)
