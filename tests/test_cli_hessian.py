"""``symgeo hessian``: its numbers against dense oracles, what an orbit leaves alone, and errors in one line."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hessian_cases import dense_hessian, error, orbit
from torch import Tensor, nn

from symgeo import ParameterManifold, Symmetry, find_symmetry, flatness, functional_loss, hessian
from symgeo.batches import supervised
from symgeo.cli import main
from symgeo.flatness import Flatness, FlatPoint, measure_flatness
from symgeo.functional import Loss, Params
from symgeo.groups import GeneralLinear
from symgeo.hessian import Estimate

TOY = '''
import torch
from torch import nn
from symgeo.models.tiny_vit import TinyViT

SIZES = dict(image_size=4, patch_size=2, width=4, depth=1, heads=2, mlp_width=3, classes=3)

def model(): return TinyViT(**SIZES, generator=torch.Generator().manual_seed(0))
def frozen(): return model().requires_grad_(False)
def unknown(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(7, 4, 4, generator=generator), torch.randint(3, (7,), generator=generator)) for _ in range(2)]

def one(): return batches()[:1]
def wrong(): return [(torch.zeros(7, 5, 5), torch.zeros(7, dtype=torch.long))]

class Noisy(TinyViT):
    def forward(self, x):
        return super().forward(x) * (1 + 0.1 * torch.rand(()))

class Cube(torch.autograd.Function):  # no forward-mode derivative: reverse over reverse has to do
    @staticmethod
    def forward(x):
        return x ** 3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

class Cubed(TinyViT):
    def forward(self, x):
        return Cube.apply(super().forward(x))

def noisy(): return Noisy(**SIZES)
def cubed():
    net = Cubed(**SIZES).requires_grad_(False)
    net.head.requires_grad_()
    return net
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of models and data."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    return tmp_path


def toy(name: str = "model") -> tuple[nn.Module, Loss, Params, list[tuple[Tensor, Tensor]]]:
    """The model of that name in float64, as the command sees it."""
    namespace: dict = {"__name__": "toy"}
    exec(TOY, namespace)
    model = namespace[name]().double().eval()
    data = [(x.double(), y) for x, y in namespace["batches"]()]
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return model, functional_loss(model, supervised), params, data


@functools.cache
def spectrum(name: str = "model") -> Tensor:
    """All eigenvalues of its Euclidean Hessian."""
    return torch.linalg.eigvalsh(dense_hessian(*toy(name)[1:]))


def result(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main(["hessian", *argv, "--json", "-", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))["result"]


def exactly(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_help_imports_no_torch():
    code = (
        "import sys; from symgeo.cli import main; main(['hessian', '--help']);"
        "print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--orbits" in done.stdout


@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_json(metric: str, capsys: pytest.CaptureFixture[str]):
    found = result(capsys, "toy:model", "--data", "toy:batches", "--top", "3", "--orbits", "1", "--metric", metric)
    model, loss, params, data = toy()
    dense, symmetry = spectrum(), find_symmetry(model)
    manifold = ParameterManifold(params, symmetry, metric)
    invariant = hessian.riemannian_hessian(loss, params, data, manifold).eigvalsh()
    start, *moved = found["points"]
    assert error(exactly(start["euclidean"]["top"]), dense[-3:].flip(0)) < 1e-10
    assert error(exactly(start["invariant"]["top"]), invariant[-3:].flip(0)) < 1e-10
    assert start["euclidean"]["trace"] == {
        "value": pytest.approx(float(dense.sum())), "stderr": 0, "samples": 0, "products": 186, "converged": True,
    }
    assert start["invariant"]["trace"]["value"] == pytest.approx(float(invariant.sum()), rel=1e-9)
    assert (start["euclidean"]["size"], start["invariant"]["size"]) == (186, 186 - 4 * 2**2 - 12)  # 12 are zero
    assert found["parameters"] == 186 and found["pairs"] == 4 and found["exact"]
    assert found["explained"] == symmetry.dimension(params)
    count = int((dense.abs() <= 1e-6 * dense.abs().max()).sum())
    assert found["flat"]["value"] == count and found["unexplained"]["value"] == count - found["explained"]
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    slopes = torch.autograd.grad(sum(loss(leaves, b) for b in data) / 2, list(leaves.values()))
    assert found["gradient"] == pytest.approx(float(torch.cat([g.flatten() for g in slopes]).norm()), rel=1e-9)
    assert [p["name"] for p in found["points"]] == ["as given", "orbit 1"]
    for point in moved:
        assert point["loss"] == pytest.approx(start["loss"], rel=1e-12)
        assert point["invariant"]["trace"]["value"] == pytest.approx(start["invariant"]["trace"]["value"], rel=1e-9)
        assert abs(point["euclidean"]["trace"]["value"] / start["euclidean"]["trace"]["value"] - 1) > 1e-3
    assert found["moved"]["invariant"] < 1e-10 and found["moved"]["euclidean"] > 1e-3


def test_text_and_figure(capsys: pytest.CaptureFixture[str], folder: Path):
    assert main(["hessian", "toy:model", "--data", "toy:one", "--top", "2", "--plot", "density.png"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:7]] == ["eigenvalue 1", "eigenvalue 2", "trace", "near zero", "of"]
    assert any(line.startswith("explained by the symmetry") for line in lines) and "parameters are exactly zero" in err
    assert (folder / "density.png").stat().st_size > 10_000


def test_the_command_falls_back_to_reverse_mode(capsys: pytest.CaptureFixture[str]):
    found = result(capsys, "toy:cubed", "--data", "toy:batches", "--top", "2", "--orbits", "0")
    assert error(exactly(found["points"][0]["euclidean"]["top"]), spectrum("cubed")[-2:].flip(0)) < 1e-10


def low_rank() -> tuple[Loss, Params, list[Tensor], Symmetry]:
    """``|tanh(B A) - W|^2`` at an exact minimum: B (7, 3), A (3, 5), 9 flat directions, all the symmetry's."""
    generator = torch.Generator().manual_seed(3)
    b, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (3, 5)))
    gauge = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})

    def loss(params: Params, target: Tensor) -> Tensor:
        return ((params["B"] @ params["A"]).tanh() - target).square().sum()

    return loss, {"B": b, "A": a}, [(b @ a).tanh()], gauge


