"""Growth with the model, traffic between processes, and what the cost model makes of both for large models.

    python benchmarks/scaling.py [--rounds 7] [--out benchmarks/scaling.json]

All parts are written to the JSON; `scaling.md` explains them:

  growth      time and peak memory of one step of four kinds for 4 times the parameters (8 blocks against 2, on the
              CPU, one thread, float32), medians of ratios of processor time within interleaved rounds
  traffic     bytes and messages of one step on 2 and 4 processes (gloo), counted at the calls of torch.distributed,
              beside what `_cost_model.py` says
  operations  floating-point operations of one step, counted by torch, beside the model's
  memory      bytes of the tensors that a sharpness iteration keeps, counted, beside the model's; of the state of SymO
  seconds     of an optimizer step and of a sharpness iteration beside its passes, and what the model's operations take
              at the rate of products of one matrix of the model, and its bytes at that of a sum into new memory
  prediction  the model for 7 and 70 billion parameters on 8 and 64 devices
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _cost_model import SEVEN, SEVENTY, Shape, optimizer, sharpness
from _memory import growth as memory_growth
from _memory import in_child, live_bytes, moved_bytes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from symgeo import ParameterManifold, find_symmetry, functional_loss, geodesic_sharpness, in_place_sharpness
from symgeo.hessian import riemannian_hessian
from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets

WIDTH, HIDDEN, HEADS, VOCABULARY, CONTEXT = 192, 768, 6, 64, 32
DEPTHS = (2, 8)
BARS = {"time": 6.0, "memory": 4.5}
Work = Callable[[], object]


def language_model(depth: int) -> TinyLM:
    return TinyLM(
        vocabulary=VOCABULARY, context=CONTEXT, width=WIDTH, depth=depth, heads=HEADS, mlp_width=HIDDEN).eval()


def shape_of(depth: int) -> Shape:
    """The language model for the cost model."""
    return Shape(depth, WIDTH, HIDDEN, VOCABULARY, HEADS, WIDTH, 1, CONTEXT, biases=True, norm_size=2)


def criterion(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    symbols = torch.randint(0, VOCABULARY, (rows, CONTEXT + 1), generator=generator)
    return symbols[:, :-1], symbols[:, 1:]


def works(depth: int, names: tuple[str, ...]) -> dict[str, Work]:
    """One unit of every kind of work; what comes before it is done here."""
    model = language_model(depth)
    symmetry = find_symmetry(model)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = functional_loss(model, criterion)
    data = [batch()]
    found: dict[str, Work] = {}
    if "sharpness" in names:
        manifold = ParameterManifold(params, symmetry)
        found["sharpness"] = lambda: geodesic_sharpness(loss, params, data, manifold, 0.1, steps=3)
    if "sharpness in place" in names:
        found["sharpness in place"] = lambda: in_place_sharpness(
            model, data, 0.1, symmetry, criterion, steps=3, chunk_bytes=2**22)
    if "invariant Hessian product" in names:
        operator = riemannian_hessian(loss, params, data, ParameterManifold(params, symmetry), check=False)
        vector = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0))
        found["invariant Hessian product"] = lambda: operator @ vector
    if "optimizer step" in names:
        trained = language_model(depth)
        steps = SymO(trained.named_parameters(), presets.muon(trained), lr=1e-3)
        criterion(trained(data[0][0]), data[0][1]).backward()
        found["optimizer step"] = steps.step
    return found


KINDS = ("sharpness", "sharpness in place", "invariant Hessian product", "optimizer step")


def growth(rounds: int) -> dict[str, Any]:
    """Ratios of the deeper model's time and memory to the shallower one's."""
    small, large = (works(depth, KINDS) for depth in DEPTHS)
    for work in (*small.values(), *large.values()):
        work()  # what the first call sets up is no part of a step
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            first = seconds(small[kind])
            ratios[kind].append(seconds(large[kind]) / first)
    counts = [sum(p.numel() for p in language_model(depth).parameters()) for depth in DEPTHS]
    memory = {kind: [child_peak(kind, depth) for depth in DEPTHS] for kind in KINDS}
    return {
        "parameters": counts,
        "time": {kind: statistics.median(values) * 4 * counts[0] / counts[1] for kind, values in ratios.items()},
        "memory": {kind: high / low * 4 * counts[0] / counts[1] for kind, (low, high) in memory.items()},
        "peak, MiB": memory,
        "bars": BARS,
        "note": "ratios per 4 times the parameters; the embedding does not grow with the depth",
    }


def seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def peak(kind: str, depth: int) -> float:
    """MiB that the resident set of this process grows by in one unit of work."""
    return memory_growth(works(depth, (kind,))[kind])


def child_peak(kind: str, depth: int) -> float:
    return in_child(__file__, "--peak", kind, "--depth", str(depth))


class Counted:
    """Bytes that reach this process, and messages, through the collectives that symgeo calls."""

    def __init__(self) -> None:
        self.received, self.messages = 0.0, 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        names = [name for name in ("all_to_all_single", "all_gather_single", "all_gather_into_tensor", "all_reduce")
                 if hasattr(dist, name)]
        plain = {name: getattr(dist, name) for name in names}
        size, rank = dist.get_world_size(), dist.get_rank()

        def wrapped(name: str) -> Callable[..., Any]:
            def call(out: Tensor, *rest: Any, **more: Any) -> Any:
                ours = sys._getframe(1).f_globals["__name__"].startswith("symgeo")  # FSDP calls them too
                if ours and out.is_floating_point() and out.numel() > 2:  # two numbers travel between hosts
                    self.messages += 1
                    if name == "all_to_all_single":
                        others = sum(n for i, n in enumerate(rest[1]) if i != rank)
                        self.received += others * out.element_size()
                    elif name == "all_reduce":
                        self.received += 2 * (size - 1) / size * out.nbytes
                    else:
                        self.received += (size - 1) / size * out.nbytes
                return plain[name](out, *rest, **more)

            return call

        for name in names:
            setattr(dist, name, wrapped(name))
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(dist, name, function)


def traffic_of_process(depth: int, folder: Path) -> None:
    """What one of several processes counts; the largest of all is recorded."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    x, y = (t.chunk(size)[rank] for t in batch())
    record: dict[str, Any] = {}
    for kind in ("replicas", "shards"):
        model = language_model(depth)
        symmetry = find_symmetry(model)
        preset = presets.muon(model)
        if kind == "shards":
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        whole: nn.Module = DistributedDataParallel(model) if kind == "replicas" else model
        steps = SymO(model.named_parameters(), preset, lr=1e-3)
        counts = {"optimizer step": Counted(), "sharpness iteration": Counted(), "sharpness twice": Counted()}
        for _ in range(2):  # the first step compares replicas
            criterion(whole(x), y).backward()
            counts["optimizer step"] = Counted()
            with counts["optimizer step"].counting():
                steps.step()
        for name, iterations in (("sharpness iteration", 6), ("sharpness twice", 7)):
            with counts[name].counting():
                in_place_sharpness(model, [(x, y)], 0.1, symmetry, criterion, steps=iterations)
        one = {"received": counts["sharpness twice"].received - counts["sharpness iteration"].received,
               "messages": counts["sharpness twice"].messages - counts["sharpness iteration"].messages}
        step = {"received": counts["optimizer step"].received, "messages": counts["optimizer step"].messages}
        record[kind] = {"optimizer step": step, "sharpness iteration": one}
    rows: list[Any] = [None] * size
    dist.all_gather_object(rows, record)
    if rank == 0:
        largest = {kind: {what: {key: max(row[kind][what][key] for row in rows) for key in step}
                          for what, step in whats.items()} for kind, whats in record.items()}
        (folder / f"{size}.json").write_text(json.dumps(largest))
    dist.barrier()
    dist.destroy_process_group()


