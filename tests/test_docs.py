"""The pages of docs/: their blocks run and claim something, their links and names exist, their figures are measured."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import params_of
from zoo import ZOO

import symgeo
from symgeo import find_symmetry
from symgeo.cli import app, main
from symgeo.groups import GeneralLinear
from symgeo.models.tiny_vit import TinyViT

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


RUN = re.compile(r"^```(python|console)\n(.*?)^```", re.S | re.M)
WITH_CODE = [page for page in PAGES if RUN.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In the order of the page: Python, which builds on what stands before it, and commands.

    A block that begins with the name of a file is written there too, for the commands.
    """
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for i, (language, block) in enumerate(RUN.findall(page.read_text())):
        if language == "python":
            file = re.match(r"# (\w+)\.py$", block, re.M)
            if file:
                Path(f"{file[1]}.py").write_text(block)
                monkeypatch.delitem(sys.modules, file[1], raising=False)
            exec(compile(block, f"{page.name} block {i}", "exec"), names)
            continue
        commands = block.replace("\\\n", " ").splitlines()
        assert commands and all(command.startswith("$ symgeo ") for command in commands)
        for command in commands:
            assert main(command.split()[2:]) == 0, command
            assert capsys.readouterr().out


def test_the_main_pages_have_blocks_and_claims() -> None:
    with_code = {name_of(page) for page in PAGES if blocks(page, "python")}
    assert {"quickstart", "declare", "sharpness", "merging", "hessians", "curvature", "add_a_family", "add_a_metric",
            "many_gpus"} <= with_code
    silent = [name for name in with_code if "\nassert " not in "".join(blocks(DOCS / f"{name}.md", "python"))]
    assert silent == []


def test_every_command_is_run_somewhere() -> None:
    """On a page; the demo by the installed wheel in test_package.py."""
    run = {word for page in PAGES for word in re.findall(r"^\$ symgeo (\w+)", page.read_text(), re.M)}
    assert {command.name for command in app.registered_commands} - run == {"demo"}


