"""Who computes what: a map of work to processes that every process finds by itself."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def longest_first(costs: Mapping[Key, float], size: int) -> dict[Key, int]:
    """The process of every piece of work: longest first, each to the one that has least so far.

    Graham's rule (SIAM J. Appl. Math. 17, 1969): the longest total is at most 4/3 - 1/(3 size) times the shortest
    possible.  Equal costs keep their order, and of equal totals the lowest number wins, so that the map depends on
    nothing but the arguments.

    >>> longest_first({"a": 2.0, "b": 3.0, "c": 2.0, "d": 1.0}, 2)
    {'b': 0, 'a': 1, 'c': 1, 'd': 0}
    """
    totals = [0.0] * size
    owner: dict[Key, int] = {}
    for key in sorted(costs, key=lambda k: -costs[k]):
        rank = min(range(size), key=totals.__getitem__)
        owner[key] = rank
        totals[rank] += costs[key]
    return owner
