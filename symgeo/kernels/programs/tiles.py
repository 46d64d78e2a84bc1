"""What the Triton programs share: the decorator, and loads and products of tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr, tensor
except ImportError:  # the modules still have to be read, by documentation and by tests; nothing can be launched

    def jit(program: Callable[..., Any]) -> Any:
        """The program as it is."""
        return program
else:
    jit = triton.jit


@jit
def load_tile(
    x: tensor, stride_row: tensor, stride_column: tensor, rows: tensor, columns: tensor, m: tensor, n: tensor,
    ACC: constexpr,
) -> tensor:  # fmt: skip
    """The entries at ``rows`` x ``columns`` of the ``(m, n)`` matrix at ``x``, 0 outside it."""
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    return tl.load(x + rows[:, None] * stride_row + columns[None, :] * stride_column, mask=inside, other=0.0).to(ACC)


@jit
def product(a: tensor, b: tensor, ACC: constexpr) -> tensor:
    """``a @ b`` with the accumulator in ``ACC``: the default one is float32, and wrong for float64."""
    zero = tl.zeros((a.shape[0], b.shape[1]), dtype=ACC)
    return tl.dot(a, b, zero, input_precision="ieee", out_dtype=ACC)
