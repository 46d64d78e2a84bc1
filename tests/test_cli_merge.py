"""``symgeo merge`` on the command line: flags, recipes, results, and wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from adapters import combine, deltas, distance, load, write
from safetensors.torch import load_file

from symgeo.cli import main
from symgeo.cli.merge import Method, StoredDtype
from symgeo.merge.methods import NAMES
from symgeo.merge.peft.reader import DTYPES
from symgeo.merge.recipe import read_recipe

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "symgeo_report.json"]


@pytest.fixture
def terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A working directory with the adapters ``one`` and ``two``, and their updates."""
    monkeypatch.chdir(tmp_path)
    return [deltas(write(tmp_path / name, seed=i, r=2, lora_alpha=3)) for i, name in enumerate(("one", "two"))]


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_methods_and_dtypes_are_those_of_the_library():
    assert {method.value for method in Method} == set(NAMES)
    assert {dtype.value for dtype in StoredDtype} == {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}


def test_help_imports_nothing_heavy_and_explains_weights():
    code = (
        "import sys; from symgeo.cli import main; main(['merge', '--help']);"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "2,1 is the same as 4,2" in " ".join(done.stdout.split())


def test_merge(terms: list[dict], capsys: pytest.CaptureFixture[str]):
    argv = ["one", "two", "-o", "deep/out", "--weights=-0.4,1.4", "--rank", "sum", "--scale", "2"]
    assert main(["merge", *argv, "--json", "report.json"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("2 adapters merged by tsvd into deep/out\n") and err == ""
    assert sorted(contents("deep/out")) == FILES
    assert distance(deltas(load(Path("deep/out"))), combine([-0.8, 2.8], terms)) < 1e-6
    document = json.loads(Path("report.json").read_text())
    assert document["command"] == "merge" and document["settings"]["weights"] == "-0.4,1.4"
    assert [row["module"] for row in document["result"]["modules"]] == ["down", "up"]


def test_json_alone_on_standard_output(terms: list[dict], capsys: pytest.CaptureFixture[str]):
    assert main(["merge", "one", "two", "-o", "out", "--json", "-", "--quiet", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out)["result"]["settings"]["seed"] == 3 == json.loads(out)["settings"]["seed"]


@pytest.mark.parametrize("dtype", [None, "float16", "float64"])
def test_dtype_is_that_of_the_result(terms: list[dict], dtype: str | None):
    assert main(["merge", "one", "-o", "out", *(["--dtype", dtype] if dtype else [])]) == 0
    stored = load_file("out/adapter_model.safetensors")
    assert {x.dtype for x in stored.values()} == {getattr(torch, dtype or "float32")}


def test_a_recipe_is_the_same_as_flags(terms: list[dict]):
    recipe = {"adapters": ["one", "two"], "out": "from-recipe", "weights": [0.25, 0.5], "method": "dare", "rank": 3,
              "scale": 0.5, "dtype": "float16", "seed": 7}  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", "--config", "recipe.yaml"]) == 0
    flags = "one two -o from-flags --weights 0.25,0.5 --method dare --rank 3 --scale 0.5 --dtype float16 --seed 7"
    assert main(["merge", *flags.split()]) == 0
    assert contents("from-recipe") == contents("from-flags")
    assert main(["merge", "--config", "recipe.yaml", "-o", "other", "--seed", "8"]) == 0  # flags go first
    assert contents("other").keys() == contents("from-flags").keys() and contents("other") != contents("from-flags")
    before = contents("from-recipe")
    assert main(["merge", "--config", "recipe.yaml", "--weights", "1,1"]) == 1
    assert contents("from-recipe") == before
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"overwrite": True, "weights": [1, 1]}))
    assert main(["merge", "--config", "recipe.yaml"]) == 0
    assert contents("from-recipe") != before


def test_a_dry_run_writes_nothing(terms: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(tmp_path.rglob("*"))
    assert main(["merge", "one", "two", "-o", "deep/out", "--rank", "1", "--dry-run", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)["result"]
    assert [(m["module"], m["rank"]) for m in plan["modules"]] == [("down", 1), ("up", 1)]
    assert plan["output_bytes"] == 4 * (18 + 20) and plan["memory_bytes"] > 0
    assert main(["merge", "one", "two", "-o", "deep/out", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "2 modules of 2 adapters" in out and "7 x 13" in out and out.endswith("would write deep/out\n")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-o", "out"], "Missing argument 'ADAPTER...'"),
        (["one", "two"], "Missing option '--out'"),
        (["one", "-o", "out", "--weights", "1,x"], "numbers with commas between them"),
        (["one", "-o", "out", "--rank", "0"], "an integer >= 1, max or sum; got '0'"),
        (["one", "-o", "out", "--rank", "most"], "an integer >= 1, max or sum; got 'most'"),
        (["one", "-o", "out", "--method", "average"], "'average' is not one of 'tsvd'"),
        (["one", "-o", "out", "--dtype", "int8"], "'int8' is not one of"),
        (["one", "-o", "out", "--scale", "big"], "--scale"),
    ],
)
def test_wrong_usage(terms: list[dict], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["merge", *argv]) == 2
    out, err = capsys.readouterr()
    usage, line = err.splitlines()
    assert out == "" and usage.startswith("Usage: symgeo merge") and line.startswith("symgeo: ") and message in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter: [one]", "unknown key 'adapter'; known are adapters, out, weights"),
        ("- one", "needed a mapping"),
        ("", "needed a mapping"),
        ("out: [", "not valid YAML"),
        ("weights: 0.5", "weights must be a list of numbers; got 0.5"),
        ("weights: [a]", "weights must be a list of numbers"),
        ("adapters: one", "adapters must be a list of folders"),
        ("adapters: []", "adapters must be a list of folders"),
        ("out: 3", "out must be a folder"),
        ("rank: most", 'rank must be an integer, "max" or "sum"'),
        ("rank: true", 'rank must be an integer, "max" or "sum"'),
        ("scale: [1]", "scale must be a number"),
        ("seed: 1.5", "seed must be an integer"),
        ("overwrite: 'no'", "overwrite must be true or false"),
    ],
)
def test_recipes_that_are_refused(terms: list[dict], text: str, message: str, capsys: pytest.CaptureFixture[str]):
    Path("recipe.yaml").write_text(text)
    assert main(["merge", "--config", "recipe.yaml", "one", "two", "-o", "out"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("symgeo: recipe recipe.yaml: ") and message in err and err.count("\n") == 1
    assert not Path("out").exists()


def test_a_recipe_that_is_missing(terms: list[dict], capsys: pytest.CaptureFixture[str]):
    assert main(["merge", "--config", "nowhere.yaml"]) == 1
    assert "recipe nowhere.yaml: no such file" in capsys.readouterr().err


def test_numbers_in_recipes(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("weights: [1e-3, 2]\nscale: 1\nrank: max\n")
    assert read_recipe(tmp_path / "r.yaml") == {"weights": [0.001, 2.0], "scale": 1.0, "rank": "max"}
