"""Second derivatives of functions of several tensors, in every way that torch can take them.

Forward over reverse is tried first.  ``grad`` of ``jvp`` and ``jvp`` of ``jvp`` are never used: through ``layer_norm``
they are silently wrong in torch 2.13, while ``jvp`` of ``grad`` and ``vjp`` of ``grad`` are right.  Functions take the
tensors as they are, not cut from one flat vector, and the last backward pass records no graph: a product then needs
no more time and memory than the derivatives themselves.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from symgeo.errors import RecomputationError, is_out_of_memory
from symgeo.functional import Params, recomputable
from symgeo.hessian.space import FlatSpace

Function = Callable[[Params], Tensor]
Linear = Callable[[Tensor], Tensor]

_OPERATION = (
    r"aten::(\w+)", r"forward AD with (\w+)", r"derivative for '?(\w+)'? is not implemented",
)


@contextmanager
def differentiable() -> Iterator[None]:
    """Inside, attention runs in its plain kernel: the fused ones have no second derivative."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def pulled(f: Function, x: Params, w: Tensor | None = None) -> Params:
    """``J^T w``, for a scalar function by default its gradient; with no graph to differentiate it in reverse again."""
    value, pull, *_ = vjp(f, x)
    return pull(torch.ones_like(value) if w is None else w, retain_graph=False, create_graph=False)[0]


def forward_over_reverse(f: Function, x: Params, v: Params) -> Params:
    """``H v`` as the directional derivative of the gradient."""
    return jvp(lambda y: pulled(f, y), (x,), (v,))[1]


def reverse_over_reverse(f: Function, x: Params, v: Params) -> Params:
    """``H v`` as the gradient of ``<grad f, v>``, for what forward mode cannot pass."""
    return vjp(grad(f), x)[1](v, retain_graph=False, create_graph=False)[0]


def forward(f: Function, x: Params, v: Params) -> Tensor:
    """``J v`` in forward mode."""
    return jvp(f, (x,), (v,))[1]


def transposed_twice(f: Function, x: Params, v: Params) -> Tensor:
    """``J v`` as the transpose of the linear map ``w -> J^T w``, for what forward mode cannot pass."""
    out, pull, *_ = vjp(f, x)
    return vjp(lambda w: pull(w)[0], torch.zeros_like(out))[1](v)[0]


def double_backward(f: Function, x: Params, v: Params) -> Params:
    """``H v`` as the gradient of ``<grad f, v>``, by backward passes that may compute activations again."""
    leaves = {name: p.detach().requires_grad_() for name, p in x.items()}
    with recomputable():
        slopes = torch.autograd.grad(f(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
        along = torch.stack([(slope * v[name]).sum() for name, slope in zip(leaves, slopes)]).sum()
        images = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, images))


SECOND = (forward_over_reverse, reverse_over_reverse)
FIRST = (forward, transposed_twice)


class Columns:
    """Applies one linear map ``v -> way(v)`` to every column, by the first of several equal ways that works.

    Columns are differentiated together (``vmap``); a function that cannot be (random numbers from a fixed
    generator, in-place updates) is differentiated one column after the other.  What worked is remembered.

    last : the way for what computes parts of itself again in backward passes, which the others cannot

    Raises ``ValueError`` naming the operation when no way works.
    """

    def __init__(self, ways: Sequence[Linear], last: Linear | None = None):
        self.ways, self.last = list(ways), last
        self.plans = [(way, together) for together in (True, False) for way in self.ways]

    @property
    def recomputing(self) -> bool:
        """Whether only the last way has worked."""
        return self.last is not None and self.plans == [(self.last, False)]

    def __call__(self, v: Tensor) -> Tensor:
        """``(d, k) -> (..., k)``."""
        failures: list[Exception] = []
        with differentiable():
            while self.plans:
                try:
                    return self._apply(v, *self.plans[0]).detach()
                except (RuntimeError, RecomputationError) as error:
                    if is_out_of_memory(error):
                        raise
                    failures.append(error)
                    self.plans.pop(0)
                    if self.last is not None and not self.plans and any(map(_recomputes, failures)):
                        self.plans = [(self.last, False)]
                        return self._apply(v, self.last, False).detach()
        self.plans = [(way, False) for way in self.ways]
        raise _explained(failures) from failures[0]

    def reject(self) -> bool:
        """Strikes the way in use; False if no other is left."""
        self.plans = [plan for plan in self.plans if plan[0] is not self.plans[0][0]]
        return bool(self.plans)

    @staticmethod
    def _apply(v: Tensor, way: Linear, together: bool) -> Tensor:
        if together and v.shape[1] > 1:
            return vmap(way, in_dims=1)(v).movedim(0, -1)  # with out_dims=-1 torch fails where way(v) is constant
        if v.shape[1] == 1:
            return way(v.squeeze(1)).unsqueeze(-1)
        return torch.stack([way(column).detach() for column in v.unbind(1)], dim=-1)


