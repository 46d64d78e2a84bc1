"""What a transformer layer is made of, in terms of parameter names: the vocabulary of the family tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Linear:
    """An affine map: the names of its weight and bias, and whether the weight is stored (in, out)."""

    weight: str
    bias: str | None
    transposed: bool = False

    def renamed(self, rule: Callable[[str], str]) -> Linear:
        """The same map under other names."""
        return Linear(rule(self.weight), rule(self.bias) if self.bias else None, self.transposed)

    def outputs(self, axis: str) -> dict[str, str]:
        """Patterns of a map whose outputs transform by ``axis``."""
        patterns = {self.weight: f"_ {axis}" if self.transposed else f"{axis} _"}
        return patterns | ({self.bias: axis} if self.bias else {})

    def inputs(self, axis: str) -> dict[str, str]:
        """Patterns of a map whose inputs transform by ``axis``."""
        return {self.weight: f"{axis} _" if self.transposed else f"_ {axis}"}


@dataclass(frozen=True)
class Attention:
    """Multi-head attention: ``o(softmax(q k^T) v)`` with ``kv_heads`` key and value heads for ``heads`` query heads.

    ``inputs`` are the maps to query, key and value; one map three times is a fused projection whose outputs are
    three consecutive slices.  ``rotary`` is the pairing of its coordinates ("half", "interleaved", or "" without).
    ``extra_key``, ``extra_value`` name learned extra tokens, shape (1, 1, width).
    """

    inputs: tuple[Linear, Linear, Linear]
    output: Linear
    heads: int
    kv_heads: int
    rotary: str = ""
    extra_key: str | None = None
    extra_value: str | None = None
    shared_zero_token: bool = False

    @property
    def fused(self) -> bool:
        """Whether query, key and value are slices of one parameter."""
        return self.inputs[0].weight == self.inputs[1].weight


@dataclass(frozen=True)
class MLP:
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` with a gate."""

    up: Linear
    down: Linear
    gate: Linear | None = None
    homogeneous: bool = False
    odd: bool = False


@dataclass(frozen=True)
class Norm:
    """A normalisation with learned gain and bias; ``centred`` when it removes the mean (LayerNorm).

    ``eps`` is what it adds to the mean square; only where it is 0 does the norm remove scales exactly.
    """

    weight: str
    bias: str | None
    centred: bool
    eps: float = 1e-5

    def renamed(self, rule: Callable[[str], str]) -> Norm:
        """The same norm under other names."""
        return replace(self, weight=rule(self.weight), bias=rule(self.bias) if self.bias else None)


@dataclass(frozen=True)
class Layer:
    """One transformer layer, with names relative to it.

    prenorm : norms stand before attention and MLP and feed nothing else;
    centred_readers : everything that reads the residual stream removes its mean first;
    final_norm : in the last layer of a post-norm stack, the norm that reads its output, if there is one.
    """

    attention: Attention
    mlp: MLP | None = None
    attention_norm: Norm | None = None
    mlp_norm: Norm | None = None
    prenorm: bool = False
    centred_readers: bool = False
    final_norm: Norm | None = None


def linear(module: nn.Module, name: str) -> Linear:
    """The affine submodule ``name`` of ``module``."""
    child = module.get_submodule(name)
    bias = f"{name}.bias" if getattr(child, "bias", None) is not None else None
    return Linear(f"{name}.weight", bias, transposed=type(child).__name__ == "Conv1D")


def norm(module: nn.Module, name: str) -> Norm | None:
    """The normalisation ``name``, or None where it has no plain gain (none learned, or stored in another form)."""
    child = module.get_submodule(name)
    kind = type(child).__name__
    gain, bias = getattr(child, "weight", None), getattr(child, "bias", None)
    if gain is None or not (isinstance(child, nn.LayerNorm) or kind in PLAIN_RMS_NORMS):
        return None
    return Norm(f"{name}.weight", f"{name}.bias" if bias is not None else None,
                centred=isinstance(child, nn.LayerNorm), eps=child.eps if isinstance(child, nn.LayerNorm) else 1e-5)


PLAIN_RMS_NORMS = ("RMSNorm", "LlamaRMSNorm")


def is_homogeneous(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``f(s x) = s f(x)`` for s > 0, decided by trying."""
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    with torch.no_grad():
        return bool(torch.allclose(activation(2.5 * x), 2.5 * activation(x), atol=1e-12))


def is_odd(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``f(-x) = -f(x)``, decided by trying."""
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    with torch.no_grad():
        return bool(torch.allclose(activation(-x), -activation(x), atol=1e-12))
