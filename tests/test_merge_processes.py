"""Merges on several processes: the same bytes, bounded memory, and nothing left behind when one of them ends."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import PREFIX, edit_tensors, write
from safetensors.torch import load_file

from symgeo.cli import main
from symgeo.merge import merge_adapters, plan_merge, processes, worker
from symgeo.merge.adapters import devices
from symgeo.merge.messages import Failure, Finished, Rows, Share
from symgeo.merge.peft.plan import BATCH_BYTES
from symgeo.merge.peft.tensors import TensorFile
from symgeo.merge.worker import work

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes in /proc")
TARGETS = r".*(up|down|0|1|conv|table|attention)"


def status(pid: int | str) -> dict[str, str]:
    """The lines of /proc/PID/status; empty for a process that has ended meanwhile."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children(parent: int) -> list[int]:
    """All child processes that are there, also those that have ended and were not waited for."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if status(pid).get("PPid") == str(parent)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters with layers of every kind, and a tensor of the base."""
    folder = tmp_path_factory.mktemp("made")
    for i, name in enumerate(("one", "two")):
        write(folder / name, seed=i + 1, r=2 + i, lora_alpha=3, rank_pattern={"up": 4}, target_modules=TARGETS)
        edit_tensors(folder / name, lambda t: t | {f"{PREFIX}table.base_layer.weight": torch.arange(6.0)})
    return folder