def _recomputes(failure: Exception) -> bool:
    """Whether a failure is about activation checkpoints, or about the hooks that they leave on embeddings."""
    return isinstance(failure, RecomputationError) or any(
        words in str(failure) for words in ("yet support saved tensor hooks", "call Tensor.requires_grad_()"))


def _explained(failures: Sequence[Exception]) -> Exception:
    """The error that names the operation without a second derivative; the original one if it is about another thing."""
    for failure in failures:
        found = next((match[1] for pattern in _OPERATION if (match := re.search(pattern, str(failure)))), None)
        name = found or _custom_function(failure)
        if name and name.endswith("_"):
            return ValueError(
                f"the model cannot be differentiated twice: {name} changes a tensor in place; call model.eval() where "
                "a module keeps running statistics, and write no results into existing tensors"
            )
        if name:
            return ValueError(
                f"the model cannot be differentiated twice: {name} has no second derivative in torch "
                f"{torch.__version__}; use a plain implementation of it (in transformers: "
                "attn_implementation='eager', experts_implementation='eager')"
            )
    return failures[0]


def _custom_function(failure: Exception) -> str | None:
    """The ``torch.autograd.Function`` in whose ``apply`` an error arose, if it did in one."""
    for frame, _ in traceback.walk_tb(failure.__traceback__):
        owner = frame.f_locals.get("cls")
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            return owner.__name__
    return None


class SecondDerivative:
    """The mean Hessian of several functions at the point of a flat space, as a product with columns in flat order."""

    def __init__(self, functions: Sequence[Function], space: FlatSpace):
        self.functions, self.space = list(functions), space
        self.maps = [second_ways(f, space) for f in self.functions]

    def __call__(self, v: Tensor) -> Tensor:
        """``H V (d, k)`` for ``V (d, k)``."""
        return mean_of(self.maps, v)

    def gradient(self) -> Tensor:
        """The mean gradient ``(d,)``."""
        total = torch.zeros_like(self.space.point)
        for f in self.functions:
            total += gradient(f, self.space)
        return total / len(self.functions)

    def verified(self) -> float:
        """The size of the gradient, after checks: two gradients agree, and products are finite and symmetric.

        Raises ``ValueError`` as :func:`gradient` and :func:`make_symmetric` do, for any of the batches.
        """
        scale = check_repeatable("gradients", lambda: gradient(self.functions[0], self.space))
        for f in self.functions[1:]:
            gradient(f, self.space)
        for columns in self.maps:
            make_symmetric(columns, probes(self.space.point), scale, "Hessian")
        for f, columns in zip(self.functions, self.maps):
            if columns.recomputing:
                check_by_differences(f, columns, self.space, scale)
        return scale


def make_symmetric(columns: Columns, v: Tensor, scale: float, name: str) -> None:
    """Strikes ways of the product that are not symmetric only because torch masks gradients and no forward derivative.

    ``nn.Embedding`` with a ``padding_idx`` masks that row's gradient: where the product is symmetric up to such rows,
    the way in reverse mode, which masks both sides, is used from then on.
    ``ValueError`` for any other asymmetry, and for products that are not finite.
    """
    image = columns(v)
    gap = asymmetry(v, image, scale)
    while gap:
        seen = v * (image != 0).any(dim=1, keepdim=True)  # masked rows are zero, whatever v is
        gap = asymmetry(seen, columns(seen), scale)
        if gap or not columns.reject():
            raise not_symmetric(name, gap)
        image = columns(v)
        gap = asymmetry(v, image, scale)


def check_by_differences(f: Function, columns: Columns, space: FlatSpace, scale: float) -> None:
    """``ValueError`` where the product differs from a central difference of gradients by more than a tenth.

    A double backward pass leaves out, without a word, what a custom backward pass computes outside of autograd.
    scale : the size of the gradient, whose rounding the difference has
    """
    v = probes(space.point)[:, :1]
    v, precision = v / v.norm(), max(torch.finfo(dtype).eps for dtype in space.dtypes.values())
    step = precision ** (1 / 3) * (1 + float(space.point.norm()))
    ahead, behind = (gradient(f, space, space.point + sign * step * v.squeeze(1)) for sign in (1.0, -1.0))
    difference, image = (ahead - behind) / (2 * step), columns(v).squeeze(1)
    rounding = precision * scale * space.size**0.5 / step
    if float((difference - image).norm()) > 0.1 * float(difference.norm()) + 10 * rounding:
        raise ValueError(
            "the model cannot be differentiated twice: a backward pass in it is not seen by autograd; use a plain "
            "implementation (in transformers: attn_implementation='eager'), or switch activation checkpoints off"
        )


