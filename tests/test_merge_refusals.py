"""What cannot be merged is refused in one line that names the folder and the field, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import PREFIX, Net, edit_config, edit_tensors, llama, write

from symgeo.cli import main
from symgeo.merge import merge_adapters
from symgeo.merge.peft import folder as output

A, B = f"{PREFIX}up.lora_A.weight", f"{PREFIX}up.lora_B.weight"
Breakage = Callable[[Path], None]


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two adapters, ``good`` and ``bad``; the second is broken by each test."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("good", "bad")):
        write(tmp_path / name, seed=i, r=2, lora_alpha=3)
        edit_config(tmp_path / name, base_model_name_or_path="owner/base", revision="v1")
    return tmp_path


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *argv: str, code: int = 1) -> str:
    """Run a merge that must be refused; its one line.  Nothing in the working directory may change."""
    before = tree(folder)
    assert main(["merge", *argv]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 + (code == 2) and err.splitlines()[-1].startswith("symgeo: ")
    assert tree(folder) == before
    return err.splitlines()[-1]


def config(**changes: object) -> Breakage:
    return lambda folder: edit_config(folder, **changes)


def tensors(change: Callable[[dict], dict]) -> Breakage:
    return lambda folder: edit_tensors(folder, change)


def add(name: str, *shape: int) -> Breakage:
    return tensors(lambda t: t | {f"{PREFIX}{name}": torch.zeros(shape)})


def text(name: str, content: str) -> Breakage:
    return lambda folder: (folder / name).write_text(content) and None


def through(peft_config: dict) -> Breakage:
    """An adapter that PEFT itself makes with this configuration."""
    return lambda folder: write(folder, r=2, **peft_config) and None


def several(folder: Path) -> None:
    for name in ("first", "second"):
        write(folder / name, r=2)
    (folder / "adapter_config.json").unlink()


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


FIELDS = {
    "use_dora": True, "lora_bias": True, "bias": "lora_only", "modules_to_save": ["down"], "peft_type": "ADALORA",
    "trainable_token_indices": [1, 2], "target_parameters": ["up.weight"], "use_qalora": True,
    "use_bdlora": {"nblocks": 2}, "kasa_config": {"beta": 1e-4}, "arrow_config": {"top_k": 2},
    "alora_invocation_tokens": [3], "monteclora_config": {"num_samples": 2}, "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1}, "loftq_config": {"loftq_bits": 4}, "ensure_weight_tying": True, "some_new_kind": "on",
    "init_lora_weights": "pissa_niter_16", "r": 0, "lora_alpha": "8", "rank_pattern": {"(": 2},
    "alpha_pattern": {"up": None}, "use_rslora": "yes", "base_model_name_or_path": "owner/other", "revision": "v2",
}  # fmt: skip
STARTS = ["pissa", "olora", "corda", "lora_ga", "loftq", "nonsense"]
BROKEN: dict[str, tuple[Breakage, str]] = {
    "missing config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "missing tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "pickle": (pickled, "adapter_model.bin is a pickle"),
    "several": (several, "several subfolders"),
    "no JSON": (text("adapter_config.json", '{"r": 2'), "adapter_config.json is not valid JSON"),
    "a JSON list": (text("adapter_config.json", "[2]"), "adapter_config.json holds a JSON list"),
    "no safetensors": (text("adapter_model.safetensors", "x" * 100), "adapter_model.safetensors is not a readable"),
    "no type": (config(peft_type=None), "peft_type is null"),
    "no rank": (config(r=None), "r is null"),
    "no factors": (tensors(lambda t: {}), "holds no lora_A"),
    "half a pair": (tensors(lambda t: {k: v for k, v in t.items() if k != B}), f"{B} is missing"),
    "other half": (tensors(lambda t: {k: v for k, v in t.items() if k != A}), f"{A} is missing"),
    "rank": (config(r=3), "module down: lora_A has shape [2, 7], lora_B [11, 2], rank 2, but"),
    "rank pattern": (config(rank_pattern={"up": 3}), "rank_pattern 'up' = 3"),
    "ranks differ": (tensors(lambda t: t | {B: torch.zeros(7, 3)}), "their ranks differ"),
    "shapes differ": (tensors(lambda t: t | {A: torch.zeros(2, 17)}), "module up: lora_A [2, 17]"),
    "empty": (tensors(lambda t: t | {A: torch.zeros(2, 0)}), "none of them empty"),
    "nan": (tensors(lambda t: t | {A: t[A] * float("nan")}), f"tensor {A} has entries that are not finite"),
    "infinite": (tensors(lambda t: t | {B: t[B] / 0}), f"tensor {B} has entries that are not finite"),
    "integers": (tensors(lambda t: t | {A: t[A].to(torch.int8)}), "module up has factors of dtype I8"),
    "DoRA tensor": (add("up.lora_magnitude_vector", 7), "up.lora_magnitude_vector: DoRA magnitudes"),
    "bias tensor": (add("up.lora_B.bias", 7), "up.lora_B.bias: biases of factors"),
    "AdaLoRA tensor": (add("up.lora_E", 2, 1), "up.lora_E: this is AdaLoRA"),
    "whole weight": (add("down.weight", 11, 7), "down.weight: a whole weight (modules_to_save"),
    "base without factors": (add("table.base_layer.weight", 2, 3), "table.base_layer.weight belongs to"),
    "named adapter": (add("blocks.0.lora_A.mine.weight", 2, 3), "holds the name of an adapter"),
    "other prefix": (tensors(lambda t: {k.removeprefix(PREFIX): v for k, v in t.items()}), "PEFT's keys start with"),
    "IA3": (config(peft_type="IA3"), 'peft_type is "IA3"'),
    "grouped": (through({"target_modules": ["grouped"]}), "lora_A has shape [2, 4, 3], lora_B [6, 1, 1]: a grouped"),
    "DoRA by PEFT": (through({"use_dora": True}), "use_dora is true"),
    "biases by PEFT": (through({"bias": "all"}), 'bias is "all"'),
    "lora_bias by PEFT": (through({"lora_bias": True}), "lora_bias is true"),
    "saved by PEFT": (through({"modules_to_save": ["conv"]}), 'modules_to_save is ["conv"]'),
    "PiSSA by PEFT": (through({"init_lora_weights": "pissa"}), 'init_lora_weights is "pissa"'),
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_fields(adapters: Path, field: str, capsys: pytest.CaptureFixture[str]):
    edit_config(adapters / "bad", **{field: FIELDS[field]})
    line = refused(capsys, adapters, "good", "bad", "-o", "deep/er/out")
    assert line.startswith("symgeo: bad: adapter_config.json: ") and field in line and ";" in line


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_change_the_base(adapters: Path, start: str, capsys: pytest.CaptureFixture[str]):
    edit_config(adapters / "bad", init_lora_weights=start)
    line = refused(capsys, adapters, "good", "bad", "-o", "out")
    assert f'bad: adapter_config.json: init_lora_weights is "{start}"' in line


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore")  # PEFT's own, while it makes the adapters
def test_broken_adapters(adapters: Path, name: str, capsys: pytest.CaptureFixture[str]):
    breakage, expected = BROKEN[name]
    breakage(adapters / "bad")
    line = refused(capsys, adapters, "good", "bad", "-o", "deep/er/out")
    assert line.startswith("symgeo: bad: ") and expected in line


def test_harmless_fields_are_no_reason(adapters: Path):
    harmless = {"init_lora_weights": "gaussian", "lora_dropout": 0.3, "peft_version": "9.9", "eva_config": {"rho": 2},
                "inference_mode": False, "some_new_kind": False, "another": {}, "lorap_emb_lr": 1e-6, "revision": None,
                "base_model_name_or_path": "", "layers_pattern": [], "runtime_config": {"a": 1}}  # fmt: skip
    edit_config(adapters / "bad", **harmless)
    merge_adapters([adapters / "good", adapters / "bad"], adapters / "out")


def test_folders_that_are_none(adapters: Path, capsys: pytest.CaptureFixture[str]):
    (adapters / "file").write_text("")
    (adapters / "empty").mkdir()
    for name, expected in {"nowhere": "no such folder", "file": "a file, not a folder", "empty": "is missing"}.items():
        assert f"{name}: " in (line := refused(capsys, adapters, "good", name, "-o", "out")) and expected in line


def test_different_embeddings_of_the_base(adapters: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("good", "bad"):
        write(adapters / name, llama, r=2, target_modules=["embed_tokens"])
    edit_tensors(adapters / "bad", lambda t: {k: v + 1 if "base_layer" in k else v for k, v in t.items()})
    line = refused(capsys, adapters, "good", "bad", "-o", "out")
    assert "symgeo: bad: tensor base_model.model.model.embed_tokens.base_layer.weight differs" in line


@pytest.mark.parametrize(
    ("weights", "method", "expected"),
    [
        ("1", "tsvd", "one number per adapter, 2; got 1"),
        ("1,2,3", "bures", "one number per adapter, 2; got 3"),
        ("nan,1", "tsvd", "finite numbers"),
        ("inf,1", "bures", "finite numbers"),
        ("0,0", "tsvd", "at least one must differ from zero"),
        ("0,0", "bures", "at least one must differ from zero"),
        ("-1,2", "bures", "a Fréchet mean needs numbers >= 0"),
    ],
)
def test_weights(adapters: Path, weights: str, method: str, expected: str, capsys: pytest.CaptureFixture[str]):
    argv = ["good", "bad", "-o", "out", f"--weights={weights}", "--method", method]
    assert expected in refused(capsys, adapters, *argv)


def test_options_that_are_wrong(adapters: Path):
    folders = [adapters / "good", adapters / "bad"]
    for options, expected in (
        ({"method": "average"}, "method must be one of tsvd"),
        ({"rank": 0}, "rank must be"),
        ({"rank": "all"}, "rank must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"dtype": "int8"}, "dtype must be one of float16"),
        ({"device": "mps"}, "use cpu"),
        ({"device": "abacus"}, "use cpu"),
        ({"seed": 1.5}, "seed"),
    ):
        with pytest.raises(ValueError, match=expected):
            merge_adapters(folders, adapters / "out", **options)
    with pytest.raises(ValueError, match="at least one"):
        merge_adapters([], adapters / "out")
    with pytest.raises(ValueError, match="a list"):
        merge_adapters("good", adapters / "out")
    with pytest.raises(ValueError, match="out"):
        merge_adapters(folders, "")
    assert sorted(p.name for p in adapters.iterdir()) == ["bad", "good"]


def test_a_merge_too_large_for_its_dtype(adapters: Path):
    edit_config(adapters / "bad", lora_alpha=1e12)
    with pytest.raises(ValueError, match=r"down.lora_A.weight: the merge is not finite in float16; .* wider dtype"):
        merge_adapters([adapters / "good", adapters / "bad"], adapters / "out", dtype="float16")
    assert sorted(p.name for p in adapters.iterdir()) == ["bad", "good"]


def test_outputs_that_are_refused(adapters: Path, capsys: pytest.CaptureFixture[str]):
    (adapters / "file").write_text("")
    (adapters / "full").mkdir()
    (adapters / "full" / "notes.txt").write_text("keep")
    (adapters / "link").symlink_to("good")
    cases = {
        "file": "is a file", "full": "not empty", "good": "may not be", "link": "may not be", "good/out": "may not be",
        ".": "may not be", "file/out": "is a file",
    }  # fmt: skip
    for out, expected in cases.items():
        for extra in ([], ["--dry-run"]):
            assert expected in (line := refused(capsys, adapters, "good", "bad", "-o", out, *extra)) and out in line
    for out in ("good", "link", "."):
        assert "may not be" in refused(capsys, adapters, "good", "bad", "-o", out, "--overwrite")


def test_an_empty_folder_is_taken_and_a_full_one_overwritten(adapters: Path):
    out = adapters / "out"
    out.mkdir()
    folders = [adapters / "good", adapters / "bad"]
    merge_adapters(folders, out, [1, 0])
    first = tree(out)
    (out / "old.txt").write_text("old")
    merge_adapters(folders, out, [0, 1], overwrite=True)
    assert set(tree(out)) == set(first) and tree(out) != first
    assert sorted(p.name for p in adapters.iterdir()) == ["bad", "good", "out"]


def test_overwriting_keeps_the_old_one_until_the_new_one_is_whole(adapters: Path):
    out = adapters / "out"
    folders = [adapters / "good", adapters / "bad"]
    merge_adapters(folders, out)
    before = tree(out)
    edit_tensors(adapters / "bad", lambda t: t | {A: t[A] * float("nan")})
    with pytest.raises(ValueError, match="not finite"):
        merge_adapters(folders, out, overwrite=True)
    assert tree(out) == before and sorted(p.name for p in adapters.iterdir()) == ["bad", "good", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_merges_into_one_folder_one_wins(adapters: Path, overwrite: bool):
    folders, out = [adapters / "good", adapters / "bad"], adapters / "new" / "out"
    if overwrite:
        merge_adapters(folders, out)

    def rival(done: int, total: int, module: str) -> None:
        if done == total:
            merge_adapters(folders, out, [0, 1], overwrite=overwrite)

    with pytest.raises(ValueError, match="another process has written this folder meanwhile"):
        merge_adapters(folders, out, [1, 0], overwrite=overwrite, progress=rival)
    report = json.loads((out / "symgeo_report.json").read_text())
    assert report["settings"]["weights"] == [0, 1] and [p.name for p in out.parent.iterdir()] == ["out"]


CHILD = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from symgeo.merge import merge_adapters
def stop(done, total, module):
    print("working", flush=True)
    time.sleep(60)
merge_adapters(["good", "bad"], "deep/out", overwrite=True, progress=stop)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", CHILD], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "working\n"
    return child


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_merge_leaves_no_output(adapters: Path):
    child = start(adapters)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (left,) = (adapters / "deep").iterdir()
    assert left.name.startswith(".out-") and str(child.pid) in left.name
    said: list[str] = []
    merge_adapters([adapters / "good", adapters / "bad"], adapters / "deep" / "out", say=said.append)
    assert [p.name for p in (adapters / "deep").iterdir()] == ["out"]
    assert len(said) == 1 and "left by a merge that was killed" in said[0]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_merge_that_is_asked_to_end_cleans_up(adapters: Path, number: signal.Signals):
    before = tree(adapters)
    child = start(adapters)
    time.sleep(0.05)
    child.send_signal(number)
    child.communicate()
    assert child.returncode == -number and tree(adapters) == before


def test_a_folder_moved_aside_by_a_killed_merge_is_put_back(adapters: Path):
    out, folders = adapters / "out", [adapters / "good", adapters / "bad"]
    merge_adapters(folders, out)
    before = tree(out)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    aside = output._sibling(out, "old")
    out.rename(aside.with_name(aside.name.replace(f"-{os.getpid()}-", f"-{process.pid}-")))
    said: list[str] = []
    with pytest.raises(ValueError, match="already"), output.new_folder(out, folders, True, said.append):
        raise ValueError("already")
    assert tree(out) == before and "put back" in said[0]


def test_leftovers_of_a_living_process_are_left_alone(adapters: Path):
    other = output._sibling(adapters / "out", "new")
    other.mkdir()
    merge_adapters([adapters / "good", adapters / "bad"], adapters / "out")
    assert other.is_dir() and (adapters / "out").is_dir()


def test_net_has_a_grouped_layer():
    assert Net().grouped.groups == 2
