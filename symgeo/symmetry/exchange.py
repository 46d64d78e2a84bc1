"""What two low-rank adapters of one layer exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.symmetry.flow import Shear
from symgeo.symmetry.reader import Params, Rule, Shapes


@dataclass(frozen=True)
class RankExchange(Shear):
    """Two products that are added, ``s B A + s' B' A'``, of which one takes over rows of the other:

        A += X A',    B' -= (s / s') B X        (X: rank by rank')

    Both directions together with GL of the two ranks are GL of their sum. Convolutions are matrices here.

    factors, others: the names of (A, B) and (A', B'); ratio: s / s'.
    """

    factors: tuple[str, str]
    others: tuple[str, str]
    ratio: float = 1.0

    @property
    def moves(self) -> tuple[str, ...]:
        """A and B'."""
        return (self.factors[0], self.others[1])

    @property
    def reads(self) -> tuple[str, ...]:
        """B and A'."""
        return (self.factors[1], self.others[0])

    def renamed(self, rule: Rule) -> RankExchange:
        """The same flow with every parameter name replaced."""
        (a, b), (c, d) = self.factors, self.others
        return replace(self, factors=(rule(a), rule(b)), others=(rule(c), rule(d)))

    def dimension(self, shapes: Shapes) -> int:
        """The product of the ranks."""
        for one, other in ((self.factors[0], self.others[0]), (self.factors[1], self.others[1])):
            skip = 0 if one == self.factors[0] else 1
            if _without(shapes[one], skip) != _without(shapes[other], skip):
                raise SymmetryError(f"RankExchange: {one!r} and {other!r} differ in more than the rank")
        return shapes[self.factors[0]][0] * shapes[self.others[0]][0]

    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """X A' and -(s / s') B X."""
        a, b = (params[name] for name in self.others)
        x = t.reshape(-1, a.shape[0])
        rows = x @ a.to(t.dtype).flatten(1)
        own = params[self.factors[1]].to(t.dtype).movedim(1, -1)
        columns = (own @ x).movedim(-1, 1)
        return {
            self.factors[0]: rows.reshape(params[self.factors[0]].shape),
            self.others[1]: -self.ratio * columns.reshape(b.shape),
        }


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