def test_flat_directions_of_a_minimum():
    loss, params, data, gauge = low_rank()
    found = measure_flatness(loss, params, data, gauge, top=4, orbits=2)
    start, moved, again = found.points
    assert [p.name for p in found.points] == ["as given", "orbit 1", "orbit 2"]
    assert again.loss == pytest.approx(start.loss, abs=1e-12) and again.euclidean.top != moved.euclidean.top
    assert (int(found.flat), found.explained, int(found.unexplained)) == (9, 9, 0)
    assert start.invariant.size == 7 * 3 + 3 * 5 - 9 and int(start.invariant.zeros or 0) == 0
    assert found.gradient < 1e-12 and (found.moved("invariant") or 0) < 1e-10 < 1e-3 < (found.moved("euclidean") or 0)
    assert int(moved.euclidean.zeros or 0) == 9
    away = measure_flatness(loss, {"B": params["B"] + 0.5, "A": params["A"]}, data, gauge, top=4)
    assert int(away.unexplained) < 0 and away.gradient > 1  # what is flat is not straight


def test_estimates_where_there_are_many_parameters(monkeypatch: pytest.MonkeyPatch):
    loss, params, data, gauge = low_rank()
    exact = measure_flatness(loss, params, data, gauge, top=2, density=True)
    monkeypatch.setattr(flatness, "DENSE", 10)
    found = measure_flatness(loss, params, data, gauge, top=2, samples=20)
    assert not found.exact and "are estimates" in found.warnings[-1]
    for a, b in zip(found.points, exact.points):
        for kind in ("euclidean", "invariant"):
            x, y = getattr(a, kind), getattr(b, kind)
            assert x.top == pytest.approx(y.top, rel=1e-8)
            assert 0 < abs(x.trace - y.trace) < 4 * x.trace.stderr
    assert 0 < found.flat.stderr < 2 and abs(found.flat - 9) < 4 * found.flat.stderr
    assert found.points[0].invariant.zeros is None and found.points[1].euclidean.zeros is None
    density = exact.points[0].euclidean.density
    assert density is not None and float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1, abs=1e-5)


def many_flat(count: int, flat: int, decades: float) -> tuple[Loss, Params]:
    """A quadratic with so many eigenvalues, of which so many are 0 and the others cover the decades evenly."""
    scales = torch.cat([torch.zeros(flat), torch.logspace(-decades, 0, count - flat)]).double()
    turn = torch.linalg.qr(torch.randn(count, count, generator=torch.Generator().manual_seed(2)).double()).Q
    return lambda p, batch: 0.5 * (scales * (turn @ (p["w"] - 1)).square()).sum(), {"w": torch.ones(count).double()}


