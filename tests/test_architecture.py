"""The layers: a module imports what stands above it, never what stands below; and what must not be in the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# top to bottom; a name stands for the module or the package with everything in it
LAYERS = [
    "manifolds.linalg", "manifolds.low_rank", "manifolds.geodesic", "manifolds.relaxed", "manifolds.frame",
    "manifolds.base", "manifolds.alignment", "manifolds.logarithm", "manifolds.factored", "manifolds.elementwise",
    "manifolds.flat", "manifolds.scale", "manifolds.bures", "manifolds.embedded", "manifolds.embedded_logarithm",
    "manifolds.fixed_rank", "manifolds.product", "manifolds.frechet", "manifolds.momentum", "manifolds",
    "symgeo.errors", "symgeo.kernels", "symgeo.functional", "symgeo.progress", "symgeo.parallel", "symgeo.distributed",
    "symgeo.report",
    "symgeo.groups", "symgeo.symmetry", "symgeo.models", "symgeo.nullity", "symgeo.pairs", "symgeo.chart",
    "symgeo.geometry", "symgeo.curvature", "symgeo.optim", "symgeo.preconditioner", "symgeo.merge", "symgeo.sharpness",
    "symgeo.hessian", "symgeo.flatness",
    "symgeo.data", "symgeo.study", "symgeo.demo.training",
    "symgeo.demo.checkpoints", "symgeo.demo.runner", "symgeo.loading",
    "symgeo.batches", "symgeo.evaluation", "symgeo.installation", "symgeo.demo.orbit", "symgeo.plots", "symgeo.demo",
    "symgeo.cli", "symgeo.__main__",
]
FILES = sorted(path for package in ("manifolds", "symgeo") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str:
    """The longest entry that covers a module."""
    covering = [name for name in LAYERS if module == name or module.startswith(f"{name}.")]
    assert covering, f"{module} stands in no layer: add it to LAYERS"
    return max(covering, key=len)


def imports(tree: ast.AST) -> set[str]:
    """Modules of the two packages imported at run time (those for type checking only are left out)."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names = {module_name(path) for path in FILES}
            found |= (submodules & names) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        found |= imports(node)
    return {name for name in found if re.match(r"(symgeo|manifolds)(\.|$)", name)}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    if module == "symgeo":
        assert not {name for name in imports(ast.parse(path.read_text())) if name != "importlib"}
        return
    for name in imports(ast.parse(path.read_text())) - {"symgeo"}:
        same = layer(name) == layer(module)
        assert same or LAYERS.index(layer(name)) < LAYERS.index(layer(module)), f"{module} imports {name} from below"


def test_the_layers_name_only_what_exists() -> None:
    modules = {module_name(path) for path in FILES}
    assert [name for name in LAYERS if name not in modules] == []


def test_manifolds_know_no_network() -> None:
    code = "import manifolds, sys; sys.exit(any(n.split('.')[0] in ('symgeo', 'transformers') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=False).returncode == 0


def test_importing_the_package_imports_no_torch() -> None:
    code = "import symgeo, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_public_names_resolve_and_are_documented() -> None:
    import symgeo

    for name in symgeo.__all__:
        assert getattr(symgeo, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = symgeo.nothing


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_fit_a_head(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 60, f"{node.name} is too long to read at once"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