@pytest.fixture
def adapters(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The same two in the working directory; every module is a batch of its own."""
    monkeypatch.setitem(BATCH_BYTES, "cpu", 1)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return [tmp_path / "one", tmp_path / "two"]


def untouched(folder: Path, mine: set[int]) -> None:
    """Nothing but the two adapters is in the folder, and no process is left that was not there before."""
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]
    assert set(children(os.getpid())) <= mine


def test_two_processes_write_the_same_bytes(adapters: list[Path], tmp_path: Path):
    torch.set_default_dtype(torch.float64)  # of this process alone: nothing may depend on it
    try:
        one = merge_adapters(adapters, tmp_path / "out1", [0.7, -0.3], "dare", seed=5)
        seen: list[tuple[int, int, str]] = []
        two = merge_adapters(adapters, tmp_path / "out2", [0.7, -0.3], "dare", seed=5, processes=2,
                             progress=lambda *what: seen.append(what))  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    assert contents(tmp_path / "out2") == contents(tmp_path / "out1") and len(contents(tmp_path / "out1")) == 4
    assert two.modules == one.modules and len(one.modules) == 8
    assert [done for done, _, _ in seen] == list(range(1, 9)) and {total for _, total, _ in seen} == {8}
    assert sorted(module for _, _, module in seen) == [row["module"] for row in one.modules]


@pytest.mark.parametrize("count", [1, 2, 4, 30])
def test_shares_hold_every_batch_once_and_are_even(adapters: list[Path], count: int):
    plan = plan_merge(adapters, processes=count)
    shares = plan.shares()
    names = sorted(module.module for share in shares for batch in share for module in batch)
    assert names == [module.module for module in plan.modules] and len(shares) == min(count, 8)
    loads = [sum(module.cost for batch in share for module in batch) for share in shares]
    largest = max(module.cost for module in plan.modules)
    assert max(loads) <= sum(loads) / len(loads) + largest  # the bound of longest processing time first
    assert shares == plan_merge(adapters[:], processes=count).shares()
    assert plan.to_dict()["processes"] == len(shares)


def test_the_plan_counts_the_memory_of_every_process(adapters: list[Path], capsys: pytest.CaptureFixture[str]):
    one, two = (plan_merge(adapters, processes=count) for count in (1, 2))
    per_share = [max(module.bytes for batch in share for module in batch) for share in two.shares()]
    assert two.memory_bytes == 6 * sum(per_share) and one.memory_bytes == 6 * max(per_share)
    Path("recipe.yaml").write_text("adapters: [one, two]\nout: out\nprocesses: 2\n")
    for argv in (["one", "two", "-o", "out", "--processes", "2"], ["--config", "recipe.yaml"]):
        assert main(["merge", *argv, "--dry-run", "--json", "plan.json"]) == 0
        assert "MiB in 2 processes\n" in capsys.readouterr().out
        assert json.loads(Path("plan.json").read_text())["result"]["memory_bytes"] == two.memory_bytes
    assert not Path("out").exists()


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_counts_that_are_none(adapters: list[Path], tmp_path: Path, count: object):
    with pytest.raises(ValueError, match="processes must be an integer >= 1; got"):
        merge_adapters(adapters, tmp_path / "out", processes=count)
    assert not (tmp_path / "out").exists()


def test_devices_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    first = torch.device("cuda:0")
    assert devices("cuda", first, 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices(torch.device("cuda"), first, 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices("cuda:1", torch.device("cuda:1"), 2) == ["cuda:1", "cuda:1"]
    assert devices(None, torch.device("cpu"), 2) == ["cpu", "cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_missing_device_is_refused_before_a_process_starts(adapters: list[Path], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", ("-c", "open('started', 'w')"))
    with pytest.raises(ValueError, match="device cuda: it cannot compute in float64 here"):
        merge_adapters(adapters, tmp_path / "out", device="cuda", processes=2)
    untouched(tmp_path, set())


# what a worker may do instead of its work -> what the user is told
START = "import os, signal, subprocess, sys, time; sys.stdin.buffer.read(9); out = sys.stdout.buffer; "
READY = f"out.write({processes.READY!r}); out.flush(); "
BAD = {
    "killed": (START + READY + "os.kill(os.getpid(), signal.SIGKILL)",
               r"process \d was killed by SIGKILL before it had merged module \S+; the system may have run out of"),
    "terminated": (START + "os.kill(os.getpid(), signal.SIGTERM)", "was killed by SIGTERM before"),
    "exit": ("import sys; sys.exit('no module named torch')",
             r"ended with exit code 1 before it had merged module \S+ \(no module named torch\); take fewer"),
    "silent": (START + READY, "ended with exit code 0 before it had merged module"),
    "garbage": (START + "print('imported'); " + READY + "out.write(bytes(99)); out.flush(); time.sleep(60)",
                "does not answer any more before"),
    "cut": (START + READY + f"out.write({pickle.dumps(list(range(99)))[:50]!r})", "ended with exit code 0"),
    "left open": (START + "subprocess.Popen(['sleep', '2']); os._exit(3)", "ended with exit code 3"),
    "one hangs": (START + "\ntry: os.mkdir('one/first')\nexcept OSError: sys.exit('second')\ntime.sleep(60)", "second"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_worker_that_ends_is_reported_and_leaves_nothing(
    adapters: list[Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    code, expected = BAD[name]
    monkeypatch.setattr(processes, "COMMAND", ("-c", code))
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    mine = set(children(os.getpid()))
    assert main(["merge", "one", "two", "-o", "deep/out", "--processes", "2"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("symgeo: worker process ") and err.count("\n") == 1
    assert re.search(expected, err), err
    untouched(tmp_path, mine)


def test_a_worker_that_cannot_be_started(adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for executable, expected in (("/nowhere/python", "worker 1 did not start"), ("", "its own executable")):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(ValueError, match=expected):
            merge_adapters(adapters, tmp_path / "out", processes=2)
        untouched(tmp_path, set(children(os.getpid())))


def test_what_a_worker_says(adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_merge(adapters)
    (batches,) = plan.shares()
    with TensorFile(tmp_path / "file", plan.tensors()) as file:
        file.written(plan.tensors())
    share = Share(plan, batches[:2], tmp_path / "file", "cpu")
    first, second, last = work(pickle.loads(pickle.dumps(share)))
    assert isinstance(first, Rows) and isinstance(second, Rows) and last == Finished()
    name = batches[1][0].module

    def failing(error: Exception) -> Failure:
        def stop(*arguments: object) -> None:
            if arguments[2] == batches[1]:
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(worker, "merge_into", lambda *arguments: stop(*arguments) or [])
            *_, failure = work(share)
        assert isinstance(failure, Failure) and "in stop" in failure.trace
        return failure

    assert failing(ValueError("what it is about")).message == "what it is about"
    assert failing(MemoryError()).message.startswith(f"module {name}: out of memory in a worker process; take fewer")
    disk = OSError(28, "No space left on device")
    assert failing(disk).message == f"module {name}: OSError: {disk} (in a worker process)"


def test_a_worker_that_fails_is_heard(adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = pickle.dumps(Failure("module up: it cannot be merged", "Traceback of the worker"))
    monkeypatch.setattr(processes, "COMMAND", ("-c", START + READY + f"out.write({said!r}); time.sleep(60)"))
    mine = set(children(os.getpid()))
    with pytest.raises(ValueError) as caught:
        merge_adapters(adapters, tmp_path / "deep" / "out", processes=2)
    assert str(caught.value) == "module up: it cannot be merged"
    assert "Traceback of the worker" in caught.value.__notes__[0]
    untouched(tmp_path, mine)


def test_an_interrupt_ends_the_workers(adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "COMMAND", ("-c", START + READY + "open(f'one/{os.getpid()}', 'w'); time.sleep(60)"))
    mine, before = set(children(os.getpid())), len(contents(adapters[0]))

    def interrupt() -> None:
        while len(list(adapters[0].iterdir())) < before + 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        merge_adapters(adapters, tmp_path / "deep" / "out", processes=2)
    thread.join()
    untouched(tmp_path, mine)


def large(folder: Path, modules: int, width: int, rank: int, seed: int) -> Path:
    """An adapter of square layers that are zero but for the first entries: nearly all of its file is a hole."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    shapes = {"lora_A.weight": (rank, width), "lora_B.weight": (width, rank)}
    specs = {f"{PREFIX}q{i}.{role}": shape for i in range(modules) for role, shape in shapes.items()}
    size = 2 * rank * width
    places = {name: [i * size, (i + 1) * size] for i, name in enumerate(specs)}
    header = {n: {"dtype": "F16", "shape": shape, "data_offsets": places[n]} for n, shape in specs.items()}
    text = json.dumps(header).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + size * len(specs))
        rng = np.random.default_rng(seed)
        for name, (place, _) in places.items():
            rows, columns = specs[name]
            for row in range(min(rows, 64)):
                file.seek(start + place + 2 * row * columns)
                file.write(rng.standard_normal(min(columns, 64)).astype("<f2").tobytes())
    return folder


