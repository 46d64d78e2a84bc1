"""Models that compute in the precision of their parameters, also where their code asks for a lower one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
#: methods that name a precision without naming a dtype
_CASTS: dict[Callable[..., Any], torch.dtype] = {
    torch.Tensor.half: torch.float16, torch.Tensor.bfloat16: torch.bfloat16, torch.Tensor.float: torch.float32,
}
#: tensors made from nothing, in the default dtype unless one is named
_CONSTRUCTORS: frozenset[Callable[..., Any]] = frozenset({
    torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.arange, torch.linspace, torch.logspace,
    torch.tensor, torch.scalar_tensor,
})
#: a dtype here is a reading of the same bytes
_REINTERPRETING: frozenset[Callable[..., Any]] = frozenset({torch.Tensor.view})


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, code that asks for a precision below ``dtype`` gets ``dtype``.

    Norms, softmaxes and rotary angles of many models are computed in float32 whatever the precision of their
    parameters (``x.float()``, ``softmax(x, dtype=torch.float32)``), which limits what can be measured on a float64
    model to about 1e-7.  Two more things that hide derivatives are undone: ``padding_idx`` of an embedding, which
    drops the gradient of a row that is read all the same, and fused attention kernels, which have no second or
    forward derivative.  Values and dtypes of tensors that exist already stay: convert the parameters, the buffers
    and the inputs as well.  Works inside, around and across the transforms of ``torch.func``.

    Raises ``ValueError`` if ``dtype`` is not a real floating-point type.

    >>> x = torch.ones(2, dtype=torch.float64) / 3
    >>> with computing_in(torch.float64):
    ...     inside = x.float()
    >>> inside.dtype, x.float().dtype
    (torch.float64, torch.float32)
    """
    if dtype not in _FLOATING:
        raise ValueError(f"computing_in: needed a real floating-point dtype such as torch.float64, found {dtype}")
    with sdpa_kernel(SDPBackend.MATH), _Raising(dtype):
        yield


@contextmanager
def full_double() -> Iterator[None]:
    """``computing_in(torch.float64)``: a float64 model really computes in float64."""
    with computing_in(torch.float64):
        yield


class _Raising(TorchFunctionMode):
    """Replaces every dtype below a given one in the arguments of torch functions."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        bits = torch.finfo(dtype).bits
        self.dtype = dtype
        self.raised = {low: dtype for low in _FLOATING if torch.finfo(low).bits < bits}
        self.raised |= {low: dtype.to_complex() for low in _COMPLEX if torch.finfo(low).bits < bits}
        self.raised_names = {f"torch.{name}Tensor": dtype for low, name in (
            (torch.float16, "Half"), (torch.bfloat16, "BFloat16"), (torch.float32, "Float")) if low in self.raised}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _CASTS and _CASTS[func] in self.raised:
            return args[0].to(self.raised[_CASTS[func]], **kwargs)
        if func in _REINTERPRETING:
            return func(*args, **kwargs)
        if func is torch.Tensor.type:
            args = tuple(self.raised_names.get(a, a) if isinstance(a, str) else a for a in args)
        if func is torch.nn.functional.embedding:
            kwargs["padding_idx"] = None  # torch passes it by name
        args = tuple(self.raised.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: self.raised.get(x, x) if isinstance(x, torch.dtype) else x for k, x in kwargs.items()}
        result = func(*args, **kwargs)
        if func in _CONSTRUCTORS and kwargs.get("dtype") is None and self._low(result) and not self._copies(args):
            return func(*args, **kwargs | {"dtype": self.raised[result.dtype]})
        return result

    def _low(self, result: Any) -> bool:
        return isinstance(result, Tensor) and result.dtype in self.raised

    @staticmethod
    def _copies(args: Sequence[Any]) -> bool:
        """Whether the values come from a tensor, whose dtype is kept."""
        return any(isinstance(a, Tensor) for a in args)
