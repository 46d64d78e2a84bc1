"""Who steps what: all parameters in one process, or every process those it owns.

Owner computes: parameters that share statistics stay together, and every such unit goes to the process that has least
to do so far.  The owner gathers their gradients (replicas are there already), keeps their state, and sends the step
to all.  Which process owns what changes no result and no name in the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from symgeo.curvature import Bucket, Decomposition
from symgeo.curvature.spectrum import agreeing
from symgeo.distributed import Exchange, Processes, is_sharded, local, longest_first, refuse_parts
from symgeo.optim.statistics import is_diagonal
from symgeo.symmetry import Action

#: products of matrices that a root of one costs, about
_ROOT = 20.0


@dataclass(frozen=True)
class Survey:
    """What all processes know of a step: whether every one has its operators, and who has which gradients."""

    ready: bool
    have: dict[str, list[bool]]

    def moving(self, name: str) -> bool:
        """Whether any process has a gradient of a parameter."""
        return any(self.have[name])


class Alone:
    """One process that owns everything.

    Raises ValueError naming a parameter of which it does not hold everything.
    """

    def __init__(self, members: Mapping[str, Tensor]) -> None:
        refuse_parts(members)
        self.owned = dict(members)

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """The same for a body with collectives of its own."""
        yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context in which all processes succeed or fail."""
        yield

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A context in which all processes have one largest eigenvalue."""
        yield

    def survey(self, params: Mapping[str, Tensor], ready: bool) -> Survey:
        """What is known of this step."""
        return Survey(ready, {name: [p.grad is not None] for name, p in params.items()})

    def gradients(self, survey: Survey) -> dict[str, Tensor]:
        """The whole gradients of what this process owns; none where there is none anywhere."""
        return {name: local(p.grad) for name, p in self.owned.items() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        """The whole parameters that this process owns."""
        return {name: local(p) for name, p in self.owned.items()}

    def spread(self, step: Mapping[str, Tensor], survey: Survey) -> Mapping[str, Tensor]:
        """The steps of all parameters, as this process holds them."""
        return step

    def complete(self, params: Mapping[str, Tensor], survey: Survey) -> None:
        """Gradients for what every process steps by itself, where only others have them."""


class Shared:
    """Several processes.

    Parameters
    ----------
    members: the parameters that symmetries name; units: lists of those that stay together, with their costs; dtype:
        of statistics and steps

    Raises ValueError for placements of sharded parameters that are not covered.
    """

    def __init__(
        self, team: Processes, members: Mapping[str, Tensor], units: Sequence[tuple[Sequence[str], float]],
        dtype: torch.dtype,
    ) -> None:
        self.team, self._members, self._dtype = team, members, dtype
        self._device = next((local(p).device for p in members.values()), torch.device("cpu"))
        ranks = longest_first({i: cost for i, (_, cost) in enumerate(units)}, team.size)
        owner = {name: ranks[i] for i, (names, _) in enumerate(units) for name in names}
        self.exchange = Exchange(team, members, owner)
        self.owned = {name: members[name] for name in self.exchange.owned}

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """The same for a body with collectives of its own."""
        with self.team.announcing():
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context in which all processes succeed or fail."""
        with self.team.together(self._device):
            yield

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A context, within `together`, in which all processes have one largest eigenvalue."""
        with agreeing(lambda size: self.team.maximum(size.to(self._device))):
            yield

    def survey(self, params: Mapping[str, Tensor], ready: bool) -> Survey:
        """What all processes know of this step."""
        rows = self.team.bits([ready, *(p.grad is not None for p in params.values())])
        columns = [list(column) for column in zip(*rows)]
        return Survey(all(columns[0]), dict(zip(params, columns[1:])))

    def gradients(self, survey: Survey) -> dict[str, Tensor]:
        """The whole gradients of what this process owns; none where there is none anywhere."""
        have = {name: survey.have[name] for name in self._members}
        return self.exchange.collect({name: p.grad for name, p in self._members.items()}, self._kind, have)

    def weights(self) -> dict[str, Tensor]:
        """The whole parameters that this process owns."""
        return self.exchange.collect({name: p.detach() for name, p in self._members.items()}, self._kind)

    def spread(self, step: Mapping[str, Tensor], survey: Survey) -> Mapping[str, Tensor]:
        """The steps of all parameters, as this process holds them."""
        return self.exchange.spread(step, [name for name in self._members if survey.moving(name)], self._dtype)

    def complete(self, params: Mapping[str, Tensor], survey: Survey) -> None:
        """Gradients for what every process steps by itself, where only others have them."""
        for name, p in params.items():
            have = survey.have[name]
            if all(have) or not any(have):
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if not is_sharded(p):
                sent = p.grad.contiguous()  # in one order of entries everywhere, whatever the strides
                dist.broadcast(sent, self.team.ranks[have.index(True)], group=self.team.group)
                if sent is not p.grad:
                    p.grad.copy_(sent)

    def _kind(self, name: str) -> torch.dtype:
        return self._members[name].dtype


def find_units(
    members: Sequence[str], actions: Sequence[Action], splits: Sequence[Decomposition], trivial: str
) -> list[tuple[list[str], float]]:
    """The parameters that must stay together, because they share statistics or a gauge, and what a step of each costs.

    The cost of a kind (B, M, D) is that of its second moment and its root, ``B M^2 (D + 20 M)``, or ``B M D`` where
    only a diagonal is kept.
    """
    root = {name: name for name in members}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    for group in _coupled(actions, splits, trivial):
        first, *others = (find(name) for name in group)
        for other in others:
            root[other] = first
    costs = dict.fromkeys(members, 0.0)
    for split in splits:
        for bucket in split.buckets:
            _add_costs(costs, bucket, is_diagonal(bucket, trivial))
    units: dict[str, tuple[list[str], float]] = {}
    for name in members:
        names, cost = units.get(find(name), ([], 0.0))
        units[find(name)] = ([*names, name], cost + costs[name])
    return list(units.values())


def _coupled(actions: Sequence[Action], splits: Sequence[Decomposition], trivial: str) -> Iterator[list[str]]:
    """Parameters that carry one group, a group and what numbers its copies, or one kind with a matrix."""
    for action in actions:
        carriers = {name: [block.parameter for block in action.blocks(name)] for name in action.groups}
        for name, group in action.groups.items():
            yield [*carriers[name], *carriers.get(group.per or "", [])]
    for split in splits:
        for bucket in split.buckets:
            if not is_diagonal(bucket, trivial):
                yield from ([name for name, *_ in rows] for rows in bucket.rows)


def _add_costs(costs: dict[str, float], bucket: Bucket, diagonal: bool) -> None:
    for rows in bucket.rows:
        if diagonal:
            for name, _, m in rows:
                costs[name] += bucket.batch * m * bucket.coordinates
        else:
            costs[rows[0][0]] += bucket.batch * bucket.copies**2 * (bucket.coordinates + _ROOT * bucket.copies)
