"""curvlinops: the adapter both ways, curvlinops as an oracle for products, and what happens without it."""

from __future__ import annotations

import inspect
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hessian_cases import attention, dense_hessian, error, mlp, normal, seeded
from networks import params_of
from scipy.sparse.linalg import eigsh
from torch import Size, Tensor, nn

from symgeo import ParameterManifold, Symmetry, functional_loss
from symgeo.functional import Params
from symgeo.groups import GeneralLinear
from symgeo.hessian import (
    HessianOperator,
    block,
    euclidean_hessian,
    from_curvlinops,
    ggn,
    model_loss,
    riemannian_hessian,
    to_curvlinops,
)
from symgeo.hessian.space import FlatSpace

needed = pytest.mark.skipif(find_spec("curvlinops") is None, reason="curvlinops is not installed")
SQUARES = [(normal(7, 3, seed=1), normal(7, 2, seed=2)), (normal(7, 3, seed=3), normal(7, 2, seed=4))]
CLASSES = [(x, y.argmax(1)) for x, y in SQUARES]


class LikeCurvlinops:
    """What the adapter needs of a base class."""

    def __init__(self, in_shape: list[Size], out_shape: list[Size]) -> None:
        self.shapes = in_shape, out_shape


def install(monkeypatch: pytest.MonkeyPatch, base: type | None) -> None:
    """A package curvlinops with a given base class, or without one."""
    private = ModuleType("curvlinops._torch_base")
    if base is not None:
        private.PyTorchLinearOperator = base  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "curvlinops", ModuleType("curvlinops"))
    monkeypatch.setitem(sys.modules, "curvlinops._torch_base", private)


def matrix(like: Params, seed: int = 5) -> tuple[HessianOperator, Tensor]:
    """A random symmetric matrix on the space of some parameters."""
    space = FlatSpace(like)
    root = normal(space.size, space.size, seed=seed)
    return HessianOperator(lambda v: (root + root.T) @ v, space, "matrix"), root + root.T


def theirs(name: str, model: nn.Module, criterion: nn.Module, data: Any) -> Any:
    """One of their operators, with parameters as its version takes them."""
    import curvlinops

    operator = getattr(curvlinops, name)
    annotation = str(inspect.signature(operator.__init__).parameters["params"].annotation).lower()
    params = dict(model.named_parameters())
    return operator(model, criterion, params if "dict" in annotation else list(params.values()), data)


def dense(linop: Any) -> Tensor:
    return linop @ torch.eye(linop.shape[1], dtype=linop.dtype)


def test_without_curvlinops_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    params = {"w": torch.ones(3)}
    operator = euclidean_hessian(lambda p, batch: p["w"].square().sum(), params, [None])
    for call in (lambda: to_curvlinops(operator), lambda: from_curvlinops(object(), params)):
        with pytest.raises(ImportError, match=r"_curvlinops needs curvlinops, .*: pip install 'symgeo\[curv\]'$"):
            call()


@pytest.mark.parametrize("base", [None, type("Other", (), {"__init__": lambda self, space: None})])
def test_an_unknown_version_is_named(base: type | None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, base)
    monkeypatch.setattr("symgeo.hessian.interop.version", lambda name: "5.7.0")
    with pytest.raises(ImportError, match=r"curvlinops 3; found version 5\.7\.0, .*: pip install 'symgeo\[curv\]'$"):
        to_curvlinops(matrix({"w": torch.ones(3)})[0])


