"""The loss along a path between two models, and its figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from symgeo.functional import Params
from symgeo.merge import Barrier, barrier
from symgeo.plots import plot_barrier


def test_barrier_of_a_known_curve(tmp_path: Path) -> None:
    """L = w^4 - 2 w^2 from -1 to 1 along a line (height 1) and along a path at the bottom (height 0)."""

    def loss(params: Params, batch: float) -> Tensor:
        return batch * (params["w"] ** 4 - 2 * params["w"] ** 2).sum()

    a, b = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}
    line = barrier(loss, a, b, [0.5, 1.5], points=5)
    assert line.t == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert line.losses == pytest.approx([-1, -0.4375, 0, -0.4375, -1])
    assert line.height == pytest.approx(1.0)
    jump = barrier(loss, a, b, [1.0], path=lambda t: a if t < 0.5 else b)
    assert jump.height == 0.0 and len(jump.t) == 11
    expected = {"t": list(line.t), "losses": list(line.losses), "height": line.height}
    assert json.loads(json.dumps(line.to_dict())) == expected
    assert Barrier((0.0, 0.5, 1.0), (0.0, 3.0, 2.0)).height == 2.0
    plot_barrier({"plain": line, "aligned": jump}, tmp_path / "barrier.png")
    assert (tmp_path / "barrier.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="curves: needed at least one"):
        plot_barrier({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="one of these suffixes"):
        plot_barrier({"plain": line}, tmp_path / "barrier.gif")


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("points: needed at least 3", {"points": 2}),
        ("path: must be 'linear' or a function", {"path": "curved"}),
        ("batches: needed at least one", {"batches": []}),
        ("b: parameter 'w' has shape", {"b": {"w": torch.ones(2)}}),
        ("loss: must be finite along the path, found nan at t = 0.5", {"b": {"w": -torch.ones(1)}}),
    ],
)
def test_bad_barriers(message: str, settings: dict[str, object]) -> None:
    arguments = {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}, "batches": [None], **settings}
    with pytest.raises(ValueError, match=message):
        barrier(lambda p, _: (p["w"] / p["w"]).sum(), **arguments)


