"""One isotypic kind of a preconditioner: what is kept of it, what that costs, and what it is known as."""

from __future__ import annotations

from dataclasses import dataclass

#: eigenvalues and eigenvectors of a real symmetric matrix (M, M), in FLOPs: this times M^3
EIGH = 9


@dataclass(frozen=True)
class Cost:
    """FLOPs of one step: of the second moments, of their inverse roots, of the product with the gradient."""

    statistics: float = 0.0
    roots: float = 0.0
    application: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.statistics + other.statistics, self.roots + other.roots, self.application + other.application
        )

    def __mul__(self, factor: float) -> Cost:
        return Cost(factor * self.statistics, factor * self.roots, factor * self.application)

    @property
    def total(self) -> float:
        """Of the step."""
        return self.statistics + self.roots + self.application


@dataclass(frozen=True)
class Kind:
    """Blocks of equal structure.

    Attributes
    ----------
    label: of the representation, group by group, as "n:V"; "1" where the groups act trivially
    blocks: how many of them, each with its own second moments
    copies: M, the rows of each;  dimension: d, of the irreducible representation over the reals;
    coordinates: D, in which it is stored (a centred vector of length n has d = n - 1)
    complex: whether the coordinates are complex;  trivial: whether the groups act trivially
    sources: how many parameters its copies come from
    """

    label: str
    blocks: int
    copies: int
    dimension: int
    coordinates: int
    complex: bool
    trivial: bool
    sources: int

    @property
    def diagonal(self) -> bool:
        """Whether the second moments are one number for each copy: one copy only, or the trivial kind."""
        return self.trivial or self.copies == 1

    @property
    def numbers(self) -> int:
        """The second moments that are kept: M or M (M + 1) / 2 numbers for each block, twice as many if complex."""
        if self.diagonal:
            return self.blocks * self.copies
        return self.blocks * self.copies * (self.copies + 1) // 2 * (2 if self.complex else 1)

    def cost(self, update_every: int) -> Cost:
        """2 M^2 D for the moments and for the product, 9 M^3 for the roots, divided by how often they are renewed.

        Four times as much for complex blocks; of diagonals 2 D, D and 1 for each number.

        >>> Kind("n:V", 1, 3, 5, 5, False, False, 1).cost(10)
        Cost(statistics=90.0, roots=24.3, application=90.0)
        """
        size = self.blocks * self.copies * self.coordinates
        if self.diagonal:
            return Cost(2.0 * size, self.numbers / update_every, float(size))
        product = (8.0 if self.complex else 2.0) * self.copies * size
        roots = (4 if self.complex else 1) * EIGH * self.blocks * self.copies**3 / update_every
        return Cost(product, roots, product)

    @property
    def method(self) -> str:
        """What a step with the power 1/2 of these moments is known as, read off the structure of the blocks."""
        if self.trivial:
            return "Adam's diagonal for what no group moves"
        if self.complex:
            return "spectral whitening (each frequency, or plane, by itself)"
        if self.copies == 1:
            return self._scalar
        if self.dimension == 1:
            return "full-matrix Adam of each unit (normalised units at betas[1] = 0)"
        return self._matrix

    @property
    def _scalar(self) -> str:
        """One row: a number for each block."""
        if self.dimension == 1:
            return "Adam with momentum in the second moment (sign descent at betas[1] = 0)"
        if self.blocks == 1:
            return "one averaged norm (normalised SGD at betas[1] = 0)"
        return "one averaged norm for each row (normalised rows at betas[1] = 0)"

    @property
    def _matrix(self) -> str:
        """M rows that one irreducible group acts on: whitened from the left."""
        where = [f"of {self.sources} parameters joined"] if self.sources > 1 else []
        where += ["of centred units"] if self.coordinates > self.dimension else []
        where += ["block by block"] if self.blocks > 1 else []
        return ", ".join(["one-sided Shampoo (Muon at betas[1] = 0)", *where])
