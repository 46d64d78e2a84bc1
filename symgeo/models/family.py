"""A family: the names under which one architecture keeps the parts of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from torch import nn

from symgeo.models.structure import MLP, Attention, Layer, is_homogeneous, is_odd, linear, norm
from symgeo.symmetry import Span


@dataclass(frozen=True)
class AttentionNames:
    """Submodules of a layer that make up its attention, and the attributes that hold its head counts."""

    output: str
    heads: str
    query: str = ""
    key: str = ""
    value: str = ""
    fused: str = ""
    kv_heads: str = ""
    rotary: str = ""

    def read(self, module: nn.Module) -> Attention:
        """Query, key, value and output maps with their head counts."""
        heads = int(attribute(module, self.heads))
        kv_heads = int(attribute(module, self.kv_heads)) if self.kv_heads else heads
        query, key, value = (linear(module, name or self.fused) for name in (self.query, self.key, self.value))
        return Attention((query, key, value), linear(module, self.output), heads, kv_heads, self.rotary)

    def owned(self) -> set[str]:
        """The submodules this table accounts for."""
        return {self.query, self.key, self.value, self.fused, self.output} - {""}


class AttentionReader(Protocol):
    """What a family needs of its attention entry: the names, or a reader of its own."""

    def read(self, module: nn.Module) -> Attention:
        """The attention of a layer."""

    def owned(self) -> set[str]:
        """The submodules it accounts for."""


@dataclass(frozen=True)
class MLPNames:
    """Submodules of a layer that make up its MLP."""

    up: str
    down: str
    gate: str = ""
    activation: str = ""


    def read(self, module: nn.Module) -> MLP:
        """The MLP, with what its activation allows."""
        activation = attribute(module, self.activation) if self.activation and not self.gate else None
        return MLP(
            up=linear(module, self.up), down=linear(module, self.down),
            gate=linear(module, self.gate) if self.gate else None,
            homogeneous=activation is not None and is_homogeneous(activation),
            odd=activation is not None and is_odd(activation),
        )


@dataclass(frozen=True)
class Head:
    """What alone reads the output of the last norm: qualified class name of their owner, and their names there.

    A `*` in the name of the norm stands for the last layer.
    """

    owner: str
    norm: str
    linear: str


@dataclass(frozen=True)
class Embeddings:
    """What is added up at the start of the residual stream.

    owner : qualified class name of the module that owns all of it;  sums : spans that are added at the same tokens;
    masks : spans that stand in for the first one of all at masked tokens;
    weights : those of maps whose outputs (first axis) are added;  norm : that of the embeddings, whose output is what
    the first layer reads, and nothing else.
    """

    owner: str
    sums: tuple[tuple[Span, ...], ...] = ()
    masks: tuple[Span, ...] = ()
    weights: tuple[str, ...] = ()
    norm: str = ""


@dataclass(frozen=True)
class Family:
    """One table: the class of the layer and where its parts are.

    layer : qualified class name of the layer module;  prenorm : True, False, or the attribute that says so;
    stack, final_norm : qualified class name of the module that holds the list of layers, and the name there of
    the norm that reads the residual stream last;
    heads : the linear maps that models of this family put behind their last norm.
    """

    name: str
    layer: str
    attention: AttentionReader
    mlp: MLPNames | None = None
    attention_norm: str = ""
    mlp_norm: str = ""
    prenorm: bool | str = True
    stack: str = ""
    final_norm: str = ""
    embeddings: Embeddings | None = None
    heads: tuple[Head, ...] = ()

    def read(self, module: nn.Module, stack: nn.Module | None) -> Layer:
        """The structure of ``module``, a layer of this family in ``stack``."""
        norms = [norm(module, name) if name else None for name in (self.attention_norm, self.mlp_norm)]
        prenorm = self.prenorm if isinstance(self.prenorm, bool) else bool(attribute(module, self.prenorm))
        known = stack is not None and self.stack in qualified_names(stack)
        final = getattr(stack, self.final_norm, None) if known else None
        centred = all(n is not None and n.centred for n in norms) and (not prenorm or isinstance(final, nn.LayerNorm))
        mlp = self.mlp.read(module) if self.mlp else None
        last = None if prenorm or stack is None or not _is_last(module, stack) else final
        after = norm(stack, self.final_norm) if stack is not None and last is not None else None
        return Layer(self.attention.read(module), mlp, norms[0], norms[1], prenorm, centred, after)

    def owned(self) -> set[str]:
        """The submodules this table accounts for."""
        mlp = {self.mlp.up, self.mlp.down, self.mlp.gate} if self.mlp else set()
        return (self.attention.owned() | mlp | {self.attention_norm, self.mlp_norm}) - {""}


def _is_last(layer: nn.Module, stack: nn.Module) -> bool:
    return any(isinstance(child, nn.ModuleList) and child[-1] is layer for child in stack.children())


def qualified_names(module: nn.Module) -> tuple[str, ...]:
    """``package.module.Class`` of a module and of every class it derives from, its own first."""
    return tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    return attrgetter(path)(module)