def test_lists_of_tensors_are_flat_order(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, LikeCurvlinops)
    like = {"a": normal(2, 3), "b": torch.ones((), dtype=torch.float64), "c": normal(5)}
    operator, full = matrix(like)
    linop: Any = to_curvlinops(operator)
    assert isinstance(linop, LikeCurvlinops) and linop.SELF_ADJOINT
    assert linop.shapes[0] == linop.shapes[1] == [Size((2, 3)), Size(()), Size((5,))]
    assert (linop.dtype, linop.device) == (torch.float64, torch.device("cpu"))
    for columns in (1, 7):
        v = normal(12, columns, seed=2)
        found = linop._matmat([v[:6].reshape(2, 3, columns), v[6], v[7:]])
        assert [x.shape for x in found] == [(2, 3, columns), (columns,), (5, columns)]
        assert error(torch.cat([x.reshape(-1, columns) for x in found]), full @ v) <= 1e-14
    assert type(linop) is type(to_curvlinops(operator))
    with pytest.raises(ValueError, match="to_curvlinops: needed a HessianOperator; got Tensor"):
        to_curvlinops(full)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from_curvlinops: needed a linear operator of curvlinops; got Tensor"):
        from_curvlinops(full, like)


@needed
@pytest.mark.parametrize("criterion, data", [("mse", SQUARES), ("cross_entropy", CLASSES)])
def test_products_equal_those_of_curvlinops(criterion: str, data: list[tuple[Tensor, Tensor]]) -> None:
    model = mlp()
    loss, params, module = model_loss(model, criterion), params_of(model), {
        "mse": nn.MSELoss(), "cross_entropy": nn.CrossEntropyLoss()}[criterion]
    for ours, name in ((euclidean_hessian, "HessianLinearOperator"), (ggn, "GGNLinearOperator")):
        operator, linop = ours(loss, params, data), theirs(name, model, module, data)
        v = normal(32, 5, seed=9)
        assert error(operator @ v, linop @ v) <= 1e-10
        assert error(to_curvlinops(operator) @ v, linop @ v) <= 1e-10
        assert error(from_curvlinops(linop, params) @ v, operator @ v) <= 1e-10


@needed
def test_curvlinops_weights_batches_by_their_sizes() -> None:
    model, data = mlp(), [SQUARES[0], (SQUARES[1][0][:3], SQUARES[1][1][:3])]
    loss, params = functional_loss(model, nn.functional.mse_loss), params_of(model)
    first, second = (euclidean_hessian(loss, params, [batch]) for batch in data)
    linop = theirs("HessianLinearOperator", model, nn.MSELoss(), data)
    v = normal(32, seed=9)
    assert error((0.7 * first + 0.3 * second) @ v, linop @ v) <= 1e-10
    assert error(euclidean_hessian(loss, params, data) @ v, linop @ v) > 1e-3


@needed
def test_it_composes_with_their_operators() -> None:
    model = mlp()
    loss, params = model_loss(model, "mse"), params_of(model)
    ours, x = euclidean_hessian(loss, params, SQUARES), dense_hessian(loss, params, SQUARES)
    h, p = to_curvlinops(ours), theirs("GGNLinearOperator", model, nn.MSELoss(), SQUARES)
    y = ggn(loss, params, SQUARES).dense()
    v = normal(32, 3, seed=4)
    for linop, expected in ((p @ h @ p, y @ x @ y), (h + p, x + y), (p - h, y - x), (h * 2.0, 2 * x), (h @ p, x @ y),
                            ((h @ p).adjoint(), y @ x)):
        assert error(linop @ v, expected @ v) <= 1e-10
        assert error(torch.from_numpy(linop.to_scipy() @ v.numpy()), expected @ v) <= 1e-10
        assert error(torch.from_numpy(linop.to_scipy().rmatmat(v.numpy())), expected.T @ v) <= 1e-10
    pieces = [normal(*w.shape, seed=i) for i, w in enumerate(params.values())]
    for found, expected in zip(h @ pieces, (ours @ dict(zip(params, pieces))).values()):
        assert error(found, expected) <= 1e-12
    found = eigsh((p @ h @ p).to_scipy(), k=3, which="LA", return_eigenvectors=False, v0=np.ones(32))
    assert error(torch.from_numpy(np.sort(found)), torch.linalg.eigvalsh(y @ x @ y)[-3:]) <= 1e-9


