"""Every Python block of the README runs as it stands; for the pages of docs/ see test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize(("index", "block"), list(enumerate(BLOCKS)), ids=[f"README-{i}" for i in range(len(BLOCKS))])
def test_block_runs(index: int, block: str) -> None:
    exec(compile(block, f"README.md block {index}", "exec"), {"__name__": f"block_{index}"})


def test_the_first_block_is_short() -> None:
    assert len(BLOCKS) >= 3 and len(BLOCKS[0].strip().splitlines()) <= 12
