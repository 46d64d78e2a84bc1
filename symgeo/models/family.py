"""A family: the names under which one architecture keeps the parts of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from torch import nn

from symgeo.models.norms import norm
from symgeo.models.structure import MLP, Attention, Branch, Layer, Linear, Norm, is_homogeneous, is_odd, linear
from symgeo.symmetry import Span, Symmetry


@dataclass(frozen=True)
class AttentionNames:
    """Submodules of a layer that make up its attention, and the attributes that hold its head counts.

    heads, kv_heads, head_size, rotated: attributes of the layer (dotted paths) with these numbers
    fused, interleaved: one map to query, key and value, sliced once or for every head
    query_norm, key_norm: norms of queries and keys
    cap: attribute with the cap of the logits, None where there is none
    table: an embedding of relative positions; shared by all layers, which may leave it to the first
    """

    output: str
    heads: str
    query: str = ""
    key: str = ""
    value: str = ""
    fused: str = ""
    interleaved: bool = False
    kv_heads: str = ""
    head_size: str = ""
    rotary: str = ""
    rotated: str = ""
    query_norm: str = ""
    key_norm: str = ""
    cap: str = ""
    ordered: bool = False
    table: str = ""
    memory: bool = False

    def read(self, module: nn.Module) -> Attention:
        """Query, key, value and output maps with their head counts."""
        heads = int(attribute(module, self.heads))
        kv_heads = int(attribute(module, self.kv_heads)) if self.kv_heads else heads
        query, key, value = (linear(module, name or self.fused) for name in (self.query, self.key, self.value))
        norms = [norm(module, name) for name in (self.query_norm, self.key_norm) if name in self._present(module)]
        pair = (norms[0], norms[1]) if len(norms) == 2 and norms[0] and norms[1] else None
        size = int(attribute(module, self.head_size)) if self.head_size else None
        return Attention(
            (query, key, value), linear(module, self.output), heads, kv_heads, self.rotary,
            rotated=self._rotated(module), head_size=size, interleaved=self.interleaved, norms=pair,
            joint=pair is not None and module.get_parameter(pair[0].weight).numel() != size,
            capped=bool(self.cap) and attribute(module, self.cap) is not None, ordered=self.ordered,
            table=f"{self.table}.weight" if self.table and self.table in self._present(module) else None,
            shared_heads=bool(self.table), memory=self.memory,
        )

    def _rotated(self, module: nn.Module) -> int | None:
        """The number of rotated coordinates; an attribute may also hold their share of a head."""
        if not self.rotated or (found := attribute(module, self.rotated)) is None:
            return None
        return int(found * int(attribute(module, self.head_size))) if isinstance(found, float) else int(found)

    def _present(self, module: nn.Module) -> set[str]:
        return {name for name, _ in module.named_modules()}

    def owned(self) -> set[str]:
        """The submodules this table accounts for."""
        names = {self.query, self.key, self.value, self.fused, self.output, self.query_norm, self.key_norm, self.table}
        return names - {""}


class AttentionReader(Protocol):
    """What a family needs of its attention entry: the names, or a reader of its own."""

    def read(self, module: nn.Module) -> Attention:
        """The attention of a layer."""

    def owned(self) -> set[str]:
        """The submodules it accounts for."""


class MLPReader(Protocol):
    """The same for the MLP."""

    def read(self, module: nn.Module) -> MLP:
        """The MLP of a layer."""

    def owned(self) -> set[str]:
        """The submodules it accounts for."""


@dataclass(frozen=True)
class MLPNames:
    """Submodules of a layer that make up its MLP; alternatives stand in braces, as in "layer.{1,2}.wo".

    fused: one map to gate and up; first: which of its halves is the gate (the one that is activated) and comes
    first, "gate" or "up".
    """

    down: str
    up: str = ""
    gate: str = ""
    fused: str = ""
    first: str = "gate"
    activation: str = ""

    def read(self, module: nn.Module) -> MLP:
        """The MLP, with what its activation allows."""
        names = (self.up or self.fused, self.gate or self.fused, self.down, self.activation)
        up, gate, down, act = (resolve(module, name) for name in names)
        activation = attribute(module, act) if act else None
        return MLP(
            up=linear(module, up), down=linear(module, down), gate=linear(module, gate) if gate else None,
            fused=self.first if self.fused else "",
            homogeneous=activation is not None and is_homogeneous(activation),
            odd=activation is not None and is_odd(activation),
        )

    def owned(self) -> set[str]:
        """The submodules this table accounts for."""
        names = (self.up, self.down, self.gate, self.fused)
        return {path for name in names if name for path in alternatives(name)}


@dataclass(frozen=True)
class ExpertNames:
    """A mixture of gated experts: one parameter (experts, 2 hidden, width), one (experts, width, hidden), and a router
    whose softmax is normalised over the experts it chooses."""

    fused: str
    down: str
    router: str
    activation: str = ""

    def read(self, module: nn.Module) -> MLP:
        """The experts as one MLP with a leading axis."""
        into, out = (Linear(name, None, lead="X") for name in (self.fused, self.down))
        activation = attribute(module, self.activation) if self.activation else None
        return MLP(up=into, down=out, gate=into, fused="gate", router=Linear(f"{self.router}.weight", None),
                   homogeneous=activation is not None and is_homogeneous(activation))

    def owned(self) -> set[str]:
        """The parameters this table accounts for."""
        return {self.fused, self.down, self.router}


@dataclass(frozen=True)
class Head:
    """A linear map that reads the output of a norm: qualified class name of their owner, and their names there.  With
    others of the same norm it is all that does.

    A `*` in the name of the norm stands for the last layer.  stack : the name in the owner of the stack of layers
    whose last norm this is, where the module of the stack does not hold it.  unless : a submodule of the owner in whose
    presence the map reads something else.
    """

    owner: str
    norm: str
    linear: str
    stack: str = ""
    unless: str = ""


@dataclass(frozen=True)
class Extra:
    """A declaration for the module of a qualified class name, with names relative to it; it counts where all its
    parameters are there and nothing else uses them, but for those that ``shared`` names."""

    owner: str
    symmetry: Symmetry
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embeddings:
    """What is added up at the start of the residual stream.

    owner : qualified class name of the module that owns all of it;  sums : spans that are added at the same tokens;
    masks : spans that stand in for the first one of all at masked tokens;
    weights : those of maps whose outputs (first axis) are added;  norm : that of the embeddings, through which alone
    they reach the first layer;  bent : something that is not linear stands between them and the stream;
    padding : the attribute with the number of the token that alone has the position of that number (of the first two
    spans);  dead : spans that nothing reads;  needs : a parameter that must be there for the table to count.
    """

    owner: str
    sums: tuple[tuple[Span, ...], ...] = ()
    masks: tuple[Span, ...] = ()
    weights: tuple[str, ...] = ()
    norm: str = ""
    bent: bool = False
    padding: str = ""
    dead: tuple[Span, ...] = ()
    needs: str = ""


@dataclass(frozen=True)
class Family:
    """One table: the class of the layer and where its parts are.

    layer : qualified class name of the layer module;  prenorm : True, False, or the attribute that says so;
    attention_norm, cross_norm, mlp_norm : before their branch (pre-norm) or behind the sum (post-norm);
    attention_after, mlp_after : behind the branch, before the sum;
    attention_scale, mlp_scale : parameters that multiply what a branch adds;
    bypass : the attribute that says that the sums add to what the norms give instead of what they read;
    parallel : whether attention and MLP read the same point of the stream, or the attribute that says so;
    stack, final_norm : qualified class name of the module that holds the list of layers, and the name there of
    the norm that reads the residual stream last;
    heads : the linear maps that models of this family put behind norms;
    memory : the names, in one module, of an encoder and of the decoder whose cross-attention reads its last norm;
    extras : what models of this family have beside their stacks;
    disk : (pattern, replacement) that turn names in memory into those of checkpoint files, one after the other.
    """

    name: str
    layer: str
    attention: AttentionReader
    mlp: MLPReader | None = None
    cross: AttentionReader | None = None
    attention_norm: str = ""
    cross_norm: str = ""
    mlp_norm: str = ""
    attention_after: str = ""
    mlp_after: str = ""
    attention_scale: str = ""
    mlp_scale: str = ""
    bypass: str = ""
    prenorm: bool | str = True
    parallel: bool | str = False
    stack: str = ""
    final_norm: str = ""
    embeddings: Embeddings | tuple[Embeddings, ...] = ()
    heads: tuple[Head, ...] = ()
    memory: tuple[str, str] | None = None
    extras: tuple[Extra, ...] = ()
    disk: tuple[tuple[str, str], ...] = ()

    def read(self, module: nn.Module, last: Norm | None = None, ends: bool = False) -> Layer:
        """The structure of ``module``, a layer of this family.

        last : the norm that reads the residual stream behind all layers;  ends : whether this is the last of them
        """
        prenorm, parallel = (x if isinstance(x, bool) else bool(attribute(module, x)) for x in
                             (self.prenorm, self.parallel))
        parts = (("attention", self.attention, self.attention_norm, self.attention_after, self.attention_scale),
                 ("cross", self.cross, self.cross_norm, "", ""),
                 ("mlp", self.mlp, self.mlp_norm, self.mlp_after, self.mlp_scale))
        bypass = bool(self.bypass) and bool(attribute(module, self.bypass))
        branches = []
        for name, reader, around, behind, scale in parts:
            if reader is not None and (name != "cross" or present(module, reader.owned())):
                here = (resolve(module, x) for x in (around, behind))
                found, after = (norm(module, x) if x else None for x in here)
                before, outer = (None if bypass else found, None) if prenorm else (None, found)
                branches.append(Branch(name, reader.read(module), before, after, outer, resolve(module, scale) or None))
        first, *later = [b.before for b in branches]  # the first one may read an entry that is normalised already
        centred = (first is None or first.centred) and all(n is not None and n.centred for n in (*later, last))
        return Layer(tuple(branches), parallel, centred and not bypass, None if prenorm or not ends else last, bypass)

    @property
    def starts(self) -> tuple[Embeddings, ...]:
        """The tables of embeddings, of which the first that fits counts."""
        return (self.embeddings,) if isinstance(self.embeddings, Embeddings) else self.embeddings

    def owned(self) -> set[str]:
        """The submodules this table accounts for."""
        readers = (self.attention, self.cross, self.mlp)
        norms = {self.attention_norm, self.cross_norm, self.mlp_norm, self.attention_after, self.mlp_after}
        norms |= {self.attention_scale, self.mlp_scale}
        inside = [reader.owned() for reader in readers if reader]
        return set().union(*inside, *(alternatives(name) for name in norms if name))


def alternatives(name: str) -> list[str]:
    """What a name with choices in braces stands for, in order.

    >>> alternatives("layer.{2,1}.norm")
    ['layer.2.norm', 'layer.1.norm']
    """
    before, brace, rest = name.partition("{")
    if not brace:
        return [name]
    choices, _, after = rest.partition("}")
    return [f"{before}{choice}{tail}" for choice in choices.split(",") for tail in alternatives(after)]


def resolve(module: nn.Module, name: str) -> str:
    """The first alternative that is there, "" if none is."""
    return next((path for path in alternatives(name) if path and present(module, {path})), "")


def present(module: nn.Module, names: set[str]) -> bool:
    """Whether all these submodules or parameters are there and not None."""
    return all(_found(module, name) is not None for name in names)


def _found(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def qualified_names(module: nn.Module) -> tuple[str, ...]:
    """``package.module.Class`` of a module and of every class it derives from, its own first."""
    return tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, of which a part may be the key of a dict."""
    found: Any = module
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else attrgetter(part)(found)
    return found
