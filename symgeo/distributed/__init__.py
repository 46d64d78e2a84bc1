"""Several processes with one model: what they agree on, who owns what, and flat collectives between them."""

from symgeo.distributed.exchange import Exchange
from symgeo.distributed.owners import longest_first
from symgeo.distributed.processes import PeerError, Processes, processes
from symgeo.distributed.replicas import check_replicas, check_same
from symgeo.distributed.shards import is_sharded, local, refuse_parts, refuse_sharded

__all__ = [
    "Exchange",
    "PeerError",
    "Processes",
    "check_replicas",
    "check_same",
    "is_sharded",
    "local",
    "longest_first",
    "processes",
    "refuse_parts",
    "refuse_sharded",
]
