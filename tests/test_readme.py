"""The README: every Python block runs as it stands, every command is one; for the pages of docs/ see test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from symgeo.cli import app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M)
BLOCKS = [block for language, block in FENCED if language == "python"]
PLAIN = "".join(block for language, block in FENCED if not language)
COMMANDS = re.findall(r"^symgeo (\w+)(.*?)(?:  +#.*)?$", PLAIN, re.M)


@pytest.mark.parametrize(("index", "block"), list(enumerate(BLOCKS)), ids=[f"README-{i}" for i in range(len(BLOCKS))])
def test_block_runs(index: int, block: str) -> None:
    exec(compile(block, f"README.md block {index}", "exec"), {"__name__": f"block_{index}"})


def test_the_first_block_is_short() -> None:
    assert len(BLOCKS) >= 3 and len(BLOCKS[0].strip().splitlines()) <= 12


@pytest.mark.parametrize(("name", "arguments"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_a_command_takes_what_it_is_given(name: str, arguments: str) -> None:
    """Parsed, not run: with options in brackets, and without dots that mean more of the same."""
    commands: Any = get_command(app)
    given = re.sub(r"[\[\]]|\.\.\.", "", arguments).split()
    context = commands.commands[name].make_context(name, given, parent=commands.make_context("symgeo", [name]))
    assert context.params and not context.args


def test_the_commands_are_all_of_them() -> None:
    commands: Any = get_command(app)
    assert {name for name, _ in COMMANDS} == set(commands.commands)


def test_targets_of_make_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"(?:^|`)make (\w+)", TEXT, re.M)
    assert {"demo", "test", "docs"} <= set(named) <= set(targets)


def test_the_papers_are_those_to_cite() -> None:
    """Four, in the README, on the page of corrections, and in CITATION.cff with authors."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    links = {paper["url"] for paper in citation["references"]}
    assert len(links) == 4 and all(paper["authors"] and paper["title"] for paper in citation["references"])
    assert set(re.findall(r"https://arxiv\.org/abs/[\d.]+\d", TEXT)) == links
    corrections = (ROOT / "docs" / "corrections.md").read_text()
    assert links <= set(re.findall(r"^## .*\((https://arxiv\.org/abs/[\d.]+\d)\)\)$", corrections, re.M))
    for paper in citation["references"]:
        assert paper["identifiers"][0]["value"].removeprefix("arXiv:") == paper["url"].rsplit("/", 1)[1]