def traffic(depth: int) -> list[dict[str, Any]]:
    """Counted and predicted bytes and messages of one step."""
    found, shape = [], shape_of(depth)
    with tempfile.TemporaryDirectory() as folder:
        for size in (2, 4):
            command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
                       f"--nproc_per_node={size}", __file__, "--process", folder, "--depth", str(depth)]
            done = subprocess.run(command, capture_output=True, text=True, check=False,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
            counted = json.loads((Path(folder) / f"{size}.json").read_text())
            for kind, whats in counted.items():
                says = {"optimizer step": optimizer(shape, size, kind == "shards"),
                        "sharpness iteration": sharpness(shape, size, kind == "shards")}
                for what, count in whats.items():
                    found.append({
                        "processes": size, "parameters are": kind, "what": what, "counted": count,
                        "predicted": {"received": says[what].received, "messages": says[what].messages}})
    return found


def operations(depth: int) -> dict[str, Any]:
    """Counted and predicted floating-point operations, of a step and of an iteration without its two passes."""
    shape = shape_of(depth)
    model = language_model(depth)
    steps = SymO(model.named_parameters(), presets.muon(model), lr=1e-3, roots="newton")
    x, y = batch()
    criterion(model(x), y).backward()
    with FlopCounterMode(display=False) as counter:
        steps.step()
    with FlopCounterMode(display=False) as passes:
        criterion(model(x), y).backward()
    symmetry, counts, moved = find_symmetry(model), [], []
    for iterations in (6, 12):  # every few iterations the search looks at its step
        work = partial(in_place_sharpness, model, [(x, y)], 0.1, symmetry, criterion, steps=iterations)
        with FlopCounterMode(display=False) as found:
            work()
        counts.append(found.get_total_flops())
        moved.append(moved_bytes(work))
    beside = moved_bytes(lambda: criterion(model(x), y).backward())
    says = optimizer(shape, 1, False)
    return {
        "optimizer step": {"counted": counter.get_total_flops(), "predicted": says.flops + says.root_flops},
        "sharpness iteration": {"counted": (counts[1] - counts[0]) / 6 - passes.get_total_flops(),
                                "predicted": sharpness(shape, 1, False).flops},
        "bytes of a sharpness iteration": {"counted": (moved[1] - moved[0]) / 6 - beside,
                                           "predicted": sharpness(shape, 1, False).moved},
        "parameters": {"counted": sum(p.numel() for p in model.parameters()), "predicted": shape.parameters},
    }


def memory(depth: int) -> dict[str, Any]:
    """Counted and predicted bytes: of a sharpness iteration beside its passes, in small chunks, and of state."""
    model, (x, y) = language_model(depth), batch()
    symmetry, known = find_symmetry(model), [*model.parameters(), x, y]
    passes = live_bytes(lambda: criterion(model(x), y).backward(), known)
    model.zero_grad()
    whole = live_bytes(lambda: in_place_sharpness(
        model, [(x, y)], 0.1, symmetry, criterion, steps=6, chunk_bytes=2**20), known)
    steps = SymO(model.named_parameters(), presets.muon(model), lr=1e-3)
    criterion(model(x), y).backward()
    steps.step()
    state = sum(value.numel() * value.element_size() for held in steps.state.values() for value in held.values()
                if isinstance(value, Tensor) and value.ndim)
    return {
        "blocks": depth, "forward and backward pass": passes,
        "sharpness iteration": {"counted": whole - passes, "predicted": sharpness(shape_of(depth), 1, False).memory},
        "state of the optimizer": {"counted": state, "predicted": optimizer(shape_of(depth), 1, False).state},
    }


def times(depth: int, rounds: int) -> dict[str, Any]:
    """Measured seconds of processor time, and the model's operations over the measured rate of products."""
    model, (x, y) = language_model(depth), batch()
    steps, symmetry = SymO(model.named_parameters(), presets.muon(model), lr=1e-3, roots="newton"), find_symmetry(model)
    criterion(model(x), y).backward()
    whole = torch.randn(sum(p.numel() for p in model.parameters()))
    single, double = torch.randn(WIDTH, HIDDEN), torch.randn(WIDTH, WIDTH, dtype=torch.float64)

    def measured(iterations: int) -> Work:
        return lambda: in_place_sharpness(model, [(x, y)], 0.1, symmetry, criterion, steps=iterations)

    works: dict[str, Work] = {
        "single": lambda: [single @ single.T for _ in range(20)],
        "double": lambda: [double @ double for _ in range(40)],
        "sum": lambda: [whole + whole for _ in range(20)],
        "optimizer step": steps.step, "passes": lambda: criterion(model(x), y).backward(),
        "six": measured(6), "twelve": measured(12),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(seconds(work))
    took = {name: statistics.median(values) for name, values in found.items()}
    rates = {"single": 20 * 2 * WIDTH**2 * HIDDEN / took["single"], "double": 40 * 2 * WIDTH**3 / took["double"]}
    bandwidth = 20 * 3 * whole.nbytes / took["sum"]  # into new memory, as the operations of the search
    says, maps = optimizer(shape_of(depth), 1, False), sharpness(shape_of(depth), 1, False)
    return {
        "operations per second": rates, "bytes per second": bandwidth,
        "optimizer step": {"measured": took["optimizer step"],
                           "predicted": says.flops / rates["single"] + says.root_flops / rates["double"]},
        "sharpness iteration, beside its passes": {
            "measured": (took["twelve"] - took["six"]) / 6 - took["passes"],
            "predicted": maps.flops / rates["single"] + maps.moved / bandwidth},
    }


def predictions() -> list[dict[str, Any]]:
    return [{"parameters": shape.parameters, "processes": size, "parameters are": "shards",
             "optimizer step": asdict(optimizer(shape, size, True)),
             "sharpness iteration": asdict(sharpness(shape, size, True))}
            for shape in (SEVEN, SEVENTY) for size in (8, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, default=DEPTHS[0], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak, options.depth))
        return
    if options.process:
        traffic_of_process(options.depth, options.process)
        return
    record = {
        "machine": {"processor": platform.machine(), "threads": 1, "torch": torch.__version__},
        "model": {"width": WIDTH, "hidden": HIDDEN, "heads": HEADS, "depths": DEPTHS, "tokens": 8 * CONTEXT},
        "operations": operations(DEPTHS[0]), "memory": [memory(depth) for depth in DEPTHS],
        "seconds": times(DEPTHS[0], options.rounds), "traffic": traffic(DEPTHS[0]), "predictions": predictions(),
        "growth": growth(options.rounds),
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: record[key] for key in ("operations", "memory", "seconds", "traffic", "growth")}, indent=2))


if __name__ == "__main__":
    main()
