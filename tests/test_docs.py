"""The pages of docs/: their blocks run, their links and names exist, their figures are those of benchmarks/."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from symgeo.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MADE = ("_build", "_gallery", "_pictures", "gallery")  # by the build
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).parts[0] not in MADE]
PUBLIC = ("symgeo", "symgeo.groups", "symgeo.symmetry", "symgeo.models", "symgeo.sharpness", "symgeo.merge",
          "symgeo.hessian", "symgeo.curvature", "symgeo.optim", "symgeo.optim.presets", "symgeo.preconditioner",
          "symgeo.kernels", "manifolds")


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).with_suffix("").as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_blocks_run(page: Path) -> None:
    """The Python blocks of a page build on each other."""
    names: dict[str, object] = {"__name__": page.stem}
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name} block {i}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=name_of)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ symgeo (.+)$", "".join(blocks(page, "console")), re.M)
    assert commands
    for command in commands:
        assert main(command.split()) == 0
        assert capsys.readouterr().out


def test_the_main_pages_have_blocks() -> None:
    with_code = {name_of(page) for page in PAGES if blocks(page, "python")}
    assert {"quickstart", "declare", "sharpness", "merging", "hessians", "curvature", "add_a_family", "add_a_metric",
            "many_gpus"} <= with_code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http:", "https:", "gallery/")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_file(), f"{page.name}: {target}"
        titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
    for picture in re.findall(r"^```\{image\} _pictures/(\w+)\.svg", page.read_text(), re.M):
        assert f'"{picture}":' in (DOCS / "pictures.py").read_text()


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = {"index"}
    for page in PAGES:
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.S | re.M):
            entries = [line for line in tree.split("\n") if line and not line.startswith(":")]
            listed |= {(page.parent / entry).relative_to(DOCS).as_posix() for entry in entries}
    assert {name_of(page) for page in PAGES} == listed - {"gallery/index"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page: Path) -> None:
    """Python names in roles, files of the repository, and tests."""
    text = page.read_text()
    for name in re.findall(r"\{(?:func|class|meth|mod|data)\}`([\w.]+)`", text):
        found(name)
    for file in re.findall(r"`((?:symgeo|manifolds|tests|benchmarks|examples|paper_figs|docs)/[\w./]*)`", text):
        assert (ROOT / file).exists(), f"{page.name}: {file}"
    for file, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), f"{page.name}: {file}::{test}"
    for file in re.findall(r"^   _gallery/(\w+\.py)$", text, re.M):
        assert (ROOT / "examples" / file).is_file(), f"{page.name}: {file}"


def test_every_example_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    examples = sorted((ROOT / "examples").glob("[!_]*.py"))
    assert examples and [file.name for file in examples if f"   _gallery/{file.name}\n" not in text] == []


def found(name: str) -> Any:
    """The object with a dotted name: attributes, and modules where there is no attribute."""
    first, *parts = name.split(".")
    here: Any = importlib.import_module(first)
    for i, part in enumerate(parts, 1):
        here = getattr(here, part, None) or importlib.import_module(".".join([first, *parts[:i]]))
    return here


def documented() -> Iterator[str]:
    """The names that the directives of the reference document."""
    directive = re.compile(r"^\.\. auto(\w+):: ([\w.]+)\n((?:   :.*\n)*)", re.M)
    for page in PAGES:
        module = ""
        for kind, name, options in directive.findall(page.read_text()):
            if kind != "module":
                yield name if "." in name else f"{module}.{name}"
                continue
            module = name
            given = re.search(r":members: *(.*)$", options, re.M)
            out = re.search(r":exclude-members: (.*)$", options, re.M)
            if given and ":no-members:" not in options:
                members = given[1] or ", ".join(getattr(importlib.import_module(module), "__all__", ()))
                chosen = {entry.strip() for entry in members.split(",")} - {""}
                yield from (f"{module}.{entry}" for entry in chosen - set(re.split(", *", out[1]) if out else ()))


def test_every_public_name_is_in_the_reference() -> None:
    known = [found(name) for name in documented()]
    for module in PUBLIC:
        names = importlib.import_module(module).__all__
        assert names
        missing = [name for name in names if not any(found(f"{module}.{name}") is thing for thing in known)]
        missing = [name for name in missing if f"{module}.{name}" not in PUBLIC]  # subpackages
        assert not missing, f"{module}: {missing}"


def record(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def test_figures_of_the_optimizers_are_those_measured() -> None:
    methods = {"grafted Shampoo": "shampoo_tuned", "SymO, `shampoo`": "symo_shampoo", "SOAP": "soap",
               "SymO, `muon`, betas 0.95": "symo_muon", "torch Muon": "muon",
               "SymO, `muon`, betas 0.9,": "symo_one_sided", "AdamW": "adamw"}
    found, lines = record("optimizers"), (DOCS / "curvature.md").read_text().split("\n")
    for start, key in methods.items():
        (line,) = [line for line in lines if line.startswith(f"| {start}") and "±" in line]
        row, cost = found["summary"][key], found["timing"]["step / step of default AdamW"][key]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"{row['final loss']:.3f} ± {row['standard error']:.3f}"
        assert cells[2] == str(row["steps to target"]) and cells[3].split()[0] == f"{cost:.1f}"


def test_other_figures_are_those_measured() -> None:
    sharp, hess, merged = (record(name) for name in ("sharpness", "hessian", "merge"))
    ratios, layout = sharp["ratios (median of rounds)"], merged["7B layout"]
    peak = hess["peak memory of one product, MiB"]
    hessian_ratios = [h["ratios (median of rounds)"] for h in (hess, hess["bert-base"])]
    steps = record("optimizers")["timing"]["step / step of default AdamW"]
    expected = {
        "sharpness": [f"{ratios[f'exact {metric} / straight line']:.2f} times" for metric in ("inv", "mix")],
        "merging": [f"{merged['one layer']['ratios (median of rounds)']['PEFT svd / tsvd']:.0f}\n",
                    f"{layout['tsvd, 1 threads']['CPU seconds']:.1f} CPU seconds",
                    f"{layout['tsvd, 1 threads']['adapters MiB']:.0f} MiB",
                    f"{layout['bures, 1 threads']['modules not converged']} of"],
        "hessians": [f"{r['invariant inv / plain']:.2f} and {r['invariant mix / plain']:.2f}" for r in hessian_ratios]
        + [f"{peak['plain']:.0f}, {peak['invariant inv']:.0f}, {peak['curvlinops']:.0f}"],
        "comparison": [f"{peak['curvlinops']:.0f} MiB", f"{peak['plain']:.0f} MiB plain",
                       f"{steps['heavyball_soap']:.1f} (SOAP)",
                       f"{steps['symo_shampoo']:.1f} (two-sided Shampoo with graft), {steps['symo_muon']:.1f} (Muon)",
                       f"{hessian_ratios[0]['plain / curvlinops']:.2f} plain"],
    }
    for page, figures in expected.items():
        text = (DOCS / f"{page}.md").read_text()
        assert [figure for figure in figures if figure not in text] == [], page


PACKAGES = ("sphinx", "sphinx_gallery", "furo", "myst_parser", "latex2mathml")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_sphinx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; make docs installs them")


@needs_sphinx
def test_docstrings_and_formulas_render(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "_extensions"))
    docstrings, formulas = (importlib.import_module(name) for name in ("docstrings", "mathml"))
    assert doctest.testmod(docstrings).failed == doctest.testmod(formulas).failed == 0
    count = 0
    for page in PAGES:
        text = re.sub(r"`[^`\n]*`", "", prose(page))
        for wide, narrow in re.findall(r"\$\$(.+?)\$\$|(?<!\$)\$([^$]+)\$", text, re.S):
            assert "<m" in formulas.mathml(wide or narrow, "block" if wide else "inline")
            count += 1
    assert count > 100
    with pytest.raises(ValueError, match="latex2mathml does not know"):
        formulas.mathml(r"\nosuchthing x", "inline")


@needs_sphinx
@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """As plain text, which is quicker than HTML, and without running the examples."""
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("_build", "_gallery", "gallery"))
    for name in ("examples", "paper_figs", "CHANGELOG.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-D", "plot_gallery=0", "-b", "text"]
    command += ["docs", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    pages = list((tmp_path / "out").rglob("*.txt"))
    made = {page.relative_to(tmp_path / "out").with_suffix("").as_posix() for page in pages}
    assert {name_of(page) for page in PAGES} <= made
    text = "".join(page.read_text() for page in pages)
    assert str(ROOT) not in text and str(tmp_path) not in text
