"""Two and four processes over gloo against one: what `tests/distributed_worker.py` measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_nets import FOUR, MAKERS, TRAINED, net_of, states

from symgeo import hessian, in_place_sharpness
from symgeo.distributed import longest_first

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(size: int, folder: Path, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={size}", str(WORKER), str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What two processes found, and then four, which load what the two have saved."""
    folder = tmp_path_factory.mktemp("distributed")
    found = {0: {"folder": folder}}
    for size in (2, 4):
        result = launch(size, folder)
        assert result.returncode == 0, result.stderr[-4000:]
        found[size] = json.loads((folder / f"record {size}.json").read_text())
    return found


@pytest.mark.parametrize("size", [2, 4])
class TestProcesses:
    def test_steps_are_those_of_one_process_to_the_last_bit(
        self, records: dict[int, dict[str, Any]], size: int
    ) -> None:
        names = FOUR if size == 4 else tuple(MAKERS)
        for name in names:
            found = records[size][f"exact {name}"]
            assert set(found) == ({"ddp", "fsdp", "hsdp"} if size == 4 else {"ddp", "fsdp"})
            assert set(found.values()) == {0.0}, name

    def test_another_option_is_far_off(self, records: dict[int, dict[str, Any]], size: int) -> None:
        assert records[size]["exact control"] > 1e-5
        assert records[size]["training control"] > 1e-5

    @pytest.mark.parametrize(("dtype", "bar"), [("torch.float32", 1e-5), ("torch.float64", 1e-12)])
    def test_twenty_steps_of_training_are_those_of_one_process(
        self, records: dict[int, dict[str, Any]], size: int, dtype: str, bar: float
    ) -> None:
        for name in TRAINED[: 1 if size == 4 else 2]:
            found = records[size][f"training {name} {dtype}"]
            assert set(found) == {"ddp", "fsdp"} and max(found.values()) <= bar

    def test_a_process_without_gradients_takes_part(self, records: dict[int, dict[str, Any]], size: int) -> None:
        assert set(records[size]["without gradients"].values()) == {0.0}
        assert records[size]["without any gradient"]

    def test_all_learn_of_a_failure_and_go_on(self, records: dict[int, dict[str, Any]], size: int) -> None:
        said = records[size]["a gradient that is not finite"]
        assert said[1].startswith("ValueError: the gradient of 'a.weight' is not finite")
        others = [text for rank, text in enumerate(said) if rank != 1]
        assert all(text.startswith("PeerError: process 1 failed") and "'a.weight'" in text for text in others)
        assert records[size]["after the failure"]
        assert records[size]["a loss that raises"][1] == "ValueError: the labels of this process do not fit"
        assert records[size]["a loss that raises"][0].startswith("PeerError: process 1 failed")

    def test_a_failure_of_one_is_a_step_of_nobody(self, records: dict[int, dict[str, Any]], size: int) -> None:
        said = records[size]["a decomposition that fails"]
        assert "LinAlgError: no eigenvalues today" in said[1] and not said[1].startswith("PeerError")
        assert all(text.startswith("PeerError: process 1 failed") for rank, text in enumerate(said) if rank != 1)
        still, gap = records[size]["undone"]
        assert still == [[True, True]] * size and gap == 0.0  # and the step that is taken again is the one it was

    def test_a_closure_that_raises_in_one_process(self, records: dict[int, dict[str, Any]], size: int) -> None:
        texts, still, alike, moved = records[size]["closures"]
        assert set(texts) == {"before", "after"} and still == [True] * size and alike and moved > 1e-3
        for said in texts.values():
            assert said[1].startswith("ValueError: this process has no")
            assert all(text == f"PeerError: process 1 failed, and all stopped with it: {said[1]}"
                       for rank, text in enumerate(said) if rank != 1)

    def test_who_fails_between_reductions_on_a_device_makes_up_for_them(
        self, records: dict[int, dict[str, Any]], size: int
    ) -> None:
        texts, found = records[size]["reductions"]
        assert texts[:2] == ["ValueError: process 0", "ValueError: process 1"]
        assert found == [[found[0][0], size - 1.0]] * size and found[0][0] >= 2  # the next one is the same for all

    def test_models_that_differ_are_refused(self, records: dict[int, dict[str, Any]], size: int) -> None:
        assert all("parameter 'a.weight' differs" in text for text in records[size]["replicas that differ"])
        for what in ("parameters that differ", "names that differ"):
            assert all("other parameters than process" in text for text in records[size][what])

    def test_sharpness_is_that_of_one_process(self, records: dict[int, dict[str, Any]], size: int) -> None:
        found = records[size]["sharpness"]
        assert set(found) == {"replicas", "ddp", "fsdp"} and max(found.values()) <= 1e-6
        assert records[size]["sharpness control"] > 1e-2
        assert records[size]["sharpness restored"] and records[size]["shards restored"]

    def test_hessian_products_are_those_of_one_process(self, records: dict[int, dict[str, Any]], size: int) -> None:
        assert records[size]["hessian"] < 1e-12 < 1e-2 < records[size]["hessian control"]

    def test_what_shards_have_not_is_refused(self, records: dict[int, dict[str, Any]], size: int) -> None:
        remedies = {"second order of shards": "data_parallel", "manifold of shards": "in_place_sharpness",
                    "symmetry of shards": "before fully_shard"}
        for what, remedy in remedies.items():
            assert all(text.startswith("ValueError: params: 'position' is sharded") and remedy in text
                       for text in records[size][what])

        for texts in records[size]["shards alone"]:
            assert all("needed the processes that hold it, found one" in text for text in texts)

    def test_a_state_of_one_process_loads_everywhere(self, records: dict[int, dict[str, Any]], size: int) -> None:
        assert records[size]["one file for all"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["pair", "permutations"])
