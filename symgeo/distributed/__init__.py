"""Several processes with one model: what they agree on, who owns what, and flat collectives between them."""

from symgeo.distributed.exchange import Exchange
from symgeo.distributed.owners import longest_first
from symgeo.distributed.processes import Processes, processes
from symgeo.distributed.shards import is_sharded, local

__all__ = ["Exchange", "Processes", "is_sharded", "local", "longest_first", "processes"]