def test_what_no_test_runs_names_what_exists() -> None:
    """Blocks of plain text: targets of the Makefile, and extras."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for page in PAGES:
        for line in "".join(blocks(page, "text")).splitlines():
            made, installed = re.match(r"make (\w+)", line), re.match(r"pip install -e '\.\[([\w,]+)\]'", line)
            assert made or installed, f"{page.name}: {line}"
            assert not made or made[1] in targets
            assert not installed or set(installed[1].split(",")) <= extras


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


ISOMETRIES = {
    "adaptive": ["e[blocks.0]", "f[blocks.0]", "h[blocks.0]", "g[blocks.0]", "final"],
    "euclidean": ["e[blocks.0]", "h[blocks.0]", "mlp_mean_weight[blocks.0]", "embed_bias_mean"],
}
OTHERS = {
    "adaptive": ["c[blocks.0]", "value_bias[blocks.0]", "up_rows[blocks.0]", "rotation", "embed_bias_mean"],
    "euclidean": ["c[blocks.0]", "g[blocks.0]", "value_bias[blocks.0]", "rotation"],
}


@pytest.mark.parametrize("rest", ISOMETRIES)
def test_what_sharpness_does_not_change_along(rest: str) -> None:
    """What the page on sharpness says of each kind of generator, on a small ViT without zeros."""
    generator = torch.Generator().manual_seed(5)
    model = TinyViT(patch_size=4, width=8, depth=1, heads=2, mlp_width=8).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    symmetry, loss = find_symmetry(model), symgeo.functional_loss(model, torch.nn.functional.cross_entropy)
    params = {name: p.detach() for name, p in model.named_parameters()}
    batch = (torch.rand(16, 8, 8, generator=generator).double(), torch.randint(10, (16,), generator=generator))
    action = symmetry.bind(params)

    def change(name: str) -> float:
        point = action.act(action.random(torch.Generator().manual_seed(1), only=[name]), params)
        assert sum(float((point[key] - p).square().sum()) for key, p in params.items()) > 1
        assert abs(float(loss(point, batch) - loss(params, batch))) < 1e-12
        return abs(sharpness(point) / here - 1)

    def sharpness(point: symgeo.functional.Params) -> float:
        manifold = symgeo.ParameterManifold(point, symmetry, "inv", rest)
        return symgeo.geodesic_sharpness(loss, point, [batch], manifold, rho=0.3, steps=4).value

    here = sharpness(params)
    assert max(map(change, ISOMETRIES[rest])) < 1e-10
    assert min(map(change, OTHERS[rest])) > 1e-5


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


def cost_to_target(found: Any) -> dict[str, float]:
    """Steps times passes and step, of every method, until the loss that AdamW ends with; AdamW = 1."""
    step, passes = found["timing"]["step / step of AdamW"], found["timing"]["forward and backward / step of AdamW"]
    total = {name: row["steps to target"] * (passes + step[name]) for name, row in found["summary"].items()}
    return {name: cost / total["adamw"] for name, cost in total.items()}


@pytest.mark.parametrize("page", ["README.md", "docs/curvature.md"])
def test_the_cost_of_reaching_a_loss_is_that_measured(page: str) -> None:
    found = record("optimizers")
    cost = cost_to_target(found)
    cheaper = {name: round(c, 2) for name, c in cost.items() if c < 1}
    symo = [c for name, c in cost.items() if name.startswith("symo")]
    text = " ".join((ROOT / page).read_text().split())
    assert set(cheaper) == {"muon"} and len(symo) == 3
    assert f"only torch's Muon reaches AdamW's loss at less cost ({cheaper['muon']:.2f})" in text
    assert f"`SymO` takes {min(symo):.2f} to {max(symo):.2f} times AdamW's" in text
    assert "Rates were tuned on seed 0, which is one of the five." in text
    assert all(row["seeds"] == 5 and "tuning (seed 0)" in row for row in found["summary"].values())


@pytest.mark.parametrize(("name", "of", "words"), [
    ("GPT-2, bare", 446, "{} of {} parameters of a GPT-2 block, of which GL explains 64"),
    ("LLaMA", 728, "{} of {} of a one-layer LLaMA"),
    ("Whisper", 1637, "{} of {} of a Whisper"),
])
def test_the_dimensions_named_are_those_declared(name: str, of: int, words: str) -> None:
    """That they are the nullities too is in test_families.py."""
    model = ZOO[name]().model
    bare = "bare" in name
    for part, p in model.named_parameters():
        p.requires_grad_(not (bare and any(word in part for word in ("wte", "wpe"))))
    symmetry, params = find_symmetry(model), params_of(model)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad or not bare)
    assert counted == of
    text = " ".join((DOCS / "families.md").read_text().split())
    assert words.format(symmetry.dimension(params), of) in text
    if bare:
        action = symmetry.bind(params)
        general = [n for n, group in action.groups.items() if isinstance(group, GeneralLinear)]
        assert sum(math.prod(action.copies[n]) * action.sizes[n] ** 2 for n in general) == 64
        assert f"64 of the {symmetry.dimension(params)} flat directions" in (DOCS / "corrections.md").read_text()
        assert f"{of} parameters and {symmetry.dimension(params)} directions" in (DOCS / "idea.md").read_text()


def test_other_figures_are_those_measured() -> None:
    sharp, hess, merged = (record(name) for name in ("sharpness", "hessian", "merge"))
    ratios, layout = sharp["ratios (median of rounds)"], merged["7B layout"]
    peak = hess["peak memory of one product, MiB"]
    _, eleven, larger = (size["peak, MiB"] for size in hess["peak memory by size"]["sizes"])  # 64 tokens
    order, single = ("plain", "invariant inv", "curvlinops"), merged["one layer"]["ratios (median of rounds)"]
    hessian_ratios = [h["ratios (median of rounds)"] for h in (hess, hess["bert-base"])]
    steps = record("optimizers")["timing"]["step / step of default AdamW"]
    expected = {
        "sharpness": [f"{ratios[f'exact {metric} / straight line']:.2f} times" for metric in ("inv", "mix")]
        + [f"{ratios['exact inv / forward + backward']:.2f} times a bare"],
        "merging": [f"{single['PEFT svd / tsvd']:.0f} times as long as `tsvd` and "
                    f"{single['PEFT svd / bures']:.0f} times as long as `bures`",
                    f"{layout['tsvd, 1 threads']['CPU seconds']:.1f} CPU seconds",
                    f"and {layout['bures, 1 threads']['CPU seconds']:.0f} with `bures`",
                    " and ".join(f"{layout[f'{m}, 1 threads']['extra MiB']:.0f}" for m in ("tsvd", "bures")) + " MiB",
                    f"{layout['tsvd, 1 threads']['adapters MiB']:.0f} MiB",
                    f"{layout['bures, 1 threads']['modules not converged']} of"],
        "hessians": [f"{r['invariant inv / plain']:.2f} and {r['invariant mix / plain']:.2f}" for r in hessian_ratios]
        + [", ".join(f"{found[kind]:.0f}" for kind in order)
           for found in (peak, hess["bert-base"]["peak memory of one product, MiB"], eleven, larger)],
        "comparison": [f"| {found['curvlinops']:.0f} MiB | {found['plain']:.0f} MiB plain, "
                       f"{found['invariant inv']:.0f} MiB covariant (`inv`) |" for found in (peak, eleven, larger)]
        + [f"| {single['PEFT svd / tsvd']:.0f} | 1 (`tsvd`, the same result to "
           f"{merged['one layer']['relative difference of tsvd from PEFT svd']:.0e})".replace("e-0", "e-"),
           f"{steps['heavyball_soap']:.1f} (SOAP)",
           f"{steps['symo_shampoo']:.1f} (two-sided Shampoo with graft), {steps['symo_muon']:.1f} (Muon)",
           f"{hessian_ratios[0]['plain / curvlinops']:.2f} plain",
           f"covariant on the quotient {hessian_ratios[0]['invariant inv / plain']:.2f} times plain"],
    }
    for page, figures in expected.items():
        text = " ".join((DOCS / f"{page}.md").read_text().split())
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