@needed
def test_there_and_back() -> None:
    model, data = attention()
    loss, params = model_loss(model, "mse"), params_of(model)
    operator, expected = euclidean_hessian(loss, params, data), dense_hessian(loss, params, data)
    back = from_curvlinops(to_curvlinops(operator), params)
    assert repr(back) == "HessianOperator(SymgeoLinearOperator, 50 x 50, torch.float64)"
    assert error(back.dense(), expected) <= 1e-12
    assert error((back - 0.5 * operator).dense(), 0.5 * expected) <= 1e-12
    part = expected[30:40, 30:40]  # after q and k
    assert error(block(back, "v").dense(), part) <= 1e-12
    once = to_curvlinops(block(operator, "v"))
    twice = from_curvlinops(once @ once, {"v": params["v"]})
    assert error(twice.eigvalsh(3), torch.linalg.eigvalsh(part @ part)[-3:]) <= 1e-9


@needed
def test_riemannian_operators_are_one_tensor_of_coordinates() -> None:
    params = {"B": normal(5, 2), "A": normal(2, 3, seed=1)}
    manifold = ParameterManifold(params, Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()}))
    operator = riemannian_hessian(lambda p, w: ((p["B"] @ p["A"]).tanh() - w).square().mean(), params,
                                  [normal(5, 3, seed=2)], manifold)
    linop = to_curvlinops(operator)
    assert linop.shape == (12, 12)
    (found,) = linop @ [torch.ones(12, dtype=torch.float64)]
    assert error(found, operator.dense().sum(1)) <= 1e-12
    top = eigsh(linop.to_scipy(), k=1, which="LA", return_eigenvectors=False, v0=np.ones(12))
    assert error(torch.from_numpy(top), torch.linalg.eigvalsh(operator.dense())[-1:]) <= 1e-10


@needed
def test_kfac_and_inverses_get_spectra() -> None:
    from curvlinops import CGInverseLinearOperator

    model = seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), 3, 0.5)
    params = params_of(model)
    kfac = from_curvlinops(theirs("KFACLinearOperator", model, nn.MSELoss(), SQUARES[:1]), params)
    assert kfac.eigvalsh()[0] >= -1e-12 and kfac.name == "KFACLinearOperator"
    like = {"w": normal(11)}
    full = matrix(like)[1] / 7
    definite = HessianOperator(lambda v: full @ (full @ v) + v, FlatSpace(like), "definite")
    inverse = from_curvlinops(CGInverseLinearOperator(to_curvlinops(definite), eps=0, tolerance=1e-10), like)
    assert error(inverse.dense(), torch.linalg.inv(full @ full + torch.eye(11, dtype=torch.float64))) <= 1e-8


@needed
def test_their_wrong_products_through_layer_norm_are_refused() -> None:
    """They take ``jvp`` of ``jacrev``, wrong through a layer norm in torch 2.13; ``jvp`` of ``grad`` is right."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)), 0, 0.5)
    loss, params = model_loss(model, "mse"), params_of(model)
    expected = dense_hessian(loss, params, SQUARES)
    assert error(euclidean_hessian(loss, params, SQUARES).dense(), expected) <= 1e-12
    linop = theirs("HessianLinearOperator", model, nn.MSELoss(), SQUARES)
    if error(dense(linop), expected) > 1e-6:
        with pytest.raises(ValueError, match="HessianLinearOperator is not symmetric"):
            from_curvlinops(linop, params)
    else:
        assert error(from_curvlinops(linop, params).dense(), expected) <= 1e-10


@needed
def test_refusals() -> None:
    model = mlp()
    loss, params = model_loss(model, "mse"), params_of(model)
    h = to_curvlinops(euclidean_hessian(loss, params, SQUARES))
    p = to_curvlinops(ggn(loss, params, SQUARES))
    with pytest.raises(ValueError, match=r"shapes \(5, 3\), \(5,\), \(2, 5\); SymgeoLinearOperator takes \(5, 3\), "):
        from_curvlinops(h, dict(list(params.items())[:3]))
    with pytest.raises(ValueError, match="not symmetric"):
        from_curvlinops(h @ p, params)
    assert from_curvlinops(h @ p, params, check=False).shape == (32, 32)
