"""Every Python block of the documents runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = [(name, i, block) for name in ("README.md",)
          for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S))]


@pytest.mark.parametrize(("name", "index", "block"), BLOCKS, ids=[f"{name}-{i}" for name, i, _ in BLOCKS])
def test_block_runs(name: str, index: int, block: str) -> None:
    exec(compile(block, f"{name} block {index}", "exec"), {"__name__": f"block_{index}"})


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_page_runs(page: Path) -> None:
    """The blocks of a page of the documentation build on each other."""
    names: dict[str, object] = {"__name__": page.stem}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert blocks
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page.name} block {i}", "exec"), names)


def test_the_first_block_is_short() -> None:
    assert len(BLOCKS) >= 3 and len(BLOCKS[0][2].strip().splitlines()) <= 12
