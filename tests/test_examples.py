"""Every file of examples/ and paper_figs/ runs in its small size and leaves its picture; numbers bear out claims."""

from __future__ import annotations

import ast
import importlib
import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for folder in ("examples", "paper_figs") for path in (ROOT / folder).glob("[!_]*.py"))


def spread(values: list[float]) -> float:
    """The largest relative distance from the first one."""
    return max(abs(value / values[0] - 1) for value in values)


def sharpness_of_a_transformer(rows: Any) -> bool:
    geodesic, adaptive = ([row[kind] for row in rows] for kind in ("geodesic", "adaptive"))
    return len(rows) == 4 and spread(geodesic) < 1e-9 and min(geodesic) > 0 and spread(adaptive) > 1


def study_checkpoints(found: Any) -> bool:
    kinds = {row["measure"] for row in found["measurements"] if row["value"] > 0}
    intervals = all(-1 <= c["low"] <= c["tau"] <= c["high"] <= 1 for c in found["correlations"])
    return len(kinds) == 4 and len(found["correlations"]) == 8 and intervals and not found["failures"]


def log_sharpness_with_trainer(history: Any) -> bool:
    measured = {row["step"]: row["sharpness"] for row in history if "sharpness" in row}
    losses = [row["step"] for row in history if "loss" in row]
    return list(measured) == [0, *losses] and min(measured.values()) > 0


def merge_lora(found: Any) -> bool:
    table = found["summary"]["independent"]
    gauges = {name: line["gauge"] for name, line in table.items() if "gauge" in line}
    factors = {"linear", "PEFT linear", "PEFT ties"}
    same = all(abs(table["tsvd"][key] - table["PEFT svd"][key]) < 1e-9 for key in ("accuracy", "untuned"))
    learned = table["each adapter on its own"]["accuracy"] > table["base"]["accuracy"]
    held = all(gauge > 0.1 if name in factors else gauge < 1e-5 for name, gauge in gauges.items())
    return same and learned and held


def merge_permuted_nets(found: Any) -> bool:
    table = found["summary"]
    accuracy, barrier = table["accuracy"], table["barrier"]
    moved = table["change of the logits by moving network 2"]
    return (
        accuracy["plain mean"]["mean"] + 0.2 < accuracy["Fréchet mean"]["mean"]
        and barrier["aligned by weights"]["largest"] < barrier["as they are"]["mean"] / 3
        and max(moved[name]["largest"] for name in ("network 2", "Fréchet mean")) < 1e-9 < moved["plain mean"]["mean"]
    )


def declare_a_symmetry(found: Any) -> bool:
    true, wrong, partial = found["declarations"].values()
    (drawn, moved) = found["sharpness"].values()
    return (
        true["complete"] and true["declared"] == true["measured"] and not wrong["holds"]
        and partial["holds"] and not partial["complete"]
        and spread([drawn["geodesic"], moved["geodesic"]]) < 1e-9
        and spread([drawn["adaptive"], moved["adaptive"]]) > 0.01
    )  # fmt: skip


def custom_group(found: Any) -> bool:
    holds = {name: check["holds"] for name, check in found["checks"].items()}
    cosines = found["cosines"]
    exact = max(found["errors"].values()) < 1e-12
    return (
        holds == {"dihedral": True, "shifts alone": True, "all permutations": False} and exact
        and cosines["one gradient alone"] < min(cosines["shifts"], cosines["dihedral"])
    )  # fmt: skip


def invariant_flatness(found: Any) -> bool:
    rows = {(row["hessian"], row["point"]): row for row in found["rows"]}
    (euclidean, covariant) = ([rows[kind, at] for at in ("trained", "twin")] for kind in ("Euclidean", "covariant"))
    losses = [row["loss"] for row in found["rows"]]
    tops = zip(*(row["top"] for row in covariant))
    traces = [row["trace"] for row in covariant]
    return (
        spread(losses) < 1e-9 and max(map(spread, tops)) < 1e-6 and max(row["stderr"] for row in covariant) == 0
        and spread(traces) < 1e-6 and spread([row["top"][0] for row in euclidean]) > 1
        and spread([row["trace"] for row in euclidean]) > 1
        and found["gradient"] > 1e-6 and found["flat"] < found["explained"]  # no minimum, as it prints
    )  # fmt: skip


def custom_metric(found: Any) -> bool:
    changes = {row["metric"]: row["change"] for row in found["rows"]}
    carried = {"Fisher", "outputs on reference inputs"}
    return all((change < 1e-9) == (name in carried) for name, change in changes.items())


def precondition_from_a_group(rows: Any) -> bool:
    found = {row["group"]: row for row in rows}
    identity = found.pop("none: identity (the gradient itself)")
    dense = found.pop("none: |Hessian|, damped")
    steps = [row["loss after a step"] for row in found.values()]
    kept = [row["numbers kept"] for row in found.values()]
    return max(steps) < identity["loss after a step"] and max(kept) < dense["numbers kept"]


