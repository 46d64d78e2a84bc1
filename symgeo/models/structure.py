"""What a transformer layer is made of, in terms of parameter names: the vocabulary of the family tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from symgeo.symmetry import Axis, Reader, Span

Rule = Callable[[str], str]


@dataclass(frozen=True)
class Linear:
    """An affine map: the names of its weight and bias, and whether the weight is stored (in, out).

    lead: the factor that numbers copies of the map along a first axis of its own (experts), or "".
    part, parts: it is one of several consecutive slices of the outputs of this weight, of these relative sizes.
    """

    weight: str
    bias: str | None
    transposed: bool = False
    lead: str = ""
    part: int = 0
    parts: tuple[int, ...] = (1,)

    def renamed(self, rule: Rule) -> Linear:
        """The same map under other names."""
        return replace(self, weight=rule(self.weight), bias=rule(self.bias) if self.bias else None)

    def outputs(self, axis: str) -> dict[str, str]:
        """Patterns of a map whose outputs (all slices of the weight) transform by ``axis``."""
        lead = [self.lead] if self.lead else []
        axes = ["_", axis] if self.transposed else [axis, "_"]
        return {self.weight: " ".join([*lead, *axes])} | ({self.bias: " ".join([*lead, axis])} if self.bias else {})

    def inputs(self, axis: str) -> dict[str, str]:
        """Patterns of a map whose inputs transform by ``axis``."""
        lead = [self.lead] if self.lead else []
        return {self.weight: " ".join([*lead, *([axis, "_"] if self.transposed else ["_", axis])])}

    @property
    def written(self) -> tuple[Axis, ...]:
        """The axes of weight and bias that hold the outputs."""
        first = 1 if self.lead else 0
        return (Axis(self.weight, first + 1 if self.transposed else first),
                *((Axis(self.bias, first),) if self.bias else ()))

    def read(self, norm: Norm | None = None) -> Axis:
        """The axis of the weight that holds the inputs, with the gain in front of them."""
        index = (1 if self.lead else 0) + (0 if self.transposed else 1)
        return Axis(self.weight, index, norm.weight if norm else None, norm.offset if norm else 0.0,
                    self.part, self.parts)

    @property
    def reader(self) -> Reader:
        """The map as a reader of its inputs."""
        bias = Span(self.bias, self.part, self.parts) if self.bias else None
        return Reader(self.weight, bias, self.transposed, part=self.part, parts=self.parts)


@dataclass(frozen=True)
class Norm:
    """A normalisation with learned gain and bias; ``centred`` when it removes the mean (LayerNorm).

    offset : the gain is ``offset + weight``;  scale_free : it removes scales exactly (its eps is 0).
    """

    weight: str
    bias: str | None
    centred: bool
    offset: float = 0.0
    scale_free: bool = False

    def renamed(self, rule: Rule) -> Norm:
        """The same norm under other names."""
        return replace(self, weight=rule(self.weight), bias=rule(self.bias) if self.bias else None)


@dataclass(frozen=True)
class Attention:
    """Multi-head attention: ``o(softmax(q k^T) v)`` with ``kv_heads`` key and value heads for ``heads`` query heads.

    inputs : the maps to query, key and value; one map three times is a fused projection whose outputs are three
        consecutive slices, or, ``interleaved``, such slices for every head
    rotary, rotated : the pairing of rotary positions ("half", "interleaved", or "" without), and how many leading
        coordinates of a head they turn (None: all)
    head_size : coordinates of a head, where ``rotated`` or norms need it
    norms : those of queries and keys, of every head (``joint``: of all heads together)
    capped : logits are capped, so that softmax sees a shift of keys
    ordered : positions tell heads apart (ALiBi), which may not be permuted
    table : a learned bias of logits (buckets, heads);  shared_heads : all layers use one such table
    memory : keys and values read another stream
    extra_key, extra_value : learned extra tokens, shape (1, 1, width);  shared_zero_token : a token of zeros
    """

    inputs: tuple[Linear, Linear, Linear]
    output: Linear
    heads: int
    kv_heads: int
    rotary: str = ""
    rotated: int | None = None
    head_size: int | None = None
    interleaved: bool = False
    norms: tuple[Norm, Norm] | None = None
    joint: bool = False
    capped: bool = False
    ordered: bool = False
    table: str | None = None
    shared_heads: bool = False
    memory: bool = False
    extra_key: str | None = None
    extra_value: str | None = None
    shared_zero_token: bool = False

    @property
    def fused(self) -> bool:
        """Whether query, key and value are slices of one parameter."""
        return self.inputs[0].weight == self.inputs[1].weight

    @property
    def partial(self) -> bool:
        """Whether positions turn some coordinates of a head and leave others alone."""
        return bool(self.rotary) and self.rotated is not None and self.rotated != self.head_size

    @property
    def consumers(self) -> tuple[Linear, ...]:
        """The maps that read the stream it stands in."""
        return tuple(dict.fromkeys(self.inputs[:1] if self.memory else self.inputs))

    @property
    def writer(self) -> Linear:
        """The map that writes to it."""
        return self.output

    def renamed(self, rule: Rule) -> Attention:
        """The same attention under other names."""
        query, key, value = (linear.renamed(rule) for linear in self.inputs)
        return replace(
            self, inputs=(query, key, value), output=self.output.renamed(rule),
            norms=(self.norms[0].renamed(rule), self.norms[1].renamed(rule)) if self.norms else None,
            table=rule(self.table) if self.table else None,
            extra_key=rule(self.extra_key) if self.extra_key else None,
            extra_value=rule(self.extra_value) if self.extra_value else None,
        )


@dataclass(frozen=True)
class MLP:
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` with a gate.

    fused : up and gate are the halves of one weight; says which comes first ("gate" or "up")
    homogeneous, odd : what the activation allows
    router : with experts (maps with a leading axis of copies), the map to their logits
    """

    up: Linear
    down: Linear
    gate: Linear | None = None
    fused: str = ""
    homogeneous: bool = False
    odd: bool = False
    router: Linear | None = None

    @property
    def consumers(self) -> tuple[Linear, ...]:
        """The maps that read the stream."""
        maps = (self.up, *((self.gate,) if self.gate else ()), *((self.router,) if self.router else ()))
        return tuple(dict.fromkeys(maps))

    @property
    def writer(self) -> Linear:
        """The map that writes to it."""
        return self.down

    def renamed(self, rule: Rule) -> MLP:
        """The same MLP under other names."""
        return replace(
            self, up=self.up.renamed(rule), down=self.down.renamed(rule),
            gate=self.gate.renamed(rule) if self.gate else None,
            router=self.router.renamed(rule) if self.router else None,
        )


