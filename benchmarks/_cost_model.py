"""What a step costs: floating-point operations, bytes and messages as functions of the model and the processes.

The same functions are checked against counts of small runs and evaluated for large models by `scaling.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from symgeo.distributed import longest_first
from symgeo.kernels.polynomials import schedule

FLOAT = 4  # bytes of parameters, gradients, coordinates and statistics in single precision


@dataclass(frozen=True)
class Shape:
    """A decoder: layers of attention (keys and values may have fewer heads) and a gated or plain MLP.

    biases : one for each linear map of the layers; mlps : matrices into the hidden layer, 2 if it is gated
    """

    layers: int
    width: int
    hidden: int
    vocabulary: int
    heads: int
    key_width: int
    mlps: int = 2
    positions: int = 0
    biases: bool = False
    norm_size: int = 1  # numbers of a norm for each of its channels

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of all matrices that the one-sided preset takes."""
        d, k, h = self.width, self.key_width, self.hidden
        layer = [(d, d), (k, d), (k, d), (d, d), *[(h, d)] * self.mlps, (d, h)]
        return layer * self.layers + [(self.positions, d)] * bool(self.positions)

    @property
    def pairs(self) -> int:
        """Parameters in factor pairs: queries, keys, values and outputs of attention, with their biases but one."""
        d, k = self.width, self.key_width
        return self.layers * (2 * d * d + 2 * k * d + self.biases * (d + 2 * k))

    @property
    def parameters(self) -> int:
        """All parameters, embedding and head apart."""
        d, k, h = self.width, self.key_width, self.hidden
        biases = self.biases * (2 * d + 2 * k + self.mlps * h + d)
        layers = self.layers * (biases + 2 * self.norm_size * d)
        ends = 2 * self.vocabulary * d + self.biases * self.vocabulary + self.norm_size * d
        return sum(m * n for m, n in self.matrices) + layers + ends


SEVEN = Shape(32, 4096, 11008, 32000, 32, 4096)
SEVENTY = Shape(80, 8192, 28672, 32000, 64, 1024)


def second_moment(short: int, long: int) -> float:
    """``X X^T`` of ``(short, long)`` in up to four slabs of rows from the diagonal on."""
    slabs = min(max(short // 64, 1), 4)
    return 2 * short**2 * long * (slabs + 1) / (2 * slabs)


def newton_products(damping: float, floor: float = 1e-8) -> int:
    """Products of ``(M, M)`` matrices in one inverse square root: two largest eigenvalues, and what `power` does."""
    lower = max(damping, floor)
    return 2 * 16 + 4 * len(schedule(math.sqrt(lower / (1 + lower))))


@dataclass(frozen=True)
class Optimizer:
    """One step of `SymO` with the one-sided preset and damping, on one of ``processes``.

    flops : of the process that has most to do, of moments and application (single precision) and of a root (double)
    received, messages : bytes that reach one process, in messages of more than two numbers; state : bytes on the
        fullest process
    """

    flops: float
    root_flops: float
    received: float
    messages: int
    state: float


def optimizer(shape: Shape, processes: int, sharded: bool, damping: float = 1e-4) -> Optimizer:
    """The cost of one step; AdamW of the rest is elementwise and left out of the operations."""
    sides = [(min(m, n), max(m, n)) for m, n in shape.matrices]
    costs = {i: float(s * s * (n + 20 * s)) for i, (s, n) in enumerate(sides)}
    owner = longest_first(costs, processes)
    mine = [[sides[i] for i, rank in owner.items() if rank == r] for r in range(processes)]
    roots = newton_products(damping)
    flops = max(sum(second_moment(s, n) + 2 * s * s * n for s, n in row) for row in mine)
    root = max(sum(roots * 2 * s**3 for s, _ in row) for row in mine)
    sizes = [sum(s * n for s, n in row) for row in mine]
    state = max(sum(s * n + s * (s + 1) / 2 for s, n in row) for row in mine) * FLOAT
    matrices = sum(sizes)
    rest = 2 * (shape.parameters - matrices) * FLOAT
    if processes == 1:
        return Optimizer(flops, root, 0.0, 0, state + rest)
    if sharded:  # gradients to the owners, steps back: parts of what a process owns itself stay
        received = FLOAT * (1 - 1 / processes) * (max(sizes) + matrices / processes)
        return Optimizer(flops, root, received, 2, state + rest / processes)
    return Optimizer(flops, root, FLOAT * (processes - 1) * max(sizes), 1, state + rest)


@dataclass(frozen=True)
class Sharpness:
    """One iteration of `in_place_sharpness`, beside the forward and backward pass and what training adds to them.

    flops : of the exponential map of factor pairs and its derivative; moved : bytes that all its operations read and
    write; received, messages : as for the optimizer; memory : bytes of coordinates, copies and frames on one process
    """

    flops: float
    moved: float
    received: float
    messages: int
    memory: float


def sharpness(shape: Shape, processes: int, sharded: bool) -> Sharpness:
    """The cost of one iteration with exact ``inv`` geodesics."""
    size = shape.width // shape.heads
    parts = processes if sharded else 1
    share = shape.parameters / parts
    products = 36  # (rows, h) x (h, h) for each row of a pair: map, derivative, projection
    flops = 2 * products * shape.pairs * size / parts
    moved = 113 * FLOAT * share  # read off a count: coordinates, maps and steps of the search are elementwise
    memory = FLOAT * (7 + 1 + 1) * share + FLOAT * 3 * shape.pairs / parts
    if processes == 1:
        return Sharpness(flops, moved, 0.0, 0, memory)
    if sharded:
        received = 2 * FLOAT * (1 - 1 / processes) * shape.pairs / processes
        return Sharpness(flops, moved, received, 3, memory)
    ring = 2 * FLOAT * (1 - 1 / processes) * shape.parameters
    return Sharpness(flops, moved, ring, math.ceil(FLOAT * shape.parameters / 2**27), memory)
