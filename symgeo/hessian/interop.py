"""The operators here as linear operators of curvlinops, and the other way round.

curvlinops keeps its base class in a private module: what is known of it stands in this file alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor

from symgeo.hessian.operator import HessianOperator
from symgeo.hessian.space import FlatSpace

if TYPE_CHECKING:
    from curvlinops._torch_base import PyTorchLinearOperator

INSTALL = "pip install 'symgeo[curv]'"


def to_curvlinops(operator: HessianOperator) -> PyTorchLinearOperator:
    """The same map as a self-adjoint linear operator of curvlinops: ``P @ H @ P``, sums and its estimators take it.

    An operator in parameter coordinates acts on lists of tensors, one ``[*shape]`` or ``[*shape, columns]`` for each
    parameter in the order of the dict, as curvlinops' own do.  A Riemannian one acts on the coordinates of its frame,
    one tensor ``[d]``: it has a spectrum and a trace there, and no sum with matrices in parameter coordinates.

    curvlinops weights batches by their sizes (losses that are means), this package all alike: the two agree where the
    batches are equally long.

    Raises ``ValueError`` for anything but a `HessianOperator`, ``ImportError`` where curvlinops is not installed, or
    is not of a version that is known.

    >>> H = to_curvlinops(euclidean_hessian(loss, params, batches))  # doctest: +SKIP
    >>> (P @ H @ P).to_scipy()  # doctest: +SKIP
    """
    if not isinstance(operator, HessianOperator):
        raise ValueError(f"to_curvlinops: needed a HessianOperator; got {type(operator).__name__}")
    return _adapter(_base("to_curvlinops"))(operator)


def from_curvlinops(linop: PyTorchLinearOperator, params: Mapping[str, Tensor], chunk: int | None = None,
                    check: bool = True) -> HessianOperator:
    """A symmetric linear operator of curvlinops on the tensors of ``params``, in this order, as a `HessianOperator`.

    So it has the spectra, traces and blocks of the operators here.  Products are curvlinops' own, with its weights of
    the batches; see :func:`to_curvlinops`.  ``check`` compares one pair of products (symmetry).

    Hessians of curvlinops through ``layer_norm`` are wrong with torch 2.13, which ``check`` finds in small models but
    not in all large ones: take :func:`euclidean_hessian`, which is right.

    Raises ``ValueError`` for anything else, for tensors of other shapes, and for a map that is not symmetric;
    ``ImportError`` as :func:`to_curvlinops` does.

    >>> kfac = curvlinops.KFACLinearOperator(model, loss, params, data)  # doctest: +SKIP
    >>> from_curvlinops(kfac, params).eigvalsh(5)  # doctest: +SKIP
    """
    if not isinstance(linop, _base("from_curvlinops")):
        raise ValueError(f"from_curvlinops: needed a linear operator of curvlinops; got {type(linop).__name__}")
    space, name = FlatSpace(params), type(linop).__name__
    shapes = list(space.shapes.values())
    for side, found in (("takes", linop._in_shape), ("returns", linop._out_shape)):
        if found != shapes:
            raise ValueError(f"from_curvlinops: the parameters have shapes {_shown(shapes)}; {name} {side} "
                             f"{_shown(found)}")

    def product(v: Tensor) -> Tensor:
        with torch.enable_grad():  # its products may run autograd themselves
            return (linop @ v.to(linop.device, linop.dtype)).detach().to(v)

    return HessianOperator(product, space, name, chunk).verified(check)


def _shown(shapes: list[Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)


def _base(caller: str) -> Any:
    """The base class of curvlinops' operators.

    3.0 and the versions whose operators take parameters as dicts share it: lists of tensors in either.
    """
    try:
        import curvlinops  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{caller} needs curvlinops, which does not import ({error}): {INSTALL}") from error
    try:
        from curvlinops._torch_base import PyTorchLinearOperator as Base
    except ImportError as error:
        raise _unknown(caller) from error
    if list(inspect.signature(Base.__init__).parameters) != ["self", "in_shape", "out_shape"]:
        raise _unknown(caller)
    return Base


def _unknown(caller: str) -> ImportError:
    try:
        found = f"version {version('curvlinops-for-pytorch')}"
    except PackageNotFoundError:
        found = "one of unknown version"
    return ImportError(f"{caller} needs curvlinops 3; found {found}, whose operators are built otherwise: {INSTALL}")


@cache
def _adapter(base: Any) -> Any:
    """The subclass that wraps a `HessianOperator`; one for each base, so that its type can be compared."""

    class SymgeoLinearOperator(base):
        """A `HessianOperator` for curvlinops."""

        SELF_ADJOINT = True

        def __init__(self, operator: HessianOperator):
            space = operator.space
            shapes = list(space.shapes.values()) if isinstance(space, FlatSpace) else [Size((space.size,))]
            super().__init__(shapes, shapes)
            self.operator, self._shapes = operator, shapes

        @property
        def dtype(self) -> torch.dtype:
            return self.operator.dtype

        @property
        def device(self) -> torch.device:
            return self.operator.device

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            columns = X[0].shape[-1]
            flat = torch.cat([x.reshape(shape.numel(), columns) for x, shape in zip(X, self._shapes)])
            pieces = (self.operator @ flat).split([shape.numel() for shape in self._shapes])
            return [piece.reshape(*shape, columns) for piece, shape in zip(pieces, self._shapes)]

    return SymgeoLinearOperator
