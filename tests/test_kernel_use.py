"""Gram matrices, eigenvectors, polar factors, symmetric powers and iterations of products have one place each.

That is `symgeo.kernels` for batches of real matrices, with a backend for every device, and `manifolds.linalg` for
small, differentiable or complex ones.  The source is parsed: an operation written out anywhere else needs an entry
here, with the reason why it is another one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from test_architecture import FILES, module_name

HOMES = ("symgeo.kernels", "manifolds.linalg")

TRUNCATED = "singular vectors, of which the leading ones are kept"
NOT_SQUARED = "(x^T x)^(1/2) from the singular values of x: x^T x would lose half of the digits"

# function -> operation -> why it may stay there
ALLOWED: dict[str, dict[str, str]] = {
    "manifolds.embedded.dense_frame": {"svd": TRUNCATED},
    "manifolds.fixed_rank.FixedRank._decomposition": {"svd": TRUNCATED},
    "manifolds.logarithm._power": {"function": "of complex pairs; what is below rounding is lifted to it, not dropped"},
    "manifolds.low_rank.svd_of_product": {"svd": TRUNCATED},
    "symgeo.curvature.dense.DenseBlock.outer": {"gram": "of complex roots"},
    "symgeo.curvature.dense.DenseBlock.rebuilt": {"function": "any function of the spectrum, also of complex blocks"},
    "symgeo.curvature.dense.DenseBlock.spectrum": {"svd": "eigenvalues of R R^H from R, which is not squared"},
    "symgeo.curvature.gauge._linear_gauge": {"svd": NOT_SQUARED, "function": NOT_SQUARED},
    "symgeo.hessian.frames._powers": {"function": "two powers from one eigh, of factors that have to be definite"},
    "symgeo.merge.align_stream.procrustes": {"svd": "the nearest rotation: a determinant of -1 changes a sign"},
    "symgeo.merge.bures._Procrustes.polar": {"svd": "polar factor and nuclear norm from one decomposition"},
    "symgeo.merge.elementwise._stacked": {"svd": TRUNCATED},
    "symgeo.merge.metric_factors.kronecker_factors": {"svd": TRUNCATED},
    "symgeo.merge.spectral._orthonormal": {"svd": "polar factor with its own rank, and the singular values"},
    "symgeo.merge.sums.cut": {"svd": TRUNCATED},
    "symgeo.optim.gauge._root": {"svd": NOT_SQUARED, "function": NOT_SQUARED},
    "symgeo.symmetry.dimension._gram_rank": {"eigvalsh": "eigenvalues alone, to count them"},
}


def dotted(node: ast.expr) -> str:
    """The name of what is called, ``?`` for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def names(node: ast.AST) -> set[str]:
    """Names that are operands: those that are only asked for a dtype or device are not."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        return names(node.func.value)
    found = {node.id} if isinstance(node, ast.Name) else set[str]()
    return found.union(*(names(child) for child in ast.iter_child_nodes(node)))


def transposed(node: ast.expr) -> ast.expr | None:
    """``x`` of ``x.mT``, ``x.mH``, ``x.T`` or ``x.H``."""
    return node.value if isinstance(node, ast.Attribute) and node.attr in ("mT", "mH", "T", "H") else None


def products(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Left and right of every matrix product."""
    for child in ast.walk(node):
        if isinstance(child, ast.BinOp) and isinstance(child.op, ast.MatMult):
            yield child.left, child.right
        elif isinstance(child, ast.Call) and dotted(child.func).split(".")[-1] in ("matmul", "mm", "bmm"):
            if isinstance(child.func, ast.Attribute) and dotted(child.func.value) != "torch":
                yield child.func.value, child.args[0]
            elif len(child.args) == 2:
                yield child.args[0], child.args[1]


def is_gram(left: ast.expr, right: ast.expr) -> bool:
    """``x @ x.mT`` and ``x.mT @ x``."""
    pairs = (left, transposed(right)), (right, transposed(left))
    return any(x is not None and ast.dump(x) == ast.dump(y) for y, x in pairs)


def is_function(left: ast.expr, right: ast.expr) -> bool:
    """``(v * f) @ v.mT``: a function of a symmetric matrix, from its eigenvectors; also ``v.mT @ (f * v)``."""
    for scaled, other in ((left, transposed(right)), (right, transposed(left))):
        if isinstance(scaled, ast.BinOp) and isinstance(scaled.op, ast.Mult) and isinstance(other, ast.Name):
            if any(isinstance(side, ast.Name) and side.id == other.id for side in (scaled.left, scaled.right)):
                return True
    return False


