"""Sharpness over four processes against one: what `tests/distributed_sharpness_worker.py` measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_sharpness_worker.py")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("sharpness") / "record.json"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4",
               str(WORKER), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("kind", ["replicas", "hsdp"])
def test_replicas_of_shards_count_once(record: dict[str, Any], kind: str) -> None:
    for symmetry in ("symmetry", "none"):
        error, same_pairs = record[f"{symmetry} {kind}"]
        assert error <= 1e-10 and same_pairs


@pytest.mark.parametrize("kind", ["replicas", "hsdp"])
def test_replicas_draw_the_same_at_a_critical_point(record: dict[str, Any], kind: str) -> None:
    value, alike, length = record[f"bowl True {kind}"]
    assert value == pytest.approx(0.01, rel=1e-12) and alike  # rho^2, whatever the direction
    assert length == pytest.approx(0.1, rel=1e-12)
    value, alike, length = record[f"bowl False {kind}"]
    assert 0.01 < value <= 0.03 and alike and length == pytest.approx(0.1, rel=1e-12)  # 3 rho^2 in the steepest one


def test_processes_without_coordinates_take_the_same_branches(record: dict[str, Any]) -> None:
    for rho, bar in (("1e-09", 1e-6), ("0.2", 1e-10)):  # of 1e-9 times the slope the loss resolves seven digits
        found, alone = record[f"adapters {rho}"]
        assert found == pytest.approx(alone, rel=bar) and alone > 0
    assert all(text.startswith("SymmetryError: the loss is not invariant") for text in record["adapters bent"])


def test_gradients_are_synchronised_or_missed(record: dict[str, Any]) -> None:
    assert abs(record["without synchronisation"]) <= 1e-12
    assert record["given back"] and record["after the accumulation"] and abs(record["and measured again"]) <= 1e-12
    assert all("without synchronisation are waiting" in text for text in record["waiting"])
    assert all("left no parameter a gradient" in text for text in record["cleared"])


def test_what_differs_between_processes_is_named(record: dict[str, Any]) -> None:
    wanted = {"batches": "batches (their number): needed the same on all processes; found 1 on process 0 and 2 on",
              "rho": "rho: needed the same on all processes; found 0.3 on process 0 and 0.2 on process 1",
              "steps": "steps: needed the same on all processes; found 3 on process 0 and 4 on process 1",
              "symmetry": "symmetry (a digest): needed the same on all processes; found None on process 0"}
    for what, text in wanted.items():
        assert all(said.startswith(f"ValueError: {text}") for said in record[what]), record[what]


@pytest.mark.parametrize(("what", "reason"), [
    ("one bad argument", "ValueError: rho must be a finite number >= 0; got -1"),
    ("a loss that raises", "ValueError: the labels of this process do not fit"),
])
def test_nobody_waits_for_a_process_that_raises(record: dict[str, Any], what: str, reason: str) -> None:
    said = record[what]
    assert said[1] == reason
    others = [text for rank, text in enumerate(said) if rank != 1]
    assert len(others) == 3
    assert all(text == f"PeerError: process 1 failed, and all stopped with it: {reason}" for text in others)
    assert record["restored"] and record["and then"]


def test_messages_of_any_length_carry_the_same_bits(record: dict[str, Any]) -> None:
    entries, sixteen_bytes, one = record["messages"]
    assert [entries[1], sixteen_bytes[1], one[1]] == [True] * 3
    assert (entries[0], sixteen_bytes[0], one[0]) == (36, 9, 1)  # process 0 has 35 + 1 entries, the others fewer