def gradient(f: Function, space: FlatSpace, at: Tensor | None = None) -> Tensor:
    """The gradient of ``f`` at the point of the space or another one, in flat order; zero for a constant.

    Raises ``ValueError`` where ``f`` is not finite, and for gradients that torch keeps as sparse tensors.
    """
    where = space.tangent(space.point if at is None else at)
    leaves = {name: p.detach().requires_grad_() for name, p in where.items()}
    with differentiable(), recomputable():
        value = f(leaves)
        check_finite_loss(value)
        if not value.requires_grad:
            return torch.zeros_like(space.point)
        slopes = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    for name, slope in zip(leaves, slopes):
        if slope.layout != torch.strided:
            raise ValueError(f"the gradient of {name!r} is sparse, and has no second derivative; make the module with "
                             "sparse=False")
    return space.coordinates(dict(zip(leaves, slopes)))


def check_finite_loss(value: Tensor) -> None:
    """``ValueError`` for the loss of a batch without rows or labels, and of any other that is not finite."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"the loss of a batch is {value.detach().flatten()[0].item()} at the parameters; needed a "
                         "finite one: check for batches without rows or without labels that count")


def mean_of(maps: Sequence[Linear], v: Tensor) -> Tensor:
    """``mean_b maps[b](v)``: batches are weighed equally, as the loss is their mean."""
    total = maps[0](v)
    for other in maps[1:]:
        total = total + other(v)
    return total / len(maps)


def check_repeatable(what: str, compute: Callable[[], Tensor]) -> float:
    """The largest entry; ``ValueError`` when two evaluations differ by more than rounding: dropout, most often."""
    first, second = compute(), compute()
    if not bool(torch.isfinite(first).all()):
        raise ValueError(f"the {what} at the parameters are not finite; check the data and the weights")
    scale = float(first.abs().max()) if first.numel() else 0.0
    gap = float((first - second).abs().max()) if first.numel() else 0.0
    tolerance = 1e-8 if torch.finfo(first.dtype).eps < 1e-10 else 1e-3
    if gap > tolerance * scale:
        raise ValueError(
            f"the loss is not deterministic: two {what} of the same batch differ by {gap / scale:.1e} of their size; "
            "call model.eval() to switch dropout off"
        )
    return scale


def probes(like: Tensor) -> Tensor:
    """Two fixed random columns of the length, dtype and device of a vector."""
    v = torch.randn(like.shape[0], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return v.to(like)


def asymmetry(v: Tensor, image: Tensor, scale: float) -> float:
    """``|v_0 S v_1 - v_1 S v_0|`` relative to the length of ``image = S v``; 0 where it is rounding.

    For random ``v`` with entries of size 1 that is the relative asymmetry, whatever the dimension.
    scale : the size of the gradient, against which entries of S count as rounding.  ``ValueError`` if not finite.
    """
    if not bool(torch.isfinite(image).all()):
        raise ValueError("the curvature has products that are not finite; check the data and the weights")
    gap = float((v[:, 0] @ image[:, 1] - v[:, 1] @ image[:, 0]).abs())
    length, size = float(v.norm(dim=0).amax()), float(image.norm(dim=0).amax())
    precision = torch.finfo(v.dtype).eps
    bound = (1e-4 if precision < 1e-10 else 1e-2) * size + precision**0.5 * scale * length**2
    return gap / size if gap > bound else 0.0


def not_symmetric(name: str, gap: float) -> ValueError:
    """The error for a curvature that is no symmetric matrix."""
    return ValueError(
        f"the {name} is not symmetric (by {gap:.1e}): the loss or metric is random, or a derivative in it is wrong; "
        "call model.eval(), and use no forward-mode derivatives inside the loss"
    )


def second_ways(f: Function, space: FlatSpace) -> Columns:
    """``V -> H V`` for the Hessian of one function at the point."""
    return Columns([_bound(way, f, space) for way in SECOND], _bound(double_backward, f, space))


def _bound(way: Callable[[Function, Params, Params], Params], f: Function, space: FlatSpace) -> Linear:
    return lambda v: space.coordinates(way(f, space.tangent(space.point), space.tangent(v)))