SCRIPT = """
from symgeo.merge import merge_adapters
merge_adapters(["one", "two"], "deep/out", processes=2, progress=lambda done, total, name: print(done, flush=True))
"""


def test_a_merge_in_a_script(tmp_path: Path):
    """One merge, looked at while it works: memory of the workers after 8 and 32 modules; then its parent is killed."""
    folders = [large(tmp_path / name, 96, 2**16, 4, seed=i) for i, name in enumerate(("one", "two"))]
    plan = plan_merge(folders, processes=2)
    assert [len(share) for share in plan.shares()] == [48, 48]
    assert sum(module.bytes for module in plan.modules) > 6 * plan.memory_bytes  # they could not all be in memory
    (tmp_path / "script.py").write_text(SCRIPT)  # without a guard: workers may not run it
    parent = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    peaks = {}
    for line in parent.stdout:
        if int(line) in (8, 32):
            workers = children(parent.pid)
            peaks[int(line)] = max(int(status(pid)["VmHWM"].split()[0]) for pid in workers)  # KiB
        if len(peaks) == 2:
            break
    assert len(workers) == 2 and peaks[32] < 1.05 * peaks[8]
    parent.kill()
    parent.communicate()
    while any(status(pid).get("State", "Z")[0] != "Z" for pid in workers):
        time.sleep(0.01)
    (file,) = (tmp_path / "deep").glob(".out-*/adapter_model.safetensors")
    merged = load_file(file)
    empty = [name for name, x in merged.items() if not x.any()]
    assert 0 < len(empty) < len(merged) == 192  # they ended in the middle, not because there was nothing more to do
