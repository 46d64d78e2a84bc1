"""The command line: results, exit codes, and errors that end with one line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from symgeo.cli import main
from symgeo.cli.errors import OUT_OF_MEMORY, explain

TOY = '''
import torch
from symgeo.models.tiny_vit import TinyViT

SIZES = dict(image_size=4, patch_size=2, width=6, depth=1, heads=2, mlp_width=5, classes=3)

def model(seed=0):
    return TinyViT(**SIZES, init_scale=1.0 + seed, generator=torch.Generator().manual_seed(seed))

def first(): return model(1)
def second(): return model(2)
def third(): return model(3)

def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(7, 4, 4, generator=generator), torch.randint(3, (7,), generator=generator)) for _ in range(2)]

def splits():
    print("a user's function may print")
    return {"train": batches(0), "test": batches(1)}

def forever():
    while True:
        yield batches()[0]

def number(): return 3
def words(): return ["a", "b"]
def nothing(): return []
def fails(): raise KeyError("lost")
def hungry(): raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
def mistaken(): return len(None)
value = 3
'''


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of models and data."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 1) -> str:
    """Run a command that must fail; the one line that it ends with."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and err.endswith("\n")
    *before, line = err.splitlines()
    assert line.startswith("symgeo: ")
    assert not before or (code == 2 and before[0].startswith("Usage: symgeo"))
    return line


def loads_finite(text: str) -> dict:
    """JSON without the extensions NaN and Infinity."""
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from symgeo.cli import main; codes = [main([]), main(['--help']), main(['study', '--help'])];"
        "print(codes, [m for m in ('torch', 'numpy', 'matplotlib', 'rich', 'transformers') if m in sys.modules])"
    )
    start = time.perf_counter()
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[2, 0, 0] []", done.stderr
    assert time.perf_counter() - start < 2  # 0.2 s on a machine with nothing else to do