def optimizer_char_lm(found: Any) -> bool:
    ends = {run["method"]: run["losses"][-1] for run in found["runs"]}
    falls = all(run["losses"][-1] < run["losses"][0] for run in found["runs"])
    return falls and len(ends) == 8 and abs(ends["Muon of torch"] - ends["SymO, rotations, betas[1] = 0 (Muon)"]) < 0.02


def optimize_on_a_quotient(rows: Any) -> bool:
    ends: dict[str, list[float]] = {}
    for row in rows:
        ends.setdefault(row["method"], []).append(row["losses"][-1])
    quotient = [spread(values) for name, values in ends.items() if name.startswith("Riemannian")]
    plain = [spread(values) for name, values in ends.items() if not name.startswith("Riemannian")]
    return len(quotient) == len(plain) == 2 and max(quotient) < 1e-6 and min(plain) > 1


CLAIMS: dict[str, Callable[[Any], bool]] = {
    claim.__name__: claim
    for claim in (
        sharpness_of_a_transformer, study_checkpoints, log_sharpness_with_trainer, merge_lora, merge_permuted_nets,
        declare_a_symmetry, custom_group, invariant_flatness, custom_metric, precondition_from_a_group,
        optimizer_char_lm, optimize_on_a_quotient,
    )
}  # fmt: skip


def run_script(script: str, folder: str) -> None:
    """What ``python SCRIPT --size small --out FOLDER`` does, in a process of its own; prints into files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    sys.argv = [script, "--size", "small", "--out", folder]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()


@pytest.fixture(scope="module")
def processes() -> Iterator[BaseContext]:
    """Processes that begin with what every script imports first: a third of the time would go into that."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "matplotlib.pyplot", "transformers", "peft", "geoopt", "symgeo.merge"])
        yield context


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_script_runs(script: Path, tmp_path: Path, processes: BaseContext) -> None:
    process = processes.Process(target=run_script, args=(str(script), str(tmp_path)))
    process.start()
    process.join(600)
    alive = process.is_alive()
    process.kill()
    assert not alive and process.exitcode == 0, (tmp_path / "stderr").read_text()[-2000:]
    pictures = list(tmp_path.rglob("*.png"))
    assert pictures and all(picture.stat().st_size > 5000 for picture in pictures)
    if script.parent.name == "paper_figs":
        assert (tmp_path / f"{script.stem}.json").exists()
        assert (tmp_path / f"{script.stem}.pdf").read_bytes().startswith(b"%PDF-")
    for record in tmp_path.rglob("*.json"):
        json.loads(record.read_text(), parse_constant=lambda name: pytest.fail(f"a record holds {name}"))
    assert (tmp_path / "stdout").read_text().strip()
    if script.parent.name == "examples":  # what its first lines say is seen in its numbers
        assert CLAIMS[script.stem](json.loads((tmp_path / f"{script.stem}.json").read_text()))


def test_there_are_scripts() -> None:
    names = {path.name for path in SCRIPTS}
    assert {"sharpness_of_a_transformer.py", "level_sets.py", "diagonal_nets.py", "orbit.py"} <= names


def test_every_figure_has_a_row_in_the_table() -> None:
    rows = [line for line in (ROOT / "paper_figs" / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = {row.split("`")[1] for row in rows}
    assert {path.name for path in SCRIPTS if path.parent.name == "paper_figs"} <= named


def test_every_example_has_a_title_and_a_row_in_the_table() -> None:
    examples = [path for path in SCRIPTS if path.parent.name == "examples"]
    for path in examples:
        title, line, blank, *_ = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        assert line == "=" * len(title) and not blank, path.name
        assert path.read_text().count("\n# %%\n") >= 2, path.name
    assert sorted(CLAIMS) == [path.stem for path in examples]
    rows = {line.split("`")[1] for line in (ROOT / "examples" / "README.md").read_text().splitlines() if "| `" in line}
    assert rows == {path.name for path in examples}


def test_a_variable_chooses_the_size_of_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    run = importlib.import_module("_run")
    monkeypatch.setattr(sys, "argv", ["example.py", "--out", str(tmp_path / "new")])
    for value, size in {"small": "small", "full": "full"}.items():
        monkeypatch.setenv(run.VARIABLE, value)
        assert run.options("").size == size and (tmp_path / "new").is_dir()
    monkeypatch.delenv(run.VARIABLE)
    assert run.options("").size == "full"
    monkeypatch.setenv(run.VARIABLE, "large")
    with pytest.raises(SystemExit):
        run.options("")
    assert "SYMGEO_EXAMPLE_SIZE must be one of small, full; found 'large'" in capsys.readouterr().err