@dataclass(frozen=True)
class Branch:
    """What a layer adds to the residual stream, with the norms around it:

        x <- outer(x + scale after(core(before(x)))),     each of the norms may be absent.

    scale : the parameter that multiplies what is added, coordinate by coordinate, if there is one.
    """

    name: str
    core: Attention | MLP
    before: Norm | None = None
    after: Norm | None = None
    outer: Norm | None = None
    scale: str | None = None

    def renamed(self, rule: Rule) -> Branch:
        """The same branch under other names."""
        before, after, outer = (n.renamed(rule) if n else None for n in (self.before, self.after, self.outer))
        scale = rule(self.scale) if self.scale else None
        return Branch(self.name, self.core.renamed(rule), before, after, outer, scale)

    @property
    def written(self) -> tuple[Axis, ...]:
        """What writes to the stream, with the gain through which it does."""
        if self.after:
            own = [self.after.weight, *([self.after.bias] if self.after.bias else [])]
            return tuple(Axis(name, 0, offset=self.after.offset if name == self.after.weight else 0.0) for name in own)
        return tuple(replace(axis, gain=self.scale) for axis in self.core.writer.written)


@dataclass(frozen=True)
class Layer:
    """One transformer layer, with names relative to it.

    parallel : all branches read the same point of the stream and are added together
    centred_readers : everything that reads the residual stream removes its mean first
    final_norm : in the last layer of a post-norm stack, the norm that reads its output, if there is one
    bypass : norms feed the stream too, in a way that is not described: they are left out
    """

    branches: tuple[Branch, ...]
    parallel: bool = False
    centred_readers: bool = False
    final_norm: Norm | None = None
    bypass: bool = False

    @property
    def prenorm(self) -> bool:
        """Whether no norm stands on the stream itself."""
        return all(branch.outer is None for branch in self.branches)

    @property
    def attention(self) -> Attention | None:
        """Its first attention."""
        return next((b.core for b in self.branches if isinstance(b.core, Attention)), None)

    @property
    def mlp(self) -> MLP | None:
        """Its MLP."""
        return next((b.core for b in self.branches if isinstance(b.core, MLP)), None)

    def renamed(self, rule: Rule) -> Layer:
        """The same layer under other names."""
        final = self.final_norm.renamed(rule) if self.final_norm else None
        return replace(self, branches=tuple(b.renamed(rule) for b in self.branches), final_norm=final)


def linear(module: nn.Module, name: str) -> Linear:
    """The affine submodule ``name`` of ``module``; of one that carries adapters, the map they are added to."""
    child = module.get_submodule(name)
    inner = dict(child.named_children()).get("base_layer")
    if isinstance(inner, nn.Module):
        return linear(module, f"{name}.base_layer")
    bias = f"{name}.bias" if getattr(child, "bias", None) is not None else None
    return Linear(f"{name}.weight", bias, transposed=type(child).__name__ == "Conv1D")


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