def test_a_count_is_right_or_not_resolved(monkeypatch: pytest.MonkeyPatch):
    """Where small eigenvalues crowd the threshold no number is given, only bounds, in text and in JSON."""
    from symgeo.cli.hessian import _text

    monkeypatch.setattr(flatness, "DENSE", 10)
    monkeypatch.setattr(hessian.quadrature, "MOST", 64)
    loss, params = many_flat(300, 50, 7.0)
    crowded = measure_flatness(loss, params, [None], Symmetry({}, {}), "inv", top=1, orbits=0)
    low, high = crowded.flat.bounds or (0, 0)
    exact = 50 + int((torch.logspace(-7.0, 0, 250) <= 1e-6).sum())
    assert low <= exact <= high and crowded.flat.converged is False and "only bounds" in crowded.warnings[-1]
    assert crowded.to_dict()["flat"]["value"] is None and crowded.to_dict()["flat"]["bounds"] == [low, high]
    line = next(line for line in _text(crowded).splitlines() if line.startswith("near zero (up to"))
    assert line.endswith(f"not resolved: {math.floor(low)} to {math.ceil(high)} of 300")
    loss, params = many_flat(300, 50, 1.0)
    apart = measure_flatness(loss, params, [None], Symmetry({}, {}), "inv", top=1, orbits=0)
    assert apart.flat.converged is not False and abs(apart.flat - 50) <= 4 * apart.flat.stderr < 60
    assert apart.to_dict()["flat"]["value"] == apart.flat
    none = dataclasses.replace(crowded, points=(point_with_zeros(crowded, Estimate(0.0, 2.0, 8)),))
    assert none.flat.stderr == 2.0  # an estimate that happens to be 0 keeps its error


def point_with_zeros(found: Flatness, zeros: Estimate) -> FlatPoint:
    point = found.points[0]
    return dataclasses.replace(point, euclidean=dataclasses.replace(point.euclidean, zeros=zeros))


def test_an_orbit_is_that_of_the_pair_groups():
    model, loss, params, data = toy()
    symmetry = find_symmetry(model)
    point = orbit(symmetry, params, seed=5)
    found = flatness.orbit_points(symmetry.bind(params), params, 1, seed=5)["orbit 1"]
    assert all(torch.equal(found[name], point[name]) for name in params)
    assert any((found[name] - params[name]).abs().max() > 1e-3 for name in params)
    none = flatness.orbit_points(Symmetry({}, {}).bind(params), params, 1)
    still = measure_flatness(loss, params, data, Symmetry({}, {}), top=1)
    assert none == {} and still.moved("euclidean") is None and (still.pairs, still.explained) == (0, 0)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["toy:model"], 2, "Missing option '--data'"),
        (["toy:model", "--data", "toy:batches", "--top", "0"], 2, "--top"),
        (["toy:model", "--data", "toy:batches", "--threshold", "1.5"], 2, "a number between 0 and 1; got 1.5"),
        (["toy:model", "--data", "toy:batches", "--orbits", "-1"], 2, "--orbits"),
        (["toy:model", "--data", "toy:batches", "--tol", "0"], 2, "a tolerance is a positive number; got 0"),
        (["toy:model", "--data", "toy:batches", "--metric", "flat"], 2, "'flat' is not one of 'inv', 'mix'"),
        (["toy:model", "--data", "toy:batches", "--plot", "a.jpg"], 1, "a figure is written as .png or .pdf"),
        (["toy:model", "--data", "nowhere"], 1, "--data nowhere: no such file"),
        (["toy:model", "--data", "toy:wrong"], 1, "TinyViT cannot compute its loss on a batch"),
        (["toy:model", "--data", "toy:batches", "--top", "159"], 1, "top must be at most 158, the size of the"),
        (["toy:unknown", "--data", "toy:batches"], 1, "Sequential has no layer of a known family"),
        (["toy:frozen", "--data", "toy:batches"], 1, "no parameter is trainable"),
        (["toy:noisy", "--data", "toy:batches"], 1, "the loss is not deterministic"),
    ],
)
def test_errors(argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["hessian", *argv]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("symgeo: ") and message in err and "Traceback" not in err
    assert code == 2 or err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be a positive integer"),
        ({"orbits": -1}, "orbits must be an integer >= 0"),
        ({"threshold": 0.0}, "threshold must be between 0 and 1"),
        ({"samples": 0}, "samples must be a positive integer"),
        ({"metric": "flat"}, "metric must be one of"),
    ],
)
def test_wrong_arguments(options: dict, message: str):
    loss, params, data, gauge = low_rank()
    with pytest.raises(ValueError, match=message):
        measure_flatness(loss, params, data, gauge, **options)
    with pytest.raises(ValueError, match="kind must be one of"):
        measure_flatness(loss, params, data, gauge, top=1, orbits=0).moved("adaptive")


def test_a_figure_needs_densities(tmp_path: Path):
    from symgeo.plots import plot_spectrum

    loss, params, data, gauge = low_rank()
    with pytest.raises(ValueError, match="density=True"):
        plot_spectrum(measure_flatness(loss, params, data, gauge, top=1), tmp_path / "a.png")
