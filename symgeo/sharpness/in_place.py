"""Sharpness of a module where it stands: for models of which one copy, or one process, is all there is room for."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manifolds.geodesic import METHODS
from symgeo.distributed import Processes, check_replicas, check_same, is_sharded, processes, refuse_parts
from symgeo.distributed.replicas import check_agreed
from symgeo.distributed.shards import reducing
from symgeo.functional import Loss, functional_loss
from symgeo.progress import track
from symgeo.sharpness.ascent import Ascent, Objective, auto_pgd
from symgeo.sharpness.chunks import CHUNK_BYTES, Chunks, Metric
from symgeo.sharpness.result import SharpnessResult, check_count, check_rho
from symgeo.sharpness.worst_case import batch_list, check_base, check_gauges, evaluate, summarise
from symgeo.symmetry import Symmetry


def in_place_sharpness(
    model: nn.Module, batches: Iterable[Any], rho: float, symmetry: Symmetry | None = None,
    criterion: Callable[..., Tensor] | None = None, metric: str = "inv", rest: str = "adaptive", eps: float = 0.0,
    steps: int = 20, geodesic: str = "exact", seed: int = 0, chunk_bytes: int = CHUNK_BYTES,
    process_group: Any = None, progress: bool = False, loss: Loss | None = None,
) -> SharpnessResult:
    r"""The geodesic sharpness of :func:`symgeo.geodesic_sharpness`, with the parameters of the model themselves.

    The parameters that require a gradient move, all others (a frozen base model under LoRA adapters) are constants
    and cost nothing.  They are overwritten by every point of the search and given back bit for bit, whatever
    happens; so are gradients, buffers (the statistics of a BatchNorm in training mode) and torch's random state.
    The exponential map and its derivative are taken a chunk of parameters at a time, of ``chunk_bytes`` in double
    precision, so that beside the model, its gradients and one copy the memory is that of the search: up to seven
    vectors of coordinates.
    Activation checkpointing, mixed precision and offloading of the model work as in training: the loss is a forward
    and a backward pass of the module.  Without a symmetry the metric is ``rest`` for everything: "adaptive" then is
    adaptive sharpness along exact geodesics, with ``geodesic="linear"`` on straight lines.

    With several processes (torch.distributed) every process passes its share, of equal size, of each batch.  Losses
    and gradients are averaged, and all return the same result.  The parameters may be replicas (a plain module, or one
    in DistributedDataParallel) or sharded by ``fully_shard``: then coordinates are sharded too, inner products are
    summed over processes, and each pair is worked on by the process that owns it; parts of which there are replicas
    (a mesh of two axes) count once.  Find the symmetry before sharding.  What one process raises, all raise, the others
    as ``symgeo.distributed.PeerError``; under ``fully_shard`` see ``symgeo.distributed.Processes.announcing``.
    process_group : the processes, by default all of them; False for this one alone

    ``criterion`` is that of :func:`symgeo.functional_loss`; a ``loss(params, batch)`` of the module may take its place,
    and is called without params.

    The draws at a critical point depend on chunks and on how parameters are sharded; everything else is the same as in
    one process to rounding.  Half precision stores points with a relative error that may exceed small ``rho``: use
    float32.

    Raises ``ValueError`` as :func:`symgeo.geodesic_sharpness` does, where nothing requires a gradient, where the
    backward pass leaves none, and for arguments or numbers of batches that differ between processes.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> batch = (torch.eye(2), torch.zeros(2, 1))
    >>> before = model.weight.detach().clone()
    >>> result = in_place_sharpness(model, [batch], rho=0.1, criterion=nn.functional.mse_loss)
    >>> torch.equal(model.weight, before), result.value > 0
    (True, True)
    """
    team = processes(_group(process_group))
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    params = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    with nullcontext() if team is None else team.together():
        rho, steps, chunk_bytes = check_rho(rho), check_count("steps", steps), check_count("chunk_bytes", chunk_bytes)
        _check_arguments(geodesic, eps, loss, criterion)
        _check_sharding(params, team)
        data = batch_list(batches)
    if team is not None:
        _agree(team, params, data, symmetry, rho=rho, steps=steps, geodesic=geodesic, metric=metric, rest=rest, eps=eps,
               seed=seed, chunk_bytes=chunk_bytes)
    constants = {name: p for name, p in bare.named_parameters() if not p.requires_grad}
    chunks = Chunks(params, constants, Metric(symmetry, metric, rest, eps), team, chunk_bytes)
    kind = f"geodesic {metric}" if chunks.pairs else rest
    search = _Search(bare, loss or functional_loss(bare, criterion), chunks, geodesic, rho)
    ascents = search.over(track(data, f"{kind} sharpness", progress), steps, torch.Generator().manual_seed(seed))
    return summarise(ascents, chunks, rho, kind, geodesic, steps)


def _check_arguments(geodesic: str, eps: float, loss: Loss | None, criterion: Callable[..., Tensor] | None) -> None:
    if geodesic not in METHODS:
        raise ValueError(f"geodesic must be one of {', '.join(METHODS)}; got {geodesic!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number >= 0; got {eps}")
    if loss is not None and criterion is not None:
        raise ValueError("criterion: a loss is given, which leaves it without use; pass one of the two")


def _group(group: Any) -> Any:
    """A process group, True, False or None, or ``ValueError``."""
    known = dist.is_available() and (isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER)
    if not (known or group is None or isinstance(group, bool)):
        raise ValueError(
            f"process_group must be a torch.distributed.ProcessGroup, None for all processes or False for this one; "
            f"got {group!r}"
        )
    return group


def _check_sharding(params: Mapping[str, Tensor], team: Processes | None) -> None:
    """Something moves; of that all is sharded, or nothing; and the processes that hold it are there."""
    if not params:
        raise ValueError("model: no parameter requires a gradient; call requires_grad_() on those that are to move")
    sharded = [name for name, p in params.items() if is_sharded(p)]
    if sharded and len(sharded) < len(params):
        replica = next(name for name in params if name not in sharded)
        raise ValueError(f"model: {sharded[0]!r} is sharded and {replica!r} is not; apply fully_shard to all of it")
    if team is None:
        refuse_parts(params)


def _agree(
    team: Processes, params: Mapping[str, Tensor], data: Sequence[Any], symmetry: Symmetry | None, **arguments: Any
) -> None:
    """Raises ``ValueError`` in all processes where what they are to measure differs."""
    check_same(team, params)
    check_replicas(team, params)
    digest = None if symmetry is None else hashlib.blake2b(repr(symmetry).encode(), digest_size=8).hexdigest()
    check_agreed(team, {"batches (their number)": len(data), **arguments, "symmetry (a digest)": digest})


class _Search:
    """Losses and gradients at points of a geodesic that are written into the module."""

    def __init__(self, model: nn.Module, loss: Loss, chunks: Chunks, geodesic: str, rho: float) -> None:
        self._loss, self._chunks, self._geodesic, self._rho = loss, chunks, geodesic, rho
        self._model, self._sharders = model, _sharders(model)

    def over(self, batches: Iterable[Any], steps: int, generator: torch.Generator) -> list[Ascent]:
        """The best point for each batch; the module is left as it was."""
        ascents = []
        with self.kept() as restore:
            for batch in batches:
                restore()
                ascents.append(self.climb(batch, steps, generator))
        return ascents

    def climb(self, batch: Any, steps: int, generator: torch.Generator) -> Ascent:
        """The best point for a batch, from the parameters as they are now."""
        self._check(batch)
        chunks, objective = self._chunks, self._objective(batch)
        if self._rho == 0:
            value, _ = objective(chunks.origin())
            return Ascent(chunks.origin(), value, [value], 0)
        draw = functools.partial(chunks.random, generator)
        return auto_pgd(objective, chunks.origin(), self._rho, steps, draw, chunks.inner)

    @contextmanager
    def kept(self) -> Iterator[Callable[[], None]]:
        """A context that leaves the module and torch's random state as they were, and nothing else behind.

        What it yields gives parameters and buffers back at once.
        """
        device = self._chunks.device
        here = [] if device.type == "cpu" else [device]
        forked = torch.random.fork_rng(here, device_type=device.type if here else "cuda")
        try:
            with forked, reducing(self._sharders), _buffers(self._model) as rewind, self._chunks.kept() as restore:
                def both() -> None:
                    restore()
                    rewind()

                yield both
        finally:
            self._forget()

    def _forget(self) -> None:
        """Drop what torch keeps of parameters as they were, casts and gathered shards: the next pass sees them anew."""
        torch.clear_autocast_cache()
        for module in self._sharders:
            module.reshard()

    def _objective(self, batch: Any) -> Objective:
        """Value and horizontal gradient at coordinates: one forward and one backward pass."""
        def at(z: Tensor) -> tuple[float, Tensor]:
            self._chunks.write(z, self._geodesic, self._rho)
            with torch.enable_grad():
                value = self._evaluate(batch, backward=True)
            return value, self._chunks.pull(z, self._geodesic, self._rho)

        return at

    @torch.no_grad()
    def _check(self, batch: Any) -> None:
        """Raises where the loss is not finite, or changes when only the gauge does."""
        given = check_base(self._evaluate(batch, backward=False))
        if self._chunks.pairs:
            self._chunks.write(self._chunks.origin(), "linear", None)
            check_gauges(given, self._evaluate(batch, backward=False), self._chunks)

    def _evaluate(self, batch: Any, backward: bool) -> float:
        """The loss, the mean of all processes."""
        team = self._chunks.team
        self._forget()
        for p in self._chunks.params.values():
            p.grad = None
        if team is None or not (self._sharders or self._chunks.sharded):
            with nullcontext() if team is None else team.together():
                value = evaluate(self._loss, {}, batch)
                if backward:
                    value.backward()
        else:  # with collectives of its own: the pass back begins when all have come through the pass forward
            with team.announcing():
                value = evaluate(self._loss, {}, batch)
            if backward:
                with team.announcing():
                    value.backward()
        found = value.detach().double()
        return float(found if team is None else team.mean_(found))


@contextmanager
def _buffers(model: nn.Module) -> Iterator[Callable[[], None]]:
    """A context that gives back the buffers as they were; what it yields does so at once."""
    kept: Sequence[tuple[dict[str, Tensor | None], str, Tensor | None, Tensor | None]] = [
        (module._buffers, name, x, None if x is None else x.detach().clone())
        for module in model.modules() for name, x in module._buffers.items()]

    @torch.no_grad()
    def restore() -> None:
        for table, name, x, value in kept:
            table[name] = x
            if x is not None and value is not None and not torch.equal(x, value):
                x.copy_(value)

    try:
        yield restore
    finally:
        restore()


def _sharders(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
