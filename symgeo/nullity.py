"""Does a declared symmetry explain every flat direction?  Its dimension beside the nullity of the Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.distributed import refuse_sharded
from symgeo.functional import Params
from symgeo.models.precision import full_double
from symgeo.models.probe import inputs, output_function
from symgeo.report import aligned
from symgeo.symmetry import Action, Element, Symmetry
from symgeo.symmetry.check import Function

#: more trainable numbers than this are refused: the Jacobian is dense
LIMIT = 4000
#: the smallest nonzero singular value must exceed the largest zero one by this factor
LEAST_GAP = 1e4
#: relative to the largest, where zeros may begin
_SMALL = 1e-9
#: rows beyond as many as there are columns
_SPARE = 50
#: cotangents that are pulled back at once
_CHUNK = 32
#: standard deviation of the move to a generic point, relative to the root mean square of a tensor
_MOVE = 0.2


@dataclass(frozen=True)
class CountReport:
    """The result of `count`.

    Attributes
    ----------
    declared : the dimension of the declaration, ``symmetry.dimension(params)``
    measured : how many independent directions of the trainable numbers leave all outputs unchanged to first order
    parameters : how many numbers are trainable
    unused : those of them on which no output depends at all; they are not part of ``measured``
    explained : how many of the declared directions move used numbers (all, where ``unused`` is 0)
    gap : the smallest nonzero singular value of the Jacobian over the largest zero one, at least rounding
    kinds : the dimension of every generator by name, over all layers, each counted alone
    """

    declared: int
    measured: int
    parameters: int
    unused: int
    explained: int
    gap: float
    kinds: dict[str, int]

    @property
    def complete(self) -> bool:
        """Whether the declaration explains all that was measured, and nothing else."""
        return self.explained == self.measured

    @property
    def reliable(self) -> bool:
        """Whether the zero singular values stand clearly apart from the others."""
        return self.gap > LEAST_GAP

    def __str__(self) -> str:
        rows = [(name, str(n)) for name, n in self.kinds.items()]
        rows += [("declared", str(self.declared)), ("measured", str(self.measured))]
        rows += [("trainable numbers", str(self.parameters)), ("of them unused", str(self.unused))]
        missing = self.measured - self.explained
        verdict = "complete" if self.complete else f"{abs(missing)} {'not declared' if missing > 0 else 'too many'}"
        clear = "" if self.reliable else f"; NOT RELIABLE: needed a gap above {LEAST_GAP:.0e}"
        return f"{aligned(['generator', 'dimension'], rows)}\n{verdict}; spectral gap {self.gap:.0e}{clear}"


def count(
    symmetry: Symmetry,
    model_or_loss: nn.Module | Function,
    params: Mapping[str, Tensor],
    *,
    generic: bool = True,
    seed: int = 0,
    limit: int = LIMIT,
) -> CountReport:
    """Counts flat directions twice: as declared, and as the nullity of the Jacobian of the outputs f,

        dim { v : (df / dparams) v = 0 },

    over all parameters that are not frozen in the symmetry, in float64, whatever precision the code of the model asks
    for.  A declaration that holds has ``declared <= measured``; it is complete where they are equal.

    model_or_loss : a module whose calling convention is known (random inputs are drawn until the rank stays), or a
        function params -> tensor or tuple of tensors, which must return outputs for many inputs, more numbers than
        there are parameters: best as a tuple, one tensor for each small batch.  A loss is one number and tells nothing.
    generic : count beside ``params``, every trainable number moved at random by a fifth of its tensor's root mean
        square, since zero biases or equal gains are flat in more directions than others; False: at ``params``.
    limit : the largest number of trainable numbers.

    Raises ``ValueError`` if there are too many parameters or too few outputs, for a module of unknown calling
    convention, for names it does not have, or if the outputs are not finite.

    >>> from symgeo.groups import GeneralLinear
    >>> lora = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
    >>> params = {"B": torch.randn(7, 2), "A": torch.randn(2, 5)}
    >>> report = count(lora, lambda p: p["B"] @ p["A"], params)
    >>> report.declared, report.measured, report.complete
    (4, 4, True)
    """
    refuse_sharded(params, "gather them with full_tensor(), or count before fully_shard")
    generator = torch.Generator().manual_seed(seed)
    action = symmetry.bind(params)
    trained = [name for name, x in params.items() if x.is_floating_point() and name not in action.frozen]
    numbers = sum(params[name].numel() for name in trained)
    if not 0 < numbers <= limit:
        raise ValueError(
            f"count: needed 1 to {limit} trainable numbers, found {numbers}. The Jacobian is dense: use a small "
            "instance of the same family, with fewer layers, a narrower stream and a smaller vocabulary"
        )
    given = _exact(params)
    beside = given | {name: _moved(given[name], generator) for name in trained}
    point = beside if generic else given
    with full_double():
        values, read = _spectrum(_functions(model_or_loss, point, numbers, generator), point, trained)
        if not (generic or bool(read.all())):  # no derivative here is not yet no influence
            read |= _spectrum(_functions(model_or_loss, beside, numbers, generator), beside, trained)[1]
    explained = declared = symmetry.dimension(point)
    used, (rank, gap) = int(read.sum()), numerical_rank(values)
    if used < numbers:
        explained = _explained(action, point, trained, read, declared, generator)
    kinds = _kinds(action, point)
    return CountReport(declared, used - rank, numbers, numbers - used, explained, gap, kinds)


def numerical_rank(values: Tensor) -> tuple[int, float]:
    """(rank, gap) from descending singular values: they are cut at the largest ratio of neighbours among those whose
    smaller one is below 1e-9 of the largest; rounding, 2e-16 of the largest, stands behind them all.

    >>> numerical_rank(torch.tensor([2.0, 1.0, 2.0**-40], dtype=torch.float64))
    (2, 1099511627776.0)
    """
    if not len(values) or values[0] == 0:
        return 0, float("inf")
    floor = values[0] * torch.finfo(values.dtype).eps
    padded = torch.cat([values, floor.reshape(1)]).clamp(min=floor)
    ratios = padded[:-1] / padded[1:]
    place = torch.where(padded[1:] <= _SMALL * values[0], ratios, 0.0).argmax()
    return int(place) + 1, float(ratios[place])


def _spectrum(functions: Iterator[Function], point: Params, trained: list[str]) -> tuple[Tensor, Tensor]:
    """Singular values of the Jacobian, and which of its columns are not zero.

    Rows of more and more functions, until their rank stays; of a single one, as many as it takes.
    """
    columns = sum(point[name].numel() for name in trained)
    triangle = torch.empty(0, columns, dtype=torch.float64)
    used = torch.zeros(columns, dtype=torch.bool)
    rows, needed, last = 0, columns + columns // 2 + _SPARE, -1
    while True:
        parts = [triangle]
        while rows < needed and (f := next(functions, None)):
            parts.append(_jacobian(f, point, trained))
            rows += len(parts[-1])
            used |= (parts[-1] != 0).any(0)
        alone = len(parts) == 1
        triangle = _triangle(torch.cat(parts))
        values = torch.linalg.svdvals(triangle)
        rank, _ = numerical_rank(values)
        if alone or rank == last:
            return values, used
        last, needed = rank, rows + rows // 2


def _triangle(rows: Tensor) -> Tensor:
    """A matrix with the same singular values and at most as many rows as columns."""
    return torch.linalg.qr(rows, mode="r").R if rows.shape[0] > rows.shape[1] else rows


def _jacobian(f: Function, point: Params, trained: list[str]) -> Tensor:
    """The rows of the Jacobian; of a tensor with many more numbers than there are columns, random combinations."""
    moving = {name: point[name].clone().requires_grad_() for name in trained}
    with torch.enable_grad():
        outputs = _tensors(f(point | moving))
    if not all(bool(x.isfinite().all()) for x in outputs):
        raise ValueError("count: outputs are not finite at these parameters (with generic=False they are not moved)")
    return torch.cat([_rows(x.reshape(-1), list(moving.values())) for x in outputs])


def _rows(outputs: Tensor, moving: list[Tensor]) -> Tensor:
    """Pulls cotangents of one tensor back, several at once."""
    n, columns = len(outputs), sum(x.numel() for x in moving)
    rows = min(n, columns + _SPARE)
    if not outputs.requires_grad:
        return torch.zeros(rows, columns, dtype=torch.float64)
    generator, blocks = torch.Generator().manual_seed(n), []
    for start in range(0, rows, _CHUNK):
        size = min(_CHUNK, rows - start)
        if rows < n:
            cotangents = torch.randn(size, n, generator=generator, dtype=torch.float64) / n**0.5
        else:
            cotangents = torch.zeros(size, n, dtype=torch.float64)
            cotangents[torch.arange(size), torch.arange(start, start + size)] = 1
        pulled = torch.autograd.grad(
            outputs, moving, cotangents.to(outputs), retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        parts = [x.new_zeros(size, x.numel()) if g is None else g.reshape(size, -1) for x, g in zip(moving, pulled)]
        blocks.append(torch.cat(parts, dim=1).cpu())
    return torch.cat(blocks)


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _functions(
    model_or_loss: nn.Module | Function, point: Params, numbers: int, generator: torch.Generator
) -> Iterator[Function]:
    """The outputs as functions of parameters: of a module on random inputs, without end; or the function itself."""
    if not isinstance(model_or_loss, nn.Module):
        return iter([_checked(model_or_loss, point, numbers)])
    own = {name for name, _ in model_or_loss.named_parameters(remove_duplicate=False)}
    if strange := [name for name in point if name not in own]:
        raise ValueError(f"count: {type(model_or_loss).__name__} has no parameter {strange[0]!r}")
    return _draws(copy.deepcopy(model_or_loss).double().eval(), generator)


def _draws(model: nn.Module, generator: torch.Generator) -> Iterator[Function]:
    while True:
        call = inputs(model, generator)
        if call is None:
            raise ValueError(
                f"count: how to call {type(model).__name__} is not known; pass a function params -> outputs instead, "
                "such as lambda p: torch.func.functional_call(model, p, (x,)) with many inputs x"
            )
        yield output_function(model, (tuple(_double(x) for x in call[0]), {k: _double(x) for k, x in call[1].items()}))


def _checked(f: Function, point: Params, needed: int) -> Function:
    """Refuses what cannot have a Jacobian of full rank in so many trainable numbers."""
    with torch.no_grad():
        found = sum(x.numel() for x in _tensors(f(dict(point))))
    if found < needed:
        what = "one number, as a loss does," if found == 1 else f"{found} numbers"
        raise ValueError(
            f"count: the function returns {what} for {needed} parameters, so that most directions look flat. Return "
            "the outputs (not a loss) for more inputs: a larger batch, or a tuple of the outputs of several"
        )
    return f


def _kinds(action: Action, point: Params) -> dict[str, int]:
    """The dimension of each generator alone, by its declared name without the layers it stands for."""
    counts: dict[str, int] = {}
    for name in (*action.groups, *action.shifts, *action.flows):
        kind = action.declared[name].partition("[")[0]
        counts[kind] = counts.get(kind, 0) + _alone(action, point, name)
    return {kind: n for kind, n in counts.items() if n}


def _alone(action: Action, point: Params, name: str) -> int:
    if name in action.flows:
        return action.flows[name].rank(point)
    if name in action.shifts:
        return action.coordinates[name]
    group = action.groups[name]
    return 0 if group.discrete else group.orbit_dimension(*action.stack(name, point))


def _explained(
    action: Action, point: Params, trained: list[str], used: Tensor, declared: int, generator: torch.Generator
) -> int:
    """The rank of random vertical vectors on the used numbers."""
    if not declared:
        return 0
    drawn = [action.random_algebra(generator) for _ in range(declared + _SPARE)]
    stacked = {name: torch.stack([xi[name] for xi in drawn]) for name in drawn[0]}

    def row(xi: dict[str, Tensor]) -> Tensor:
        moved = action.vertical(Element(xi), point)
        return torch.cat([moved[name].reshape(-1) for name in trained])

    rows = torch.func.vmap(row, chunk_size=_CHUNK)(stacked)[:, used.to(action.device)]
    rank, _ = numerical_rank(torch.linalg.svdvals(rows))
    return rank


def _exact(params: Mapping[str, Tensor]) -> Params:
    return {name: _double(x.detach()) for name, x in params.items()}


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    size = float(x.square().mean().sqrt()) or 1.0
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    return x + _MOVE * size * noise


__all__ = ["LIMIT", "CountReport", "count", "numerical_rank"]
