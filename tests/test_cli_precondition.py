"""``symgeo precondition``: the table against optimizers that run, names of methods against their closed forms."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from symgeo import Symmetry
from symgeo.cli import main
from symgeo.cli.precondition import PRESETS
from symgeo.curvature import Decomposition, precondition
from symgeo.groups import Cyclic, Group, Orthogonal, Permutation, SignFlip
from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets
from symgeo.preconditioner import describe, read_symmetry
from symgeo.preconditioner.report import HEADER

MODELS = '''
from torch import nn
from symgeo.models.tiny_lm import TinyLM

def lm(): return TinyLM(vocabulary=7, context=5, width=6, depth=2, heads=2, mlp_width=11)
def lora(): return nn.ModuleDict({"lora_A": nn.Linear(5, 2, bias=False), "lora_B": nn.Linear(2, 3, bias=False)})
def frozen(): return nn.Linear(3, 2).requires_grad_(False)
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of models."""
    (tmp_path / "small.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "small", raising=False)
    return tmp_path


def result(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main(["precondition", *argv, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))["result"]


def model(preset: str) -> nn.Module:
    namespace: dict = {}
    exec(MODELS, namespace)
    return namespace["lora" if preset == "lora" else "lm"]()


def test_the_presets_are_those_of_the_library():
    assert set(PRESETS) == set(presets.__all__)


def test_help_imports_no_torch():
    code = (
        "import sys; from symgeo.cli import main; main(['precondition', '--help']);"
        "print([m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "muon, shampoo, adam" in " ".join(done.stdout.split())


def test_table(capsys: pytest.CaptureFixture[str]):
    assert main(["precondition", "small:lm"]) == 0
    out, err = capsys.readouterr()
    header, *lines = out.splitlines()
    assert err == "" and header.split() == [word for name in HEADER for word in name.split()]
    line = next(line for line in lines if line.startswith("blocks.*.mlp.up.weight")).split("  ")
    cells = [cell.strip() for cell in line if cell]
    assert cells[1:10] == ["11 x 6", "n _", "n Orthogonal(11)", "n:V", "2", "1", "6", "11", "21"]
    assert "  = one-sided Shampoo (Muon at betas[1] = 0)" in lines
    assert "embed.weight (7 x 6)" in out and "blocks.*.mlp.up.bias (11, 2 times)" in out


def test_json(capsys: pytest.CaptureFixture[str]):
    found = result(capsys, "small:lm", "--groups", "mlp", "--update-every", "3")
    (layer,) = found["layers"]
    assert layer["layers"] == 2 and layer["groups"] == ["h0 Permutation(11)"]
    assert [p["name"].rsplit(".", 2)[1:] for p in layer["parameters"]] == [
        ["up", "weight"], ["up", "bias"], ["down", "weight"]]
    assert [(k["label"], k["blocks"], k["copies"], k["dimension"]) for k in layer["kinds"]] == [
        ("1", 1, 13, 1), ("h0:W", 1, 13, 10)]
    assert layer["state"] == 2 * (13 + 13 * 14 // 2) and layer["state_per_parameter"] == pytest.approx(208 / (13 * 11))
    assert layer["cost"]["roots"] == pytest.approx((13 + 9 * 13**3) / 3)
    assert layer["cost"]["statistics"] == 2 * 13 + 2 * 13**2 * 11
    totals = found["totals"]
    assert totals["state"] == 2 * layer["state"] and totals["parameters"] == 2 * 13 * 11
    assert totals["parameters"] + totals["adamw_parameters"] == sum(p.numel() for p in model("mlp").parameters())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_state_is_what_the_optimizer_keeps(preset: str, every: int):
    net = model(preset)
    symmetry = getattr(presets, preset)(net)
    report = describe(symmetry, dict(net.named_parameters()), every)
    optimizer = SymO(net.named_parameters(), symmetry, lr=1e-3, update_every=every, compact=report.compact)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    kept = {p: state for p, state in optimizer.state.items()}
    tensors = [(key, x) for state in kept.values() for key, x in state.items() if isinstance(x, Tensor)]
    assert report.state == sum(x.numel() for key, x in tensors if key.startswith(("gradient", "root")))
    stepped = sum(p.numel() for p, state in kept.items() if "exp_avg_sq" in state)
    assert stepped == sum(p.count * p.size for p in report.rest)
    assert report.size + stepped == sum(p.numel() for p in net.parameters())
    assert report.compact == (preset in ("attention", "lora"))


@pytest.mark.parametrize("preset", ["muon", "attention"])
def test_products_cost_what_a_counter_counts(preset: str):
    net = model(preset)
    params = {name: p.detach() for name, p in net.named_parameters()}
    symmetry = getattr(presets, preset)(net)
    members = {name: params[name] for name in symmetry.bind(params).layouts}
    split = Decomposition(symmetry, members, compact=True)
    xs = split.encode(members)
    with FlopCounterMode(display=False) as counter:
        grams = [bucket.gram(x) for bucket, x in zip(split.buckets, xs)]
    assert describe(symmetry, params).cost.statistics == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        _ = [t @ x for t, x in zip(grams, xs)]
    assert describe(symmetry, params).cost.application == counter.get_total_flops()


def polar(g: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ vh


def whitened_frequencies(g: Tensor) -> Tensor:
    """Each frequency of the last axis: sqrt(dimension) times a unit vector; frequency 0 as signs."""
    waves = torch.fft.rfft(g, norm="ortho")
    waves[:, 1:] = waves[:, 1:] / waves[:, 1:].abs().square().sum(0).sqrt()
    waves[:, 0] = waves[:, 0].sgn()
    return torch.fft.irfft(waves, n=g.shape[1], norm="ortho")


CASES: dict[str, tuple[str, dict[str, Group], str, Callable[[Tensor], Tensor]]] = {
    "signs": ("h k", {"h": SignFlip(), "k": SignFlip()}, "sign descent", torch.sign),
    "rotations of one axis": ("_ n", {"n": Orthogonal()}, "Muon", lambda g: 7**0.5 * polar(g)),
    "signed permutations": ("_ (h s)", {"h": Permutation(), "s": SignFlip(per="h")}, "Muon",
                            lambda g: 7**0.5 * polar(g)),
    "rotations of both": ("m n", {"m": Orthogonal(), "n": Orthogonal()}, "normalised SGD",
                          lambda g: 21**0.5 * g / g.norm()),
    "signs of rows, rotations": ("h n", {"h": SignFlip(), "n": Orthogonal()}, "normalised rows",
                                 lambda g: 7**0.5 * g / g.norm(dim=1, keepdim=True)),
    "signs of columns": ("_ h", {"h": SignFlip()}, "normalised units", lambda g: g / g.norm(dim=0)),
    "shifts": ("_ c", {"c": Cyclic()}, "spectral whitening", whitened_frequencies),
    "permutations": ("_ h", {"h": Permutation()}, "Muon at betas[1] = 0), of centred units", lambda g: (
        6**0.5 * polar(g - g.mean(1, keepdim=True)) + g.mean(1, keepdim=True).sign() / 7**0.5)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_method_is_what_it_is_called(case: str):
    pattern, groups, name, step = CASES[case]
    symmetry = Symmetry({"w": pattern}, groups, {"s": 1} if "s" in groups else {})
    g = torch.randn(3, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (layer,) = describe(symmetry, {"w": g}).layers
    assert name in layer.method
    assert torch.allclose(precondition({"w": g}, {"w": g}, symmetry)["w"], step(g), atol=1e-9)
    others = {other for other, (*_, called, _) in CASES.items() if called not in layer.method}
    assert all((CASES[other][3](g) - step(g)).norm() > 1e-3 * step(g).norm() for other in others)


def test_what_is_named_after_structure_only():
    net = TinyLM(vocabulary=7, context=5, width=6, depth=1, heads=2, mlp_width=11)
    params = dict(net.named_parameters())
    named = {name: getattr(presets, name)(net) for name in ("shampoo", "attention")}
    assert all(layer.method.startswith("Shampoo") for layer in describe(named["shampoo"], params).layers)
    attention = describe(named["attention"], params).layers
    assert [layer.method.rsplit(", ", 1)[1] for layer in attention] == [f"of {n} parameters joined" for n in (4, 3)]
    free = describe(Symmetry({"w": "_ _"}, {}), {"w": torch.empty(3, 5)}).layers[0]
    assert free.method == "Adam's diagonal for what no group moves" and free.state == 15


def test_layers_fold_only_where_they_are_alike():
    params = {f"layers.{i}.w": torch.empty(3, 5 + (i == 2)) for i in range(4)} | {"a.0.b": torch.empty(2)}
    symmetry = Symmetry({name: f"_ n{i}" for i, name in enumerate(params) if name != "a.0.b"},
                        {f"n{i}": Orthogonal() for i in range(4)})
    assert len(describe(symmetry, params).layers) == 4  # the names of the groups differ
    scoped = Symmetry({"w": "_ n"}, {"n": Orthogonal()}).each("layers.*")
    report = describe(scoped, params)
    folded = [(layer.parameters[0].name, layer.layers) for layer in report.layers]
    assert folded == [("layers.*.w", 3), ("layers.2.w", 1)]
    assert [p.name for p in report.rest] == ["a.0.b"]


def test_a_file(capsys: pytest.CaptureFixture[str]):
    heads = {"each": "blocks.*.attention", "tensors": {"query.weight": "(H e) _", "key.weight": "(H e) _"},
             "groups": {"H": "Permutation", "e": {"Orthogonal": {"per": "H"}}}, "sizes": {"H": 2}}
    units = {"each": "blocks.*.mlp", "tensors": {"up.weight": "h _", "down.weight": "_ h"},
             "groups": {"h": "Permutation"}}
    Path("both.yaml").write_text(yaml.safe_dump([heads, units]))
    found = result(capsys, "small:lm", "--groups", "both.yaml")
    assert [(layer["layers"], layer["kinds"][-1]["copies"]) for layer in found["layers"]] == [(2, 12), (2, 12)]
    assert found["layers"][0]["parameters"][0]["axes"] == "(H e) _" and not found["compact"]
    Path("one.yaml").write_text("tensors: {head.weight: _ n}\ngroups: {n: Orthogonal}\n")
    assert read_symmetry("one.yaml") == Symmetry({"head.weight": "_ n"}, {"n": Orthogonal()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty; needed tensors"),
        ("[]", "it is empty"),
        ("tensors: [", "not valid YAML"),
        ("groups: {h: Permutation}", "needed a mapping with tensors and groups"),
        ("tensors: {w: h}\nmodel: x", "unknown key 'model'; known are tensors"),
        ("tensors: {w: 3}", "tensors: w must be a pattern"),
        ("tensors: {w: h}\ngroups: [h]", "groups must be a mapping"),
        ("tensors: {w: h}\ngroups: {h: Permutations}", "groups: h must be one of Cyclic"),
        ("tensors: {w: h}\ngroups: {h: {Permutation: {copies: 2}}}", "Permutation does not take {'copies': 2}"),
        ("tensors: {w: h}\nsizes: {h: true}", "sizes: h must be a whole number"),
        ("tensors: {w: h}\neach: 3", "each must be a glob"),
        ("tensors: {w: h}\ngroups: {k: Permutation}", "no pattern has a factor of this name"),
        ("tensors: {nowhere: h}", "parameter 'nowhere'"),
    ],
)
def test_files_that_are_refused(text: str, message: str, capsys: pytest.CaptureFixture[str]):
    Path("groups.yaml").write_text(text)
    assert main(["precondition", "small:lm", "--groups", "groups.yaml"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("symgeo: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["small:lm", "--groups", "mnuon"], 2, "'mnuon' is no file and none of muon"),
        (["small:lm", "--update-every", "0"], 2, "--update-every"),
        ([], 2, "Missing argument 'MODEL'"),
        (["small:nothing"], 1, "has no function 'nothing'"),
        (["small:lm", "--groups", "lora"], 1, "found no pair of trainable parameters"),
        (["small:frozen"], 1, "names no parameter of this model"),
    ],
)
def test_wrong_usage(argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["precondition", *argv]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("symgeo: ") and message in err and "Traceback" not in err


def test_update_every_is_positive():
    with pytest.raises(ValueError, match="update_every must be a whole number >= 1; got 0"):
        describe(Symmetry({"w": "_ n"}, {"n": Orthogonal()}), {"w": torch.empty(3, 5)}, 0)
