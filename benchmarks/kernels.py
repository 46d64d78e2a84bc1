"""What the kernels reach on a GPU, side by side in one process: `symgeo.kernels` against copies and torch's own calls.

  bandwidth   bytes that a pass over memory has to move, by its time, as a fraction of what a copy reaches
              (`pair_sums`, `affine`, `inner_products`, `combination`, `exponential_map`; float32 and bfloat16)
  products    `gram` against `torch.bmm`, `ema_gram` against `torch.baddbmm`, square matrices, bfloat16 and float32;
              those with fewer than 128 rows are 64 at a time, and bfloat16 is widened in memory there
  spectra     `power` and `polar` of many small matrices against `torch.linalg.eigh` and `svd`, batched and in a loop

Times are between two CUDA events, after a buffer larger than the cache was overwritten, which also hides what Python
needs to queue a call.  Rounds interleave the contenders of a case; ratios are medians over rounds of ratios within a
round.  Every result is compared with the reference in float64 first.

    python benchmarks/kernels.py [--rounds 21] [--out benchmarks/kernels.json]
    python benchmarks/kernels.py --cpu        tiny sizes without a GPU: shows that the script runs, measures nothing
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symgeo import kernels
from symgeo.kernels import batched

FRACTION, SPEEDUP, NEVER_SLOWER = 0.7, 1.3, 0.95  # bars; the last one leaves room for the noise of a clock
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
OWN = "chosen"  # the contender that the package picks by itself

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One comparison.

    calls : contenders by name;  bars : contender -> the least ratio of the time of ``against`` to its own;
    moved : bytes that every call has to move, where that decides its time;  check : error of the result of ``OWN``
    """

    name: str
    calls: dict[str, Call]
    against: str
    bars: dict[str, float]
    check: Callable[[], float]
    tolerance: float
    moved: int | None = None
    unit: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """What is measured: entries of a vector, rows of matrices, and how many small ones there are."""

    entries: int
    rows: tuple[int, ...]
    small: tuple[int, ...]
    batch: int


class Clock:
    """Seconds of a call: by events on a GPU, with a cold cache and work that it waits for in the queue."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.buffer = torch.empty(2**30 if self.cuda else 2**16, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        self.buffer.zero_()
        self.buffer.zero_()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device=device).to(dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    wide = wanted.double()
    return float((found.double() - wide).norm() / wide.norm())


def bandwidth(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Passes over memory."""
    n = int(sizes.entries**0.5) // 64 * 64
    vectors = [normal(sizes.entries, dtype=dtype, device=device) + i for i in range(4)]
    y = vectors[0][: n * n].view(n, n)
    out, coefficients = torch.empty_like(vectors[0]), torch.tensor([1.0, -0.5, 0.25, 2.0], device=device)
    line, square = vectors[0].nbytes, y.nbytes
    passes: list[tuple[str, Callable[..., Tensor], tuple[Any, ...], int]] = [
        ("pair_sums", kernels.pair_sums, (y,), square),
        ("affine", kernels.affine, (y, 1.0, -0.5, 0.25, 2.0), 3 * square),
        ("inner_products of 2", kernels.inner_products, (vectors[:2],), 2 * line),
        ("inner_products of 4", kernels.inner_products, (vectors,), 4 * line),
        ("combination of 3", kernels.combination, (vectors[:3], coefficients[:3]), 4 * line),
        ("exponential_map", kernels.exponential_map, (vectors[0], vectors[1]), 3 * line),
    ]
    for name, function, arguments, moved in passes:
        yield Case(
            f"{name}, {NAMES[dtype]}",
            {OWN: lambda f=function, a=arguments: f(*a), "copy": lambda: out.copy_(vectors[0])},
            "copy", {OWN: FRACTION},
            lambda f=function, a=arguments: error(f(*a), f(*a, backend="reference")),
            TOLERANCE[dtype], moved, {"copy": 2 * line},
        )


