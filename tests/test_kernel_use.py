"""Gram matrices, eigenvectors, polar factors, symmetric powers and iterations of products have one place each.

That is `symgeo.kernels` for batches of real matrices, with a backend for every device, and `manifolds.linalg` for
small, differentiable or complex ones.  The source is parsed: an operation written out anywhere else needs an entry
here, with the reason why it is another one.
"""

from __future__ import annotations

import ast

import pytest
from kernel_source import imports, multiplies, written_out
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
    "symgeo.curvature.assembly.Bucket.gram": {"gram": "of complex coordinates"},
    "symgeo.curvature.dense.DenseBlock.outer": {"gram": "of complex roots"},
    "symgeo.curvature.dense.DenseBlock.rebuilt": {"function": "any function of the spectrum, also of complex blocks"},
    "symgeo.curvature.dense.DenseBlock.spectrum": {"svd": "eigenvalues of R R^H from R, which is not squared"},
    "symgeo.curvature.gauge._linear_gauge": {"svd": NOT_SQUARED, "function": NOT_SQUARED},
    "symgeo.hessian.frames._powers": {"function": "two powers from one eigh, of factors that have to be definite"},
    "symgeo.hessian.spectrum._krylov": {"gram": "Q^T S Q of a basis Q, whose lack of symmetry is looked at"},
    "symgeo.hessian.spectrum.all_values": {"eigvalsh": "eigenvalues alone, of one matrix of any size"},
    "symgeo.merge.align_stream.half_turn": {"function": "of the complex eigenvectors of a rotation, in NumPy"},
    "symgeo.merge.align_stream.procrustes": {"svd": "the nearest rotation: a determinant of -1 changes a sign"},
    "symgeo.merge.bures._Procrustes.polar": {"svd": "polar factor and nuclear norm from one decomposition"},
    "symgeo.merge.elementwise._stacked": {"svd": TRUNCATED},
    "symgeo.merge.metric_factors.kronecker_factors": {"svd": TRUNCATED},
    "symgeo.merge.spectral._orthonormal": {"svd": "polar factor with its own rank, and the singular values"},
    "symgeo.merge.sums.cut": {"svd": TRUNCATED},
    "symgeo.optim.gauge._root": {"svd": NOT_SQUARED, "function": NOT_SQUARED},
    "symgeo.symmetry.dimension._gram_rank": {"eigvalsh": "eigenvalues alone, to count them"},
}


def is_home(module: str) -> bool:
    return any(module == home or module.startswith(f"{home}.") for home in HOMES)


def everywhere() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    trees = {module_name(path): ast.parse(path.read_text()) for path in FILES}
    apart = {module: tree for module, tree in trees.items() if not is_home(module)}
    pairs: dict[str, set[tuple[int, int]]] = {}
    for tree in apart.values():
        for name, places in multiplies(tree, imports(tree)).items():
            pairs.setdefault(name, set()).update(places)
    for module, tree in apart.items():
        found |= written_out(tree, module, pairs)
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
        # under other names
        ("e = torch.linalg.eigh\nvalues, vectors = e(a)", {"eigh"}),
        ("from torch.linalg import eigh as e\nvalues, vectors = e(a)", {"eigh"}),
        ("import torch.linalg as lin\nu, s, v = lin.svd(a)", {"svd"}),
        ("u, s, v = a.svd()", {"svd"}),
        ("y = x\nt = y @ x.mT", {"gram"}),
        ("y = x.flatten(1).mT\nz = y\nt = z @ x", {"gram"}),
        ("left, right = x, x\nt = left @ right.mH", {"gram"}),
        ("left, right = (z.reshape(-1, 3) for z in (x, x))\nt = left[:, :2] @ right[:, 1:].mT", {"gram"}),
        ("t = x @ (x if y is None else y).mH", {"gram"}),
        ("w = v * s\ny = w @ v.mT", {"function"}),
        ("u = v\ny = (v * s) @ u.mH", {"function"}),
        ("for _ in range(5):\n    z = y\n    y = 1.5 * y - z @ y", {"iteration"}),
        ("for _ in range(5):\n    z = y @ y\n    y = z", {"iteration"}),
        # in place and in one call
        ("torch.bmm(x[:, i:], x[:, :j].mT, out=t[:, i:, :j])", {"gram"}),
        ("torch.mm(input=x, mat2=x.T, out=t)", {"gram"}),
        ("t = torch.baddbmm(t, x, x.mT, beta=0.9)", {"gram"}),
        ("t.addmm_(x, x.T, alpha=0.1)", {"gram"}),
        ("t = torch.einsum('...ik,...jk->...ij', x, x)", {"gram"}),
        ("t = torch.nn.functional.linear(x, x)", {"gram"}),
        ("for _ in range(5):\n    torch.matmul(y, y, out=z)\n    y.copy_(z)", {"iteration"}),
        ("while error > tol:\n    y @= h(y)", {"iteration"}),
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
        "from manifolds import linalg\nvalues, vectors = linalg.eigh(a)",
        "z = x + 1\ny = x @ z.mT",
        "y = parts[0] @ parts[1].mT",
        "left, right = (z.flatten(1) for z in (x, y))\nt = left @ right.mT",
        "s = torch.einsum('ij,ij->', x, x)",
        "torch.bmm(x, y.mT, out=t)",
        "for f in parts:\n    torch.matmul(f, x, out=y)",
    ],
)
def test_what_does_not(source: str) -> None:
    assert written_out(ast.parse(source), "m") == {}


def test_products_of_an_argument_with_itself_are_found_where_it_is_given_twice() -> None:
    source = """
def product(x, y):
    left, right = (a.reshape(-1, *a.shape[-2:]) for a in (x, y))
    torch.bmm(left[:, 1:], right.mH, out=t)

def apart(x, y): return product(x, y)
def twice(x): return product(x, x.clone())
"""
    tree = ast.parse(source)
    pairs = multiplies(tree, imports(tree))
    assert pairs == {"product": {(0, 1)}}
    assert written_out(tree, "m", pairs) == {"m.twice": {"gram"}}