def test_checkpoints_go_from_two_to_four_to_one(records: dict[int, dict[str, Any]], kind: str, name: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    path = records[0]["folder"] / f"{kind} {name}"
    two, four = (torch.load(path / f"{size}.pt", weights_only=True)["state"] for size in (2, 4))
    net, _ = net_of("alone")
    optimizer = MAKERS[name](net)
    loaded = states(net, optimizer)
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(loaded, checkpoint_id=path / "4", no_dist=True)
    set_optimizer_state_dict(net, optimizer, loaded["optimizer"])
    one = optimizer.state_dict()["state"]
    entries = 0
    for number, entry in one.items():
        assert entry.keys() == two[number].keys() == four[number].keys()
        for key, value in entry.items():
            for other in (two[number][key], four[number][key]):
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            entries += isinstance(value, torch.Tensor) and bool(value.abs().sum() > 0)
    assert entries > 15


@pytest.mark.parametrize("name", MAKERS)
def test_every_optimizer_goes_on_from_its_checkpoint(records: dict[int, dict[str, Any]], name: str) -> None:
    assert records[2][f"continued {name}"] == 0.0 < 1e-2 < records[2]["continued control"]


def test_nobody_waits_for_a_process_that_has_gone(tmp_path: Path) -> None:
    start = time.monotonic()
    result = launch(2, tmp_path, "crash", timeout=120)
    assert result.returncode != 0 and "this process has had enough" in result.stderr
    assert time.monotonic() - start < 120


def test_work_is_shared_evenly_and_by_everybody_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = {f"w{i}": float(x) for i, x in enumerate(torch.rand(40, generator=generator) ** 3)}
    owner = longest_first(costs, 4)
    totals = [sum(costs[key] for key, rank in owner.items() if rank == r) for r in range(4)]
    assert max(totals) <= 4 / 3 * max(sum(costs.values()) / 4, *costs.values())
    assert owner == longest_first(dict(costs), 4) and set(owner.values()) == {0, 1, 2, 3}


def test_one_process_may_have_shards_of_everything() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        steps, values = [], []
        for sharded in (False, True):
            net, _ = net_of("alone")
            if sharded:
                fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
            tokens = torch.arange(8)
            optimizer = MAKERS["permutations"](net)
            values.append(in_place_sharpness(net, [(tokens, torch.zeros(8, 3).double())], 0.1, None,
                                             torch.nn.functional.mse_loss, steps=4).value)
            net(tokens).square().mean().backward()
            optimizer.step()
            steps.append(torch.cat([p.detach().reshape(-1) if not sharded else p.full_tensor().reshape(-1)
                                    for p in net.parameters()]))
        assert torch.equal(*steps) and values[0] == values[1]
    finally:
        dist.destroy_process_group()


def test_one_process_needs_no_group() -> None:
    operator = hessian.euclidean_hessian(lambda p, b: p["w"].square().sum(), {"w": torch.ones(2)}, [0])
    assert hessian.data_parallel(operator) is operator
    model = torch.nn.Linear(2, 1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        in_place_sharpness(model, [0], 0.1)