def iterates(loop: ast.For | ast.While) -> bool:
    """Whether a loop multiplies what it computes by itself or by products with it: Newton-Schulz, squarings, roots."""
    assigned = [node for node in ast.walk(loop) if isinstance(node, ast.Assign)]
    targets = [set[str]().union(*(names(target) for target in node.targets)) for node in assigned]
    factors: dict[str, set[str]] = {}  # of the products that a name is made of
    for node, own in zip(assigned, targets):
        for left, right in products(node.value):
            for name in own:
                factors.setdefault(name, set()).update(names(left) | names(right))

    def traced(side: ast.expr) -> set[str]:
        return names(side).union(*(factors.get(name, set()) for name in names(side)))

    return any(traced(left) & traced(right) & own & (names(left) | names(right))
               for node, own in zip(assigned, targets) for left, right in products(node.value))


def operations(function: ast.AST) -> set[str]:
    """The operations written out in a function."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            *owner, name = dotted(node.func).split(".")
            if owner in (["torch"], ["torch", "linalg"]):
                found |= {name} & {"eigh", "eigvalsh", "eig", "eigvals", "svd", "matrix_power", "matrix_exp"}
        if isinstance(node, ast.For | ast.While) and iterates(node):
            found.add("iteration")
    for left, right in products(function):
        found |= {name for name, test in (("gram", is_gram), ("function", is_function)) if test(left, right)}
    return found


def written_out(tree: ast.Module, module: str) -> dict[str, set[str]]:
    """The operations of every function and method of a module, and those outside of them."""
    found: dict[str, set[str]] = {}
    for node in tree.body:
        parts = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{module}.{node.name}" if isinstance(node, ast.ClassDef) else module
        for part in parts:
            name = f"{prefix}.{part.name}" if isinstance(part, ast.FunctionDef) else prefix
            if here := operations(part):
                found.setdefault(name, set()).update(here)
    return found


def is_home(module: str) -> bool:
    return any(module == home or module.startswith(f"{home}.") for home in HOMES)


def everywhere() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in FILES:
        if not is_home(module_name(path)):
            found |= written_out(ast.parse(path.read_text()), module_name(path))
    return found


def test_operations_are_reached_through_their_homes() -> None:
    found = everywhere()
    surplus = {name: here - set(ALLOWED.get(name, ())) for name, here in found.items()}
    assert not {name: here for name, here in surplus.items() if here}, (
        "call symgeo.kernels or manifolds.linalg there, or give the reason in ALLOWED"
    )
    stale = {name: set(reasons) - found.get(name, set()) for name, reasons in ALLOWED.items()}
    assert not {name: here for name, here in stale.items() if here}, "no longer there: take it out of ALLOWED"


def test_the_homes_have_them() -> None:
    found: dict[str, set[str]] = {}
    for path in FILES:
        if is_home(module_name(path)):
            found |= written_out(ast.parse(path.read_text()), module_name(path))
    assert {"gram", "eigh", "svd", "function", "iteration"} <= set[str]().union(*found.values())
    assert found["symgeo.kernels.reference.power"] >= {"function"}
    assert found["symgeo.kernels.batched.matrices._roots"] == {"iteration"}


def test_every_way_around_a_backend_is_one_of_the_packages_own() -> None:
    """Triton is imported by the kernels only."""
    for path in FILES:
        imported = {
            name.split(".")[0] for node in ast.walk(ast.parse(path.read_text()))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom)
                         else [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        }  # fmt: skip
        assert "triton" not in imported or module_name(path).startswith("symgeo.kernels."), path


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("values, vectors = torch.linalg.eigh(a)", {"eigh"}),
        ("u, s, v = torch.svd(a)", {"svd"}),
        ("y = torch.matrix_power(a, 3) @ torch.linalg.matrix_exp(a)", {"matrix_power", "matrix_exp"}),
        ("t = x.flatten(1).mT @ x.flatten(1)", {"gram"}),
        ("t = torch.matmul(x, x.T)", {"gram"}),
        ("t = x.bmm(x.mT)", {"gram"}),
        ("y = (v * s.rsqrt().unsqueeze(-2)) @ v.mH", {"function"}),
        ("y = v.mT @ (s * v)", {"function"}),
        ("for _ in range(5):\n    a = y @ y.mT\n    y = 1.5 * y - 0.5 * a @ y", {"gram", "iteration"}),
        ("while error > tol:\n    y, z = y @ h(z @ y), h(z @ y) @ z", {"iteration"}),
        ("for _ in range(5):\n    b = b / b.norm()\n    b = b @ b", {"iteration"}),
    ],
)
def test_what_counts_as_written_out(source: str, wanted: set[str]) -> None:
    assert written_out(ast.parse(f"def f():\n    {source.replace(chr(10), chr(10) + '    ')}"), "m") == {"m.f": wanted}


@pytest.mark.parametrize(
    "source",
    [
        "values, vectors = eigh(a)",  # of manifolds.linalg
        "s = torch.linalg.svdvals(a)",
        "y = (u * s) @ v.mT",
        "y = x @ z.mT",
        "for w in parts:\n    y = w.to(y) @ x",
        "for w in parts:\n    y = w @ y",
        "values = operator.eigvalsh()",
    ],
)
def test_what_does_not(source: str) -> None:
    assert written_out(ast.parse(source), "m") == {}