def products(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Symmetric products of square matrices."""
    for n in sizes.rows:
        x = normal(64 if n < kernels.TILED_ROWS else 1, n, n, dtype=dtype, device=device)
        wide, kept = (torch.eye(n, dtype=kind, device=device).repeat(len(x), 1, 1) for kind in (torch.float32, dtype))
        result = torch.empty_like(x)
        bars = {"triton": SPEEDUP} if dtype == torch.bfloat16 and n >= 1024 else {}
        rivals = [name for name in ("batched", "triton") if kernels.available(name)]
        gram = {OWN: lambda x=x: kernels.gram(x)}
        gram |= {name: lambda x=x, name=name: kernels.gram(x, backend=name) for name in rivals}
        gram["torch.bmm"] = lambda x=x, out=result: torch.bmm(x, x.mT, out=out)
        yield Case(
            f"gram {n}, {NAMES[dtype]}", gram, "torch.bmm", {OWN: NEVER_SLOWER, **bars},
            lambda x=x: error(kernels.gram(x), kernels.gram(x, backend="reference")), TOLERANCE[dtype],
        )
        average = {OWN: lambda x=x, t=wide: kernels.ema_gram(t, x, 0.9)}
        average |= {name: lambda x=x, t=wide, name=name: kernels.ema_gram(t, x, 0.9, backend=name) for name in rivals}
        average["torch.baddbmm"] = lambda x=x, t=kept: t.baddbmm_(x, x.mT, beta=0.9, alpha=0.1)
        yield Case(
            f"ema_gram {n}, {NAMES[dtype]}", average, "torch.baddbmm", {OWN: NEVER_SLOWER, **bars},
            lambda x=x: average_error(x), TOLERANCE[dtype],
        )


def average_error(x: Tensor) -> float:
    found, wanted = (torch.eye(x.shape[-2], device=x.device).repeat(len(x), 1, 1) for _ in range(2))
    kernels.ema_gram(found, x, 0.9)
    return error(found, kernels.ema_gram(wanted, x, 0.9, backend="reference"))


def spectra(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Powers and polar factors of many small matrices."""
    for n in sizes.small:
        x = normal(sizes.batch, n, n, dtype=torch.float32, device=device)
        t = kernels.gram(x) / n + 0.1 * torch.eye(n, device=device)
        yield Case(
            f"power {sizes.batch} x {n}, float32",
            {
                OWN: lambda t=t: kernels.power(t, -0.5, 1e-4),
                "products in torch": lambda t=t: batched.power(t, -0.5, 1e-4, method="newton"),
                "torch.linalg.eigh": lambda t=t: root(t),
                "a loop of eigh": lambda t=t: [root(matrix) for matrix in t],
            },
            "a loop of eigh", {OWN: 1.0},
            lambda t=t: error(kernels.power(t, -0.5, 1e-4), kernels.power(t, -0.5, 1e-4, backend="reference")),
            TOLERANCE[torch.float32],
        )
        yield Case(
            f"polar {sizes.batch} x {n}, float32",
            {
                OWN: lambda x=x: kernels.polar(x),
                "products in torch": lambda x=x: batched.polar(x, method="newton"),
                "torch.linalg.svd": lambda x=x: turned(x),
                "a loop of svd": lambda x=x: [turned(matrix) for matrix in x],
            },
            "a loop of svd", {OWN: 1.0},
            lambda x=x: error(kernels.polar(x), kernels.polar(x, backend="reference")), 1e-3,
        )


def root(t: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(t)
    return (vectors * (values + 1e-4 * values[..., -1:]).rsqrt().unsqueeze(-2)) @ vectors.mT


def turned(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def measure(case: Case, clock: Clock, rounds: int) -> dict[str, Any]:
    """Times, ratios to the rival and whether they reach their bars."""
    wrong = case.check()
    for call in case.calls.values():
        call()  # compiles
        call()
    times: dict[str, list[float]] = {name: [] for name in case.calls}
    for _ in range(rounds):
        for name, call in case.calls.items():
            times[name].append(clock(call))
    work = {name: case.unit.get(name, case.moved) or 1 for name in case.calls}
    ratios = {
        name: statistics.median(
            (rival / work[case.against]) / (own / work[name]) for own, rival in zip(times[name], times[case.against])
        ) for name in case.calls if name != case.against
    }  # fmt: skip
    reached = [ratios[name] >= bar for name, bar in case.bars.items() if name in ratios]
    row: dict[str, Any] = {
        "case": case.name, "against": case.against, "error": wrong, "right": wrong <= case.tolerance,
        "microseconds": {name: round(1e6 * statistics.median(t), 2) for name, t in times.items()},
        "ratio": {name: round(ratio, 3) for name, ratio in ratios.items()}, "bars": case.bars,
        "passed": wrong <= case.tolerance and all(reached),
    }
    if case.moved is not None:
        row["gigabytes_per_second"] = {
            name: round(work[name] / statistics.median(t) / 1e9, 1) for name, t in times.items()
        }
    return row


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
                  "cuda": torch.version.cuda, "tf32": torch.backends.cuda.matmul.allow_tf32}
    if kernels.available("triton"):
        import triton

        found["triton"] = triton.__version__
    return found


def report(row: dict[str, Any], measured: bool) -> None:
    agrees = f"{row['case']:32} error {row['error']:.1e}"
    if not measured:
        print(agrees if row["right"] else f"{agrees}  WRONG", flush=True)
        return
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
    print(f"{agrees}  {'passed' if row['passed'] else 'FAILED'}  times {row['against']}: {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels on a GPU against copies and torch's own calls.")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU, which measure nothing")
    parser.add_argument("--out", type=Path, help="a JSON file (default on a GPU: kernels.json beside this script)")
    options = parser.parse_args()
    if not (options.cpu or torch.cuda.is_available()):
        print("No GPU: nothing was measured. Run it where torch.cuda.is_available(), or with --cpu to try the script.")
        return
    device = torch.device("cpu" if options.cpu else "cuda")
    sizes = Sizes(2**14, (32, 130), (8,), 3)
    if not options.cpu:
        entries = min(2**28, torch.cuda.get_device_properties(device).total_memory // 2**6)
        sizes = Sizes(entries, (32, 64, 96, 256, 512, 1024, 2048, 4096), (8, 16, 32, 64), 256)
    clock, rounds, rows = Clock(device), 2 if options.cpu else options.rounds, []
    groups = [lambda d=d: bandwidth(sizes, d, device) for d in (torch.float32, torch.bfloat16)]
    groups += [lambda d=d: products(sizes, d, device) for d in (torch.bfloat16, torch.float32)]
    groups.append(lambda: spectra(sizes, device))
    for group in groups:
        for case in group():
            rows.append(measure(case, clock, rounds))
            report(rows[-1], clock.cuda)
    found = {"machine": machine(device), "rounds": rounds, "cases": rows}
    out = options.out or (None if options.cpu else Path(__file__).with_suffix(".json"))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    right, passed = (sum(row[verdict] for row in rows) for verdict in ("right", "passed"))
    if options.cpu:
        print(f"{right} of {len(rows)} results agree with the reference; times on a CPU mean nothing here.")
    else:
        print(f"{passed} of {len(rows)} cases reach their bars on {found['machine']['gpu']}.")


if __name__ == "__main__":
    main()