def test_module_and_version():
    done = python("-m", "symgeo", "--version")
    assert done.returncode == 0 and done.stdout.startswith("symgeo 0.")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Missing command"),
        (["sharpen"], "No such command 'sharpen'"),
        (["sharpness", "toy:model"], "Missing option '--data'"),
        (["sharpness", "toy:model", "--data", "toy:batches", "--metric", "flat"], "'flat' is not one of 'inv', 'mix'"),
        (["sharpness", "toy:model", "--data", "toy:batches", "--rho", "-1"], "a finite number >= 0; got -1"),
        (["sharpness", "toy:model", "--data", "toy:batches", "--rho", "nan"], "a finite number >= 0; got nan"),
        (["sharpness", "toy:model", "--data", "toy:batches", "--steps", "0"], "--steps"),
        (["sharpness", "toy:model", "--data", "toy:batches", "--batches", "0"], "--batches"),
        (["sharpness", "toy:model", "--data", "toy:batches", "--dtype", "int8"], "'int8' is not one of"),
        (["sharpness", "toy:model", "--data", "toy:batches", "--device", "abacus"], "'abacus' is none of auto, cpu"),
        (["study", "toy:model", "--data", "toy:splits", "--rho", "0.1,x"], "numbers with commas between them"),
        (["study", "toy:model", "--data", "toy:splits", "--rho", "0.1,-2"], "a radius is a finite number >= 0; got -2"),
        (["study", "toy:model", "toy:model", "--data", "toy:splits"], "every model once; 'toy:model' is given 2 times"),
        (["study", "--data", "toy:splits"], "Missing argument"),
        (["doctor", "--frob"], "No such option: --frob"),
    ],
)  # fmt: skip
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in fails(capsys, *argv, code=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "MODEL nowhere: no such folder; give a folder"),
        ("./nowhere/else", "no such folder"),
        ("empty", "MODEL empty: the folder holds no config.json; give a folder written by save_pretrained"),
        ("empty/typo", "no such folder"),
        ("adapter", "it is a PEFT adapter"),
        ("weightless", "MODEL weightless: transformers cannot load it"),
        ("garbled", "MODEL garbled: transformers cannot load it"),
        ("toy.py", "a file that is no .safetensors checkpoint"),
        ("cut.safetensors", "not a readable safetensors file"),
        ("nomodule:model", "no module 'nomodule' here; run from the folder that holds it"),
        ("toy:nothing_of_that_name", "toy has no function 'nothing_of_that_name'"),
        ("toy:value", "toy has no function 'value'"),
        ("toy:number", "needed a torch.nn.Module, the function returned int"),
        ("toy:fails", "fails() raised KeyError: 'lost'"),
        ("toy:mistaken", "mistaken() raised TypeError"),
        ("broken:model", "broken does not import: ZeroDivisionError"),
        ("needy:model", "needy needs 'no_such_package'; pip install it"),
    ],
)
def test_models_that_do_not_load(model: str, message: str, toy: Path, capsys: pytest.CaptureFixture[str]):
    for folder in ("empty", "adapter", "weightless", "garbled"):
        (toy / folder).mkdir()
    (toy / "adapter" / "adapter_config.json").write_text("{}")
    (toy / "weightless" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (toy / "garbled" / "config.json").write_text("{")
    (toy / "cut.safetensors").write_bytes(b"\x10")
    (toy / "broken.py").write_text("1 / 0")
    (toy / "needy.py").write_text("import no_such_package")
    assert message in fails(capsys, "sharpness", model, "--data", "toy:batches")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "--data nowhere: no such file; give a .safetensors file or module:function"),
        ("nowhere.safetensors", "no such file"),
        ("toy.py", "not a format that is read here"),
        ("cut.safetensors", "not a readable safetensors file"),
        ("uneven.safetensors", "every tensor needs the same number of rows, at least one; found x: 4, y: 3"),
        ("mixed.safetensors", "x goes with y and nothing else"),
        ("toy:number", "needed an iterable of batches, found int"),
        ("toy:words", "a batch is (x, y) or a dictionary, found str"),
        ("toy:nothing", "found no batches; return at least one"),
        ("toy:fails", "fails() raised KeyError"),
    ],
)
def test_data_that_does_not_load(spec: str, message: str, toy: Path, capsys: pytest.CaptureFixture[str]):
    (toy / "cut.safetensors").write_bytes(b"\x10")
    save_file({"x": torch.zeros(4, 2), "y": torch.zeros(3)}, toy / "uneven.safetensors")
    save_file({"x": torch.zeros(3), "y": torch.zeros(3), "z": torch.zeros(3)}, toy / "mixed.safetensors")
    assert message in fails(capsys, "sharpness", "toy:model", "--data", spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:97"], "torch finds no such device here; use --device cpu"),
        (["--plot", "figure.jpeg"], "a figure is written as .png or .pdf"),
        (["--json", "toy.py/report.json"], "its folder cannot be made"),
        (["--json", "."], "is a folder; name a file in it"),
        (["--json", "/proc/report.json"], "/proc/report.json: its folder "),
    ],
)
def test_options_that_cannot_be_met(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in fails(capsys, "sharpness", "toy:model", "--data", "toy:batches", *options)


def test_unexpected_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert OUT_OF_MEMORY in fails(capsys, "sharpness", "toy:hungry", "--data", "toy:batches")
    assert explain(MemoryError()) == (1, OUT_OF_MEMORY)
    assert explain(ZeroDivisionError("by\nzero"))[1].startswith("ZeroDivisionError: by zero; SYMGEO_TRACEBACK=1")
    assert explain(PermissionError(13, "Permission denied", "a"))[1].startswith("a: permission denied; choose")
    assert "pip install it" in explain(ModuleNotFoundError("No module named 'geoopt'", name="geoopt"))[1]
    monkeypatch.setenv("SYMGEO_TRACEBACK", "1")
    assert main(["sharpness", "toy:fails", "--data", "toy:batches"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-1].startswith("symgeo: MODEL toy:fails")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("symgeo.installation.findings", interrupted)
    assert fails(capsys, "doctor", code=130) == "symgeo: interrupted"


def test_missing_transformers(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (toy / "folder").mkdir()
    (toy / "folder" / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'symgeo[hf]'" in fails(capsys, "symmetry", "folder")


def test_hub_id_says_that_it_downloads(capsys: pytest.CaptureFixture[str]):
    assert main(["symmetry", "no-such-owner/no-such-model"]) == 1  # the hub is offline in tests
    said, *_, line = capsys.readouterr().err.splitlines()
    assert "may download" in said and "check the id and the network" in line


def test_sharpness(toy: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["sharpness", "toy:model", "--data", "toy:batches", "--rho", "0.2", "--steps", "4"]
    assert main([*argv, "--json", "new/deep/report.json", "--plot", "figure.png", "--dtype", "float64"]) == 0
    out, err = capsys.readouterr()
    document = loads_finite((toy / "new/deep/report.json").read_text())
    assert document["command"] == "sharpness" and document["settings"]["rho"] == 0.2
    assert document["versions"]["torch"] == torch.__version__
    result = document["result"]
    assert result["value"] > 0 and len(result["per_batch"]) == 2 and result["pairs"] == 4
    assert f"geodesic inv sharpness  {result['value']:.6g}" in out
    assert "exactly zero" in err
    assert (toy / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--in-place", "--dtype", "float64", "--json", "-", "--quiet"]) == 0
    assert loads_finite(capsys.readouterr().out)["result"]["value"] == pytest.approx(result["value"], rel=1e-10)
    assert main([*argv, "--batches", "1", "--quiet", "--metric", "mix", "--plot", "figure.pdf"]) == 0
    out, err = capsys.readouterr()
    assert "1 batches" in out and err == ""
    assert (toy / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in toy.iterdir() if path.name.startswith(".")) == []


def test_endless_data_and_files(toy: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--batches", "1", "--steps", "1", "--quiet", "--json", "-"]
    assert main(["sharpness", "toy:model", "--data", "toy:forever", *options]) == 0
    first = loads_finite(capsys.readouterr().out)["result"]["value"]
    import toy as module

    x, y = module.batches()[0]
    save_file({"x": x, "y": y}, toy / "data.safetensors")
    assert main(["sharpness", "toy:model", "--data", "data.safetensors", *options]) == 0
    assert loads_finite(capsys.readouterr().out)["result"]["value"] == first


def test_json_alone_on_standard_output(capsys: pytest.CaptureFixture[str]):
    argv = ["sharpness", "toy:model", "--data", "toy:splits", "--steps", "1", "--rho", "0", "--json", "-"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert loads_finite(out)["result"]["value"] == 0
    assert "a user's function may print" in err


def test_symmetry(capsys: pytest.CaptureFixture[str]):
    assert main(["symmetry", "toy:model", "--data", "toy:batches", "--json", "report.json"]) == 0
    out = capsys.readouterr().out
    result = loads_finite(Path("report.json").read_text())["result"]
    assert result["ok"] and result["invariance"] < 1e-10 and result["parameters"] == 350
    assert {"GeneralLinear", "Permutation"} <= {group["kind"] for group in result["groups"]}
    assert "GeneralLinear" in out and f"flat dimensions {result['dimension']}" in out
    # two heads of GL(3) for queries and keys and two for values: 36; the rest are shifts and scales of norms
    assert result["dimension"] >= 36


def test_symmetry_counts_and_draws(toy: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--count", "--approximate", "--plot", "blocks.png", "--json", "report.json"]
    assert main(["symmetry", "toy:model", *options]) == 0
    out = capsys.readouterr().out
    result = loads_finite(Path("report.json").read_text())["result"]
    counted = result["count"]
    assert counted["declared"] == result["dimension"] and counted["reliable"]
    # what holds up to the eps of a norm is declared on demand, and is not flat
    inexact = [row for row in result["rows"] if not row["exact"]]
    assert [row["what"] for row in inexact] == ["scale of the residual stream"]
    assert counted["measured"] == counted["declared"] - 1 and 1e-9 < inexact[0]["invariance"] < 1e-2
    assert any(row["what"] == "query-key" and row["where"] == "blocks.*" for row in result["rows"])
    assert sum(row["dimension"] for row in result["rows"]) >= result["dimension"]
    assert result["unknown"] == [] and "not recognised  nothing" in out and "approximate" in out
    assert (toy / "blocks.png").stat().st_size > 5_000
    assert main(["symmetry", "toy:model", "--count"]) == 0
    assert "complete" in capsys.readouterr().out


def test_symmetry_of_a_folder(toy: Path, capsys: pytest.CaptureFixture[str]):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5,
        max_position_embeddings=13, num_labels=3,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(toy / "bert")
    assert main(["symmetry", "bert", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "GeneralLinear" in out and err == ""
    columns = {"input_ids": torch.randint(11, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.long)}
    save_file(columns | {"labels": torch.randint(3, (5,))}, toy / "rows.safetensors")
    options = ["--steps", "1", "--batch-size", "3", "--json", "-"]
    assert main(["sharpness", "bert", "--data", "rows.safetensors", *options]) == 0
    assert len(loads_finite(capsys.readouterr().out)["result"]["per_batch"]) == 2
    text = (toy / "bert" / "config.json").read_text()
    (toy / "bert" / "config.json").write_text(text.replace("BertForSequenceClassification", "BertForMaskedLM"))
    assert "which would be random" in fails(capsys, "symmetry", "bert")


def test_symmetry_needs_inputs(toy: Path, capsys: pytest.CaptureFixture[str]):
    (toy / "plain.py").write_text("import torch\ndef model(): return torch.nn.Linear(2, 3)\n")
    assert "Linear does not say what its inputs are; give some with --data SPEC" in fails(
        capsys, "symmetry", "plain:model"
    )


def test_study(toy: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--data", "toy:splits", "--rho", "0.05,0.1", "--steps", "1"]
    assert main(["study", "toy:first", "toy:second", "toy:third", *options, "--json", "-", "--plot", "tau.png"]) == 0
    result = loads_finite(capsys.readouterr().out)["result"]
    assert [model["name"] for model in result["models"]] == ["toy:first", "toy:second", "toy:third"]
    assert set(result["models"][0]["gaps"]) == {"loss gap", "error gap"}
    assert len(result["measurements"]) == 3 * 4 * 2 and result["failures"] == []
    assert {(c["measure"], c["n"]) for c in result["correlations"]} >= {("geodesic mix", 3)}
    assert (toy / "tau.png").stat().st_size > 10_000


def test_study_refuses(toy: Path, capsys: pytest.CaptureFixture[str]):
    assert "no such folder" in fails(capsys, "study", "toy:first", "typo", "--data", "toy:splits")
    save_file({"x": torch.zeros(3, 4, 4), "y": torch.zeros(3, dtype=torch.long)}, toy / "one.safetensors")
    save_file({"x_train": torch.zeros(3), "y_train": torch.zeros(3)}, toy / "half.safetensors")
    for data, message in {"one.safetensors": "found one set of batches", "half.safetensors": "needed 'test'"}.items():
        assert main(["study", "toy:first", "toy:second", "toy:third", "--data", data]) == 1
        assert message in capsys.readouterr().err
    assert main(["study", "toy:first", "toy:second", "--data", "toy:splits", "--steps", "1"]) == 1
    assert "give at least 3 models" in capsys.readouterr().err.splitlines()[-1]


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--json", "report.json"]) == 0
    assert "cpu" in capsys.readouterr().out
    assert loads_finite(Path("report.json").read_text())["result"]["ok"]
    monkeypatch.setattr("symgeo.installation.installed", {"transformers": "4.57.1", "torchvision": "0.1"}.get)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "PROBLEM: torchvision is installed but broken" in out and "pip uninstall torchvision" in err
    assert "pip install -U 'transformers>=5'" in out
